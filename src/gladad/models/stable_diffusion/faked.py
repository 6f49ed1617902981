"""Networks without memory, and a count of the memory that they would use.

Networks are built on torch's meta device and then run under `FakeTensorMode`, where tensors have shapes, dtypes and lifetimes but no
content. `LiveMemory` counts the storages that are alive, of such tensors and of real ones alike.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoConfig

from gladad.core.errors import ModelFormatError
from gladad.features.vit import TRANSFORMERS, DinoFeatures

Config = dict[str, Any]
"""A network's ``config.json``."""


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of all storages that are alive: those made while it is entered, and those it is told to `watch`.

    Views share their storage and count once. What an operation needs while it runs, and returns before it ends, is not seen.

    Attributes:
        live: Bytes now.
        peak: The largest number of bytes since the last `restart`.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and count what it made, while its inputs are still there."""
        result = func(*args, **(kwargs or {}))
        self.watch(result)
        return result

    def watch(self, tensors: Any) -> None:
        """Count tensors, in containers of any kind."""
        for tensor in tree_iter(tensors):
            if isinstance(tensor, Tensor):
                self._watch(tensor.untyped_storage())

    def watch_weights(self, network: nn.Module) -> int:
        """Count parameters and buffers; returns their bytes."""
        before = self.live
        self.watch([*network.parameters(), *network.buffers()])
        return self.live - before

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._known:
            return

        def gone(_: object) -> None:
            self.live -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)

    def restart(self) -> None:
        """Forget the peak so far."""
        self.peak = self.live


def faked() -> FakeTensorMode:
    """The mode in which tensors have no memory; networks enter it by ``to_empty``."""
    return FakeTensorMode(allow_non_fake_inputs=True)  # parameters come from the meta device


def build_unet(config: Config) -> Any:
    """The denoiser of a configuration on the meta device, float32.

    Raises:
        ModelFormatError: The configuration describes none.
    """
    return _build("denoiser", lambda: UNet2DConditionModel.from_config(config))  # type: ignore[no-untyped-call]


def build_vae(config: Config) -> Any:
    """The autoencoder of a configuration on the meta device, float32.

    Raises:
        ModelFormatError: The configuration describes none.
    """
    return _build("autoencoder", lambda: AutoencoderKL.from_config(config))  # type: ignore[no-untyped-call]


def build_features(config: Config) -> DinoFeatures:
    """The extractor of a configuration on the meta device, float32.

    Raises:
        ModelFormatError: The configuration describes none.
    """

    def build() -> DinoFeatures:
        kind = TRANSFORMERS[config["model_type"]]
        options = {"add_pooling_layer": False} if config["model_type"] == "vit" else {}
        return DinoFeatures(kind(AutoConfig.for_model(**config), **options))

    features: DinoFeatures = _build("feature extractor", build)
    return features


def _build(name: str, build: Callable[[], Any]) -> Any:
    try:
        with torch.device("meta"):
            return build()
    except Exception as error:  # whatever a constructor stumbles over, the cause is the configuration
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelFormatError(
            f"the {name}'s config.json describes no network that can be built: {type(error).__name__}: {reason}"
        ) from error


def cast(network: Any, dtype: torch.dtype) -> Any:
    """Change the dtype of a network that has no memory yet, and return it."""
    return nn.Module.to(network, dtype)  # diffusers' own warns of modules to be kept in float32, though there are none


def parameter_bytes(parameters: Iterable[Tensor]) -> int:
    """What tensors take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in parameters)


def keep_norms_in_float32(network: nn.Module) -> None:
    """Make norms compute as a GPU's autocast has it, whatever the device; what follows them is in float32 too, until the next product."""
    for module in network.modules():
        if isinstance(module, nn.GroupNorm):
            _compute_in_float32(module, F.group_norm, module.num_groups)
        elif isinstance(module, nn.LayerNorm):
            _compute_in_float32(module, F.layer_norm, module.normalized_shape)


def _compute_in_float32(norm: Any, compute: Callable[..., Tensor], shape: Any) -> None:
    def forward(x: Tensor) -> Tensor:
        weight, bias = (None if parameter is None else parameter.float() for parameter in (norm.weight, norm.bias))
        return compute(x.float(), shape, weight, bias, norm.eps)

    norm.forward = forward
