"""Draws the memory of a run on 1 to 1024 devices as stacked bars."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from mindspeed_mm.errors import ConfigError
from mindspeed_mm.files import atomic_path
from mindspeed_mm.planning.counts import AtCount
from mindspeed_mm.planning.walk import TERMS

_COLOURS = ("#4e79a7", "#76b7b2", "#59a14f", "#edc948", "#b07aa1", "#9c755f", "#f28e2b", "#e15759", "#bab0ac")
_SIZE, _LEFT, _TOP, _BOTTOM, _RIGHT = (1160, 560), 70, 70, 70, 250
_GIB = 2.0**30


def draw_plan(path: Path, title: str, counts: Sequence[AtCount], capacity: float) -> None:
    """Write a PNG with a bar per number of devices, a colour per term, and a line at the device's memory.

    Raises ConfigError.
    """
    image = Image.new("RGB", _SIZE, "white")
    draw = ImageDraw.Draw(image)
    font, small = ImageFont.load_default(16), ImageFont.load_default(13)
    width, height = _SIZE[0] - _LEFT - _RIGHT, _SIZE[1] - _TOP - _BOTTOM
    top = 1.1 * max([capacity, *(one.memory.total for one in counts)])

    def y(size: float) -> float:
        return _TOP + height * (1 - size / top)

    draw.text((16, 14), title, "black", font)
    step = 10 ** math.floor(math.log10(top / _GIB / 2))
    step *= next(factor for factor in (1, 2, 5, 10) if top / _GIB / (factor * step) <= 8)
    for mark in range(int(top / _GIB / step) + 1):
        level = y(mark * step * _GIB)
        draw.line((_LEFT, level, _LEFT + width, level), "#e5e5e5")
        draw.text((_LEFT - 8, level), f"{mark * step:g}", "black", small, anchor="rm")
    slot = width / max(len(counts), 1)
    for number, one in enumerate(counts):
        left, base = _LEFT + slot * (number + 0.18), 0.0
        for name, colour in zip(TERMS, _COLOURS, strict=True):
            size = one.memory.terms[name]
            if size:
                draw.rectangle((left, y(base + size), left + slot * 0.64, y(base)), colour)
            base += size
        middle = left + slot * 0.32
        draw.text(
            (middle, y(base) - 4),
            f"{base / _GIB:.0f}",
            "black" if one.fits else "#c00000",
            small,
            anchor="ms",
        )
        draw.text((middle, _TOP + height + 8), str(one.devices), "black", small, anchor="ma")
        draw.text(
            (middle, _TOP + height + 26), f"{one.samples_per_second:.3g}/s", "#666666", small, anchor="ma"
        )
    draw.line((_LEFT, y(capacity), _LEFT + width, y(capacity)), "#c00000", 2)
    draw.text((_LEFT + width + 6, y(capacity)), f"{capacity / _GIB:.4g} GiB", "#c00000", small, anchor="lm")
    draw.text((16, _TOP - 12), "GiB a device", "black", small, anchor="ls")
    draw.text((_LEFT + width / 2, _SIZE[1] - 10), "devices, samples a second", "black", small, anchor="ms")
    for number, (name, colour) in enumerate(zip(reversed(TERMS), reversed(_COLOURS), strict=True)):
        level = _TOP + height - 24 * (len(TERMS) - number)
        draw.rectangle((_LEFT + width + 80, level, _LEFT + width + 94, level + 14), colour)
        draw.text((_LEFT + width + 102, level + 7), name, "black", small, anchor="lm")
    try:
        with atomic_path(path) as part:
            image.save(part, "PNG")
    except OSError as error:
        raise ConfigError(
            f"cannot be written: {error.strerror}", where=path, fix="choose another file"
        ) from None
