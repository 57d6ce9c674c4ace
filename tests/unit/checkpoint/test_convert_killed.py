"""A conversion that is killed leaves the target old or absent, and what it wrote is read back."""

from __future__ import annotations

import json
import os
import random
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from checkpoint import layout, write
from checkpoint.cli import main
from checkpoint.layout import staging
from mindspeed_mm.errors import LaunchError, WeightsError
from mindspeed_mm.locks import LOCK_FILE, Holder
from mindspeed_mm.models.containers.tensors import TensorFile
from mindspeed_mm.models.weights import open_weights
from tests.support.errors import names, raises
from tests.support.ranks import warm_processes
from tests.support.tiny import tiny_transformer, write_transformer

pytestmark = pytest.mark.medium


def convert_slowly(argv: list[str], steps: Connection) -> None:
    """Runs in its own process: writes are slow and reported, so that the test can kill it at any point."""

    def slowly(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            steps.send("step")
            time.sleep(0.02)
            return function(*args, **kwargs)

        return call

    def step(bar: Any, count: int) -> None:
        if bar.done % 7 == 0:
            slowly(lambda: None)()
        counted(bar, count)

    counted = write.Progress.step
    write.write_tracker = slowly(write.write_tracker)
    layout.os.rename = slowly(layout.os.rename)
    layout.os.replace = slowly(layout.os.replace)
    write.Progress.step = step
    steps.send("ready")
    main(argv)


def command(method: str, source: Path, target: Path, *more: str) -> list[str]:
    return [
        "VACEConverter",
        method,
        "--cfg.source_path",
        str(source),
        "--cfg.target_path",
        str(target),
        *more,
    ]


def state_of(target: Path, known: dict[str, str]) -> str:
    """`old`, `new` or `absent`; anything else fails."""
    try:
        found = open_weights(target)
    except WeightsError as error:
        where, problem = Path(error.where), error.problem
    else:
        return known[found.fingerprint()]
    is_partial = where.is_dir() and any(names(problem, word) for word in ("empty", "shards"))
    assert is_partial or not where.exists(), problem
    return "absent"


@pytest.mark.slow
@pytest.mark.parametrize(("method", "target"), [("hf_to_mm", "mm"), ("mm_to_hf", "hf"), ("mm_to_hf", "x.pt")])
def test_killed_at_any_moment_the_target_is_old_new_or_absent(
    tmp_path: Path, method: str, target: str
) -> None:
    known: dict[str, str] = {}
    sources = {}
    for name, seed in (("old", 0), ("new", 1)):
        write_transformer(tmp_path / name, tiny_transformer(seed), torch.float32)
        known[open_weights(tmp_path / name).fingerprint()] = name
        sources[name] = tmp_path / name
        if method != "hf_to_mm":
            main(command("hf_to_mm", tmp_path / name, tmp_path / f"{name}_mm"))
            sources[name] = tmp_path / f"{name}_mm"
    more = ["--cfg.max_shard_gb", "0.0003"] if target == "hf" else []
    chance, context = random.Random(0), warm_processes()
    seen = []
    for attempt in range(3):
        main(command(method, sources["old"], tmp_path / target, *more))
        ours, theirs = context.Pipe(duplex=False)
        argv = command(method, sources["new"], tmp_path / target, *more)
        process = context.Process(target=convert_slowly, args=(argv, theirs))
        process.start()
        theirs.close()
        steps = chance.randrange(0, 36) if attempt else 0  # about 26 are written before anything is moved
        with suppress(EOFError):
            while steps >= 0 and ours.recv():
                steps -= 1
        process.kill()
        process.join()
        seen.append(state_of(tmp_path / target, known))
    assert seen[0] == "old"
    main(command(method, sources["new"], tmp_path / target, *more))
    assert state_of(tmp_path / target, known) == "new"
    left = [path.name for path in (tmp_path, tmp_path / target) if path.is_dir() for path in path.glob(".*")]
    assert not left


def test_failed_conversion_leaves_the_target_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_transformer(tmp_path / "a", tiny_transformer(0), torch.float32)
    write_transformer(tmp_path / "b", tiny_transformer(1), torch.float32)
    main(command("hf_to_mm", tmp_path / "a", tmp_path / "mm"))
    before = open_weights(tmp_path / "mm").fingerprint()

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("checkpoint.write.write_torch", full)
    with pytest.raises(SystemExit):
        main(command("hf_to_mm", tmp_path / "b", tmp_path / "mm"))
    assert open_weights(tmp_path / "mm").fingerprint() == before
    assert not list((tmp_path / "mm").glob(".*"))


def test_what_is_written_is_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A disk that loses a bit is noticed, and nothing is moved into place."""
    write_transformer(tmp_path / "a", tiny_transformer(0), torch.float32)

    def lossy(path: Path, tensors: dict[str, TensorFile], **_: object) -> None:
        save_file({name: tensor.read() + 1 for name, tensor in tensors.items()}, path)

    main(command("hf_to_mm", tmp_path / "a", tmp_path / "mm"))
    monkeypatch.setattr("checkpoint.write.write_safetensors", lossy)
    with pytest.raises(SystemExit):
        main(command("mm_to_hf", tmp_path / "mm", tmp_path / "out"))
    error = capsys.readouterr().err
    assert error.startswith("WeightsError: ")
    assert "different" in error
    assert f"{tmp_path / 'out'}/" in error
    assert not (tmp_path / "out").exists()


def test_two_conversions_do_not_write_into_one_target(tmp_path: Path) -> None:
    for name, last in (("folder", "release"), ("x.pt", "")):
        with (
            staging(tmp_path, name, last=last),
            raises(LaunchError, os.getpid()),
            staging(tmp_path, name, last=last),
        ):
            pass
        assert list(tmp_path.iterdir()) == []


def test_two_files_of_one_folder_are_converted_immediately(tmp_path: Path) -> None:
    with staging(tmp_path, "x.pt") as first, staging(tmp_path, "y.pt") as second:
        assert first.is_dir()
        assert second.is_dir()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["x.pt", "y.pt"])
def test_next_conversion_removes_what_a_killed_one_left(tmp_path: Path, monkeypatch, name: str) -> None:
    said: list[str] = []
    for module in ("checkpoint.layout", "mindspeed_mm.locks", "mindspeed_mm.leftovers"):
        monkeypatch.setattr(f"{module}.logger.info", said.append)
    ended = subprocess.Popen(["true"])
    ended.wait()
    left = tmp_path / ".x.pt.mm-convert"
    (left / "new").mkdir(parents=True)
    (left / "new/x.pt").touch()
    holder = replace(Holder.this_process(), pid=ended.pid)
    (left / LOCK_FILE).write_text(json.dumps(asdict(holder)))
    (tmp_path / ".mine.mm-convert").mkdir()
    with staging(tmp_path, name) as folder:
        assert [path.name for path in folder.iterdir()] == [LOCK_FILE]
        assert sorted(path.name for path in tmp_path.iterdir()) == [".mine.mm-convert", f".{name}.mm-convert"]
    assert [path.name for path in tmp_path.iterdir()] == [".mine.mm-convert"]
    assert [line for line in said if "removed" in line]


@pytest.mark.parametrize("target", ["file/mm", "/proc/mm", "x" * 256, "file/x.pt", "folder.pt"])
def test_target_that_cannot_be_written_is_rejected_first(
    tmp_path: Path, monkeypatch, capsys, target: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(SystemExit):
        main(command("hf_to_mm", tmp_path / "missing", Path(target)))
    assert "target_path" in capsys.readouterr().err  # not the source
