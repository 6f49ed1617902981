"""The algorithm against theorems, and against diffusers, on analytic networks."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from torch import Tensor

from gladad.algorithm import (
    DeviationConfig,
    OneCallConfig,
    Reconstruction,
    ReconstructionConfig,
    Schedule,
    ScoringConfig,
    add_noise,
    anomaly_map,
    chain_timesteps,
    corrupt_cells,
    ddim_step,
    denoising_target,
    deviation_target,
    fusion_mask,
    gaussian_blur,
    image_noise,
    image_score,
    mix_anomaly,
    patch_distance,
    predict_x0,
    random_cells,
    reconstruct,
    reconstruct_deviation,
    reconstruct_one_call,
    soft_foreground,
    top_k_mean,
    velocity_to_noise,
)
from gladad.core.errors import ConfigError
from gladad.core.settings import from_json, to_json

SCHEDULE = Schedule.scaled_linear()
SHAPE = (4, 6, 5)
OUT_OF_REACH = 9.0  # gaps are at most 2


class ToyNetworks:
    """Smooth per-image functions of the right shapes; counts what it is asked for."""

    def __init__(self) -> None:
        self.probed = 0
        self.calls: list[int] = []

    def encode(self, image: Tensor) -> Tensor:
        return image

    def decode(self, latent: Tensor) -> Tensor:
        return latent

    def predict_noise(self, latent: Tensor, timestep: Tensor) -> Tensor:
        assert timestep.shape == (len(latent),)
        self.calls.append(int(timestep[0]))
        return torch.tanh(0.8 * latent + 0.3 * latent.roll(1, dims=3) - timestep.view(-1, 1, 1, 1) / 1500)

    def latent_features(self, latent: Tensor) -> Tensor:
        self.probed += len(latent)
        return torch.cat([latent, latent.roll(1, 2).sin(), latent.roll(1, 3).cos()], dim=1)


def noise(count: int, seed: int = 0) -> Tensor:
    return image_noise(SHAPE, seed, count)


def run(latent: Tensor, eps: Tensor, **options: object) -> tuple[Reconstruction, ToyNetworks]:
    networks = ToyNetworks()
    return reconstruct(networks, latent, eps, SCHEDULE, ReconstructionConfig(**options)), networks  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------- the schedule


@pytest.mark.parametrize("timestep", [0, 1, 321, 750, 999])
def test_predict_x0_inverts_add_noise(timestep: int) -> None:
    x, eps, alpha_bar = noise(2).double(), noise(2, 1).double(), SCHEDULE.alpha_bar(timestep).double()
    torch.testing.assert_close(predict_x0(add_noise(x, eps, alpha_bar), eps, alpha_bar), x)


def test_a_ddim_step_with_the_true_noise_lands_on_the_forward_process() -> None:
    x, eps = noise(2).double(), noise(2, 1).double()
    high, low = SCHEDULE.alpha_bar(721).double(), SCHEDULE.alpha_bar(691).double()
    x0 = predict_x0(add_noise(x, eps, high), eps, high)
    torch.testing.assert_close(ddim_step(x0, eps, low), add_noise(x, eps, low))


def test_velocity_is_converted_to_the_noise_it_stands_for() -> None:
    x, eps, timestep = noise(2).double(), noise(2, 1).double(), torch.tensor([3, 800])
    alpha_bar = SCHEDULE.alpha_bar(timestep).double()
    velocity = alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x
    torch.testing.assert_close(velocity_to_noise(add_noise(x, eps, alpha_bar), velocity, alpha_bar), eps)


def test_schedule_is_stable_diffusions() -> None:
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    assert SCHEDULE.num_timesteps == 1000
    torch.testing.assert_close(SCHEDULE.alphas_cumprod, scheduler.alphas_cumprod, rtol=0, atol=1e-6)
    assert SCHEDULE.alpha_bar(-29) == SCHEDULE.alpha_bar(0)
    assert SCHEDULE.alpha_bar(torch.tensor([-1, 5])).shape == (2, 1, 1, 1)


@pytest.mark.parametrize("count", [10, 1000])
def test_cosine_schedule_is_that_of_diffusers(count: int) -> None:
    scheduler = DDIMScheduler(num_train_timesteps=count, beta_schedule="squaredcos_cap_v2")
    torch.testing.assert_close(Schedule.cosine(count).alphas_cumprod, scheduler.alphas_cumprod, rtol=1e-4, atol=1e-7)


def test_published_timestep_grid() -> None:
    grid = chain_timesteps(750, 25)
    assert [t for t, _ in grid] == list(range(721, 0, -30))
    assert [t_prev for _, t_prev in grid] == [*(t for t, _ in grid[1:]), -29]
    assert chain_timesteps(450, 15)[0] == (421, 391)
    assert chain_timesteps(500, 15)[0] == (463, 430)  # the stride is rounded down


# ------------------------------------------------------------------------------------------------- training target


def test_the_target_implies_the_normal_latent() -> None:
    z_n, z_a, eps = noise(3).double(), noise(3, 1).double(), noise(3, 2).double()
    timestep = torch.tensor([1, 400, 999])
    alpha_bar = SCHEDULE.alpha_bar(timestep).double()
    z_m = mix_anomaly(z_n, z_a, timestep, 1000)
    x_t = add_noise(z_m, eps, alpha_bar)
    target = denoising_target(x_t, z_n, alpha_bar)
    torch.testing.assert_close(predict_x0(x_t, target, alpha_bar), z_n, rtol=0, atol=1e-12)
    torch.testing.assert_close(target, eps + (alpha_bar / (1 - alpha_bar)).sqrt() * (z_m - z_n))
    torch.testing.assert_close(denoising_target(add_noise(z_n, eps, alpha_bar), z_n, alpha_bar), eps)  # no anomaly: plain noise


def test_the_opposite_sign_would_amplify_the_anomaly() -> None:
    z_n, z_m, eps, alpha_bar = noise(1).double(), noise(1, 1).double(), noise(1, 2).double(), SCHEDULE.alpha_bar(400).double()
    opposite = eps - (alpha_bar / (1 - alpha_bar)).sqrt() * (z_m - z_n)
    torch.testing.assert_close(predict_x0(add_noise(z_m, eps, alpha_bar), opposite, alpha_bar), 2 * z_m - z_n)


def test_the_anomaly_fades_out_at_small_timesteps() -> None:
    z_n, z_a = noise(2), noise(2, 1)
    mixed = mix_anomaly(z_n, z_a, torch.tensor([0, 500]), 1000)
    assert torch.equal(mixed[0], z_n[0])
    torch.testing.assert_close(mixed[1], (z_n[1] + z_a[1]) / 2)


# -------------------------------------------------------------------------------------------------- reconstruction


def diffusers_ddim(latent: Tensor, eps: Tensor, max_step: int, num_steps: int) -> Tensor:
    """Plain DDIM by diffusers' own stepping, on the published grid."""
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    networks = ToyNetworks()
    x = scheduler.add_noise(latent, eps, torch.tensor([max_step]))
    scheduler.num_inference_steps = 1000 * num_steps // max_step  # only sets the stride of step(): 1000 // it
    assert 1000 // scheduler.num_inference_steps == max_step // num_steps
    for t, _ in chain_timesteps(max_step, num_steps):
        x = scheduler.step(networks.predict_noise(x, torch.full((len(x),), t)), t, x).prev_sample
    return x


