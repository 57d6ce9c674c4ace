"""Contact sheets.

Everything is on them, nothing runs into anything else, and no character makes them fail.
"""

import logging

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from mindspeed_mm.data import fonts as font_files
from mindspeed_mm.data.fonts import TextRenderer, escape_missing, missing_characters
from mindspeed_mm.data.sheet import MARGIN, PAPER, SIDE, Strip, draw_sheet, spread
from tests.support.clips import number_of, numbered

pytestmark = pytest.mark.medium

PAPER_RGB = tuple(bytes.fromhex(PAPER[1:]))


def strip(name="video", count=8, **changes):
    return Strip(
        name=name, pictures=list(numbered(count)), labels=[f"frame {i}" for i in range(count)], **changes
    )


def test_first_and_the_last_frame_are_always_shown():
    assert spread(81, 8) == [0, 11, 23, 34, 46, 57, 69, 80]
    assert spread(3, 8) == [0, 1, 2]
    assert spread(10, 1) == [0]
    assert all(len(set(spread(count, 8))) == 8 for count in range(8, 200))


def test_pictures_share_columns_across_strips():
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
    """Whether a row of pictures begins at line y.

    Paper above, the black first bar of frame 0 below its frame.
    """
    x = MARGIN + SIDE + 10
    framed = tuple(sheet[y - 1, x]) == PAPER_RGB != tuple(sheet[y, x])
    return framed and sheet[y + 3 : y + 20, x].max() < 20


def test_margins_stay_empty_for_any_sheet():
    long = "a very long caption that must be wrapped " * 12
    sheet = np.asarray(
        draw_sheet(
            long,
            [strip("a_stream_with_an_overlong_name_without_spaces", note=long)],
            facts=[long],
            caption=long,
        )
    )
    for edge in (
        sheet[: MARGIN // 2],
        sheet[-MARGIN // 2 :],
        sheet[:, : MARGIN - 2],
        sheet[:, -MARGIN + 2 :],
    ):
        assert (edge == PAPER_RGB).all()


def test_portrait_pictures_are_not_taller_than_a_strip_allows():
    tall = Strip(name="v", pictures=list(numbered(8, 960, 320)))
    flat = Strip(name="v", pictures=list(numbered(8, 320, 960)))
    assert draw_sheet("t", [tall]).height < draw_sheet("t", [flat]).height + 240
    assert draw_sheet("t", [Strip(name="nothing", pictures=[])]).height > 60


@pytest.mark.parametrize(
    "text",
    ["一个红色的圆在移动", "κύκλος", "مرحبا", "emoji 🎬 and \x00 control", "combining é", "\ud800 lone", ""],
)
def test_no_text_makes_a_sheet_fail(text):
    draw_sheet(text, [strip(text, 2, note=text)], facts=[text], caption=text)


@pytest.fixture
def fonts(monkeypatch):
    """Yield a function that sets which fonts exist besides Pillow's own."""

    def only(*paths):
        monkeypatch.setattr(font_files, "_fallback_fonts", lambda: paths)
        font_files._font_with.cache_clear()

    yield only
    monkeypatch.undo()
    font_files._font_with.cache_clear()


def test_characters_without_a_font_are_spelled_out_and_known(fonts):
    fonts()
    assert escape_missing("a 红 b红") == "a \\u7ea2 b\\u7ea2"
    assert missing_characters("a 红 b红") == "红"
    assert escape_missing("plain text") == "plain text"
    assert missing_characters("plain text") == ""


def test_escaped_characters_are_reported_with_a_fix(fonts, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("mindspeed_mm"), "propagate", True)
    fonts()
    draw_sheet("t", [strip()], caption="一个红色的圆")
    (said,) = {record.getMessage() for record in caplog.records if record.name.startswith("mindspeed_mm")}
    assert "一个红色的圆; " in said
    assert "MINDSPEED_MM_FONT" in said
    caplog.clear()
    draw_sheet("t", [strip()], caption="a red circle")
    assert "MINDSPEED_MM_FONT" not in caplog.text


@pytest.fixture
def another(tmp_path):
    """Pillow's own font once more, as a file."""
    (tmp_path / "another.ttf").write_bytes(ImageFont.load_default(20).path.getvalue())
    return tmp_path / "another.ttf"


def test_fallback_font_keeps_character_positions(fonts, another, monkeypatch):
    def drawn():
        image = Image.new("L", (300, 60), 255)
        TextRenderer(20).draw(ImageDraw.Draw(image), (10, 10), "red Qg moon", 280, "black")
        ink = np.asarray(image) < 128
        return np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0)), ink.sum()

    fonts()
    rows, columns, ink = drawn()
    has = font_files._has_glyph
    monkeypatch.setattr(
        font_files, "_has_glyph", lambda path, c: has(path, c) and not (path is None and c in "Qg")
    )
    fonts(another)
    assert escape_missing("red Qg moon") == "red Qg moon"
    mixed = drawn()
    assert np.array_equal(mixed[0], rows)  # on one line
    assert abs(mixed[1].max() - columns.max()) <= 2  # kerning between the fonts may differ
    assert mixed[2] == pytest.approx(ink, rel=0.05)
    fonts()
    assert missing_characters("red Qg moon") == "Qg"


def test_font_can_be_named(another, monkeypatch):
    monkeypatch.setenv("MINDSPEED_MM_FONT", str(another))
    font_files._fallback_fonts.cache_clear()
    try:
        assert font_files._fallback_fonts()[0] == another
    finally:
        font_files._fallback_fonts.cache_clear()


def test_text_is_wrapped_within_its_width_even_without_spaces(fonts):
    fonts()
    renderer = TextRenderer(17)
    for text in ("word " * 30, "x" * 300, "一" * 100):
        lines = renderer.wrap(text, 200)
        assert len(lines) > 3
        assert all(renderer.length(line) <= 200 for line in lines)
        assert "".join("".join(lines).split()) in ("".join(text.split()), "\\u4e00" * 100)


def test_masks_are_enlarged_without_gray():
    mask = np.zeros((16, 16, 3), np.uint8)
    mask[:, 8:] = 255
    sheet = draw_sheet("t", [Strip(name="mask", pictures=[mask], crisp=True)])
    cell = (sheet.width - 2 * MARGIN - SIDE - 7 * 8) // 8
    box = (
        MARGIN + SIDE + 2,
        sheet.height - MARGIN - cell + 4,
        MARGIN + SIDE + cell - 2,
        sheet.height - MARGIN - 4,
    )
    assert {tuple(colour) for _, colour in Image.Image.getcolors(sheet.crop(box))} == {
        (0, 0, 0),
        (255, 255, 255),
    }


def test_caption_of_100_kb_is_cut_before_it_is_laid_out():
    short, long = (draw_sheet("t", [strip()], caption="word " * count) for count in (400, 20_000))
    assert long.height <= short.height + 40
