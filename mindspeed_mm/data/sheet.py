"""Draws contact sheets: images that show a sample as the model sees it.

Frames are uint8 arrays. Does not import torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from mindspeed_mm.data.fonts import TextRenderer, missing_characters
from mindspeed_mm.log import get_logger

logger = get_logger(__name__)
_MAX_TEXT = 2000  # characters of a caption or a fact
Picture = NDArray[np.uint8]  # [H, W, 3]

PAPER, PANEL, INK, SOFT, LINE, ACCENT = "#fbfaf8", "#f1efea", "#1f2328", "#6e7178", "#c9c6bf", "#b4552d"
MARGIN, GAP, SIDE = 36, 8, 168  # border, space between pictures, width of the name column, in pixels
TALLEST = 240  # maximum height of one picture in pixels


@dataclass(frozen=True, kw_only=True)
class Strip:
    """One row of a sheet: pictures of one stream in chronological order."""

    name: str
    pictures: Sequence[Picture]  # each uint8 [H, W, 3]
    labels: Sequence[str] = ()  # text under each picture
    note: str = ""  # text under the name
    crisp: bool = False  # enlarge without smoothing, for masks


def draw_sheet(
    title: str,
    strips: Sequence[Strip],
    *,
    facts: Sequence[str] = (),
    caption: str = "",
    width: int = 1640,
    columns: int = 8,
) -> Image.Image:
    """Draw a sheet with a heading, facts in small print, the caption, and one row for each strip.

    Characters that no font contains do not raise an error. All strips share one grid of `columns`, so that
    pictures of the same moment are aligned.
    """
    title, caption, facts = shortened(title), shortened(caption), [shortened(fact) for fact in facts]
    missing = missing_characters(
        " ".join(
            [
                title,
                caption,
                *facts,
                *(f"{strip.name}{strip.note}{''.join(strip.labels)}" for strip in strips),
            ]
        )
    )
    if missing:
        logger.warning(
            "no installed font has %s; such characters are written as escapes. Install a font that has them "
            "(Debian: fonts-noto-cjk or fonts-wqy-microhei), or set MINDSPEED_MM_FONT to a font file",
            missing[:12].encode("utf-8", "replace").decode() + ("…" if len(missing) > 12 else ""),
        )
    sheet = _Sheet(width, columns, strips)
    height = sheet.layout(None, title, facts, caption)
    image = Image.new("RGB", (width, height), PAPER)
    sheet.layout(image, title, facts, caption)
    return image


def shortened(text: str) -> str:
    """Shorten `text` to fit on a sheet. The layout of 100 kB of text would take minutes."""
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}… ({len(text)} characters)"


def spread(count: int, shown: int) -> list[int]:
    """Return `shown` of `count` indices, evenly spaced and including the first and the last."""
    if count <= shown:
        return list(range(count))
    return [round(i * (count - 1) / (shown - 1)) for i in range(shown)] if shown > 1 else [0]


class _Sheet:
    """Layout of a sheet, run twice: first to measure the height, then to draw."""

    def __init__(self, width: int, columns: int, strips: Sequence[Strip]) -> None:
        self._width = width
        self._strips = strips
        self._cell = (width - 2 * MARGIN - SIDE - GAP * (columns - 1)) // columns
        self._columns = columns
        self._big, self._name, self._text, self._small = (TextRenderer(size) for size in (30, 19, 17, 14))

    def layout(self, image: Image.Image | None, title: str, facts: Sequence[str], caption: str) -> int:
        """Lay out the sheet, draw on `image` if there is one, and return the height in pixels."""
        draw = None if image is None else ImageDraw.Draw(image)
        inner = self._width - 2 * MARGIN
        y = self._write(draw, self._big, MARGIN, MARGIN - 6, title, inner, INK) + 4
        for fact in facts:
            y = self._write(draw, self._text, MARGIN, y + 4, fact, inner, SOFT)
        if caption:
            y = self._caption(draw, y + 18, caption, inner)
        for strip in self._strips:
            y = self._strip(image, draw, strip, y + 24)
        return y + MARGIN

    def _caption(self, draw: ImageDraw.ImageDraw | None, y: int, caption: str, inner: int) -> int:
        end = self._write(None, self._text, 0, y + 12, caption, inner - 44, INK) + 14
        if draw is not None:
            draw.rectangle((MARGIN, y, MARGIN + inner, end), fill=PANEL)
            draw.rectangle((MARGIN, y, MARGIN + 4, end), fill=ACCENT)
            self._write(draw, self._text, MARGIN + 22, y + 12, caption, inner - 44, INK)
        return end

    def _strip(
        self, image: Image.Image | None, draw: ImageDraw.ImageDraw | None, strip: Strip, y: int
    ) -> int:
        if draw is not None:
            draw.line((MARGIN, y - 12, self._width - MARGIN, y - 12), fill=LINE)
        named = self._write(draw, self._name, MARGIN, y - 3, strip.name, SIDE - 16, INK)
        named = (
            self._write(draw, self._small, MARGIN, named + 2, strip.note, SIDE - 16, SOFT)
            if strip.note
            else named
        )
        bottom = y
        for start in range(0, max(1, len(strip.pictures)), self._columns):
            row = strip.pictures[start : start + self._columns]
            labels = strip.labels[start : start + self._columns]
            bottom = self._row(image, draw, row, labels, bottom, strip.crisp) + GAP
        return max(bottom - GAP, named)

    def _row(
        self,
        image: Image.Image | None,
        draw: ImageDraw.ImageDraw | None,
        pictures: Sequence[Picture],
        labels: Sequence[str],
        y: int,
        crisp: bool,
    ) -> int:
        sizes = [self._size(picture) for picture in pictures]
        height = max((size[1] for size in sizes), default=0)
        for index, (picture, size) in enumerate(zip(pictures, sizes, strict=True)):
            x = MARGIN + SIDE + index * (self._cell + GAP)
            if image is not None and draw is not None:
                image.paste(_thumbnail(picture, size, crisp), (x, y))
                draw.rectangle((x, y, x + size[0] - 1, y + size[1] - 1), outline=LINE)
                if index < len(labels):
                    self._write(draw, self._small, x, y + height + 4, labels[index], self._cell, SOFT)
        lines = max((self._small.height(label, self._cell) for label in labels), default=0)
        return y + height + (4 + lines if lines else 0)

    def _size(self, picture: Picture) -> tuple[int, int]:
        height, width = picture.shape[:2]
        scale = min(self._cell / width, TALLEST / height)
        return max(1, round(width * scale)), max(1, round(height * scale))

    def _write(
        self,
        draw: ImageDraw.ImageDraw | None,
        renderer: TextRenderer,
        x: int,
        y: int,
        text: str,
        width: int,
        colour: str,
    ) -> int:
        """Write the text if `draw` is given, and return its lower edge."""
        if draw is not None:
            renderer.draw(draw, (x, y), text, width, colour)
        return y + renderer.height(text, width)


def _thumbnail(picture: Picture, size: tuple[int, int], crisp: bool) -> Image.Image:
    grows = size[0] > picture.shape[1]
    method = (
        Image.Resampling.NEAREST
        if crisp and grows
        else Image.Resampling.BICUBIC
        if grows
        else Image.Resampling.LANCZOS
    )
    return Image.fromarray(picture).resize(size, method)
