"""The memory that training and inspection are said to need, beside real ones whose tensors are counted."""

from __future__ import annotations

import json
import resource
import weakref
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from gladad.algorithm import ReconstructionConfig, ScoringConfig, reconstruct
from gladad.core.errors import ConfigError, ModelFormatError
from gladad.models.stable_diffusion.architectures import SD14, BaseConfigs, build_without_weights, read_configs
from gladad.models.stable_diffusion.components import Sources, locate_base
from gladad.models.stable_diffusion.device import available_memory, bytes_text
from gladad.models.stable_diffusion.memory import Plan, Size, check_fits, plan_inspection, plan_training
from gladad.models.stable_diffusion.pipeline import GladPipeline
from gladad.models.stable_diffusion.training import FinetuneConfig

SIZE = (128, 128)
LORA = FinetuneConfig(rank=4, batch_size=2)
FULL = replace(LORA, method="full")
TOLERANCE = 0.1  # 20 % are promised
SMALL = {  # one level, attention in its middle only: for the many plans that are compared with each other
    "block_out_channels": [16],
    "down_block_types": ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 4,
    "cross_attention_dim": 32,
}
LITTLE_VAE = SD14.vae | {"block_out_channels": [4] * 4, "norm_num_groups": 4}  # its pictures never are the peak
DINOV2 = {"model_type": "dinov2", "hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 3, "image_size": 56, "patch_size": 14}


@pytest.fixture(scope="module")
def configs(tiny_base: Path) -> BaseConfigs:
    return read_configs(locate_base(Sources(tiny_base)))


@pytest.fixture(scope="module")
def plan_of():
    """Plans of a small denoiser, each computed once."""
    return cache(lambda training, size=SIZE, **more: plan_training(BaseConfigs(SMALL, LITTLE_VAE, DINOV2), training, size, **more))


# ------------------------------------------------------------------------------------------ beside tensors that are there


class Counter(TorchDispatchMode):
    """Bytes of all storages that live, of those that it was shown and those that were made in it, and the most of them."""

    def __init__(self, *networks: nn.Module) -> None:
        super().__init__()
        self.live, self.peak, self.known = 0, 0, {}
        for network in networks:
            self.show(list(network.parameters()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.show(result)
        return result

    def show(self, tensors: Any) -> None:
        for storage in [tensor.untyped_storage() for tensor in tree_iter(tensors) if isinstance(tensor, Tensor)]:
            if (key := id(storage)) not in self.known:
                size = storage.nbytes()
                self.known[key] = weakref.ref(storage, lambda _, key=key, size=size: self.gone(key, size))
                self.live += size
                self.peak = max(self.peak, self.live)

    def gone(self, key: int, size: int) -> None:
        self.live -= size
        del self.known[key]


def bytes_of(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def real_training(folder: Path, training: FinetuneConfig) -> tuple[Plan, int]:
    """What is there between real steps of the denoiser alone, without the project's help, and the peak."""
    frozen = getattr(torch, training.precision) if training.method == "lora" else torch.float32
    unet = UNet2DConditionModel.from_pretrained(folder / "sd" / "unet", torch_dtype=frozen).train()
    if training.method == "lora":
        unet.requires_grad_(False)
        targets = ["to_q", "to_k", "to_v", "to_out.0"]
        unet.add_adapter(LoraConfig(r=training.rank, lora_alpha=training.rank, target_modules=targets))
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    if training.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(trained)
    images = training.micro_batch or training.batch_size
    shape = (images, 4, SIZE[0] // 8, SIZE[1] // 8)
    with Counter(unet) as counter:
        for _ in range(3):
            for _ in range(training.batch_size // images):
                context = torch.randn(images, 77, 32).to(unet.dtype)
                with torch.autocast("cpu", torch.bfloat16, enabled=training.precision == "bfloat16"):
                    predicted = unet(torch.randn(shape).to(unet.dtype), torch.zeros(images), context).sample
                    loss = F.mse_loss(predicted.float(), torch.randn(shape))
                del predicted
                loss.backward()
                del loss
            optimizer.step()
            gradients = bytes_of(parameter.grad for parameter in trained)
            optimizer.zero_grad()
    moments = bytes_of(value for state in optimizer.state.values() for value in state.values())
    return {"weights": bytes_of(unet.parameters()), "gradients": gradients, "optimizer": moments}, counter.peak


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "lora", "gradient_checkpointing": True, "precision": "bfloat16", "batch_size": 4, "micro_batch": 2},
        {"method": "lora", "gradient_checkpointing": False, "precision": "bfloat16"},
        {"method": "full", "gradient_checkpointing": True, "precision": "float32", "batch_size": 4, "micro_batch": 2},
        {"method": "full", "gradient_checkpointing": False, "precision": "float32"},
        {"method": "full", "gradient_checkpointing": False, "precision": "bfloat16"},  # with copies of all weights in bfloat16
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_a_plan_is_near_a_real_training_that_is_counted(tiny_base, configs, changes):
    training = replace(LORA, **changes)
    real, peak = real_training(tiny_base, training)
    plan = plan_training(configs, training, SIZE)
    _, *others = build_without_weights(configs, getattr(torch, training.precision), torch.float32)
    loaded = sum(bytes_of(network.parameters()) for network in others)
    assert (plan["weights"] - loaded, plan["gradients"]) == (real["weights"], real["gradients"])
    assert plan["optimizer"] == pytest.approx(real["optimizer"], rel=0.01)  # torch counts the steps of each weight
    assert plan["total"] - loaded == pytest.approx(peak, rel=TOLERANCE)
    assert peak - sum(real.values()) > 0.15 * peak  # activations, or the comparison would say little


@pytest.mark.parametrize("guidance", [False, True])
def test_an_inspection_is_near_a_real_one_that_is_counted(tiny_base, configs, guidance):
    pipeline = GladPipeline.from_base(tiny_base)
    pipeline.guidance_scale = 9.0 if guidance else 1.0
    with Counter(pipeline.unet, pipeline.vae, pipeline.features) as counter, torch.no_grad():
        weights = counter.live
        image = torch.rand(1, 3, *SIZE)
        latent = pipeline.encode(image)
        chain = ReconstructionConfig(max_step=200, min_step=100, num_steps=2)
        rebuilt = reconstruct(pipeline, latent, torch.randn_like(latent), pipeline.schedule, chain)
        pipeline.score_maps(image, pipeline.decode(rebuilt.latent), ScoringConfig(), SIZE)
    plan = plan_inspection(configs, SIZE, "float32", guidance=guidance)
    assert plan["weights"] == weights and set(plan) == {"weights", "activations", "total"}
    assert plan["total"] == pytest.approx(counter.peak, rel=TOLERANCE)
    assert plan["activations"] > 0.5 * plan["total"]


def test_the_papers_base_has_the_known_sizes_and_the_measured_peak():
    networks = build_without_weights(SD14, torch.bfloat16, torch.bfloat16)
    count = [sum(p.numel() for p in network.parameters()) for network in networks]
    assert count == [859_520_964, 83_653_863, 85_807_872]  # as published; ViT-B/8 at 224 px has 784 + 1 positions
    others = 2 * sum(count[1:])
    plan = plan_training(SD14, FinetuneConfig(batch_size=1), (256, 256))
    assert plan["total"] - others == pytest.approx(1830 * 2**20, rel=0.2)  # docs/scale.md


def test_a_plan_takes_no_memory(configs):
    wide = replace(configs, unet=SMALL | {"block_out_channels": [2048]})
    before = psutil.Process().memory_info().rss
    peak_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    plan = plan_training(wide, replace(FULL, batch_size=64), SIZE)
    assert plan["total"] > 10 * 2**30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - max(peak_before, before) < 300 * 2**20


# ------------------------------------------------------------------------------------------------------------ each setting


def test_activations_grow_with_batch_and_size_and_shrink_with_checkpointing(plan_of):
    activations = [plan_of(replace(LORA, batch_size=size), (256, 256))["activations"] for size in (4, 8)]
    assert 1.5 * activations[0] < activations[1] < 2.1 * activations[0]
    assert plan_of(LORA, (256, 384))["activations"] > plan_of(LORA, (256, 256))["activations"]
    assert plan_of(replace(LORA, gradient_checkpointing=False))["activations"] > 1.3 * plan_of(LORA)["activations"]


def test_processes_share_a_batch_and_gradients_accumulate(plan_of):
    assert plan_of(replace(LORA, batch_size=4), processes=2) == plan_of(LORA)
    at_once, divided = plan_of(FULL, (512, 512)), plan_of(replace(FULL, batch_size=6, micro_batch=2), (512, 512))
    assert divided["total"] == at_once["total"] + at_once["gradients"]  # of the passes before


def test_full_training_needs_more_than_lora_and_averages_a_copy(plan_of):
    lora, full, averaged = plan_of(LORA), plan_of(FULL), plan_of(replace(FULL, ema=0.9))
    assert full["total"] > lora["total"] and full["gradients"] > 10 * lora["gradients"]
    assert averaged["averaged weights"] == averaged["gradients"] == averaged["total"] - full["total"]
    assert list(averaged) == ["weights", "gradients", "optimizer", "averaged weights", "activations", "total"]
    assert sum(averaged.values()) == 2 * averaged["total"]
    assert plan_of(replace(LORA, rank=8))["gradients"] == 2 * lora["gradients"]
    assert plan_of(replace(LORA, layers="all"))["gradients"] > 2 * lora["gradients"]


def test_moments_of_8_bits_are_a_quarter_and_muon_has_one_of_two(plan_of):
    ratio = plan_of(replace(FULL, optimizer="adamw8bit"))["optimizer"] / plan_of(FULL)["optimizer"]
    assert 0.25 < ratio < 0.26  # with a scale per block
    assert 2 * plan_of(replace(FULL, optimizer="muon"))["optimizer"] == plan_of(FULL)["optimizer"]


def test_a_gpu_keeps_norms_in_float32_and_steps_all_weights_at_once(plan_of):
    lora = replace(LORA, gradient_checkpointing=False)
    assert plan_of(lora, device_type="cuda")["activations"] > 1.1 * plan_of(lora)["activations"]
    wide = BaseConfigs(SMALL | {"block_out_channels": [256]}, LITTLE_VAE, DINOV2)
    plan = plan_training(wide, replace(FULL, batch_size=1), (32, 32), device_type="cuda")
    assert plan["activations"] == plan["gradients"]  # a square root of every second moment


def test_pictures_can_need_more_than_a_step(tiny_base, configs):
    plan = plan_training(replace(configs, unet=SMALL), replace(LORA, batch_size=1, precision="float32"), SIZE)
    vae = GladPipeline.from_base(tiny_base).vae
    with Counter(vae) as counter, torch.no_grad():
        weights = counter.live
        vae.decode(vae.encode(torch.rand(1, 3, *SIZE)).latent_dist.mean)
    assert plan["activations"] + plan["gradients"] == pytest.approx(counter.peak - weights, rel=TOLERANCE)


def test_mistakes_have_names(configs):
    for size in ((100, 128), (0, 128)):
        with pytest.raises(ConfigError, match=f"multiples of 8, got {size[0]}x128"):
            plan_training(configs, LORA, size)
    with pytest.raises(ConfigError, match="multiples of 8"):
        plan_inspection(configs, (96, 100), "float32", guidance=False)
    with pytest.raises(ModelFormatError, match=r"denoiser's config\.json describes no network"):
        plan_training(replace(configs, unet=configs.unet | {"down_block_types": ["CrossAttnDownBlock2D"]}), LORA, SIZE)
    with pytest.raises(ModelFormatError, match=r"feature extractor's config\.json"):
        plan_training(replace(configs, features={"model_type": "bert"}), LORA, SIZE)


def test_configurations_are_read_from_folders(tiny_base, tmp_path):
    configs = read_configs(locate_base(Sources(tiny_base)))
    assert configs.unet["block_out_channels"] == [16, 32]
    assert configs.vae["block_out_channels"] == [8, 8, 16, 16]
    assert configs.features["model_type"] == "vit"
    for name, values in {"vae": {"latent_channels": 16}, "dino": DINOV2}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(values))
    replaced = read_configs(locate_base(Sources(tiny_base, tmp_path / "dino", tmp_path)))
    assert replaced == BaseConfigs(configs.unet, {"latent_channels": 16}, DINOV2)
    with pytest.raises(ModelFormatError, match=r"unet/config\.json: missing"):
        read_configs(locate_base(Sources(tmp_path, tmp_path / "dino")))


def test_other_extractors_can_be_planned(configs):
    assert plan_inspection(replace(configs, features=DINOV2), (112, 112), "bfloat16", guidance=False)["activations"] > 0


# ---------------------------------------------------------------------------------------------------- does it fit?


class Planner:
    """Plans that need what a training of so many images and values would, and what was asked of it."""

    def __init__(self) -> None:
        self.asked: list[tuple[FinetuneConfig, Size]] = []

    def __call__(self, training: FinetuneConfig, size: Size) -> Plan:
        self.asked.append((training, size))
        images = training.micro_batch or training.batch_size
        weights = 1 if training.method == "lora" else 8 if training.optimizer == "adamw8bit" else 16
        halved = 1 if training.precision == "bfloat16" else 2
        return {"total": weights * images * size[0] * size[1] * halved * (1 if training.gradient_checkpointing else 4)}


ASKED = replace(FULL, batch_size=8, precision="float32", gradient_checkpointing=False)


@pytest.mark.parametrize(
    ("share", "device", "found"),
    [
        (1.0, "cpu", None),
        (0.99, "cpu", "gradient checkpointing"),
        (1 / 16, "cpu", "gradient checkpointing and micro_batch 2"),
        (1 / 17, "cpu", "gradient checkpointing and micro_batch 1"),
        (1 / 64, "cuda", "gradient checkpointing, micro_batch 1 and optimizer adamw8bit"),
        (1 / 64, "cpu", "LoRA instead of full training and gradient checkpointing"),
        (1 / 1000, "cuda", "LoRA instead of full training, gradient checkpointing, micro_batch 1 and precision bfloat16"),
        (
            1 / 1025,
            "cuda",
            "LoRA instead of full training, gradient checkpointing, micro_batch 1, precision bfloat16 and images of 384x768 pixels",
        ),
        (1e-9, "cuda", "nothing smaller fits either"),
    ],
)
def test_the_first_smaller_training_that_fits_is_suggested(share, device, found):
    planner, size = Planner(), (512, 1024)
    available = int(planner(ASKED, size)["total"] * share)
    if found is None:
        check_fits(planner, ASKED, size, available, device)
        return
    with pytest.raises(ConfigError) as error:
        check_fits(planner, ASKED, size, available, device)
    what = f"training needs {bytes_text(planner(ASKED, size)['total'])} of memory, and {bytes_text(available)} are available; "
    training, size = planner.asked[-2]
    fits = "" if share < 1e-6 else f" ({bytes_text(planner(training, size)['total'])})"
    assert str(error.value) == what + ("" if share < 1e-6 else "it fits with ") + found + fits
    assert all(training.batch_size == 8 for training, _ in planner.asked)
    assert ("adamw8bit" in {training.optimizer for training, _ in planner.asked}) == (device == "cuda" and share < 1 / 32)


def test_a_training_without_any_way_to_save_is_refused():
    planner = Planner()
    with pytest.raises(ConfigError, match="nothing smaller fits either"):
        check_fits(planner, replace(LORA, batch_size=1), (128, 64), 0)
    assert len(planner.asked) == 1


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
