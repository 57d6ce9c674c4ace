"""Clips a second of feature extraction against a plain loop over diffusers' VAE, in one run.

    python benchmarks/encode.py                                   # tiny VAE, 17 x 256 x 256, the CPU
    python benchmarks/encode.py --vae wan --frames 81 --height 480 --width 832 --dtype bf16 --device cuda

The plain loop is what one writes first: read a clip, encode video, inactive and reactive one after the other,
encode the caption, save. Both sides write the same tensors. Rounds of the two alternate, kind by kind, so
that a busy machine slows both; medians are shown. The mixture is the three kinds together, one clip of each.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from einops import rearrange
from safetensors.torch import save_file

from examples.vace.tiny.checkpoints import make_umt5, make_vae, randomize, write_tokenizer, write_umt5
from mindspeed_mm.accelerator import Accelerator
from mindspeed_mm.conditioning.extraction import DEFAULT_BATCH, Extraction, Seconds
from mindspeed_mm.conditioning.reading import FeatureKeys, ReadResult, ReadTask
from mindspeed_mm.conditioning.text import PromptCache
from mindspeed_mm.conditioning.vace import StreamEncoder
from mindspeed_mm.data.config import DataSource, VaceDatasetConfig, VideoConfig
from mindspeed_mm.data.dataset import VaceDataset
from mindspeed_mm.data.features import Finished
from mindspeed_mm.data.readahead import ReadAhead
from mindspeed_mm.data.sample import SampleRecord, VideoSample
from mindspeed_mm.data.transforms import load_sample
from mindspeed_mm.data.video_writer import write_video
from mindspeed_mm.models.umt5.encoder import TextEncoder, load_text_encoder
from mindspeed_mm.models.wan.vae import WanVae

KINDS = ("plain", "control", "inpaint")
SIDES = ("plain loop", "ours")
STAGES = ("read", "vae", "text", "write")


@dataclass
class Times:
    """Seconds of each round."""

    total: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)  # of this process, which a busy machine does not change
    stages: list[Seconds] = field(default_factory=list)

    def add(self, total: float, cpu: float, stages: Seconds) -> None:
        """One round."""
        self.total.append(total)
        self.cpu.append(cpu)
        self.stages.append(stages)

    def median(self) -> float:
        """Of whole rounds."""
        return float(statistics.median(self.total))

    def stage(self, name: str) -> float:
        """Median of one stage."""
        return float(statistics.median(getattr(stages, name) for stages in self.stages))


def make_clips(folder: Path, count: int, size: tuple[int, int, int]) -> dict[str, list[SampleRecord]]:
    """`count` clips of each kind, as mp4."""
    folder.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[SampleRecord]] = {kind: [] for kind in KINDS}
    for number in range(count * len(KINDS)):
        kind = KINDS[number % len(KINDS)]
        video = write_video(folder / f"{number}.mp4", _moving(number, size), 16)
        source = mask = None
        if kind == "control":
            source = write_video(folder / f"{number}_src.mp4", _moving(number + 1000, size), 16)
        if kind == "inpaint":
            frames = np.zeros((*size, 3), np.uint8)
            frames[:, size[1] // 4 : size[1] // 2, size[2] // 4 : size[2] // 2] = 255
            mask = write_video(folder / f"{number}_mask.mp4", frames, 16)
        rows[kind].append(
            SampleRecord(
                video=video,
                captions=(f"a red ball bounces in the snow {number}",),
                src_video=source,
                src_mask=mask,
                address=f"{kind}[{number}]",
                row=number,
            )
        )
    return rows


def _moving(seed: int, size: tuple[int, int, int]) -> np.ndarray:
    frames, height, width = size
    base = np.random.default_rng(seed).integers(
        0, 256, (height // 16 + 1, width // 16 + 1, 3), dtype=np.uint8
    )
    still = base.repeat(16, axis=0).repeat(16, axis=1)[:height, :width]
    return np.stack([np.roll(still, 3 * frame, axis=1) for frame in range(frames)])


def plain_loop(
    records: Sequence[SampleRecord], config: VideoConfig, vae: AutoencoderKLWan, text: TextEncoder, out: Path
) -> Seconds:
    """Read, encode three clips one by one, encode the caption, save.

    Nothing overlaps, nothing is remembered.
    """
    seconds = Seconds()
    mean = torch.tensor(vae.config.latents_mean, device=vae.device).view(1, 16, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std, device=vae.device).view(1, 16, 1, 1, 1)

    def encode(clip: torch.Tensor) -> torch.Tensor:
        latents = vae.encode(clip[None].to(vae.device, vae.dtype)).latent_dist.mode().float()
        return ((latents - mean) / std)[0]

    for record in records:
        with seconds.during("read"):
            sample = load_sample(record, config)
        with seconds.during("vae"), torch.no_grad():
            video, source, mask = _streams(sample)
            hard = (mask > 0.5).float()
            parts = [encode(source * (1 - hard)), encode(source * hard), _cells(mask).to(vae.device)]
            context = torch.cat(parts).to("cpu", torch.bfloat16)
            latents = encode(video).to("cpu", torch.bfloat16)
        with seconds.during("text"):
            prompt = text.encode(list(record.captions))[0].to("cpu", torch.bfloat16)
        with seconds.during("write"):
            tensors = {"video": latents, "vace_context": context, "prompt_ids": prompt}
            save_file(tensors, out / f"{record.row}.safetensors")
    return seconds


def _streams(sample: VideoSample) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    assert sample.video is not None
    mask = sample.src_mask if sample.src_mask is not None else torch.ones_like(sample.video[:1])
    return (
        sample.video,
        sample.src_video if sample.src_video is not None else torch.zeros_like(sample.video),
        mask,
    )


def _cells(mask: torch.Tensor) -> torch.Tensor:
    cells: torch.Tensor = rearrange(mask, "1 t (h py) (w px) -> 1 (py px) t h w", py=8, px=8)
    size = [(mask.shape[1] + 3) // 4, *cells.shape[-2:]]
    return torch.nn.functional.interpolate(cells, size=size, mode="nearest-exact")[0]


def build_models(
    args: argparse.Namespace, folder: Path, device: torch.device
) -> tuple[AutoencoderKLWan, WanVae, TextEncoder]:
    """A VAE of the requested size with random weights, for both sides, and a tiny text encoder."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    vae = make_vae() if args.vae == "tiny" else AutoencoderKLWan()
    if args.vae == "wan":
        randomize(vae, seed=0, scale=0.02)
    vae = vae.eval().requires_grad_(False).to(device, dtype)
    write_umt5(folder / "t5.pth", make_umt5())
    write_tokenizer(folder / "google/umt5-xxl")
    text = load_text_encoder(folder / "t5.pth", dtype=torch.float32, device=device, text_len=16)
    plain = copy.deepcopy(vae)  # as diffusers has it: WanVae tunes its model
    return plain, WanVae(vae, "random"), text


