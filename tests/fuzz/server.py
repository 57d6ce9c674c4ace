"""A process that has everything imported, and forks one child for each case.

Quick, and no case sees another's state.

One case a line comes in by a pipe, one JSON answer a line goes out by another.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from functools import partial
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any, NoReturn

from PIL import Image

from mindspeed_mm.registry import resolve

CPU_SECONDS = 20
WALL_SECONDS = 90.0
STILL_SECONDS = 8.0  # without any CPU time: it waits for something that never comes
ADDRESS_SPACE = 3 << 30  # beyond what the server has mapped
MODULES = {
    "pretrain": "mindspeed_mm.tasks.pretrain",
    "extract": "mindspeed_mm.tasks.extract",
    "generate": "mindspeed_mm.tasks.generate",
    "convert": "checkpoint.cli",
    "inspect": "mindspeed_mm.tools.inspect_samples",
    "plan": "mindspeed_mm.tasks.plan",
    "prepare": "mindspeed_mm.tasks.prepare",
    "import": "mindspeed_mm.tasks.data_import",
    "eval": "mindspeed_mm.tasks.evaluate",
}
_PARSERS = {
    "pretrain": "mindspeed_mm.tasks.jobs.pretrain:job_parser",
    "extract": "mindspeed_mm.tasks.jobs.extract:job_parser",
    "generate": "mindspeed_mm.tasks.jobs.generate:job_parser",
    "plan": "mindspeed_mm.tasks.jobs.plan:plan_parser",
    "import": "mindspeed_mm.tasks.data_import:import_parser",
}
_ALSO = (
    *("mindspeed_mm.tasks.assembly", "mindspeed_mm.tasks.extraction", "mindspeed_mm.tasks.generate_videos"),
    *(
        "mindspeed_mm.training.trainer",
        "checkpoint.convert",
        "mindspeed_mm.tools.sheets",
        "torch.distributed.checkpoint",
    ),
    *("tests.fuzz.world", "torch._dynamo", "decord", "megatron.core", "torch.utils.tensorboard"),
    *("av", "einops._torch_specific", "pydantic.type_adapter", "torch.utils.serialization"),
    *("checkpoint.dcp", "checkpoint.lora", "encodings.utf_8_sig", "PIL.ImageSequence"),
)


def main() -> None:
    """Serve until the pipes of cases end.

    argv: the folder of the world, which is made where it is missing, and for each server the descriptors that
    it reads cases from and writes answers to.
    """
    root = Path(sys.argv[1])
    pipes = [tuple(map(int, pair.split(","))) for pair in sys.argv[2:]]
    os.dup2(2, 1)  # what a command prints goes elsewhere
    for name in (*MODULES.values(), *_ALSO):
        import_module(name)
    import torch

    torch.set_num_threads(1)
    Image.init()
    extract: Any = import_module("mindspeed_mm.tasks.extract")
    extract.check_manifest = partial(
        extract.check_manifest, workers=0
    )  # no processes: the limits are this one's
    gc.collect()
    gc.freeze()  # a child's collector would copy every page of what is imported
    if not (root / "world").exists():
        _wait(_fork(partial(_make_world, root)), 600)
    mine = next((pair for pair in pipes[1:] if not os.fork()), pipes[0])
    for descriptor in {number for pair in pipes for number in pair} - set(mine):
        os.close(descriptor)
    with os.fdopen(mine[0]) as cases, os.fdopen(mine[1], "w", buffering=1) as answers:
        answers.write(json.dumps({"ready": (root / "world").exists()}) + "\n")
        for number, line in enumerate(cases):
            answers.write(json.dumps(_run(root, json.loads(line), f"{os.getpid()}-{number}")) + "\n")


def _make_world(root: Path) -> None:
    from tests.fuzz.world import make_world

    making = root / "making" / "world"
    making.parent.mkdir(parents=True)
    make_world(making)
    making.rename(root / "world")


def _run(root: Path, case: list[Any] | str, name: str) -> dict[str, Any]:
    """Run one case in a child process. Return its exit code, output and results."""
    folder = root / "a" / "b" / "c" / name  # deep: a path that leads up must not leave `root`
    shutil.copytree(root / "world", folder, symlinks=True, copy_function=os.link)
    report, errors = folder.with_suffix(".result"), folder.with_suffix(".err")
    started = time.monotonic()
    child = _fork(partial(_case, folder, case, report, errors))
    code, usage = _wait(child, WALL_SECONDS)
    answer = {
        "code": code,
        "seconds": round(time.monotonic() - started, 2),
        "peak": usage.ru_maxrss << 10,
        "errors": errors.read_text(errors="replace")[-20_000:] if errors.exists() else "",
        "pwned": any(path.exists() for path in (folder / "pwned", root / "pwned")),
        "left": sorted(str(path.relative_to(folder)) for path in folder.rglob("*.tmp")),
        "result": json.loads(report.read_text()) if report.exists() else {},
    }
    shutil.rmtree(folder)
    report.unlink(missing_ok=True)
    errors.unlink(missing_ok=True)
    return answer


def _fork(work: partial[None]) -> int:
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        os.setsid()
        work()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    _leave(code)


def _leave(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _wait(child: int, seconds: float) -> tuple[int, resource.struct_rusage]:
    """Return the exit code (negative for a signal) and the resources used.

    A process that hangs or takes too long is killed.
    """
    deadline = time.monotonic() + seconds
    pause, ticks, moved = 0.002, -9, time.monotonic()
    while True:
        found, status, usage = os.wait4(child, os.WNOHANG)
        if found:
            break
        now = time.monotonic()
        if (
            pause >= 0.05 and (used := _ticks(child)) > ticks + 5
        ):  # a helper thread that wakes up is no progress
            ticks, moved = used, now
        if now > deadline or now > moved + STILL_SECONDS:
            os.killpg(child, signal.SIGKILL)
            _, status, usage = os.wait4(child, 0)
            break
        time.sleep(pause)
        pause = min(0.05, pause * 1.5)
    return os.waitstatus_to_exitcode(status), usage


def _ticks(pid: int) -> int:
    """CPU time of a process and of the children that it has waited for."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return sum(map(int, fields[11:15]))


