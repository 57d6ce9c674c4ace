"""Measure the cost of checksums when a checkpoint is saved and loaded, and when weights are read.

    python benchmarks/checksums.py                       # 1 GB in pieces of 16 MB, in a temporary folder
    python benchmarks/checksums.py --gigabytes 8 --folder /data/scratch --rounds 5

With and without alternate in each round, so that a busy machine slows both; the least time of each is
compared. Seconds are those of the process, in its own code and in the kernel, so that other programs on the
machine do not count; --wall counts the clock's.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from mindspeed_mm.data.features import read_feature, write_feature
from mindspeed_mm.data.sample import FeatureRecord
from mindspeed_mm.models.containers.checksums import verifying
from mindspeed_mm.models.loading import assign_weights, read_tensors
from mindspeed_mm.training.checkpoint_files import ChecksumWriter, IndexReader, TensorPlanner

_TOKENS = 200  # of the feature's prompt
_SHORT = 10  # rounds of what takes milliseconds, for each of the others


def main() -> None:
    """Print seconds with and without checksums, and what they add in percent, as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the checkpoint (10^9 bytes)")
    parser.add_argument("--megabytes", type=float, default=16.0, help="size of one tensor (10^6 bytes)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--folder", default=None, help="where to write (default: the system's temporary folder)"
    )
    parser.add_argument("--wall", action="store_true", help="seconds of the clock")
    arguments = parser.parse_args()
    clock = time.perf_counter if arguments.wall else time.process_time
    count, size = (
        max(1, round(1000 * arguments.gigabytes / arguments.megabytes)),
        int(arguments.megabytes * 1e6) // 4,
    )
    state = {"model": {f"w{n}": torch.randn(size) for n in range(count)}}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        sys.stdout.write(json.dumps(measure(Path(folder), state, arguments.rounds, clock), indent=2) + "\n")


def measure(
    folder: Path, state: dict[str, dict[str, torch.Tensor]], rounds: int, clock: Callable[[], float]
) -> dict[str, dict[str, float]]:
    """Seconds of saving and loading, with and without."""
    place = folder / "iter_0000001"
    target = {"model": {name: torch.zeros_like(value) for name, value in state["model"].items()}}
    weights = state["model"]
    torch.save(weights, folder / "x.pth")

    def save(on: bool) -> None:
        shutil.rmtree(place, ignore_errors=True)
        dcp.save(
            state, storage_writer=ChecksumWriter(place, 1) if on else FileSystemWriter(place), no_dist=True
        )

    def load(on: bool) -> None:
        with verifying(on):
            dcp.load(target, storage_reader=IndexReader(place), planner=TensorPlanner(), no_dist=True)

    def read(dtype: torch.dtype) -> Callable[[bool], None]:
        """As VAE and text encoder are loaded: converted, or mapped where the file has the model's dtype."""

        def work(on: bool) -> None:
            with torch.device("meta"):
                model = nn.ParameterDict(
                    {name: nn.Parameter(torch.empty_like(value)) for name, value in weights.items()}
                )
            with verifying(on):
                assign_weights(model, read_tensors([folder / "x.pth"]), folder / "x.pth", dtype)

        return work

    feature = folder / "feature.safetensors"
    write_feature(feature, _record(), {})
    published = folder / "feature.pt"
    torch.save({**load_file(feature), "prompt_mask": torch.ones(_TOKENS)}, published)

    def read_one(path: Path) -> Callable[[bool], None]:
        """As a training's batch is made: checked for what no feature has, and stacked."""

        def work(on: bool) -> None:
            found = read_feature(path, verify=on)
            torch.stack([found.latents]), torch.stack([found.vace_context])

        return work

    save(True)
    found = {
        "save": save,
        "load": load,
        "load .pth, converted": read(torch.bfloat16),
        "load .pth, mapped": read(torch.float32),
        "read a feature": read_one(feature),
        "read a .pt feature": read_one(published),
    }
    return {
        name: compare(work, rounds * (_SHORT if "feature" in name else 1), clock)
        for name, work in found.items()
    }


def _record() -> FeatureRecord:
    """Of 81 frames at 832x480: latents and context in bf16, 29 MB, and a prompt."""
    latents = torch.randn(112, 21, 60, 104)
    return FeatureRecord(
        latents=latents[:16],
        vace_context=latents[16:],
        prompt_embeds=(torch.randn(_TOKENS, 4096),),
        num_refs=0,
        key="",
    )


def compare(work: Callable[[bool], None], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """The least time of `work(True)` and of `work(False)`."""
    least = {True: float("inf"), False: float("inf")}
    for _ in range(rounds):
        for on in (False, True):
            begin = clock()
            work(on)
            least[on] = min(least[on], clock() - begin)
    return {"with": least[True], "without": least[False], "percent": 100 * (least[True] / least[False] - 1)}


if __name__ == "__main__":
    main()
