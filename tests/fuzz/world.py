"""Every kind of file that the commands read, tiny, in one folder.

All paths in it are relative to that folder.
"""

from __future__ import annotations

import json
import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from checkpoint.cli import main as convert
from mindspeed_mm.tasks.extract import main as extract
from mindspeed_mm.tasks.generate import main as generate
from mindspeed_mm.tasks.pretrain import main as pretrain
from tests.support.clips import numbered, write_clip
from tests.support.lora_files import lora_matrices, write_lora
from tests.support.rounded_files import write_comfy_quant, write_fp8_scaled, write_gguf
from tests.support.runs import predictor_json, write_json
from tests.support.tiny import (
    TEXT_FILE,
    TOKENIZER_FOLDER,
    VAE_FILE,
    tiny_transformer,
    tiny_umt5,
    tiny_vae,
    write_shards,
    write_tokenizer,
    write_transformer,
    write_umt5,
    write_vae,
)

ROWS = [
    {"video": "wide.mp4", "cap": "a red ball", "src_video": "control.mp4", "src_video_mask": "masks"},
    {
        "video": "plain.mp4",
        "cap": ["a cat", "the snow"],
        "src_ref_images": ["ref.png"],
        "src_video_mask": "mask.png",
    },
]
RECIPE = {
    "seed": 3,
    "variants": 2,
    "tasks": {
        "inpainting_random": {"weight": 2, "options": {"references": {"integers": [0, 1]}}},
        "framerefext": {"shift": 2, "options": {"mode": {"choice": ["first", "last"]}}},
        "flat": {"task": "gray", "clips": ["*.mp4"], "loss_weight": 0.5},
    },
}
TABLE = """video,prompt,vace_video,vace_video_mask,vace_reference_image
wide.mp4,a red ball,control.mp4,masks,
plain.mp4,"a cat, asleep",,mask.png,ref.png
"""
HAS_GGUF = find_spec("gguf") is not None
CONVERT = ("VACEConverter", "hf_to_mm", "--cfg.source_path=weights", "--cfg.target_path=mm")
EXTRACT = ("--mm-data=data.json", "--mm-model=model.json", "--mm-tool=tools.json", "--num-workers=0")
TRAIN = (
    *("--mm-data=feature_data.json", "--mm-model=pretrain_model.json", "--mm-tool=tools.json"),
    *(
        "--fsdp2-config-path=fsdp2_config.yaml",
        "--save=save",
        "--micro-batch-size=1",
        "--global-batch-size=2",
    ),
    *("--num-workers=0", "--lr=1e-3", "--lr-decay-style=constant", "--log-interval=1", "--seed=7"),
)
INFERENCE = {
    "model": {"transformer": ["weights"], "vae": f"models/{VAE_FILE}", "text_encoder": f"models/{TEXT_FILE}"},
    "prompt": "a red ball",
    "negative_prompt": "dark",
    "output_path": "videos",
    "height": 48,
    "width": 48,
    "num_frames": 5,
    "fps": 16.0,
    "steps": 2,
    "seed": 3,
    "dtype": "fp32",
    "tiled": "never",
    "tasks": [{"name": "both", "video_path": (
        "clips/control.mp4"
    ), "mask_path": "clips/mask.png", "timing": "frames",
               "image_paths": ["clips/ref.png"]}],
}  # fmt: skip


def make_world(root: Path) -> None:
    """Fill `root`, which becomes the working directory.

    What a command needs of another's results, that command makes.
    """
    root.mkdir(parents=True)
    os.chdir(root)
    Path("zero").symlink_to("/dev/zero")
    _write_clips(Path("clips"))
    Path("models").mkdir()
    write_vae(Path("models") / VAE_FILE, tiny_vae())
    write_umt5(Path("models") / TEXT_FILE, tiny_umt5())
    write_tokenizer(Path("models") / TOKENIZER_FOLDER)
    write_transformer(Path("weights"), tiny_transformer(), torch.float32)
    Path("shards").mkdir()
    shutil.copy("weights/config.json", "shards/config.json")
    write_shards(Path("shards"), load_file("weights/diffusion_pytorch_model.safetensors"))
    write_configs()
    convert(CONVERT)
    extract([*EXTRACT, "--no-check-clips"])
    _number_features(Path("features"))
    _write_published_features(Path("published"))
    _write_loras(Path("loras"))
    _write_rounded_weights(Path("rounded"))
    pretrain([*TRAIN, "--train-iters=2", "--save-interval=1"])
    generate(["inference.json"])


