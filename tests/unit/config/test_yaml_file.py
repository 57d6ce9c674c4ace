"""YAML is read as if it were JSON: no dates, no sexagesimal numbers, no key twice, no bomb of aliases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mindspeed_mm.config.yaml_file import read_yaml
from mindspeed_mm.errors import ConfigError
from tests.support.errors import raises


def read(tmp_path: Path, text: str) -> Any:
    path = tmp_path / "f.yaml"
    path.write_text(text, encoding="utf-8")
    return read_yaml(path)


def test_scalars_match_json(tmp_path: Path) -> None:
    values = read(
        tmp_path,
        "\ufeffa: 1:30\nb: 2024-13-45\nc: 2024-01-02\nd: 1e-4\ne: -1.5\nf: 8\ng: true\nh: 0\ni: null\n",
    )
    assert values == {
        "a": "1:30", "b": (
            "2024-13-45"
        ), "c": "2024-01-02", "d": 1e-4, "e": -1.5, "f": 8, "g": True, "h": 0, "i": None
    }  # fmt: skip


def test_anchors_and_merge_keys_stay_readable(tmp_path: Path) -> None:
    values = read(tmp_path, "base: &base {x: 1, y: 2}\nmine:\n  <<: *base\n  y: 3\n")
    assert values["mine"] == {"x": 1, "y": 3}


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("a: 1\nb: [1, 2\n", ":3"),
        ("a: 1\nb: 2\na: 3\n", "'a'"),
        ("a: .inf\n", "finite"),
        ("a: .nan\n", "finite"),
        ("a: " + "9" * 5000 + "\n", "digits"),
        ("[" * 5000 + "]" * 5000, "nested"),
        ("&a [*a]\n", "expand"),
        ("a: !!timestamp 2024-13-45\n", "YAML"),
        ("a: !!timestamp 2024-10-05\n", "date"),
        ("a: !!python/object/apply:os.system ['true']\n", ":1"),
        ("a: !!bool maybe\n", "YAML"),
        ("a: 1\n---\nb: 2\n", "document"),
        ('a: "\\ud800"\n', "surrogate"),
        ("? [a]\n: 1\n", "YAML"),
    ],
)
def test_values_json_cannot_hold_are_one_line(text: str, facts: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    assert facts in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bomb_of_aliases_is_rejected(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    with raises(ConfigError, "aliases"):
        read(tmp_path, "\n".join(lines))