def _case(folder: Path, case: list[Any] | str, report: Path, errors: Path) -> None:
    """In the child: damage, limits, the command, its results."""
    from tests.fuzz.cases import ARGV, mutator_of
    from tests.fuzz.entries import ENTRIES
    from tests.fuzz.flags import FLAGS

    os.chdir(folder)
    entry_name, target, mutator, seed = (case, None, None, 0) if isinstance(case, str) else case
    entry = ENTRIES[entry_name]
    words, meant = list(entry.argv), False
    try:
        if target == ARGV:
            (change,) = [flag for flag in FLAGS if flag.__name__ == mutator]
            words = change(Random(seed), words, known_flags(entry.command))
        elif target is not None:
            meant = bool(mutator_of(mutator)(Random(seed), Path(target)))
    except Exception as error:  # this damage does not fit this file
        report.write_text(json.dumps({"unfit": f"{type(error).__name__}: {error}"}))
        return
    report.write_text(json.dumps({"meant": meant}))
    for number, name in ((1, os.devnull), (2, str(errors))):
        stream = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(stream, number)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + ADDRESS_SPACE,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 2))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    import_module(MODULES[entry.command]).main(words)
    try:
        digest = entry.digest()
    except OSError as error:  # a flag may have sent the result elsewhere
        digest = {"missing": f"{type(error).__name__}: {error}"}
    report.write_text(json.dumps({"meant": meant, "digest": digest}))


def known_flags(command: str) -> list[str]:
    """Every flag of a command."""
    if command == "convert":
        return [
            "--cfg.source_path",
            "--cfg.target_path",
            "--cfg.dtype",
            "--cfg.verify",
            "--cfg.target_parallel_config.pp_layers",
            "--cfg",
            "--config",
        ]
    if command not in _PARSERS:
        return [
            "--index",
            "--out",
            "--data-config",
            "--vae",
            "--decode-frames",
            "--skip-bad-samples",
            "--workers",
        ]
    parser: Any = resolve(_PARSERS[command])()
    options = [option for action in parser._actions for option in action.option_strings]
    return [
        option
        for option in options
        if option.startswith("--") and option not in ("--help", "--version", "--calibrate")
    ]


if __name__ == "__main__":
    main()