def _write_clips(folder: Path) -> None:
    folder.mkdir()
    for name, width in (("plain", 32), ("wide", 64), ("control", 64)):
        write_clip(folder / f"{name}.mp4", 5, height=32, width=width)
    mask = np.zeros((32, 32), np.uint8)
    mask[10:20] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    (folder / "masks").mkdir()
    for number in range(5):
        Image.fromarray(np.roll(mask, number, axis=0)).save(folder / "masks" / f"{number}.png")
    Image.fromarray(numbered(1, 20, 30)[0]).save(folder / "ref.png")
    write_json(folder / "data.json", ROWS)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "table.csv").write_text(TABLE)
    Path("data.txt").write_text("# folder,list\nclips,clips/data.json\n")


def write_configs() -> None:
    preprocess = {"num_frames": 5, "max_hxw": 2048, "train_fps": 16}
    basic = {"data_path": "data.txt", "data_folder": None}
    source = {"basic_parameters": basic, "preprocess_parameters": preprocess}
    source["tokenizer_config"] = {"model_max_length": 16}
    write_json(Path("data.json"), {"dataset_param": source})
    write_json(Path("raw_data.json"), {"dataset_param": {**source, "synthesis": "recipe.yaml"}})
    write_json(Path("recipe.yaml"), RECIPE)
    ae = {"from_pretrained": f"models/{VAE_FILE}", "dtype": "fp32"}
    text = {"from_pretrained": f"models/{TEXT_FILE}", "dtype": "fp32"}
    write_json(Path("model.json"), {"ae": ae, "text_encoder": text})
    write_json(Path("tools.json"), {"sorafeature": {"save_path": "features"}, "profile": {"enable": False}})
    for name, folder in (("feature_data", "features"), ("published_data", "published")):
        basic = {"data_path": f"{folder}/data.jsonl", "data_folder": folder}
        write_json(
            Path(f"{name}.json"), {"dataset_param": {"dataset_type": "feature", "basic_parameters": basic}}
        )
    predictor = predictor_json(from_pretrained="weights", trainable="branch")
    diffusion = {"model_id": "wan_flow_match_scheduler", "shift": 5}
    training = {"task": "vace", "diffusion": diffusion, "predictor": predictor}
    write_json(Path("pretrain_model.json"), training)
    write_json(Path("raw_model.json"), {**training, "ae": ae, "text_encoder": text})
    Path("fsdp2_config.yaml").write_text(
        "sharding_size: auto\nsub_modules_to_wrap: ['blocks.{*}', 'vace_blocks.{*}']\nparam_dtype: fp32\n"
    )
    write_json(Path("inference.json"), INFERENCE)
    loras = ["loras/kohya.safetensors", {"path": "loras/peft", "strength": 0.5}]
    write_json(Path("lora_inference.json"), {**INFERENCE, "steps": 1, "loras": loras})
    Path("prompts.jsonl").write_text(
        '{"prompt": "a red ball", "name": "ball"}\n{"prompt": "a cat", "seed": 5}\n'
    )
    Path("prompts.txt").write_text("a red ball\na cat\n")


def _number_features(folder: Path) -> None:
    """Names that stay the same from one world to the next: a feature's own depends on the folder's."""
    lines = []
    for number, line in enumerate((folder / "data.jsonl").read_text().splitlines()):
        row = json.loads(line)
        (folder / row["file"]).rename(folder / "features" / f"{number}.safetensors")
        lines.append(json.dumps({**row, "file": f"features/{number}.safetensors"}) + "\n")
    (folder / "data.jsonl").write_text("".join(lines))


def _write_loras(folder: Path) -> None:
    folder.mkdir()
    write_lora("kohya", folder, lora_matrices("vace_blocks"))
    write_lora("peft", folder, lora_matrices("blocks", seed=4))
    write_lora("diffusers-metadata", folder, lora_matrices(seed=5))


def _write_rounded_weights(folder: Path) -> None:
    """The transformer as others hold it in 8 bits."""
    weights = load_file("weights/diffusion_pytorch_model.safetensors")
    folder.mkdir()
    shutil.copy("weights/config.json", folder)
    write_fp8_scaled(folder / "fp8_scaled.safetensors", weights)
    write_comfy_quant(folder / "comfy_quant.safetensors", weights)
    if HAS_GGUF:
        write_gguf(folder / "q8.gguf", weights)


def _write_published_features(folder: Path) -> None:
    """The features once more as .pt files, which MindSpeed-MM writes."""
    folder.mkdir()
    rows = [json.loads(line) for line in Path("features/data.jsonl").read_text().splitlines()]
    lines = []
    for number, row in enumerate(rows):
        tensors = load_file(Path("features") / row["file"])
        torch.save({name: tensors[name] for name in tensors if "." not in name}, folder / f"{number}.pt")
        lines.append(json.dumps({"file": f"{number}.pt"}) + "\n")
    (folder / "data.jsonl").write_text("".join(lines))
    shutil.copy("features/null_prompt.safetensors", folder)
