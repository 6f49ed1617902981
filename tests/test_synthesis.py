"""Synthetic anomalies: where they are, what they leave alone, and that a seed decides everything."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from gladad.synthesis import (
    AUGMENTATIONS,
    LITE,
    Draw,
    SynthesisConfig,
    augment,
    flat_colour,
    foreground_mask,
    otsu_threshold,
    perlin_mask,
    perlin_noise,
    procedural_texture,
    shifted_self,
    shuffled_tiles,
    synthesise,
)

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
def test_otsu_agrees_with_brute_force(seed):
    rng = np.random.default_rng(seed)
    grey = np.concatenate([rng.normal(70, 12, 300), rng.normal(60 + 25 * seed, 20, 200)]).clip(0, 255).astype(np.uint8)

    def between(threshold: int) -> float:
        below, above = grey[grey <= threshold].astype(float), grey[grey > threshold].astype(float)
        return 0.0 if not len(below) or not len(above) else len(below) * len(above) * (below.mean() - above.mean()) ** 2

    best = max(map(between, range(255)))
    assert between(otsu_threshold(grey)) == pytest.approx(best, rel=1e-9)


def test_otsu_of_two_levels_and_of_one():
    assert 40 <= otsu_threshold(np.array([[40, 200], [40, 200]], np.uint8)) < 200
    assert otsu_threshold(np.full((4, 4), 77, np.uint8)) == 0


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
