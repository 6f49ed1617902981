"""Synthetic anomalies: where they are, what they leave alone, and that a seed decides everything."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from gladad.core.errors import DataError
from gladad.data.foreground import choose_foreground, foreground_mask
from gladad.data.synthesis import (
    AUGMENTATIONS,
    LITE,
    Draw,
    SynthesisConfig,
    augment,
    flat_colour,
    perlin_mask,
    perlin_noise,
    procedural_texture,
    shifted_self,
    shuffled_tiles,
    synthesise,
)
from gladad.training.loop import seed_of

SIZES = [(64, 64), (37, 91), (101, 53), (8, 8), (9, 64)]
KINDS = {"texture": (1.0, 0.0, 0.0, 0.0), "tiles": (0.0, 1.0, 0.0, 0.0), "self": (0.0, 0.0, 1.0, 0.0), "colour": (0.0, 0.0, 0.0, 1.0)}


def part(size: tuple[int, int], seed: int = 0, bright: bool = True) -> np.ndarray:
    """A part on a plain ground: a grainy rectangle in the middle."""
    rng = np.random.default_rng(seed)
    pixels = np.full((*size, 3), 30 if bright else 220, np.int64)
    height, width = size
    inside = np.s_[height // 4 : height - height // 4, width // 4 : width - width // 4]
    pixels[inside] = 170 if bright else 70
    return (pixels + rng.integers(-20, 21, pixels.shape)).astype(np.uint8)


def texture(size: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(9).integers(0, 256, (*size, 3), dtype=np.uint8)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", [SynthesisConfig(), LITE], ids=["published", "lite"])
def test_only_the_mask_is_touched(size, kind, config):
    pixels = part(size)
    before = pixels.copy()
    changed = 0
    for seed in range(4):
        image, mask = synthesise(pixels, Draw(seed), replace(config, source_weights=KINDS[kind]), [texture(size)])
        assert (image.shape, image.dtype) == (pixels.shape, np.uint8)
        assert (mask.shape, mask.dtype) == (size, bool)
        assert mask.any()
        np.testing.assert_array_equal(image[~mask], pixels[~mask])
        changed += int((image[mask] != pixels[mask]).sum())
    assert changed
    np.testing.assert_array_equal(pixels, before)


@pytest.mark.parametrize("foreground", ["bright", "dark"])
@pytest.mark.parametrize("config", [SynthesisConfig(), LITE], ids=["published", "lite"])
def test_the_mask_lies_on_the_part(foreground, config):
    pixels = part((64, 80), bright=foreground == "bright")
    allowed = foreground_mask(pixels, foreground)
    assert allowed is not None
    assert 0.2 < allowed.mean() < 0.3
    for seed in range(20):
        _, mask = synthesise(pixels, Draw(seed), config, foreground=foreground)
        assert mask.any()
        assert not (mask & ~allowed).any()


def test_without_a_foreground_the_whole_image_is_allowed():
    assert foreground_mask(part((16, 16)), "all") is None
    plain = np.full((32, 32, 3), 128, np.uint8)
    for foreground in ("bright", "dark"):
        assert synthesise(plain, Draw(0), LITE, foreground=foreground)[1].any()


def test_a_seed_decides_everything():
    pixels, textures = part((48, 48)), [texture((48, 48))]
    first = [synthesise(pixels, Draw((7, index)), LITE, textures) for index in range(8)]
    again = [synthesise(pixels, Draw((7, index)), LITE, textures) for index in reversed(range(8))][::-1]
    for (image, mask), (image2, mask2) in zip(first, again, strict=True):
        np.testing.assert_array_equal(image, image2)
        np.testing.assert_array_equal(mask, mask2)
    assert len({image.tobytes() for image, _ in first}) == 8


@pytest.mark.parametrize("seed, index", [(0, 0), (7, 3), (7, 0), (0, 5)])
def test_seeds_of_different_lengths_draw_different_numbers(seed, index):
    """To NumPy, zeros at the end of a seed are nothing."""
    seeds = [(seed,), (seed, index), (seed, index, 0), (seed, index, 0, 0), (seed, index, 0, 0, 0)]
    draws = [Draw(numbers).rng.bit_generator.random_raw(100).tolist() for numbers in seeds]
    of_loops = [np.random.PCG64(seed_of(*numbers)).random_raw(100).tolist() for numbers in seeds]
    assert len({number for stream in (*draws, *of_loops) for number in stream}) == 2 * len(seeds) * 100
    words = {int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) & (2**63 - 1) for numbers in seeds}
    assert len({seed_of(*numbers) for numbers in seeds} - words) == len(seeds)  # nor do they begin with the words that a `Draw` is made of
    assert Draw(seed).integer(0, 2**40) == Draw((seed,)).integer(0, 2**40)


def test_the_stream_of_two_numbers_is_that_of_numpy():
    """The pools of trained models were drawn from it."""
    for pair in ((0, 0), (7, 3), (2**40, 12)):
        np.testing.assert_array_equal(Draw(pair).rng.random(20), np.random.default_rng(pair).random(20))


def test_without_textures_they_are_generated():
    pixels = part((40, 40))
    texture_only = SynthesisConfig(source_weights=KINDS["texture"])
    one, mask = synthesise(pixels, Draw(3), texture_only)
    np.testing.assert_array_equal(one, synthesise(pixels, Draw(3), texture_only)[0])
    np.testing.assert_array_equal(one[~mask], pixels[~mask])
    assert (one[mask] != pixels[mask]).any()


@pytest.mark.parametrize("seed", range(8))
def test_generated_textures_have_structure(seed):
    texture = procedural_texture((40, 56), Draw(seed))
    assert texture.shape == (40, 56, 3) and texture.dtype == np.uint8
    assert texture.std() > 0


def test_beta_bounds_what_is_left_of_the_original():
    pixels = np.zeros((32, 32, 3), np.uint8)
    white = [np.full((32, 32, 3), 255, np.uint8)]
    config = SynthesisConfig(source_weights=KINDS["texture"], augmentations=0, max_beta=0.5)
    for seed in range(10):
        image, mask = synthesise(pixels, Draw(seed), config, white)
        assert 127 <= image[mask].min() == image[mask].max() <= 255


@pytest.mark.parametrize("seed", range(6))
def test_the_part_is_above_the_threshold_that_separates_best(seed):
    rng = np.random.default_rng(seed)
    grey = np.concatenate([rng.normal(70, 12, 300), rng.normal(60 + 25 * seed, 20, 200)]).clip(0, 255).astype(np.uint8)

    def between(above: np.ndarray) -> float:
        if above.all() or not above.any():
            return 0.0
        return above.sum() * (~above).sum() * (grey[above].mean() - grey[~above].mean()) ** 2

    mask = foreground_mask(np.repeat(grey.reshape(20, 25, 1), 3, axis=2), "bright")
    assert mask is not None
    assert between(mask.ravel()) == pytest.approx(max(between(grey > threshold) for threshold in range(255)), rel=1e-9)


def test_the_foreground_of_two_levels_and_of_one():
    two = np.array([[40, 200], [41, 200]], np.uint8)[..., None].repeat(3, axis=2)
    for foreground, expected in (("bright", [[False, True]] * 2), ("dark", [[True, False]] * 2)):
        mask = foreground_mask(two, foreground)
        assert mask is not None
        assert mask.tolist() == expected
        for level in (0, 77, 255):
            assert foreground_mask(np.full((4, 4, 3), level, np.uint8), foreground) is None


@pytest.mark.parametrize("cells", [(1, 1), (4, 2), (32, 32)])
def test_perlin_noise(cells):
    noise = perlin_noise((45, 70), cells, Draw(0))
    assert (noise.shape, noise.dtype) == ((45, 70), np.float32)
    assert np.abs(noise).max() <= 1.01
    assert abs(noise[0, 0]) < 1e-6  # zero at every corner of the lattice
    assert noise.std() > 0.05


def test_perlin_noise_is_smooth():
    noise = perlin_noise((128, 128), (4, 4), Draw(1))
    assert max(np.abs(np.diff(noise, axis=axis)).max() for axis in (0, 1)) < 0.15


def test_perlin_masks_vary_in_area():
    areas = [perlin_mask((64, 64), SynthesisConfig(), Draw(seed)).mean() for seed in range(40)]
    assert 0.02 < np.mean(areas) < 0.4
    assert np.std(areas) > 0.02


@pytest.mark.parametrize("index", range(len(AUGMENTATIONS)))
@pytest.mark.parametrize("size", [(16, 16), (9, 31)])
def test_every_augmentation_keeps_the_shape(index, size):
    class Fixed(Draw):
        """Draws as ever, but always chooses one augmentation."""

        def __init__(self):
            super().__init__(0)
            self.rng = type("Rng", (), {"choice": lambda *_, **__: [index], "uniform": self.rng.uniform, "integers": self.rng.integers})()

    out = augment(texture(size), 1, Fixed())
    assert (out.shape, out.dtype) == ((*size, 3), np.uint8)


def test_augment_by_nothing_is_the_image():
    np.testing.assert_array_equal(augment(texture((12, 12)), 0, Draw(0)), texture((12, 12)))


@pytest.mark.parametrize("size", [(64, 64), (70, 45), (5, 5)])
def test_shuffled_tiles_are_the_same_pixels(size):
    pixels = texture(size)
    out = shuffled_tiles(pixels, Draw(0))
    np.testing.assert_array_equal(np.sort(out.reshape(-1, 3), axis=0), np.sort(pixels.reshape(-1, 3), axis=0))
    assert (size == (5, 5)) == np.array_equal(out, pixels)


def test_other_sources():
    pixels = part((33, 47))
    for source in (shifted_self, flat_colour):
        out = source(pixels, Draw(0))
        assert (out.shape, out.dtype) == (pixels.shape, np.uint8)
        assert not np.array_equal(out, pixels)
    assert flat_colour(pixels, Draw(0)).std(axis=(0, 1)).max() < 15


def scene(
    seed: int, *, bright: bool, size: tuple[int, int] = (90, 120), noise: float = 8.0, pieces: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """A photo of round parts somewhere on a plain ground, and where they are."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: size[0], : size[1]]
    place = np.zeros(size, bool)
    for piece in range(pieces):
        width = size[1] / pieces
        radius = rng.uniform(0.25, 0.33) * min(size[0], width)
        middle = size[0] / 2 + rng.uniform(-5, 5), (piece + 0.5) * width + rng.uniform(-3, 3)
        place |= np.hypot(y - middle[0], x - middle[1]) < radius
    grey = np.where(place, 170, 60) if bright else np.where(place, 70, 190)
    colour = grey[..., None] + rng.uniform(-10, 10, 3) + rng.normal(0, noise, (*size, 3))
    return colour.clip(0, 255).astype(np.uint8), place