@pytest.mark.parametrize("options", [{"adaptive": False}, {"step_threshold": OUT_OF_REACH, "min_step": 0}])
def test_without_a_choice_the_chain_is_plain_ddim(options: dict[str, object]) -> None:
    latent, eps = noise(2), noise(2, 1)
    result, networks = run(latent, eps, max_step=500, num_steps=25, **options)
    torch.testing.assert_close(result.latent, diffusers_ddim(latent, eps, 500, 25), rtol=0, atol=1e-5)
    assert networks.calls == [t for t, _ in chain_timesteps(500, 25)]


def test_search_off_makes_no_probes() -> None:
    result, networks = run(noise(2), noise(2, 1), adaptive=False, max_step=700)
    assert result.probes == networks.probed == 0
    assert result.step.tolist() == [700, 700]
    assert result.gap_score.isnan().all()


def test_threshold_zero_stops_at_the_first_call() -> None:
    result, networks = run(noise(3), noise(3, 1), step_threshold=0.0)
    assert result.step.tolist() == [721] * 3
    assert result.probes == 3
    assert networks.probed == 6  # the image and its reference
    assert (result.gap_score > 0).all()


def test_threshold_out_of_reach_stops_below_min_step() -> None:
    result, _ = run(noise(2), noise(2, 1), step_threshold=OUT_OF_REACH, min_step=350)
    assert result.step.tolist() == [331, 331]  # the first timestep below
    assert result.probes == 2 * 14


