"""The pipeline, its feature extractor and its training, on tiny components of real classes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_base import build_base, tiny_base  # noqa: F401 (a fixture)
from torch import Tensor
from transformers import CLIPTextModel, ViTModel

from gladad.algorithm import ReconstructionConfig, ScoringConfig, image_noise, image_score, reconstruct, velocity_to_noise
from gladad.core.errors import ConfigError, ModelFormatError
from gladad.features.vit import DinoFeatures, imagenet_normalise
from gladad.models.stable_diffusion.pipeline import GladPipeline


@pytest.fixture
def pipeline(tiny_base: Path) -> GladPipeline:  # noqa: F811
    return GladPipeline.from_base(tiny_base)


def images(count: int, size: tuple[int, int] = (64, 64), seed: int = 0) -> Tensor:
    """Smooth random images ``[count, 3, *size]`` in [0, 1]."""
    coarse = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, size, mode="bicubic", align_corners=False).clamp(0, 1)


def weights(pipeline: GladPipeline) -> dict[str, Tensor]:
    parts = ("vae", "unet", "features")
    return {f"{part}.{name}": x for part in parts for name, x in getattr(pipeline, part).state_dict().items()}


# ------------------------------------------------------------------------------------------------- loading and saving


def test_save_and_load_are_bit_exact(pipeline: GladPipeline, tmp_path: Path) -> None:
    pipeline.guidance_scale = 3.0
    pipeline.save_pretrained(tmp_path / "model")
    loaded = GladPipeline.from_pretrained(tmp_path / "model")
    before, after = weights(pipeline), weights(loaded)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(loaded.prompt_embeds, pipeline.prompt_embeds)
    assert (loaded.guidance_scale, loaded.prompt) == (3.0, "a photo of sks")
    assert loaded.scheduler.config == pipeline.scheduler.config
    latent, timestep = image_noise((4, 8, 8), 0), torch.tensor([500])
    with torch.no_grad():
        assert torch.equal(loaded.predict_noise(latent, timestep), pipeline.predict_noise(latent, timestep))
        assert torch.equal(loaded.latent_features(latent), pipeline.latent_features(latent))


def test_weights_that_are_read_lie_where_trained_ones_do(pipeline: GladPipeline, tiny_base: Path, tmp_path: Path) -> None:  # noqa: F811
    pipeline.save_pretrained(tmp_path)
    for read in (GladPipeline.from_pretrained(tmp_path), GladPipeline.from_base(tiny_base)):
        for network in (read.vae, read.unet, read.features):  # elsewhere matrix products round otherwise
            assert all(parameter.data_ptr() % 64 == 0 for parameter in network.parameters())
        name, weight = next(iter(read.features.named_parameters()))
        elsewhere = torch.empty(weight.numel() + 1)[1:].view_as(weight).copy_(weight.detach())
        assert elsewhere.data_ptr() % 64
        read.tune_scoring({name: elsewhere})
        assert read.tuned_weights()[name].data_ptr() % 64 == 0


def test_no_text_encoder_after_adoption(pipeline: GladPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"vae", "unet", "scheduler", "features", "conditioning", "model_index.json"}
    assert {p.suffix for p in tmp_path.rglob("*") if p.is_file()} == {".json", ".safetensors"}

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the text encoder was loaded")

    monkeypatch.setattr(CLIPTextModel, "from_pretrained", refuse)
    loaded = GladPipeline.from_pretrained(tmp_path)
    assert loaded.predict_noise(image_noise((4, 8, 8), 0), torch.tensor([1])).isfinite().all()


def test_features_are_a_plain_vit_folder(pipeline: GladPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path)
    vit = ViTModel.from_pretrained(tmp_path / "features", add_pooling_layer=False)
    ours = pipeline.features.vit.state_dict()
    assert ours.keys() == vit.state_dict().keys()
    assert all(torch.equal(ours[name], x) for name, x in vit.state_dict().items())


def test_prompts_are_embedded_once_and_differ(pipeline: GladPipeline, tiny_base: Path) -> None:  # noqa: F811
    assert pipeline.prompt_embeds.shape == (2, 77, 32)
    assert not torch.equal(*pipeline.prompt_embeds)
    other = GladPipeline.from_base(tiny_base / "sd", tiny_base / "dino", prompt="a photo of a nut")
    assert not torch.equal(other.prompt_embeds[0], pipeline.prompt_embeds[0])
    assert torch.equal(other.prompt_embeds[1], pipeline.prompt_embeds[1])


@pytest.mark.parametrize("load", [GladPipeline.from_base, GladPipeline.from_pretrained])
def test_a_missing_model_is_named(load: object, tmp_path: Path) -> None:
    for source in (tmp_path / "nowhere", "nowhere"):
        with pytest.raises(ModelFormatError, match=r"nowhere is neither a folder nor a reachable .*; check the name"):
            load(source)  # type: ignore[operator]
    with pytest.raises(ModelFormatError, match="some-one/some-thing is neither"):
        load("some-one/some-thing", local_files_only=True)  # type: ignore[operator]


def test_incomplete_folders_are_refused(tiny_base: Path, pipeline: GladPipeline, tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(ModelFormatError, match="not a saved GLAD model"):
        GladPipeline.from_pretrained(tiny_base)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelFormatError, match=r"no folder 'vae'"):
        GladPipeline.from_base(tmp_path / "empty", tiny_base / "dino")

    pipeline.save_pretrained(tmp_path / "model")
    stored = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    stored.write_bytes(stored.read_bytes()[:5000])
    with pytest.raises(ModelFormatError, match="not a complete GLAD model"):
        GladPipeline.from_pretrained(tmp_path / "model")


def test_pickles_are_neither_read_nor_written(tiny_base: Path, pipeline: GladPipeline, tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(ConfigError, match="safetensors only"):
        pipeline.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    base = shutil.copytree(tiny_base, tmp_path / "base")
    (base / "sd" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(pipeline.unet.state_dict(), base / "sd" / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(ModelFormatError, match="safetensors only"):
        GladPipeline.from_base(base)
    shutil.rmtree(base / "sd" / "unet")
    shutil.copytree(tiny_base / "sd" / "unet", base / "sd" / "unet")
    (base / "dino" / "model.safetensors").unlink()
    torch.save(pipeline.features.vit.state_dict(), base / "dino" / "pytorch_model.bin")
    with pytest.raises(ModelFormatError, match="safetensors only"):
        GladPipeline.from_base(base)


def test_a_shallower_checkpoint_is_not_filled_with_random_weights(tiny_base: Path, tmp_path: Path) -> None:  # noqa: F811
    folder = shutil.copytree(tiny_base / "dino", tmp_path / "dino")
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 4', '"num_hidden_layers": 5'))
    with pytest.raises(ModelFormatError, match="not a complete ViT"):
        DinoFeatures.from_pretrained(folder)


def test_a_denoiser_of_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match="noise or velocity"):
        GladPipeline.from_base(build_base(tmp_path, prediction_type="sample"))


def test_bfloat16(tiny_base: Path, tmp_path: Path) -> None:  # noqa: F811
    pipeline = GladPipeline.from_base(tiny_base, torch_dtype=torch.bfloat16)
    assert {pipeline.vae.dtype, pipeline.unet.dtype, pipeline.features.dtype} == {torch.bfloat16}
    latent = pipeline.encode(images(2))
    found = reconstruct(pipeline, latent, image_noise((4, 8, 8), 0, 2), pipeline.schedule, ReconstructionConfig(num_steps=3))
    assert found.latent.dtype == torch.float32 and found.latent.isfinite().all()
    pipeline.save_pretrained(tmp_path)
    assert GladPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16).unet.dtype == torch.bfloat16
    assert GladPipeline.from_pretrained(tmp_path).to(torch.float32).features.dtype == torch.float32


# --------------------------------------------------------------------------------------------------------- the contract


def test_encode_takes_the_mean_or_samples_per_image(pipeline: GladPipeline) -> None:
    image = images(3)
    mean = pipeline.encode(image)
    assert mean.shape == (3, 4, 8, 8)
    posterior = pipeline.vae.encode(image * 2 - 1).latent_dist
    torch.testing.assert_close(mean, posterior.mean * pipeline.vae.config.scaling_factor)


def test_decode_is_not_clipped(pipeline: GladPipeline) -> None:
    latent = image_noise((4, 8, 8), 0)
    expected = pipeline.vae.decode(latent / pipeline.vae.config.scaling_factor).sample
    torch.testing.assert_close(pipeline.decode(latent) * 2 - 1, expected)
    assert pipeline.decode(100 * latent).abs().max() > 1


def test_guidance(pipeline: GladPipeline) -> None:
    latent, timestep = image_noise((4, 8, 8), 0, 2), torch.tensor([10, 700])
    prompt, empty = pipeline.prompt_embeds.chunk(2)
    given, without = pipeline.denoise(latent, timestep, prompt), pipeline.denoise(latent, timestep, empty)
    assert not torch.allclose(given, without)
    torch.testing.assert_close(pipeline.predict_noise(latent, timestep), given)
    pipeline.guidance_scale = 9.0
    torch.testing.assert_close(pipeline.predict_noise(latent, timestep), without + 9 * (given - without), rtol=0, atol=1e-4)
    pipeline.guidance_scale = 0.0
    torch.testing.assert_close(pipeline.predict_noise(latent, timestep), without, rtol=0, atol=1e-5)


def test_guidance_off_calls_the_denoiser_once_per_image(pipeline: GladPipeline) -> None:
    sizes: list[int] = []
    pipeline.unet.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    latent, timestep = image_noise((4, 8, 8), 0, 3), torch.tensor([1, 2, 3])
    pipeline.predict_noise(latent, timestep)
    pipeline.guidance_scale = 2.0
    pipeline.predict_noise(latent, timestep)
    assert sizes == [3, 6]


def test_velocity_denoisers_predict_noise(pipeline: GladPipeline, tmp_path: Path) -> None:
    velocity = GladPipeline.from_base(build_base(tmp_path, prediction_type="v_prediction"))
    latent, timestep = image_noise((4, 8, 8), 0, 2), torch.tensor([10, 700])
    raw = pipeline.predict_noise(latent, timestep)  # the same network, read as noise
    expected = velocity_to_noise(latent, raw, pipeline.schedule.alpha_bar(timestep))
    torch.testing.assert_close(velocity.predict_noise(latent, timestep), expected)


def test_schedule_is_the_schedulers(pipeline: GladPipeline) -> None:
    assert torch.equal(pipeline.schedule.alphas_cumprod, pipeline.scheduler.alphas_cumprod)


def rebuild(pipeline: GladPipeline, image: Tensor, seeds: list[int], threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Steps, reconstructions and scores."""
    config = ReconstructionConfig(num_steps=5, step_threshold=threshold, min_step=200)
    noise = torch.cat([image_noise((4, 8, 8), seed) for seed in seeds])
    found = reconstruct(pipeline, pipeline.encode(image), noise, pipeline.schedule, config)
    reconstruction = pipeline.decode(found.latent)
    scoring = ScoringConfig(pixel_weight=1.0)
    return found.step, reconstruction, image_score(pipeline.score_maps(image, reconstruction, scoring, (64, 64)), scoring)


