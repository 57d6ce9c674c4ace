"""An external package extends the library through entry points; its parts work in the standard commands."""

from __future__ import annotations

import json
import re
import subprocess
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader

from checkpoint.cli import main as convert
from mindspeed_mm import VacePipeline
from mindspeed_mm.accelerator import Accelerator
from mindspeed_mm.data.video import open_video
from mindspeed_mm.data.video_writer import write_video
from mindspeed_mm.errors import ConfigError, WeightsError
from mindspeed_mm.generation.config import WeightPaths
from mindspeed_mm.generation.denoise import Step
from mindspeed_mm.models.keymap import KeyMap, Rename
from mindspeed_mm.models.load_model import load_transformer, open_model
from mindspeed_mm.models.spec import MODELS
from mindspeed_mm.models.weights import open_named
from mindspeed_mm.serve.schemas import body_schema
from mindspeed_mm.tasks.generate import main
from mindspeed_mm.tasks.jobs.evaluation import check_evaluation
from mindspeed_mm.tasks.jobs.generate import GenerateJob
from mindspeed_mm.tasks.validation_videos import ValidationVideos
from mindspeed_mm.tools.json_reference import reference
from mindspeed_mm.training.config import CheckpointConfig, EvalConfig
from tests.support.clips import write_clip
from tests.support.errors import raises
from tests.support.lora_files import lora_matrices, write_lora
from tests.support.ranks import run_ranks
from tests.support.runs import ended, free_port
from tests.support.tiny import (
    TINY,
    TRANSFORMER_FILE,
    model_json,
    tiny_transformer,
    write_official,
    write_transformer,
)

ROOT = Path(__file__).resolve().parents[2]
ENTRY_POINTS = """
[mindspeed_mm.models]
whisper = outsider.specs:MODEL
pebble = outsider.pebble:SPEC

[mindspeed_mm.datasets]
noise = outsider.specs:DATASET

[mindspeed_mm.converters]
CountConverter = outsider.convert:CONVERTER

[mindspeed_mm.solvers]
straight = outsider.straight:SPEC

[mindspeed_mm.tasks]
mirror = outsider.mirror:TASK

[mindspeed_mm.training_hooks]
tally = outsider.tally:HOOK

[mindspeed_mm.transforms]
biases = outsider.biases:SPEC
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
    adapted=("q", "k", "v", "o", "ffn.0", "ffn.2"),
    fp32_modules=("time_embedding", "time_projection", "head"),
    open="outsider.code:open_whisper",
)
DATASET = DatasetSpec(config=NoiseConfig, build="outsider.code:Noise")
'''
CODE = '''
import sys
import torch
from mindspeed_mm.data.sample import FeatureRecord
from mindspeed_mm.errors import WeightsError
from mindspeed_mm.models.load_model import open_vace
from mindspeed_mm.models.source import OpenedModel
from mindspeed_mm.models.wan.vace import VaceTransformer, hint_scales
from outsider.specs import WhisperSizes


def open_whisper(path):
    """Its config.json, or the checkpoint itself, has one key more than VACE's."""
    weights, sizes = open_vace(path)
    if "volume" not in weights.settings:
        raise WeightsError("volume is missing", where=weights.hints_from or weights.path)
    return OpenedModel(weights, WhisperSizes(**sizes.model_dump(), volume=weights.settings["volume"]))