def test_below_min_step_the_input_is_kept() -> None:
    """With one call below min_step the result follows from the algebra alone."""
    latent, eps = noise(2), noise(2, 1)
    result, _ = run(latent, eps, step_threshold=OUT_OF_REACH, max_step=30, num_steps=1, min_step=100)
    alpha_bar, start = SCHEDULE.alpha_bar(1), SCHEDULE.alpha_bar(30)
    eps_hat = ToyNetworks().predict_noise(add_noise(latent, eps, start), torch.ones(2))
    reference = predict_x0(add_noise(latent, eps, alpha_bar), eps_hat, alpha_bar)
    torch.testing.assert_close(result.latent, ddim_step(reference, eps_hat, SCHEDULE.alpha_bar(0)))


def test_a_perfect_denoiser_returns_the_input() -> None:
    latent, eps = noise(2), noise(2, 1)

    class Perfect(ToyNetworks):
        def predict_noise(self, latent: Tensor, timestep: Tensor) -> Tensor:
            return eps

    for adaptive in (False, True):
        config = ReconstructionConfig(adaptive=adaptive, min_step=0, noise_step=721)  # noised where the first call is
        found = reconstruct(Perfect(), latent, eps, SCHEDULE, config).latent
        torch.testing.assert_close(found, add_noise(latent, eps, SCHEDULE.alpha_bar(0)), rtol=0, atol=1e-4)


def mixed_threshold(latent: Tensor, eps: Tensor) -> float:
    """A threshold under which these images stop at different steps."""
    first, _ = run(latent, eps, step_threshold=0.0)
    return float(first.gap_score.median())


@pytest.mark.parametrize("stride", [2, 3, 4, 7, 14, 30])
@pytest.mark.parametrize("quantile", [0.0, 0.3, 0.6, 0.9, 1.0])
def test_a_sparse_search_finds_a_step_from_which_on_images_differ(stride: int, quantile: float) -> None:
    """The chain before a decision does not know of it: a whole search with a threshold out of reach says what comparisons would be."""
    latent, eps = noise(6), noise(6, 1)
    every = run(latent, eps, step_threshold=OUT_OF_REACH, min_step=0)[0].trace
    grid = [t for t, _ in chain_timesteps(750, 25)]
    limit = float(every[:, :14].amax(1).quantile(quantile))
    sparse, networks = run(latent, eps, step_threshold=limit, search_stride=stride)
    whole, _ = run(latent, eps, step_threshold=limit)
    for image, t in enumerate(sparse.step.tolist()):
        place = grid.index(t)
        assert sparse.gap_score[image] == pytest.approx(float(every[image, place]), rel=1e-4)
        if every[image, place] > limit:
            assert place == 0 or every[image, place - 1] <= limit  # the first of those that differ, seen from a comparison that did not
        else:
            assert t < 350
        if t == whole.step[image]:
            torch.testing.assert_close(sparse.latent[image], whole.latent[image], rtol=1e-4, atol=1e-4)
    assert networks.probed == 2 * sparse.probes


