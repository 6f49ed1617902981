"""How networks run at inspection: from bfloat16 copies in channels-last order."""

from __future__ import annotations

from typing import Any, TypeVar, cast

import torch
from torch import nn

Network = TypeVar("Network", bound=nn.Module)


def inference_copy(network: Network, copy: Network) -> Network:
    """A bfloat16 copy for inference: about half the time of autocast, which converts the weights at every call.

    Args:
        network: Whose weights are taken.
        copy: Another of the same shape, which takes them.
    """
    copy.load_state_dict(network.state_dict())
    for parameter in (*copy.parameters(), *copy.buffers()):
        parameter.data = parameter.data.to(torch.bfloat16)
    copy = copy.eval().requires_grad_(False)
    channels_last(copy)
    return copy


def channels_last(network: nn.Module) -> None:
    """Lay out the weights so that convolutions need not convert them."""
    cast(Any, network).to(memory_format=torch.channels_last)  # a call that the stubs of torch do not know
