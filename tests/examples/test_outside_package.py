"""A stranger's package adds a model, a dataset and a converter by entry points, and all three work through the ordinary commands."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mindspeed_mm.models.keymap import KeyMap, Rename
from mindspeed_mm.models.weights import open_named
from tests.support.runs import ended, free_port
from tests.support.tiny import TINY, model_json, tiny_transformer, write_transformer

ROOT = Path(__file__).resolve().parents[2]
ENTRY_POINTS = """
[mindspeed_mm.models]
whisper = outsider.specs:MODEL
pebble = outsider.pebble:SPEC

[mindspeed_mm.datasets]
noise = outsider.specs:DATASET

[mindspeed_mm.converters]
CountConverter = outsider.convert:CONVERTER
"""
SPECS = '''
from typing import Any, Literal
from mindspeed_mm.config.schema import Config
from mindspeed_mm.data.registry import DatasetSpec
from mindspeed_mm.models.spec import ModelSpec
from mindspeed_mm.models.wan.config import PredictorConfig, VaceConfig


class WhisperSizes(VaceConfig):
    volume: float = 1.0


class WhisperPredictor(PredictorConfig):
    """VACE whose hints are scaled by a number of the model JSON."""

    model_id: Literal["whisper"] = "whisper"
    volume: float = 0.5

    @property
    def model(self) -> VaceConfig:
        return WhisperSizes(**super().model.model_dump(), volume=self.volume)


class NoiseConfig(Config):
    dataset_type: Literal["noise"] = "noise"
    count: int = 6


MODEL = ModelSpec(
    predictor=WhisperPredictor,
    build="outsider.code:Whisper",
    key_maps="mindspeed_mm.models.wan.state_dict:KEY_MAPS",
    units=("blocks.{*}", "vace_blocks.{*}"),
    branch=("vace_blocks", "vace_patch_embedding"),
    fp32_modules=("time_embedding", "time_projection", "head"),
)
DATASET = DatasetSpec(config=NoiseConfig, build="outsider.code:Noise")
'''
CODE = '''
import sys
import torch
from mindspeed_mm.data.sample import FeatureRecord
from mindspeed_mm.models.wan.vace import VaceTransformer


class Whisper(VaceTransformer):
    def __init__(self, config):
        super().__init__(config)
        self.volume = config.volume
        sys.stdout.write(f"whisper at volume {self.volume}\\n")

    def forward(self, latents, timestep, prompt_embeds, vace_context, *, context_scale=1.0):
        return super().forward(latents, timestep, prompt_embeds, vace_context, context_scale=context_scale * self.volume)


class Noise:
    """Records that are drawn when they are asked for."""

    def __init__(self, config):
        self.config = config

    def __len__(self):
        return self.config.count

    def shape(self, index):
        return (0, 3, 4, 6)

    def __getitem__(self, index):
        noise = torch.Generator().manual_seed(index)
        return FeatureRecord(
            latents=torch.randn(16, 3, 4, 6, generator=noise),
            vace_context=torch.randn(96, 3, 4, 6, generator=noise),
            prompt_embeds=(torch.randn(5, 32, generator=noise),),
            num_refs=0,
            key=f"noise-{index}",
        )
'''
PEBBLE = '''
from typing import Literal
from mindspeed_mm.config.schema import Config
from mindspeed_mm.models.keymap import KeyMap, Rename
from mindspeed_mm.models.spec import ModelSpec


class PebbleSizes(Config):
    width: int


class PebblePredictor(Config):
    """A model that has nothing of VACE: no branch, no heads, names of its own."""

    model_id: Literal["pebble"] = "pebble"
    dtype: Literal["bf16", "fp32"] = "bf16"
    residual_dtype: Literal["fp32"] = "fp32"
    from_pretrained: str | None = None
    trainable: Literal["all"] = "all"
    num_heads: int = 1
    width: int = 8
    reads_context: bool = False

    @property
    def weight_paths(self) -> dict[str, str]:
        return {"from_pretrained": self.from_pretrained} if self.from_pretrained else {}

    @property
    def model(self) -> PebbleSizes:
        return PebbleSizes(width=self.width)


NAMES = ("enter.{p}", "stones.{i}.mix.{p}", "leave.{p}")
KEY_MAPS = {
    "official": KeyMap("official", [Rename(name, name) for name in NAMES]),
    "mm": KeyMap("mm", [Rename(name, f"pebble.{name}") for name in NAMES]),
}
SPEC = ModelSpec(
    predictor=PebblePredictor,
    build="outsider.pebble_net:Pebble",
    key_maps="outsider.pebble:KEY_MAPS",
    units=("stones.{*}",),
)
'''
PEBBLE_NET = """
from torch import nn


class Cell(nn.Conv3d):
    # sharded weights have the dtype of products only inside the module that owns them
    def forward(self, x):
        return super().forward(x.to(self.weight.dtype))