def test_a_sparse_search_with_nothing_to_find_compares_at_its_stride_alone() -> None:
    result, _ = run(noise(2), noise(2, 1), step_threshold=OUT_OF_REACH, search_stride=4)
    assert result.step.tolist() == [331, 331] and result.probes == 2 * (4 + 1)  # at 721, 601, 481, 361, and below min_step
    assert result.trace.shape == (2, 5)


def test_only_undecided_images_are_probed() -> None:
    latent, eps = noise(5), noise(5, 1)
    result, networks = run(latent, eps, step_threshold=mixed_threshold(latent, eps))
    steps = result.step.tolist()
    assert len(set(steps)) > 1
    grid = [t for t, _ in chain_timesteps(750, 25)]
    assert result.probes == sum(grid.index(step) + 1 for step in steps)
    assert networks.probed == 2 * result.probes
    assert networks.calls == grid  # one denoiser call per timestep, whatever is pending


def test_an_image_does_not_depend_on_its_batch() -> None:
    latent, eps = noise(5), noise(5, 1)
    threshold = mixed_threshold(latent, eps)
    together, _ = run(latent, eps, step_threshold=threshold)
    for i in range(5):
        alone, _ = run(latent[i : i + 1], eps[i : i + 1], step_threshold=threshold)
        assert alone.step.item() == together.step[i].item()
        torch.testing.assert_close(alone.latent[0], together.latent[i], rtol=0, atol=1e-5)


def test_permuting_the_batch_permutes_the_result() -> None:
    latent, eps, order = noise(5), noise(5, 1), torch.tensor([3, 0, 4, 2, 1])
    threshold = mixed_threshold(latent, eps)
    straight, _ = run(latent, eps, step_threshold=threshold)
    permuted, _ = run(latent[order], eps[order], step_threshold=threshold)
    assert torch.equal(permuted.step, straight.step[order])
    torch.testing.assert_close(permuted.latent, straight.latent[order], rtol=0, atol=1e-5)


def test_inputs_are_left_alone() -> None:
    latent, eps = noise(2), noise(2, 1)
    before = latent.clone(), eps.clone()
    run(latent, eps, step_threshold=0.0)
    assert torch.equal(latent, before[0]) and torch.equal(eps, before[1])


def test_noise_step_moves_only_the_start() -> None:
    latent, eps = noise(2), noise(2, 1)
    plain, _ = run(latent, eps, max_step=450, num_steps=15, adaptive=False)
    same, _ = run(latent, eps, max_step=450, num_steps=15, adaptive=False, noise_step=450)
    moved, networks = run(latent, eps, max_step=450, num_steps=15, adaptive=False, noise_step=449)
    assert torch.equal(plain.latent, same.latent)
    assert not torch.equal(plain.latent, moved.latent)
    assert networks.calls[0] == 421


def test_fusion_modes() -> None:
    gap = torch.tensor([0.0, 0.2, 2.0]).view(1, 1, 1, 3)
    published = fusion_mask(gap, ReconstructionConfig())
    assert published.min() == 0.5 and published.max() < 0.89  # it never trusts the input fully
    calibrated = fusion_mask(gap, ReconstructionConfig(fusion="calibrated", fusion_center=0.2, fusion_width=0.02))
    assert calibrated.flatten()[0] < 1e-3 and calibrated.flatten()[1] == 0.5 and calibrated.flatten()[2] > 0.999
    assert not fusion_mask(gap, ReconstructionConfig(fusion="none")).any()


def test_fusion_mixes_generated_and_input_content() -> None:
    latent, eps = noise(1), noise(1, 1)
    options = {"step_threshold": 0.0, "max_step": 600, "num_steps": 1, "min_step": 0}
    none, _ = run(latent, eps, fusion="none", **options)
    published, _ = run(latent, eps, fusion="sigmoid", **options)
    all_generated, _ = run(latent, eps, fusion="calibrated", fusion_center=-100.0, **options)
    plain, _ = run(latent, eps, **(options | {"adaptive": False}))
    torch.testing.assert_close(all_generated.latent, plain.latent)
    share = (published.latent - none.latent) / (plain.latent - none.latent)
    assert share.min() > 0.49 and share.max() < 0.89


