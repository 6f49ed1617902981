"""A ``lite`` model as ONNX graphs for `gladad.models.exported`.

Every graph takes batches of up to 63 images, or as many as need up to 63 calls of the denoiser. All arithmetic is float32.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gladad.core.errors import MissingExtraError
from gladad.core.tensors import save_tensors
from gladad.features.extractor import load_extractor
from gladad.models.feature_diffusion.model import FeatureDiffusion
from gladad.models.feature_diffusion.scale import Scale

LARGEST_BATCH = 63  # of calls: from 64 on the denoiser copies memory in another order, which is another graph
EXAMPLES = 2  # images that graphs are traced with


def write_graphs(model: FeatureDiffusion, folder: Path) -> None:
    """Write ``encoder_N.onnx`` and ``denoiser_N.onnx`` of each scale, ``scorer.onnx``, ``decoder.onnx`` and ``memory.safetensors``.

    Raises:
        MissingExtraError: The package that writes ONNX is not installed.
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("export", "'gladad[export]'") from error
    memories = [scale.memory for scale in model.all_scales()]  # which know their clusters if the model has inspected
    model = _in_float32(model)
    scales = model.all_scales()
    # The calls of an image are one batch. A limit that does not hold costs the tracer a second run, in which it lowers it by itself.
    largest = max(EXAMPLES, LARGEST_BATCH // max(1, scales[0].method.draws))
    many = {0: torch.export.Dim("batch", min=1, max=largest)}
    pixels = torch.zeros(EXAMPLES, *model.image_size, 3, dtype=torch.uint8)
    latents = [torch.zeros(EXAMPLES, scale.dimensions, *scale.grid) for scale in scales]
    inputs = ["latent", "nearest"] if model.config.settings.memory else ["latent"]
    for number, latent in enumerate(latents):
        write_graph(Encoder(model, number), (pixels,), (many,), ["pixels"], ["latent"], folder / f"encoder_{number}.onnx")
        shown = [latent.clone() for _ in inputs]  # the tracer would take the same tensor for one input
        found = ["rebuilt", "step"]
        write_graph(Denoiser(scales[number]), tuple(shown), (many,) * len(shown), inputs, found, folder / f"denoiser_{number}.onnx")
    magnitudes = [latent[:, :1].clone() for latent in latents]
    sizes = [f"magnitude_{number}" for number in range(len(scales))]
    write_graph(Scorer(model), (magnitudes,), ([many] * len(scales),), sizes, ["map", "score"], folder / "scorer.onnx")
    write_graph(Decoder(model), (latents[0],), (many,), ["rebuilt"], ["pixels"], folder / "decoder.onnx")
    memory = {}
    for number, (own, scale) in enumerate(zip(memories, scales, strict=True)):
        if model.config.settings.memory:
            memory[f"rows.{number}"] = own.rows.cpu()
            memory[f"centres.{number}"] = torch.from_numpy(own.index.vectors.centres)
        if model.config.settings.gaussians:
            memory |= {f"gaussians.{number}.{name}": value for name, value in scale.gaussians.state_dict().items()}
    save_tensors(folder / "memory.safetensors", memory)


class Encoder(nn.Module):
    """Pixels to the latents of a scale."""

    def __init__(self, model: FeatureDiffusion, number: int):
        super().__init__()
        self.scale, self.extractor = model.all_scales()[number], model.extractor
        self.smaller = Smaller(model.image_size, 1 << number) if number else nn.Identity()

    def forward(self, pixels: Tensor) -> Tensor:
        """``[B, H, W, 3]`` uint8 -> ``[B, D, h, w]``."""
        return self.scale.encode(self.smaller(pixels.permute(0, 3, 1, 2).float() / 255))


class Smaller(nn.Module):
    """The antialiased bilinear resize to a fraction of both sides, as a convolution: not every engine resizes alike."""

    weight: Tensor
    total: Tensor

    def __init__(self, size: tuple[int, int], factor: int):
        super().__init__()
        self.factor = factor
        taps = 1 - ((torch.arange(2 * factor) + 0.5 - factor) / factor).abs()
        self.register_buffer("weight", torch.outer(taps, taps)[None, None].repeat(3, 1, 1, 1))
        self.register_buffer("total", self._sum(torch.ones(1, 3, *size)))  # less at the border, where taps lie outside

    def _sum(self, image: Tensor) -> Tensor:
        return F.conv2d(image, self.weight, stride=self.factor, padding=self.factor // 2, groups=3)

    def forward(self, image: Tensor) -> Tensor:
        """``[B, 3, H, W]`` -> ``[B, 3, H / factor, W / factor]``."""
        return self._sum(image) / self.total


class Denoiser(nn.Module):
    """Latents of a scale to what is rebuilt of them."""

    def __init__(self, scale: Scale):
        super().__init__()
        self.scale = scale

    def forward(self, latent: Tensor, nearest: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latents, and what the memory holds nearest to them -> what is rebuilt ``[B, D, h, w]``, and the step ``[B]``."""
        rebuilt = self.scale.rebuild(latent, nearest=nearest)
        return rebuilt.latent, rebuilt.step


class Scorer(nn.Module):
    """How large residuals are, to map and score."""

    def __init__(self, model: FeatureDiffusion):
        super().__init__()
        self.model = model

    def forward(self, magnitudes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """``[B, 1, h, w]`` of each scale -> map ``[B, H, W]`` and score ``[B]``."""
        scales = self.model.all_scales()
        maps, score = self.model.summary([scale.evidence(own) for scale, own in zip(scales, magnitudes, strict=True)])
        return maps[:, 0], score


class Decoder(nn.Module):
    """Rebuilt latents to pictures."""

    def __init__(self, model: FeatureDiffusion):
        super().__init__()
        self.model = model

    def forward(self, rebuilt: Tensor) -> Tensor:
        """``[B, D, h, w]`` of the first scale -> ``[B, H, W, 3]`` uint8."""
        return (self.model.decoded(rebuilt) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


def _in_float32(model: FeatureDiffusion) -> FeatureDiffusion:
    """A copy whose extractor computes in float32, on the CPU."""
    copy = FeatureDiffusion(model.config, load_extractor(model.config.settings.features))
    for own, scale in zip(copy.all_scales(), model.all_scales(), strict=True):
        own.memory.remember(scale.memory.rows.cpu(), scale.memory.owner.cpu())
        own.gaussians.hold(*(buffer.cpu() for buffer in scale.gaussians.buffers()))
    copy.load_state_dict(model.state_dict())
    return copy.eval().requires_grad_(False)


def write_graph(
    graph: nn.Module, arguments: tuple[Any, ...], dynamic: Any, inputs: Sequence[str], outputs: Sequence[str], path: Path
) -> None:
    """Trace a module with arguments, and write it as ONNX."""
    with torch.no_grad(), _quiet():
        graph(*arguments)  # what is made once and kept is not to be made by the tracer
        program = torch.onnx.export(
            graph.eval(), arguments, dynamo=True, verbose=False, input_names=inputs, output_names=outputs, dynamic_shapes=dynamic
        )
        assert program is not None  # of the present exporter
        program.save(path)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says of packages that it does not need here."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