def plain(level: object, size: tuple[int, int] = (90, 120), noise: float = 4.0, seed: int = 0) -> np.ndarray:
    """Grey levels ``[H, W]`` or one level as a picture with some grain."""
    grain = np.random.default_rng(seed).normal(0, noise, (*size, 1)) if noise else 0.0
    return (np.broadcast_to(level, size)[..., None] + grain + np.zeros(3)).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("pieces", [1, 4])
@pytest.mark.parametrize("noise", [0.0, 8.0, 15.0])
@pytest.mark.parametrize("bright", [True, False], ids=["bright", "dark"])
def test_a_part_before_a_ground_is_found(bright, noise, pieces):
    scenes = [scene(seed, bright=bright, noise=noise, pieces=pieces) for seed in range(12)]
    images = [image for image, _ in scenes]
    side, other = ("bright", "dark") if bright else ("dark", "bright")
    choice = choose_foreground(images)
    assert choice.foreground == side
    assert choice.reason.startswith(f"a {side} part on an even {other} ground: Otsu separates ")
    assert choice.share == pytest.approx(np.median([place.mean() for _, place in scenes]), abs=0.01)
    assert choice.separation > 0.8
    for image, place in scenes:
        mask = foreground_mask(image, choice.foreground)
        assert (mask & place).sum() > 0.98 * (mask | place).sum()


