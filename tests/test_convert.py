"""Checkpoints of others: read under their names, checked tensor by tensor, and never run."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import shlex
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from safetensors import SafetensorError
from safetensors.torch import save_file
from tiny_base import build_base
from torch import Tensor
from transformers import ViTConfig, ViTModel

from gladad.algorithm import image_noise
from gladad.core.errors import ConfigError, ModelFormatError
from gladad.core.storage import MODEL_FILE, WriteError
from gladad.features.vit import DinoFeatures
from gladad.interop.checkpoint_files import read_state_dict
from gladad.interop.convert import CONVERSION_FORMAT, convert
from gladad.models.stable_diffusion.folders import has_format, save_folder
from gladad.models.stable_diffusion.pipeline import GladPipeline

Weights = dict[str, Tensor]
PARTS = ("unet", "features", "vae")

# ------------------------------------------------------------------------------ our tiny networks under their original names


def dino_weights(state: Weights) -> Weights:
    """A ViT of transformers in the naming of facebookresearch/dino."""
    found = {
        "cls_token": state["embeddings.cls_token"],
        "pos_embed": state["embeddings.position_embeddings"],
        **renamed(state, "embeddings.patch_embeddings.projection", "patch_embed.proj"),
        **renamed(state, "layernorm", "norm"),
    }
    for i in range(sum(name.endswith("o_proj.weight") for name in state)):
        ours, theirs = f"layers.{i}", f"blocks.{i}"
        for kind in ("weight", "bias"):
            found[f"{theirs}.attn.qkv.{kind}"] = torch.cat([state[f"{ours}.attention.{x}_proj.{kind}"] for x in ("q", "k", "v")])
        found |= renamed(state, f"{ours}.attention.o_proj", f"{theirs}.attn.proj")
        found |= renamed(state, f"{ours}.layernorm_before", f"{theirs}.norm1") | renamed(
            state, f"{ours}.layernorm_after", f"{theirs}.norm2"
        )
        found |= renamed(state, f"{ours}.mlp.fc1", f"{theirs}.mlp.fc1") | renamed(state, f"{ours}.mlp.fc2", f"{theirs}.mlp.fc2")
    return found


def ldm_weights(state: Weights, levels: int) -> Weights:
    """An autoencoder of diffusers in the naming of latent diffusion."""
    found: Weights = {}
    for half, ours, theirs, sampler in (("encoder", "down_blocks", "down", "down"), ("decoder", "up_blocks", "up", "up")):
        found |= renamed(state, f"{half}.conv_in", f"{half}.conv_in") | renamed(state, f"{half}.conv_out", f"{half}.conv_out")
        found |= renamed(state, f"{half}.conv_norm_out", f"{half}.norm_out")
        for i in range(levels):
            level = i if half == "encoder" else levels - 1 - i
            for j in range(5):
                found |= resnet(state, f"{half}.{ours}.{i}.resnets.{j}", f"{half}.{theirs}.{level}.block.{j}")
            found |= renamed(state, f"{half}.{ours}.{i}.{sampler}samplers.0.conv", f"{half}.{theirs}.{level}.{sampler}sample.conv")
        for j in range(2):
            found |= resnet(state, f"{half}.mid_block.resnets.{j}", f"{half}.mid.block_{j + 1}")
        attention = f"{half}.mid_block.attentions.0"
        found |= renamed(state, f"{attention}.group_norm", f"{half}.mid.attn_1.norm")
        for x, y in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
            found[f"{half}.mid.attn_1.{y}.weight"] = state[f"{attention}.{x}.weight"][:, :, None, None]
            found[f"{half}.mid.attn_1.{y}.bias"] = state[f"{attention}.{x}.bias"]
    return found | renamed(state, "quant_conv", "quant_conv") | renamed(state, "post_quant_conv", "post_quant_conv")


def resnet(state: Weights, ours: str, theirs: str) -> Weights:
    found = renamed(state, f"{ours}.conv_shortcut", f"{theirs}.nin_shortcut")
    for name in ("norm1", "conv1", "norm2", "conv2"):
        found |= renamed(state, f"{ours}.{name}", f"{theirs}.{name}")
    return found


def renamed(state: Weights, ours: str, theirs: str) -> Weights:
    return {f"{theirs}.{kind}": state[f"{ours}.{kind}"] for kind in ("weight", "bias") if f"{ours}.{kind}" in state}


def lightning(weights: Weights) -> dict[str, Any]:
    """What Lightning puts around the weights of an autoencoder and of its loss."""
    loss = {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.ones(2, 3, 4, 4)}
    return {
        "epoch": 69,
        "global_step": 1000,
        "pytorch-lightning_version": "1.9.5",
        "state_dict": weights | loss,
        "callbacks": {"ModelCheckpoint": {"monitor": "val/rec_loss", "best_model_score": torch.tensor(0.1)}},
        "optimizer_states": [
            {"state": {0: {"step": 1, "exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3)}}, "param_groups": [{"lr": 1e-4}]}
        ],
        "lr_schedulers": [],
    }


# ------------------------------------------------------------------------------------------------------------- fixtures


@pytest.fixture(scope="session")
def trained(tiny_base: Path) -> GladPipeline:
    """The tiny base after a training: every tensor differs from the base's. Read only."""
    pipeline = GladPipeline.from_base(tiny_base)
    generator = torch.Generator().manual_seed(1)
    for part in PARTS:
        for tensor in network(pipeline, part).state_dict().values():
            tensor += 0.05 * torch.randn(tensor.shape, generator=generator)
    return pipeline