def test_an_image_is_scored_alone_as_in_any_batch(pipeline: GladPipeline) -> None:
    """Decisions are equal; numbers agree to 1e-4, for kernels may sum in another order at another batch size."""
    image, seeds = images(4), [3, 4, 5, 6]
    config = ReconstructionConfig(num_steps=5, step_threshold=0.0)
    noise = torch.cat([image_noise((4, 8, 8), seed) for seed in seeds])
    first = reconstruct(pipeline, pipeline.encode(image), noise, pipeline.schedule, config).gap_score.sort().values
    threshold = float(first[1] + first[2]) / 2  # some images stop at once, others go on
    steps, rebuilt, scores = rebuild(pipeline, image, seeds, threshold)
    assert len(set(steps.tolist())) > 1
    order = [2, 0, 3, 1]
    shuffled = rebuild(pipeline, image[order], [seeds[i] for i in order], threshold)
    assert torch.equal(shuffled[0], steps[order])
    torch.testing.assert_close(shuffled[2], scores[order], rtol=0, atol=1e-4)
    for i in range(4):
        alone = rebuild(pipeline, image[i : i + 1], seeds[i : i + 1], threshold)
        assert alone[0].item() == steps[i].item()
        torch.testing.assert_close(alone[1][0], rebuilt[i], rtol=0, atol=1e-4)
        torch.testing.assert_close(alone[2][0], scores[i], rtol=0, atol=1e-4)