def test_feature_grids_need_not_match_the_latent() -> None:
    class Coarse(ToyNetworks):
        def latent_features(self, latent: Tensor) -> Tensor:
            return F.avg_pool2d(super().latent_features(latent), 2)

    result = reconstruct(Coarse(), noise(2), noise(2, 1), SCHEDULE, ReconstructionConfig(step_threshold=0.0))
    assert result.latent.shape == (2, *SHAPE)
    assert result.latent.isfinite().all()


def test_image_noise_depends_on_the_seed_alone() -> None:
    assert torch.equal(image_noise(SHAPE, 7), image_noise(SHAPE, 7))
    assert image_noise(SHAPE, 7, 3).shape == (3, *SHAPE)
    assert not torch.equal(image_noise(SHAPE, 7), image_noise(SHAPE, 8))


# ------------------------------------------------------------------------------------------------------ deviation

COSINE = Schedule.cosine(10)


def test_a_corrupted_latent_less_its_deviation_is_the_clean_one() -> None:
    z, eps = noise(3).double(), noise(3, 1).double()
    mask = random_cells((3, *SHAPE[1:]), torch.Generator().manual_seed(0), share=(0.5, 0.5), sides=(2,))
    for timestep in (torch.tensor([0, 5, 9]), 4):
        alpha_bar = COSINE.alpha_bar(timestep).double()
        x, deviation = corrupt_cells(z, mask, eps, alpha_bar), deviation_target(z, mask, eps, alpha_bar)
        torch.testing.assert_close(x - (1 - alpha_bar).sqrt() * deviation, z, rtol=0, atol=1e-12)
        inside = mask.expand_as(z)
        assert torch.equal(x[inside], add_noise(z, eps, alpha_bar)[inside])
        assert torch.equal(x[~inside], z[~inside]) and not deviation[~inside].any()
        assert deviation[inside].abs().min() > 0


class KnowsTheNormal(ToyNetworks):
    """Predicts the deviation from a latent that it knows."""

    def __init__(self, normal: Tensor):
        super().__init__()
        self.normal = normal

    def predict_noise(self, latent: Tensor, timestep: Tensor) -> Tensor:
        self.calls.append(int(timestep[0]))
        return (latent - self.normal) / (1 - COSINE.alpha_bar(timestep)).sqrt()


@pytest.mark.parametrize("timesteps", [(8, 6, 4, 2, 0), (9,), (5, 1)])
def test_corrections_by_one_who_knows_the_normal_latent_end_there(timesteps: tuple[int, ...]) -> None:
    normal, latent = noise(2), noise(2, 1)
    networks = KnowsTheNormal(normal)
    found = reconstruct_deviation(networks, latent, COSINE, DeviationConfig(timesteps=timesteps))
    torch.testing.assert_close(found.latent, normal, rtol=0, atol=1e-6)
    assert networks.calls == list(timesteps)
    assert found.step.tolist() == [timesteps[0]] * 2 and found.probes == 0 and found.gap_score.isnan().all()
    # what is left after a correction is in proportion to the noise level, so each takes off its share of it
    levels = [*(float((1 - COSINE.alpha_bar(t)).sqrt()) for t in timesteps), 0.0]
    shares = torch.tensor([(high - low) / levels[0] for high, low in pairwise(levels)])
    expected = (latent - normal).square().flatten(1).mean(1)[:, None] * shares.square()
    torch.testing.assert_close(found.trace, expected)


def test_where_no_deviation_is_seen_nothing_changes() -> None:
    latent = noise(2)
    found = reconstruct_deviation(KnowsTheNormal(latent), latent, COSINE, DeviationConfig())
    assert torch.equal(found.latent, latent) and not found.trace.any()


