"""Contact sheets: everything is on them, nothing runs into anything else, and no character makes them fail."""

import numpy as np
import pytest
from PIL import Image

from mindspeed_mm.data import lettering
from mindspeed_mm.data.lettering import Lettering, legible
from mindspeed_mm.data.sheet import MARGIN, PAPER, SIDE, Strip, draw_sheet, spread
from tests.clips import number_of, numbered

PAPER_RGB = tuple(bytes.fromhex(PAPER[1:]))


def strip(name="video", count=8, **changes):
    return Strip(name=name, pictures=list(numbered(count)), labels=[f"frame {i}" for i in range(count)], **changes)


def test_the_first_and_the_last_frame_are_always_shown():
    assert spread(81, 8) == [0, 11, 23, 34, 46, 57, 69, 80]
    assert spread(3, 8) == [0, 1, 2]
    assert spread(10, 1) == [0]
    assert all(len(set(spread(count, 8))) == 8 for count in range(8, 200))


def test_pictures_stand_in_order_and_in_columns_shared_by_all_strips():
    sheet = np.asarray(draw_sheet("t", [strip(), strip("mask", crisp=True)]))
    cell = (sheet.shape[1] - 2 * MARGIN - SIDE - 7 * 8) // 8
    rows = [y for y in range(2, len(sheet) - 20) if _starts(sheet, y)]
    assert len(rows) == 2
    for top in rows:
        for place in range(8):
            left = MARGIN + SIDE + place * (cell + 8)
            picture = sheet[top : top + round(cell * 96 / 128), left : left + cell]
            assert number_of(picture) == place


def _starts(sheet, y):
    """Whether a row of pictures begins at line y: paper above, the black first bar of frame 0 below its frame."""
    x = MARGIN + SIDE + 10
    framed = tuple(sheet[y - 1, x]) == PAPER_RGB != tuple(sheet[y, x])
    return framed and sheet[y + 3 : y + 20, x].max() < 20


def test_margins_stay_empty_whatever_stands_on_the_sheet():
    long = "a very long caption that must be wrapped " * 12
    sheet = np.asarray(
        draw_sheet(
            long, [strip("a_stream_with_an_overlong_name_without_spaces", note=long)], facts=[long], caption=long
        )
    )
    for edge in (sheet[: MARGIN // 2], sheet[-MARGIN // 2 :], sheet[:, : MARGIN - 2], sheet[:, -MARGIN + 2 :]):
        assert (edge == PAPER_RGB).all()


def test_portrait_pictures_are_not_taller_than_a_strip_allows():
    tall = Strip(name="v", pictures=list(numbered(8, 960, 320)))
    flat = Strip(name="v", pictures=list(numbered(8, 320, 960)))
    assert draw_sheet("t", [tall]).height < draw_sheet("t", [flat]).height + 240
    assert draw_sheet("t", [Strip(name="nothing", pictures=[])]).height > 60


@pytest.mark.parametrize(
    "text", ["一个红色的圆在移动", "κύκλος", "مرحبا", "emoji 🎬 and \x00 control", "combining é", "\ud800 lone", ""]
)
def test_no_text_makes_a_sheet_fail(text):
    draw_sheet(text, [strip(text, 2, note=text)], facts=[text], caption=text)


def test_characters_without_a_font_are_spelled_out(monkeypatch):
    monkeypatch.setattr(lettering, "_wide_fonts", lambda: ())
    assert legible("a 红 b", 20)[1] == "a \\u7ea2 b"
    assert legible("plain text", 20)[1] == "plain text"


def test_text_is_wrapped_within_its_width_even_without_spaces():
    hand = Lettering(17)
    for text in ("word " * 30, "x" * 300, "一" * 100):
        font, lines = hand._wrap(text, 200)
        assert len(lines) > 3
        assert all(font.getlength(line) <= 200 for line in lines)
        assert "".join("".join(lines).split()) in ("".join(text.split()), "\\u4e00" * 100)


def test_masks_are_enlarged_without_grey():
    mask = np.zeros((16, 16, 3), np.uint8)
    mask[:, 8:] = 255
    sheet = draw_sheet("t", [Strip(name="mask", pictures=[mask], crisp=True)])
    cell = (sheet.width - 2 * MARGIN - SIDE - 7 * 8) // 8
    box = (MARGIN + SIDE + 2, sheet.height - MARGIN - cell + 4, MARGIN + SIDE + cell - 2, sheet.height - MARGIN - 4)
    assert {tuple(colour) for _, colour in Image.Image.getcolors(sheet.crop(box))} == {(0, 0, 0), (255, 255, 255)}