def test_sides_must_fit_the_networks(pipeline: GladPipeline) -> None:
    with pytest.raises(ConfigError, match="multiples of 8, got 60x64"):
        pipeline.encode(torch.rand(1, 3, 60, 64))
    with pytest.raises(ConfigError, match="multiples of 8, got 64x36"):
        pipeline.features(torch.rand(1, 3, 64, 36))


def test_a_patch_size_other_than_the_latent_factor(tmp_path: Path) -> None:
    pipeline = GladPipeline.from_base(build_base(tmp_path, patch_size=16))
    image = images(2, (64, 96))
    latent = pipeline.encode(image)
    assert latent.shape[-2:] == (8, 12)
    assert pipeline.latent_features(latent).shape[-2:] == (4, 6)
    config = ReconstructionConfig(num_steps=3, step_threshold=0.0)
    found = reconstruct(pipeline, latent, image_noise((4, 8, 12), 0, 2), pipeline.schedule, config)
    assert found.latent.shape == latent.shape
    maps = pipeline.score_maps(image, pipeline.decode(found.latent), ScoringConfig(), (64, 96))
    assert maps.shape == (2, 1, 64, 96)


def test_score_maps(pipeline: GladPipeline) -> None:
    image, size = images(2), (80, 48)
    assert pipeline.score_maps(image, image, ScoringConfig(pixel_weight=1.0), size).abs().max() < 1e-5
    damaged = image.clone()
    damaged[:, :, :24, :24] = 1 - damaged[:, :, :24, :24]
    maps = pipeline.score_maps(damaged, image, ScoringConfig(blur_sigma=1.0, blur_kernel=5), size)
    assert maps.shape == (2, 1, *size)
    assert (maps[:, :, :20, :12].mean((1, 2, 3)) > maps[:, :, 50:, 30:].mean((1, 2, 3))).all()
    assert not pipeline.score_maps(damaged, image, ScoringConfig(), size, torch.zeros(2, 1, 64, 64)).any()


