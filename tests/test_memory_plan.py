from __future__ import annotations

import json
import math
import resource
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import psutil
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from peft import LoraConfig
from tiny_base import tiny_base as tiny_base
from torch import nn

from gladad.algorithm import ReconstructionConfig, ScoringConfig, reconstruct
from gladad.core.errors import ConfigError, ModelFormatError
from gladad.models.stable_diffusion.architectures import DINO_CONFIG, UNET_CONFIG, VAE_CONFIG
from gladad.models.stable_diffusion.faked import LiveMemory, build_features, build_unet, build_vae
from gladad.models.stable_diffusion.memory_fit import alternatives, available_memory, bytes_text, check_fits, suggestions
from gladad.models.stable_diffusion.memory_plan import BaseConfigs, MemoryPlan, PlanRequest, plan_inspection, plan_training, read_configs
from gladad.models.stable_diffusion.pipeline import GladPipeline

SIZE = (128, 128)
SMALL = {  # one level, attention in its middle only: for the many plans that are compared with each other
    "block_out_channels": [16],
    "down_block_types": ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 4,
    "cross_attention_dim": 32,
}
DINOV2 = {"model_type": "dinov2", "hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 3, "image_size": 56, "patch_size": 14}


@pytest.fixture(scope="module")
def configs(tiny_base: Path) -> BaseConfigs:
    return read_configs(tiny_base)


def request(**changes) -> PlanRequest:
    return replace(PlanRequest(image_size=SIZE, lora_rank=4, batch_size=2), **changes)


# ------------------------------------------------------------------------------------------------- the paper's base


def test_the_papers_base_has_the_known_sizes():
    count = {
        "unet": sum(p.numel() for p in build_unet(UNET_CONFIG).parameters()),
        "vae": sum(p.numel() for p in build_vae(VAE_CONFIG).parameters()),
        "dino": sum(p.numel() for p in build_features(DINO_CONFIG).parameters()),
    }
    assert count == {"unet": 859_520_964, "vae": 83_653_863, "dino": 85_807_872}  # as published; ViT-B/8 at 224 px has 784 + 1 positions


def test_a_plan_takes_no_memory():
    wide = SMALL | {"block_out_channels": [2048]}
    before = psutil.Process().memory_info().rss
    peak_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    plan = plan_training(wide, request(training="full", batch_size=64))
    assert plan.total > 10 * 2**30
    assert psutil.Process().memory_info().rss - before < 300 * 2**20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - max(peak_before, before) < 300 * 2**20


# ------------------------------------------------------------------------------------------------------- counting


def test_live_memory_counts_storages_while_they_live():
    live = LiveMemory()
    given = torch.zeros(100)
    live.watch({"some": [given, given[:50]]})
    assert live.live == 400
    with live:
        made = torch.ones(10)
        view = made.view(2, 5)
        assert live.live == 440
        del made
        assert live.live == 440  # the view holds it
        view.add_(1)
        del view
        assert live.live == 400
        weight = nn.Parameter(torch.ones(10))
        loss = weight.exp().sum()  # exp keeps its result
        assert live.live == 400 + 40 + 40 + 4
        loss.backward()
        assert live.live == 400 + 40 + 40 + 4  # the result is gone, the gradient has come
    assert live.peak >= 400 + 40 + 40 + 40 + 4
    live.restart()
    assert live.peak == live.live
    del given
    assert live.live == 84


def real_unet(folder: Path, request: PlanRequest) -> nn.Module:
    """The denoiser as a training has it, without the project's help."""
    frozen = getattr(torch, request.precision) if request.training == "lora" else torch.float32
    unet = UNet2DConditionModel.from_pretrained(folder / "sd" / "unet", torch_dtype=frozen).train()
    if request.training == "lora":
        unet.requires_grad_(False)
        targets = ["to_q", "to_k", "to_v", "to_out.0"]
        unet.add_adapter(LoraConfig(r=request.lora_rank, lora_alpha=request.lora_rank, target_modules=targets))
        for parameter in unet.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    if request.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return unet


def bytes_of(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def real_training(folder: Path, request: PlanRequest) -> MemoryPlan:
    """Three real steps, counted; what is alive between them is counted tensor by tensor."""
    unet = real_unet(folder, request)
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    shape = (request.batch_size, 4, request.image_size[0] // 8, request.image_size[1] // 8)
    live = LiveMemory()
    live.watch(list(unet.parameters()))
    with live:
        for _ in range(3):
            for _ in range(request.accumulation):
                context = torch.randn(request.batch_size, 77, 32).to(unet.dtype)
                with torch.autocast("cpu", torch.bfloat16, enabled=request.precision == "bfloat16"):
                    predicted = unet(torch.randn(shape).to(unet.dtype), torch.zeros(request.batch_size), context).sample
                    loss = F.mse_loss(predicted.float(), torch.randn(shape))
                del predicted
                loss.backward()
                del loss
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            gradients = bytes_of(parameter.grad for parameter in trained)
            optimizer.zero_grad()
    moments = bytes_of(value for state in optimizer.state.values() for value in state.values())
    parameters = bytes_of(unet.parameters())
    return MemoryPlan(parameters, gradients, moments, live.peak - parameters - gradients - moments)


@pytest.mark.parametrize(
    ("training", "checkpointing", "precision", "accumulation"),
    [
        ("lora", True, "bfloat16", 2),
        ("lora", False, "bfloat16", 1),
        ("full", True, "float32", 2),
        ("full", False, "float32", 1),
        ("full", False, "bfloat16", 1),  # with copies of all weights in bfloat16
    ],
)
def test_a_plan_equals_a_real_training_that_is_counted(tiny_base, configs, training, checkpointing, precision, accumulation):
    asked = request(training=training, gradient_checkpointing=checkpointing, precision=precision, accumulation=accumulation)
    real = real_training(tiny_base, asked)
    plan = plan_training(configs.unet, asked)
    assert (plan.parameters, plan.gradients, plan.optimizer) == (real.parameters, real.gradients, real.optimizer)
    assert plan.total == pytest.approx(real.total, rel=0.01)
    assert real.activations > 0.15 * real.total  # or the comparison would say little


def test_an_inspection_equals_a_real_one_that_is_counted(tiny_base, configs):
    pipeline = GladPipeline.from_base(tiny_base)
    for guidance in (False, True):
        pipeline.guidance_scale = 9.0 if guidance else 1.0
        live = LiveMemory()
        parameters = sum(live.watch_weights(network) for network in (pipeline.unet, pipeline.vae, pipeline.features))
        with live, torch.no_grad():
            image = torch.rand(1, 3, *SIZE)
            latent = pipeline.encode(image)
            chain = ReconstructionConfig(max_step=200, min_step=100, num_steps=2)
            rebuilt = reconstruct(pipeline, latent, torch.randn_like(latent), pipeline.schedule, chain)
            pipeline.score_maps(image, pipeline.decode(rebuilt.latent), ScoringConfig(), SIZE)
        plan = plan_inspection(configs.unet, configs.vae, configs.features, SIZE, "float32", guidance)
        assert plan.parameters == parameters
        assert plan.total == pytest.approx(live.peak, rel=0.01)
        assert plan.activations > 0.5 * plan.total


# ---------------------------------------------------------------------------------------------------------- plans


@pytest.fixture(scope="module")
def plan_of():
    """Plans of a small denoiser, each computed once."""
    return cache(partial(plan_training, SMALL))


def test_activations_grow_with_batch_and_size_and_shrink_with_checkpointing(plan_of):
    activations = [plan_of(request(batch_size=size)).activations for size in (2, 4)]
    assert 1.5 * activations[0] < activations[1] < 2.1 * activations[0]
    assert plan_of(request(image_size=(128, 192))).activations > plan_of(request()).activations
    assert plan_of(request(gradient_checkpointing=False)).activations > 1.3 * plan_of(request()).activations


def test_full_training_needs_more_than_lora_and_averages_a_copy(plan_of):
    lora, full, averaged = plan_of(request()), plan_of(request(training="full")), plan_of(request(training="full", ema=True))
    assert full.total > lora.total and full.gradients > 10 * lora.gradients
    assert averaged.ema == averaged.gradients == full.parameters
    assert averaged.total == full.total + averaged.ema
    assert [name for name, _ in full.rows()] == ["weights", "gradients", "optimizer", "activations", "total"]
    assert dict(averaged.rows())["averaged weights"] == averaged.ema
    assert sum(size for _, size in averaged.rows()[:-1]) == averaged.rows()[-1][1] == averaged.total


def test_more_adapted_layers_and_a_higher_rank_need_more(plan_of):
    assert plan_of(request(lora_rank=8)).gradients == 2 * plan_of(request()).gradients
    assert plan_of(request(lora_layers="all")).gradients > 2 * plan_of(request()).gradients


def test_moments_of_8_bits(plan_of):
    plan = plan_of(request(training="full", optimizer="adamw8bit"))
    sizes = [parameter.numel() for parameter in build_unet(SMALL).parameters()]
    small, large = [size for size in sizes if size < 4096], [size for size in sizes if size >= 4096]
    assert small and large
    scales = sum(math.ceil(size / 256) for size in large)  # one per block of 256, in float32, for each of two moments
    assert plan.optimizer == 8 * sum(small) + 2 * sum(large) + 2 * 4 * scales
    assert plan.total < plan_of(request(training="full")).total


def test_a_gpu_keeps_norms_in_float32_and_steps_all_weights_at_once(plan_of):
    lora = request(gradient_checkpointing=False)
    assert plan_of(lora, device_type="cuda").activations > 1.1 * plan_of(lora).activations
    full = request(training="full", image_size=(32, 32), batch_size=1)
    trained = plan_of(full).gradients
    assert plan_of(full, device_type="cuda").activations == pytest.approx(trained, rel=0.01)  # a square root of every second moment


def test_pictures_can_need_more_than_a_step(tiny_base, configs):
    asked = request(batch_size=1, precision="float32")
    bare = plan_training(SMALL, asked)
    plan = plan_training(SMALL, asked, vae_config=configs.vae, vit_config=configs.features)
    vae = AutoencoderKL.from_pretrained(tiny_base / "sd" / "vae")
    extractor = build_features(configs.features)
    assert plan.parameters - bare.parameters == bytes_of(vae.parameters()) + bytes_of(extractor.parameters())
    live = LiveMemory()
    weights = live.watch_weights(vae)
    with live, torch.no_grad():
        latent = vae.encode(torch.rand(1, 3, *SIZE)).latent_dist.mean
        vae.decode(latent)
    assert live.peak - weights > bare.total - bare.parameters  # so this is the peak, with the moments beside it
    assert plan.total == pytest.approx(plan.parameters + plan.optimizer + live.peak - weights, rel=0.01)


def test_mistakes_have_names(configs):
    for wrong in ({"training": "some"}, {"precision": "float8"}, {"optimizer": "sgd"}, {"batch_size": 0}, {"lora_layers": "none"}):
        with pytest.raises(ConfigError, match=f"^{next(iter(wrong))} must be"):
            request(**wrong)
    with pytest.raises(ConfigError, match="multiples of 8, got 100x128"):
        plan_training(configs.unet, request(image_size=(100, 128)), vae_config=configs.vae)
    with pytest.raises(ModelFormatError, match=r"denoiser's config\.json describes no network"):
        plan_training(configs.unet | {"down_block_types": ["CrossAttnDownBlock2D"]}, request())
    with pytest.raises(ModelFormatError, match=r"feature extractor's config\.json"):
        plan_training(configs.unet, request(), vit_config={"model_type": "bert"})
    with pytest.raises(ConfigError, match="precision must be one of"):
        plan_inspection(configs.unet, configs.vae, configs.features, SIZE, "float8", False)
    with pytest.raises(ConfigError, match="multiples of"):
        plan_inspection(configs.unet, configs.vae, configs.features, (96, 100), "float32", False)


# -------------------------------------------------------------------------------------------------- configurations


def test_configurations_are_read_from_folders(tiny_base, tmp_path):
    configs = read_configs(tiny_base)
    assert configs.unet["block_out_channels"] == [16, 32]
    assert configs.vae["block_out_channels"] == [8, 8, 16, 16]
    assert configs.features["model_type"] == "vit"
    assert read_configs(tiny_base / "sd").features == DINO_CONFIG  # none of its own
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps({"latent_channels": 16}))
    (tmp_path / "config.json").write_text(json.dumps(DINOV2))
    replaced = read_configs(tiny_base, features=tmp_path, vae=tmp_path)
    assert replaced == BaseConfigs(configs.unet, {"latent_channels": 16}, DINOV2)
    assert read_configs(tiny_base, vae=tmp_path / "vae").vae == {"latent_channels": 16}
    with pytest.raises(ModelFormatError, match=r"unet/config\.json: missing"):
        read_configs(tmp_path)


def test_other_extractors_can_be_planned(configs):
    assert build_features(DINOV2).patch_size == 14
    size = (112, 112)  # of 8 and of 14
    plan = plan_inspection(configs.unet, configs.vae, DINOV2, size, "bfloat16", False)
    assert plan.activations > 0


# ---------------------------------------------------------------------------------------------------- does it fit?


def test_what_is_suggested_fits_and_nothing_gentler_does(plan_of):
    asked = request(training="full", gradient_checkpointing=False, batch_size=4)
    gentle = replace(asked, gradient_checkpointing=True)
    stricter = replace(gentle, batch_size=2, accumulation=2)
    plans = [plan_of(asked), plan_of(gentle), plan_of(stricter)]
    assert plans[0].total > plans[1].total > plans[2].total
    for available, expected in ((plans[1].total, gentle), (plans[1].total - 1, stricter)):
        found = alternatives(asked, available, plan_of)
        assert [changed.training for _, changed, _ in found] == ["full", "lora"]
        assert found[0][1] == expected
        for _, changed, plan in found:
            assert plan == plan_of(changed) and plan.total <= available
            assert changed.batch_size * changed.accumulation == asked.batch_size

    with pytest.raises(ConfigError) as error:
        check_fits(plans[0], plans[1].total, asked, plan_of)
    _, (words, _, lora) = alternatives(asked, plans[1].total, plan_of)
    assert words.startswith("LoRA instead of full training")
    assert str(error.value) == (
        f"training needs {bytes_text(plans[0].total)} of memory, and {bytes_text(plans[1].total)} are available; it fits with "
        f"gradient checkpointing ({bytes_text(plans[1].total)}), or with {words} ({bytes_text(lora.total)})"
    )
    check_fits(plans[0], plans[0].total, asked, plan_of)


def test_every_way_to_save_is_tried_and_images_shrink_last():
    tried: list[PlanRequest] = []

    def replan(changed: PlanRequest) -> MemoryPlan:
        tried.append(changed)
        return MemoryPlan(0, 0, 0, changed.image_size[0] * changed.image_size[1])

    asked = PlanRequest(training="full", gradient_checkpointing=False, batch_size=8, precision="float32")
    frugal = replace(asked, gradient_checkpointing=True, batch_size=1, accumulation=8)
    found = suggestions(asked, 128 * 128, replan, "cuda")
    assert tried[:2] == [replace(frugal, optimizer="adamw8bit"), replace(frugal, training="lora", precision="bfloat16")]
    assert [r.image_size[0] for r in tried[2:]] == [128, 384, 256, 192]
    assert found == (
        "it fits with LoRA instead of full training, gradient checkpointing, micro_batch 1, precision bfloat16 "
        "and images of 128x128 pixels (16 KiB)"
    )
    for available, device in ((128 * 128 - 1, "cuda"), (0, "cpu")):
        tried.clear()
        assert "nothing smaller fits" in suggestions(asked, available, replan, device)
        assert ("adamw8bit" in {r.optimizer for r in tried}) == (device == "cuda")
    tried.clear()
    smallest = PlanRequest(image_size=(128, 64), batch_size=1)
    assert "nothing smaller fits" in suggestions(smallest, 0, replan) and tried == []  # no way to save is left


def test_limits_of_control_groups_count(tmp_path):
    free = psutil.virtual_memory().available
    membership = tmp_path / "cgroup"
    assert available_memory("cpu", cgroups=tmp_path, membership=membership) == pytest.approx(free, rel=0.3)  # no such files

    def group(folder: Path, limit: str, values: dict[str, str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in values.items():
            (folder / name).write_text(value + "\n")
        (folder / limit).write_text(values["limit"] + "\n")

    second = tmp_path / "two"
    statistics = "anon 5\ninactive_file 300"
    group(second / "job" / "step", "memory.max", {"limit": "max", "memory.current": "900", "memory.stat": statistics})
    group(second / "job", "memory.max", {"limit": "1000000", "memory.current": "900000", "memory.stat": statistics})
    membership.write_text("0::/job/step\n")
    assert available_memory("cpu", cgroups=second, membership=membership) == 100_300  # of the group above, with its cache
    group(second, "memory.max", {"limit": "70000", "memory.current": "80000", "memory.stat": "anon 1"})
    membership.write_text("0::/../elsewhere\n")  # seen from inside of a container
    assert available_memory("cpu", cgroups=second, membership=membership) == 0

    first = tmp_path / "one"
    values = {"limit": "5000", "memory.usage_in_bytes": "2000", "memory.stat": "total_inactive_file 10"}
    group(first / "memory" / "job", "memory.limit_in_bytes", values)
    membership.write_text("4:cpu,memory:/job\n3:cpuset:/other\n0::/\n")
    assert available_memory("cpu", cgroups=first, membership=membership) == 3010
