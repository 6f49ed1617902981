"""Shifts of test images: what each does, and how strongly."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest

from gladad.core.errors import ConfigError
from gladad.data.corruptions import (
    REFERENCE_SIDE,
    SEVERITIES,
    SHIFTS,
    brightness,
    contrast,
    corrupt,
    defocus_blur,
    gaussian_blur,
    gaussian_noise,
    motion_blur,
    rotation,
    translation,
)
from gladad.data.synthesis import Draw, perlin_noise

GEOMETRIC = ["rotation", "translation"]
RANDOM = ["gaussian_noise", "motion_blur", *GEOMETRIC]
BLURS = ["gaussian_blur", "defocus_blur", "motion_blur"]


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def picture(size: tuple[int, int] = (160, 200), seed: int = 0) -> np.ndarray:
    """Coarse clouds in colour, with some grain, far from black and white."""
    coarse = np.stack([perlin_noise(size, (2, 2), Draw((seed, channel))) for channel in range(3)], axis=2)
    grain = np.random.default_rng(seed).normal(0, 3, coarse.shape)
    return (128 + 55 * coarse + grain).clip(0, 255).astype(np.uint8)


def spread(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centre ``(y, x)`` and covariance of an image's brightness."""
    weight = pixels[..., 0].astype(float)
    places = np.stack(np.nonzero(weight >= 0))
    return np.average(places, axis=1, weights=weight.ravel()), np.cov(places, aweights=weight.ravel(), bias=True)


def test_the_protocol_is_complete():
    light, focus, noise, file, place = (
        {"brightness", "darkness", "contrast"},
        set(BLURS),
        {"gaussian_noise"},
        {"jpeg_compression"},
        set(GEOMETRIC),
    )
    assert set(SHIFTS) == light | focus | noise | file | place
    assert {len(strengths) for _, strengths in SHIFTS.values()} == {len(SEVERITIES)}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", SHIFTS)
def test_a_higher_severity_is_further_from_the_original(name, seed):
    pixels = picture(seed=seed)
    distance = [np.abs(corrupt(pixels, name, severity, seed).astype(float) - pixels).mean() for severity in SEVERITIES]
    assert distance[0] > 0.5
    assert (np.diff(distance) > 0).all(), distance


@pytest.mark.parametrize(
    "apply, nothing",
    [
        (brightness, 0.0),
        (contrast, 1.0),
        (gaussian_noise, 0.0),
        (gaussian_blur, 0.0),
        (defocus_blur, (0.0, 0.0)),
        (motion_blur, (0.0, 0.0)),
        (rotation, 0.0),
        (translation, 0.0),
    ],
)
def test_no_shift_is_the_image(apply, nothing):
    pixels = np.random.default_rng(1).integers(0, 256, (41, 64, 3), dtype=np.uint8)
    pixels[:4] = 0  # black has no hue to scale
    np.testing.assert_array_equal(apply(pixels, nothing, rng()), pixels)


@pytest.mark.parametrize("name", SHIFTS)
@pytest.mark.parametrize("size", [(8, 8), (9, 31), (37, 91), (101, 53)])
def test_shapes_determinism_and_a_clean_input(name, size):
    pixels = np.random.default_rng(2).integers(0, 256, (*size, 3), dtype=np.uint8)
    before = pixels.copy()
    for severity in SEVERITIES:
        image = corrupt(pixels, name, severity, 3)
        assert (image.shape, image.dtype) == (pixels.shape, np.uint8)
        assert not np.shares_memory(image, pixels)
        np.testing.assert_array_equal(image, corrupt(pixels, name, severity, 3))
    np.testing.assert_array_equal(pixels, before)


@pytest.mark.parametrize("name", SHIFTS)
def test_the_seed_matters_only_where_something_is_random(name):
    results = {corrupt(picture(), name, 3, seed).tobytes() for seed in range(8)}
    assert (len(results) > 1) == (name in RANDOM)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", GEOMETRIC)
