"""Text on sheets: wrapped, in Pillow's own font, another font of the system for what that lacks, and escapes for the rest."""

from __future__ import annotations

import sys
import unicodedata
from functools import lru_cache
from itertools import takewhile
from pathlib import Path

from PIL import ImageDraw, ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
_FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.fonts", "~/.local/share/fonts", "/Library/Fonts", "/System/Library/Fonts", "C:/Windows/Fonts")  # fmt: skip
# tried in this order: fonts with Chinese, Japanese and Korean characters, then one with many alphabets
_WIDE = ("NotoSansCJK-Regular", "NotoSansSC", "SourceHanSans", "wqy-microhei", "wqy-zenhei", "DroidSansFallback", "PingFang", "msyh", "ipag", "unifont", "DejaVuSans.", "Arial Unicode")  # fmt: skip


class Lettering:
    """Writes text of one size."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._line = round(size * 1.38)

    def height(self, text: str, width: int) -> int:
        """How tall `text` is when it is wrapped to `width` pixels."""
        return self._line * len(self._wrap(text, width)[1])

    def write(self, draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, width: int, colour: str) -> None:
        """Write `text`, wrapped to `width`, with its upper left corner at `at`."""
        font, lines = self._wrap(text, width)
        for number, line in enumerate(lines):
            draw.text((at[0], at[1] + number * self._line), line, font=font, fill=colour)

    def _wrap(self, text: str, width: int) -> tuple[Font, list[str]]:
        font, text = legible(" ".join(text.split()), self._size)
        lines: list[str] = [""]
        for word in _breakable(text):
            if lines[-1] and font.getlength(lines[-1] + word.rstrip()) > width:
                lines.append("")
            while font.getlength(word.rstrip()) > width and len(word) > 1:  # a word longer than the line
                fits = _fitting(font, word, width)
                lines[-1], word = word[:fits], word[fits:]
                lines.append("")
            lines[-1] += word
        return font, [line.rstrip() for line in lines]


def legible(text: str, size: int) -> tuple[Font, str]:
    """A font and a spelling of `text` that it can draw: `\\u7ea2` stands for what no font at hand has."""
    own = _font(None, size)
    if all(_has(None, character) for character in text):
        return own, text
    best = max(_wide_fonts(), key=lambda path: sum(_has(path, character) for character in text), default=None)
    if best is not None and sum(_has(best, c) for c in text) <= sum(_has(None, c) for c in text):
        best = None
    return _font(best, size), "".join(c if _has(best, c) else _escape(c) for c in text)


def _fitting(font: Font, word: str, width: int) -> int:
    """How many characters of a word fit into `width`; at least one."""
    fits = takewhile(lambda count: font.getlength(word[:count]) <= width, range(1, len(word)))
    return max(1, sum(1 for _ in fits))


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii") if unicodedata.category(character) != "Mn" else ""


def _breakable(text: str) -> list[str]:
    """Pieces between which a line may break: after spaces, and around wide (Chinese, Japanese) characters."""
    pieces = [""]
    for character in text:
        wide = unicodedata.east_asian_width(character) in "WF"
        pieces[-1] += character
        if character == " " or wide:
            pieces.append("")
    return [piece for piece in pieces if piece]


@lru_cache(maxsize=64)
def _font(path: Path | None, size: int) -> Font:
    return ImageFont.load_default(size) if path is None else ImageFont.truetype(str(path), size)


@lru_cache(maxsize=8192)
def _has(path: Path | None, character: str) -> bool:
    """Whether the font draws the character as something else than its box for unknown ones."""
    if character.isspace():
        return True
    font = _font(path, 20)
    try:
        drawn, unknown = font.getmask(character), font.getmask("\U0010fffe")
    except (OSError, ValueError, UnicodeError):
        return False
    return bool(drawn.size != unknown.size or bytes(drawn) != bytes(unknown))


@lru_cache(maxsize=1)
def _wide_fonts() -> tuple[Path, ...]:
    """Fonts of the system that may have what Pillow's own lacks, best first."""
    folders = [Path(folder).expanduser() for folder in _FOLDERS if sys.platform != "win32" or folder.startswith("C:")]
    files = [file for folder in folders if folder.is_dir() for file in sorted(folder.rglob("*.[to]t[fc]"))]
    found = [file for name in _WIDE for file in files if file.name.lower().startswith(name.lower())]
    return tuple(file for file in dict.fromkeys(found) if _opens(file))


def _opens(file: Path) -> bool:
    try:
        ImageFont.truetype(str(file), 20)
    except OSError:
        return False
    return True
