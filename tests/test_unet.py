"""Our UNet against that of diffusers: names, initial weights, results and gradients, bit for bit but for training in bfloat16."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor

import gladad
from gladad.models.feature_diffusion.unet import UNet

# widths, classes, batch, (h, w)
CASES = [
    ((32, 64), 0, 2, (6, 10)),
    ((32, 64), 3, 1, (2, 2)),
    ((32, 48, 64), 0, 1, (12, 20)),
    ((48, 32, 96), 2, 3, (4, 8)),
    ((32, 64), 0, 64, (4, 4)),
    ((64,), 2, 2, (3, 5)),
]


def theirs(widths: tuple[int, ...], classes: int) -> Any:
    levels = len(widths)
    return UNet2DModel(
        sample_size=(8, 8),
        in_channels=7,
        out_channels=5,
        block_out_channels=widths,
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * (levels - 1) + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * (levels - 1),
        norm_num_groups=16,
        attention_head_dim=32,
        num_class_embeds=classes or None,
    )


def both(widths: tuple[int, ...], classes: int, seed: int = 3) -> tuple[UNet, Any]:
    torch.manual_seed(seed)
    own = UNet(7, 5, widths, classes)
    after = torch.rand(1)
    torch.manual_seed(seed)
    other = theirs(widths, classes)
    assert torch.equal(torch.rand(1), after)  # as many random numbers were drawn
    return own, other


def inputs(classes: int, batch: int, size: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(batch, 7, *size, generator=generator).to(dtype)
    label = torch.randint(classes, (batch,), generator=generator) if classes else None
    return x, torch.randint(1000, (batch,), generator=generator), label


@pytest.mark.parametrize(("widths", "classes"), sorted({case[:2] for case in CASES}))
def test_names_order_and_initial_weights(widths, classes):
    own, other = both(widths, classes)
    expected = other.state_dict()
    assert list(own.state_dict()) == list(expected)
    assert [name for name, _ in own.named_parameters()] == [name for name, _ in other.named_parameters()]
    assert all(torch.equal(value, expected[name]) for name, value in own.state_dict().items())


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("widths", "classes", "batch", "size"), CASES)
def test_results_and_gradients(widths, classes, batch, size, dtype, memory_format):
    models = [model.to(dtype).to(memory_format=memory_format) for model in both(widths, classes)]
    with torch.no_grad():  # zero biases and unit gains would hide a missing one
        for name, parameter in models[1].named_parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))).to(dtype)
    models[0].load_state_dict(models[1].state_dict())
    x, timestep, label = inputs(classes, batch, size, dtype)
    x = x.contiguous(memory_format=memory_format)
    for training in (True, False):
        leaves, results = [], []
        for index, model in enumerate(models):
            model.train(training).zero_grad()
            leaves.append(x.clone(memory_format=torch.preserve_format).requires_grad_())
            out = model(leaves[-1], timestep, class_labels=label)
            results.append(out if index == 0 else out.sample)
            results[-1].square().sum().backward()
        assert results[0].dtype == dtype and torch.equal(*results)
        assert results[0].stride() == results[1].stride()
        assert leaves[0].grad.abs().sum() > 0 and torch.equal(leaves[0].grad, leaves[1].grad)
        grads = [{name: parameter.grad for name, parameter in model.named_parameters()} for model in models]
        assert all(torch.equal(grad, grads[1][name]) for name, grad in grads[0].items())


def test_autocast():
    models = both((32, 64), 2)
    x, timestep, label = inputs(2, 2, (4, 6), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        own, other = models[0](x, timestep, label), models[1](x, timestep, class_labels=label).sample
    assert own.dtype == torch.bfloat16 and torch.equal(own, other)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_training_in_bfloat16_is_as_exact_as_that_of_diffusers(memory_format):
    """Other kernels are used there, for speed: results and gradients are those of float32, no further from it than theirs."""
    models = [model.to(memory_format=memory_format) for model in both((64, 96, 128), 0)]
    x, timestep, _ = inputs(0, 4, (12, 16), torch.float32)
    x = x.contiguous(memory_format=memory_format)

    def passed(model, precise=False):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not precise):
            out = model(x, timestep)
        out = out if isinstance(out, Tensor) else out.sample
        assert out.dtype == (torch.float32 if precise else torch.bfloat16)
        out.float().square().mean().backward()
        return [out.detach().float(), *(parameter.grad.clone() for parameter in model.parameters())]

    exact, own, other = passed(models[0], precise=True), passed(models[0]), passed(models[1])
    errors = [
        torch.stack([(found - right).norm() / right.norm() for found, right in zip(side, exact, strict=True) if right.norm() > 1e-5])
        for side in (own, other)
    ]
    assert len(errors[0]) > 0.9 * len(exact)
    assert errors[0].mean() < 1.1 * errors[1].mean() and (errors[0] < 2 * errors[1] + 0.005).all()
    assert not all(torch.equal(found, theirs) for found, theirs in zip(own, other, strict=True))


def test_every_input_counts():
    """The comparison above would also hold for two models that ignore the same input."""
    model = both((32, 64), 2)[0].eval()
    x, timestep, label = inputs(2, 1, (4, 6), torch.float32)
    with torch.no_grad():
        base = model(x, timestep, label)
        assert not torch.equal(base, model(x, (timestep + 1) % 1000, label))
        assert not torch.equal(base, model(x, timestep, 1 - label))


def test_only_pytorch_is_loaded():
    code = "import sys, gladad.models.feature_diffusion.unet; print({'diffusers', 'transformers', 'peft'} & set(sys.modules))"
    source = str(Path(gladad.__file__).parent.parent)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": source})
    assert done.stdout.strip() == "set()"
