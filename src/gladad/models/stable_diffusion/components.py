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

NAMED_BASES = {"sd14": "CompVis/stable-diffusion-v1-4"}
"""Short names of bases."""
DEFAULT_FEATURES = "facebook/dino-vitb8"
BASE_COMPONENTS = ("vae", "unet", "text_encoder", "tokenizer", "scheduler")
LICENCES = {
    "CompVis/stable-diffusion-v1-4": "creativeml-openrail-m",
    "facebook/dino-vitb8": "apache-2.0",
    "facebook/dinov2-base": "apache-2.0",
    "facebook/dinov2-with-registers-base": "apache-2.0",
}
"""Licences of well-known repositories, for copies without their card (as their cards state them)."""
OTHER_VARIANTS = ("*.fp16.*", "*.non_ema.*")
"""Files of a repository that are not read."""
SAMPLED, BLOCK = 32, 2**16


@validated
class Part:
    """Where one part of a base is from.

    Attributes:
        source: Hub id, or the absolute path of a folder.
        revision: The Hub's commit; None for a folder.
        licence: As the model card states it; "unknown" if there is none.
        fingerprint: Of configurations and weights, see `fingerprint`.
    """

    source: str
    revision: str | None = None
    licence: str = "unknown"
    fingerprint: str = ""


@validated
class Origin:
    """Where the networks of a model are from.

    Attributes:
        base: Denoiser, schedule and text encoder, and the autoencoder unless it is from elsewhere.
        features: The extractor.
        vae: The autoencoder, if it is not the base's.
    """

    base: Part
    features: Part
    vae: Part | None = None


@dataclass(frozen=True)
class Components:
    """The networks of a base and the noise schedule, without the text encoder."""

    vae: Any
    unet: Any
    scheduler: Any
    features: Any


@dataclass(frozen=True)
class Located:
    """A part of a base on this machine."""

    folder: Path
    part: Part


def find_repository(
    source: str | os.PathLike[str],
    parts: Sequence[str],
    revision: str | None = None,
    local_files_only: bool = False,
    *,
    download: Callable[..., str] = snapshot_download,
) -> Located:
    """Find a repository: a folder, or a snapshot of the Hub's, downloaded if it must be.

    Args:
        source: Folder, Hub id, or one of `NAMED_BASES`.
        parts: Folders inside it that are needed; none means everything at its top.
        revision: Branch, tag or commit of the Hub.
        local_files_only: Never ask the Hub; use its local cache.
        download: With the signature of ``huggingface_hub.snapshot_download``.

    Raises:
        ModelFormatError: There is no such folder and no such repository within reach.
    """
    name, folder, commit = NAMED_BASES.get(str(source), str(source)), Path(source), None
    if folder.is_dir():
        name = str(folder.resolve())
    else:
        where = "in the local cache of the Hub" if local_files_only else "a reachable Hugging Face repository"
        at = f" at revision {revision}" if revision else ""
        complaint = f"{name}{at} is neither a folder nor {where}; check the name, or download it and give its folder"
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            raise ModelFormatError(complaint)
        allowed = [f"{part}/{kind}" if part else kind for part in (parts or ("",)) for kind in ("*.json", "*.txt", "*.safetensors")]
        options = {"allow_patterns": [*allowed, "README.md"], "ignore_patterns": list(OTHER_VARIANTS)}
        try:
            folder = Path(download(name, revision=revision, local_files_only=local_files_only, **options))
        except (OSError, ValueError, HfHubHTTPError, HFValidationError) as error:
            raise ModelFormatError(complaint) from error
        commit = folder.name if folder.parent.name == "snapshots" else revision
    return Located(folder, Part(source=name, revision=commit, licence=licence(folder, name), fingerprint=fingerprint(folder, parts)))


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