def test_corrections_of_an_image_do_not_depend_on_its_batch() -> None:
    latent, order = noise(5), torch.tensor([3, 0, 4, 2, 1])
    before = latent.clone()
    together, permuted = (reconstruct_deviation(ToyNetworks(), x, COSINE, DeviationConfig()) for x in (latent, latent[order]))
    assert torch.equal(latent, before) and not torch.equal(together.latent, latent)
    assert torch.equal(permuted.latent, together.latent[order]) and torch.equal(permuted.trace, together.trace[order])
    for i in range(5):
        alone = reconstruct_deviation(ToyNetworks(), latent[i : i + 1], COSINE, DeviationConfig())
        assert torch.equal(alone.latent[0], together.latent[i])


def test_random_cells_are_patches_of_the_share_and_side_asked_for() -> None:
    draw = torch.Generator().manual_seed
    mask = random_cells((400, 12, 20), draw(0), share=(0.2, 0.4))
    assert mask.shape == (400, 1, 12, 20) and mask.dtype == torch.bool
    assert torch.equal(mask, random_cells((400, 12, 20), draw(0), share=(0.2, 0.4)))
    assert not torch.equal(mask, random_cells((400, 12, 20), draw(1), share=(0.2, 0.4)))
    assert float(mask.float().mean()) == pytest.approx(0.3, abs=0.02)
    assert float(mask.float().mean((0, 1)).std()) < 0.05  # no place is preferred
    assert not random_cells((3, 6, 5), draw(0), share=(0.0, 0.0)).any()
    assert random_cells((3, 6, 5), draw(0), share=(1.0, 1.0)).all()
    for cells in random_cells((20, 12, 20), draw(2), sides=(4,))[:, 0]:
        changes = (cells[:, 1:] != cells[:, :-1]).any(0).nonzero().flatten()
        assert len(set((changes % 4).tolist())) <= 1  # borders lie on one lattice


@pytest.mark.parametrize("timesteps", [(), (10, 0), (4, 6), (4, 4), (3, -1)])
def test_impossible_corrections_are_refused(timesteps: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="timesteps: must fall strictly, from below 10"):
        DeviationConfig(timesteps=timesteps)


# --------------------------------------------------------------------------------------------- methods and devices


@pytest.mark.parametrize(
    ("kind", "method"), [(ReconstructionConfig, "chain"), (OneCallConfig, "single-calls"), (DeviationConfig, "deviation")]
)
def test_settings_name_their_method(kind: type, method: str) -> None:
    values = to_json(kind())
    assert next(iter(values)) == "method" and values.pop("method") == method
    assert from_json(kind, values) == kind()  # as written before there were several
    with pytest.raises(ConfigError, match="method: "):
        from_json(kind, {**values, "method": "another"})


def test_new_tensors_are_made_where_the_input_is() -> None:
    """On the meta device any tensor of another device is an error."""
    latent = torch.empty(2, *SHAPE, device="meta")

    class Anywhere(ToyNetworks):
        def predict_noise(self, latent: Tensor, timestep: Tensor) -> Tensor:
            assert timestep.device == latent.device
            return latent * SCHEDULE.alpha_bar(timestep)

        def latent_features(self, latent: Tensor) -> Tensor:
            return latent

    config = OneCallConfig(timesteps=(500, 300), step_thresholds=(0.3, 0.2), fusion="calibrated")
    noises, scale = latent[:, None].expand(-1, 2, -1, -1, -1), latent[:1, :, :1, :1]
    results = [
        reconstruct_one_call(Anywhere(), latent, noises, SCHEDULE, config, scale),
        reconstruct_deviation(Anywhere(), latent, COSINE, DeviationConfig()),
    ]
    for found in results:
        assert {x.device.type for x in (found.latent, found.step, found.gap_score, found.trace)} == {"meta"}
        assert found.latent.shape == latent.shape and found.step.shape == (2,)
    assert anomaly_map([latent], [latent], (32, 48), ScoringConfig(symmetric=True)).device.type == "meta"
    alpha_bar = SCHEDULE.alpha_bar(torch.empty(2, dtype=torch.int64, device="meta"))
    for x in (add_noise(latent, latent, alpha_bar), deviation_target(latent, latent[:, :1] > 0, latent, alpha_bar)):
        assert x.device.type == "meta"