def test_all_severities_go_the_same_way(name, seed):
    pixels = picture()
    mild, heavy = (corrupt(pixels, name, severity, seed).astype(float) for severity in (4, 5))
    assert np.abs(heavy - mild).mean() < np.abs(heavy - pixels).mean()


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("name", GEOMETRIC)
def test_what_comes_in_from_outside_is_mirrored(name, severity):
    pixels = picture().clip(60, 255)
    for seed in range(4):
        assert corrupt(pixels, name, severity, seed).min() >= 60


@pytest.mark.parametrize("name, amounts", [("brightness", (0.1, 0.2, 0.3, 0.4, 0.5)), ("darkness", (-0.1, -0.2, -0.3, -0.4, -0.5))])
def test_lighting_is_the_value_of_hsv(name, amounts):
    pixels = np.random.default_rng(3).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    pixels[0, 0], pixels[0, 1] = 0, 255
    for severity, amount in zip(SEVERITIES, amounts, strict=True):
        expected = np.zeros(pixels.shape)
        for y, x in np.ndindex(8, 9):
            hue, saturation, value = colorsys.rgb_to_hsv(*(pixels[y, x] / 255))
            expected[y, x] = colorsys.hsv_to_rgb(hue, saturation, min(1, max(0, value + amount)))
        np.testing.assert_allclose(corrupt(pixels, name, severity, 0), 255 * expected, atol=0.501)


@pytest.mark.parametrize("severity, factor", list(zip(SEVERITIES, (0.4, 0.3, 0.2, 0.1, 0.05), strict=True)))
def test_contrast_keeps_the_mean_and_scales_the_deviation(severity, factor):
    pixels = picture().astype(float)
    low = corrupt(picture(), "contrast", severity, 0).astype(float)
    np.testing.assert_allclose(low.mean(axis=(0, 1)), pixels.mean(axis=(0, 1)), atol=0.1)
    np.testing.assert_allclose(low.std(axis=(0, 1)), factor * pixels.std(axis=(0, 1)), atol=0.3)


@pytest.mark.parametrize("severity, sigma", list(zip(SEVERITIES[:2], (0.08, 0.12), strict=True)))
def test_noise_is_independent_and_as_strong_as_published(severity, sigma):
    grey = np.full((200, 200, 3), 127, np.uint8)
    noise = corrupt(grey, "gaussian_noise", severity, 5).astype(float) - 127
    assert noise.std() == pytest.approx(255 * sigma, rel=0.01)
    assert abs(noise.mean()) < 0.5
    neighbours = [(noise[1:] * noise[:-1]).mean(), (noise[:, 1:] * noise[:, :-1]).mean(), (noise[..., 1:] * noise[..., :-1]).mean()]
    assert np.abs(neighbours).max() < 0.03 * noise.var()


@pytest.mark.parametrize("name", BLURS)
@pytest.mark.parametrize("size", [(96, 96), (61, 130)])
def test_blurs_keep_a_flat_image(name, size):
    flat = np.full((*size, 3), (10, 128, 250), np.uint8)
    for severity in SEVERITIES:
        np.testing.assert_array_equal(corrupt(flat, name, severity, 1), flat)


