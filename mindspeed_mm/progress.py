"""Shows progress: a bar with rate and ETA on a terminal, and occasional lines in a log."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from types import TracebackType
from typing import Any

from mindspeed_mm.log import get_logger, rank, terminal

logger = get_logger(__name__)
LINE_EVERY = 30.0  # seconds between lines in a log
# Assumed size of a terminal that reports none, as in `docker exec` and CI, where tqdm would draw nothing.
_SCREEN = (
    80,
    24,
)


class Progress:
    """The progress of a long job: `with Progress("clips", 300, "clip") as progress: ... progress.step()`.

    `unit` is singular; "B" means bytes. `shown` is whether this process draws and logs; None means only on
    rank 0. A log gets a line every `every` seconds or, with `lines`, that many evenly spaced lines in total.
    """

    def __init__(
        self,
        name: str,
        total: int,
        unit: str,
        *,
        initial: int = 0,
        shown: bool | None = None,
        every: float | None = LINE_EVERY,
        lines: int | None = None,
    ) -> None:
        self.name, self.total, self.unit = name, total, unit
        shown = rank() == 0 if shown is None else shown
        self.done = initial
        self._worked = 0  # units done here that took time
        self._every = every if shown else None
        self._share = max(1, total // lines) if lines and shown else None
        self._started = self._logged = time.monotonic()
        self._screen = terminal() if shown and total else None
        self._bar: Any = None
        if self._screen is not None:
            from tqdm import tqdm  # imported here, because it takes 30 ms and --help does not need it

            columns, rows = os.get_terminal_size(self._screen.fileno())
            is_sized = columns > 0 and rows > 0
            self._bar = tqdm(
                desc=name or None,
                total=total,
                initial=initial,
                unit=unit,
                unit_scale=unit == "B",
                file=self._screen,
                dynamic_ncols=is_sized,
                ncols=None if is_sized else _SCREEN[0],
                nrows=None if is_sized else _SCREEN[1],
            )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()

    def step(self, count: int = 1, *, worked: bool = True, note: str = "") -> None:
        """Count `count` more units as done.

        With `worked=False`, they took no time, so they do not affect rate and ETA.
        """
        self.done += count
        self._worked += count if worked else 0
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(count)
        elif self._due(count):
            self._logged = time.monotonic()
            logger.info(self.line(note))

    def clear(self) -> None:
        """Clear the bar to make room for a line of text. The next step redraws it."""
        if self._bar is not None:
            self._bar.clear()

    def close(self) -> None:
        """Keep the bar on the screen and move to the next line."""
        if self._bar is not None:
            self._bar.close()
        if self._screen is not None and self._screen.fileno() != 2:
            self._screen.close()
        self._bar = self._screen = None

    def line(self, note: str = "") -> str:
        """Return the log line, such as `clips 12/300 | 1.9 s/clip | ETA 0:09:03 | failed 0`."""
        rate = self._worked / max(time.monotonic() - self._started, 1e-9)
        left = str(timedelta(seconds=round((self.total - self.done) / rate))) if rate else "unknown"
        parts = [f"{self.name} {self._amounts()}", self._rate(rate), f"ETA {left}", note]
        return " | ".join(part for part in parts if part)

    def _due(self, count: int) -> bool:
        if self._share is not None:
            return self.done // self._share > (self.done - count) // self._share or self.done == self.total
        return self._every is not None and time.monotonic() - self._logged >= self._every

    def _amounts(self) -> str:
        return (
            f"{size_text(self.done)} of {size_text(self.total)}"
            if self.unit == "B"
            else f"{self.done}/{self.total}"
        )

    def _rate(self, rate: float) -> str:
        if self.unit == "B":
            return f"{size_text(rate)}/s"
        return f"{rate:.2f} {self.unit}s/s" if rate >= 1 or not rate else f"{1 / rate:.1f} s/{self.unit}"


def size_text(count: float) -> str:
    """Format a number of bytes, such as 3.2 MB."""
    power = 0
    while count >= 999.5 and power < 4:
        count, power = count / 1000, power + 1
    return f"{count:.{0 if count >= 99.5 or not power else 1}f} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"
