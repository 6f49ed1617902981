"""The trained networks of ``lite``: the denoiser, and the decoder that shows people what a latent is of."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gladad.core.inference import channels_last
from gladad.models.feature_diffusion.unet import UNet


class LatentDenoiser(nn.Module):
    """A small UNet over the 2x2 space-to-depth of the latent, with position channels; predicts the velocity.

    With ``shown`` it sees as many further channels, the nearest normal latent beside the noisy one. With ``classes`` it is told the product
    by an embedding that joins the timestep's.
    """

    position: Tensor

    def __init__(self, dimensions: int, grid: tuple[int, int], widths: Sequence[int], classes: int = 0, shown: int = 0):
        super().__init__()
        height, width = grid[0] // 2, grid[1] // 2
        y = torch.linspace(-1, 1, height)[:, None].expand(height, width)
        x = torch.linspace(-1, 1, width)[None, :].expand(height, width)
        waves = [wave(math.pi * c) for c in (y, x) for wave in (torch.sin, torch.cos)]
        self.register_buffer("position", torch.stack([y, x, *waves])[None], persistent=False)
        levels = len(widths)
        multiple = 2 ** (levels - 1)
        self.pad = (0, -width % multiple, 0, -height % multiple)
        self.unet = UNet(4 * (dimensions + shown) + self.position.shape[1], 4 * dimensions, widths, classes)
        channels_last(self.unet)

    def forward(self, x_t: Tensor, timestep: Tensor, label: Tensor | None = None) -> Tensor:
        """Velocity ``[B, D, h, w]`` float32 of noisy latents at timesteps ``[B]``, of products ``[B]`` int64 where there are classes.

        ``x_t`` is ``[B, D + shown, h, w]``: the noisy latents, then what is shown beside them.
        """
        if torch.is_autocast_enabled(x_t.device.type):  # as the first convolution would, but there is less to move
            x_t = x_t.to(torch.get_autocast_dtype(x_t.device.type))
        packed = F.pixel_unshuffle(x_t, 2)
        packed = torch.cat([packed, self.position.to(packed.dtype).expand(packed.shape[0], -1, -1, -1)], dim=1)
        if any(self.pad):
            packed = F.pad(packed, self.pad, mode="replicate")
        out: Tensor = self.unet(packed.to(memory_format=torch.channels_last), timestep, class_labels=label)
        height, width = x_t.shape[-2] // 2, x_t.shape[-1] // 2
        return F.pixel_shuffle(out[..., :height, :width].contiguous(), 2).float()


class LatentDecoder(nn.Module):
    """Latent -> RGB picture at four times the grid's side, for people."""

    def __init__(self, dimensions: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(dimensions, 96, 3, padding=1), nn.SiLU(),
            nn.Conv2d(96, 4 * 32, 3, padding=1), nn.PixelShuffle(2), nn.SiLU(),
            nn.Conv2d(32, 4 * 16, 3, padding=1), nn.PixelShuffle(2), nn.SiLU(),
            nn.Conv2d(16, 3, 3, padding=1), nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, latent: Tensor) -> Tensor:
        """``[B, D, h, w]`` -> ``[B, 3, 4h, 4w]`` in [0, 1]."""
        picture: Tensor = self.net(latent)
        return picture
