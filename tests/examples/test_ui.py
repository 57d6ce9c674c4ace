"""`vace ui` with the tiny weights in a real browser: Debian's chromium, driven by playwright."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mindspeed_mm.data.video import open_video
from mindspeed_mm.generation.embedded import read_embedded
from mindspeed_mm.ui.sample import PROMPT

pytest.importorskip("gradio", reason="pip install -e '.[ui]'")
sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium (Debian: apt-get install chromium)"),
]
ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 120_000  # milliseconds: a busy machine


@dataclass
class Site:
    """A page that is served, and a browser."""

    url: str
    data_dir: Path
    browser: Any
    foreign: list[str] = field(default_factory=list)  # what a page asked of another machine
    errors: list[str] = field(default_factory=list)

    def open(self, path: str = "/", width: int = 1280, height: int = 900) -> Any:
        """A new page."""
        page = self.browser.new_page(viewport={"width": width, "height": height})
        page.set_default_timeout(PATIENCE)
        page.on("request", lambda request: self._note(request.url))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.goto(self.url + path)
        page.wait_for_selector("#prompt textarea")
        return page

    def _note(self, url: str) -> None:
        if not url.startswith((self.url, "data:", "blob:")):
            self.foreign.append(url)

    def results(self) -> list[Path]:
        """The finished videos."""
        return sorted(self.data_dir.glob("videos/*/video.mp4"))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    data_dir = tmp_path_factory.mktemp("ui")
    command = [sys.executable, "-m", "mindspeed_mm.cli", "ui", "--port", "0", "--data-dir", str(data_dir)]
    environment = {**os.environ, "MINDSPEED_MM_DEVICE": "cpu", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert process.stdout is not None
        line = next(line for line in process.stdout if "the page is at" in line)
        with sync_api.sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
            )
            yield Site(line.split(" at ")[1].split()[0], data_dir, browser)
            browser.close()
    finally:
        process.terminate()
        process.wait(60)


def paint(page: Any) -> None:
    """Brush over the sample's circle."""
    canvas = page.locator("#painter canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    left, top, side = box["x"], box["y"], box["width"]
    page.mouse.move(left + 0.12 * side, top + 0.3 * side)
    page.mouse.down()
    for row in range(6):
        height = top + (0.3 + 0.08 * row) * side
        for share in (0.12, 0.48) if row % 2 else (0.48, 0.12):
            page.mouse.move(left + share * side, height, steps=3)
    page.mouse.up()


def set_steps(page: Any, steps: int) -> None:
    page.locator("#advanced button").first.click()
    page.locator("#number-steps input").fill(str(steps))


def test_painted_inpainting_is_made(site: Site):
    page = site.open()
    page.click("#sample")
    page.wait_for_selector("#painter canvas")
    paint(page)
    page.wait_for_function("document.querySelector('#painted textarea, #painted input').value.length > 100")
    page.click("#preview")
    page.wait_for_selector("#strip img")  # the model, too, is ready by now or soon
    page.click("#run")
    page.wait_for_selector("#result-video video")
    assert page.locator("#result-source video").count() == 1
    (path,) = site.results()
    frames = open_video(path).read(range(17))
    last = frames[16][:, 32:].reshape(-1, 3).astype(int)
    blue = (last[:, 2] > last[:, 0] + 60).mean()
    red = (last[:, 0] > last[:, 2] + 60).mean()
    assert blue > 0.15 > red
    assert read_embedded(path)["prompt"] == PROMPT
    assert not site.foreign, "the page works without the internet"
    assert not site.errors
    page.close()


def test_waiting_video_is_cancelled(site: Site):
    page = site.open()
    page.locator("#family label").first.click()  # from text
    page.wait_for_selector("#video", state="hidden")
    page.locator("#prompt textarea").fill("a red circle moves left over a dark background")
    set_steps(page, 900)
    page.click("#run")
    page.wait_for_selector("#job-0 .job")
    page.click("#cancel-0")
    page.wait_for_selector("#job-0 .job", state="hidden")
    page.wait_for_function("!document.querySelector('#queue').innerText.includes('%')")
    page.close()


def test_settings_come_back_from_a_result(site: Site):
    if not site.results():
        pytest.skip("no result: the first test failed")
    page = site.open()
    page.locator("#settings button").first.click()
    page.locator("#drop input[type=file]").set_input_files(str(site.results()[0]))
    page.wait_for_function("text => document.querySelector('#prompt textarea').value === text", arg=PROMPT)
    assert "inpainting" in page.locator("#task input").input_value()
    page.close()


def test_contradiction_is_shown_on_the_page(site: Site):
    page = site.open()
    page.locator("#prompt textarea").fill("x")
    page.click("#preview")
    assert "src_video" in page.locator("#said .notice.bad").inner_text()
    page.close()


def test_page_has_both_languages(site: Site):
    page = site.open()
    assert "What do you want to do?" in page.content()
    page.locator("#lang a").nth(1).click()
    page.wait_for_function("document.body.innerText.includes('你想做什么')")
    page.get_by_role("tab", name="曲线").click()
    page.wait_for_selector("#curves-path")
    page.close()


def test_narrow_screen_scrolls_one_way(site: Site):
    page = site.open(width=390, height=800)
    page.click("#sample")
    page.wait_for_selector("#painter canvas")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    box = page.locator("#painter canvas").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 390
    page.close()


def test_outpainting_is_dragged(site: Site):
    page = site.open()
    page.click("#sample")
    page.wait_for_selector("#painter canvas")
    page.locator("#task input").click()
    page.get_by_role("option").filter(has_text="Extend the frame").first.click()
    page.wait_for_selector("#grower .grower[data-ready]")
    page.locator("#side-left").scroll_into_view_if_needed()  # what is below the window cannot be dragged
    area = page.locator(".grower-area").bounding_box()
    for handle, x, y in (("left", 0.1, 0.5), ("right bottom", 2 / 3, 2 / 3)):
        box = page.locator(f'#grower [data-sides="{handle}"]').bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        page.mouse.down()
        page.mouse.move(area["x"] + x * area["width"], area["y"] + y * area["height"], steps=8)
        page.mouse.up()
    sides = [page.locator(f"#side-{side} input[type=range]") for side in ("left", "top", "right", "bottom")]
    assert [side.input_value() for side in sides] == ["70", "25", "0", "0"]
    page.locator("#long button").first.click()  # boxes that are empty stay so
    page.locator("#advanced button").first.click()
    page.wait_for_selector("#number-width input")
    page.click("#preview")
    page.wait_for_selector("#strip img")
    assert not site.errors
    page.close()
