"""The checkpoints of GLAD's authors as one of our folders: denoiser, feature extractor and autoencoder under the names of our classes.

Every tensor of a file is used or belongs to a group that is known to be of no use, and every tensor of a network is supplied: a file that
fits only in part is not converted at all.
"""

from __future__ import annotations

import copy
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from gladad.core.errors import ConfigError, ModelFormatError
from gladad.interop.checkpoint_files import read_state_dict, shown
from gladad.models.stable_diffusion.folders import check_replaceable, save_folder
from gladad.models.stable_diffusion.pipeline import DEFAULT_PROMPT, GladPipeline

CONVERSION_FORMAT = "gladad-conversion"

# Names of our networks (patterns), and the same tensors' names in the checkpoints.
DINO_NAMES = (
    (r"embeddings\.cls_token", "cls_token"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.patch_embeddings\.projection\.(\w+)", r"patch_embed.proj.\1"),
    (r"layers\.(\d+)\.layernorm_before\.(\w+)", r"blocks.\1.norm1.\2"),
    (r"layers\.(\d+)\.attention\.[qkv]_proj\.(\w+)", r"blocks.\1.attn.qkv.\2"),
    (r"layers\.(\d+)\.attention\.o_proj\.(\w+)", r"blocks.\1.attn.proj.\2"),
    (r"layers\.(\d+)\.layernorm_after\.(\w+)", r"blocks.\1.norm2.\2"),
    (r"layers\.(\d+)\.mlp\.(fc[12]\.\w+)", r"blocks.\1.mlp.\2"),
    (r"layernorm\.(\w+)", r"norm.\1"),
)
LDM_NAMES = (
    (r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\.(.+)", r"encoder.down.\1.block.\2.\3"),
    (r"encoder\.down_blocks\.(\d+)\.downsamplers\.0\.(.+)", r"encoder.down.\1.downsample.\2"),
    (r"decoder\.up_blocks\.(\d+)\.resnets\.(\d+)\.(.+)", r"decoder.up.\1.block.\2.\3"),
    (r"decoder\.up_blocks\.(\d+)\.upsamplers\.0\.(.+)", r"decoder.up.\1.upsample.\2"),
    (r"(\w+)\.mid_block\.resnets\.0\.(.+)", r"\1.mid.block_1.\2"),
    (r"(\w+)\.mid_block\.resnets\.1\.(.+)", r"\1.mid.block_2.\2"),
    (r"(\w+)\.mid_block\.attentions\.0\.group_norm\.(\w+)", r"\1.mid.attn_1.norm.\2"),
    (r"(\w+)\.mid_block\.attentions\.0\.to_([qkv])\.(\w+)", r"\1.mid.attn_1.\2.\3"),
    (r"(\w+)\.mid_block\.attentions\.0\.to_out\.0\.(\w+)", r"\1.mid.attn_1.proj_out.\2"),
    (r"(\w+)\.conv_norm_out\.(\w+)", r"\1.norm_out.\2"),
)


@dataclass(frozen=True)
class ConvertedComponent:
    """One network that was read from a checkpoint."""

    source: Path  # the file
    tensors: int  # of the file, that the network took
    ignored: Mapping[str, int]  # group of tensors that it has no use for, such as "loss" -> how many


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did."""

    output: Path  # the folder that was written
    base: str  # where everything else came from
    components: Mapping[str, ConvertedComponent]  # unet, features, tuned_features, vae: those that were converted


def convert(
    base: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    unet: str | os.PathLike[str] | None = None,
    features: str | os.PathLike[str] | None = None,
    tuned_features: str | os.PathLike[str] | None = None,
    vae: str | os.PathLike[str] | None = None,
    extractor: str | os.PathLike[str] | None = None,
    prompt: str = DEFAULT_PROMPT,
    revision: str | None = None,
    local_files_only: bool = False,
) -> ConversionReport:
    """Write a folder that `GladPipeline.from_pretrained` reads, with networks out of other people's checkpoints, in float32.

    At least one of ``unet``, ``features``, ``tuned_features`` and ``vae`` is given. No file is trusted, see `checkpoint_files`; safetensors
    with the same names are read as well. Prefixes of data-parallel training (``module.``) are taken off.

    Args:
        base: As for `GladPipeline.from_base`; supplies the rest and the architectures.
        output: Folder to write. One that an earlier conversion wrote is replaced; any other that holds something is not.
        unet: ``pytorch_model.bin`` of accelerate, under the names of diffusers' ``UNet2DConditionModel``.
        features: ``.pth`` of a ViT under the names of the original DINO code. Its ``head`` is ignored.
        tuned_features: The same of a fine-tuned ViT: it scores, while the step search keeps the other one, as the authors' program does.
        vae: ``.ckpt`` of Lightning, under the names of latent diffusion (CompVis) or of diffusers' ``AutoencoderKL``. Its ``loss`` is
            ignored, and so is everything else where it is the ``first_stage_model`` of a larger model.
        extractor: ViT folder or Hub id, for its architecture. Default: the one that `GladPipeline.from_base` takes.
        prompt: What the denoiser was trained with.
        revision: Hub revision of ``base``.
        local_files_only: Never ask the Hub; use its local cache.

    Raises:
        ConfigError: No checkpoint is given, or one lies in the folder that would be replaced.
        ModelFormatError: A checkpoint is refused, damaged or does not fit; or the base is incomplete.
        WriteError: The output may not be replaced, or the disk refuses. In every case the output is left as it was.
    """
    given = {"unet": unet, "features": features, "tuned_features": tuned_features, "vae": vae}
    sources = {name: Path(source) for name, source in given.items() if source is not None}
    output = Path(output)
    if not sources:
        raise ConfigError("nothing to convert; give a checkpoint of the unet, of the features or of the vae")
    check_replaceable(output, CONVERSION_FORMAT)
    for source in sources.values():
        if source.resolve().is_relative_to(output.resolve()):
            raise ConfigError(f"{source}: lies in the folder that the conversion would replace; choose another output")
    checkpoints = {name: read_state_dict(source) for name, source in sources.items()}
    pipeline = GladPipeline.from_base(base, extractor, prompt=prompt, revision=revision, local_files_only=local_files_only)
    components = {name: _fill(pipeline, name, sources[name], checkpoint) for name, checkpoint in checkpoints.items()}
    described = {name: {**asdict(part), "source": part.source.name} for name, part in components.items()}
    save_folder(output, pipeline.save_pretrained, CONVERSION_FORMAT, base=str(base), prompt=pipeline.prompt, components=described)
    return ConversionReport(output, str(base), components)


Tensors = Mapping[str, Tensor]
Names = Sequence[tuple[str, str]]


class _Place(NamedTuple):
    key: str  # of a tensor of ours in a checkpoint
    shape: tuple[int, ...]  # it has there
    third: int | None  # of its rows, where the checkpoint fuses three matrices


def _places(state: Tensors, checkpoint: Tensors, names: Names) -> dict[str, _Place]:
    """Name in our network -> where the tensor lies in a checkpoint."""
    # DINO fuses query, key and value, in this order, into one matrix of three times the rows. Latent diffusion counts the decoder's levels
    # from the output, and its attention is of 1x1 convolutions. (diffusers has a converter for it, too, but it passes over what it does not
    # know instead of naming it.)
    if any(key.startswith("encoder.down_blocks.") for key in checkpoint):
        names = ()  # an autoencoder under diffusers' own names
    last = max((int(found[1]) for name in state if (found := re.match(r"decoder\.up_blocks\.(\d+)\.", name))), default=0)
    places = {}
    for name, tensor in state.items():
        key = next((found.expand(theirs) for ours, theirs in names if (found := re.fullmatch(ours, name))), name)
        shape, third = tuple(tensor.shape), None
        if names is DINO_NAMES and (fused := re.search(r"\.([qkv])_proj\.", name)):
            shape, third = (3 * shape[0], *shape[1:]), "qkv".index(fused[1])
        if names is LDM_NAMES:
            key = key.replace(".conv_shortcut.", ".nin_shortcut.")
            key = re.sub(r"^decoder\.up\.(\d+)", lambda found: f"decoder.up.{last - int(found[1])}", key)
            shape = (*shape, 1, 1) if ".mid.attn_1." in key and tensor.ndim == 2 else shape
        places[name] = _Place(key, shape, third)
    return places


@dataclass(frozen=True)
class _Format:
    names: Names = ()
    hint: str = "give the base that it was trained from"  # what to do when they do not fit
    prefixes: tuple[str, ...] = ("module.",)  # taken off every name, in this order
    useless: tuple[str, ...] = ()  # first parts of names that are ignored
    part: str | None = None  # where names start with this, the others are ignored


_DINO = _Format(
    DINO_NAMES,
    "give the ViT that it was trained from as the extractor, with the same grid of patches (the authors': facebook/dino-vitb8)",
    prefixes=("module.", "backbone."),
    useless=("head",),
)
_FORMATS = {
    "unet": _Format(),
    "features": _DINO,
    "tuned_features": _DINO,
    "vae": _Format(LDM_NAMES, prefixes=("module.", "first_stage_model."), useless=("loss",), part="first_stage_model."),
}


def _sorted(path: Path, checkpoint: Tensors, form: _Format) -> tuple[dict[str, Tensor], Counter[str]]:
    """Tensors that the network must take, by their names without prefixes, and how many others there are by group."""
    tensors: dict[str, Tensor] = {}
    ignored: Counter[str] = Counter()
    only = form.part if form.part and any(key.startswith(form.part) for key in checkpoint) else ""
    for key, tensor in checkpoint.items():
        name = reduce(str.removeprefix, form.prefixes, key)
        if not key.startswith(only):
            ignored[f"outside {only}*"] += 1
        elif (group := name.partition(".")[0]) in form.useless:
            ignored[group] += 1
        elif name in tensors:
            raise ModelFormatError(f"{path}: holds {shown(name)} twice, with and without a prefix; keep one of the two")
        else:
            tensors[name] = tensor
    return tensors, ignored


def _fill(pipeline: GladPipeline, component: str, path: Path, checkpoint: Tensors) -> ConvertedComponent:
    """Give a network the tensors of a checkpoint, all or none."""
    tuned = copy.deepcopy(pipeline.features) if component == "tuned_features" else None
    network = (tuned or pipeline.features).vit if component in {"features", "tuned_features"} else getattr(pipeline, component)
    form = _FORMATS[component]
    tensors, ignored = _sorted(path, checkpoint, form)
    state = network.state_dict()
    places = _places(state, tensors, form.names)
    expected = {place.key: place.shape for place in places.values()}
    plain = {key: tensor for key, tensor in tensors.items() if _is_plain(tensor)}
    shapes = {key: tuple(plain[key].shape) for key in expected if key in plain}
    problems = {
        "missing": [key for key in expected if key not in tensors],
        "unexpected": [key for key in tensors if key not in expected],
        "misshapen": [f"{key} {list(shape)} instead of {list(expected[key])}" for key, shape in shapes.items() if shape != expected[key]],
        "not of plain floating-point numbers": [key for key in expected if key in tensors and key not in plain],
    }
    if found := [f"{len(names)} {problem} ({_several(names)})" for problem, names in problems.items() if names]:
        raise ModelFormatError(f"{path}: does not fit the {component}: {', '.join(found)}; {form.hint}")
    taken = {name: plain[key] if third is None else plain[key].chunk(3)[third] for name, (key, _, third) in places.items()}
    weights = {name: tensor.reshape(state[name].shape) for name, tensor in taken.items()}
    network.load_state_dict(weights)  # copied into the network's own tensors, which are float32
    if tuned is not None:
        frozen = dict(pipeline.features.named_parameters())
        pipeline.tune_scoring({name: own for name, own in tuned.named_parameters() if not torch.equal(own, frozen[name])})
    return ConvertedComponent(path, len(expected), dict(ignored))


def _is_plain(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.layout is torch.strided and tensor.device.type == "cpu" and not tensor.is_nested


def _several(names: Sequence[str]) -> str:
    return ", ".join([shown(name) for name in names[:4]] + (["..."] if len(names) > 4 else []))
