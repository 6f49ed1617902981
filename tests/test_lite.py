"""The lite base: its features, latent, one-call reconstruction, training and files."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gladad.algorithm import OneCallConfig, Schedule, add_noise, image_noise, reconstruct_one_call
from gladad.core.errors import ConfigError, DataError, ModelFormatError, TrainingError
from gladad.core.records import no_progress
from gladad.core.settings import with_values
from gladad.core.tensors import to_tensor
from gladad.features.efficientnet import BATCH_NORM_EPS, TAPS, from_reference_state, pretrained, stages_of
from gladad.features.extractor import DEFAULT_EXTRACTOR
from gladad.features.space import FeatureSpace
from gladad.features.stack import FeatureStack, size_for_aspect
from gladad.models.feature_diffusion.family import check
from gladad.models.feature_diffusion.model import FeatureDiffusion
from gladad.models.feature_diffusion.networks import LatentDenoiser
from gladad.models.feature_diffusion.settings import FeatureDiffusionConfig, FeatureDiffusionSettings
from gladad.models.feature_diffusion.training import adjusted, budget, train_models

FEATURE_CHANNELS = 24 + 40 + 112
SCHEDULE = Schedule.scaled_linear()
SMALL = with_values(
    FeatureDiffusionConfig(image_size=(64, 96)),
    {
        "settings.latent.dimensions": 8,
        "settings.widths": [32, 32],
        "settings.seed": 3,
        "settings.training": {"steps": 6, "batch_size": 4, "pool": 16, "decoder_steps": 3},
        "settings.memory": 300,
    },
)


def small(**changes: object) -> FeatureDiffusionConfig:
    """`SMALL` with other settings; a double underscore stands for a dot."""
    return with_values(SMALL, {f"settings.{name.replace('__', '.')}": value for name, value in changes.items()})


def fit(images: list[np.ndarray], config: FeatureDiffusionConfig = SMALL, **options: object) -> FeatureDiffusion:
    return train_models({"": images}, config, **options)[""]  # type: ignore[arg-type]


def parts(count: int, size: tuple[int, int] = (64, 96), noise: float = 4) -> list[np.ndarray]:
    """Normal images: a bright disc on a gradient, with grain."""
    y, x = np.mgrid[: size[0], : size[1]]
    disc = np.hypot(y - size[0] / 2, x - size[1] / 2) < size[0] / 4
    images = []
    for index in range(count):
        grain = np.random.default_rng(index).normal(0, noise, (*size, 3))
        images.append((60 + x[..., None] * 0.5 + 100 * disc[..., None] + grain).clip(0, 255).astype(np.uint8))
    return images


@pytest.fixture(scope="module")
def base() -> FeatureDiffusion:
    return fit(parts(12))


# ------------------------------------------------------------------------------------------------------- features


def reference_state(generator: torch.Generator, name: str = DEFAULT_EXTRACTOR) -> dict[str, torch.Tensor]:
    """Random weights in the naming of the published files."""
    state: dict[str, torch.Tensor] = {}

    def layer(conv: str, norm: str, outputs: int, inputs: int, kernel: int) -> None:
        state[conv + ".weight"] = torch.randn(outputs, inputs, kernel, kernel, generator=generator) / (inputs * kernel**2) ** 0.5
        state[norm + ".weight"] = torch.rand(outputs, generator=generator) + 0.5
        state[norm + ".bias"] = torch.randn(outputs, generator=generator) * 0.1
        state[norm + ".running_mean"] = torch.randn(outputs, generator=generator) * 0.1
        state[norm + ".running_var"] = torch.rand(outputs, generator=generator) + 0.5

    layer("_conv_stem", "_bn0", 32, 3, 3)
    index, inputs = 0, 32
    for expansion, outputs, repeats, _, kernel in stages_of(name):
        for _ in range(repeats):
            wide, prefix = inputs * expansion, f"_blocks.{index}."
            if expansion != 1:
                layer(prefix + "_expand_conv", prefix + "_bn0", wide, inputs, 1)
            layer(prefix + "_depthwise_conv", prefix + "_bn1", wide, 1, kernel)
            layer(prefix + "_project_conv", prefix + "_bn2", outputs, wide, 1)
            index, inputs = index + 1, outputs
    return state


def plain_forward(state: dict[str, torch.Tensor], image: torch.Tensor, name: str) -> list[torch.Tensor]:
    """The network as published: convolutions and batch norms apart, TensorFlow padding computed from the sizes."""

    def conv(x: torch.Tensor, name: str, norm: str, stride: int = 1, groups: int = 1, relu: bool = True) -> torch.Tensor:
        weight = state[name + ".weight"]
        kernel = weight.shape[-1]
        pads = []
        for side in (x.shape[3], x.shape[2]):
            total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
            pads += [total // 2, total - total // 2]
        x = F.conv2d(F.pad(x, pads), weight, stride=stride, groups=groups)
        x = F.batch_norm(
            x,
            state[norm + ".running_mean"],
            state[norm + ".running_var"],
            state[norm + ".weight"],
            state[norm + ".bias"],
            eps=BATCH_NORM_EPS,
        )
        return x.clamp(0, 6) if relu else x

    x = conv((image * 255 - 127) / 128, "_conv_stem", "_bn0", 2)
    taps, index, inputs = [], 0, 32
    for stage, (expansion, outputs, repeats, stride, _) in enumerate(stages_of(name)):
        for repeat in range(repeats):
            prefix, step = f"_blocks.{index}.", stride if repeat == 0 else 1
            y = x if expansion == 1 else conv(x, prefix + "_expand_conv", prefix + "_bn0")
            y = conv(y, prefix + "_depthwise_conv", prefix + "_bn1", step, groups=y.shape[1])
            y = conv(y, prefix + "_project_conv", prefix + "_bn2", relu=False)
            x = y + x if step == 1 and inputs == outputs else y
            index, inputs = index + 1, outputs
        if stage in TAPS:
            taps.append(x)
    return taps


@pytest.mark.parametrize(
    ("name", "size", "widths"),
    [
        ("efficientnet-lite0", (64, 64), (24, 40, 112)),
        ("efficientnet-lite0", (96, 160), (24, 40, 112)),
        ("efficientnet-lite1", (96, 160), (24, 40, 112)),
        ("efficientnet-lite2", (96, 160), (24, 48, 120)),
    ],
)
def test_the_folded_network_equals_the_published_one(name: str, size: tuple[int, int], widths: tuple[int, int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    state = reference_state(generator, name)
    image = torch.rand(2, 3, *size, generator=generator)
    for ours, theirs, channels, stride in zip(
        from_reference_state(state, "test", name)(image), plain_forward(state, image, name), widths, TAPS.values(), strict=True
    ):
        assert ours.shape == (2, channels, size[0] // stride, size[1] // stride)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_weights_of_another_network_are_refused() -> None:
    state = reference_state(torch.Generator().manual_seed(0))
    del state["_blocks.3._bn1.bias"]
    with pytest.raises(ModelFormatError, match=r"_blocks\.3"):
        from_reference_state(state, "odd.pth")


def test_stacked_features_have_one_grid() -> None:
    features = FeatureStack(pretrained(), (64, 128))(torch.rand(2, 3, 64, 128))
    assert features.shape == (2, FEATURE_CHANNELS, 8, 16)
    assert features.isfinite().all()


@pytest.mark.parametrize("aspect", [0.3, 0.75, 1.0, 1.33, 2.46, 6.0])
def test_working_size_keeps_proportions_and_budget(aspect: float) -> None:
    height, width = size_for_aspect(aspect, 256, 32)
    assert height % 32 == 0 and width % 32 == 0
    assert 0.6 * 256**2 <= height * width <= 256**2
    assert abs(np.log(width / height / aspect)) < 0.3
    assert size_for_aspect(1.0, 256, 32) == (256, 256)


def test_feature_space_is_standardised_and_orthogonal() -> None:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(FEATURE_CHANNELS, FEATURE_CHANNELS, generator=generator)
    features = F.conv2d(torch.randn(6, FEATURE_CHANNELS, 16, 16, generator=generator), mixing[:, :, None, None]) + 3
    space = FeatureSpace(FEATURE_CHANNELS, 20, 0.5)
    space.fit(features.split(2))
    latent = space(features)
    assert latent.shape == (6, 20, 16, 16)
    assert float(latent.square().mean()) == pytest.approx(1, abs=0.02)
    correlation = torch.corrcoef(latent.permute(1, 0, 2, 3).flatten(1))
    assert float((correlation - torch.eye(20)).abs().max()) < 0.02


def test_half_whitening_lies_between_none_and_full() -> None:
    features = torch.randn(4, FEATURE_CHANNELS, 8, 8, generator=torch.Generator().manual_seed(1))
    features = features * torch.linspace(1, 3, 8).view(1, 1, 8, 1)

    def ratio(whitening: float) -> float:
        space = FeatureSpace(FEATURE_CHANNELS, 10, whitening)
        space.fit([features])
        deviation = space(features).std((0, 2, 3))
        return float(deviation[0] / deviation[-1])

    assert ratio(1.0) == pytest.approx(1, abs=0.05)
    assert ratio(1.0) < ratio(0.5) < ratio(0.0)


@pytest.mark.parametrize("grid", [(8, 8), (12, 8), (20, 52)])
def test_denoiser_takes_any_even_grid(grid: tuple[int, int]) -> None:
    denoiser = LatentDenoiser(4, grid, (32, 32, 32)).eval()
    with torch.no_grad():
        assert denoiser(torch.randn(2, 4, *grid), torch.tensor([5, 900])).shape == (2, 4, *grid)


# ------------------------------------------------------------------------------------------ one-call reconstruction


class Oracle:
    """A perfect denoiser: whatever comes in, the clean latent it implies is ``normal``, plus ``bias`` times the timestep."""

    def __init__(self, normal: torch.Tensor, bias: float = 0.0):
        self.normal, self.bias = normal, bias

    def encode(self, image: torch.Tensor) -> torch.Tensor:
        return image

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        return latent

    def latent_features(self, latent: torch.Tensor) -> torch.Tensor:
        return latent

    def predict_noise(self, latent: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        alpha_bar = SCHEDULE.alpha_bar(timestep)
        clean = self.normal + self.bias * timestep.view(-1, 1, 1, 1)
        return (latent - alpha_bar.sqrt() * clean) / (1 - alpha_bar).sqrt()


def one_call(latent: torch.Tensor, normal: torch.Tensor, bias: float = 0.0, **options: object):
    config = replace(OneCallConfig(timesteps=(500, 300, 100), adaptive=False), **options)  # type: ignore[arg-type]
    noise = image_noise(latent.shape[1:], 0, 3)[None].expand(len(latent), -1, -1, -1, -1)
    return reconstruct_one_call(Oracle(normal, bias), latent, noise, SCHEDULE, config, torch.ones(1, latent.shape[1], 1, 1))


@pytest.fixture
def latents() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    normal = torch.randn(1, 4, 6, 6, generator=generator)
    latent = normal.repeat(3, 1, 1, 1)
    latent[1, :, 2, 3] += 5  # a strong local anomaly
    latent[2] += 0.3  # a weak global one
    return latent, normal


def test_a_perfect_denoiser_gives_the_normal_latent(latents: tuple[torch.Tensor, torch.Tensor]) -> None:
    latent, normal = latents
    found = one_call(latent, normal)
    torch.testing.assert_close(found.latent, normal.expand_as(latent), atol=1e-4, rtol=0)
    assert found.trace.shape == (3, 3) and found.probes == 9
    assert found.gap_score[0] < 1e-6 < found.gap_score[2] < found.gap_score[1]


def test_without_a_draw_the_noise_does_not_matter(latents: tuple[torch.Tensor, torch.Tensor]) -> None:
    latent, normal = latents

    class Keeping(Oracle):
        def predict_noise(self, latent: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return 0.5 * latent

    config = OneCallConfig(timesteps=(400,), adaptive=False)
    made = {
        noise: [
            reconstruct_one_call(
                Keeping(normal), latent, draw.expand(3, 1, 4, 6, 6), SCHEDULE, replace(config, noise=noise), torch.ones(1)
            ).latent
            for draw in (torch.randn(4, 6, 6), torch.randn(4, 6, 6))
        ]
        for noise in ("drawn", "mean")
    }
    assert torch.equal(*made["mean"]) and not torch.equal(*made["drawn"])
    alpha_bar = SCHEDULE.alpha_bar(torch.tensor([400]))
    torch.testing.assert_close(made["mean"][0], latent * (1 - 0.5 * (1 - alpha_bar).sqrt()))


def test_the_step_search_stops_at_the_first_clear_difference(latents: tuple[torch.Tensor, torch.Tensor]) -> None:
    latent, normal = latents
    found = one_call(latent, normal, adaptive=True, step_thresholds=(1.0, 0.05, 0.05))
    assert found.step.tolist() == [100, 500, 300]  # nothing seen; clear at once; clear at the second look


def test_the_estimate_averages_the_probes_visited(latents: tuple[torch.Tensor, torch.Tensor]) -> None:
    latent, normal = latents
    never = one_call(latent, normal, bias=1e-3, adaptive=True, step_thresholds=(1e9, 1e9, 1e9))
    at_once = one_call(latent, normal, bias=1e-3, adaptive=True, step_thresholds=(-1.0, 0.0, 0.0))
    torch.testing.assert_close(never.latent - normal, torch.full_like(latent, 0.3), atol=1e-3, rtol=0)  # mean of .5 .3 .1
    torch.testing.assert_close(at_once.latent - normal, torch.full_like(latent, 0.5), atol=1e-3, rtol=0)


def test_calibrated_fusion_keeps_the_input_where_it_is_normal(latents: tuple[torch.Tensor, torch.Tensor]) -> None:
    latent, normal = latents
    noisy = latent + 0.01
    fused = one_call(noisy, normal, fusion="calibrated", fusion_center=1.0, fusion_width=0.05).latent
    torch.testing.assert_close(fused[1, :, 0, 0], noisy[1, :, 0, 0], atol=1e-4, rtol=0)  # the input's own content
    torch.testing.assert_close(fused[1, :, 2, 3], normal[0, :, 2, 3], atol=1e-3, rtol=0)  # the model's


def test_one_call_results_do_not_depend_on_the_batch(latents: tuple[torch.Tensor, torch.Tensor]) -> None:
    latent, normal = latents
    options = {"adaptive": True, "step_thresholds": (1.0, 0.05, 0.05), "bias": 1e-3}
    together = one_call(latent.flip(0), normal, **options)
    for index in range(3):
        alone = one_call(latent[index : index + 1], normal, **options)
        assert torch.equal(alone.latent[0], together.latent[2 - index])
        assert alone.step[0] == together.step[2 - index]


# ------------------------------------------------------------------------------------------------ training and use


def test_the_training_target_implies_the_normal_latent() -> None:
    generator = torch.Generator().manual_seed(0)
    normal, anomalous, noise = torch.randn(3, 2, 4, 8, 8, generator=generator).unbind(0)
    alpha_bar = SCHEDULE.alpha_bar(torch.tensor([120, 650]))
    x_t = add_noise(anomalous, noise, alpha_bar)
    velocity = (alpha_bar.sqrt() * x_t - normal) / (1 - alpha_bar).sqrt()
    torch.testing.assert_close(alpha_bar.sqrt() * x_t - (1 - alpha_bar).sqrt() * velocity, normal, atol=1e-5, rtol=0)


def test_an_image_has_the_same_score_alone_and_among_others(base: FeatureDiffusion) -> None:
    images = parts(7)
    alone = [base.inspect(image) for image in images]
    order = [4, 0, 6, 2, 1, 5, 3]
    for index, found in zip(order, [base.inspect(images[i]) for i in order], strict=True):
        assert found.score == alone[index].score
        assert np.array_equal(found.map, alone[index].map)


def test_the_same_seed_gives_the_same_weights(base: FeatureDiffusion) -> None:
    again = fit(parts(12))
    other = fit(parts(12), small(seed=4))
    assert again.config == base.config
    for name, value in base.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    weights = [model.all_scales()[0].denoiser.unet.conv_in.weight for model in (other, base)]
    assert not torch.equal(*weights)


def test_training_lowers_the_residual_of_normal_images() -> None:
    untrained, trained = (
        fit(parts(16), small(training__steps=steps, training__batch_size=8, training__pool=32, training__learning_rate=2e-3))
        for steps in (1, 120)
    )
    energies = [float(model.all_scales()[0].residual_scale.square().mean()) for model in (untrained, trained)]
    assert energies[1] < 0.6 * energies[0]


def test_what_is_usual_is_measured_as_if_the_gaussians_had_not_learnt_it() -> None:
    images = parts(6)  # too few to set some apart
    scale = fit(images).all_scales()[0]
    latents = torch.cat([scale.encode(to_tensor(pixels)[None]) for pixels in images])
    learnt = scale.magnitude(latents, scale.rebuild(latents, torch.arange(6)).latent)
    assert float(learnt.square().mean()) < 0.95 * float(scale.usual_energy)


def test_the_score_is_the_least_usual_of_the_largest_cells_and_of_all_at_every_scale(base: FeatureDiffusion) -> None:
    scales, usual = base.all_scales(), [scale.usual_scores for scale in base.all_scales()]
    assert [tuple(own.shape) for own in usual] == [(2, 2), (2, 2)] and all((own[:, 1] > 0).all() for own in usual)
    level = [torch.full((1, 1, *scale.grid), float(own[1, 0].exp())) for scale, own in zip(scales, usual, strict=True)]
    spot = level[0].clone()
    spot[..., :4, :4] += 10 * float(usual[0][0, 0].exp())
    assert float(base.summary([spot, level[1]])[1]) > float(base.summary(level)[1])
    power = torch.cat(usual)[:, 1].log().mean().exp() / usual[0][1, 1]
    everywhere = [2 * level[0], level[1]]  # no cell is far above the others
    assert float(base.summary(everywhere)[1]) >= float(2**power) * (1 - 1e-5)


def test_the_mean_of_all_cells_is_that_of_those_that_count(base: FeatureDiffusion) -> None:
    scale = base.all_scales()[0]
    counted = torch.ones(1, 1, *scale.grid)
    counted[..., : scale.grid[1] // 2] = 0
    evidence = torch.rand(3, 1, *scale.grid) * counted
    largest, mean = scale.scores(evidence, counted)
    torch.testing.assert_close(mean, torch.stack([own[counted[0] > 0].mean() for own in evidence]))
    assert torch.equal(largest, scale.scores(evidence)[0]) and (scale.scores(evidence)[1] < mean).all()
    assert torch.equal(scale.scores(0 * evidence, 0 * counted), torch.zeros(2, 3))  # nothing counts


def test_the_mean_of_all_cells_can_be_left_out() -> None:
    model = fit(parts(6), small(scoring__whole=False, training__steps=1))
    assert model.all_scales()[0].usual_scores.shape == (1, 2)
    assert model.inspect(parts(1)[0]).score > 0


def test_training_without_anomalies_is_plain_diffusion() -> None:
    plain = fit(parts(6), small(training__anomaly_oriented=False, training__weighting="velocity"))
    assert np.isfinite(plain.inspect(parts(1)[0]).score)


def test_a_time_budget_sets_the_steps() -> None:
    seen: list[tuple[int, int]] = []
    config = small(training__steps=None, training__minutes=0.02)
    fit(parts(4), config, progress=lambda s, d, n: seen.append((d, n)) if s == "scale 2: denoiser" else None)
    assert seen[-1][0] == seen[-1][1] and 10 < seen[-1][1] < 400


def test_measuring_again_changes_nothing() -> None:
    images = parts(12)
    base = fit(images)
    before = base.digest()
    other = adjusted(base, small(reconstruction__adaptive=True).settings, images, no_progress)
    assert base.digest() == before != other.digest()
    largest = adjusted(other, small(scoring__whole=False).settings, images, no_progress)
    assert largest.inspect(images[0]).score == fit(images, small(scoring__whole=False)).inspect(images[0]).score
    again = adjusted(largest, SMALL.settings, images, no_progress)
    assert again.digest() == before and again.all_scales()[1].denoiser is base.all_scales()[1].denoiser


def test_steps_that_were_set_are_those_of_each_training() -> None:
    """A budget is divided among the trainings of cross-fitting only if it is the default one."""
    training = SMALL.settings.training
    assert budget(training, 1, 3).steps == training.steps == 6
    default = small(training__steps=None).settings.training
    assert (budget(default, 1, 1).steps, budget(default, 1, 3).steps, budget(default, 4, 1).steps) == (400, 133, 800)


def test_deviation_correction_is_trained_and_inspects(tmp_path) -> None:
    """The second method goes through the same training, statistics, inspection and files."""
    images = parts(12)
    config = small(reconstruction={"method": "deviation"}, training__steps=60, training__learning_rate=2e-3)
    model = fit(images, config)
    assert model.all_scales()[0].method.schedule.num_timesteps == 10
    odd = images[0].copy()
    odd[10:54, 20:76] = (255, 0, 255)
    assert model.inspect(odd).score > 1.2 * max(model.inspect(image).score for image in images)
    assert model.inspect(images[0]).step == 8
    loaded = FeatureDiffusion.load(tmp_path, model.save(tmp_path))
    assert loaded.digest() == model.digest() and loaded.inspect(odd).score == model.inspect(odd).score


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    with pytest.raises(TrainingError, match=r"loss of the denoiser is (nan|inf) at step \d+; lower training\.learning_rate"):
        fit(parts(4), small(training__learning_rate=1e30))


def test_the_picture_is_the_input_where_the_part_is_normal(base: FeatureDiffusion) -> None:
    pixels = parts(1, (80, 120))[0]
    found = base.inspect(pixels)
    assert np.array_equal(base.picture(found, pixels, threshold=1e9), pixels)
    assert not np.array_equal(base.picture(found, pixels, threshold=1e-9), pixels)


def with_latent(config: dict, **values: object) -> dict:
    return config | {"settings": config["settings"] | {"latent": config["settings"]["latent"] | values}}


def test_save_and_load(base: FeatureDiffusion, tmp_path) -> None:
    config = base.save(tmp_path)
    loaded = FeatureDiffusion.load(tmp_path, config)
    image = parts(1)[0]
    assert loaded.config == base.config
    assert loaded.inspect(image).score == base.inspect(image).score
    with pytest.raises(ModelFormatError, match="fit together"):
        FeatureDiffusion.load(tmp_path, with_latent(config, dimensions=9))
    with pytest.raises(ModelFormatError, match=r"settings\.latent\.colour: unknown setting"):
        FeatureDiffusion.load(tmp_path, with_latent(config, colour=9))
    (tmp_path / "lite.safetensors").write_bytes(b"not a tensor file")
    with pytest.raises(ModelFormatError, match="damaged"):
        FeatureDiffusion.load(tmp_path, config)


@pytest.mark.parametrize("bad", [{"image_size": (60, 64)}, {"image_size": (64, 32)}])
def test_impossible_sizes_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="multiples of 32"):
        fit(parts(2), replace(SMALL, **bad))  # type: ignore[arg-type]


@pytest.mark.parametrize("dimensions", [0, 328])
def test_impossible_dimensions_are_refused(dimensions: int) -> None:
    with pytest.raises(ConfigError, match=r"latent\.dimensions"):
        fit(parts(2), small(latent__dimensions=dimensions))


def test_a_step_search_among_one_step_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^reconstruction\.adaptive: chooses among timesteps; give two or more"):
        check("lite", FeatureDiffusionSettings(reconstruction=OneCallConfig(timesteps=(400,), adaptive=True)), False)
    check("lite", FeatureDiffusionSettings(reconstruction=OneCallConfig(timesteps=(600, 400), adaptive=True)), False)


def test_one_image_is_not_enough() -> None:
    with pytest.raises(DataError, match="at least 2"):
        fit(parts(1))


def test_scales_side_by_side_give_the_same_bits(base: FeatureDiffusion) -> None:
    pixels, before = parts(1)[0], torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert base.workers == threads
            found.append(base.inspect(pixels))
    finally:
        torch.set_num_threads(before)
    assert found[0].score == found[1].score and np.array_equal(found[0].map, found[1].map)
