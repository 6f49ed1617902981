"""Every kind of image file to one representation, and every bad one to a clear error."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import gladad
from gladad.core.errors import DataError
from gladad.core.images import as_pixels, is_image, list_images, load_image, load_mask, resize_map, resize_pixels
from gladad.core.tensors import to_pixels, to_tensor

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


@pytest.mark.parametrize("top", [0.003, 0.3, 1.0])
def test_float_and_integer_levels_do_not_depend_on_the_brightest(tmp_path, top):
    values = np.linspace(0, top, 144, dtype=np.float32).reshape(12, 12)
    expected = np.rint(values * 255)
    whole = Image.fromarray(np.rint(values * 65535).astype(np.int32))
    assert (Image.fromarray(values).mode, whole.mode) == ("F", "I")
    for image, tolerance in ((Image.fromarray(values), 0), (whole, 0 if top == 1 else 1)):  # 1 where rounding twice crosses a half
        for pixels in (as_pixels(image), load_image(saved(tmp_path / "a.tiff", image))):
            np.testing.assert_allclose(pixels[..., 2], expected, atol=tolerance)


@pytest.mark.parametrize(
    "level, rule",
    [
        *((level, "floating-point levels must lie in") for level in (1.01, -0.1, np.nan, np.inf, 255.0)),
        *((level, r"integer levels must lie in \[0, 65535\], not in \[.*\]; rescale them") for level in (65_536, -1, 2**31 - 1)),
    ],
)
def test_levels_outside_of_their_range_are_refused(tmp_path, level, rule):
    values = np.zeros((12, 12), np.int32 if isinstance(level, int) else np.float32)
    values[3, 4] = level
    path = saved(tmp_path / "a.tiff", Image.fromarray(values))
    for read in (load_image, load_mask, lambda path: as_pixels(Image.fromarray(values))):
        with pytest.raises(DataError, match=rf"(a\.tiff|image): {rule}"):
            read(path)


def test_floats_just_outside_are_clipped():
    values = np.full((9, 9), 1.0009, np.float32)
    values[0] = -0.0009
    assert np.unique(as_pixels(Image.fromarray(values))).tolist() == [0, 255]


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


@pytest.mark.parametrize("endian", ["<", ">"])
@pytest.mark.parametrize("orientation", range(10))
def test_exif_orientation_is_what_pillow_makes_of_it(tmp_path, orientation, endian):
    exif = Image.Exif()
    exif.endian = endian
    exif[0x010F], exif[0x0112], exif[0x0131] = "a maker", orientation, "a program"
    for suffix in ("jpg", "png", "webp"):
        path = saved(tmp_path / f"{suffix}.{suffix}", Image.fromarray(SMOOTH), exif=exif)
        with Image.open(path) as image:
            expected = np.asarray(ImageOps.exif_transpose(image))
            np.testing.assert_array_equal(load_image(path), expected)
            np.testing.assert_array_equal(as_pixels(image), expected)


DAMAGED = b"Exif\0\0MM\0*\0\0\0\x08\0\x02\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\x01\x1a"
"""EXIF data with an orientation (6), which end in the middle of the next entry."""


@pytest.mark.parametrize("exif, turned", [(DAMAGED, True), (DAMAGED[:18], False), (DAMAGED[:8], False)])
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_damaged_exif_does_not_matter(tmp_path, suffix, exif, turned):
    if suffix == "webp":
        exif = exif.removeprefix(b"Exif\0\0")
    path = saved(tmp_path / f"a.{suffix}", Image.fromarray(SMOOTH), exif=exif)
    assert load_image(path).shape == ((24, 16, 3) if turned else SMOOTH.shape)


def test_damaged_exif_does_not_matter_on_several_threads(tmp_path):
    """Warnings are errors here, and a thread that restores the filters must not take those of another away."""
    path = saved(tmp_path / "a.jpg", Image.fromarray(SMOOTH), exif=DAMAGED)
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as threads:
        assert {pixels.shape for pixels in threads.map(load_image, [path] * 400)} == {(24, 16, 3)}
    assert warnings.filters == before


def test_reading_leaves_the_warnings_filters_alone(tmp_path):
    """They belong to the process: while one thread waits for a file, they must be what they were."""
    os.mkfifo(tmp_path / "slow.png")
    before = list(warnings.filters)
    with ThreadPoolExecutor(1) as threads:
        reading = threads.submit(load_image, tmp_path / "slow.png")
        with (tmp_path / "slow.png").open("wb"):  # returns when the other side has been opened
            during = list(warnings.filters)
        with pytest.raises(DataError, match=r"slow\.png: cannot be read"):
            reading.result()
    assert during == before


def test_reading_does_not_change_the_limit_that_a_program_has_set():
    code = "from PIL import Image; Image.MAX_IMAGE_PIXELS = 5_000_000; import gladad.core.images; print(Image.MAX_IMAGE_PIXELS)"
    environment = {**os.environ, "PYTHONPATH": str(Path(gladad.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "5000000"


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


def test_a_damaged_directory_of_a_tiff_file(tmp_path):
    data = saved(tmp_path / "a.tiff", Image.fromarray(RGB)).read_bytes()
    offsets = struct.pack("<HH", 273, 4)  # where the strips are, as integers
    assert data.count(offsets) == 1
    (tmp_path / "a.tiff").write_bytes(data.replace(offsets, struct.pack("<HH", 273, 11)))  # as floating-point numbers
    with pytest.raises(DataError, match=r"a\.tiff: cannot be read, the file is damaged"):
        load_image(tmp_path / "a.tiff")


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


@pytest.mark.slow
@pytest.mark.parametrize("suffix, size", [("png", (20_000, 10_000)), ("tiff", (10_000, 9_000))])
def test_large_images_are_read_up_to_the_limit(tmp_path, suffix, size):
    assert size[0] * size[1] > 1024**3 // 4 // 3  # where Pillow warns by itself
    path = saved(tmp_path / f"a.{suffix}", Image.new("1", size, 1), **({"compress_level": 1} if suffix == "png" else {}))
    pixels = load_image(path)
    assert pixels.shape == (size[1], size[0], 3)
    assert pixels[0, 0].tolist() == pixels[-1, -1].tolist() == [255] * 3


@pytest.mark.parametrize(
    "suffix, size, match",
    [
        ("png", (20_000, 10_001), "pixels"),
        ("png", (60_000, 60_000), "pixels"),
        ("bmp", (20_000, 10_001), "pixels"),
        ("jpg", (20_000, 10_001), "20000x10001 pixels"),
    ],
)
@pytest.mark.parametrize("read", [load_image, load_mask, lambda path: as_pixels(path.read_bytes())], ids=["image", "mask", "bytes"])
def test_huge_images_are_refused_before_they_are_decoded(tmp_path, suffix, size, match, read):
    """Only their headers are there."""
    path = saved(tmp_path / f"a.{suffix}", Image.new("L", (513, 514)))
    data = path.read_bytes()
    if suffix == "png":
        header = b"IHDR" + struct.pack(">II", *size) + data[24:29]
        data = data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]
    elif suffix == "bmp":
        data = data[:18] + struct.pack("<ii", *size) + data[26:]
    else:
        assert data.count(struct.pack(">HH", 514, 513)) == 1
        data = data.replace(struct.pack(">HH", 514, 513), struct.pack(">HH", size[1], size[0]))
    path.write_bytes(data)
    with pytest.raises(DataError, match=f"{match}.*accepted.*crop or shrink it"):
        read(path)


def test_what_the_system_refuses_is_not_called_damaged(tmp_path):
    with pytest.raises(DataError, match=r"cannot be read \(File name too long\)"):
        load_image(tmp_path / f"{'a' * 300}.png")


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


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_as_pixels_of_the_bytes_of_a_file(tmp_path, kind):
    for suffix in ("png", "jpg", "bmp", "tiff", "webp"):
        data = saved(tmp_path / f"a.{suffix}", Image.fromarray(SMOOTH)).read_bytes()
        np.testing.assert_array_equal(as_pixels(kind(data)), load_image(tmp_path / f"a.{suffix}"))
        with pytest.raises(DataError, match=r"^image: (cannot be read|not an image)"):
            as_pixels(kind(data[: len(data) // 2]))
    for data in (b"", b"hello", SMOOTH.tobytes()):
        with pytest.raises(DataError, match=r"^image: not an image"):
            as_pixels(kind(data))
    with pytest.raises(DataError, match=r"^image: 7x100 pixels is too small"):
        as_pixels(kind(saved(tmp_path / "a.png", Image.new("RGB", (7, 100))).read_bytes()))


def test_a_damaged_file_that_pillow_has_only_opened(tmp_path):
    data = saved(tmp_path / "a.png", Image.fromarray(RGB)).read_bytes()
    with pytest.raises(DataError, match="image: cannot be read, the file is damaged"):
        as_pixels(Image.open(io.BytesIO(data[:200])))


def test_the_order_of_bytes_and_the_type_of_a_tensor_do_not_matter():
    deep = RNG.integers(0, 65_536, (12, 17), dtype=np.uint16)
    np.testing.assert_array_equal(as_pixels(deep.astype(">u2")), as_pixels(deep))
    for top in (1, 255):  # integers are levels of 255, even where none is above 1
        levels = RGB // (255 // top)
        np.testing.assert_array_equal(as_pixels(torch.from_numpy(levels).permute(2, 0, 1)), levels)
    np.testing.assert_array_equal(as_pixels(torch.from_numpy(RGB / 255).bfloat16().permute(2, 0, 1)).astype(int) // 4, RGB // 4)


def test_as_pixels_does_not_share_memory():
    array = RGB.copy()
    image = Image.fromarray(RGB)
    for mine in (array, image, image.getchannel(0)):
        as_pixels(mine)[:] = 0
    np.testing.assert_array_equal(array, RGB)
    np.testing.assert_array_equal(np.asarray(image), RGB)


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


@pytest.mark.parametrize("suffix", ["png", "tiff"])
@pytest.mark.parametrize("value", [1, 128, 255, 32_767])
def test_deep_masks_of_small_numbers(tmp_path, suffix, value):
    mask = RNG.random((12, 17)) > 0.6
    path = saved(tmp_path / f"a.{suffix}", Image.fromarray((mask * value).astype(np.uint16)))
    np.testing.assert_array_equal(load_mask(path), mask)
    np.testing.assert_array_equal(load_mask(path, (24, 34)), np.kron(mask, np.ones((2, 2), bool)))
    whole = saved(tmp_path / "b.tiff", Image.fromarray((mask * value).astype(np.int32)))
    np.testing.assert_array_equal(load_mask(whole), mask)
    share = saved(tmp_path / "c.tiff", Image.fromarray((mask * value / 65_535).astype(np.float32)))
    np.testing.assert_array_equal(load_mask(share), mask)


def test_bright_masks_are_cut_at_half_of_full_scale(tmp_path):
    for index, values in enumerate((np.array([0, 32_767, 32_768, 65_535], np.uint16), np.array([0, 127, 128, 255], np.uint8))):
        path = saved(tmp_path / f"{index}.png", Image.fromarray(values.repeat(18).reshape(8, 9)))
        np.testing.assert_array_equal(load_mask(path).ravel(), np.array([False, False, True, True]).repeat(18))


def test_a_lossy_mask_has_no_numbers_whatever_its_name(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(np.full((16, 16), 3, np.uint8)).save(buffer, "JPEG", exif=DAMAGED)  # it is also turned
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    assert not load_mask(tmp_path / "a.png").any()


def test_there_and_back():
    np.testing.assert_array_equal(to_pixels(to_tensor(RGB)), RGB)
    assert to_tensor(RGB).shape == (3, 12, 17)
    assert to_pixels(torch.tensor([-1.0, 2.0, 0.5]).view(3, 1, 1)).tolist() == [[[0, 255, 128]]]


def test_resizing():
    assert resize_pixels(RGB, (12, 17)) is RGB
    assert resize_pixels(RGB, (5, 9)).shape == (5, 9, 3)


@pytest.mark.parametrize("size", [(6, 4), (9, 30), (3, 50), (1, 1)])
def test_resizing_a_map_is_bilinear_interpolation(size):
    maps = np.random.default_rng(0).random((9, 30), np.float32)
    theirs = torch.nn.functional.interpolate(torch.from_numpy(maps)[None, None], size, mode="bilinear", align_corners=False)
    found = resize_map(maps, size)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, theirs[0, 0].numpy(), atol=1e-5)  # theirs has float32 places
    assert resize_map(maps, maps.shape) is maps
