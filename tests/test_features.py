"""The feature extractor: DINO's ViT and DINOv2 with and without registers, as tiny models of the real classes, alone and in a pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny_base import tiny_base  # noqa: F401 (a fixture)
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel, ViTConfig, ViTModel

from gladad.algorithm import ReconstructionConfig, ScoringConfig, anomaly_map, image_noise, reconstruct
from gladad.core.errors import ConfigError, ModelFormatError
from gladad.features.vit import DinoFeatures
from gladad.models.stable_diffusion.pipeline import GladPipeline

PATCH = {"vit": 8, "dinov2": 14, "dinov2_with_registers": 14}
ARCHITECTURES = list(PATCH)
DINOV2 = ARCHITECTURES[1:]
SIDE = {"vit": 64, "dinov2": 70, "dinov2_with_registers": 70}  # of the images that the position embeddings are made for
SHAPE = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 3, "initializer_range": 0.2}


def plain(architecture: str, **changes: Any) -> Any:
    """A model of transformers, the same weights every time; none of them is zero or one."""
    options = {**SHAPE, "image_size": SIDE[architecture], "patch_size": PATCH[architecture], **changes}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any
        if architecture == "vit":
            model = ViTModel(ViTConfig(intermediate_size=48, **options), add_pooling_layer=False)
        elif architecture == "dinov2":
            model = Dinov2Model(Dinov2Config(mlp_ratio=2, **options))
        else:
            model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(mlp_ratio=2, num_register_tokens=3, **options))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def saved(folder: Path, architecture: str, **changes: Any) -> Path:
    """The folder of a plain model."""
    plain(architecture, **changes).save_pretrained(folder)
    return folder


def images(count: int, size: tuple[int, int], seed: int = 0) -> Tensor:
    """Smooth random images ``[count, 3, *size]`` in [0, 1]."""
    coarse = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, size, mode="bicubic", align_corners=False).clamp(0, 1)


def resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(image, size, mode="bilinear", align_corners=True)


# --------------------------------------------------------------------------------------------------------- the features


@pytest.mark.parametrize(
    ("architecture", "grid"), [("vit", (8, 8)), *((name, grid) for name in DINOV2 for grid in ((5, 5), (3, 7), (1, 1)))]
)
@torch.no_grad()
def test_features_are_the_plain_models_hidden_states_of_the_patches(architecture: str, grid: tuple[int, int]) -> None:
    features, model = DinoFeatures(plain(architecture)), plain(architecture)
    assert features.architecture == architecture
    rows, columns = grid
    image = images(2, (rows * PATCH[architecture], columns * PATCH[architecture]))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    for imagenet, pixels in ((True, (image - mean[:, None, None]) / std[:, None, None]), (False, 2 * image - 1)):
        output = model(pixels, output_hidden_states=True)
        found = features(image, layers=(1, 2, 3, 4), imagenet=imagenet)
        for x, hidden in zip(found, output.hidden_states[1:], strict=True):
            assert x.shape == (2, 24, *grid) and x.dtype == torch.float32
            patches = hidden[:, -rows * columns :]  # the last tokens, whatever precedes them
            assert torch.equal(x, patches.transpose(1, 2).reshape(2, 24, rows, columns))
        normalised = model.layernorm(found[-1].flatten(2).transpose(1, 2))
        torch.testing.assert_close(normalised, output.last_hidden_state[:, -rows * columns :])
        assert not torch.allclose(normalised, found[-1].flatten(2).transpose(1, 2), atol=0.1)


@torch.no_grad()
def test_a_patch_has_its_features_at_its_place(architecture: str) -> None:
    features, patch = DinoFeatures(plain(architecture)), PATCH[architecture]
    image = images(1, (3 * patch, 7 * patch))
    changed = image.clone()
    changed[..., 2 * patch :, 4 * patch : 5 * patch] = 1 - changed[..., 2 * patch :, 4 * patch : 5 * patch]
    for before, after in zip(features(image, layers=(1, 2)), features(changed, layers=(1, 2)), strict=True):
        change = (after - before).norm(dim=1)[0]
        assert change.shape == (3, 7)
        assert change.argmax() == 2 * 7 + 4
        assert change[2, 4] > 2 * change.flatten().topk(2).values[1]


@pytest.mark.parametrize("grid", [(3, 7), (7, 3), (9, 9), (1, 25)])
def test_position_embeddings_of_dinov2_at_other_sizes(grid: tuple[int, int]) -> None:
    """As documented: to the size of the grid; antialiased with registers, which alone is what the original code does."""
    rows, columns = grid
    found = {}
    for architecture in DINOV2:
        embeddings = plain(architecture).embeddings
        with torch.no_grad():  # the first feature grows down the rows and the second along the columns
            ramp = torch.arange(5.0)
            embeddings.position_embeddings[0, 1:, 0] = ramp.repeat_interleave(5)
            embeddings.position_embeddings[0, 1:, 1] = ramp.repeat(5)
            position = embeddings.interpolate_pos_encoding(torch.empty(1, 1 + rows * columns, 24), rows * 14, columns * 14)
        assert torch.equal(position[:, 0], embeddings.position_embeddings[:, 0])
        found[architecture] = position[0, 1:].reshape(rows, columns, 24)
        down, along = found[architecture][..., 0], found[architecture][..., 1]
        torch.testing.assert_close(down, down[:, :1].expand_as(down))
        torch.testing.assert_close(along, along[:1].expand_as(along))
        assert (down.diff(dim=0) > 0).all() and (along.diff(dim=1) > 0).all()

        stored = embeddings.position_embeddings[0, 1:].reshape(5, 5, 24).permute(2, 0, 1)[None]
        expected = F.interpolate(stored, grid, mode="bicubic", antialias=architecture == "dinov2_with_registers")
        torch.testing.assert_close(found[architecture], expected[0].permute(1, 2, 0))
        original = F.interpolate(stored, scale_factor=((rows + 0.1) / 5, (columns + 0.1) / 5), mode="bicubic")
        assert not torch.allclose(found[architecture], original[0].permute(1, 2, 0), atol=1e-3)


def test_sides_must_be_multiples_of_the_patch(architecture: str) -> None:
    features, patch = DinoFeatures(plain(architecture)), PATCH[architecture]
    with pytest.raises(ConfigError, match=rf"multiples of {patch}, got 60x{3 * patch} "):
        features(torch.rand(1, 3, 60, 3 * patch))
    for layers in ((0,), (1, 5)):
        with pytest.raises(ConfigError, match=r"feature layers must lie in 1\.\.\.4"):
            features(torch.rand(1, 3, patch, patch), layers=layers)


def test_the_nearest_size(architecture: str) -> None:
    features, patch = DinoFeatures(plain(architecture)), PATCH[architecture]
    multiples = [patch * count for count in range(100, 0, -1)]  # of two equally near the larger comes first
    for side in range(1, 700):
        nearest = min(multiples, key=lambda multiple, side=side: abs(multiple - side))
        assert features.nearest_size((side, 2 * patch)) == (nearest, 2 * patch)
    assert features.nearest_size(torch.Size((512, 256))) == ((512, 256) if patch == 8 else (518, 252))


@torch.no_grad()
def test_bfloat16(architecture: str, tmp_path: Path) -> None:
    folder, size = saved(tmp_path / "plain", architecture), (3 * PATCH[architecture], 5 * PATCH[architecture])
    features = DinoFeatures.from_pretrained(folder, dtype=torch.bfloat16)
    assert features.dtype == torch.bfloat16
    exact = DinoFeatures.from_pretrained(folder)
    assert exact.dtype == torch.float32
    image = images(2, size)
    for x, y in zip(features(image), exact(image), strict=True):
        assert x.dtype == torch.float32 and not torch.equal(x, y)
        assert F.cosine_similarity(x, y, dim=1).min() > 0.99
    features.save_pretrained(tmp_path / "half")
    again = DinoFeatures.from_pretrained(tmp_path / "half", torch_dtype=torch.bfloat16)
    assert all(torch.equal(x, y) for x, y in zip(again(image), features(image), strict=True))


# ---------------------------------------------------------------------------------------------------- loading and saving


@pytest.mark.parametrize(("architecture", "swiglu"), [*((name, False) for name in ARCHITECTURES), *((name, True) for name in DINOV2)])
def test_save_and_load_are_bit_exact_and_the_folder_is_plain(architecture: str, swiglu: bool, tmp_path: Path) -> None:
    changes = {"use_swiglu_ffn": True} if swiglu else {}
    features = DinoFeatures.from_pretrained(saved(tmp_path / "plain", architecture, **changes))
    expected = plain(architecture, **changes).state_dict()
    features.save_pretrained(tmp_path / "ours")
    assert {path.name for path in (tmp_path / "ours").iterdir()} == {"config.json", "model.safetensors"}
    loaded = DinoFeatures.from_pretrained(tmp_path / "ours")
    assert loaded.architecture == architecture
    kind: Any = type(plain(architecture))
    options = {"add_pooling_layer": False} if architecture == "vit" else {}
    unwrapped, info = kind.from_pretrained(tmp_path / "ours", output_loading_info=True, **options)
    assert not any(info.values())
    for model in (features.vit, loaded.vit, unwrapped):
        assert model.state_dict().keys() == expected.keys()
        assert all(torch.equal(x, expected[name]) for name, x in model.state_dict().items())
    image = images(1, (2 * PATCH[architecture], 3 * PATCH[architecture]))
    with torch.no_grad():
        assert all(torch.equal(x, y) for x, y in zip(features(image), loaded(image), strict=True))


@pytest.mark.parametrize("model_type", ["deit", "dinov3_vit", "clip_vision_model", None])
def test_other_types_of_model_are_refused(architecture: str, model_type: str | None, tmp_path: Path) -> None:
    folder = saved(tmp_path, architecture)
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == architecture
    (folder / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
    with pytest.raises(ModelFormatError) as raised:
        DinoFeatures.from_pretrained(folder)
    message = str(raised.value)
    assert f"of type {model_type!r}; " in message and "of type vit, dinov2, dinov2_with_registers" in message
    assert str(folder) in message and "\n" not in message


@pytest.mark.parametrize(
    ("architecture", "lost", "name"),
    [
        ("vit", "embeddings.cls_token", "ViT"),
        ("dinov2", "encoder.layer.3.layer_scale2.lambda1", "Dinov2"),
        ("dinov2_with_registers", "embeddings.register_tokens", "Dinov2WithRegisters"),
    ],
)
def test_missing_weights_are_refused(architecture: str, lost: str, name: str, tmp_path: Path) -> None:
    folder = saved(tmp_path, architecture)
    tensors = load_file(folder / "model.safetensors")
    del tensors[lost]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelFormatError, match=rf"not a complete {name}: 1 weights are missing or misshapen, such as {lost}"):
        DinoFeatures.from_pretrained(folder)


def test_pickles_are_not_read(architecture: str, tmp_path: Path) -> None:
    folder = saved(tmp_path, architecture)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        DinoFeatures.from_pretrained(folder)


def test_dinov2_base_has_its_86_6_million_parameters() -> None:
    """What ``facebook/dinov2-base`` holds, mask token and the position embeddings of 518 px among it."""
    with torch.device("meta"):
        features = DinoFeatures(Dinov2Model(Dinov2Config(image_size=518)))
    counts = {name: parameter.numel() for name, parameter in features.named_parameters()}
    width, tokens = 768, 1 + 37 * 37
    block = 4 * (width * width + width) + 2 * 4 * width * width + 5 * width + 3 * 2 * width  # attention, MLP, two norms, two scales
    assert sum(counts.values()) == (3 * 14 * 14 + 1) * width + (2 + tokens) * width + 12 * block + 2 * width == 86_580_480
    assert counts["vit.embeddings.mask_token"] == width
    assert features.patch_size == 14 and features.default_layers == (3, 6, 9, 12)


# ------------------------------------------------------------------------------------------------------- MLPs to train

TWO_LINEAR = ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]
GATED = ["gate_proj.weight", "gate_proj.bias", "up_proj.weight", "up_proj.bias", "down_proj.weight", "down_proj.bias"]


@pytest.mark.parametrize(
    ("architecture", "changes", "stack", "names"),
    [
        ("vit", {}, "vit.layers", TWO_LINEAR),
        ("dinov2", {}, "vit.encoder.layer", TWO_LINEAR),
        ("dinov2", {"use_swiglu_ffn": True}, "vit.encoder.layer", GATED),
        ("dinov2_with_registers", {}, "vit.encoder.layer", TWO_LINEAR),
        ("dinov2_with_registers", {"use_swiglu_ffn": True}, "vit.encoder.layer", GATED),
    ],
)
def test_mlp_parameters(architecture: str, changes: dict[str, Any], stack: str, names: list[str]) -> None:
    features: Any = DinoFeatures(plain(architecture, **changes))
    found = features.mlp_parameters((4, 2, 4))
    assert [name for name, _ in found] == [f"{stack}.{index}.mlp.{name}" for index in (1, 3) for name in names]
    every = dict(features.named_parameters())
    assert all(every[name] is parameter for name, parameter in found)
    assert features.mlp_parameters(()) == []
    for blocks in ((0,), (2, 5)):
        with pytest.raises(ConfigError, match=r"MLPs to train must lie in 1\.\.\.4, got"):
            features.mlp_parameters(blocks)


def test_mlp_parameters_change_what_follows_their_block_and_nothing_before(architecture: str) -> None:
    features, image = DinoFeatures(plain(architecture)), images(1, (2 * PATCH[architecture],) * 2)
    with torch.no_grad():
        before = features(image, layers=(1, 2, 3, 4))
        for _, parameter in features.mlp_parameters([3]):
            parameter += 0.1
        after = features(image, layers=(1, 2, 3, 4))
    assert [torch.equal(x, y) for x, y in zip(before, after, strict=True)] == [True, True, False, False]


# --------------------------------------------------------------------------------------------------------- in a pipeline


@pytest.fixture(params=DINOV2)
def pipeline(request: pytest.FixtureRequest, tiny_base: Path, tmp_path: Path) -> GladPipeline:  # noqa: F811
    return GladPipeline.from_base(tiny_base / "sd", saved(tmp_path / "extractor", request.param))


def extracted(pipeline: GladPipeline) -> list[Tensor]:
    """The list that every image given to the extractor from now on is appended to."""
    seen: list[Tensor] = []
    pipeline.features.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    return seen


def test_inspection_with_dinov2(pipeline: GladPipeline, tmp_path: Path) -> None:
    image, seen = images(2, (64, 64)), extracted(pipeline)
    latent, noise = pipeline.encode(image), image_noise((4, 8, 8), 0, 2)
    config = ReconstructionConfig(num_steps=4, step_threshold=0.0)
    found = reconstruct(pipeline, latent, noise, pipeline.schedule, config)
    assert found.latent.shape == latent.shape and found.latent.isfinite().all()
    maps = pipeline.score_maps(image, pipeline.decode(found.latent), ScoringConfig(pixel_weight=1.0), (64, 64))
    assert maps.shape == (2, 1, 64, 64) and maps.max() > 0
    assert {x.shape[-2:] for x in seen} == {(70, 70)}

    pipeline.save_pretrained(tmp_path / "model")
    loaded = GladPipeline.from_pretrained(tmp_path / "model")
    assert loaded.features.architecture == pipeline.features.architecture
    again = reconstruct(loaded, latent, noise, loaded.schedule, config)
    assert torch.equal(again.step, found.step) and torch.equal(again.latent, found.latent)


@torch.no_grad()
def test_the_step_search_compares_on_the_extractors_grid_and_fuses_on_the_latents(pipeline: GladPipeline) -> None:
    """One step by hand; the mask of 5 x 7 patches is read at the nearest patch above and left of each of 8 x 12 latent cells."""
    latent, noise = pipeline.encode(images(2, (64, 96))), image_noise((4, 8, 12), 0, 2)
    decoded = pipeline.decode(latent)
    (last,) = pipeline.features(resized(decoded, (70, 98)), layers=(4,), imagenet=False)
    assert last.shape == (2, 24, 5, 7)
    assert torch.equal(pipeline.latent_features(latent), last)

    found = reconstruct(pipeline, latent, noise, pipeline.schedule, ReconstructionConfig(num_steps=1, step_threshold=0.0))
    alpha, first = pipeline.schedule.alphas_cumprod, pipeline.schedule.alphas_cumprod[1]
    x = alpha[750].sqrt() * latent + (1 - alpha[750]).sqrt() * noise
    eps = pipeline.predict_noise(x, torch.tensor([1, 1]))
    generated = (x - (1 - first).sqrt() * eps) / first.sqrt()
    kept = (first.sqrt() * latent + (1 - first).sqrt() * (noise - eps)) / first.sqrt()
    ours, theirs = (F.normalize(pipeline.latent_features(z), dim=1).flatten(2) for z in (kept, generated))
    gap = (1 - (ours.transpose(1, 2) @ theirs).amax(dim=2)).reshape(2, 5, 7)
    rows, columns = torch.arange(8) * 5 // 8, torch.arange(12) * 7 // 12
    mask = torch.sigmoid(gap[:, rows][:, :, columns])[:, None]
    assert mask.amax() - mask.amin() > 0.01
    fused = mask * generated + (1 - mask) * kept
    assert found.step.tolist() == [1, 1]
    torch.testing.assert_close(found.latent, alpha[0].sqrt() * fused + (1 - alpha[0]).sqrt() * eps, rtol=0, atol=1e-4)


@torch.no_grad()
def test_maps_keep_their_size_where_features_cannot(pipeline: GladPipeline) -> None:
    """Both pictures go straight to the extractor's size; the pixel difference is that of the map's size."""
    image, other, size = images(2, (64, 96)), images(2, (64, 96), seed=1), (50, 80)
    scoring = ScoringConfig(pixel_weight=2.0, symmetric=True)
    maps = pipeline.score_maps(image, other, scoring, size)
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    pixel = ((resized(image, size) - resized(other, size)) / std).abs().mean(dim=1, keepdim=True)
    ours, theirs = (pipeline.features(resized(x, (56, 84))) for x in (image, other))
    torch.testing.assert_close(maps, anomaly_map(ours, theirs, size, scoring, pixel_difference=pixel))
    assert maps.shape == (2, 1, *size)


@torch.no_grad()
def test_nothing_is_resized_where_the_size_fits(tiny_base: Path) -> None:  # noqa: F811
    pipeline = GladPipeline.from_base(tiny_base)
    seen, image, other = extracted(pipeline), images(1, (64, 96)), images(1, (64, 96), seed=1)
    latent = pipeline.encode(image)
    pipeline.latent_features(latent)
    pipeline.score_maps(image, other, ScoringConfig(), (64, 96))
    pipeline.score_maps(image, other, ScoringConfig(), (80, 48))
    pair = torch.cat([image, other])
    expected = [pipeline.decode(latent), pair, resized(pair, (80, 48))]
    assert all(torch.equal(x, y) for x, y in zip(seen, expected, strict=True))
    assert pipeline.score_maps(image, other, ScoringConfig(), (66, 90)).shape == (1, 1, 66, 90)
    assert seen[-1].shape[-2:] == (64, 88)
