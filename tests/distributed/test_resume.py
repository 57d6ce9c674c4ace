"""A run that stops and resumes is the run that never stopped."""

import json
import os
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from mindspeed_mm.errors import WeightsError
from mindspeed_mm.models.wan.state_dict import KEY_MAPS
from mindspeed_mm.models.weights import open_weights
from tests.distributed.jobs import Run, Setup, die_between_renames, files, train_to
from tests.support.errors import names
from tests.support.tiny import TINY, tiny_transformer

END = 7  # iterations of a run that never stopped
ONLY_LOSSES = {"tensors": False}


def same(a, b):
    """Equal to the last bit, whatever the nesting."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def compare(got, wanted, names=("weights", "moments", "lr", "consumed", "rng")):
    return [name for name in names if not same(got[name], wanted[name])]


@pytest.fixture(scope="module")
def straight(world, tmp_path_factory):
    return world.run(2, train_to, Run(tmp_path_factory.mktemp("straight")), END)[0]


@pytest.fixture(scope="module")
def stopped(world, tmp_path_factory):
    """A folder with the checkpoint of iteration 4 of two ranks."""
    folder = tmp_path_factory.mktemp("stopped")
    world.run(2, train_to, Run(folder), 4, save_at=(4,), **ONLY_LOSSES)
    return folder


def test_resume_after_kill_9_in_a_save_is_bit_equal(world, mortal_world, straight, tmp_path):
    run = Run(tmp_path)
    codes = mortal_world.run_to_death(2, train_to, run, END, save_at=(4,), die_in_save_at=6)
    assert -9 in codes

    answer = world.run(2, train_to, run, END, save_at=(END,))[0]

    assert min(answer["losses"]) == 4
    assert compare(answer, straight) == []
    assert all(answer["losses"][i] == straight["losses"][i] for i in range(4, END))
    assert not list(tmp_path.glob(".writing-*")), "what the killed save left is gone"


def test_kill_while_an_iteration_is_saved_again_loses_nothing(
    world, mortal_world, stopped, straight, tmp_path
):
    run, there = Run(tmp_path / "killed"), tmp_path / "killed/iter_0000004"
    shutil.copytree(stopped, run.folder)
    assert -9 in mortal_world.run_to_death(2, die_between_renames, run)
    assert not there.exists(), "the state that this test is about"
    shutil.copytree(run.folder, tmp_path / "anew")

    answer = world.run(2, train_to, run, END)[0]
    assert min(answer["losses"]) == 4
    assert compare(answer, straight) == []
    assert there.is_dir()

    # a run that does not load it must not sweep it away with what killed saves leave
    anew = Run(tmp_path / "anew", checkpoint={"load": None})
    world.run(2, train_to, anew, 1, save_at=(1,), **ONLY_LOSSES)
    assert files(anew.folder / "iter_0000004") == files(stopped / "iter_0000004")
    assert not list(anew.folder.glob(".writing-*"))


@pytest.mark.parametrize(
    ("ranks", "setup"),
    [
        pytest.param(1, Setup(), id="1 rank"),
        pytest.param(4, Setup(fsdp={"sharding_size": 2}), id="4 ranks, 2 copies"),
        pytest.param(4, Setup(cp=2), id="cp 2"),
    ],
)
def test_another_number_of_ranks_resumes_up_to_rounding(world, stopped, straight, ranks, setup):
    answer = world.run(ranks, train_to, Run(stopped, setup), END)[0]

    assert answer["losses"] == pytest.approx({i: straight["losses"][i] for i in range(4, END)}, abs=1e-6)
    for name, weight in straight["weights"].items():
        torch.testing.assert_close(answer["weights"][name], weight, rtol=0, atol=1e-5)


def test_one_unsharded_rank_resumes_on_two(world, straight, tmp_path):
    world.run(1, train_to, Run(tmp_path), 4, save_at=(4,), **ONLY_LOSSES)
    answer = world.run(2, train_to, Run(tmp_path), 6, **ONLY_LOSSES)[0]
    assert answer["losses"] == pytest.approx({i: straight["losses"][i] for i in range(4, 6)}, abs=1e-6)


def test_background_save_holds_weights_of_its_iteration(world, stopped, straight, tmp_path):
    run = Run(tmp_path, checkpoint={"async_save": True})
    # two more steps change the weights while 4 is written
    world.run(2, train_to, run, 6, save_at=(2, 4), **ONLY_LOSSES)

    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text().strip() == "4"
    answer = world.run(2, train_to, run, END)[0]
    assert compare(answer, straight) == []


def test_dcp_to_torch_gives_plain_tensors_in_mm_names(stopped, straight, tmp_path):
    folder = stopped / "iter_0000004"
    assert json.loads((folder / "job.json").read_text()) == {"a": 1}
    out = tmp_path / "out.pt"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.checkpoint.format_utils",
        "dcp_to_torch",
        str(folder),
        str(out),
    ]
    subprocess.run(command, check=True, capture_output=True)

    found = torch.load(out, weights_only=True)

    assert found["base"] == {"path": "/somewhere/base", "fingerprint": "0123", "dialect": "official"}
    assert int(found["iteration"]) == 4
    assert all(name.startswith("vace_dit.") for name in found["model"])
    trained = [name for name in straight["weights"] if name.startswith("vace")]
    assert len(found["model"]) == len(trained) == len(found["optimizer"]["state"])


def test_whole_model_is_saved_on_request_or_without_base(world, tmp_path):
    for number, run in enumerate(
        (Run(tmp_path / "0", checkpoint={"save_full_model": True}), Run(tmp_path / "1", base=None))
    ):
        world.run(2, train_to, run, 1, save_at=(1,), **ONLY_LOSSES)
        folder = tmp_path / str(number) / "iter_0000001"
        found = torch.distributed.checkpoint.FileSystemReader(folder).read_metadata().state_dict_metadata
        assert any(name.startswith("model.wan_dit.blocks.3.") for name in found)
        assert any(name.startswith("model.vace_dit.") for name in found)
        assert not any(name.startswith("base") for name in found)
    out = tmp_path / "whole.pt"
    dcp_to_torch_save(folder, out)
    assert open_weights(out).config == TINY, "the number of heads, too, which no shape tells"


def test_loss_history_is_resumed_but_not_by_finetune(world, stopped, tmp_path):
    resumed = world.run(2, train_to, Run(stopped), 4, **ONLY_LOSSES)
    assert [answer["loss_means"][0][0] for answer in resumed] == [4, 4], "every rank has its own"
    assert resumed[0]["skipped"] == 4
    tuned = Run(tmp_path, checkpoint={"load": str(stopped), "finetune": True})
    fresh = world.run(2, train_to, tuned, 0, **ONLY_LOSSES)[0]
    assert fresh["loss_means"] == {}
    assert fresh["skipped"] == 0


def test_finetune_takes_the_weights_and_nothing_else(world, stopped, tmp_path):
    run = Run(tmp_path, checkpoint={"load": str(stopped), "finetune": True})
    answer = world.run(2, train_to, run, 1, **ONLY_LOSSES)[0]
    resumed = world.run(2, train_to, Run(stopped), 4, **ONLY_LOSSES)[0]

    assert list(answer["losses"]) == [0]
    assert answer["consumed"] == 4
    other = world.run(2, train_to, Run(tmp_path / "empty"), 1, **ONLY_LOSSES)[0]
    assert answer["losses"][0] != other["losses"][0], "it starts from trained weights"
    assert resumed["losses"] == {}


def test_flags_leave_parts_of_a_checkpoint_out(world, tmp_path):
    run = Run(tmp_path, checkpoint={"no_save_optim": True, "no_save_rng": True})
    world.run(2, train_to, run, 2, save_at=(2,), **ONLY_LOSSES)
    found = torch.distributed.checkpoint.FileSystemReader(tmp_path / "iter_0000002").read_metadata()
    assert not [name for name in found.state_dict_metadata if name.startswith(("optimizer", "rng"))]

    answer = world.run(
        2, train_to, Run(tmp_path, checkpoint={"no_load_optim": True, "no_load_rng": True}), 3
    )[0]
    assert list(answer["losses"]) == [2]
    assert all(int(moments["step"]) == 1 for moments in answer["moments"].values())


def test_retain_interval_keeps_multiples_and_newest(world, tmp_path):
    run = Run(tmp_path, checkpoint={"save_retain_interval": 2})
    world.run(2, train_to, run, 5, save_at=(1, 2, 3, 4, 5), **ONLY_LOSSES)
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == [
        "iter_0000002",
        "iter_0000004",
        "iter_0000005",
    ]
    again = Run(tmp_path, checkpoint={"ckpt_step": 2})
    world.run(2, train_to, again, 3, save_at=(3,), **ONLY_LOSSES)
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text().strip() == "3"


def no_space(run):
    """Train to 2 with one good save, then one on a disk that fills up. Return the message."""
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    train_to(run, 1, save_at=(1,), **ONLY_LOSSES)

    def full(*_):
        raise OSError(28, "No space left on device")

    kept, FileSystemWriter.write_data = FileSystemWriter.write_data, full
    try:
        train_to(run, 2, save_at=(2,))
    except WeightsError as error:
        return str(error)
    finally:
        FileSystemWriter.write_data = kept
    return "saved"


def test_full_disk_keeps_the_previous_checkpoint(world, tmp_path):
    messages = world.run(2, no_space, Run(tmp_path))

    assert all("iter_0000002" in message and "No space left on device" in message for message in messages)
    assert all("\n" not in message for message in messages)
    assert [name for name in files(tmp_path) if "writing" in name] == []
    answer = world.run(2, train_to, Run(tmp_path), 2, **ONLY_LOSSES)[0]
    assert list(answer["losses"]) == [1]


def refusal(run):
    try:
        train_to(run, 1, **ONLY_LOSSES)
    except WeightsError as error:
        return str(error)
    return "loaded"


def test_missing_or_foreign_checkpoint_is_rejected(world, stopped, tmp_path):
    nothing = Run(tmp_path, checkpoint={"load": str(tmp_path / "nothing")})
    assert "latest_checkpointed_iteration.txt" in world.run(2, refusal, nothing)[0]
    wrong = Run(stopped, checkpoint={"ckpt_step": 3})
    assert names(world.run(2, refusal, wrong)[0], "iter_0000003", "complete checkpoints: 4", "--ckpt-step")
    other = Run(stopped, Setup(trainable="all"))
    assert names(world.run(2, refusal, other)[0], "lacks", "wan_dit", "predictor.trainable")
    assert "4567" in world.run(2, refusal, Run(stopped, base="4567"))[0]
    assert "set predictor.from_pretrained" in world.run(2, refusal, Run(stopped, base=None))[0]


class Hostile:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("hostile-was-here",)


def test_index_that_carries_code_is_rejected_before_it_runs(world, stopped, tmp_path):
    forged = tmp_path / "iter_0000004"
    shutil.copytree(stopped / "iter_0000004", forged)
    (forged / ".metadata").write_bytes(pickle.dumps(Hostile()))
    (forged / "checksums.json").unlink()

    message = world.run(1, refusal, Run(tmp_path, checkpoint={"ckpt_step": 4}))[0]

    assert names(message, f"{forged}/.metadata", "safely")
    assert not os.path.exists("hostile-was-here")


def test_converted_weights_in_a_release_folder_are_a_start(world, tmp_path):
    """--load accepts a folder that hf_to_mm wrote, as in the old scripts."""
    state = tiny_transformer(9).state_dict()
    folder = tmp_path / "release" / "mp_rank_00"
    folder.mkdir(parents=True)
    named = {KEY_MAPS["mm"].to_theirs(name): weight for name, weight in state.items()}
    torch.save({"model": named}, folder / "model_optim_rng.pt")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release\n")

    answer = world.run(2, train_to, Run(tmp_path), 0)[0]

    assert all(torch.equal(answer["weights"][name], weight) for name, weight in state.items())
