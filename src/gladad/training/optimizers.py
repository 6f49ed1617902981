"""AdamW, plain or with moments of 8 bits, which need a package that is not always there; and Muon."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gladad.core.errors import MissingExtraError

OptimizerName = Literal["adamw", "adamw8bit"]

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Of the quintic whose iterations bring singular values between 0.7 and 1.2 (Jordan et al., see `Muon`)."""
ITERATIONS = 3
"""Those of Jordan et al. are 5; a training gets as far with 3, which bring values there that are at least a fiftieth of the norm."""


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


class Muon:
    """Momentum made orthogonal for matrices, AdamW for vectors.

    A layer learns in all directions at the same pace, not only in those of the largest gradients, so that a short training gets further.
    K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024). Steps are scaled as by J. Liu et al., arXiv
    2502.16982, section 2.2, but without the factor of 0.2: an entry changes by the learning rate, about, as with AdamW. That of torch takes
    no convolutions, and came with torch 2.9.

    Args:
        parameters: Those of two dimensions or more are matrices, a convolution's of ``[out, in * height * width]``.
        weight_decay: Decoupled.
        momentum: Of the gradients of matrices, by Nesterov.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], weight_decay: float, momentum: float = 0.9):
        self._matrices = [(each, torch.zeros_like(each)) for each in parameters if each.ndim > 1]
        self._vectors = torch.optim.AdamW([each for each in parameters if each.ndim < 2], weight_decay=weight_decay, fused=True)
        self._weight_decay, self._momentum = weight_decay, momentum

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self._vectors.zero_grad()
        for matrix, _ in self._matrices:
            matrix.grad = None

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Change the parameters by their gradients, which all have."""
        for group in self._vectors.param_groups:
            group["lr"] = learning_rate
        self._vectors.step()
        for matrix, average in self._matrices:
            assert matrix.grad is not None
            average.lerp_(matrix.grad, 1 - self._momentum)
            flat = matrix.grad.lerp(average, self._momentum).flatten(1)
            change = orthogonalized(flat) * math.sqrt(max(flat.shape))
            matrix.mul_(1 - learning_rate * self._weight_decay).sub_(change.reshape(matrix.shape), alpha=learning_rate)


def orthogonalized(matrix: Tensor) -> Tensor:
    """A matrix ``[R, C]`` with its singular values brought near 1, the more nearly the larger they are.

    Newton-Schulz iterations, on the smaller Gram matrix: they are polynomials of it, which commute, so the matrix itself is needed at the
    start and at the end only.
    """
    turned = matrix.shape[0] > matrix.shape[1]
    wide = matrix.T if turned else matrix
    wide = wide / wide.norm().clamp_min(1e-7)
    gram = wide @ wide.T
    product = factor = _newton_schulz(gram)
    for _ in range(ITERATIONS - 1):
        gram = factor @ gram @ factor
        factor = _newton_schulz(gram)
        product = factor @ product
    found: Tensor = product @ wide
    return found.T if turned else found


def _newton_schulz(gram: Tensor) -> Tensor:
    linear, cubic, quintic = NEWTON_SCHULZ
    factor: Tensor = cubic * gram + quintic * (gram @ gram)
    factor.diagonal().add_(linear)
    return factor
