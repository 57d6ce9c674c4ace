"""Random kills.

Signals at random moments to random processes of training, extraction, generation and conversion.

    PYTHONPATH=. python benchmarks/kills.py --kills 100 --seed 0

Tiny jobs, started as users start them. A job is killed a few times, started again after each, and at last
left to its end. After every kill: processes of the job that are left ten seconds later (0 is right), and
results that were whole before it and cannot be read after it (0). At the job's end: whether its results equal
those of a run that nobody disturbed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

from mindspeed_mm.data.probe import probe
from mindspeed_mm.log import get_logger, setup_logging
from mindspeed_mm.models.weights import open_weights
from tests.support.runs import free_port

LOGGER = get_logger("benchmarks.kills")
ROOT = Path(__file__).resolve().parents[1]
MARK = "KILL_BENCHMARK"
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
ORPHAN_SECONDS = 10.0
STEPS = 120
Digest = dict[str, object]


@dataclass
class Job:
    """A command, how far it has come, and what it has made."""

    name: str
    command: Sequence[str]
    env: dict[str, str]
    out: Path
    done: Callable[[Path], int]  # units of work that can be counted on disk
    units: int  # at the end
    digest: Callable[[Path], Digest]
    whole: Callable[[Path], Digest]  # what is complete now, and what it holds
    resume: dict[str, str] = field(default_factory=dict)  # environment of a run that resumes


def tensors(values: dict[str, torch.Tensor]) -> int:
    """A number that changes with any bit."""
    return hash(
        tuple(
            (name, values[name].contiguous().view(torch.uint8).numpy().tobytes()) for name in sorted(values)
        )
    )


def weights(folder: Path) -> int:
    """All weights of a checkpoint."""
    source = open_weights(folder)
    return tensors({name: source.read(name) for name in source.shapes})


def make_jobs(world: Path, out: Path) -> list[Job]:
    """The four commands on the tiny world."""
    python = sys.executable
    common = {"NPUS_PER_NODE": "2", "LOG_DIR": str(out / "logs"), "MINDSPEED_MM_DEVICE": "cpu"}
    recipe = {
        "MM_DATA": "feature_data.json",
        "MM_MODEL": "pretrain_model.json",
        "FSDP2_CONFIG": "fsdp2_config.yaml",
        "NUM_WORKERS": "1",
        "TRAIN_ITERS": str(STEPS),
        "SAVE_INTERVAL": "10",
        "SAVE_PATH": str(out / "training"),
        "LR": "1e-3",
    }
    clips = {"MM_DATA": "many.json", "MM_MODEL": "model.json", "MM_TOOL": "tools.json", "NUM_WORKERS": "1"}
    generate = str(ROOT / "examples/vace/inference/Wan-VACE-Inference.py")
    return [
        Job(
            "training",
            ["bash", str(ROOT / "examples/vace/1.3B/pretrain_fsdp.sh")],
            {**common, **recipe},
            out / "training",
            _iterations,
            STEPS,
            _trained,
            _checkpoints,
            {"LOAD": str(out / "training")},
        ),
        Job(
            "extraction",
            [
                "bash",
                str(ROOT / ("examples/vace/feature_extract/feature_extraction.sh")),
                "--save-path",
                str(out / "extraction"),
            ],
            {**common, **clips},
            out / "extraction",
            _features,
            12,
            _listed,
            _feature_files,
        ),
        Job(
            "generation",
            [python, generate, ("many_videos.json"), "--output-path", str(out / "generation")],
            common,
            out / "generation",
            _videos,
            6,
            _made,
            _video_files,
        ),
        Job(
            "conversion",
            [
                "mm-convert",
                "VACEConverter",
                "hf_to_mm",
                "--cfg.source_path=weights",
                (f"--cfg.target_path={out / 'conversion'}"),
            ],
            common,
            out / "conversion",
            lambda folder: int((folder / ("latest_checkpointed_iteration.txt")).exists()),
            1,
            _converted,
            _converted,
        ),
    ]


def _iterations(folder: Path) -> int:
    with suppress(OSError, ValueError, IndexError):
        return int(json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["iteration"])
    return 0


def _trained(folder: Path) -> Digest:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = {row["iteration"]: (row["loss"], row["grad_norm"], row["consumed_samples"]) for row in rows}
    return {"losses": losses, "rows": len(rows), "weights": weights(folder / f"iter_{STEPS:07d}")}


def _checkpoints(folder: Path) -> Digest:
    tracker = folder / "latest_checkpointed_iteration.txt"
    latest = int(tracker.read_text()) if tracker.exists() else 0
    found = sorted(path for path in folder.glob("iter_*") if int(path.name[5:]) <= latest)
    return {path.name: weights(path) for path in found}


def _features(folder: Path) -> int:
    return len(list(folder.glob("features/*.safetensors")))


def _feature_files(folder: Path) -> Digest:
    return {path.name: tensors(load_file(path)) for path in sorted(folder.glob("features/*.safetensors"))}


def _listed(folder: Path) -> Digest:
    rows = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    return {str(place): tensors(load_file(folder / row["file"])) for place, row in enumerate(rows)}


def _videos(folder: Path) -> int:
    return len(list(folder.glob("*.mp4")))


def _video_files(folder: Path) -> Digest:
    return {path.name: probe(path).num_frames for path in sorted(folder.glob("*.mp4"))}


def _made(folder: Path) -> Digest:
    """Latents to the bit, and frame counts."""
    latents = {
        str(path.parent.name): tensors(load_file(path))
        for path in sorted(folder.glob("*/latents.safetensors"))
    }
    return latents | _video_files(folder)


def _converted(folder: Path) -> Digest:
    for _ in range(100):
        if not (folder / "latest_checkpointed_iteration.txt").exists():
            return {}
        with suppress(FileNotFoundError):  # the converter puts a new folder in its place just now
            return {"weights": weights(folder)}
        time.sleep(0.02)
    raise FileNotFoundError(folder)


def prepare(world: Path) -> None:
    """The tiny world of the fuzzer, with more clips and more videos."""
    make = (
        f"from pathlib import Path; from tests.fuzz.world import make_world; make_world(Path({str(world)!r}))"
    )
    subprocess.run([sys.executable, "-c", make], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    rows = [
        {"video": name, "cap": f"the ball {number}"}
        for number in range(6)
        for name in ("wide.mp4", "plain.mp4")
    ]
    (world / "clips/many.json").write_text(json.dumps(rows))
    (world / "many.txt").write_text("clips,clips/many.json\n")
    data = json.loads((world / "data.json").read_text())
    data["dataset_param"]["basic_parameters"]["data_path"] = "many.txt"
    (world / "many.json").write_text(json.dumps(data))
    request = json.loads((world / "inference.json").read_text())
    request["tasks"] = [{**request["tasks"][0], "name": f"v{number}", "seed": number} for number in range(6)]
    (world / "many_videos.json").write_text(json.dumps({**request, "steps": 6}))


def start(job: Job, world: Path, mark: str, log: Path, *, again: bool) -> subprocess.Popen[bytes]:
    """Start the command in its own session."""
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        **job.env,
        MARK: mark,
        "MASTER_PORT": free_port(),
    }
    if again and _checkpointed(job):
        env.update(job.resume)
    with open(log, "ab") as stream:
        return subprocess.Popen(
            job.command,
            cwd=world,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )


def _checkpointed(job: Job) -> bool:
    return (job.out / "latest_checkpointed_iteration.txt").exists()


def processes(mark: str) -> dict[int, str]:
    """Map the pid of every process of a job to its kind, found in a variable of its environment."""
    words, parents = {}, {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with suppress(OSError):
            if f"{MARK}={mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                state, parent = (entry / "stat").read_text().rsplit(")", 1)[1].split()[:2]
                if state != "Z":
                    words[int(entry.name)] = (
                        (entry / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
                    )
                    parents[int(entry.name)] = int(parent)
    # a reader of torch's loader is a fork: it has the command line of its rank
    return {pid: "reader" if text == words.get(parents[pid]) else _kind(text) for pid, text in words.items()}


def _kind(words: str) -> str:
    """What a process is, by its command line."""
    if "resource_tracker" in words:
        return "other"
    if "forkserver" in words or "spawn_main" in words:
        return "reader"
    if "mindspeed_mm.tools.launch" in words or "torchrun" in words:
        return "launcher"
    if "bash" in words.split(" ", 1)[0]:
        return "script"
    if "mm-convert" in words:
        return "converter"
    return (
        "rank"
        if any(name in words for name in ("pretrain_vace", "get_vace_feature", "Wan-VACE"))
        else "other"
    )


@dataclass
class Kill:
    """One kill and what came after it."""

    job: str
    kind: str
    signal: str
    orphans: int = 0
    lost: int = 0
    seconds: float = 0.0  # from the kill until every process was gone
    code: int | None = None


def disturb(
    job: Job, world: Path, rng: random.Random, log: Path, number: int, typical: float, *, again: bool
) -> Kill | None:
    """Start, wait for a random moment, kill one process, look. None: the job ended first."""
    mark = f"{os.getpid()}-{number}"
    process = start(job, world, mark, log, again=again)
    try:
        if not _wait_for_moment(job, process, rng, typical):
            return None
        before = job.whole(job.out)
        victims = processes(mark)
        if not victims:
            return None
        kind = rng.choice(sorted(set(victims.values()) - {"other"}) or ["other"])
        victim = rng.choice([pid for pid, found in victims.items() if found == kind])
        number_sent = rng.choice(SIGNALS)
        kill = Kill(job.name, kind, number_sent.name)
        with suppress(ProcessLookupError):
            os.kill(victim, number_sent)
        _wait_for_end(kill, process, mark, job)
        after = job.whole(job.out)
        kill.lost = sum(after.get(name) != held for name, held in before.items())
        return kill
    finally:
        for pid in processes(mark):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def _wait_for_moment(job: Job, process: subprocess.Popen[bytes], rng: random.Random, typical: float) -> bool:
    """Some kills come while the job starts, most after a unit of work."""
    if rng.random() < 0.25:
        with suppress(subprocess.TimeoutExpired):
            process.wait(rng.uniform(0.2, typical))
        return process.poll() is None
    target = min(job.units, job.done(job.out) + rng.randint(0, max(1, job.units // 2)))
    deadline = time.monotonic() + 20 * typical + 60
    while process.poll() is None and job.done(job.out) < target and time.monotonic() < deadline:
        time.sleep(0.02)
    with suppress(subprocess.TimeoutExpired):
        process.wait(rng.uniform(0, 0.5))
    return process.poll() is None


def _wait_for_end(kill: Kill, process: subprocess.Popen[bytes], mark: str, job: Job) -> None:
    """Ten seconds for all processes, unless the job continues.

    What only a reader lost, or hears no signal for, it may survive.
    """
    killed = time.monotonic()
    while processes(mark) and time.monotonic() - killed < ORPHAN_SECONDS:
        process.poll()
        time.sleep(0.1)
    left = processes(mark)
    if left and process.poll() is None and kill.kind == "reader":
        process.wait(600)  # the row is read again by another reader
        time.sleep(1)
        left = processes(mark)
    if not left:
        process.wait(5)  # it may be a zombie for a moment
    kill.orphans, kill.seconds, kill.code = len(left), round(time.monotonic() - killed, 1), process.poll()


def main() -> None:
    """Run the kills and print the tables."""
    setup_logging()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", nargs="*", default=["training", "extraction", "generation", "conversion"])
    parser.add_argument("--chain", type=int, default=4, help="kills of one job before it is left to its end")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), arguments)


def run(folder: Path, arguments: argparse.Namespace) -> None:
    """Reference runs, then kills until there are enough."""
    for number in SIGNALS[
        1:
    ]:  # a background shell, and nohup, leave some of them ignored, which jobs would inherit
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    world, out, log = folder / "world", folder / "out", folder / "log.txt"
    prepare(world)
    jobs = [job for job in make_jobs(world, out) if job.name in arguments.jobs]
    rng = random.Random(arguments.seed)
    references, typical = {}, {}
    for job in jobs:
        began = time.monotonic()
        _finish(job, world, log, again=False)
        typical[job.name] = time.monotonic() - began
        references[job.name] = job.digest(job.out)
        shutil.rmtree(job.out)
    kills: list[Kill] = []
    unequal: list[str] = []
    chains = 0
    while len(kills) < arguments.kills:
        job = jobs[chains % len(jobs)]
        chains += 1
        log.write_bytes(b"")
        mine: list[Kill] = []
        for _ in range(2 * arguments.chain):
            kill = disturb(
                job, world, rng, log, chains * 100 + len(mine) + _, typical[job.name], again=bool(mine)
            )
            mine += [kill] if kill else []
            if kill:
                LOGGER.info("%d %s", len(kills) + len(mine), kill)
            if len(mine) == arguments.chain or (kill is None and mine):
                break
        kills += mine
        try:
            _finish(job, world, log, again=True)
            found = job.digest(job.out)
            different = [key for key, value in references[job.name].items() if found.get(key) != value]
        except Exception as error:
            different = [f"{type(error).__name__}: {error}"]
        if different or any(kill.orphans or kill.lost for kill in mine):
            kept = Path(tempfile.gettempdir()) / f"kills-{job.name}-{arguments.seed}-{chains}.log"
            shutil.copy(log, kept)
            LOGGER.info("%s: differs in %s; %s", job.name, different, kept)
        unequal += [f"{job.name}: {', '.join(different)}"] if different else []
        shutil.rmtree(job.out, ignore_errors=True)
    report(kills, unequal, chains)


def _finish(job: Job, world: Path, log: Path, *, again: bool) -> None:
    """Leave a run to its end."""
    process = start(job, world, f"{os.getpid()}-end", log, again=again)
    code = process.wait(900)
    if code:
        raise RuntimeError(f"{job.name} ended with {code}: {log.read_text(errors='replace')[-600:]}")


def report(kills: Sequence[Kill], unequal: Sequence[str], chains: int) -> None:
    """A table of kinds and signals, and the three numbers."""
    LOGGER.info(
        "| job | process | signal | kills | orphans | lost | slowest end, s | exit codes |\n|-|-|-|-|-|-|-|-|"
    )
    for key in sorted({(kill.job, kill.kind, kill.signal) for kill in kills}):
        group = [kill for kill in kills if (kill.job, kill.kind, kill.signal) == key]
        codes = sorted({str(kill.code) for kill in group})
        sums = (len(group), sum(kill.orphans for kill in group), sum(kill.lost for kill in group))
        LOGGER.info(
            "| %s |",
            " | ".join(map(str, (*key, *sums, max(kill.seconds for kill in group), ", ".join(codes)))),
        )
    LOGGER.info(
        "%d kills: %d orphans, %d lost, %d of %d resumed jobs unequal %s",
        len(kills),
        sum(kill.orphans for kill in kills),
        sum(kill.lost for kill in kills),
        len(unequal),
        chains,
        list(unequal),
    )


if __name__ == "__main__":
    main()
