"""Every kind of image file to one representation, and every bad one to a clear error."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gladad.core.errors import DataError
from gladad.core.images import as_pixels, is_image, list_images, load_image, load_mask, resize_map, resize_pixels, to_pixels, to_tensor

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (12, 17, 3), dtype=np.uint8)
SMOOTH = np.stack(np.broadcast_arrays(np.arange(16)[:, None] * 8, np.arange(24)[None, :] * 5, 90), axis=2).astype(np.uint8)
GREY = RGB[..., 0]
THREE_GREYS = np.repeat(GREY[..., None], 3, axis=2)


def saved(path: Path, image: Image.Image, **options) -> Path:
    image.save(path, **options)
    return path


def test_suffixes_in_any_case_and_hidden_files():
    assert all(is_image(Path(f"a.{suffix}")) for suffix in ("png", "JPG", "jpeg", "Bmp", "tif", "TIFF", "webp"))
    assert not any(is_image(Path(name)) for name in ("a.txt", "png", ".a.png", "a.png.part", "._a.png"))


def test_listing_skips_hidden_folders_and_survives_loops(tmp_path):
    for name in ("b.png", "sub/a.PNG", ".hidden/c.png", "sub/notes.txt", "sub/.d.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "sub/up").symlink_to(tmp_path)
    (tmp_path / "folder.png").mkdir()
    assert list_images(tmp_path) == [tmp_path / "b.png", tmp_path / "sub/a.PNG"]


@pytest.mark.parametrize(
    ("suffix", "options"), [("png", {}), ("bmp", {}), ("tiff", {}), ("tif", {"compression": "tiff_lzw"}), ("webp", {"lossless": True})]
)
def test_lossless_formats_keep_every_pixel(tmp_path, suffix, options):
    np.testing.assert_array_equal(load_image(saved(tmp_path / f"a.{suffix}", Image.fromarray(RGB), **options)), RGB)


@pytest.mark.parametrize(
    ("suffix", "options"), [("jpg", {"quality": 95}), ("JPEG", {"quality": 95, "progressive": True}), ("webp", {"quality": 95})]
)
def test_lossy_formats_come_close(tmp_path, suffix, options):
    pixels = load_image(saved(tmp_path / f"a.{suffix}", Image.fromarray(SMOOTH), **options))
    assert pixels.shape == SMOOTH.shape
    assert np.abs(pixels.astype(int) - SMOOTH).mean() < 4


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff"])
def test_grey_files(tmp_path, suffix):
    np.testing.assert_array_equal(load_image(saved(tmp_path / f"a.{suffix}", Image.fromarray(GREY))), THREE_GREYS)


@pytest.mark.parametrize("suffix", ["png", "tiff"])
@pytest.mark.parametrize("top", [0, 200, 30_000, 65_535])
def test_16_bit_grey_is_scaled_by_its_full_range(tmp_path, suffix, top):
    deep = np.linspace(0, top, 12 * 17).reshape(12, 17).astype(np.uint16)
    pixels = load_image(saved(tmp_path / f"a.{suffix}", Image.fromarray(deep)))
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels[..., 0], np.rint(deep / 257))
    np.testing.assert_array_equal(as_pixels(deep), pixels)
    np.testing.assert_array_equal(as_pixels(Image.fromarray(deep)), pixels)


def test_float_and_integer_containers():
    values = np.linspace(0, 1, 144, dtype=np.float32).reshape(12, 12)
    expected = np.rint(values * 255)
    np.testing.assert_array_equal(as_pixels(Image.fromarray(values))[..., 0], expected)
    np.testing.assert_array_equal(as_pixels(Image.fromarray(np.rint(values * 65535).astype(np.int32)))[..., 1], expected)


def test_alpha_is_laid_on_black(tmp_path):
    rgba = np.dstack([RGB, np.full(GREY.shape, 255, np.uint8)])
    rgba[:6, :, 3] = 0
    pixels = load_image(saved(tmp_path / "a.png", Image.fromarray(rgba)))
    np.testing.assert_array_equal(pixels[6:], RGB[6:])
    assert not pixels[:6].any()
    np.testing.assert_array_equal(as_pixels(rgba), pixels)
    grey_alpha = load_image(saved(tmp_path / "la.png", Image.fromarray(rgba).convert("LA")))
    assert grey_alpha.shape == RGB.shape
    assert not grey_alpha[:6].any()


def test_palette_with_and_without_transparency(tmp_path):
    palette = Image.fromarray(RGB).quantize(8)
    expected = np.asarray(palette.convert("RGB"))
    np.testing.assert_array_equal(load_image(saved(tmp_path / "a.png", palette)), expected)
    pixels = load_image(saved(tmp_path / "b.png", palette, transparency=0))
    clear = np.asarray(palette) == 0
    assert not pixels[clear].any()
    np.testing.assert_array_equal(pixels[~clear], expected[~clear])


def test_one_bit_and_cmyk(tmp_path):
    bits = Image.fromarray(GREY > 127)
    np.testing.assert_array_equal(load_image(saved(tmp_path / "a.png", bits))[..., 2], (GREY > 127) * 255)
    cmyk = Image.new("CMYK", (20, 10), (255, 0, 0, 0))
    pixels = load_image(saved(tmp_path / "a.jpg", cmyk))
    assert pixels.shape == (10, 20, 3)
    assert np.abs(pixels.reshape(-1, 3).mean(axis=0) - [0, 255, 255]).max() < 8


@pytest.mark.parametrize(
    ("orientation", "upright"), [(1, RGB), (2, RGB[:, ::-1]), (3, RGB[::-1, ::-1]), (6, np.rot90(RGB, -1)), (8, np.rot90(RGB))]
)
@pytest.mark.parametrize("suffix", ["png", "tiff", "webp"])
def test_exif_orientation_is_applied(tmp_path, orientation, upright, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if suffix == "webp" else {}
    np.testing.assert_array_equal(load_image(saved(tmp_path / f"a.{suffix}", Image.fromarray(RGB), exif=exif, **options)), upright)


def test_damaged_exif_does_not_matter(tmp_path):
    path = saved(tmp_path / "a.jpg", Image.fromarray(SMOOTH), exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x02\x01\x12")
    assert load_image(path).shape == SMOOTH.shape


@pytest.mark.parametrize("size", [(1, 1), (7, 100), (100, 7)])
def test_too_small(tmp_path, size):
    image = Image.new("RGB", size)
    with pytest.raises(DataError, match="too small"):
        load_image(saved(tmp_path / "a.png", image))
    with pytest.raises(DataError, match="too small"):
        as_pixels(image)


@pytest.mark.parametrize("size", [(8, 8), (8, 400), (33, 9)])
def test_any_size_from_the_smallest_on(tmp_path, size):
    assert load_image(saved(tmp_path / "a.png", Image.new("RGB", size))).shape == (size[1], size[0], 3)


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tiff", "webp"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_truncated_files(tmp_path, suffix, share):
    buffer = io.BytesIO()
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, {"jpg": "jpeg"}.get(suffix, suffix))
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(buffer.getvalue()[: int(len(buffer.getvalue()) * share)])
    with pytest.raises(DataError, match=f"a.{suffix}: (cannot be read|not an image)"):
        load_image(path)


def test_files_that_are_no_images(tmp_path):
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty.png").write_bytes(b"")
    for name in ("text.png", "empty.png"):
        with pytest.raises(DataError, match=f"{name}: not an image"):
            load_image(tmp_path / name)
    with pytest.raises(DataError, match="no such file"):
        load_image(tmp_path / "gone.png")
    with pytest.raises(DataError, match="is a folder"):
        load_image(tmp_path)


def test_huge_images_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    path = saved(tmp_path / "a.png", Image.fromarray(RGB))
    monkeypatch.setattr("gladad.core.images.MAX_PIXELS", 100)
    with pytest.raises(DataError, match="more than is accepted"):
        load_image(path)
    for limit in (150, 50):  # Pillow's own warning, and its error
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(DataError, match="too many pixels"):
            load_image(path)


def test_as_pixels_of_everything_a_caller_may_hold(tmp_path):
    path = saved(tmp_path / "a.png", Image.fromarray(RGB))
    floats = RGB.astype(np.float64) / 255
    tensor = torch.from_numpy(floats).permute(2, 0, 1)
    for image in (
        path,
        str(path),
        Image.open(path).copy(),
        RGB,
        RGB[::-1][::-1],
        floats,
        floats.astype(np.float32),
        tensor,
        tensor.float().requires_grad_(),
    ):
        pixels = as_pixels(image)
        assert pixels.dtype == np.uint8
        np.testing.assert_array_equal(pixels, RGB)
    for image in (GREY, GREY[..., None], GREY / 255, torch.from_numpy(GREY / 255)[None]):
        np.testing.assert_array_equal(as_pixels(image), THREE_GREYS)


def test_as_pixels_does_not_share_memory():
    array = RGB.copy()
    as_pixels(array)[:] = 0
    np.testing.assert_array_equal(array, RGB)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((9, 9, 2), np.uint8),
        np.zeros((9,), np.uint8),
        np.zeros((2, 9, 9, 3), np.uint8),
        np.zeros((9, 9), np.int64),
        np.zeros((9, 9), bool),
        np.full((9, 9), np.nan),
        np.full((9, 9), 255.0),
        np.full((9, 9), -0.5),
        np.zeros((0, 9, 3)),
        torch.zeros(9, 9),
        torch.zeros(1, 3, 9, 9),
        torch.zeros(9, 9, 3),
        torch.zeros(2, 9, 9),
    ],
    ids=lambda image: f"{type(image).__name__}-{image.dtype}-{list(image.shape)}",
)
def test_as_pixels_refuses_what_it_does_not_know(image):
    with pytest.raises(DataError):
        as_pixels(image)


@pytest.mark.parametrize("top", [1, 255])
def test_masks_of_zero_and_one_or_255(tmp_path, top):
    mask = RNG.random((12, 17)) > 0.6
    path = saved(tmp_path / "a.png", Image.fromarray((mask * top).astype(np.uint8)))
    np.testing.assert_array_equal(load_mask(path), mask)
    doubled = load_mask(path, (24, 34))
    np.testing.assert_array_equal(doubled, np.kron(mask, np.ones((2, 2), bool)))
    assert doubled.dtype == bool


@pytest.mark.parametrize("image", [Image.new("L", (12, 9)), Image.new("1", (12, 9)), Image.new("RGBA", (12, 9))])
def test_empty_masks(tmp_path, image):
    assert not load_mask(saved(tmp_path / "a.png", image)).any()


def test_masks_of_other_modes(tmp_path):
    mask = RNG.random((12, 17)) > 0.6
    for index, image in enumerate(
        (Image.fromarray(mask), Image.fromarray(mask * np.uint16(65535)), Image.fromarray((mask * 255).astype(np.uint8)).convert("RGB"))
    ):
        np.testing.assert_array_equal(load_mask(saved(tmp_path / f"{index}.png", image)), mask)


def test_there_and_back():
    np.testing.assert_array_equal(to_pixels(to_tensor(RGB)), RGB)
    assert to_tensor(RGB).shape == (3, 12, 17)
    assert to_pixels(torch.tensor([-1.0, 2.0, 0.5]).view(3, 1, 1)).tolist() == [[[0, 255, 128]]]


def test_resizing():
    assert resize_pixels(RGB, (12, 17)) is RGB
    assert resize_pixels(RGB, (5, 9)).shape == (5, 9, 3)
    maps = torch.arange(4.0).view(1, 1, 2, 2)
    assert resize_map(maps, (2, 2)) is maps
    assert resize_map(maps, (6, 4)).shape == (1, 1, 6, 4)
