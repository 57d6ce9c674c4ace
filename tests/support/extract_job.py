"""A small dataset with every condition, tiny models in the official formats, and the JSONs that name them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from mindspeed_mm.data.video_writer import write_video
from tests.support.clips import numbered, write_clip
from tests.support.tiny import (
    TEXT_FILE,
    TOKENIZER_FOLDER,
    VAE_FILE,
    tiny_umt5,
    tiny_vae,
    write_tokenizer,
    write_umt5,
    write_vae,
)

ROWS = [
    {"video": "plain.mp4", "cap": "a red ball"},
    {"video": "wide.mp4", "cap": "a red ball", "src_video": "control.mp4"},
    {"video": "tall.mp4", "cap": ["a red ball", "雪, the snow"], "src_video_mask": "mask.png"},
    {"video": "wide.mp4", "cap": "in", "src_video": "control.mp4", "src_video_mask": "masks"},
    {"video": "plain.mp4", "cap": "a cat", "src_ref_images": ["ref.png", "ref 2.png"]},
    {"video": "plain.mp4", "cap": "a dog"},
]


def make_dataset(folder: Path) -> Path:
    """Nine frames of a few tokens each. Returns the data.txt."""
    folder.mkdir(parents=True)
    for name, height, width in (("plain", 32, 32), ("wide", 32, 64), ("tall", 64, 32), ("control", 48, 90)):
        write_clip(folder / f"{name}.mp4", 9, height=height, width=width)
    mask = np.zeros((64, 32), np.uint8)
    mask[10:30] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    (folder / "masks").mkdir()
    for number in range(9):
        Image.fromarray(np.roll(mask, number, axis=0)).save(folder / "masks" / f"{number}.png")
    rgba = np.full((20, 30, 4), 200, np.uint8)
    rgba[:, :15, 3] = 0
    Image.fromarray(rgba, "RGBA").save(folder / "ref.png")
    Image.fromarray(numbered(1)[0]).save(folder / "ref 2.png")
    (folder / "data.json").write_text(json.dumps(ROWS, ensure_ascii=False), encoding="utf-8")
    listing = folder.parent / "data.txt"
    listing.write_text(f"{folder},{folder / 'data.json'}\n", encoding="utf-8")
    return listing


def make_models(folder: Path) -> None:
    """VAE, text encoder and tokenizer, as one downloads them."""
    folder.mkdir(parents=True)
    write_vae(folder / VAE_FILE, tiny_vae())
    write_umt5(folder / TEXT_FILE, tiny_umt5())
    write_tokenizer(folder / TOKENIZER_FOLDER)


def make_job(root: Path, **preprocess) -> list[str]:
    """Everything under `root`; the flags that name it.

    Features go to `root`/out unless --save-path says otherwise.
    """
    if not (root / "models").exists():
        make_models(root / "models")
        make_dataset(root / "clips datası")
    data = {
        "dataset_param": {
            "basic_parameters": {"data_path": str(root / "data.txt")},
            "preprocess_parameters": {"num_frames": 9, "max_hxw": 2048, **preprocess},
            "tokenizer_config": {"model_max_length": 16},
        }
    }
    model = {
        "ae": {"from_pretrained": str(root / "models" / VAE_FILE), "dtype": "fp32"},
        "text_encoder": {"from_pretrained": str(root / "models" / TEXT_FILE), "dtype": "fp32"},
    }
    for name, values in (
        ("data", data),
        ("model", model),
        ("tools", {"sorafeature": {"save_path": str(root / "out")}}),
    ):
        (root / f"{name}.json").write_text(json.dumps(values))
    return [
        f"--mm-{name}={root / path}"
        for name, path in (("data", "data.json"), ("model", "model.json"), ("tool", "tools.json"))
    ]


def spoil(folder: Path) -> None:
    """Three rows more that cannot be read: cut off, no video at all, of another length."""
    whole = (folder / "plain.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "text.mp4").write_text("this is no video\n")
    write_video(folder / "short.mp4", numbered(3, 32, 32), 16)
    rows = [*ROWS, *({"video": name, "cap": "a"} for name in ("cut.mp4", "text.mp4"))]
    rows.append({"video": "plain.mp4", "cap": "a", "src_video": "short.mp4"})
    (folder / "data.json").write_text(json.dumps(rows), encoding="utf-8")