def measure(args: argparse.Namespace) -> dict[str, object]:
    """Alternate both sides over all kinds, and return the numbers."""
    accelerator = Accelerator.detect(args.device)
    accelerator.activate()
    if args.threads:
        torch.set_num_threads(args.threads)
    folder = Path(tempfile.mkdtemp(prefix="encode_bench_"))
    readers: ReadAhead[ReadTask, ReadResult] | None = None
    try:
        rows = make_clips(folder / "clips", args.clips, (args.frames, args.height, args.width))
        diffusers_vae, vae, text = build_models(args, folder, accelerator.device)
        video = VideoConfig(num_frames=args.frames, max_hxw=args.height * args.width)
        extraction = build_extraction(args, rows, video, vae, text, folder / "ours")
        readers = extraction.readers = extraction.read_ahead()
        list(
            readers.map([ReadTask(record, {}) for records in rows.values() for record in records])
        )  # start them
        times = {(kind, side): Times() for kind in KINDS for side in SIDES}
        for number in range(args.rounds + args.warm_up):
            for kind, records in rows.items():
                for side in SIDES if number % 2 else SIDES[::-1]:
                    accelerator.synchronize()
                    start, cpu = time.perf_counter(), time.process_time()
                    if side == "ours":
                        stages = _ours(extraction, records)
                    else:
                        stages = plain_loop(records, video, diffusers_vae, text, folder)
                    accelerator.synchronize()
                    if number >= args.warm_up:
                        times[kind, side].add(time.perf_counter() - start, time.process_time() - cpu, stages)
    finally:
        if readers is not None:
            readers.__exit__()
        shutil.rmtree(folder, ignore_errors=True)
    return _numbers(args, times, accelerator)


