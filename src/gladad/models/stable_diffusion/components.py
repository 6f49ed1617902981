"""Where the networks of a diffusers base come from: folders or the Hub, with their revisions and licences on record.

A base is a Stable Diffusion 1.x or 2.x in diffusers form, its autoencoder perhaps replaced by another, and a feature extractor.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from gladad.core.errors import ConfigError, ModelFormatError
from gladad.core.settings import validated
from gladad.features.vit import DinoFeatures

Source = str | os.PathLike[str]
NAMED_BASES = {"sd14": "CompVis/stable-diffusion-v1-4"}  # short name -> Hub id
DEFAULT_FEATURES = "facebook/dino-vitb8"
BASE_COMPONENTS = ("vae", "unet", "text_encoder", "tokenizer", "scheduler")
LICENCES = {  # of well-known repositories, for copies without their card (as their cards state them)
    "CompVis/stable-diffusion-v1-4": "creativeml-openrail-m",
    "facebook/dino-vitb8": "apache-2.0",
    "facebook/dinov2-base": "apache-2.0",
    "facebook/dinov2-with-registers-base": "apache-2.0",
}
OTHER_VARIANTS = ("*.fp16.*", "*.non_ema.*")  # files of a repository that are not read
SAMPLED, BLOCK = 32, 2**16


@validated
class Part:
    """Where one part of a base is from."""

    source: str  # Hub id, or the absolute path of a folder
    revision: str | None = None  # the Hub's commit; None for a folder
    licence: str = "unknown"  # as the model card states it
    fingerprint: str = ""  # of configurations and weights, see `fingerprint`


@validated
class Origin:
    """Where the networks of a model are from."""

    base: Part  # denoiser, schedule and text encoder, and the autoencoder unless it is from elsewhere
    features: Part  # the extractor
    vae: Part | None = None  # the autoencoder, if it is not the base's

    def fingerprints(self) -> dict[str, str]:
        """What of an origin decides a result: the files, not where they lie."""
        parts = {"base": self.base, "features": self.features, "vae": self.vae}
        return {name: part.fingerprint for name, part in parts.items() if part is not None}


@dataclass(frozen=True)
class Sources:
    """Where to take the parts of a base from."""

    base: Source  # Stable Diffusion: folder or Hub id; a folder of one as ``sd`` and an extractor as ``dino``; a saved `GladPipeline`
    features: Source | None = None  # transformer: folder or Hub id; None = that in the base's folder, or DINO ViT-B/8
    vae: Source | None = None  # replaces the base's: Hub id, folder of an ``AutoencoderKL``, or one that holds it as ``vae``
    revision: str | None = None  # of ``base`` on the Hub: branch, tag or commit
    features_revision: str | None = None
    vae_revision: str | None = None
    offline: bool = False  # never ask the Hub; use its local cache


@dataclass(frozen=True)
class Base:
    """The folders of a base on this machine."""

    folder: Path  # of the Stable Diffusion
    vae: Path
    features: Path
    origin: Origin


@dataclass(frozen=True)
class Components:
    """The networks of a base and the noise schedule, without the text encoder."""

    vae: Any
    unet: Any
    scheduler: Any
    features: Any


def find_repository(
    source: Source,
    parts: Sequence[str] = (),
    revision: str | None = None,
    offline: bool = False,
    *,
    download: Callable[..., str] = snapshot_download,
) -> tuple[Path, Part]:
    """The folder of a repository, downloaded from the Hub if it must be, and where it is from.

    Args:
        source: Folder, Hub id, or one of `NAMED_BASES`.
        parts: Folders inside it that are needed; none means everything at its top.
        revision: Branch, tag or commit of the Hub.
        offline: Never ask the Hub; use its local cache.
        download: With the signature of ``huggingface_hub.snapshot_download``.

    Raises:
        ModelFormatError: There is no such folder and no such repository within reach.
    """
    name, folder, commit = NAMED_BASES.get(str(source), str(source)), Path(source), None
    if folder.is_dir():
        name = str(folder.resolve())
    else:
        where = "in the local cache of the Hub" if offline else "a reachable Hugging Face repository"
        at = f" at revision {revision}" if revision else ""
        complaint = f"{name}{at} is neither a folder nor {where}; check the name, or download it and give its folder"
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            raise ModelFormatError(complaint)
        allowed = [f"{part}/{kind}" if part else kind for part in (parts or ("",)) for kind in ("*.json", "*.txt", "*.safetensors")]
        options = {"allow_patterns": [*allowed, "README.md"], "ignore_patterns": list(OTHER_VARIANTS)}
        try:
            folder = Path(download(name, revision=revision, local_files_only=offline, **options))
        except (OSError, ValueError, HfHubHTTPError, HFValidationError) as error:
            raise ModelFormatError(complaint) from error
        commit = folder.name if folder.parent.name == "snapshots" else revision
    return folder, Part(source=name, revision=commit, licence=licence(folder, name), fingerprint=fingerprint(folder, parts))


def licence(folder: Path, name: str) -> str:
    """The licence that a model card (``README.md``) states in its front matter, or that is known of a repository of this name."""
    try:
        card = (folder / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        card = ""
    front = re.match(r"---\s*\n(.*?)\n---", card, re.DOTALL)
    stated = re.search(r"^license:\s*(\S+)", front.group(1), re.MULTILINE) if front else None
    return stated.group(1).strip("'\"") if stated else LICENCES.get(name, "unknown")


def fingerprint(folder: Path, parts: Sequence[str] = ()) -> str:
    """SHA-256 (128 bits of it, in hexadecimal) of a base: of configurations whole; of each file of weights its size and some blocks.

    Reading everything would take longer than loading it.
    """
    found = hashlib.sha256()
    places = [folder / part for part in parts if part not in {"text_encoder", "tokenizer"}] or [folder]
    for place in places:
        for path in sorted(place.glob("*")):
            if path.suffix not in {".json", ".safetensors"} or not path.is_file() or any(map(path.match, OTHER_VARIANTS)):
                continue
            size = path.stat().st_size
            found.update(f"{place.name}/{path.name}:{size}".encode())
            with path.open("rb") as file:
                for block in range(SAMPLED):
                    file.seek(size * block // SAMPLED)
                    found.update(file.read(BLOCK))
    return found.hexdigest()[:32]


def locate_base(sources: Sources) -> Base:
    """Find a base on this machine, or download it.

    Raises:
        ModelFormatError: A part of it cannot be found.
    """
    base, features, offline = Path(sources.base), sources.features, sources.offline
    if (base / "sd").is_dir() and not (base / "unet").is_dir():
        features = features or (base / "dino" if (base / "dino").is_dir() else None)
        base = base / "sd"
    if (base / "model_index.json").is_file() and (base / "features").is_dir():  # a saved GLAD model
        features = features or base / "features"
    parts = [part for part in BASE_COMPONENTS if part != "vae" or sources.vae is None]
    folder, part = find_repository(base if base.is_dir() else sources.base, parts, sources.revision, offline)
    extractor, extractor_part = find_repository(features or DEFAULT_FEATURES, (), sources.features_revision, offline)
    vae, vae_part = (folder / "vae", None) if sources.vae is None else locate_autoencoder(sources.vae, sources.vae_revision, offline)
    return Base(folder, vae, extractor, Origin(base=part, features=extractor_part, vae=vae_part))


def locate_autoencoder(source: Source, revision: str | None = None, offline: bool = False) -> tuple[Path, Part]:
    """The folder of an autoencoder, given by itself or as the one of a base or of a model of ours; and where it is from.

    Raises:
        ModelFormatError: It cannot be found.
    """
    inner = [folder for folder in (Path(source) / "vae", Path(source) / "base" / "vae") if folder.is_dir()]
    return find_repository(inner[0] if inner else source, (), revision, offline)


def load_networks(base: Base, dtype: torch.dtype = torch.float32, unet_dtype: torch.dtype | None = None) -> Components:
    """Load networks from their folders, from safetensors only; the denoiser in ``unet_dtype`` if that is given.

    Raises:
        ModelFormatError: A component is missing or damaged.
    """
    return Components(
        vae=load_component(AutoencoderKL, base.vae, use_safetensors=True, dtype=dtype),
        unet=load_component(UNet2DConditionModel, base.folder / "unet", use_safetensors=True, dtype=unet_dtype or dtype),
        scheduler=load_component(DDIMScheduler, base.folder / "scheduler"),
        features=load_component(DinoFeatures, base.features, dtype=dtype),
    )


def load_autoencoder(base: Base) -> tuple[Any, Any]:
    """A base's autoencoder and its extractor alone, in float32.

    Raises:
        ModelFormatError: One is missing or damaged.
    """
    return load_component(AutoencoderKL, base.vae, use_safetensors=True), load_component(DinoFeatures, base.features)


_shared: weakref.WeakValueDictionary[tuple[str, ...], Components] = weakref.WeakValueDictionary()
_sharing = threading.Lock()


def shared_networks(base: Base, dtype: torch.dtype, device: torch.device) -> Components:
    """Networks that are in memory once, however many models ask for them; they go with the last of these.

    Raises:
        ModelFormatError: As for `load_networks`.
    """
    folders = (str(folder.resolve()) for folder in (base.folder, base.vae, base.features))
    key = (*folders, *base.origin.fingerprints().values(), str(dtype), str(device))
    with _sharing:
        components = _shared.get(key)
        if components is None:
            components = load_networks(base, dtype)
            for network in (components.vae, components.unet, components.features):
                network.to(device)
            _shared[key] = components
        return components


def latent_size(vae: Any, image_size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the latents of images ``(H, W)``.

    Raises:
        ConfigError: A side is not a multiple of the pixels per latent cell.
    """
    factor, (height, width) = 2 ** (len(vae.config.block_out_channels) - 1), image_size
    if min(image_size) < factor or height % factor or width % factor:
        raise ConfigError(f"the autoencoder needs image sides that are multiples of {factor}, got {height}x{width} (height x width)")
    return height // factor, width // factor