def locate_base(
    base: str | os.PathLike[str],
    features: str | os.PathLike[str] | None = None,
    vae: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    features_revision: str | None = None,
    vae_revision: str | None = None,
    local_files_only: bool = False,
) -> tuple[Located, Located, Located | None]:
    """Base, extractor and replaced autoencoder on this machine.

    Args:
        base: Stable Diffusion in diffusers form: folder, Hub id or short name; or a folder that holds one as ``sd`` and an extractor as
            ``dino``; or the folder of a saved `GladPipeline`.
        features: Transformer folder or Hub id. Default: ``base/dino`` where that exists, else DINO ViT-B/8.
        vae: Folder or Hub id of an `AutoencoderKL`, or folder with one as ``vae``, that replaces the base's.
        revision: Hub revision of ``base``.
        features_revision: The same of ``features``.
        vae_revision: The same of ``vae``.
        local_files_only: Never ask the Hub.

    Raises:
        ModelFormatError: One of them cannot be found.
    """
    root = Path(base)
    if (root / "sd").is_dir() and not (root / "unet").is_dir():
        features = features or (root / "dino" if (root / "dino").is_dir() else None)
        root = root / "sd"
    if (root / "model_index.json").is_file() and (root / "features").is_dir():  # a saved GLAD model
        features = features or root / "features"
    parts = BASE_COMPONENTS if vae is None else tuple(part for part in BASE_COMPONENTS if part != "vae")
    found = find_repository(root if root.is_dir() else base, parts, revision, local_files_only)
    extractor = find_repository(features or DEFAULT_FEATURES, (), features_revision, local_files_only)
    if vae is None:
        return found, extractor, None
    inner = Path(vae) / "vae"
    return found, extractor, find_repository(inner if inner.is_dir() else vae, (), vae_revision, local_files_only)


def load_networks(
    base: Located, features: Located, vae: Located | None, dtype: torch.dtype = torch.float32, unet_dtype: torch.dtype | None = None
) -> Components:
    """Load networks from their folders, from safetensors only.

    Args:
        base: Stable Diffusion in diffusers form.
        features: The extractor.
        vae: Autoencoder that replaces the base's.
        dtype: Of the networks.
        unet_dtype: Of the denoiser, if it differs.

    Raises:
        ModelFormatError: A component is missing or damaged.
    """
    return Components(
        vae=load_component(AutoencoderKL, base.folder / "vae" if vae is None else vae.folder, use_safetensors=True, dtype=dtype),
        unet=load_component(UNet2DConditionModel, base.folder / "unet", use_safetensors=True, dtype=unet_dtype or dtype),
        scheduler=load_component(DDIMScheduler, base.folder / "scheduler"),
        features=load_component(DinoFeatures, features.folder, dtype=dtype),
    )


def load_autoencoder(base: Located, features: Located) -> tuple[Any, Any]:
    """A base's autoencoder and its extractor alone, in float32.

    Raises:
        ModelFormatError: One is missing or damaged.
    """
    return load_component(AutoencoderKL, base.folder / "vae", use_safetensors=True), load_component(DinoFeatures, features.folder)


_shared: weakref.WeakValueDictionary[tuple[str, ...], Components] = weakref.WeakValueDictionary()
_sharing = threading.Lock()


def shared_networks(base: Located, features: Located, vae: Located | None, dtype: torch.dtype, device: torch.device) -> Components:
    """Networks that are in memory once, however many models ask for them; they go with the last of these.

    Args:
        base: As for `load_networks`.
        features: As for `load_networks`.
        vae: As for `load_networks`.
        dtype: Of all networks.
        device: Where they are.
    """
    places = (base, features) if vae is None else (base, features, vae)
    key = (*(f"{place.folder.resolve()}:{place.part.fingerprint}" for place in places), str(dtype), str(device))
    with _sharing:
        networks = _shared.get(key)
        if networks is None:
            networks = load_networks(base, features, vae, dtype)
            for network in (networks.vae, networks.unet, networks.features):
                network.to(device)
            _shared[key] = networks
        return networks


def latent_factor(vae: Any) -> int:
    """Pixels per latent cell of an autoencoder, along each side."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def latent_size(vae: Any, image_size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the latents of images ``(H, W)``.

    Raises:
        ConfigError: A side is not a multiple of `latent_factor`.
    """
    factor, (height, width) = latent_factor(vae), image_size
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
        return kind.from_pretrained(folder, **kwargs)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelFormatError(f"{folder} cannot be read as {kind.__name__} (safetensors only): {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
