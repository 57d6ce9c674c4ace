"""Hooks of mkdocs (mkdocs.yml).

Pages from outside docs/, Chinese pages over English ones, links that hold in both sites.

A link in a page is a path in the repository. On the site it leads to the page of the reader's language; to
the other language where a page names its own translation; nowhere, as plain text, where it names a file that
is no page. A path that does not exist is a warning, and `strict` makes it an error.
"""

from __future__ import annotations

import logging
import posixpath
import re
from importlib.util import find_spec
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page
from pymdownx.slugs import slugify

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = ("examples/vace/README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/results/*")
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
FENCE = re.compile(r"^(```.*?^```)", re.MULTILINE | re.DOTALL)
log = logging.getLogger("mkdocs.docs_hooks")


@event_priority(50)
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Anchors as forges make them; Chinese search by characters where jieba is not installed."""
    config.mdx_configs["toc"]["slugify"] = slugify(case="lower")
    if _is_chinese(config) and not find_spec("jieba"):
        config.plugins["material/search"].config["separator"] = (
            r"[\s\-]+|(?=[\u4e00-\u9fff])|(?<=[\u4e00-\u9fff])"
        )
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages from outside docs/; keep one language."""
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            copy = _copy_of(path, path.relative_to(ROOT).as_posix(), config)
            copy.inclusion = InclusionLevel.NOT_IN_NAV if "*" in pattern else InclusionLevel.INCLUDED
            files.append(copy)
    for file in [file for file in files if file.src_uri.startswith("zh/")]:
        files.remove(file)
        if _is_chinese(config):
            place = file.src_uri.removeprefix("zh/")
            if original := files.get_file_from_path(place):
                files.remove(original)
            files.append(_copy_of(ROOT / "docs" / file.src_uri, place, config))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn the repository's links into the site's."""
    parts = FENCE.split(markdown)
    parts[::2] = [LINK.sub(lambda link: _rewritten(link, page, config, files), part) for part in parts[::2]]
    return "".join(parts)


def on_post_page(output: str, *, page: Page, config: MkDocsConfig) -> str:
    """Make the language switch stay on the page.

    The theme supports only one site, so its links are replaced here.
    """
    root = posixpath.relpath(".", page.url or ".") + ("/.." if _is_chinese(config) else "")
    for entry, folder in zip(config.extra["alternate"], ("", "zh/"), strict=True):
        output = output.replace(entry["link"], f"{root}/{folder}{page.url}")
    return output


def _is_chinese(config: MkDocsConfig) -> bool:
    return config.theme.get("language") == "zh"


def _copy_of(path: Path, place: str, config: MkDocsConfig) -> File:
    return File.generated(config, place, abs_src_path=str(path))


def _rewritten(link: re.Match[str], page: Page, config: MkDocsConfig, files: Files) -> str:
    image, text, target = link.groups()
    name, hash_sign, anchor = target.partition("#")
    if not name or "://" in name or name.startswith("mailto:"):
        return link[0]
    here = Path(str(page.file.abs_src_path)).relative_to(ROOT)
    path = posixpath.normpath(posixpath.join(here.parent.as_posix(), name))
    if not (ROOT / path).exists():
        log.warning("%s links to %s, which does not exist", here, path)
        return link[0]
    place = path.removeprefix("docs/").removeprefix("zh/")
    translates = (
        place == here.as_posix().removeprefix("docs/").removeprefix("zh/") and path != here.as_posix()
    )
    if translates or (path.startswith("docs/zh/") and not _is_chinese(config)):
        up = posixpath.relpath(".", page.url or ".") + ("/.." if _is_chinese(config) else "/zh")
        url = File(place, config.docs_dir, config.site_dir, config.use_directory_urls).url
        return f"{image}[{text}]({posixpath.join(up, url)}{hash_sign}{anchor})"
    is_page = path.startswith("docs/") or any(Path(path).match(pattern) for pattern in OUTSIDE)
    if is_page and files.get_file_from_path(place):
        relative = posixpath.relpath(place, posixpath.dirname(page.file.src_uri))
        return f"{image}[{text}]({relative}{hash_sign}{anchor})"
    return text
