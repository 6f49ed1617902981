"""A small UNet: residual blocks that are told the timestep, attention at the coarsest level, and skips between the two sides.

Weights have the names, shapes and initial values of a ``UNet2DModel`` of diffusers 0.x with one layer per block, and every result is that
model's bit for bit; but nothing besides PyTorch is needed to build it. Where an order of operations looks arbitrary, that is why. The one
exception is training on a processor in bfloat16, which takes a quarter less time by other kernels of the same operations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Way = Literal["down", "middle", "up"]


@dataclass(frozen=True)
class _Shape:
    time: int  # features of the timestep
    groups: int  # of every group norm
    head_dim: int  # channels of an attention head


def _trains_in_bfloat16(x: Tensor) -> bool:
    """Whether kernels are chosen for training in bfloat16 on a processor."""
    return x.device.type == "cpu" and torch.is_grad_enabled() and torch.is_autocast_enabled("cpu")


class _GroupNorm(nn.GroupNorm):
    """Group norm; in channels-last order torch has no fast kernel of it for bfloat16 (five times as long, forward)."""

    def forward(self, x: Tensor) -> Tensor:
        if _trains_in_bfloat16(x) and x.is_contiguous(memory_format=torch.channels_last):
            return super().forward(x.contiguous()).contiguous(memory_format=torch.channels_last)
        return super().forward(x)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of queries, keys and values ``[B, heads, places, D]``; for few places the gradient of torch's own is slow in bfloat16."""
    if not _trains_in_bfloat16(q):
        return F.scaled_dot_product_attention(q, k, v)
    weights = (q * q.shape[-1] ** -0.5) @ k.mT
    mixed: Tensor = weights.softmax(-1, dtype=torch.float32).to(v.dtype) @ v
    return mixed


class _Resnet(nn.Module):
    """Two convolutions around a residual connection; the timestep's features are added in between."""

    def __init__(self, inputs: int, outputs: int, shape: _Shape):
        super().__init__()
        self.norm1 = _GroupNorm(shape.groups, inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time_emb_proj = nn.Linear(shape.time, outputs)
        self.norm2 = _GroupNorm(shape.groups, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        y: Tensor = self.conv1(F.silu(self.norm1(x)))
        y = y + self.time_emb_proj(F.silu(time))[:, :, None, None]
        y = self.conv2(F.silu(self.norm2(y)))
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x.contiguous() if self.training else x)
        return x + y


class _Attention(nn.Module):
    """Every place attends to all others; residual."""

    def __init__(self, channels: int, shape: _Shape):
        super().__init__()
        self.heads = channels // shape.head_dim
        inner = self.heads * shape.head_dim
        self.group_norm = nn.GroupNorm(shape.groups, channels)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, inner) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(inner, channels)])

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.group_norm(x.flatten(2)).transpose(1, 2)
        q, k, v = (project(tokens).unflatten(2, (self.heads, -1)).transpose(1, 2) for project in (self.to_q, self.to_k, self.to_v))
        mixed = _attend(q, k, v).transpose(1, 2).flatten(2)
        y: Tensor = self.to_out[0](mixed)
        return y.transpose(1, 2).reshape(x.shape) + x


