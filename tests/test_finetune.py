"""Training of the denoiser: the published target, adapters or all weights, one product or several."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw_part

from gladad.algorithm import image_noise, predict_x0
from gladad.core.errors import ConfigError, DataError, ModelFormatError
from gladad.core.images import resize_pixels
from gladad.data.synthesis import Draw
from gladad.models.stable_diffusion.adapters import (
    TARGETS,
    add_adapter,
    attach_adapter,
    detach_adapter,
    merge_adapter,
    read_adapter,
    switched_on,
)
from gladad.models.stable_diffusion.components import Sources
from gladad.models.stable_diffusion.pipeline import GladPipeline
from gladad.models.stable_diffusion.training import DenoiserTask, FinetuneConfig, TrainedProduct, finetune_denoiser

SIDE = 32
QUICK = FinetuneConfig(method="full", batch_size=4, learning_rate=3e-3, precision="float32", pool=8, gradient_checkpointing=False)


@pytest.fixture
def pipeline(tiny_base: Path) -> GladPipeline:
    return GladPipeline.from_base(tiny_base)


def pixels(count: int = 4, seed: int = 0) -> list[np.ndarray]:
    return [resize_pixels(np.asarray(draw_part(seed + number)[0]), (SIDE, SIDE)) for number in range(count)]


def product(pipeline: GladPipeline, images: list[np.ndarray] | None = None) -> dict[str, TrainedProduct]:
    return {"": TrainedProduct(pixels() if images is None else images, pipeline.prompt_embeds[:1])}


def weights(pipeline: GladPipeline) -> dict[str, torch.Tensor]:
    return {
        f"{part}.{name}": value.clone()
        for part in ("vae", "unet", "features")
        for name, value in getattr(pipeline, part).state_dict().items()
    }


def changed(pipeline: GladPipeline, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, value in weights(pipeline).items() if not torch.equal(value, before.get(name, value + 1))}


# ---------------------------------------------------------------------------------------------------------- the training


def test_all_weights_are_trained_and_the_same_seed_gives_the_same(tiny_base: Path) -> None:
    runs = []
    for _ in range(2):
        pipeline = GladPipeline.from_base(tiny_base)
        before = weights(pipeline)
        told: list[tuple[str, int, int]] = []
        trained = finetune_denoiser(pipeline, product(pipeline), QUICK, 20, seed=1, progress=lambda *call, log=told: log.append(call))
        assert [call for call in told if call[0] == "denoiser"] == [("denoiser", n + 1, 20) for n in range(20)]
        assert {call[0] for call in told} == {"latents", "synthetic anomalies", "denoiser"}
        assert {name.split(".")[0] for name in changed(pipeline, before)} == {"unet"}
        assert trained.adapter is None
        assert not pipeline.unet.training and not any(p.requires_grad for p in pipeline.unet.parameters())
        runs.append((trained.losses, weights(pipeline)))
    assert np.mean(runs[0][0][-5:]) < 0.8 * np.mean(runs[0][0][:5])
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(runs[0][1][name], value) for name, value in runs[1][1].items())


def test_the_target_is_the_noise_that_implies_the_normal_latent(pipeline: GladPipeline) -> None:
    """A denoiser that answers with the target has no loss; one that implies another latent has."""
    task = DenoiserTask(pipeline, product(pipeline), replace(QUICK, anomaly_share=1.0), 3)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def perfect(x_t: torch.Tensor, timestep: torch.Tensor, prompt: torch.Tensor, unet: object) -> torch.Tensor:
        alpha_bar = pipeline.schedule.alpha_bar(timestep)
        wanted = torch.stack([normal_of(task, 5, sample) for sample in range(4)])
        noise_pred = (x_t - alpha_bar.sqrt() * wanted) / (1 - alpha_bar).sqrt()
        seen.append((predict_x0(x_t, noise_pred, alpha_bar), wanted))
        return noise_pred

    pipeline.denoise = perfect  # type: ignore[method-assign]
    assert float(task.loss(pipeline.unet, 5, range(4))) == pytest.approx(0, abs=1e-9)
    torch.testing.assert_close(*seen[0], rtol=1e-3, atol=2e-3)


def normal_of(task: DenoiserTask, step: int, sample: int) -> torch.Tensor:
    """The normal latent that a sample is drawn from, by the recipe of the documentation."""
    draw = Draw((task.seed, step, sample))
    draw.uniform(0, 1)
    return task.normal[task.sources[draw.integer(0, len(task.anomalous) - 1)]]


def test_samples_do_not_depend_on_their_company(pipeline: GladPipeline) -> None:
    task = DenoiserTask(pipeline, product(pipeline), QUICK, 3)
    with torch.no_grad():
        together = task.loss(pipeline.unet, 2, range(4))
        alone = torch.stack([task.loss(pipeline.unet, 2, [sample]) for sample in range(4)])
    assert len(alone.unique()) == 4
    torch.testing.assert_close(together, alone.mean(), rtol=1e-5, atol=1e-6)


def test_gradient_checkpointing_changes_nothing_but_memory(tiny_base: Path) -> None:
    losses = []
    for on in (False, True):
        pipeline = GladPipeline.from_base(tiny_base)
        losses.append(finetune_denoiser(pipeline, product(pipeline), replace(QUICK, gradient_checkpointing=on), 4).losses)
        assert not pipeline.unet.is_gradient_checkpointing
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_bfloat16_with_textures_and_averages(tiny_base: Path) -> None:
    pipeline = GladPipeline.from_base(tiny_base, torch_dtype=torch.bfloat16, unet_dtype=torch.float32)
    config = replace(QUICK, precision="bfloat16", anomaly_share=1.0, ema=0.5)
    products = {"": replace(product(pipeline)[""], foreground="bright")}
    losses = finetune_denoiser(pipeline, products, config, 3, textures=pixels(2, seed=50)).losses
    assert len(losses) == 3 and np.isfinite(losses).all()
    assert (pipeline.unet.dtype, pipeline.vae.dtype) == (torch.float32, torch.bfloat16)


def test_without_anomalies_the_images_alone_are_learnt(pipeline: GladPipeline) -> None:
    task = DenoiserTask(pipeline, product(pipeline), replace(QUICK, anomaly_share=0.0), 0)
    assert len(task.anomalous) == 0 and np.isfinite(float(task.loss(pipeline.unet, 0, [0, 1])))
    (picture,) = task.examples().values()
    assert picture.shape == (SIDE, 2 * SIDE, 3) and picture.dtype == np.uint8


def test_several_products_are_told_apart_by_their_prompts(tiny_base: Path) -> None:
    pipelines = GladPipeline.for_prompts(Sources(tiny_base), {"nut": "a nut", "bolt": "a bolt"})
    first = pipelines["nut"]
    assert first.unet is pipelines["bolt"].unet and not torch.equal(first.prompt_embeds, pipelines["bolt"].prompt_embeds)
    products = {name: TrainedProduct(pixels(3, seed), own.prompt_embeds[:1]) for seed, (name, own) in enumerate(pipelines.items())}
    task = DenoiserTask(first, products, QUICK, 0)
    told: list[torch.Tensor] = []
    denoise = first.denoise
    first.denoise = lambda x, t, prompt, unet=None: (told.append(prompt), denoise(x, t, prompt, unet))[1]  # type: ignore[method-assign]
    task.loss(first.unet, 0, range(16))
    kinds = {"nut" if torch.equal(prompt, products["nut"].prompt_embeds[0]) else "bolt" for prompt in told[0]}
    assert kinds == {"nut", "bolt"}
    losses = finetune_denoiser(first, products, QUICK, 3).losses
    assert np.isfinite(losses).all()


def test_what_cannot_be_trained(pipeline: GladPipeline) -> None:
    with pytest.raises(DataError, match="at least one image"):
        finetune_denoiser(pipeline, product(pipeline, []), QUICK, 1)
    with pytest.raises(DataError, match="same size"):
        finetune_denoiser(pipeline, product(pipeline, [np.zeros((64, 64, 3), np.uint8), np.zeros((64, 72, 3), np.uint8)]), QUICK, 1)
    with pytest.raises(ConfigError, match="float32"):
        finetune_denoiser(pipeline.to(torch.bfloat16), product(pipeline), QUICK, 1)
    for bad in (
        {"rank": 0},
        {"pool": -1},
        {"anomaly_share": 1.5},
        {"batch_size": 0},
        {"learning_rate": 0.0},
        {"ema": 1.5},
        {"gradient_clip": 0.0},
    ):
        with pytest.raises(ConfigError, match=f"^{next(iter(bad))}: input should be"):
            replace(QUICK, **bad)


# -------------------------------------------------------------------------------------------------------------- adapters


@pytest.mark.parametrize("layers", ["attention", "all"])
def test_an_adapter_leaves_the_base_alone_and_learns(pipeline: GladPipeline, layers: str) -> None:
    before = weights(pipeline)
    config = replace(QUICK, method="lora", layers=layers, learning_rate=1e-2)
    trained = finetune_denoiser(pipeline, product(pipeline), config, 25, seed=1)
    assert trained.adapter is not None and trained.adapter_name is not None
    assert np.mean(trained.losses[-5:]) < np.mean(trained.losses[:5])
    after = weights(pipeline)
    for name, value in before.items():  # the base's weights have another name under an adapter
        kept = after[name] if name in after else after[name.replace(".weight", ".base_layer.weight").replace(".bias", ".base_layer.bias")]
        assert torch.equal(kept, value)
    assert {key.split(".lora_")[0].rsplit(".", 1)[-1] for key in trained.adapter.weights} <= {t.rsplit(".", 1)[-1] for t in TARGETS[layers]}
    with switched_on(pipeline.unet, trained.adapter_name), torch.no_grad():
        latent, timestep = image_noise((4, 4, 4), 0), torch.tensor([500])
        adapted = pipeline.predict_noise(latent, timestep)
    detach_adapter(pipeline.unet, trained.adapter_name)
    with torch.no_grad():
        plain = pipeline.predict_noise(latent, timestep)
    assert not torch.allclose(plain, adapted, atol=1e-4)


def test_adapters_share_a_denoiser_without_knowing_of_each_other(pipeline: GladPipeline) -> None:
    unet = pipeline.unet
    latent, timestep = image_noise((4, 4, 4), 0), torch.tensor([300])

    def answer(name: str | None) -> torch.Tensor:
        with switched_on(unet, name), torch.no_grad():
            return pipeline.predict_noise(latent, timestep)

    made = []
    for seed in range(2):
        name = add_adapter(unet, 4, "attention", seed)
        for key, parameter in unet.named_parameters():
            if f".{name}." in key:
                parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)) * 0.3
        made.append((name, read_adapter(unet, name, 4, "attention"), answer(name)))
    assert not torch.equal(made[0][2], made[1][2])
    for name, _, before in made:
        assert torch.equal(answer(name), before)
    copy = attach_adapter(unet, made[0][1])
    assert torch.equal(answer(copy), made[0][2])
    detach_adapter(unet, made[1][0])
    assert torch.equal(answer(made[0][0]), made[0][2])


def test_a_model_that_is_loaded_waits_for_one_that_inspects(pipeline: GladPipeline) -> None:
    """A new adapter is switched on when it is attached: not in the middle of another's chain."""
    unet = pipeline.unet
    adapter = read_adapter(unet, add_adapter(unet, 4, "attention"), 4, "attention")
    first = attach_adapter(unet, adapter)
    with switched_on(unet, first):
        loading = threading.Thread(target=attach_adapter, args=(unet, adapter))
        loading.start()
        loading.join(0.3)
        assert loading.is_alive() and unet.active_adapters() == [first]
    loading.join(10)
    assert not loading.is_alive()
    other = unet.active_adapters()[0]
    with switched_on(unet, other):
        detach_adapter(unet, first)  # as a finaliser would, in the same thread
        assert unet.active_adapters() == [other]


