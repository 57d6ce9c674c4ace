"""The commands under attack.

What each is called with, which files decide its result, and what that result is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from mindspeed_mm.data.video import open_video
from tests.fuzz.world import CONVERT, EXTRACT, HAS_GGUF, TRAIN
from tests.support.tiny import TEXT_FILE, TOKENIZER_FOLDER, VAE_FILE

Digest = dict[str, str | list[float]]
_WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class Entry:
    """One command line, run in a copy of the world."""

    command: str
    argv: Sequence[str]
    inputs: Sequence[str]  # paths and patterns of what it reads; a fuzzed case damages one
    digest: Callable[[], Digest]  # what it made, in the working directory


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def _tensors(values: dict[str, torch.Tensor]) -> str:
    found = hashlib.blake2b(digest_size=8)
    for name in sorted(values):
        tensor = values[name].contiguous()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return found.hexdigest()


def _losses() -> Digest:
    rows = [json.loads(line) for line in Path("made/metrics.jsonl").read_text().splitlines()]
    keys = ("iteration", "loss", "grad_norm", "lr", "consumed_samples")
    return {"metrics": json.dumps([[row.get(key) for key in keys] for row in rows])}


def _features() -> Digest:
    rows = [json.loads(line) for line in Path("made/data.jsonl").read_text().splitlines()]
    found = {str(place): _tensors(load_file(Path("made") / row["file"])) for place, row in enumerate(rows)}
    return {**found, "null": _tensors(load_file("made/null_prompt.safetensors"))}


def _videos() -> Digest:
    """Latents to the bit, and what the frames look like."""
    found: Digest = {path.name: _means(path) for path in sorted(Path("made").glob("*.mp4"))}
    return found | {
        str(path): _tensors(load_file(path)) for path in sorted(Path("made").glob("*/latents.safetensors"))
    }


def _means(path: Path) -> list[float]:
    """Mean of every 16 x 16 pixels of every frame."""
    reader = open_video(path)
    frames = reader.read(range(reader.num_frames)).astype(float)
    count, height, width, _ = frames.shape
    blocks = frames.reshape(count, height // 16, 16, width // 16, 16, 3).mean((2, 4, 5))
    return [round(float(mean), 1) for mean in blocks.flatten()]


def _weights() -> Digest:
    found = {str(path): _tensors(load_file(path)) for path in sorted(Path("made").rglob("*.safetensors"))}
    for path in sorted(Path("made").rglob("*.pt")):
        found[str(path)] = _tensors(torch.load(path, weights_only=True)["model"])
    return found


def _prepared() -> Digest:
    """The list, and what the frames look like."""
    found: Digest = {"list": Path("made/data.json").read_text()}
    for path in sorted(Path("made/rows").rglob("src_*.m??")):
        found[str(path)] = _means(path)
    return found


def _imported() -> Digest:
    return {"list": Path("made/data.json").read_text()}


def _scores() -> Digest:
    report = json.loads(Path("videos/eval.json").read_text())
    return {"scores": json.dumps([row["scores"] for row in report["samples"]], sort_keys=True)}


def _sheet() -> Digest:
    return {"sheet": _hash(np.asarray(Image.open("made.png")).tobytes())}


def _nothing() -> Digest:
    return {}


def _with(argv: Sequence[str], *changes: str) -> tuple[str, ...]:
    """The same flags, some with other values, some added."""
    names = {change.partition("=")[0] for change in changes}
    return (*(word for word in argv if word.partition("=")[0] not in names), *changes)


_CLIPS = ("data.txt", "clips/data.json", "clips/*.mp4", "clips/*.png", "clips/masks/2.png")
_CODERS = (f"models/{VAE_FILE}", f"models/{TEXT_FILE}", f"models/{TOKENIZER_FOLDER}/*.json")
_TRUNK = ("weights/config.json", f"weights/{_WEIGHTS}")
_RECIPE = ("feature_data.json", "pretrain_model.json", "fsdp2_config.yaml", "tools.json")
_FEATURES = ("features/data.jsonl", "features/features/*.safetensors")
_POINT = tuple(
    f"save/{name}"
    for name in (
        "latest_checkpointed_iteration.txt",
        "iter_0000002/.metadata",
        "iter_0000002/__0_0.distcp",
        "iter_0000002/job.json",
    )
)
_TRAIN = _with(TRAIN, "--save=made", "--train-iters=2")

ENTRIES = {
    "check training": Entry(
        "pretrain", (*_TRAIN, "--dry-run", "--check-inputs"), (*_RECIPE, *_FEATURES, *_TRUNK), _nothing
    ),
    "train": Entry(
        "pretrain", _TRAIN, (*_RECIPE, *_FEATURES, ("features/null_prompt.safetensors"), *_TRUNK), _losses
    ),
    "train on .pt": Entry(
        "pretrain",
        _with(_TRAIN, "--mm-data=published_data.json"),
        ("published_data.json", "published/data.jsonl", "published/*.pt"),
        _losses,
    ),
    "resume": Entry("pretrain", _with(_TRAIN, "--load=save", "--train-iters=4"), _POINT, _losses),
    "check clips": Entry("extract", (*_with(EXTRACT, "--save-path=made"), "--dry-run"), _CLIPS, _nothing),
    "extract": Entry(
        "extract",
        _with(EXTRACT, ("--save-path=made")),
        ("data.json", "model.json", "tools.json", *_CLIPS, *_CODERS),
        _features,
    ),
    "check generation": Entry("generate", ("inference.json", "--dry-run"), ("inference.json",), _nothing),
    "generate": Entry(
        "generate",
        ("inference.json", "--output-path=made"),
        ("inference.json", "clips/control.mp4", "clips/mask.png", "clips/ref.png", *_TRUNK, *_CODERS),
        _videos,
    ),
    "generate prompts": Entry(
        "generate",
        ("inference.json", "--output-path=made", "--prompts-file=prompts.jsonl", "--steps=1"),
        ("prompts.jsonl",),
        _videos,
    ),
    "decode latents": Entry(
        "generate",
        ("inference.json", "--output-path=made", "--from-latents=videos/both/latents.safetensors"),
        ("videos/both/latents.safetensors", f"models/{VAE_FILE}"),
        _videos,
    ),
    "hf_to_mm": Entry("convert", _with(CONVERT, "--cfg.target_path=made"), _TRUNK, _weights),
    "hf_to_mm shards": Entry(
        "convert",
        _with(CONVERT, "--cfg.target_path=made", "--cfg.source_path=shards"),
        ("shards/*.json", "shards/*-00002-of-00003.safetensors"),
        _weights,
    ),
    "mm_to_hf": Entry(
        "convert",
        ("VACEConverter", "mm_to_hf", "--cfg.source_path=mm", "--cfg.target_path=made"),
        (
            "mm/latest_checkpointed_iteration.txt",
            ("mm/release/mp_rank_00/model_optim_rng.pt"),
            "mm/release/mp_rank_00/*.json",
        ),
        _weights,
    ),
    "checkpoint to hf": Entry(
        "convert",
        (
            "VACEConverter",
            "mm_to_hf",
            "--cfg.source_path=save",
            ("--cfg.base_path=weights"),
            "--cfg.target_path=made",
        ),
        (*_POINT, *_TRUNK),
        _weights,
    ),
    "dcp_to_torch": Entry(
        "convert",
        ("VACEConverter", "dcp_to_torch", "--cfg.source_path=save", "--cfg.target_path=made"),
        _POINT,
        _weights,
    ),
    "hf_to_mm fp8": Entry(
        "convert",
        _with(CONVERT, "--cfg.target_path=made", "--cfg.source_path=rounded/fp8_scaled.safetensors"),
        ("rounded/config.json", "rounded/fp8_scaled.safetensors"),
        _weights,
    ),
    "hf_to_mm comfy_quant": Entry(
        "convert",
        _with(CONVERT, "--cfg.target_path=made", "--cfg.source_path=rounded/comfy_quant.safetensors"),
        ("rounded/comfy_quant.safetensors",),
        _weights,
    ),
    "lora_to_comfyui": Entry(
        "convert",
        (
            "VACEConverter",
            "lora_to_comfyui",
            "--cfg.source_path=loras/diffusers-metadata.safetensors",
            "--cfg.base_path=weights",
            "--cfg.target_path=made/lora.safetensors",
        ),
        ("loras/diffusers-metadata.safetensors",),
        _weights,
    ),
    "generate with LoRAs": Entry(
        "generate",
        ("lora_inference.json", "--output-path=made"),
        ("lora_inference.json", "loras/kohya.safetensors", "loras/peft/*"),
        _videos,
    ),
    "train on clips": Entry(
        "pretrain",
        _with(_TRAIN, "--mm-data=raw_data.json", "--mm-model=raw_model.json"),
        ("raw_data.json", "raw_model.json", "recipe.yaml", *_CLIPS, *_CODERS),
        _losses,
    ),
    "plan": Entry("plan", (*_with(_TRAIN), "--devices=1"), ("feature_data.json", *_RECIPE[1:]), _nothing),
    "prepare": Entry(
        "prepare",
        ("--data=clips/data.json", "--recipe=recipe.yaml", "--out=made", "--num-workers=0"),
        ("recipe.yaml", "clips/data.json", "clips/*.mp4", "clips/*.png"),
        _prepared,
    ),
    "import": Entry("import", ("import", "clips/table.csv", "--out=made"), ("clips/table.csv",), _imported),
    "eval": Entry("eval", ("videos",), ("videos/both.json", "videos/both.mp4"), _scores),
    "inspect clips": Entry(
        "inspect",
        ("data.json", "--out=made.png", "--workers=0", ("--skip-bad-samples=0")),
        ("data.json", *_CLIPS),
        _sheet,
    ),
    "inspect rows": Entry(
        "inspect",
        ("clips/rows.jsonl", "--out=made.png", "--workers=0", "--index=1", ("--skip-bad-samples=0")),
        ("clips/rows.jsonl",),
        _sheet,
    ),
    "inspect features": Entry(
        "inspect",
        ("features/data.jsonl", "--out=made.png", "--index=0", (f"--vae=models/{VAE_FILE}")),
        _FEATURES,
        _sheet,
    ),
}

if HAS_GGUF:
    ENTRIES["hf_to_mm gguf"] = Entry(
        "convert",
        _with(CONVERT, "--cfg.target_path=made", "--cfg.source_path=rounded/q8.gguf"),
        ("rounded/q8.gguf",),
        _weights,
    )


def expand(entry: Entry, root: Path) -> list[str]:
    """The files of the world that decide what the command makes."""
    found = [str(path.relative_to(root)) for name in entry.inputs for path in sorted(root.glob(name))]
    return list(dict.fromkeys(found))
