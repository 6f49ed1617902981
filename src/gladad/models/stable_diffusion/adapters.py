"""Low-rank adapters of a denoiser (LoRA, arXiv 2106.09685): a few megabytes per product over one base that many products share.

A network can carry several adapters at once, of which one is switched on. Everything is peft's; what is added here is names that do not
clash, strict loading, and files.
"""

from __future__ import annotations

import itertools
import threading
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from gladad.core.errors import ModelFormatError
from gladad.core.tensors import load_tensors, save_tensors

ADAPTER_FILE = "adapter.safetensors"
Layers = Literal["attention", "all"]
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
OTHERS = ["net.0.proj", "net.2", "proj_in", "proj_out", "conv1", "conv2", "conv_shortcut", "conv", "time_emb_proj"]
TARGETS: dict[Layers, list[str]] = {"attention": ATTENTION, "all": ATTENTION + OTHERS}
"""The layers that are adapted: the projections of every attention, or every linear and convolutional layer of the blocks."""
_locks: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_guard = threading.RLock()  # a finaliser may come while the same thread holds it


@dataclass(frozen=True)
class Adapter:
    """A trained adapter."""

    rank: int  # of its matrices; the update is ``B A``, not scaled
    layers: Layers  # that it adapts
    weights: dict[str, Tensor]  # name -> float32 on the CPU

    def save(self, folder: Path) -> None:
        """Write `ADAPTER_FILE`."""
        save_tensors(folder / ADAPTER_FILE, self.weights)

    @classmethod
    def load(cls, folder: Path, rank: int, layers: Layers) -> Adapter:
        """Read what `save` wrote.

        Raises:
            ModelFormatError: The file is missing or damaged.
        """
        return cls(rank, layers, load_tensors(folder / ADAPTER_FILE))


def add_adapter(unet: Any, rank: int, layers: Layers, seed: int = 0) -> str:
    """Add an adapter that changes nothing yet, switch it on, and return its name; its weights are float32 and trainable, all else frozen.

    The seed is that of the random one of each two matrices.
    """
    taken = getattr(unet, "peft_config", {})
    name = next(name for number in itertools.count() if (name := f"product{number}") not in taken)
    unet.requires_grad_(False)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters are what is wanted
        torch.manual_seed(seed)
        unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=TARGETS[layers]), name)
    for key, parameter in unet.named_parameters():
        if f".{name}." in key:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
    return name


def read_adapter(unet: Any, name: str, rank: int, layers: Layers) -> Adapter:
    """The weights of an adapter of a network."""
    weights = get_peft_model_state_dict(unet, adapter_name=name)
    return Adapter(rank, layers, {key: value.detach().float().cpu().clone() for key, value in weights.items()})


def attach_adapter(unet: Any, adapter: Adapter) -> str:
    """Give a network a trained adapter, in the network's dtype; returns its name.

    Raises:
        ModelFormatError: The adapter is not for a network of this shape.
    """
    with _lock(unet):  # a new adapter is switched on at once: nobody may be in the middle of using another
        name = add_adapter(unet, adapter.rank, adapter.layers)
        expected = {key: value.shape for key, value in get_peft_model_state_dict(unet, adapter_name=name).items()}
        if expected != {key: value.shape for key, value in adapter.weights.items()}:
            detach_adapter(unet, name)
            raise ModelFormatError(f"{ADAPTER_FILE}: is not an adapter of rank {adapter.rank} of this base's denoiser")
        set_peft_model_state_dict(unet, adapter.weights, adapter_name=name)
        settle_adapter(unet, name)
        return name


def settle_adapter(unet: Any, name: str) -> None:
    """Freeze an adapter, in the dtype of its network."""
    dtype = unet.dtype
    for key, parameter in unet.named_parameters():
        if f".{name}." in key:
            parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(False)


@contextmanager
def switched_on(unet: Any, name: str | None) -> Iterator[None]:
    """Run the block with one adapter of a network switched on, and no other thread in it. Without a name, the network is as it is."""
    if name is None:
        yield
        return
    with _lock(unet):
        if unet.active_adapters() != [name]:
            unet.set_adapter(name)
        yield


def _lock(unet: Any) -> threading.RLock:
    with _guard:
        return _locks.setdefault(unet, threading.RLock())


def detach_adapter(unet: Any, name: str) -> None:
    """Take an adapter out of a network."""
    with _lock(unet):
        others = [other for other in unet.peft_config if other != name]
        if others and unet.active_adapters() == [name]:
            unet.set_adapter(others[0])
        unet.delete_adapters(name)


def merge_adapter(unet: Any, name: str) -> None:
    """Add an adapter to the weights of its network for good; the network carries no adapters then."""
    with switched_on(unet, name):
        unet.fuse_lora(adapter_names=[name])
        unet.unload_lora()
