"""Six windows of the tiny world: drift and seams stay below the bounds that the guide states."""

from __future__ import annotations

import re
from pathlib import Path

import draw_long
import pytest

from mindspeed_mm.generation.pipeline import GenerationResult
from mindspeed_mm.tasks.jobs.generate import GenerateJob
from tests.support.tiny import write_shipped_request

ROOT = Path(__file__).resolve().parents[2]
BOUND = re.compile(
    r"`max_lab_drift` ≤ ([0-9.]+), `max_seam_jump` ≤ ([0-9.]+)(?:,| and) `min_seam_psnr` ≥ ([0-9.]+)"
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, GenerationResult]:
    folder = tmp_path_factory.mktemp("long")
    base = write_shipped_request(folder / "base.json")
    return draw_long.make_all(GenerateJob.from_file(draw_long.write_request(folder, base)))


@pytest.mark.parametrize("page", ["docs/guide/long_video.md", "docs/zh/guide/long_video.md"])
@pytest.mark.parametrize("way", ["extend", "context windows"])
def test_six_windows_stay_below_the_bounds(page: str, way: str, results: dict[str, GenerationResult]) -> None:
    found = BOUND.search((ROOT / page).read_text(encoding="utf-8"))
    assert found is not None
    drift, jump, psnr = map(float, found.groups())
    report = results[way].settings["windows"]
    assert len(report["windows"]) == 6
    assert report["max_lab_drift"] <= drift
    assert report["max_seam_jump"] <= jump
    assert (report["min_seam_psnr"] or 99) >= psnr


def test_first_colours_drift_less_than_none(results: dict[str, GenerationResult]) -> None:
    drifts = {way: results[way].settings["windows"]["max_lab_drift"] for way in results}
    assert drifts["extend"] < 0.5 * drifts["extend, colours left"]


def test_sheet_shows_every_way(results: dict[str, GenerationResult]) -> None:
    assert draw_long.draw(results).width == 1640
