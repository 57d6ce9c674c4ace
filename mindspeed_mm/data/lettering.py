"""Text on sheets.

Wrapped, in Pillow's own font, another font of the system for what that lacks, and escapes for the rest.

`MINDSPEED_MM_FONT` names a font file that is tried before those of the system.
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
# tried in this order: fonts with Chinese, Japanese and Korean characters, then one with many alphabets
_NOWHERE = Path()  # stands for no font
_WIDE = (
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


class Lettering:
    """Writes text of one size."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._line = round(size * 1.38)

    def height(self, text: str, width: int) -> int:
        """How tall `text` is when it is wrapped to `width` pixels."""
        return self._line * len(self.wrap(text, width))

    def write(
        self, draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, width: int, colour: str
    ) -> None:
        """Write `text`, wrapped to `width`, with its upper left corner at `at`."""
        own = _font(None, self._size)
        rise = (
            own.getmetrics()[0] if isinstance(own, ImageFont.FreeTypeFont) else 0
        )  # all fonts stand on one line
        for number, line in enumerate(self.wrap(text, width)):
            x, y = float(at[0]), at[1] + number * self._line + rise
            for font, piece in _runs(line, self._size):
                draw.text((x, y), piece, font=font, fill=colour, anchor="ls" if rise else None)
                x += font.getlength(piece)

    def wrap(self, text: str, width: int) -> list[str]:
        """The lines of `text`, none wider than `width`, in characters that can be drawn."""
        lines: list[str] = [""]
        for word in _breakable(spelled(" ".join(text.split()))):
            if lines[-1] and self.length(lines[-1] + word.rstrip()) > width:
                lines.append("")
            while self.length(word.rstrip()) > width and len(word) > 1:  # a word longer than the line
                most = self._fitting(word, width)
                lines[-1], word = word[:most], word[most:]
                lines.append("")
            lines[-1] += word
        return [line.rstrip() for line in lines]

    def _fitting(self, word: str, width: int) -> int:
        """How many characters of a word fit into `width`; at least one."""
        fits = takewhile(lambda count: self.length(word[:count]) <= width, range(1, len(word)))
        return max(1, sum(1 for _ in fits))

    def length(self, text: str) -> float:
        """How many pixels wide `text` is in one line."""
        return sum(font.getlength(piece) for font, piece in _runs(text, self._size))


def spelled(text: str) -> str:
    """`text` in characters that some installed font has: `\\u7ea2` stands for one that none has."""
    return "".join(_escape(character) if _lacking(character) else character for character in text)


def missing(text: str) -> str:
    """The characters of `text` that no installed font has, each once."""
    return "".join(dict.fromkeys(character for character in text if _lacking(character)))


def _runs(text: str, size: int) -> list[tuple[Font, str]]:
    """`text` in pieces, each with the font that draws it."""
    pieces = groupby(text, key=_home)
    return [(_font(None if home is _NOWHERE else home, size), "".join(piece)) for home, piece in pieces]


def _lacking(character: str) -> bool:
    return _home(character) is _NOWHERE


@lru_cache(maxsize=8192)
def _home(character: str) -> Path | None:
    """The font that a character is drawn with.

    Pillow's own (None), the first other that has it, or _NOWHERE.
    """
    if _has(None, character):
        return None
    return next((font for font in _wide_fonts() if _has(font, character)), _NOWHERE)


def _escape(character: str) -> str:
    return (
        character.encode("unicode_escape").decode("ascii") if unicodedata.category(character) != "Mn" else ""
    )


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
    """Fonts that may have what Pillow's own lacks, best first."""
    named = os.environ.get("MINDSPEED_MM_FONT")
    folders = [
        Path(folder).expanduser() for folder in _FOLDERS if sys.platform != "win32" or folder.startswith("C:")
    ]
    files = [file for folder in folders if folder.is_dir() for file in sorted(folder.rglob("*.[to]t[fc]"))]
    found = [file for name in _WIDE for file in files if file.name.lower().startswith(name.lower())]
    first = [Path(named)] if named else []
    return tuple(file for file in dict.fromkeys([*first, *found, *_fonts_of_fontconfig()]) if _opens(file))


def _fonts_of_fontconfig() -> list[Path]:
    """What fontconfig knows for Chinese, wherever it is and whatever it is called."""
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


def _opens(file: Path) -> bool:
    try:
        ImageFont.truetype(str(file), 20)
    except OSError:
        return False
    return True
