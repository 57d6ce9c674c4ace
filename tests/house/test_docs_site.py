"""The documents as a site.

Both navigations name every page, the site builds without a warning, and its links hold.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

import mindspeed_mm

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
CONFIGS = ("mkdocs.yml", "mkdocs.zh.yml")
HREF = re.compile(r"""(?:href|src)=["']?([^"'\s>]+)""")


def pages(entry: Any) -> list[str]:
    """The files of a navigation."""
    if isinstance(entry, str):
        return [entry]
    children = entry if isinstance(entry, list) else list(entry.values())
    return [page for child in children for page in pages(child)]


@pytest.mark.parametrize("config", CONFIGS)
def test_navigation_names_every_page_once(config: str) -> None:
    listed = pages(yaml.safe_load((ROOT / config).read_text(encoding="utf-8"))["nav"])
    written = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    written = {page for page in written if not page.startswith("zh/")}
    outside = {page for page in listed if (ROOT / page).is_file()}
    assert sorted(listed) == sorted(written | outside)


def test_both_navigations_have_the_same_order() -> None:
    english, chinese = (
        pages(yaml.safe_load((ROOT / config).read_text(encoding="utf-8"))["nav"]) for config in CONFIGS
    )
    assert english == chinese


def test_every_chinese_page_has_an_english_one() -> None:
    lost = [
        page for page in (DOCS / "zh").rglob("*.md") if not (DOCS / page.relative_to(DOCS / "zh")).is_file()
    ]
    assert not lost


def test_api_page_lists_every_public_name() -> None:
    page = (DOCS / "reference/api.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^::: mindspeed_mm\.(\w+)$", page, re.MULTILINE)) == set(mindspeed_mm.__all__)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not find_spec("mkdocs"):
        pytest.skip("mkdocs is not installed: pip install -c constraints.txt -e '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        ["bash", "scripts/build_docs.sh", str(folder)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "WARNING" not in done.stdout + done.stderr
    return folder


@pytest.mark.slow
def test_links_of_the_site_lead_to_its_files(site: Path) -> None:
    lost = set()
    for page in site.rglob("*.html"):
        if page.name == "404.html":  # its links start at the server's root
            continue
        for link in HREF.findall(page.read_text(encoding="utf-8")):
            if not link.startswith(("http", "#", "data:", "mailto:")):
                target = Path(os.path.normpath(page.parent / re.split("[#?]", link)[0]))
                if not (target.is_file() or (target / "index.html").is_file()):
                    lost.add(f"{page.relative_to(site)}: {link}")
    assert not lost, "\n" + "\n".join(sorted(lost))


@pytest.mark.slow
@pytest.mark.parametrize(("folder", "words"), [("", "contact sheet"), ("zh", "掩码")])
def test_search_finds_words_of_both_languages(site: Path, folder: str, words: str) -> None:
    index = json.loads((site / folder / "search/search_index.json").read_text(encoding="utf-8"))
    assert any(words in entry["text"].replace("\u200b", "") for entry in index["docs"])


@pytest.mark.slow
def test_api_page_holds_docstrings(site: Path) -> None:
    text = (site / "reference/api/index.html").read_text(encoding="utf-8")
    about = inspect.getdoc(mindspeed_mm.VacePipeline.from_pretrained)
    assert about is not None
    assert " ".join(about.split("\n\n")[-1].split()) in " ".join(text.split())
