"""Takes the screenshots of docs/guide/ui.md: `python scripts/ui_pictures.py docs/images`.

Needs chromium and playwright.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[1]
_COLOURS = 96  # of a PNG: keeps it below 100 kB


def main(folder: Path) -> None:
    """Write ui_make.png and ui_inspect.png."""
    with tempfile.TemporaryDirectory() as work:
        write = [sys.executable, "examples/vace/tiny/world.py", f"{work}/data", "--count", "2"]
        subprocess.run([*write, "--kinds", "inpaint"], cwd=ROOT, check=True)
        command = [sys.executable, "-m", "mindspeed_mm.cli", "ui", "--port", "0", "--root", work]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "MINDSPEED_MM_DEVICE": "cpu"}
        process = subprocess.Popen(
            [*command, "--data-dir", f"{work}/ui"],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert process.stdout is not None
            line = next(line for line in process.stdout if "the page is at" in line)
            with sync_playwright() as playwright:
                browser = playwright.chromium.launch(
                    executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
                )
                page = browser.new_page(viewport={"width": 1280, "height": 1180})
                page.set_default_timeout(120_000)
                page.goto(line.split(" at ")[1].split()[0])
                _make(page)
                _save(page, folder / "ui_make.png")
                _inspect(page)
                _save(page, folder / "ui_inspect.png", height=620)
                browser.close()
        finally:
            process.terminate()
            process.wait(60)


def _make(page: Any) -> None:
    page.click("#sample")
    canvas = page.locator("#painter canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    side = box["width"]
    page.mouse.move(box["x"] + 0.12 * side, box["y"] + 0.3 * side)
    page.mouse.down()
    for row in range(6):
        for share in (0.12, 0.48) if row % 2 else (0.48, 0.12):
            page.mouse.move(box["x"] + share * side, box["y"] + (0.3 + 0.08 * row) * side, steps=4)
    page.mouse.up()
    page.click("#run")
    page.wait_for_selector("#result-video video")
    page.wait_for_timeout(1500)
    page.evaluate("window.scrollTo(0, 0)")


def _inspect(page: Any) -> None:
    page.get_by_role("tab", name="Inspect").click()
    page.locator("#inspect-path input").fill("data/data.json")
    page.keyboard.press("Enter")
    page.click("#inspect-draw")
    page.wait_for_selector("#inspect-sheet img")
    page.wait_for_timeout(800)


def _save(page: Any, path: Path, height: int | None = None) -> None:
    page.screenshot(path=path)
    with Image.open(path) as image:
        shown = image.convert("RGB")
    cut = shown if height is None else shown.crop((0, 0, shown.width, min(height, shown.height)))
    cut.resize((960, round(cut.height * 960 / cut.width))).quantize(_COLOURS).save(path, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