# ------------------------------------------------------------------------------------------------- distance and map


def test_patch_distance_of_identical_images_is_zero() -> None:
    features = torch.randn(2, 16, 3, 5)
    torch.testing.assert_close(patch_distance(features, features), torch.zeros(2, 1, 3, 5), rtol=0, atol=1e-6)


def test_one_changed_patch_is_the_maximum() -> None:
    features = F.normalize(torch.rand(1, 16, 4, 7), dim=1)
    changed = features.clone()
    changed[0, :, 2, 5] *= -1
    distance = patch_distance(changed, features)[0, 0]
    assert divmod(int(distance.argmax()), 7) == (2, 5)
    assert distance.max() > 1
    assert (distance > 1e-5).sum() == 1


def test_patch_distance_within_a_radius() -> None:
    features, others = torch.randn(2, 16, 6, 9), torch.randn(2, 16, 6, 9)
    same_place = 1 - F.cosine_similarity(features, others, dim=1)[:, None]
    torch.testing.assert_close(patch_distance(features, others, 0), same_place, rtol=0, atol=1e-6)
    everywhere = patch_distance(features, others)
    before = same_place
    for radius in (1, 2, 4, 7):  # the more places, the nearer the nearest
        now = patch_distance(features, others, radius)
        assert (now <= before + 1e-6).all() and (now >= everywhere - 1e-6).all() and (now < before - 1e-3).any()
        before = now
    torch.testing.assert_close(patch_distance(features, others, 8), everywhere, rtol=0, atol=1e-6)
    moved = features.roll(2, dims=3)
    assert patch_distance(features, moved, 2)[..., :-2].max() < 1e-5 and patch_distance(features, moved, 1).min() > 0.01


def test_a_window_is_in_pixels_of_the_map() -> None:
    ours, theirs = [torch.randn(1, 8, 8, 12), torch.randn(1, 8, 4, 6)], [torch.randn(1, 8, 8, 12), torch.randn(1, 8, 4, 6)]
    found = anomaly_map(ours, theirs, (32, 48), ScoringConfig(window=8, symmetric=True))
    expected = torch.zeros(1, 1, 32, 48)
    for f, g, radius in zip(ours, theirs, (2, 1), strict=True):
        for one, other in ((f, g), (g, f)):
            expected += F.interpolate(patch_distance(one, other, radius), (32, 48), mode="bilinear", align_corners=True)
    torch.testing.assert_close(found, gaussian_blur(expected, 6.0, 49))
    whole = anomaly_map(ours, theirs, (32, 48), ScoringConfig(window=48))
    torch.testing.assert_close(whole, anomaly_map(ours, theirs, (32, 48), ScoringConfig()))
    with pytest.raises(ConfigError, match="window"):
        from_json(ScoringConfig, {"window": -1})


def test_patch_distance_finds_moved_patches_and_other_grids() -> None:
    features = torch.randn(2, 16, 4, 6)
    torch.testing.assert_close(patch_distance(features, features.flip(3)), torch.zeros(2, 1, 4, 6), rtol=0, atol=1e-6)
    assert patch_distance(features, features[..., :3]).shape == (2, 1, 4, 6)
    distance = patch_distance(features, torch.randn(2, 16, 4, 6))
    assert distance.min() >= 0 and distance.max() <= 2
    torch.testing.assert_close(patch_distance(features * 3, features), patch_distance(features, features), rtol=0, atol=1e-6)


def test_blur_preserves_constants_and_mass() -> None:
    torch.testing.assert_close(gaussian_blur(torch.full((2, 1, 40, 30), 3.0), 6, 49), torch.full((2, 1, 40, 30), 3.0))
    point = torch.zeros(1, 1, 81, 71)
    point[0, 0, 40, 35] = 1
    blurred = gaussian_blur(point, 4, 25)
    torch.testing.assert_close(blurred.sum(), torch.tensor(1.0))
    assert int(blurred.argmax()) == 40 * 71 + 35
    torch.testing.assert_close(blurred, blurred.flip(2))