class Whisper(VaceTransformer):
    def __init__(self, config):
        super().__init__(config)
        self.volume = config.volume
        sys.stdout.write(f"whisper at volume {self.volume}\\n")

    def forward(self, latents, timestep, prompt_embeds, vace_context, *, context_scale=1.0):
        scales = tuple(scale * self.volume for scale in hint_scales(self.config, context_scale))
        return super().forward(latents, timestep, prompt_embeds, vace_context, context_scale=scales)


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
TALLY = '''
import sys
from typing import Literal
from mindspeed_mm.config.schema import Config
from mindspeed_mm.training.hooks.base import Hook
from mindspeed_mm.training.hooks.config import HookSpec

assert "torch" not in sys.modules, "a hook is checked before torch is imported"


class TallyConfig(Config):
    """How often the sum of losses is written."""

    type: Literal["tally"] = "tally"
    every: int = 1


class Tally(Hook):
    def __init__(self, config):
        self.config, self.total = config, 0.0

    def on_step(self, event):
        self.total += event.report.loss
        if event.report.iteration % self.config.every == 0:
            event.log({"tally/total": self.total})

    def state_dict(self):
        return {"total": self.total}

    def load_state_dict(self, state):
        self.total = state["total"]


HOOK = HookSpec(config=TallyConfig, build="outsider.tally:Tally")
'''

BIASES = """
from typing import Literal
from mindspeed_mm.config.schema import Config
from mindspeed_mm.models.transforms.config import TransformSpec


class BiasesConfig(Config):
    type: Literal["biases"] = "biases"


SPEC = TransformSpec(config=BiasesConfig, build="outsider.train_biases:build")
"""
TRAIN_BIASES = """
from mindspeed_mm.models.transforms.base import ModuleTransform


class TrainBiases(ModuleTransform):
    is_adapter = True

    def apply(self, model):
        pass

    def is_trainable(self, name):
        return name.endswith(".bias")


def build(config, spec, trainable):
    return TrainBiases()
"""
STRAIGHT = '''
import torch
from mindspeed_mm.generation.solvers.config import SolverSpec

SPEC = SolverSpec(build="outsider.straight:Straight", grid="outsider.straight:sigmas")


def sigmas(sampling):
    """Denser towards the end than the grid of euler."""
    return torch.linspace(1, 0, sampling.steps + 1, dtype=torch.float64)[:-1] ** 2


class Straight:
    def __init__(self, sigmas, timesteps, seed):
        self.sigmas, self.index = sigmas, 0

    def step(self, model_output, timestep, sample, *, return_dict):
        now, after = self.sigmas[self.index : self.index + 2].tolist()
        self.index += 1
        return (sample + (after - now) * model_output,)
'''
MIRROR = '''
from mindspeed_mm.conditioning.tasks.options import TaskOptions
from mindspeed_mm.conditioning.tasks.spec import Prepared, Task


class MirrorOptions(TaskOptions):
    """Which way."""

    upside_down: bool = False


def mirror(sources, options):
    clip = sources.clip
    turn = (lambda frame: frame[::-1]) if options.upside_down else (lambda frame: frame[:, ::-1])
    steps = lambda: ((turn(frame), None) for frame in clip.frames())
    return Prepared(steps=steps, num_frames=clip.num_frames, size=clip.size, fps=clip.fps)


TASK = Task(
    name="mirror", summary="the clip, mirrored", needs=("clip",), options=MirrorOptions, run=mirror,
    family="control",
)
'''


FILES = {
    "__init__": "", "specs": SPECS, "code": CODE, "convert": CONVERT,
    "pebble": PEBBLE, "pebble_net": PEBBLE_NET, "straight": STRAIGHT, "mirror": MIRROR,
    "tally": TALLY, "biases": BIASES, "train_biases": TRAIN_BIASES,
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


def test_its_converter_runs_under_mm_convert(
    site: Path, weights: Path, tmp_path: Path, installed: None, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--cfg.source_path", str(weights), "--cfg.target_path", str(tmp_path / "count.txt")]
    ran = run(["mm-convert", "CountConverter", "count", *flags], site)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "count.txt").read_text() == str(len(tiny_transformer(0, TINY).state_dict()))
    with pytest.raises(SystemExit):
        convert(["--help"])
    assert {"VACEConverter", "CountConverter"} <= set(re.findall(r"\w+", capsys.readouterr().out))


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


TRAIN = ["bash", "examples/vace/1.3B/pretrain_fsdp.sh"]
PARTS = ['--set=model.transforms=[{"type": "biases"}]', '--set=model.hooks=[{"type": "tally", "every": 2}]']


@pytest.fixture(scope="module")
def trained(
    site: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, object], str]:
    """Train two iterations with every part of the package. Return the settings and the output.

    Also with spaces in the path.
    """
    settings = settings_for(tmp_path_factory.mktemp("trained"), weights, volume=0.25)
    ran = run([*TRAIN, *PARTS, "--train-iters", "2", "--num-workers", "0"], site, settings)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    return settings, ran.stdout