def build_extraction(
    args: argparse.Namespace,
    rows: dict[str, list[SampleRecord]],
    video: VideoConfig,
    vae: WanVae,
    text: TextEncoder,
    out: Path,
) -> Extraction:
    """Ours, with reading processes that live as long as the measurement.

    Starting them is no part of a clip's time.
    """
    config = VaceDatasetConfig(basic_parameters=DataSource(data_path="-"), preprocess_parameters=video)
    dataset = VaceDataset(config, [record for records in rows.values() for record in records])
    return Extraction(
        vae=StreamEncoder(vae, max_batch=args.encode_batch),
        text=PromptCache(text),
        keys=FeatureKeys(pixels=dataset.settings, vae={}, text={}),
        load=dataset.load,
        save_path=out,
        num_workers=args.num_workers,
    )


def _ours(extraction: Extraction, records: Sequence[SampleRecord]) -> Seconds:
    """One round from nothing: no features, no known contents, no remembered gray or captions."""
    shutil.rmtree(extraction.save_path, ignore_errors=True)
    extraction.vae = StreamEncoder(extraction.vae.vae, max_batch=extraction.vae.max_batch)
    extraction.text = PromptCache(extraction.text.text_encoder)
    extraction.seconds = Seconds()
    done = list(extraction.run(records))
    assert [row.fresh for row in done if isinstance(row, Finished)] == [True] * len(records)
    return extraction.seconds


def _numbers(
    args: argparse.Namespace, times: dict[tuple[str, str], Times], accelerator: Accelerator
) -> dict[str, object]:
    result: dict[str, object] = {
        "device": accelerator.device_name(),
        "torch": torch.__version__,
        "arguments": vars(args),
    }
    for kind in KINDS:
        result[kind] = _compared(args.clips, times[kind, SIDES[0]], times[kind, SIDES[1]])
    mixed = [_together([times[kind, side] for kind in KINDS]) for side in SIDES]
    result["mixture"] = _compared(args.clips * len(KINDS), *mixed)
    return result


def _compared(clips: int, plain: Times, ours: Times) -> dict[str, object]:
    ratios = [a / b for a, b in zip(plain.total, ours.total, strict=True)]
    return {
        "clips": clips,
        "plain_loop_clips_per_second": round(clips / plain.median(), 4),
        "ours_clips_per_second": round(clips / ours.median(), 4),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_of_each_round": [round(ratio, 3) for ratio in ratios],
        "ratio_of_cpu_seconds": round(statistics.median(plain.cpu) / statistics.median(ours.cpu), 3),
        "plain_loop_seconds_per_clip": {name: round(plain.stage(name) / clips, 4) for name in STAGES},
        "ours_seconds_per_clip": {name: round(ours.stage(name) / clips, 4) for name in STAGES},
    }


def _together(parts: Sequence[Times]) -> Times:
    """Round by round, the sum of several kinds."""
    total = Times()
    for row in zip(*(zip(part.total, part.cpu, part.stages, strict=True) for part in parts), strict=True):
        stages = Seconds(**{name: sum(getattr(seconds, name) for *_, seconds in row) for name in STAGES})
        total.add(sum(seconds for seconds, *_ in row), sum(cpu for _, cpu, _ in row), stages)
    return total


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--vae", choices=("tiny", "wan"), default="tiny", help="wan = the real size, random weights"
    )
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--height", type=int, default=256)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--clips", type=int, default=4, help="clips of each kind")
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds")
    parser.add_argument("--warm-up", type=int, default=1, help="rounds before those")
    parser.add_argument("--num-workers", type=int, default=1, help="processes that read ahead")
    parser.add_argument(
        "--encode-batch", type=int, default=DEFAULT_BATCH, help="clips that go through the VAE together"
    )
    parser.add_argument("--threads", type=int, help="torch's threads in this process")
    parser.add_argument("--device", choices=("cpu", "cuda", "npu"))
    sys.stdout.write(json.dumps(measure(parser.parse_args()), indent=1) + "\n")


if __name__ == "__main__":
    main()