def test_blur_takes_small_and_many_channelled_images() -> None:
    assert gaussian_blur(torch.rand(1, 3, 9, 5), 6, 49).shape == (1, 3, 9, 5)


def layers(seed: int, count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, 8, 4, 6, generator=generator) for _ in range(2)]


def test_map_of_identical_images_is_zero() -> None:
    for config in (ScoringConfig(), ScoringConfig(symmetric=True), ScoringConfig(pixel_weight=2.0)):
        maps = anomaly_map(layers(0), layers(0), (32, 48), config, pixel_difference=torch.zeros(3, 1, 32, 48))
        torch.testing.assert_close(maps, torch.zeros(3, 1, 32, 48), rtol=0, atol=1e-5)


def test_symmetric_adds_the_other_direction() -> None:
    ours, theirs = layers(0), layers(1)
    one, other = (anomaly_map(a, b, (32, 48), ScoringConfig()) for a, b in ((ours, theirs), (theirs, ours)))
    torch.testing.assert_close(anomaly_map(ours, theirs, (32, 48), ScoringConfig(symmetric=True)), one + other)


def test_pixel_term_depends_on_its_own_image_only() -> None:
    config = ScoringConfig(pixel_weight=2.0)
    difference = torch.rand(3, 1, 32, 48) * torch.tensor([1.0, 10.0, 100.0]).view(3, 1, 1, 1)
    ours, theirs = layers(0), layers(1)
    maps = anomaly_map(ours, theirs, (32, 48), config, pixel_difference=difference)
    for i in range(3):
        alone = anomaly_map(
            [x[i : i + 1] for x in ours], [x[i : i + 1] for x in theirs], (32, 48), config, pixel_difference=difference[i : i + 1]
        )
        torch.testing.assert_close(maps[i : i + 1], alone)
    plain = anomaly_map(ours, theirs, (32, 48), ScoringConfig())
    raw = anomaly_map(ours, theirs, (32, 48), ScoringConfig(blur_kernel=1))
    term = 2.0 * raw.amax((1, 2, 3), keepdim=True) / difference.amax((1, 2, 3), keepdim=True) * difference
    torch.testing.assert_close(maps, plain + gaussian_blur(term, 6.0, 49))


def test_foreground_weighs_the_map() -> None:
    ours, theirs = layers(0), layers(1)
    mask = torch.zeros(3, 1, 32, 48)
    mask[..., 24:] = 1
    plain = anomaly_map(ours, theirs, (32, 48), ScoringConfig())
    torch.testing.assert_close(anomaly_map(ours, theirs, (32, 48), ScoringConfig(), foreground=mask), plain * mask)
    assert anomaly_map(ours, theirs, (32, 48), ScoringConfig(), foreground=mask[:, :, ::2, ::2]).shape == plain.shape


def test_soft_foreground_keeps_the_part_and_fades_the_ground() -> None:
    mask = torch.zeros(1, 1, 20, 200, dtype=torch.bool)
    mask[..., 150:] = True
    weight = soft_foreground(mask, ScoringConfig())[0, 0, 10]
    torch.testing.assert_close(weight[150:], torch.ones(50), rtol=0, atol=1e-5)  # a margin of 24 pixels is grown first
    assert weight[:100].max() < 1e-6
    assert ((weight >= 0) & (weight <= 1 + 1e-5)).all()


def test_scores_are_the_mean_of_the_largest_values() -> None:
    values = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 5.0]])
    assert top_k_mean(values, 2).tolist() == [2.5, 5.0]
    assert top_k_mean(values, 99).tolist() == pytest.approx([2.0, 10 / 3])  # fewer entries than k
    assert image_score(values.view(2, 1, 1, 3), ScoringConfig(top_k=1)).tolist() == [3.0, 5.0]