# --------------------------------------------------------------------------------------------------------- features


def test_features_are_block_outputs_before_the_final_norm(pipeline: GladPipeline) -> None:
    features, outputs = pipeline.features, []
    hooks = [block.register_forward_hook(lambda module, args, out: outputs.append(out)) for block in features.vit.layers]
    found = features(images(2), layers=(1, 4))
    for hook in hooks:
        hook.remove()
    for x, block in zip(found, (0, 3), strict=True):
        assert x.shape == (2, 24, 8, 8)
        torch.testing.assert_close(x.flatten(2).transpose(1, 2), outputs[block][:, 1:])
    assert features.default_layers == (1, 2, 3, 4)
    with pytest.raises(ConfigError, match=r"1\.\.\.4"):
        features(images(1), layers=(5,))


def test_features_normalise_for_themselves(pipeline: GladPipeline) -> None:
    image = images(1)
    with_imagenet = pipeline.features(image)[0]
    torch.testing.assert_close(with_imagenet, pipeline.features(imagenet_normalise(image) / 2 + 0.5, imagenet=False)[0])
    assert not torch.allclose(with_imagenet, pipeline.features(image, imagenet=False)[0])


@pytest.mark.parametrize(("height", "width"), [(64, 64), (80, 80), (48, 96), (8, 8), (120, 72)])
def test_position_embeddings_at_other_sizes(pipeline: GladPipeline, height: int, width: int) -> None:
    embeddings = pipeline.features.vit.embeddings
    rows, columns = height // 8, width // 8
    found = embeddings.interpolate_pos_encoding(torch.empty(1, 1 + rows * columns, 24), height, width)
    assert found.shape == (1, 1 + rows * columns, 24)
    grid = embeddings.position_embeddings[:, 1:].unflatten(1, (8, 8)).permute(0, 3, 1, 2)
    by_size = F.interpolate(grid, (rows, columns), mode="bicubic").flatten(2).transpose(1, 2)
    if (height, width) == (64, 64):
        torch.testing.assert_close(found[:, 1:], by_size)
    else:
        by_scale = F.interpolate(grid, scale_factor=((rows + 0.1) / 8, (columns + 0.1) / 8), mode="bicubic")
        torch.testing.assert_close(found[:, 1:], by_scale.flatten(2).transpose(1, 2))
        assert not torch.allclose(found[:, 1:], by_size, atol=1e-3)
    assert torch.equal(found[:, 0], embeddings.position_embeddings[:, 0])
