"""How much memory training and inspection with a diffusers base need, computed from its configurations before anything is loaded.

The networks are built without weights and called once. What a backward pass would keep is counted as torch saves it; what comes and goes,
by what neighbouring layers make. Totals are meant to be right within 20 % (``scripts/check_memory_plan.py`` measures them). Not in
them: the program itself, kernels compiled on the way, gradient buckets of several processes, and what an allocator holds back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gladad.core.errors import ConfigError
from gladad.models.stable_diffusion.adapters import add_adapter
from gladad.models.stable_diffusion.architectures import BaseConfigs, build_without_weights
from gladad.models.stable_diffusion.components import latent_size
from gladad.models.stable_diffusion.device import bytes_text
from gladad.models.stable_diffusion.training import FinetuneConfig
from gladad.training.loop import DTYPES, Precision

Size = tuple[int, int]
Plan = dict[str, int]
"""Bytes at the peak: weights, gradients, optimizer, averaged weights, activations (what there is beyond these), and their total."""
TOKENS = 77  # of a prompt, in every Stable Diffusion 1.x and 2.x
MOMENTS = {"adamw": 8.0, "adamw8bit": 2 + 8 / 256, "muon": 4.0}  # bytes per trained weight; bitsandbytes has a scale per block of 256
AT_ONCE = 5  # layers one after the other whose results are there at a time, between the ends of a residual connection
SIDES = (512, 384, 256, 192, 128)  # pixels, of images that are suggested


def plan_training(configs: BaseConfigs, training: FinetuneConfig, image_size: Size, processes: int = 1, device_type: str = "cpu") -> Plan:
    """What each of the processes that share a batch of images ``(H, W)`` needs to train the denoiser; takes seconds.

    On "cuda", autocast keeps norms in float32, and AdamW treats all weights at once.

    Raises:
        ConfigError: The image size does not suit the autoencoder.
        ModelFormatError: A configuration describes no network.
    """
    full, cuda, dtype = training.method == "full", device_type == "cuda", DTYPES[training.precision]
    networks = unet, vae, _ = build_without_weights(configs, dtype, torch.float32 if full else dtype)
    latent = latent_size(vae, image_size)
    if full:
        unet.requires_grad_(True)
    else:
        add_adapter(unet, training.rank, training.layers)
    weights = _weights(*networks)
    trained = sum(parameter.numel() for parameter in unet.parameters() if parameter.requires_grad)
    gradients, optimizer = 4 * trained, round(MOMENTS[training.optimizer] * trained)
    share = math.ceil(training.batch_size / processes)
    images = min(training.micro_batch or share, share)  # per forward and backward pass; gradients are there from the second one on
    step = _kept(nn.Module.to(unet, dtype), images, latent, training.gradient_checkpointing, cuda) + (gradients if images < share else 0)
    if full and dtype != torch.float32:
        step += trained * dtype.itemsize  # autocast holds the weights again
    update = gradients * (2 if cuda and training.optimizer == "adamw" else 1)  # with a square root of all second moments
    peak = max(step, update, _picture(vae, image_size))
    return _plan(weights, peak - gradients, gradients, optimizer, gradients if training.ema else 0)


def plan_inspection(configs: BaseConfigs, image_size: Size, precision: Precision, *, guidance: bool) -> Plan:
    """What the inspection of one image ``(H, W)`` needs with all networks in ``precision``; guidance doubles the denoiser's batch.

    The step search decodes what it compares, two images, at once.

    Raises:
        ConfigError: The image size does not suit the autoencoder.
        ModelFormatError: A configuration describes no network.
    """
    networks = unet, vae, features = build_without_weights(configs, DTYPES[precision], DTYPES[precision])
    latent = latent_size(vae, image_size)
    image = torch.empty(2, 3, *features.nearest_size(image_size), device="meta")
    working = _working(unet, lambda: _denoise(unet, 1 + guidance, latent)), _working(features, lambda: features(image))
    return _plan(_weights(*networks), max(*working, _picture(vae, image_size, 2)))


def _plan(weights: int, activations: int, gradients: int = 0, optimizer: int = 0, averaged: int = 0) -> Plan:
    plan = {"weights": weights, "gradients": gradients, "optimizer": optimizer, "averaged weights": averaged, "activations": activations}
    return {name: size for name, size in plan.items() if size or name == "activations"} | {"total": sum(plan.values())}


def _weights(*networks: nn.Module) -> int:
    return sum(tensor.nbytes for network in networks for tensor in network.parameters())


def _denoise(unet: Any, batch: int, latent: Size) -> None:
    with torch.device("meta"):
        noisy = torch.empty(batch, unet.config.in_channels, *latent, dtype=unet.dtype)
        prompts = torch.empty(batch, TOKENS, unet.config.cross_attention_dim, dtype=unet.dtype)
        unet(noisy, torch.zeros(batch), encoder_hidden_states=prompts)


def _kept(unet: Any, batch: int, latent: Size, checkpointing: bool, norms_in_float32: bool) -> int:
    """Bytes at the end of a forward pass with gradients, and of what comes and goes on the way back. Changes the network."""
    half = unet.dtype != torch.float32
    for name, module in unet.train().named_modules():
        norm = isinstance(module, nn.GroupNorm | nn.LayerNorm)
        if norm and norms_in_float32:
            module.float()
        if norm or isinstance(module, nn.Linear | nn.Conv2d):  # as autocast does
            copy = half and ".lora_A." in name  # peft makes float32 of what adapters are given
            module.register_forward_pre_hook(lambda layer, given, copy=copy: given[0].to(layer.weight.dtype, copy=copy))
    seen = {id(parameter.untyped_storage()): parameter.untyped_storage() for parameter in unet.parameters()}
    kept: list[int] = []  # sizes of storages
    computed_twice = [0]  # bytes that each checkpointed block keeps on the way back

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in seen:
            seen[id(storage)] = storage  # so that no other one gets its id
            kept.append(storage.nbytes())
        return tensor

    def checkpoint(block: Callable[..., Any], *given: Any) -> Any:
        for value in given:
            if isinstance(value, Tensor):
                save(value)
        outside = len(kept)
        made = block(*given)
        computed_twice.append(sum(kept[outside:]))
        del kept[outside:]
        return made

    if checkpointing:
        unet.enable_gradient_checkpointing(checkpoint)
    unet.set_attn_processor(_attend)
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        _denoise(unet, batch, latent)
    return sum(kept) + max(computed_twice) + 2 * max(kept)  # and two gradients of results


def _attend(attention: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any) -> Any:
    """Keeps what the kernels of CPU and CUDA keep: query, key, value and result. The meta device's own keeps all pairs of places."""
    context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
    query, key, value = attention.to_q(hidden_states), attention.to_k(context), attention.to_v(context)
    return attention.to_out[0]((query + key.square().mean(1, keepdim=True)) * value.square().mean(1, keepdim=True))


