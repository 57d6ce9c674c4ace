"""Draws wrapped text on contact sheets.

Uses Pillow's built-in font. For characters that it lacks, uses the font file in `MINDSPEED_MM_FONT`, then the
system's fonts, then escapes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import unicodedata
from functools import lru_cache
from itertools import groupby, takewhile
from pathlib import Path

from PIL import ImageDraw, ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
_FOLDERS = (
    "/usr/share/fonts",
    "/usr/local/share/fonts",
    "~/.fonts",
    "~/.local/share/fonts",
    "/Library/Fonts",
    "/System/Library/Fonts",
    "C:/Windows/Fonts",
)
_NO_FONT = Path()  # marks a character that no font has
# In order of preference: Chinese, Japanese and Korean fonts, then fonts with many alphabets.
_FALLBACKS = (
    *(
        "NotoSansCJK-Regular",
        "NotoSansCJKsc-Regular",
        "NotoSansSC",
        "SourceHanSans",
        "wqy-microhei",
        "wqy-zenhei",
    ),
    *(
        "HarmonyOS_Sans_SC",
        "DroidSansFallback",
        "PingFang",
        "STHeiti",
        "Hiragino Sans GB",
        "msyh",
        "simhei",
        "simsun",
    ),
    *("uming", "ukai", "ipag", "YuGoth", "malgun", "NanumGothic", "unifont", "DejaVuSans.", "Arial Unicode"),
)


class TextRenderer:
    """Draws text in one size, in pixels."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._line = round(size * 1.38)

    def height(self, text: str, width: int) -> int:
        """Return the height in pixels of `text` wrapped to `width` pixels."""
        return self._line * len(self.wrap(text, width))

    def draw(
        self, draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, width: int, colour: str
    ) -> None:
        """Draw `text`, wrapped to `width` pixels, with its upper left corner at `at`."""
        builtin = _load_font(None, self._size)
        # Draw all fonts on one baseline: the ascent of the built-in font below the top of the line.
        ascent = builtin.getmetrics()[0] if isinstance(builtin, ImageFont.FreeTypeFont) else 0
        for number, line in enumerate(self.wrap(text, width)):
            x, y = float(at[0]), at[1] + number * self._line + ascent
            for font, piece in _split_by_font(line, self._size):
                draw.text((x, y), piece, font=font, fill=colour, anchor="ls" if ascent else None)
                x += font.getlength(piece)

    def wrap(self, text: str, width: int) -> list[str]:
        """Split `text` into lines of at most `width` pixels, and escape characters that no font has."""
        lines: list[str] = [""]
        for word in _break_points(escape_missing(" ".join(text.split()))):
            if lines[-1] and self.length(lines[-1] + word.rstrip()) > width:
                lines.append("")
            while self.length(word.rstrip()) > width and len(word) > 1:  # a word longer than the line
                count = self._fitting_length(word, width)
                lines[-1], word = word[:count], word[count:]
                lines.append("")
            lines[-1] += word
        return [line.rstrip() for line in lines]

    def _fitting_length(self, word: str, width: int) -> int:
        """Return how many characters of a word fit into `width` pixels, at least one."""
        fits = takewhile(lambda count: self.length(word[:count]) <= width, range(1, len(word)))
        return max(1, sum(1 for _ in fits))

    def length(self, text: str) -> float:
        """Return the width of `text` on one line, in pixels."""
        return sum(font.getlength(piece) for font, piece in _split_by_font(text, self._size))


def escape_missing(text: str) -> str:
    """Replace the characters of `text` that no installed font has with escapes such as `\\u7ea2`."""
    return "".join(_escape(character) if _is_missing(character) else character for character in text)


def missing_characters(text: str) -> str:
    """Return the characters of `text` that no installed font has, each once."""
    return "".join(dict.fromkeys(character for character in text if _is_missing(character)))


def _split_by_font(text: str, size: int) -> list[tuple[Font, str]]:
    """Split `text` into runs of characters that are drawn in the same font."""
    runs = groupby(text, key=_font_with)
    return [(_load_font(None if path is _NO_FONT else path, size), "".join(run)) for path, run in runs]


def _is_missing(character: str) -> bool:
    return _font_with(character) is _NO_FONT


@lru_cache(maxsize=8192)
def _font_with(character: str) -> Path | None:
    """Return the file of the font that a character is drawn in.

    None is Pillow's built-in font, and _NO_FONT means that no font has the character.
    """
    if _has_glyph(None, character):
        return None
    return next((font for font in _fallback_fonts() if _has_glyph(font, character)), _NO_FONT)


def _escape(character: str) -> str:
    return (
        character.encode("unicode_escape").decode("ascii") if unicodedata.category(character) != "Mn" else ""
    )


def _break_points(text: str) -> list[str]:
    """Split where a line may break: after spaces, and around wide characters (Chinese, Japanese)."""
    pieces = [""]
    for character in text:
        wide = unicodedata.east_asian_width(character) in "WF"
        pieces[-1] += character
        if character == " " or wide:
            pieces.append("")
    return [piece for piece in pieces if piece]


@lru_cache(maxsize=64)
def _load_font(path: Path | None, size: int) -> Font:
    return ImageFont.load_default(size) if path is None else ImageFont.truetype(str(path), size)


def _has_glyph(path: Path | None, character: str) -> bool:
    """Return whether the font has the character, that is, does not draw it as its missing-glyph box."""
    if character.isspace():
        return True
    font = _load_font(path, 20)
    try:
        drawn, unknown = font.getmask(character), font.getmask("\U0010fffe")
    except (OSError, ValueError, UnicodeError):
        return False
    return bool(drawn.size != unknown.size or bytes(drawn) != bytes(unknown))


@lru_cache(maxsize=1)
def _fallback_fonts() -> tuple[Path, ...]:
    """Return the fonts that may have the characters that the built-in font lacks, best first."""
    named = os.environ.get("MINDSPEED_MM_FONT")
    folders = [
        Path(folder).expanduser() for folder in _FOLDERS if sys.platform != "win32" or folder.startswith("C:")
    ]
    files = [file for folder in folders if folder.is_dir() for file in sorted(folder.rglob("*.[to]t[fc]"))]
    found = [file for name in _FALLBACKS for file in files if file.name.lower().startswith(name.lower())]
    first = [Path(named)] if named else []
    return tuple(
        file for file in dict.fromkeys([*first, *found, *_fonts_of_fontconfig()]) if _is_readable(file)
    )


def _fonts_of_fontconfig() -> list[Path]:
    """Return the font files that fontconfig lists for Chinese."""
    command = shutil.which("fc-list")
    if command is None:
        return []
    try:
        listed = subprocess.run(
            [command, ":lang=zh-cn", "file"], capture_output=True, text=True, timeout=10
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    files = sorted(line.strip().rstrip(":") for line in listed.splitlines())
    return [Path(file) for file in files if file.lower().endswith((".ttf", ".ttc", ".otf", ".otc"))]


def _is_readable(file: Path) -> bool:
    try:
        ImageFont.truetype(str(file), 20)
    except OSError:
        return False
    return True