def test_a_merged_adapter_answers_alike(tiny_base: Path) -> None:
    pipeline = GladPipeline.from_base(tiny_base)
    plain_names = set(pipeline.unet.state_dict())
    trained = finetune_denoiser(pipeline, product(pipeline), replace(QUICK, method="lora", layers="all", learning_rate=1e-2), 5)
    latent, timestep = image_noise((4, 4, 4), 0), torch.tensor([500])
    with torch.no_grad():
        adapted = pipeline.predict_noise(latent, timestep)
        merge_adapter(pipeline.unet, trained.adapter_name or "")
        torch.testing.assert_close(pipeline.predict_noise(latent, timestep), adapted, rtol=1e-4, atol=1e-5)
    assert set(pipeline.unet.state_dict()) == plain_names


def test_an_adapter_of_another_shape_is_refused(pipeline: GladPipeline, tmp_path: Path) -> None:
    name = add_adapter(pipeline.unet, 4, "attention")
    adapter = read_adapter(pipeline.unet, name, 4, "attention")
    for other in (replace(adapter, rank=8), replace(adapter, layers="all"), replace(adapter, weights={})):
        with pytest.raises(ModelFormatError, match="is not an adapter of rank"):
            attach_adapter(pipeline.unet, other)
    adapter.save(tmp_path)
    assert adapter.load(tmp_path, 4, "attention").weights.keys() == adapter.weights.keys()
