"""`vace init`: which files a project has, and that nothing of the user's is touched."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mindspeed_mm.errors import ConfigError
from mindspeed_mm.tools.project import MODELS, create, main
from tests.support.errors import raises

ROOT = Path(__file__).resolve().parents[3]


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("model", MODELS)
def test_project_holds_the_scripts_of_its_model_alone(tmp_path: Path, model: str) -> None:
    create(tmp_path / "project", [model])
    found = files(tmp_path / "project")
    assert {"pretrain_vace.py", "examples/vace/common.sh", "examples/vace/inference/generate.sh"} <= found
    for name, (folder, end) in MODELS.items():
        assert any(path.startswith(f"examples/vace/{folder}/") for path in found) == (name == model)
        if end:
            assert any(path.endswith(end) for path in found) == (name == model)
    assert not [path for path in found if "__pycache__" in path or "train_vae" in path]


def test_all_models_are_the_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(tmp_path / "project")])
    assert all((tmp_path / "project/examples/vace" / folder).is_dir() for folder, _ in MODELS.values())
    assert "A14B" in capsys.readouterr().out


def test_empty_folder_is_filled_and_a_full_one_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    create(tmp_path / "empty", ["1.3B"])
    before = files(tmp_path / "empty")
    with raises(ConfigError, "empty", where=str(tmp_path / "empty")):
        create(tmp_path / "empty", ["14B"])
    assert files(tmp_path / "empty") == before


def test_working_directory_can_be_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    main([".", "--model", "1.3B"])
    assert (tmp_path / "here/examples/vace/1.3B").is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_unknown_model_is_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path / "project"), "--model", "13B"])
    assert "1.3B" in capsys.readouterr().err
    assert not (tmp_path / "project").exists()


@pytest.mark.parametrize("model", MODELS)
def test_guide_of_a_project_names_existing_files(tmp_path: Path, model: str) -> None:
    create(tmp_path / "project", [model])
    guide = tmp_path / "project/examples/vace/README.md"
    text = guide.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)\s#]+)\)", text) if not link.startswith("http")]
    assert not [link for link in links if not (guide.parent / link).exists()]
    assert "quickstart" not in text
    assert "docs/guide/data.md" in text  # as text: it is a page of the repository
    assert text.count("```") == (ROOT / "examples/vace/README.md").read_text(encoding="utf-8").count("```")