def embed_prompts(folder: Path, prompts: Sequence[str]) -> Tensor:
    """Text embeddings ``[len(prompts), L, D]`` from the CLIP text encoder of a Stable Diffusion folder."""
    tokenizer = load_component(CLIPTokenizer, folder / "tokenizer")
    encoder = load_component(CLIPTextModel, folder / "text_encoder", use_safetensors=True, dtype=torch.float32)
    length = encoder.config.max_position_embeddings
    tokens = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    with torch.no_grad():
        embeds: Tensor = encoder.eval()(tokens.input_ids).last_hidden_state
    return embeds


def load_component(kind: Any, folder: Path, **kwargs: Any) -> Any:
    """One component, or one sentence on what is wrong with its folder."""
    if not folder.is_dir():
        raise ModelFormatError(f"{folder.parent} has no folder {folder.name!r}; a base holds {', '.join(BASE_COMPONENTS)}")
    try:
        loaded = kind.from_pretrained(folder, **kwargs)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelFormatError(f"{folder} cannot be read as {kind.__name__} (safetensors only): {first_line(error)}") from error
    if isinstance(loaded, torch.nn.Module):
        move_to_boundaries(loaded)
    return loaded


def move_to_boundaries(network: torch.nn.Module) -> None:
    """Put weights at multiples of 64 bytes in memory, as those of a training are; read from a file in place, they may lie anywhere.

    Matrix products round otherwise there, and a model would give other scores, in their last digits, than before it was saved.
    """
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
