"""AdamW, plain or with moments of 8 bits, which need a package that is not always there; and Muon."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from gladad.core.errors import MissingExtraError

OptimizerName = Literal["adamw", "adamw8bit", "muon"]

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Of the quintic whose iterations bring singular values between 0.7 and 1.2 (Jordan et al., see `Muon`)."""
ITERATIONS = 3
"""Those of Jordan et al. are 5; a training gets as far with 3, which bring values there that are at least a fiftieth of the norm."""

MOMENTS = ("exp_avg", "exp_avg_sq")
ADAM: dict[str, Any] = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "amsgrad": False, "maximize": False}


def make_optimizer(
    name: OptimizerName, parameters: Sequence[nn.Parameter], learning_rate: float, weight_decay: float, dtype: torch.dtype = torch.float32
) -> Any:
    """An optimiser of float32 parameters; weight decay is decoupled (Loshchilov & Hutter, arXiv 1711.05101).

    ``adamw`` holds 8 bytes of moments per weight, ``adamw8bit`` 2, through bitsandbytes, ``muon`` (`Muon`, which computes in ``dtype``) 4.

    Raises:
        MissingExtraError: bitsandbytes is not installed.
    """
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)
    if name == "muon":
        return Muon(parameters, learning_rate, weight_decay, dtype=dtype)
    try:
        bitsandbytes = importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise MissingExtraError("the optimizer adamw8bit", "'gladad[adamw8bit]'") from error
    return bitsandbytes.optim.AdamW8bit(parameters, lr=learning_rate, weight_decay=weight_decay)


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal for matrices, AdamW for vectors.

    A layer learns in all directions at the same pace, not only in those of the largest gradients, so that a short training gets further.
    K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024). Steps are scaled as by J. Liu et al., arXiv
    2502.16982, section 2.2, but without the factor of 0.2: an entry changes by the learning rate, about, as with AdamW. That of torch takes
    no convolutions, and came with torch 2.9.

    Args:
        parameters: Those of two dimensions or more are matrices, a convolution's of ``[out, in * height * width]``. They are whole: those
            of a sharded network are not.
        lr: Learning rate.
        weight_decay: Decoupled.
        momentum: Of the gradients of matrices, by Nesterov.
        dtype: In which they are made orthogonal.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        lr: float,
        weight_decay: float,
        momentum: float = 0.9,
        dtype: torch.dtype = torch.float32,
    ):
        # by "fused" torch knows that a state that is loaded belongs onto the device of its parameter, the number of steps too
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "fused": True})
        self._dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Change the parameters that have gradients by them."""
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            self._change_vectors([parameter for parameter in parameters if parameter.ndim < 2], group)
            for matrix in (parameter for parameter in parameters if parameter.ndim > 1):
                if matrix not in self.state:
                    self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
                average = self.state[matrix]["momentum_buffer"]
                average.lerp_(matrix.grad, 1 - group["momentum"])
                flat = matrix.grad.lerp(average, group["momentum"]).flatten(1)
                change = orthogonalized(flat, self._dtype) * math.sqrt(max(flat.shape))
                matrix.mul_(1 - group["lr"] * group["weight_decay"]).sub_(change.reshape(matrix.shape), alpha=group["lr"])

    def _change_vectors(self, vectors: list[Tensor], group: dict[str, Any]) -> None:
        """A step of AdamW."""
        for vector in vectors:
            if vector not in self.state:
                moments = {name: torch.zeros_like(vector) for name in MOMENTS}
                self.state[vector] = {"step": torch.zeros((), device=vector.device), **moments}
        states = [self.state[vector] for vector in vectors]
        steps, first, second = ([state[name] for state in states] for name in ("step", *MOMENTS))
        gradients = [vector.grad for vector in vectors if vector.grad is not None]
        rates = {name: group[name] for name in ("lr", "weight_decay", "fused")}
        adamw(vectors, gradients, first, second, [], steps, **rates, **ADAM)


def orthogonalized(matrix: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """A matrix ``[R, C]`` with its singular values brought near 1, the more nearly the larger they are.

    Newton-Schulz iterations, on the smaller Gram matrix: they are polynomials of it, which commute, so the matrix itself is needed at the
    start and at the end only. Jordan et al. compute them in bfloat16.
    """
    turned = matrix.shape[0] > matrix.shape[1]
    wide = matrix.T if turned else matrix
    wide = (wide / wide.norm().clamp_min(1e-7)).to(dtype)
    gram = wide @ wide.T
    product = factor = _newton_schulz(gram)
    for _ in range(ITERATIONS - 1):
        gram = factor @ gram @ factor
        factor = _newton_schulz(gram)
        product = factor @ product
    found: Tensor = (product @ wide).to(matrix.dtype)
    return found.T if turned else found


def _newton_schulz(gram: Tensor) -> Tensor:
    linear, cubic, quintic = NEWTON_SCHULZ
    factor: Tensor = cubic * gram + quintic * (gram @ gram)
    factor.diagonal().add_(linear)
    return factor