def network(pipeline: GladPipeline, part: str) -> Any:
    return pipeline.features.vit if part == "features" else getattr(pipeline, part)


@pytest.fixture(scope="session")
def original(trained: GladPipeline) -> dict[str, Weights]:
    """Its weights under their original names. Read only."""
    return {
        "unet": dict(trained.unet.state_dict()),
        "features": dino_weights(trained.features.vit.state_dict()),
        "vae": ldm_weights(trained.vae.state_dict(), levels=4),
    }


@pytest.fixture(scope="session")
def files(original: dict[str, Weights], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three files as GLAD's authors release them. Read only."""
    folder = tmp_path_factory.mktemp("released")
    paths = {"unet": folder / "pytorch_model.bin", "features": folder / "epoch7.pth", "vae": folder / "epoch=000069.ckpt"}
    torch.save(original["unet"], paths["unet"])
    torch.save(original["features"], paths["features"])
    torch.save(lightning(original["vae"]), paths["vae"])
    return paths


def outputs(pipeline: GladPipeline) -> dict[str, list[Tensor]]:
    """What each network computes."""
    image, latent = torch.rand(1, 3, 64, 80, generator=torch.Generator().manual_seed(0)), image_noise((4, 8, 8), 0)
    with torch.no_grad():
        return {
            "unet": [pipeline.denoise(latent, torch.tensor([300]), embeds[None]) for embeds in pipeline.prompt_embeds],
            "features": pipeline.features(image),
            "vae": [pipeline.encode(image), pipeline.decode(latent)],
        }


@pytest.fixture(scope="session")
def expected(trained: GladPipeline) -> dict[str, list[Tensor]]:
    return outputs(trained)


@pytest.fixture(scope="session")
def untrained(tiny_base: Path) -> dict[str, list[Tensor]]:
    return outputs(GladPipeline.from_base(tiny_base))


def stored(folder: Path, part: str) -> Weights:
    """The weights of one network in a converted folder."""
    if part == "features":
        return dict(DinoFeatures.from_pretrained(folder / part).vit.state_dict())
    kind = UNet2DConditionModel if part == "unet" else AutoencoderKL
    return dict(kind.from_pretrained(folder / part, use_safetensors=True).state_dict())


def equal(found: Weights, wanted: Weights) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# ------------------------------------------------------------------------------------------------------------ conversion


def test_a_conversion_computes_what_the_originals_do(tiny_base, trained, files, expected, untrained, tmp_path):
    report = convert(tiny_base, tmp_path / "converted", **files, prompt="a photo of sks pcb1")
    found = GladPipeline.from_pretrained(tmp_path / "converted")
    after = outputs(found)
    assert same(after["features"], expected["features"]) and not same(after["features"], untrained["features"])
    assert same(after["vae"], expected["vae"]) and not same(after["vae"], untrained["vae"])
    assert found.prompt == "a photo of sks pcb1" and not torch.equal(found.prompt_embeds[0], trained.prompt_embeds[0])
    assert torch.equal(after["unet"][1], expected["unet"][1])  # under the empty prompt, which is the same
    assert not torch.equal(after["unet"][1], untrained["unet"][1])
    assert found.scheduler.config == trained.scheduler.config

    assert (report.output, report.base) == (tmp_path / "converted", str(tiny_base))
    assert {name: part.source for name, part in report.components.items()} == files
    counts = {name: len(network(trained, name).state_dict()) for name in PARTS}
    counts["features"] -= 2 * 2 * 4  # q, k and v of four blocks are one
    assert {name: part.tensors for name, part in report.components.items()} == counts
    ignored = {name: dict(part.ignored) for name, part in report.components.items()}
    assert ignored == {"unet": {}, "features": {}, "vae": {"loss": 2}}
    assert {path.name for path in tmp_path.iterdir()} == {"converted"}
    assert {path.suffix for path in (tmp_path / "converted").rglob("*") if path.is_file()} == {".json", ".safetensors"}


@pytest.mark.parametrize("part", PARTS)
def test_what_is_not_given_is_the_bases(part, tiny_base, files, expected, untrained, tmp_path):
    report = convert(tiny_base, tmp_path / "converted", **{part: files[part]})
    assert set(report.components) == {part}
    after = outputs(GladPipeline.from_pretrained(report.output))
    for name in PARTS:
        assert same(after[name], (expected if name == part else untrained)[name])


def test_the_autoencoders_names_are_those_that_diffusers_converts(trained, original):
    config = {"down_block_types": [""] * 4, "up_block_types": [""] * 4}
    found = convert_ldm_vae_checkpoint(dict(original["vae"]), config)
    ours = trained.vae.state_dict()
    assert found.keys() == ours.keys()
    assert all(torch.equal(found[name].reshape(tensor.shape), tensor) for name, tensor in ours.items())


def test_the_extractors_names_compute_what_the_original_code_computes(trained, original):
    """DINO's forward pass, written down from its paper and the names alone."""
    weights, image, heads, epsilon = original["features"], torch.rand(1, 3, 64, 64), 3, trained.features.vit.config.layer_norm_eps

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], epsilon)

    x = F.conv2d(image * 2 - 1, weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"], stride=8).flatten(2).transpose(1, 2)
    x = torch.cat([weights["cls_token"], x], dim=1) + weights["pos_embed"]
    for i in range(4):
        q, k, v = linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv").reshape(1, 65, 3, heads, 8).permute(2, 0, 3, 1, 4)
        attended = ((q @ k.transpose(-2, -1)) / 8**0.5).softmax(dim=-1) @ v
        x = x + linear(attended.transpose(1, 2).reshape(1, 65, 24), f"blocks.{i}.attn.proj")
        x = x + linear(F.gelu(linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1")), f"blocks.{i}.mlp.fc2")
    found = trained.features(image, layers=(4,), imagenet=False)[0]
    torch.testing.assert_close(found, x[:, 1:].transpose(1, 2).unflatten(2, (8, 8)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("channels", "layers"), [((8, 16), 2), ((8, 8, 16), 1)])
def test_autoencoders_of_any_depth(channels, layers, tiny_base, tmp_path):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * len(channels), "up_block_types": ("UpDecoderBlock2D",) * len(channels)}
    settings = {"block_out_channels": channels, "layers_per_block": layers, "norm_num_groups": 4, "latent_channels": 4, "sample_size": 64}
    architecture, vae = AutoencoderKL(**kinds, **settings), AutoencoderKL(**kinds, **settings)
    architecture.save_pretrained(base / "sd" / "vae")
    torch.save({"state_dict": ldm_weights(vae.state_dict(), len(channels))}, tmp_path / "kl.ckpt")
    convert(base, tmp_path / "converted", vae=tmp_path / "kl.ckpt")
    assert equal(stored(tmp_path / "converted", "vae"), vae.state_dict())


FORMS: dict[str, tuple[str, Callable[[Weights], Any], dict[str, int]]] = {
    "data parallel": ("unet", lambda w: {f"module.{k}": v for k, v in w.items()}, {}),
    "parameters": ("unet", lambda w: {k: torch.nn.Parameter(v) for k, v in w.items()}, {}),
    "DINO's training": (
        "features",
        lambda w: {
            "teacher": {f"backbone.{k}": v for k, v in w.items()}
            | {"head.mlp.0.weight": torch.ones(2, 2), "head.last_layer.weight_g": torch.ones(2, 1)},
            "student": {f"module.backbone.{k}": v + 1 for k, v in w.items()} | {"module.head.mlp.0.weight": torch.ones(2, 2)},
            "epoch": 100,
        },
        {"head": 2},
    ),
    "student alone": ("features", lambda w: {"student": {f"module.backbone.{k}": v for k, v in w.items()}}, {}),
    "model": ("features", lambda w: {"model": w | {"head.weight": torch.ones(2, 2)}, "epoch": 3}, {"head": 1}),
    "bare": ("vae", lambda w: w, {}),
    "part of a latent diffusion": (
        "vae",
        lambda w: {
            "state_dict": {f"first_stage_model.{k}": v for k, v in w.items()}
            | {
                "first_stage_model.loss.logvar": torch.zeros(()),
                "betas": torch.ones(9),
                "model.diffusion_model.out.0.weight": torch.ones(2),
            }
        },
        {"loss": 1, "outside first_stage_model.*": 2},
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_prefixes_and_wrappers(form, tiny_base, trained, original, tmp_path):
    part, wrap, ignored = FORMS[form]
    torch.save(wrap(original[part]), tmp_path / "file")
    report = convert(tiny_base, tmp_path / "converted", **{part: tmp_path / "file"})
    assert equal(stored(tmp_path / "converted", part), network(trained, part).state_dict())
    assert dict(report.components[part].ignored) == ignored


def test_an_autoencoder_under_diffusers_names(tiny_base, trained, tmp_path):
    """The authors' program loads its autoencoders straight into diffusers' class."""
    torch.save(lightning(dict(trained.vae.state_dict())), tmp_path / "last.ckpt")
    report = convert(tiny_base, tmp_path / "converted", vae=tmp_path / "last.ckpt")
    assert equal(stored(report.output, "vae"), trained.vae.state_dict())
    assert report.components["vae"].ignored["loss"] == 2


def test_half_precision_becomes_float32(tiny_base, original, trained, tmp_path):
    torch.save({name: tensor.half() for name, tensor in original["unet"].items()}, tmp_path / "half.bin")
    convert(tiny_base, tmp_path / "converted", unet=tmp_path / "half.bin")
    found = stored(tmp_path / "converted", "unet")
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert equal(found, {name: tensor.half().float() for name, tensor in trained.unet.state_dict().items()})


def test_the_format_before_zip(original, tmp_path):
    torch.save(lightning(original["vae"]), tmp_path / "last.ckpt", _use_new_zipfile_serialization=False)
    found = read_state_dict(tmp_path / "last.ckpt")
    assert all(torch.equal(found[name], tensor) for name, tensor in original["vae"].items())
    assert len(found) - len(original["vae"]) == 2


def test_safetensors(tiny_base, original, trained, tmp_path):
    for part in PARTS:
        save_file({name: tensor.contiguous() for name, tensor in original[part].items()}, tmp_path / f"{part}.safetensors")
    convert(tiny_base, tmp_path / "converted", **{part: tmp_path / f"{part}.safetensors" for part in PARTS})
    assert all(equal(stored(tmp_path / "converted", part), network(trained, part).state_dict()) for part in PARTS)
    (tmp_path / "unet.safetensors").write_bytes((tmp_path / "unet.safetensors").read_bytes()[:999])
    with pytest.raises(ModelFormatError, match=r"unet\.safetensors: damaged"):
        convert(tiny_base, tmp_path / "other", unet=tmp_path / "unet.safetensors")


# --------------------------------------------------------------------------------------------------------- what is refused


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.marker}'",)


def write_zip(content: Any, path: Path) -> None:
    torch.save(content, path)


def write_legacy(content: Any, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def write_pickle(content: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(content, protocol=2))


def write_tar(content: Any, path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        for name in ("pickle", "storages", "tensors"):
            data = pickle.dumps(content if name == "pickle" else 0, protocol=2)
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


WRITERS = {"zip": write_zip, "legacy": write_legacy, "pickle": write_pickle, "tar": write_tar}


def refused(base: Path, folder: Path, match: str, **sources: Path) -> str:
    """The message of a conversion that fails and leaves nothing behind."""
    before = sorted(folder.rglob("*"))
    with pytest.raises(ModelFormatError, match=match) as caught:
        convert(base, folder / "converted", **sources)
    assert sorted(folder.rglob("*")) == before
    message = str(caught.value)
    assert "\n" not in message and all(str(source) in message for source in sources.values())
    return message


@pytest.mark.parametrize(("part", "name"), [("unet", "pytorch_model.bin"), ("features", "dino.pth"), ("vae", "last.ckpt")])
@pytest.mark.parametrize("form", WRITERS)
def test_a_malicious_file_is_refused_and_not_run(part, name, form, tiny_base, original, tmp_path):
    marker, path = tmp_path / "marker", tmp_path / name
    content: Any = {"extra": Bomb(marker)} if form == "pickle" else original[part] | {"extra": Bomb(marker)}
    WRITERS[form]({"state_dict": content} if part == "vae" else content, path)
    message = refused(tiny_base, tmp_path, "refused, and (nothing in it was|not) executed", **{part: path})
    assert not marker.exists()
    assert form == "tar" or f"other things than tensors ({os.name}.system)" in message
    if form in {"zip", "legacy"}:  # it is a weapon indeed
        torch.load(path, weights_only=False)
        assert marker.exists()


def test_foreign_objects_are_refused_and_the_advice_helps(tiny_base, trained, original, tmp_path, monkeypatch):
    """Old versions of Lightning key the state of their callbacks by class."""
    content = lightning(original["vae"]) | {"callbacks": {argparse.Namespace: {}}, "hyper_parameters": argparse.Namespace(lr=1)}
    torch.save(content, tmp_path / "FILE")
    message = refused(tiny_base, tmp_path, r"other things than tensors \(argparse.Namespace\)", vae=tmp_path / "FILE")
    command = shlex.split(message[message.index("python -c") :].removesuffix(", and give that file instead"))
    assert command[:2] == ["python", "-c"]
    monkeypatch.chdir(tmp_path)
    exec(command[2], {})
    convert(tiny_base, tmp_path / "converted", vae=tmp_path / "TENSORS.pt")
    assert equal(stored(tmp_path / "converted", "vae"), trained.vae.state_dict())


def test_a_program_of_torchscript_is_refused(tiny_base, tmp_path, recwarn):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "model.pt")
    refused(tiny_base, tmp_path, r"refused, and not executed: .* or a program \(.*TorchScript", unet=tmp_path / "model.pt")


def test_torch_must_keep_its_promise(files):
    with pytest.raises(ModelFormatError, match=r"by torch 2\.10 or newer only, this is 2\.9\.1"):
        read_state_dict(files["unet"], torch_version="2.9.1")
    assert read_state_dict(files["unet"], torch_version="2.10.0+cpu")


LFS = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (LFS, "is a Git LFS pointer, not the file itself"),
        (b"<!DOCTYPE html><html>Sign in</html>", "refused, and .* executed: .*(no checkpoint at all|damaged)"),
        (b"", "refused, and .* executed: .*(no checkpoint at all|damaged)"),
        (b"\x89HDF\r\n\x1a\n" + bytes(600), "refused, and .* executed: .*(no checkpoint at all|damaged)"),
        (bytes(600), "refused, and .* executed: .*(no checkpoint at all|damaged)"),
        (b"PK\x03\x04" + bytes(600), r"is damaged, incomplete or a program \(.*\); download the file"),
        (pickle.dumps({"a": 1}, protocol=2), "is damaged, incomplete"),
    ],
)
def test_other_files(content, match, tiny_base, tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    refused(tiny_base, tmp_path, match, unet=tmp_path / "pytorch_model.bin")


@pytest.mark.parametrize("form", ["zip", "legacy"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.999])
def test_truncated_files(form, share, tiny_base, original, tmp_path):
    path = tmp_path / "pytorch_model.bin"
    WRITERS[form](original["unet"], path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    refused(tiny_base, tmp_path, "is damaged", unet=path)


def test_a_pointer_in_place_of_safetensors(tiny_base, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(LFS)
    refused(tiny_base, tmp_path, "Git LFS pointer", unet=tmp_path / "model.safetensors")


def test_missing_files_and_folders(tiny_base, tmp_path):
    refused(tiny_base, tmp_path, "cannot be read .No such file or directory", unet=tmp_path / "nothing.bin")
    (tmp_path / "checkpoint-2500").mkdir()
    refused(tiny_base, tmp_path, "cannot be read .Is a directory.; give the file", unet=tmp_path / "checkpoint-2500")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({}, "holds no named tensors; give"),
        ({"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []}, r"holds no named tensors \(but state, param_groups\)"),
        ({"state_dict": {}, "epoch": 3}, "holds no named tensors"),
        ([torch.ones(3)], "holds a list, not a dictionary"),
        (torch.ones(3), "holds a Tensor, not a dictionary"),
    ],
)
def test_files_without_named_tensors(content, match, tiny_base, tmp_path):
    torch.save(content, tmp_path / "optimizer.bin")
    refused(tiny_base, tmp_path, match, unet=tmp_path / "optimizer.bin")


# ----------------------------------------------------------------------------------------------------- every tensor counts


def test_all_that_does_not_fit_is_listed(tiny_base, original, tmp_path):
    weights = dict(original["unet"])
    gone = [name for name in weights if name.startswith("mid_block.resnets.0")]
    for name in gone:
        del weights[name]
    weights |= {
        "conv_in.bias": torch.ones(7),
        "time_ids": torch.ones(1),
        "evil\n\x1b[31mname": torch.ones(1),
        "conv_out.bias": torch.ones(4).int(),
    }
    torch.save(weights, tmp_path / "pytorch_model.bin")
    message = refused(tiny_base, tmp_path, "does not fit the unet", unet=tmp_path / "pytorch_model.bin")
    assert f"{len(gone)} missing (" in message and f"{', '.join(gone[:4])}, ...)" in message
    assert r"2 unexpected (time_ids, evil\n\x1b[31mname)" in message
    assert "1 misshapen (conv_in.bias [7] instead of [16])" in message
    assert "1 not of plain floating-point numbers (conv_out.bias)" in message


CHANGES = {
    "features": ("blocks.1.attn.qkv.weight", "blocks.4.norm1.weight", "blocks.3.attn.qkv.bias"),
    "vae": ("decoder.mid.attn_1.proj_out.weight", "encoder.down.0.attn.0.q.weight", "decoder.up.3.upsample.conv.weight"),
}


@pytest.mark.parametrize("part", CHANGES)
def test_names_are_those_of_the_file(part, tiny_base, original, tmp_path):
    """Not those of our networks."""
    gone, foreign, wrong = CHANGES[part]
    weights = {name: tensor for name, tensor in original[part].items() if name != gone}
    torch.save(weights | {foreign: torch.ones(2), wrong: weights[wrong][:1]}, tmp_path / "file")
    message = refused(tiny_base, tmp_path, f"does not fit the {part}", **{part: tmp_path / "file"})
    shapes = [list(tensor.shape) for tensor in (weights[wrong][:1], weights[wrong])]
    assert f": 1 missing ({gone}), 1 unexpected ({foreign}), 1 misshapen ({wrong} {shapes[0]} instead of {shapes[1]}); give" in message


def test_tensors_that_are_no_plain_numbers(tiny_base, original, tmp_path):
    odd = {
        "conv_in.bias": torch.empty(16, device="meta"),
        "conv_norm_out.bias": torch.ones(16).to_sparse(),
        "conv_norm_out.weight": torch.ones(16, dtype=torch.complex64),
        "conv_out.bias": torch.ones(4, dtype=torch.int8),
    }
    torch.save(original["unet"] | odd, tmp_path / "file")
    message = refused(tiny_base, tmp_path, "does not fit the unet: 4 not of plain floating-point numbers", unet=tmp_path / "file")
    assert all(name in message for name in odd)


def test_a_name_with_and_without_prefix(tiny_base, original, tmp_path):
    torch.save(original["unet"] | {"module.conv_in.bias": torch.ones(16)}, tmp_path / "file")
    refused(tiny_base, tmp_path, "holds conv_in.bias twice", unet=tmp_path / "file")


def test_files_of_another_network(tiny_base, files, tmp_path):
    refused(tiny_base, tmp_path, "does not fit the unet: .* missing", unet=files["features"])


def test_another_grid_of_patches_needs_its_architecture(tiny_base, tmp_path):
    """And gets it by the extractor."""
    size = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 3, "patch_size": 8}
    vit = ViTModel(ViTConfig(**size, image_size=48), add_pooling_layer=False)
    torch.save(dino_weights(vit.state_dict()), tmp_path / "dino.pth")
    message = refused(
        tiny_base, tmp_path, r"1 misshapen \(pos_embed \[1, 37, 24\] instead of \[1, 65, 24\]\)", features=tmp_path / "dino.pth"
    )
    assert message.endswith("as the extractor, with the same grid of patches (the authors': facebook/dino-vitb8)")
    ViTModel(ViTConfig(**size, image_size=48), add_pooling_layer=False).save_pretrained(tmp_path / "vit")
    convert(tiny_base, tmp_path / "converted", features=tmp_path / "dino.pth", extractor=tmp_path / "vit")
    assert equal(stored(tmp_path / "converted", "features"), vit.state_dict())


# ------------------------------------------------------------------------------------------------------------- the output


def test_something_must_be_given(tiny_base, tmp_path):
    with pytest.raises(ConfigError, match="nothing to convert"):
        convert(tiny_base, tmp_path / "converted")
    assert not any(tmp_path.iterdir())


def test_an_earlier_conversion_is_replaced_by_a_whole_one_only(tiny_base, trained, files, tmp_path):
    output = tmp_path / "converted"
    output.mkdir()
    convert(tiny_base, output, unet=files["unet"])
    assert [has_format(folder, CONVERSION_FORMAT) for folder in (output, tmp_path, tiny_base)] == [True, False, False]
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}

    (tmp_path / "bad.pth").write_bytes(b"bad")
    with pytest.raises(ModelFormatError):
        convert(tiny_base, output, features=tmp_path / "bad.pth")

    def fill_the_disk(folder: Path) -> None:
        (folder / "half").write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device")

    with pytest.raises(WriteError, match=r"converted: cannot be written \(.*No space left"):
        save_folder(output, fill_the_disk, CONVERSION_FORMAT)
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"converted", "bad.pth"}

    convert(tiny_base, output, features=files["features"])
    assert equal(stored(output, "features"), trained.features.vit.state_dict())
    assert not equal(stored(output, "unet"), trained.unet.state_dict())
    record = json.loads((output / MODEL_FILE).read_text())
    assert record["components"] == {"features": {"source": "epoch7.pth", "tensors": 54, "ignored": {}}}


@pytest.mark.parametrize(
    "held", [{"notes.txt": "mine"}, {MODEL_FILE: '{"format": "gladad-model"}'}, {MODEL_FILE: "{"}, {"model_index.json": "{}"}]
)
def test_other_folders_are_not_overwritten(held, tiny_base, files, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, text in held.items():
        (folder / name).write_text(text)
    with pytest.raises(WriteError, match="folder: exists and is no earlier gladad-conversion; it will not be overwritten"):
        convert(tiny_base, folder, unet=files["unet"])
    assert {path.name: path.read_text() for path in folder.iterdir()} == held


def test_a_file_is_no_output(tiny_base, files, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(WriteError, match="file: is not a folder"):
        convert(tiny_base, tmp_path / "file", unet=files["unet"])
    assert (tmp_path / "file").read_text() == "mine"


def test_a_checkpoint_in_the_output_is_not_deleted(tiny_base, files, tmp_path):
    convert(tiny_base, tmp_path / "converted", unet=files["unet"])
    kept = shutil.copy(files["vae"], tmp_path / "converted" / "last.ckpt")
    with pytest.raises(ConfigError, match=r"last\.ckpt: lies in the folder that the conversion would replace"):
        convert(tiny_base, tmp_path / "converted", vae=kept)
    assert Path(kept).is_file()


def test_a_conversion_is_a_base(tiny_base, trained, files, tmp_path):
    """Of another one, even in the same place."""
    convert(tiny_base, tmp_path / "converted", unet=files["unet"])
    convert(tmp_path / "converted", tmp_path / "converted", features=files["features"])
    for part in ("unet", "features"):
        assert equal(stored(tmp_path / "converted", part), network(trained, part).state_dict())


def test_an_incomplete_base(files, tmp_path):
    base = build_base(tmp_path / "base")
    shutil.rmtree(base / "sd" / "text_encoder")
    with pytest.raises(ModelFormatError, match="no folder 'text_encoder'"):
        convert(base, tmp_path / "converted", unet=files["unet"])
    assert not (tmp_path / "converted").exists()