class Stone(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.mix = nn.Linear(width, width)

    def forward(self, x):
        return x + self.mix(x.movedim(1, -1).to(self.mix.weight.dtype)).movedim(-1, 1)


class Pebble(nn.Module):
    def __init__(self, sizes):
        super().__init__()
        self.enter = Cell(16, sizes.width, 1)
        self.stones = nn.ModuleList(Stone(sizes.width) for _ in range(3))
        self.leave = Cell(sizes.width, 16, 1)

    def forward(self, latents, timestep, prompt_embeds, vace_context, *, context_scale=1.0):
        assert vace_context is None
        x = self.enter(latents)
        for stone in self.stones:
            x = stone(x)
        return self.leave(x).float()
"""
CONVERT = '''
from pathlib import Path
from pydantic import BaseModel
from checkpoint.converter import Converter


class CountConfig(BaseModel):
    """What to count."""

    source_path: str
    target_path: str


def count(cfg: CountConfig) -> None:
    """Write how many weights a checkpoint has."""
    from mindspeed_mm.models.weights import open_weights

    Path(cfg.target_path).write_text(str(len(open_weights(cfg.source_path).shapes)))


CONVERTER = Converter(methods={"count": count})
'''


FILES = {
    "__init__": "", "specs": SPECS, "code": CODE, "convert": CONVERT, "pebble": PEBBLE, "pebble_net": PEBBLE_NET,
}  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of installed packages that holds `outsider`: what pip leaves behind."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "outsider").mkdir()
    for name, text in FILES.items():
        (folder / "outsider" / f"{name}.py").write_text(text)
    info = folder / "outsider-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outsider\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    write_transformer(folder, tiny_transformer(0, TINY), torch.bfloat16)
    return folder


def run(
    command: list[str], site: Path | None, settings: dict[str, object] | None = None
) -> subprocess.CompletedProcess[str]:
    environment = {"MINDSPEED_MM_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    environment |= {name: str(value) for name, value in (settings or {}).items()}
    if site is not None:
        environment["PYTHONPATH"] = str(site)
    return ended(command, cwd=ROOT, env=environment)


def test_its_converter_runs_under_mm_convert(site: Path, weights: Path, tmp_path: Path) -> None:
    flags = ["--cfg.source_path", str(weights), "--cfg.target_path", str(tmp_path / "count.txt")]
    ran = run(["mm-convert", "CountConverter", "count", *flags], site)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "count.txt").read_text() == str(len(tiny_transformer(0, TINY).state_dict()))
    assert "VACEConverter" in run(["mm-convert", "--help"], site).stdout


def settings_for(tmp_path: Path, weights: Path, volume: float) -> dict[str, object]:
    model = model_json()
    model["predictor"] |= {"model_id": "whisper", "volume": volume, "from_pretrained": str(weights)}
    model["caption_dropout"] = 0.0
    (tmp_path / "model.json").write_text(json.dumps(model))
    (tmp_path / "data.json").write_text(json.dumps({"dataset_param": {"dataset_type": "noise", "count": 4}}))
    return {
        "NPUS_PER_NODE": 1,
        "MASTER_PORT": free_port(),
        "MM_MODEL": tmp_path / "model.json",
        "MM_DATA": tmp_path / "data.json",
        "SAVE_PATH": tmp_path / "save in a folder with spaces",
        "LOG_DIR": tmp_path / "logs in another",
    }


@pytest.mark.slow
def test_outside_model_and_dataset_train_with_the_script(site: Path, weights: Path, tmp_path: Path) -> None:
    """And a path with spaces does no harm."""
    settings = settings_for(tmp_path, weights, volume=0.25)
    script = ["bash", "examples/vace/1.3B/pretrain_fsdp.sh", "--train-iters", "2", "--num-workers", "0"]
    ran = run(script, site, settings)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    assert "whisper at volume 0.25" in ran.stdout
    assert "iteration        2/       2" in ran.stdout
    assert (tmp_path / "save in a folder with spaces" / "iter_0000002" / ".metadata").is_file()


@pytest.mark.slow
def test_model_without_vace_trains_from_its_weights(site: Path, tmp_path: Path) -> None:
    """Its schema, its names, its units and no branch: two files of its own and one line of entry points."""
    sizes = {
        "enter": (8, 16, 1, 1, 1),
        "leave": (16, 8, 1, 1, 1),
        **{f"stones.{i}.mix": (8, 8) for i in range(3)},
    }
    start = {f"{name}.weight": torch.randn(shape) / 4 for name, shape in sizes.items()}
    start |= {f"{name}.bias": torch.zeros(shape[0]) for name, shape in sizes.items()}
    save_file(start, tmp_path / "pebble.safetensors")
    settings = settings_for(tmp_path, tmp_path, volume=1.0)
    predictor = {"model_id": "pebble", "width": 8, "from_pretrained": str(tmp_path / "pebble.safetensors")}
    (tmp_path / "model.json").write_text(json.dumps({"task": "vace", "predictor": predictor}))
    (tmp_path / "fsdp2.yaml").write_text("sub_modules_to_wrap: ['stones.{*}']\nparam_dtype: bf16\n")
    settings["FSDP2_CONFIG"] = tmp_path / "fsdp2.yaml"
    script = ["bash", "examples/vace/1.3B/pretrain_fsdp.sh", "--train-iters", "2", "--num-workers", "0"]
    ran = run(script, site, settings)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    assert "iteration        2/       2" in ran.stdout
    names = ("enter.{p}", "stones.{i}.mix.{p}", "leave.{p}")
    key_map = KeyMap("mm", [Rename(name, f"pebble.{name}") for name in names])
    saved = open_named(tmp_path / "save in a folder with spaces", {"mm": key_map})
    assert saved.shapes == {name: tensor.shape for name, tensor in start.items()}
    assert all(not torch.equal(saved.read(name), tensor) for name, tensor in start.items())
    assert all((saved.read(name) - tensor).abs().max() < 0.01 for name, tensor in start.items())


def test_missing_package_lists_available_names(weights: Path, tmp_path: Path) -> None:
    settings = settings_for(tmp_path, weights, volume=0.25)
    ran = run(["bash", "examples/vace/1.3B/pretrain_fsdp.sh"], None, settings)
    assert ran.returncode == 1
    assert ran.stderr.count("\n") == 1, ran.stderr
    assert "unknown dataset 'noise'" in ran.stderr or "unknown model 'whisper'" in ran.stderr
    assert "expected one of feature, vace" in ran.stderr