def test_separation_is_the_share_of_the_variance_between_the_classes():
    image, _ = scene(3, bright=True, noise=12)
    grey = np.asarray(Image.fromarray(image).convert("L"))
    above = foreground_mask(image, "bright")
    assert above is not None
    means = np.where(above, grey[above].mean(), grey[~above].mean())
    choice = choose_foreground([image])
    assert choice.separation == pytest.approx(means.var() / grey.var(), rel=1e-9)
    assert f"separates {choice.separation:.0%} of" in choice.reason


def test_neither_order_nor_subset_changes_the_choice():
    for bright, side in ((True, "bright"), (False, "dark")):
        images = [scene(seed, bright=bright)[0] for seed in range(20)]
        whole = choose_foreground(images)
        for seed in range(5):
            order = np.random.default_rng(seed).permutation(20)
            assert choose_foreground([images[i] for i in order]) == whole
            assert choose_foreground([images[i] for i in order[: seed + 1]]).foreground == side


def test_size_and_colour_do_not_matter():
    images = [
        scene(1, bright=False, size=(300, 200))[0],
        scene(2, bright=False, size=(64, 64))[0],
        scene(3, bright=False, size=(33, 90))[0],
    ]
    assert choose_foreground(images).foreground == "dark"
    blue = [
        np.where(place[..., None], (30, 60, 160), (190, 190, 185)).astype(np.uint8)
        for _, place in (scene(s, bright=True) for s in range(4))
    ]
    assert choose_foreground(blue).foreground == "dark"


