"""Pictures for people: heat maps, overlays, panels and thumbnails. Pillow and NumPy only.

Maps are in units of the decision threshold: 1 is the threshold, and the colour scale ends at `VMAX`.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from gladad.core.records import Prediction, Region

Pixels = NDArray[np.uint8]

VMAX = 2.0
"""Map value at the top of the colour scale: twice the threshold."""

GREEN, RED = (22, 122, 68), (186, 34, 40)
OUTLINE, BOX = (0, 230, 255), (255, 255, 255)
TILE = 320  # pixels, longer side of a picture in a panel

# Dark to light at an even pace, from black over violet and orange to pale yellow, so that it reads in grey as well.
ANCHORS = (
    (0, 0, 6),
    (34, 11, 76),
    (88, 16, 110),
    (139, 35, 105),
    (188, 55, 84),
    (227, 89, 50),
    (249, 142, 9),
    (248, 202, 52),
    (252, 254, 164),
)
COLOURS: Pixels = np.stack(
    [np.interp(np.linspace(0, 1, 256), np.linspace(0, 1, len(ANCHORS)), channel) for channel in zip(*ANCHORS, strict=True)], axis=1
).astype(np.uint8)


def heatmap(values: NDArray[np.floating], vmax: float = VMAX) -> Pixels:
    """Colour a map.

    Args:
        values: ``[H, W]``; 0 and less is the darkest colour.
        vmax: Value of the lightest colour, and of everything above it.

    Returns:
        ``[H, W, 3]`` uint8.
    """
    level = np.nan_to_num(np.asarray(values, dtype=np.float64), nan=0.0) / vmax
    return np.asarray(COLOURS[np.rint(level.clip(0, 1) * 255).astype(np.uint8)])


def overlay(
    pixels: Pixels, anomaly_map: NDArray[np.floating], mask: NDArray[np.bool_] | None = None, regions: Iterable[Region] = ()
) -> Pixels:
    """Lay a map over its image: untouched below half of the threshold, ever more colour above.

    Args:
        pixels: ``[H, W, 3]`` uint8.
        anomaly_map: ``[H, W]`` of the same size.
        mask: ``[H, W]`` bool, drawn as an outline.
        regions: Drawn as boxes.

    Returns:
        ``[H, W, 3]`` uint8.

    Raises:
        ValueError: The sizes differ.
    """
    for array in (anomaly_map, mask):
        if array is not None and array.shape != pixels.shape[:2]:
            raise ValueError(f"sizes differ: image {list(pixels.shape[:2])}, map or mask {list(array.shape)}")
    strength = 0.75 * (np.nan_to_num(anomaly_map, nan=0.0) - 0.5).clip(0, 1)[..., None]
    blended = np.rint((1 - strength) * pixels + strength * heatmap(anomaly_map)).astype(np.uint8)
    width = max(1, round(max(pixels.shape[:2]) / 300))  # so that lines are still seen in a thumbnail
    if mask is not None:
        blended[mask & ~_eroded(mask, width)] = OUTLINE
    picture = Image.fromarray(blended)
    draw = ImageDraw.Draw(picture)
    for region in regions:
        left, top, right, bottom = region.box
        draw.rectangle((left, top, right - 1, bottom - 1), outline=BOX, width=width)
    return np.array(picture)


def _eroded(mask: NDArray[np.bool_], times: int) -> NDArray[np.bool_]:
    """The mask without its outermost pixels; the border of the image counts as outside."""
    for _ in range(times):
        padded = np.pad(mask, 1)
        mask = mask & padded[2:, 1:-1] & padded[:-2, 1:-1] & padded[1:-1, 2:] & padded[1:-1, :-2]
    return mask


def thumbnail(pixels: Pixels, side: int) -> Pixels:
    """Shrink ``[H, W, 3]`` uint8 so that the longer side is at most ``side`` pixels; never enlarge."""
    scale = side / max(pixels.shape[:2])
    return pixels if scale >= 1 else _scaled(pixels, scale)


def _scaled(pixels: Pixels, scale: float) -> Pixels:
    height, width = (max(1, round(length * scale)) for length in pixels.shape[:2])
    return np.array(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))


def decision_text(prediction: Prediction) -> str:
    """The decision in one line: verdict, score beside the threshold, p-value and step."""
    verdict = "REJECT" if prediction.pred_label else "ACCEPT"
    return f"{verdict}   score {prediction.pred_score:.2f} (limit 1.00)   p = {prediction.p_value:.3g}   step {prediction.step}"


def panel(prediction: Prediction, pixels: Pixels, caption: str = "") -> Image.Image:
    """One picture that tells the decision: input, reconstruction (if there is one) and map side by side, the verdict below.

    Args:
        prediction: What inspection said.
        pixels: ``[H, W, 3]`` uint8, the inspected image.
        caption: A line of text, such as the file's name.

    Returns:
        An RGB picture; green strip for accepted, red for rejected.
    """
    pictures = [("input", pixels)]
    if prediction.reconstruction is not None:
        pictures.append(("reconstruction", prediction.reconstruction))
    pictures.append(("map", overlay(pixels, prediction.anomaly_map, prediction.pred_mask, prediction.regions)))
    tiles = [(title, _scaled(picture, TILE / max(picture.shape[:2]))) for title, picture in pictures]

    gap, line = 8, 26
    font, small = _font(17), _font(14)
    row = max(tile.shape[0] for _, tile in tiles)
    verdict = decision_text(prediction)
    text_width = round(font.getlength(verdict))
    width = max(sum(tile.shape[1] + gap for _, tile in tiles) + gap, text_width + 3 * gap)
    height = line + row + gap + line * (2 if caption else 1) + gap

    picture = Image.new("RGB", (width, height), (24, 26, 30))
    draw = ImageDraw.Draw(picture)
    x = gap
    for title, tile in tiles:
        draw.text((x, 5), title, font=small, fill=(205, 208, 214))
        picture.paste(Image.fromarray(tile), (x, line))
        x += tile.shape[1] + gap
    top = line + row + gap
    draw.rectangle((0, top, width, height), fill=RED if prediction.pred_label else GREEN)
    draw.text((gap, top + 5), verdict, font=font, fill=(255, 255, 255))
    if caption:
        draw.text((gap, top + line + 5), _shortened(caption, small, width - 2 * gap), font=small, fill=(255, 255, 255))
    return picture


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _shortened(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Cut the front of a text, where the least telling part of a path is, until it fits."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while len(text) > 1 and font.getlength("..." + text) > width:
        text = text[1:]
    return "..." + text