@pytest.mark.slow
def test_outside_model_data_and_transform_train_with_the_script(
    site: Path, trained: tuple[dict[str, object], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, printed = trained
    save = Path(str(settings["SAVE_PATH"]))
    assert "whisper at volume 0.25" in printed
    assert "iteration        2/       2" in printed
    saved = FileSystemReader(save / "iter_0000002").read_metadata()
    trained_names = [name for name in saved.state_dict_metadata if name.startswith("model.")]
    biases = [name for name in tiny_transformer(0, TINY).state_dict() if name.endswith(".bias")]
    assert len(trained_names) == len(biases)
    assert all(name.endswith(".bias") for name in trained_names)
    monkeypatch.syspath_prepend(str(site))
    sizes = open_model(save, MODELS.get("whisper")).sizes
    assert sizes.model_dump() == {**TINY.model_dump(), "volume": 0.25}


@pytest.mark.slow
def test_outside_hook_trains_and_resumes_with_the_script(
    site: Path, trained: tuple[dict[str, object], str]
) -> None:
    settings, _ = trained
    more = {"LOAD": settings["SAVE_PATH"], "MASTER_PORT": free_port()}
    ran = run([*TRAIN, *PARTS, "--train-iters", "4", "--num-workers", "0"], site, {**settings, **more})
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    lines = (Path(str(settings["SAVE_PATH"])) / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    losses = [row["loss"] for row in rows if "loss" in row]
    totals = {row["iteration"]: row["tally/total"] for row in rows if "tally/total" in row}
    assert totals == {2: sum(losses[:2]), 4: sum(losses)}
    ran = run([*TRAIN, '--set=model.hooks=[{"type": "tally", "evry": 2}]', "--dry-run"], site, settings)
    assert ran.returncode == 1
    assert "hooks[0].evry" in ran.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("installed")
def test_model_without_vace_trains_from_its_weights(tmp_path: Path) -> None:
    """A model with its own schema, names and units, without a branch: two files and one entry point.

    Its one rank has already imported the library; the script starts the ranks of `trained`.
    """
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
    flags = ["--mm-model", settings["MM_MODEL"], "--mm-data", settings["MM_DATA"], "--lr", "5e-5"]
    flags += ["--fsdp2-config-path", tmp_path / "fsdp2.yaml", "--save", settings["SAVE_PATH"]]
    flags += ["--lr-decay-style", "constant", "--train-iters", 2, "--num-workers", 0, "--log-interval", 1]
    ran = run_ranks("mindspeed_mm.tasks.pretrain", flags, tmp_path / "printed", ranks=1)
    assert ran.returncodes == [0], ran.stdout[-3000:] + ran.stderr[-3000:]
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
    assert "feature, vace" in ran.stderr


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny VACE in the layout of the download, and a clip of numbered frames."""
    folder = write_official(tmp_path_factory.mktemp("vace"), dtype=torch.float32)
    write_clip(folder / "clip.mp4", 9, height=32, width=48)
    return folder


@pytest.fixture
def installed(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package, for this process."""
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("MINDSPEED_MM_DEVICE", "cpu")


def inference_json(path: Path, downloads: Path, **keys: object) -> Path:
    model = {"transformer": str(downloads), "vae": str(downloads), "text_encoder": str(downloads)}
    sizes = {"height": 32, "width": 48, "num_frames": 9, "steps": 3, "seed": 7, "dtype": "fp32"}
    out = {"output_path": str(path.parent / path.stem), "prompt": "a red ball bounces"}
    path.write_text(json.dumps({"model": model, **sizes, **out, **keys}))
    return path


def latents_of(folder: Path) -> torch.Tensor:
    return load_file(folder / "latents.safetensors")["latents"]


@pytest.mark.usefixtures("installed")
def test_outside_solver_and_task_generate_from_the_json(downloads: Path, tmp_path: Path) -> None:
    """The solver takes the steps of euler at the timesteps of its grid, on a clip that the task turned."""
    clip, timesteps = downloads / "clip.mp4", [1000, 1000 * (2 / 3) ** 2, 1000 / 9]
    task = {"type": "mirror", "upside_down": True}
    theirs = {"solver": "straight", "task": task, "video_path": str(clip), "name": "made"}
    main([str(inference_json(tmp_path / "theirs.json", downloads, **theirs))])
    turned = np.stack([frame[::-1] for frame in open_video(clip).read(range(9))])
    write_video(tmp_path / "turned.mkv", turned, 16, lossless=True)
    ours = {
        "solver": "euler",
        "timesteps": timesteps,
        "steps": None,
        "video_path": "turned.mkv",
        "name": "made",
    }
    main([str(inference_json(tmp_path / "ours.json", downloads, **ours))])
    found, expected = (latents_of(tmp_path / side / "made") for side in ("theirs", "ours"))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.usefixtures("installed")
def test_outside_names_are_listed_where_ours_are(capsys: pytest.CaptureFixture[str]) -> None:
    fields = body_schema()["requestBody"]["content"]["application/json"]["schema"]["properties"]
    assert fields["solver"]["enum"] == ["unipc", "dpm++", "euler", "renoise", "straight"]
    assert '`"renoise"`, `"straight"`' in reference()
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "{unipc,dpm++,euler,renoise,straight}" in capsys.readouterr().out


def test_missing_solver_lists_the_installed_names(downloads: Path, tmp_path: Path) -> None:
    path = inference_json(tmp_path / "lost.json", downloads, solver="straight")
    with raises(ConfigError, "'unipc', 'dpm++', 'euler' or 'renoise'", "straight", where="lost.json:solver"):
        GenerateJob.from_argv([str(path)])


@pytest.mark.usefixtures("installed")
def test_hooks_see_every_step_and_may_end_the_video(downloads: Path) -> None:
    pipe = VacePipeline.from_pretrained(downloads, dtype=torch.float32)
    seen: list[Step] = []
    given = {"height": 32, "width": 48, "num_frames": 9, "steps": 3, "solver": "straight"}
    result = pipe("a red ball", hooks=[seen.append], **given)
    assert [(step.index, step.total) for step in seen] == [(0, 3), (1, 3), (2, 3)]
    assert torch.equal(seen[-1].latents[0], result.latents)
    assert all(torch.equal(one.latents, next_.before) for one, next_ in pairwise(seen))

    def cancel(step: Step) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe("a red ball", hooks=[seen.append, cancel], **given)
    assert len(seen) == 4


@pytest.fixture(scope="module")
def whisper(downloads: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights, whose config.json has a key of the outside model."""
    folder = tmp_path_factory.mktemp("whisper")
    (folder / TRANSFORMER_FILE).symlink_to(downloads / TRANSFORMER_FILE)
    config = json.loads((downloads / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "volume": 0.5}))
    return folder


def request_of(downloads: Path, transformer: Path | None = None, **keys: object) -> dict[str, object]:
    """The keys of an inference JSON: a clip controls the video; with a transformer, of the outside model."""
    outside = {} if transformer is None else {"model_id": "whisper", "transformer": str(transformer)}
    model = {**dict.fromkeys(("transformer", "vae", "text_encoder"), str(downloads)), **outside}
    return {"model": model, "name": "made", "video_path": str(downloads / "clip.mp4"), **keys}


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("keys", [{}, {"offload": "block"}, {"quantize": "int8"}, {"loras": True}])
def test_outside_model_generates_as_its_volume_says(
    keys: dict[str, object], downloads: Path, whisper: Path, tmp_path: Path
) -> None:
    """VACE with half of its hints, bit for bit."""
    if keys.get("loras"):
        keys = {"loras": [str(write_lora("kohya", tmp_path, lora_matrices()))]}
    for name, transformer, scale in (("theirs", whisper, 1), ("half", None, 0.5), ("whole", None, 1)):
        values = request_of(downloads, transformer, context_scale=scale, **keys)
        main([str(inference_json(tmp_path / f"{name}.json", downloads, **values))])
    theirs, half, whole = (latents_of(tmp_path / name / "made") for name in ("theirs", "half", "whole"))
    assert torch.equal(theirs, half)
    assert not torch.allclose(theirs, whole, atol=1e-2)


@pytest.mark.usefixtures("installed")
def test_outside_model_makes_its_validation_videos(downloads: Path, whisper: Path, tmp_path: Path) -> None:
    path = inference_json(tmp_path / "made.json", downloads, **request_of(downloads, whisper))
    main([str(path)])
    mesh: Any = SimpleNamespace(world_size=1, cp_size=1)
    cpu, spec = Accelerator.detect("cpu"), MODELS.get("whisper")
    model = load_transformer(whisper, dtype=torch.float32, spec=spec)
    unnamed = inference_json(tmp_path / "unnamed.json", downloads, **request_of(downloads))
    ValidationVideos(unnamed, model, mesh, cpu, tmp_path / "videos", model_id="whisper")(3)
    made = latents_of(tmp_path / "videos/iter_0000003/made")
    assert torch.equal(made, latents_of(tmp_path / "made/made"))
    with raises(ConfigError, "pebble", "open", where=str(unnamed)):
        ValidationVideos(unnamed, model, mesh, cpu, tmp_path / "videos", model_id="pebble")


@pytest.mark.slow
@pytest.mark.usefixtures("installed")
def test_outside_model_is_sharded_over_two_ranks(downloads: Path, whisper: Path, tmp_path: Path) -> None:
    values = request_of(downloads, whisper, guidance_scale=1, steps=2)
    main([str(inference_json(tmp_path / "one.json", downloads, **values))])
    shared = inference_json(tmp_path / "two.json", downloads, **values, shard_weights=True)
    ran = run_ranks("mindspeed_mm.tasks.generate", [shared], tmp_path / "printed")
    assert ran.returncodes == [0, 0], ran.stdout[-3000:] + ran.stderr[-3000:]
    found, expected = latents_of(tmp_path / "two/made"), latents_of(tmp_path / "one/made")
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.usefixtures("installed")
def test_model_that_cannot_generate_is_rejected(downloads: Path, whisper: Path, tmp_path: Path) -> None:
    path = inference_json(tmp_path / "refused.json", downloads)
    for model_id, facts in (("pebble", ("pebble", "`open`")), ("wisper", ("wisper", "'whisper'"))):
        with raises(ConfigError, *facts, where="refused.json:model.model_id"):
            GenerateJob.from_argv([str(path), "--model-id", model_id])
    paths = WeightPaths(**json.loads(path.read_text())["model"], model_id="whisper")
    with raises(WeightsError, "volume", where=downloads / "config.json"):  # plain VACE's has none
        VacePipeline.from_pretrained(paths, dtype=torch.float32)


@pytest.mark.usefixtures("installed")
def test_validation_videos_are_rejected_before_training() -> None:
    """For a model that cannot generate."""
    validation = SimpleNamespace(prompts="inference.json")
    job: Any = SimpleNamespace(
        data=SimpleNamespace(dataset_param=SimpleNamespace(validation=validation)),
        training=SimpleNamespace(eval=EvalConfig(), checkpoint=CheckpointConfig()),
        model=SimpleNamespace(diffusion=SimpleNamespace(role=None), hooks=()),
        predictor=SimpleNamespace(model_id="pebble"),
        files=SimpleNamespace(mm_data="data.json"),
    )
    with raises(ConfigError, "pebble", where="data.json:dataset_param.validation.prompts"):
        check_evaluation(job)
    job.predictor.model_id = "whisper"
    check_evaluation(job)