def test_a_thread_may_cross_the_border():
    images = [scene(seed, bright=False)[0] for seed in range(6)]
    for image in images:
        image[:45, 58:61] = 70
    assert choose_foreground(images).foreground == "dark"


def ramp(size: tuple[int, int] = (90, 120)) -> np.ndarray:
    return np.linspace(30, 220, size[1]) * np.ones((size[0], 1))


def spotlight(size: tuple[int, int] = (90, 120)) -> np.ndarray:
    y, x = np.mgrid[-1 : 1 : size[0] * 1j, -1 : 1 : size[1] * 1j]
    return 220 - 90 * (x**2 + y**2)


def block(rows: slice, columns: slice) -> np.ndarray:
    level = np.full((90, 120), 50.0)
    level[rows, columns] = 190
    return level


DOTS = np.where(np.hypot(np.mgrid[:90, :120][0] % 10 - 5, np.mgrid[:90, :120][1] % 10 - 5) < 2.5, 190.0, 50.0)
DOTS[:4], DOTS[-4:], DOTS[:, :4], DOTS[:, -4:] = 50, 50, 50, 50


@pytest.mark.parametrize(
    "level, why",
    [
        (np.random.default_rng(1).normal(128, 30, (90, 120)), "only 6"),  # grain alone: one Gaussian
        (ramp(), "only 7"),  # light from one side: a ramp
        (spotlight(), "only 6"),
        (np.where(block(np.s_[20:70], np.s_[25:95]) > 99, 240, np.linspace(10, 140, 120)), "vary by 2"),  # a part, and light from one side
        (block(np.s_[10:80], np.s_[:]), "the ground would hold only"),  # reaches two sides
        (block(np.s_[:], np.s_[:60]), "the ground would hold only"),  # covers a half
        (np.maximum(block(np.s_[36:54], np.s_[:]), block(np.s_[:], np.s_[50:72])), "the ground would hold only 8"),  # a little of all four
        (block(np.s_[30:60], np.s_[0:60]), "on one side"),  # reaches one side
        (block(np.s_[3:-3], np.s_[4:-4]), "would take 8"),  # a frame
        (DOTS, "largest pieces"),
    ],
    ids=["grain", "ramp", "spotlight", "slope", "bar", "half", "cross", "edge", "frame", "dots"],
)
def test_without_a_part_it_is_the_whole_image(level, why):
    choice = choose_foreground([plain(level, seed=seed) for seed in range(6)])
    assert choice.foreground == "all"
    assert choice.share == 1.0
    assert re.search(f"the whole image, as no part .*({why})", choice.reason), choice.reason


@pytest.mark.parametrize("level", [0, 128, 255])
def test_constant_images_have_no_part(level):
    choice = choose_foreground([plain(level, noise=0)] * 3)
    assert (choice.foreground, choice.separation, choice.share) == ("all", 0.0, 1.0)
    assert "no contrast" in choice.reason
    faint = plain(block(np.s_[30:60], np.s_[40:80]) / 20 + 100, noise=0)  # two levels, 7 apart
    assert "no contrast" in choose_foreground([faint]).reason


@pytest.mark.parametrize("seed", range(12))
def test_textures_are_the_whole_image(seed):
    images = [procedural_texture((96, 96), Draw((seed, index))) for index in range(6)]
    assert choose_foreground(images).foreground == "all"
    tiles = np.kron(np.indices((9, 12)).sum(axis=0) % 2, np.ones((10, 10))) * 120.0 + 60
    assert choose_foreground([plain(tiles, seed=seed)]).foreground == "all"


def test_sets_that_disagree_are_the_whole_image():
    bright, dark = ([scene(seed, bright=side)[0] for seed in range(10)] for side in (True, False))
    half = choose_foreground(bright[:5] + dark[:5])
    assert half.foreground == "all"
    assert "50% of the images show a bright part, 50% a dark one" in half.reason
    texture = plain(ramp())
    assert choose_foreground([*bright[:8], texture, texture]).foreground == "all"
    assert choose_foreground([*bright, texture]).foreground == "bright"
    small, large = (plain(block(np.s_[45 - r : 45 + r], np.s_[60 - r : 60 + r])) for r in (9, 38))
    sizes = choose_foreground([small] * 5 + [large] * 4)
    assert sizes.foreground == "all"
    assert "3% of some images and 53% of others" in sizes.reason


def test_no_images_no_choice():
    with pytest.raises(DataError, match="at least one image"):
        choose_foreground([])
