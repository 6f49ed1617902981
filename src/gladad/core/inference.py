"""How networks run: in which arithmetic, and in channels-last order."""

from __future__ import annotations

import os
import platform
from typing import Any, cast

import torch
from torch import nn

FLOAT32 = "GLADAD_FLOAT32"  # variable of the environment: if it is set, float32 is taken where the machine would choose bfloat16


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where a device computes in it, else float32.

    Processors without AVX-512 or the like take 70 times as long in bfloat16. Those with AVX-512 but without its part for bfloat16 (before
    Sapphire Rapids and Zen 4) emulate it: 3.3 times as long (a convolution of 64 channels, training and inference).
    """
    if os.environ.get(FLOAT32):
        return torch.float32
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = device.type == "cpu" and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and not _emulated()
    return torch.bfloat16 if native else torch.float32


def _emulated() -> bool:
    """Whether an x86 processor has no instructions for bfloat16; torch asks oneDNN, which says that it can do without."""
    return platform.machine() in ("x86_64", "AMD64") and not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def fast_autocast(device: torch.device) -> torch.autocast:
    """Training in `fast_dtype`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=fast_dtype(device) is torch.bfloat16)


def channels_last(network: nn.Module) -> None:
    """Lay out the weights so that convolutions need not convert them."""
    cast(Any, network).to(memory_format=torch.channels_last)  # a call that the stubs of torch do not know
