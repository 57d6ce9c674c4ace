"""mm-convert on checkpoints that hypothesis damages.

One line and exit code 1, no target, nothing of theirs run; or the right weights.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoint.cli import main
from mindspeed_mm.errors import WeightsError
from mindspeed_mm.models.wan.config import VaceConfig, WanConfig
from mindspeed_mm.models.wan.config_json import official_json
from mindspeed_mm.models.wan.stages import split
from mindspeed_mm.models.wan.state_dict import KEY_MAPS
from mindspeed_mm.models.weights import open_weights
from tests.support.tiny import tiny_transformer, write_shards

pytestmark = pytest.mark.medium

SMALL = VaceConfig(
    trunk=WanConfig(
        hidden_size=24, ffn_dim=24, num_heads=2, num_layers=2, text_dim=8, text_len=8, freq_dim=8
    ),
    vace_layers=(0,),
)
CAREFULLY = settings(
    max_examples=14,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
Weights = dict[str, Tensor]
MM = KEY_MAPS["mm"].to_theirs
WEIGHTS: Weights = {
    name: tensor.detach() for name, tensor in tiny_transformer(config=SMALL).state_dict().items()
}


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.trace}'",)


def write_single(folder: Path, weights: Weights) -> None:
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")


def write_stages(folder: Path, weights: Weights) -> None:
    placed = {name: tensor for name, tensor in weights.items() if name in WEIGHTS}
    rest = {name: tensor for name, tensor in weights.items() if name not in WEIGHTS}
    for rank, stage in enumerate(split(placed, [1, 1], SMALL.vace_layers)):
        file = folder / f"release/mp_rank_00_{rank:03d}/model_optim_rng.pt"
        file.parent.mkdir(parents=True)
        torch.save({"model": {MM(name): t for name, t in stage.items()} | (rest if rank else {})}, file)


def write_dcp(folder: Path, weights: Weights) -> None:
    named = {MM(name) if name in WEIGHTS else name: tensor for name, tensor in weights.items()}
    state = {"model": named, "iteration": torch.tensor(3), "config": SMALL.model_dump_json()}
    dcp.save(state, checkpoint_id=folder / "iter_0000003", no_dist=True)


WRITERS: dict[str, tuple[str, Callable[[Path, Weights], None]]] = {
    "single": ("hf_to_mm", write_single),
    "shards": ("hf_to_mm", write_shards),
    "stages": ("mm_to_hf", write_stages),
    "dcp": ("mm_to_hf", write_dcp),
}


@contextlib.contextmanager
def source_folder(tmp_path: Path, form: str, weights: Weights) -> Iterator[Path]:
    folder = tmp_path / "source"
    try:
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(official_json(SMALL)))
        WRITERS[form][1](folder, weights)
        yield folder
    finally:
        for left in tmp_path.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()


def convert(form: str, folder: Path, target: Path) -> str | None:
    """The one line that the command says when it refuses; None when it converts."""
    argv = [
        "VACEConverter",
        WRITERS[form][0],
        "--cfg.source_path",
        str(folder),
        "--cfg.target_path",
        str(target),
    ]
    said, code = io.StringIO(), 0
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            main(argv)
        except SystemExit as stop:
            code = int(stop.code or 0)
    if code == 0:
        return None
    assert code == 1
    assert said.getvalue().count("\n") == 1, said.getvalue()
    assert not target.exists()
    return said.getvalue()


def assert_right(path: Path, weights: Weights) -> None:
    source = open_weights(path)
    assert source.shapes.keys() == weights.keys()
    for name, tensor in weights.items():
        assert source.shapes[name] == tensor.shape
        assert torch.equal(source.read(name), tensor), name


def error_of(read: Callable[[], object]) -> str | None:
    """What a WeightsError said; None where there was none."""
    try:
        read()
    except WeightsError as error:
        return str(error)
    return None


@pytest.mark.parametrize("form", WRITERS)
def test_undamaged_sources_convert(tmp_path: Path, form: str) -> None:
    with source_folder(tmp_path, form, WEIGHTS) as folder:
        assert convert(form, folder, tmp_path / "target") is None
        assert_right(tmp_path / "target", WEIGHTS)


@pytest.mark.parametrize("form", WRITERS)
@CAREFULLY
@given(data=st.data())
def test_files_that_are_cut_off_missing_or_empty_are_rejected(
    tmp_path: Path, form: str, data: st.DataObject
) -> None:
    with source_folder(tmp_path, form, WEIGHTS) as folder:
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "config.json")
        victim = data.draw(st.sampled_from(files), label="file")
        how = data.draw(st.sampled_from(["cut", "missing", "empty"]), label="how")
        content = victim.read_bytes()
        if how == "missing":
            victim.unlink()
        else:
            length = data.draw(st.integers(0, len(content) - 1), label="length") if how == "cut" else 0
            victim.write_bytes(content[:length])
        error = convert(form, folder, tmp_path / "target")
        if error is None:  # only an index whose shards can be told without it
            assert victim.name.endswith(".index.json")
            assert how == "missing"
            assert_right(tmp_path / "target", WEIGHTS)


DAMAGES = ["extra", "missing", "renamed", "integers", "wide", "twice", "scalar"]


def damaged(weights: Weights, how: str, name: str) -> Weights:
    """A copy of `weights` in which something is wrong with `name`."""
    changed = {key: tensor.clone() for key, tensor in weights.items()}
    tensor = changed[name]
    if how == "extra":
        changed[f"{name}_of_another_model"] = tensor.clone()
    elif how == "missing":
        del changed[name]
    elif how == "renamed":
        changed[name.replace(".", "/", 1)] = changed.pop(name)
    elif how == "twice":
        changed[f"model.{name}"] = tensor.clone()
    else:
        changed[name] = {
            "integers": tensor.to(torch.int32),
            "wide": torch.cat((tensor, tensor)),
            "scalar": torch.ones(()),
        }[how]
    return changed


def each_damage(test: Callable[..., None]) -> Callable[..., None]:
    """Every kind at least once, whatever hypothesis draws."""
    for how in DAMAGES:
        test = example(how=how, name="blocks.0.ffn.0.weight")(test)
    return test


@pytest.mark.parametrize("form", WRITERS)
@settings(CAREFULLY, max_examples=7)
@each_damage
@given(how=st.sampled_from(DAMAGES), name=st.sampled_from(sorted(WEIGHTS)))
def test_extra_missing_or_misshaped_weights_are_rejected(
    tmp_path: Path, form: str, how: str, name: str
) -> None:
    with source_folder(tmp_path, form, damaged(WEIGHTS, how, name)) as folder:
        error = convert(form, folder, tmp_path / "target")
        assert error is not None, (how, name)
        assert str(folder) in error


@CAREFULLY
@given(
    form=st.sampled_from(["stages", "dcp"]), place=st.integers(0, 400), key=st.text(min_size=1, max_size=8)
)
def test_code_next_to_or_among_the_weights_is_not_run(
    tmp_path: Path, form: str, place: int, key: str
) -> None:
    trace = tmp_path / "trace"
    with source_folder(tmp_path, form, WEIGHTS) as folder:
        if form == "dcp":
            index = folder / "iter_0000003/.metadata"
            metadata: Any = pickle.loads(index.read_bytes())
            homes = [
                metadata.planner_data,
                metadata.storage_data,
                metadata.state_dict_metadata,
                vars(metadata),
            ]
            homes[place % len(homes)][key] = Bomb(trace)
            index.write_bytes(pickle.dumps(metadata))
        else:
            file = folder / f"release/mp_rank_00_00{place % 2}/model_optim_rng.pt"
            state = torch.load(file, weights_only=True)
            (state if place % 3 else state["model"])[key] = Bomb(trace)
            torch.save(state, file)
        assert convert(form, folder, tmp_path / "target") is not None
        assert not trace.exists(), "code from the file was run"


def forge(metadata: Any, how: str, name: str, number: int) -> None:
    """Make the index of a DCP folder say something untrue about one weight."""
    entry: Any = metadata.state_dict_metadata[name]
    key = next(key for key in metadata.storage_data if key.fqn == name)
    place: Any = metadata.storage_data[key]
    if how == "size":
        entry.size = torch.Size([number, *entry.size[1:]])
    elif how == "both sizes":
        entry.size = entry.chunks[0].sizes = torch.Size([number, *entry.size[1:]])
    elif how == "dtype":
        object.__setattr__(entry.properties, "dtype", torch.float64)
    elif how == "offset":
        place.offset = number
    elif how == "length":
        place.length = number
    elif how == "path":
        place.relative_path = ["../x", "/etc/passwd", "__9_9.distcp", "", ".", 3, None][number % 7]
    elif how == "no place":
        del metadata.storage_data[key]
    elif how == "no chunks":
        entry.chunks = []
    elif how == "chunk twice":
        entry.chunks = [*entry.chunks, *entry.chunks]
    elif how == "kind":
        metadata.state_dict_metadata[name] = [number, None, name, [], {}, b"x"][number % 6]
    elif how == "path of keys":
        metadata.planner_data[name] = [(), ("model",), ("model", 3), ("iteration", name), 7, None][number % 6]
    else:
        setattr(metadata, how, [None, number, [name], {name: number}][number % 4])


FORGERIES = [
    "size", "both sizes", "dtype", "offset", "length", "path", "no place", "no chunks", "chunk twice", "kind",
    "path of keys", "state_dict_metadata", "storage_data",
]  # fmt: skip


@settings(CAREFULLY, max_examples=60)
@given(
    how=st.sampled_from(FORGERIES),
    name=st.sampled_from(sorted(WEIGHTS)),
    number=st.integers(0, 30) | st.integers(-(2**40), 2**62),
)
def test_forged_metadata_is_one_line_or_harmless(tmp_path: Path, how: str, name: str, number: int) -> None:
    with source_folder(tmp_path, "dcp", WEIGHTS) as folder:
        index = folder / "iter_0000003/.metadata"
        metadata: Any = pickle.loads(index.read_bytes())
        with contextlib.suppress(RuntimeError, TypeError, OverflowError):  # torch.Size takes no such number
            forge(metadata, how, f"model.{MM(name)}", number)
        index.write_bytes(pickle.dumps(metadata))
        error = error_of(lambda: assert_right(folder, WEIGHTS))
        assert error is None or "\n" not in error


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from([2, 24, 16, [0], 0]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
keys = st.sampled_from(
    [*official_json(SMALL), "num_attention_heads", "attention_head_dim", "trunk", "in_channels"]
)


@settings(CAREFULLY, max_examples=100)
@given(values=st.dictionaries(keys, json_values, max_size=6) | json_values, keep=st.booleans())
def test_any_config_json_is_used_or_rejected_in_one_line(tmp_path: Path, values: Any, keep: bool) -> None:
    """Whatever the file says, it agrees with the weights or is refused."""
    with source_folder(tmp_path, "single", WEIGHTS) as folder:
        merged = {**official_json(SMALL), **values} if keep and isinstance(values, dict) else values
        (folder / "config.json").write_text(json.dumps(merged))
        error = error_of(lambda: open_weights(folder).config)
        assert error is None or "\n" not in error
        if error is None:
            assert_right(folder, WEIGHTS)
            found = open_weights(folder).config
            assert found.trunk.hidden_size == SMALL.trunk.hidden_size
            assert found.trunk.num_layers == SMALL.trunk.num_layers
            assert len(found.vace_layers) == 1


def test_model_of_unknown_heads_is_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither names nor stages need the heads; only a diffusers folder does."""
    save_file(WEIGHTS, tmp_path / "x.safetensors")
    ways = [
        ("hf_to_mm", "x.safetensors", "mm", []),
        ("resplit", "mm", "stages", ["--pp_layers", "[1,1]"]),
        ("mm_to_hf", "stages", "folder", []),
        ("mm_to_hf", "stages", "y.pt", []),
        ("mm_to_hf_diffusers", "stages", "z.safetensors", []),
    ]
    for method, source, target, more in ways:
        capsys.readouterr()
        paths = ["--cfg.source_path", str(tmp_path / source), "--cfg.target_path", str(tmp_path / target)]
        main(["VACEConverter", method, *paths, *more])
        said = capsys.readouterr().out
        assert f"width {SMALL.trunk.hidden_size}" in said
        assert "num_heads" in said
        assert_right(tmp_path / target, WEIGHTS)
    assert load_file(tmp_path / "folder/diffusion_pytorch_model.safetensors").keys() == WEIGHTS.keys()
    with pytest.raises(SystemExit):
        main(
            [
                "VACEConverter",
                "mm_to_hf_diffusers",
                *paths[:2],
                "--cfg.target_path",
                str(tmp_path / "diffusers"),
            ]
        )
    error = capsys.readouterr().err
    assert error.startswith("WeightsError: ")
    assert f"width {SMALL.trunk.hidden_size}" in error
    assert "config.json" in error
    assert "num_heads" in error
    assert not (tmp_path / "diffusers").exists()
