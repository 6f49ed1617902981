"""AdamW, plain or with moments of 8 bits, which need a package that is not always there."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

from gladad.core.errors import MissingExtraError

OptimizerName = Literal["adamw", "adamw8bit"]


def make_optimizer(name: OptimizerName, parameters: Sequence[nn.Parameter], learning_rate: float, weight_decay: float) -> Any:
    """AdamW with decoupled decay (Loshchilov & Hutter, arXiv 1711.05101) over float32 parameters.

    ``adamw`` holds 8 bytes of moments per weight, ``adamw8bit`` 2, through bitsandbytes.

    Raises:
        MissingExtraError: bitsandbytes is not installed.
    """
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)
    try:
        bitsandbytes = importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise MissingExtraError("the optimizer adamw8bit", "'gladad[adamw8bit]'") from error
    return bitsandbytes.optim.AdamW8bit(parameters, lr=learning_rate, weight_decay=weight_decay)