def response(apply, strength, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Centre and covariance of what becomes of a bright block, less the block's own."""
    block = np.zeros((side, side, 3), np.uint8)
    block[side // 2 - 8 : side // 2 + 9, side // 2 - 8 : side // 2 + 9] = 255
    (centre, covariance), (before, own) = spread(apply(block, strength, rng())), spread(block)
    return centre - before, covariance - own


def test_blurs_are_as_wide_as_published_at_224_pixels_and_grow_with_the_image():
    one, two = REFERENCE_SIDE + 1, 2 * REFERENCE_SIDE + 1
    for factor, side in ((1, one), (2, two)):
        _, gaussian = response(gaussian_blur, 3.0, side)
        np.testing.assert_allclose(gaussian, np.eye(2) * (3 * factor) ** 2, atol=0.6 * factor**2)
        _, disk = response(defocus_blur, (6, 0.5), side)
        np.testing.assert_allclose(disk, np.eye(2) * (6 * factor) ** 2 / 4, atol=0.9 * factor**2)
        _, streak = response(motion_blur, (15, 8), side)  # half a Gaussian, whose variance is (1 - 2/pi) sigma^2
        assert np.trace(streak) == pytest.approx((1 - 2 / np.pi) * (8 * factor) ** 2, rel=0.05)


@pytest.mark.parametrize("seed", range(6))
def test_motion_blur_is_centred_and_along_a_line(seed):
    side = REFERENCE_SIDE + 1
    block = np.zeros((side, side, 3), np.uint8)
    block[100:125, 100:125] = 255
    (centre, covariance), (before, own) = spread(corrupt(block, "motion_blur", 5, seed)), spread(block)
    np.testing.assert_allclose(centre, before, atol=0.3)
    values, vectors = np.linalg.eigh(covariance - own)
    assert values[1] > 50 > 2 > abs(values[0])
    assert abs(vectors[1, 1]) > np.cos(np.radians(46))  # nearer to the horizontal


def test_jpeg_files_lose_detail_and_keep_flat_images():
    flat = np.full((32, 40, 3), 128, np.uint8)
    for severity in SEVERITIES:
        np.testing.assert_allclose(corrupt(flat, "jpeg_compression", severity, 0), flat, atol=2)
    block = np.random.default_rng(4).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert corrupt(block, "jpeg_compression", 5, 0).std() < corrupt(block, "jpeg_compression", 1, 0).std()


@pytest.mark.parametrize("severity, degrees", list(zip(SEVERITIES, (1, 2, 3, 5, 10), strict=True)))
def test_rotation_turns_about_the_centre(severity, degrees):
    bar = np.zeros((161, 161, 3), np.uint8)
    bar[75:86, 30:131] = 255
    angles = []
    for seed in range(8):
        centre, covariance = spread(corrupt(bar, "rotation", severity, seed))
        np.testing.assert_allclose(centre, (80, 80), atol=0.05)
        angles.append(np.degrees(0.5 * np.arctan2(2 * covariance[0, 1], covariance[1, 1] - covariance[0, 0])))
    np.testing.assert_allclose(np.abs(angles), degrees, atol=0.1)
    assert min(angles) < 0 < max(angles)


@pytest.mark.parametrize("severity, share", list(zip(SEVERITIES, (0.01, 0.02, 0.03, 0.05, 0.1), strict=True)))
def test_translation_moves_by_a_share_of_each_side(severity, share):
    pixels = np.random.default_rng(5).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    ways = set()
    for seed in range(20):
        moved = corrupt(pixels, "translation", severity, seed)
        for dy, dx in ((a, b) for a in (-1, 1) for b in (-1, 1)):
            rolled = np.roll(pixels, (dy * round(200 * share), dx * round(300 * share)), axis=(0, 1))
            if np.array_equal(rolled[30:-30, 30:-30], moved[30:-30, 30:-30]):
                ways.add((dy, dx))
                break
        else:
            pytest.fail(f"seed {seed}: moved by something else")
    assert len(ways) == 4


def test_even_the_smallest_image_is_moved():
    pixels = np.random.default_rng(6).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    assert not np.array_equal(corrupt(pixels, "translation", 1, 0), pixels)


def test_mistakes_are_named():
    with pytest.raises(ConfigError, match=r"unknown shift 'fog'; known are brightness, .*translation"):
        corrupt(picture((8, 8)), "fog", 1, 0)
    for severity in (0, 6, -1):
        with pytest.raises(ConfigError, match=f"severity {severity} of rotation"):
            corrupt(picture((8, 8)), "rotation", severity, 0)