class _Resample(nn.Module):
    """Half or twice the resolution."""

    def __init__(self, channels: int, stride: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=stride, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.conv.stride == (1, 1):
            if x.shape[0] >= 64:  # as in diffusers; another memory order would be another order of sums
                x = x.contiguous()
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        y: Tensor = self.conv(x)
        return y


class _Stage(nn.Module):
    """What happens at one resolution, on the way down, in the middle, or on the way up.

    Each of the first ``attentions`` residual blocks is followed by attention; ``resamples`` tells whether the resolution changes after
    them. On the way down results are left among the skips; on the way up every block takes the last skip.
    """

    def __init__(self, inputs: Sequence[int], width: int, shape: _Shape, way: Way, attentions: int, resamples: bool):
        super().__init__()
        blocks: list[nn.Module] = []
        mixers: list[nn.Module] = []
        for index, channels in enumerate(inputs):  # in turns: initial weights come from one stream of random numbers
            blocks.append(_Resnet(channels, width, shape))
            if index < attentions:
                mixers.append(_Attention(width, shape))
        self.way = way
        self.attentions = nn.ModuleList(mixers)
        self.resnets = nn.ModuleList(blocks)
        self.downsamplers = nn.ModuleList([_Resample(width, 2)] if resamples and way == "down" else [])
        self.upsamplers = nn.ModuleList([_Resample(width, 1)] if resamples and way == "up" else [])

    def forward(self, x: Tensor, time: Tensor, skips: list[Tensor]) -> Tensor:
        for index, block in enumerate(self.resnets):
            x = block(torch.cat([x, skips.pop()], dim=1) if self.way == "up" else x, time)
            if index < len(self.attentions):
                x = self.attentions[index](x)
        if self.way == "down":
            skips.append(x)
        for sampler in self.downsamplers:
            x = sampler(x)
            skips.append(x)
        for sampler in self.upsamplers:
            x = sampler(x)
        return x


class _TimeEmbedding(nn.Module):
    """Sines and cosines of the timestep, and two layers."""

    def __init__(self, waves: int, features: int):
        super().__init__()
        self.waves = waves
        self.linear_1 = nn.Linear(waves, features)
        self.linear_2 = nn.Linear(features, features)

    def forward(self, timestep: Tensor) -> Tensor:
        half = self.waves // 2
        exponent = -math.log(10_000) * torch.arange(half, dtype=torch.float32, device=timestep.device) / half
        angles = timestep[:, None].float() * exponent.exp()
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.linear_1.weight.dtype)
        features: Tensor = self.linear_2(F.silu(self.linear_1(waves)))
        return features


class UNet(nn.Module):
    """A UNet over images of any size whose sides are multiples of ``2 ** (len(widths) - 1)``.

    Args:
        in_channels: Of the input.
        out_channels: Of the output.
        widths: Channels of each level, from fine to coarse; multiples of ``groups``, the first even, the last at least ``head_dim``.
        classes: Number of classes it can be told of; 0 = it is told of none.
        groups: Of every group norm.
        head_dim: Channels of an attention head.
    """

    def __init__(self, in_channels: int, out_channels: int, widths: Sequence[int], classes: int = 0, groups: int = 16, head_dim: int = 32):
        super().__init__()
        shape = _Shape(4 * widths[0], groups, head_dim)
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.time_embedding = _TimeEmbedding(widths[0], shape.time)
        self.class_embedding = nn.Embedding(classes, shape.time) if classes else None
        finer = [widths[0], *widths[:-1]]
        coarser = [*widths[1:], widths[-1]]
        downs = [_Stage([finer[i]], widths[i], shape, "down", int(i == last), i < last) for i in range(last + 1)]
        middle = _Stage([widths[-1]] * 2, widths[-1], shape, "middle", 1, False)
        ups = [
            _Stage([coarser[i] + widths[i], widths[i] + finer[i]], widths[i], shape, "up", 2 * (i == last), i > 0)
            for i in range(last, -1, -1)
        ]
        self.down_blocks, self.up_blocks, self.mid_block = nn.ModuleList(downs), nn.ModuleList(ups), middle
        self.conv_norm_out = _GroupNorm(groups, widths[0])
        self.conv_out = nn.Conv2d(widths[0], out_channels, 3, padding=1)

    def forward(self, x: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Output ``[B, out_channels, h, w]`` for ``[B, in_channels, h, w]`` at timesteps ``[B]`` of classes ``[B]`` int64."""
        time = self.time_embedding(timestep)
        if self.class_embedding is not None:
            time = time + self.class_embedding(class_labels)
        x = self.conv_in(x)
        skips = [x]
        for stage in (*self.down_blocks, self.mid_block, *self.up_blocks):
            x = stage(x, time, skips)
        out: Tensor = self.conv_out(F.silu(self.conv_norm_out(x)))
        return out