def _picture(vae: Any, image_size: Size, decoded: int = 1) -> int:
    """Bytes that come and go while an image is encoded, or that many are decoded."""
    image = torch.empty(1, vae.config.in_channels, *image_size, dtype=vae.dtype, device="meta")
    return _working(vae, lambda: vae.decode(vae.encode(image).latent_dist.mean.repeat(decoded, 1, 1, 1)))


@torch.no_grad()
def _working(network: nn.Module, call: Callable[[], Any]) -> int:
    """Bytes that come and go during a call without gradients."""
    made: list[int] = []
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.GroupNorm | nn.LayerNorm):
            module.register_forward_hook(lambda layer, given, result: made.append(result.nbytes))
    call()
    return max(sum(made[start : start + AT_ONCE]) for start in range(len(made)))


def check_fits(
    plan: Callable[[FinetuneConfig, Size], Plan], training: FinetuneConfig, image_size: Size, available: int, device_type: str = "cpu"
) -> None:
    """Refuse a training that needs more than the available bytes, before anything is loaded.

    The plan is that of a training and an image size ``(H, W)`` with the base in question; it is asked again for what would fit. On "cuda"
    alone there is an optimiser with 8 bits.

    Raises:
        ConfigError: It does not fit; the message says what would.
    """
    if (needed := plan(training, image_size)["total"]) <= available:
        return
    suggestion = "nothing smaller fits either"
    for words, changed, size in _smaller(training, image_size, device_type):
        if (found := plan(changed, size)["total"]) <= available:
            suggestion = f"it fits with {words} ({bytes_text(found)})"
            break
    raise ConfigError(f"training needs {bytes_text(needed)} of memory, and {bytes_text(available)} are available; {suggestion}")


def _smaller(training: FinetuneConfig, image_size: Size, device_type: str) -> Iterator[tuple[str, FinetuneConfig, Size]]:
    """Trainings that need less and less, and what was changed: of the same kind, then of an adapter, then with smaller images."""
    frugal: list[tuple[str, Any]] = [("gradient_checkpointing", True), ("micro_batch", 2), ("micro_batch", 1)]
    routes = [[("method", "lora"), *frugal, ("precision", "bfloat16")]]
    if training.method == "full":
        routes.insert(0, [*frugal, ("optimizer", "adamw8bit")][: None if device_type == "cuda" else -1])
    for route in routes:
        changes: dict[str, Any] = {}
        for name, value in route:
            old = getattr(training, name)
            if old != value and not (name == "micro_batch" and value >= (old or training.batch_size)):
                changes[name] = value
                yield _words(changes), replace(training, **changes), image_size
    for side in SIDES:
        if side < min(image_size):
            height, width = (round(length * side / min(image_size) / 64) * 64 for length in image_size)
            yield _words(changes | {"images of": f"{height}x{width} pixels"}), replace(training, **changes), (height, width)


def _words(changes: dict[str, Any]) -> str:
    texts = {"method": "LoRA instead of full training", "gradient_checkpointing": "gradient checkpointing"}
    *most, last = (texts.get(name, f"{name} {value}") for name, value in changes.items())
    return f"{', '.join(most)} and {last}" if most else last
