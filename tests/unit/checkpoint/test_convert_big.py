"""More than a gigabyte of weights is converted, assembled and loaded in little memory."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from mindspeed_mm.models.containers.safetensors import write_safetensors
from mindspeed_mm.models.containers.tensors import TensorFile
from mindspeed_mm.models.containers.torch_file import write_torch
from mindspeed_mm.models.wan.config import FP32_MODULES, VaceConfig, WanConfig
from mindspeed_mm.models.wan.config_json import official_json
from mindspeed_mm.models.wan.shapes import layout
from mindspeed_mm.models.wan.state_dict import KEY_MAPS
from mindspeed_mm.models.weights import open_weights
from tests.support.layouts import published_layout
from tests.support.tiny import (
    TEXT_FILE,
    VAE_FILE,
    tiny_transformer,
    tiny_vae,
    write_tokenizer,
    write_transformer,
    write_vae,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads RssAnon"),
]
BIG = VaceConfig(
    trunk=WanConfig(hidden_size=2048, ffn_dim=8192, num_heads=16, num_layers=6), vace_layers=(0, 3)
)
LARGEST = max(map(math.prod, layout(BIG).values()))  # elements
MEASURED = """
import sys, threading, time
def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))
most, over = 0, False
def watch():
    global most
    while not over:
        most = max(most, anonymous())
        time.sleep(0.005)
thread = threading.Thread(target=watch)
thread.start()
try:
    exec(sys.argv.pop(1))
finally:
    over = True
    thread.join()
    print("RssAnon", most)
"""
CONVERT = "from checkpoint.cli import main; main(sys.argv[1:])"
LOAD = """
import torch
from mindspeed_mm.models.load_model import build_on_meta, load_weights
from mindspeed_mm.models.weights import open_weights
source = open_weights(sys.argv[1])
most = 0  # from here on
model = load_weights(build_on_meta(source.config), source, dtype=getattr(torch, sys.argv[2]))
assert not any(weight.is_meta for weight in model.parameters())
float(sum(weight.float().sum() for weight in model.parameters()))  # every page is touched
"""


def peak(program: str, *argv: str) -> int:
    """The most anonymous memory that a process held, in bytes."""
    command = [sys.executable, "-c", MEASURED, program, *argv]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    most = int(done.stdout.rsplit("RssAnon", 1)[1]) * 1024
    sys.stdout.write(f"{argv[:2]}: RssAnon {most / 1e6:.0f} MB\n")
    return most


def convert(method: str, **settings: object) -> int:
    flags = [word for name, value in settings.items() for word in (f"--cfg.{name}", str(value))]
    return peak(CONVERT, "VACEConverter", method, *flags)


def unread(shapes: Mapping[str, Sequence[int]]) -> dict[str, TensorFile]:
    """bf16 weights that are created one by one when they are read."""
    value = torch.randn(4096).to(torch.bfloat16)

    def tensor(size: torch.Size) -> TensorFile:
        fill = lambda: value.repeat(size.numel() // 4096 + 1)[: size.numel()].view(size)  # noqa: E731
        return TensorFile(size, torch.bfloat16, fill)

    return {name: tensor(torch.Size(shape)) for name, shape in shapes.items()}


def size_of(path: Path) -> int:
    return sum(file.stat().st_size for file in (path.rglob("*") if path.is_dir() else [path]))


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """More than 1 GB in shards, made without 1 GB of memory."""
    folder = tmp_path_factory.mktemp("big") / "original"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(official_json(BIG)))
    tensors = unread(layout(BIG))
    assert sum(t.nbytes for t in tensors.values()) > 1e9
    names, where = list(tensors), {}
    for part in range(2):
        file = f"diffusion_pytorch_model-{part + 1:05d}-of-00002.safetensors"
        write_safetensors(folder / file, {name: tensors[name] for name in names[part::2]})
        where.update(dict.fromkeys(names[part::2], file))
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    yield folder
    shutil.rmtree(folder)


def test_conversion_holds_the_largest_tensor_and_600_mb(big: Path, tmp_path: Path) -> None:
    """To an MM folder (one .pt in it), and from there to a folder of shards and to one .pt."""
    most = LARGEST * 2 + 600e6
    assert convert("hf_to_mm", source_path=big, target_path=tmp_path / "mm") <= most
    for method, target in (("mm_to_hf_diffusers", tmp_path / "folder"), ("mm_to_hf", tmp_path / "x.pt")):
        assert convert(method, source_path=tmp_path / "mm", target_path=target, max_shard_gb=0.7) <= most
        assert size_of(target) > 1e9
        shutil.rmtree(target) if target.is_dir() else target.unlink()  # 2 GB at a time are enough on a disk


def test_conversion_of_a_dcp_folder_does_too(big: Path, tmp_path: Path) -> None:
    source, names = open_weights(big), KEY_MAPS["mm"]
    state = {"model": {names.to_theirs(name): source.read(name) for name in source.tensors}}
    dcp.save(
        {**state, "config": BIG.model_dump_json()}, checkpoint_id=tmp_path / "iter_0000001", no_dist=True
    )
    target = tmp_path / "x.safetensors"
    assert (
        convert("mm_to_hf", source_path=tmp_path / "iter_0000001", target_path=target) <= LARGEST * 2 + 600e6
    )
    assert size_of(target) > 1e9


def test_pipeline_is_assembled_within_it_too(tmp_path: Path) -> None:
    """Its text encoder, three layers of the published one, has more than 1 GB."""
    shapes = published_layout("models_t5_umt5-xxl-enc-bf16.pth")
    shapes = {name: shape for name, shape in shapes.items() if not re.match(r"blocks\.([3-9]|\d\d)\.", name)}
    shapes["token_embedding.weight"] = (128, 4096)  # the tiny tokenizer has 120 tokens
    write_torch(tmp_path / TEXT_FILE, unread(shapes))
    write_tokenizer(tmp_path / "tokenizer")
    write_vae(tmp_path / VAE_FILE, tiny_vae())
    write_transformer(tmp_path / "expert", tiny_transformer())
    most = convert(
        "assemble_pipeline",
        high_path=tmp_path / "expert",
        vae_path=tmp_path / VAE_FILE,
        text_encoder_path=tmp_path / TEXT_FILE,
        target_path=tmp_path / "pipe",
    )
    assert size_of(tmp_path / "pipe/text_encoder") > 1e9
    assert most <= max(map(math.prod, shapes.values())) * 2 + 600e6


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_loading_holds_no_second_copy(big: Path, dtype: str) -> None:
    """In the file's dtype weights stay mapped; in another there is one copy of them."""
    width = torch.finfo(getattr(torch, dtype)).bits // 8
    copied = {
        name: 4 if dtype == "float32" or name.split(".")[0] in FP32_MODULES else 0 for name in layout(BIG)
    }
    held = sum(math.prod(shape) * copied[name] for name, shape in layout(BIG).items())
    assert peak(LOAD, str(big), dtype) <= held + LARGEST * width + 600e6
