"""docs/reference/json.md is what the schemas say, complete, and written without torch."""

import subprocess
import sys
from pathlib import Path

from mindspeed_mm.config.schema import Config
from mindspeed_mm.tools.json_reference import FILES, reference

ROOT = Path(__file__).resolve().parents[3]


def test_reference_page_is_current():
    page = ROOT / "docs/reference/json.md"
    assert page.read_text(encoding="utf-8") == reference(), (
        "run: python -m mindspeed_mm.tools.json_reference docs/reference/json.md"
    )


def _schemas(schema):
    yield schema
    for field in schema.model_fields.values():
        for inner in _configs(field.annotation):
            yield from _schemas(inner)


def _configs(annotation):
    if isinstance(annotation, type):
        if issubclass(annotation, Config) and annotation is not Config:
            yield annotation
        return
    for inner in getattr(annotation, "__args__", ()):
        yield from _configs(inner)


def test_json_page_lists_every_key():
    page = reference()
    for _, _, parts in FILES:
        for _, top in parts:
            for schema in _schemas(top):
                for key in (*schema.model_fields, *schema.UNUSED):
                    assert f"`{key}`" in page, f"{schema.__name__}.{key}"


def test_page_is_written_without_torch():
    code = (
        "import sys; from mindspeed_mm.tools.json_reference import reference; reference(); sys.exit('torch' "
        "in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
