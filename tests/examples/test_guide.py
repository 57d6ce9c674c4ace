"""Run the shell blocks of the guide, examples/vace/README.md, as written and in order.

Its files are edited as its tables say.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from checkpoint.cli import main as convert
from examples.vace.tiny.checkpoints import write_official
from examples.vace.tiny.world import Clip, write_dataset
from mindspeed_mm.tasks.generate import main as generate
from tests.support.commands import convert_here
from tests.support.ranks import run_ranks
from tests.support.runs import ended, free_port
from tests.support.tiny import model_json

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```shell\n(.*?)^```", re.MULTILINE | re.DOTALL)


def edit(path: Path, change: dict[str, Any]) -> None:
    """Set dotted keys of a JSON file."""
    values = json.loads(path.read_text(encoding="utf-8"))
    for address, value in change.items():
        *way, last = address.split("/")
        place = values
        for key in way:
            place = place[key]
        place[last] = value
    path.write_text(json.dumps(values, indent=4), encoding="utf-8")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with edited files, and tiny weights where the guide downloads the full ones."""
    root = tmp_path_factory.mktemp("a checkout")
    shutil.copytree(ROOT / "examples", root / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("mindspeed_mm", "checkpoint", "megatron", "pretrain_vace.py"):
        (root / name).symlink_to(ROOT / name)
    official = write_official(root / "weights" / "Wan-AI" / "Wan2.1-VACE-1.3B")
    for expert in ("high", "low"):
        folder = root / f"weights/alibaba-pai/Wan2.2-VACE-Fun-A14B/{expert}_noise_model"
        folder.mkdir(parents=True)
        for name in ("diffusion_pytorch_model.safetensors", "config.json"):
            shutil.copy(official / name, folder)
    write_dataset(root / "dataset", [Clip(index=0, kind="inpaint"), Clip(index=1)])
    vace = root / "examples" / "vace"
    (vace / "feature_extract" / "data.txt").write_text("./dataset,./dataset/data.json\n")
    source = "./weights/Wan-AI/Wan2.1-VACE-1.3B"
    files = {"vae": f"{source}/Wan2.1_VAE.pth", "text_encoder": f"{source}/models_t5_umt5-xxl-enc-bf16.pth"}
    tokenizer = f"{source}/google/umt5-xxl"
    data = {"preprocess_parameters/num_frames": 17, "preprocess_parameters/max_hxw": 4096}
    data |= {"tokenizer_config/from_pretrained": tokenizer, "tokenizer_config/model_max_length": 16}
    edit(vace / "feature_extract/data.json", {f"dataset_param/{key}": value for key, value in data.items()})
    models = {
        "ae/from_pretrained": files["vae"],
        "text_encoder/from_pretrained": files["text_encoder"],
        "ae/dtype": "fp32",
    }
    edit(vace / "feature_extract/model.json", models)
    features = json.loads((ROOT / "mindspeed_mm/tools/tools.json").read_text())["sorafeature"]["save_path"]
    source_of = {"data_path": f"{features}/data.jsonl", "data_folder": features}
    edit(vace / "1.3B/feature_data.json", {"dataset_param/basic_parameters": source_of})
    sizes = model_json()["predictor"]
    sizes["from_pretrained"] = "./weights/Wan-AI-mm/Wan2.1-VACE-1.3B/"
    edit(vace / "1.3B/pretrain_model.json", {"predictor": sizes})
    trained = "./converted_weights/Wan-AI/Wan2.1-VACE-1.3B/post_train.pt"
    asked = {"model": {"transformer": [trained], **files, "tokenizer": tokenizer}, "output_path": "./results"}
    asked |= {"prompt": "a red circle moves right", "height": 32, "width": 32, "num_frames": 5, "steps": 2}
    asked |= {"tasks": [{"name": "video1"}], "video_path": None, "image_path": None}
    edit(vace / "inference/inference_wan2.1_1.3b.json", asked)
    return root


def run(block: str, checkout: Path) -> None:
    """One shell block, in the root of the checkout.

    Lines of mm-convert alone run in this process; a loop over them starts the command.
    """
    if convert_here(block):
        return
    settings = {"NPUS_PER_NODE": "1", "NUM_WORKERS": "0", "TRAIN_ITERS": "2", "OMP_NUM_THREADS": "1"}
    settings |= {"MINDSPEED_MM_DEVICE": "cpu"}
    settings |= {"MASTER_PORT": free_port()}
    ran = ended(["bash", "-euo", "pipefail", "-c", block], cwd=checkout, env=settings)
    assert ran.returncode == 0, f"{block}\n{ran.stdout[-4000:]}\n{ran.stderr[-4000:]}"


def train_again(name: str, checkout: Path) -> None:
    """Train from the weights in pretrain_model.json and generate one video from every form of the result.

    The videos are `again/results/NAME…`. Commands that the blocks already ran are called in this process.
    """
    again = checkout / "again"
    files = {"data": "1.3B/feature_data.json", "model": "1.3B/pretrain_model.json"}
    flags = [part for kind, file in files.items() for part in (f"--mm-{kind}", f"examples/vace/{file}")]
    flags += ["--fsdp2-config-path", "examples/vace/fsdp2_config.yaml", "--num-workers", "0", "--lr", "5e-5"]
    flags += ["--train-iters", "1", "--save", f"./again/{name}", "--save-full-model"]
    ran = run_ranks("mindspeed_mm.tasks.pretrain", flags, checkout / f"again/printed/{name}", ranks=1)
    assert ran.returncodes == [0], ran.stdout + ran.stderr
    release = again / f"{name}_torch/release/mp_rank_00"
    release.mkdir(parents=True)
    (release.parents[1] / "latest_checkpointed_iteration.txt").write_text("release\n")
    dcp_to_torch_save(again / name / "iter_0000001", release / "model_optim_rng.pt")
    paths = ["--cfg.source_path", f"./again/{name}", "--cfg.target_path", f"./again/{name}_hf"]
    convert(["VACEConverter", "mm_to_hf", *paths])
    config = "examples/vace/inference/inference_wan2.1_1.3b.json"
    for form in (name, f"{name}_torch", f"{name}_hf"):
        generate([config, "--transformer", f"./again/{form}", "--output-path", f"./again/results/{form}"])


@pytest.mark.slow
def test_guide_commands_run_and_their_weights_train(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkout)
    monkeypatch.setenv("MINDSPEED_MM_DEVICE", "cpu")
    blocks = BLOCK.findall((ROOT / "examples/vace/README.md").read_text(encoding="utf-8"))
    assert len(blocks) >= 8
    for block in blocks:
        run(block, checkout)
    assert (checkout / "converted_weights/Wan-AI/Wan2.1-VACE-1.3B/post_train.pt").is_file()
    assert (checkout / "results" / "video1.mp4").is_file()

    # train the results again and generate from every form; this time the checkpoints hold all weights
    for name, source in (
        ("from_dcp_to_torch", "./dcp_to_torch"),
        ("from_mm_to_hf", "./converted_weights/Wan-AI/Wan2.1-VACE-1.3B/post_train.pt"),
    ):
        edit(checkout / "examples/vace/1.3B/pretrain_model.json", {"predictor/from_pretrained": source})
        train_again(name, checkout)
        videos = [checkout / f"again/results/{name}{form}/video1.mp4" for form in ("", "_torch", "_hf")]
        assert len({path.read_bytes() for path in videos}) == 1, "one model, one video"
