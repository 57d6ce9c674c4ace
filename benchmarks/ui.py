"""What the page costs before anything is made: its start, and its first load in a browser.

    PYTHONPATH=. python benchmarks/ui.py --loads 5

Each load is in a new browser context, so nothing is cached: seconds until the inputs can be used, requests,
and bytes that came over the wire. Needs Chromium and playwright.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

from mindspeed_mm.log import get_logger, setup_logging

LOGGER = get_logger("benchmarks.ui")
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Load:
    """One visit."""

    seconds: float
    requests: int
    megabytes: float


def start(data_dir: Path) -> tuple[subprocess.Popen[str], str, float]:
    """`vace ui` with the tiny weights: its process, its address, and the seconds until it listens."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "mindspeed_mm.cli", "ui", "--port", "0", "--data-dir", str(data_dir)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    line = next(line for line in process.stdout if "the page is at" in line)
    return process, line.split(" at ")[1].split()[0], time.perf_counter() - began


def visit(browser: Any, url: str) -> Load:
    """Load the page with an empty cache."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    sizes: list[int] = []
    network = context.new_cdp_session(page)
    network.on("Network.loadingFinished", lambda event: sizes.append(int(event["encodedDataLength"])))
    network.send("Network.enable")
    began = time.perf_counter()
    page.goto(f"{url}/en/")
    page.wait_for_selector("#prompt textarea")
    seconds = time.perf_counter() - began
    page.wait_for_timeout(500)
    context.close()
    return Load(seconds, len(sizes), sum(sizes) / 1e6)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--loads", type=int, default=5)
    given = parser.parse_args()
    setup_logging()
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    with tempfile.TemporaryDirectory() as name, sync_playwright() as playwright:
        process, url, seconds = start(Path(name))
        try:
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            loads = [visit(browser, url) for _ in range(given.loads)]
            browser.close()
        finally:
            process.terminate()
            process.wait(60)
    LOGGER.info("the command listens after %.1f s", seconds)
    LOGGER.info(
        "first load %.2f s, median of %d; %d requests, %.2f MB",
        statistics.median(load.seconds for load in loads),
        len(loads),
        loads[0].requests,
        loads[0].megabytes,
    )


if __name__ == "__main__":
    main()
