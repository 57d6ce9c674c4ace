"""The guide's recipes are the requests behind its images, and every kind can be requested."""

from __future__ import annotations

import re
from pathlib import Path

import draw_kinds
import pytest

from mindspeed_mm.data.conditions import to_tensors
from mindspeed_mm.generation.conditions import read_conditions
from mindspeed_mm.tasks.jobs.generate import GenerateJob
from tests.support.tiny import write_shipped_request

ROOT = Path(__file__).resolve().parents[2]
RECIPE = re.compile(r"^### .*?\n.*?```json\n(.*?)\n```\n\n!\[[^]]*\]\(([^)]*)\)", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", ["docs/guide/generate.md", "docs/zh/guide/generate.md"])
def test_every_recipe_of_the_guide_is_the_one_of_its_picture(page: str) -> None:
    found = RECIPE.findall((ROOT / page).read_text(encoding="utf-8"))
    assert [recipe for recipe, _ in found] == [kind.recipe for kind in draw_kinds.KINDS.values()]
    pictures = [(ROOT / page).parent / picture for _, picture in found]
    assert [picture.name for picture in pictures] == [f"generate_{name}.png" for name in draw_kinds.KINDS]
    assert all(picture.resolve().is_file() for picture in pictures)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> GenerateJob:
    folder = tmp_path_factory.mktemp("kinds")
    draw_kinds.write_sources(folder)
    base = write_shipped_request(folder / "base.json", steps=1)
    return GenerateJob.from_file(draw_kinds.write_request(folder, base))


def test_every_kind_shows_the_model_what_its_recipe_names(job: GenerateJob) -> None:
    for video in job.videos:
        keys, shown = draw_kinds.KINDS[video.name].keys, to_tensors(read_conditions(video))
        assert (shown.src_video is not None) == bool(keys.keys() - {"image_path"}), video.name
        assert (shown.src_mask is None) == (not keys.keys() - {"image_path", "video_path"}), video.name
        assert len(shown.src_ref_images) == ("image_path" in keys), video.name


@pytest.mark.slow
def test_sheet_is_drawn_for_each(job: GenerateJob) -> None:
    few = job.model_copy(update={"videos": (job.videos[0], job.videos[3])})
    sheets = draw_kinds.sheets(few)
    assert list(sheets) == [video.name for video in few.videos]
    assert all(sheet.width == 1000 for sheet in sheets.values())
