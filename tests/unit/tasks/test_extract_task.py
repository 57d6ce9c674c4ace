"""The extraction command from argv to files, in this process, on tiny models."""

import fcntl
import json
import os
import re
import select
import signal
import struct
import termios
import time
from dataclasses import replace

import av
import numpy as np
import pytest
import torch

from mindspeed_mm.conditioning.extraction import DEFAULT_BATCH
from mindspeed_mm.conditioning.vace import StreamEncoder, encode_features
from mindspeed_mm.config.schema import parse
from mindspeed_mm.data.config import ClipRow, FeatureRow
from mindspeed_mm.data.dataset import FeatureDataset, VaceDataset
from mindspeed_mm.data.features import read_info, read_null_prompt
from mindspeed_mm.data.registry import read_data_config
from mindspeed_mm.models.umt5.encoder import TextEncoder, load_text_encoder
from mindspeed_mm.models.wan.vae import WanVae, load_vae
from mindspeed_mm.processes import Stopped
from mindspeed_mm.tasks.extract import main
from mindspeed_mm.tasks.extraction import Outcome, Ranks, clip_progress, extract, shard_rows
from mindspeed_mm.tasks.jobs.extract import ExtractJob
from tests.support.clips import turn, write_clip, write_variable
from tests.support.errors import names
from tests.support.extract_job import make_job, spoil
from tests.support.extract_world import CellVae, make_extraction, write_rows
from tests.support.tiny import TEXT_FILE, VAE_FILE

pytestmark = pytest.mark.medium


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("extract")
    main([*make_job(root), "--num-workers", "0"])
    return root


def features(root):
    config = read_data_config_of(root / "out")
    return FeatureDataset(config)


def read_data_config_of(out):
    path = out / "feature_data.json"
    values = {
        "dataset_param": {
            "dataset_type": "feature",
            "basic_parameters": {"data_path": str(out / "data.jsonl")},
        }
    }
    path.write_text(json.dumps(values))
    return read_data_config(path).dataset_param


def test_every_row_becomes_the_feature_that_conditioning_gives(root):
    vae = StreamEncoder(load_vae(root / "models" / VAE_FILE), max_batch=DEFAULT_BATCH)
    text = load_text_encoder(root / "models" / TEXT_FILE, dtype=torch.float32, text_len=16)
    clips = VaceDataset(read_data_config(root / "data.json").dataset_param)
    dataset = features(root)
    assert len(dataset) == len(clips) == 6
    for row in range(6):
        sample, record = clips[row], dataset[row]
        latents, context = encode_features(vae, sample)
        assert torch.equal(record.latents, latents.bfloat16())
        assert torch.equal(record.vace_context, context.bfloat16())
        assert record.num_refs == len(sample.src_ref_images) == dataset.shape(row)[3]
        assert len(record.prompt_embeds) == len(sample.captions)
        for stored, caption in zip(record.prompt_embeds, sample.captions, strict=True):
            assert torch.equal(stored, text.encode([caption])[0].bfloat16())


def test_list_repeats_the_rows_in_their_order(root):
    rows = [json.loads(line) for line in (root / "out/data.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["cap"] for row in rows] == [
        "a red ball",
        "a red ball",
        ["a red ball", "雪, the snow"],
        "in",
        "a cat",
        "a dog",
    ]
    assert all(os.path.exists(row["video"]) for row in rows)
    for row in rows:
        assert list(row) == [*ClipRow.model_fields, "file", "shape", "num_refs"]
        parse(ClipRow, {key: row[key] for key in ClipRow.model_fields}, "data.jsonl")
        parse(FeatureRow, {key: row.get(key) for key in FeatureRow.model_fields}, "data.jsonl")
    assert len({row["file"] for row in rows}) == 6
    assert [row["shape"] for row in rows] == [
        [3, 4, 4],
        [3, 4, 8],
        [3, 8, 4],
        [3, 4, 8],
        [5, 4, 4],
        [3, 4, 4],
    ]


def test_null_prompt_is_the_embedding_of_nothing(root):
    text = load_text_encoder(root / "models" / TEXT_FILE, dtype=torch.float32, text_len=16)
    assert torch.equal(
        read_null_prompt(root / "out/null_prompt.safetensors"), text.encode([""])[0].bfloat16()
    )
    assert torch.equal(features(root).null_prompt, text.encode([""])[0].bfloat16())


def test_job_is_saved_and_a_second_run_does_nothing(root, capsys):
    assert json.loads((root / "out/job.json").read_text())["extract"]["num_workers"] == 0
    before = {path: path.stat().st_mtime_ns for path in (root / "out/features").iterdir()}
    main([*make_job(root), "--num-workers", "0"])
    assert "extracted 0 clips" in capsys.readouterr().out
    main(
        [*make_job(root, video_reader_type="DecordVideo"), "--num-workers", "0"]
    )  # which gives the same frames
    assert "extracted 0 clips" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (root / "out/features").iterdir()} == before


def test_dry_run_counts_the_captions_that_are_cut(tmp_path, capsys):
    argv = make_job(tmp_path)
    rows = [{"video": "plain.mp4", "cap": "a red ball bounces " * 9}, {"video": "plain.mp4", "cap": "a ball"}]
    (tmp_path / "clips datası/data.json").write_text(json.dumps(rows))
    main([*argv, "--dry-run"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "captions" in line]
    assert names(line, "1 of 2 captions", "16 tokens")
    assert "data.json[0]" in line


def test_models_move_to_the_device_only_to_encode(root, monkeypatch, tmp_path):
    def refuse(self, device):
        raise AssertionError("a whole model was moved")

    monkeypatch.setattr(WanVae, "to", refuse)
    monkeypatch.setattr(TextEncoder, "to", refuse)
    main([*make_job(root), "--num-workers", "0", "--no-check-clips"])
    with pytest.raises(AssertionError, match="moved"):
        main([*make_job(root), "--num-workers", "0", "--no-check-clips", "--save-path", str(tmp_path)])


def test_rotated_and_variable_rate_clips_are_extracted(tmp_path):
    flags = [*make_job(tmp_path, max_hxw=96 * 128), "--num-workers", "0"]
    folder = tmp_path / "clips datası"
    turn(write_clip(tmp_path / "lying.mp4", 9), folder / "téléphone 90.mp4", 90)
    # every frame of a 16 fps grid is there, and two others between: they must not be taken
    write_variable(folder / "variable.mp4", [0, 20, 63, 125, 188, 250, 270, 313, 375, 438, 500])
    rows = [{"video": name, "cap": "a"} for name in ("téléphone 90.mp4", "variable.mp4")]
    (folder / "data.json").write_text(json.dumps(rows), encoding="utf-8")
    main(flags)
    dataset = features(tmp_path)
    assert dataset.shape(0)[:3] == (3, 128 // 8, 96 // 8)
    assert dataset.shape(1)[:3] == (3, 96 // 8, 128 // 8)
    vae = load_vae(tmp_path / "models" / VAE_FILE)
    taken = [0, 2, 3, 4, 5, 7, 8, 9, 10]
    assert json.loads(read_info(dataset.path(1)).metadata["frame_indices"]) == taken
    upright = np.rot90(decoded(tmp_path / "lying.mp4"), -1, axes=(1, 2))
    by_time = decoded(folder / "variable.mp4")[taken]
    for row, frames in enumerate((upright, by_time)):
        video = torch.from_numpy(frames.copy()).permute(3, 0, 1, 2).float() / 127.5 - 1
        assert torch.equal(dataset[row].latents, vae.encode(video[None])[0].bfloat16())


def decoded(path):
    """Every frame as FFmpeg gives it, without any turning: uint8 [T, H, W, 3]."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def failures_of(root):
    """Row and reason of every line of failed.jsonl."""
    lines = (root / "out/failed.jsonl").read_text(encoding="utf-8").splitlines()
    return [tuple(json.loads(line).values()) for line in lines]


def test_bad_clips_stop_the_run_or_are_listed(tmp_path, capsys):
    flags = [*make_job(tmp_path), "--num-workers", "0"]
    spoil(tmp_path / "clips datası")
    with pytest.raises(SystemExit) as ended:
        main([*flags, "--dry-run"])
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert all(f"data.json[{row}]" in line for row in (6, 7, 8))
    assert sorted(os.listdir(tmp_path / "out")) == [
        "failed.jsonl",
        "state",
    ]  # what was learnt of the good clips
    assert [row for row, _ in failures_of(tmp_path)] == [6, 7, 8]
    with pytest.raises(SystemExit):  # also where nobody looked before
        main([*flags, "--no-check-clips"])
    assert [row for row, _ in failures_of(tmp_path)] == [6]  # the first one stopped it
    with pytest.raises(SystemExit):
        main([*flags, "--no-check-clips", "--skip-bad-samples", "2"])
    capsys.readouterr()
    main([*flags, "--no-check-clips", "--skip-bad-samples", "3"])
    assert "3 failed" in capsys.readouterr().out
    assert [row for row, _ in failures_of(tmp_path)] == [6, 7, 8]
    assert all(reason.startswith(f"data.json[{row}]") for row, reason in failures_of(tmp_path))
    assert len((tmp_path / "out/data.jsonl").read_text().splitlines()) == 6


def test_bad_clips_are_named_if_their_list_cannot_be_written(tmp_path, capsys):
    flags = [*make_job(tmp_path), "--num-workers", "0"]
    spoil(tmp_path / "clips datası")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/failed.jsonl").mkdir()
    with pytest.raises(SystemExit) as ended:
        main([*flags, "--dry-run"])
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "data.json[6]" in line
    assert "failed.jsonl" not in line


def test_row_that_is_malformed_counts_as_a_bad_sample(tmp_path, capsys):
    flags = [*make_job(tmp_path), "--num-workers", "0", "--no-check-clips"]
    listing = tmp_path / "clips datası" / "data.json"
    rows = [*json.loads(listing.read_text())[:1], {"video": "gone.mp4", "cap": "a"}, {"video": "plain.mp4"}]
    listing.write_text(json.dumps(rows))
    with pytest.raises(SystemExit):
        main(flags)
    error = capsys.readouterr().err
    assert names(error, "2 of 3 rows")
    assert f"correct them ({tmp_path / 'out/failed.jsonl'})" in error
    assert [row for row, _ in failures_of(tmp_path)] == [1, 2]
    main([*flags, "--skip-bad-samples", "2"])
    assert re.search(r"\b0 failed, 2 \w+ rows\b.*; 1 rows\b", capsys.readouterr().out)
    assert len((tmp_path / "out/data.jsonl").read_text().splitlines()) == 1
    assert [row for row, _ in failures_of(tmp_path)] == [1, 2]


class Clips:
    """A stranger's dataset: three attributes."""

    def __init__(self, records):
        self.records, self.settings, self.load = records, {}, None


def stopped_job(root):
    return ExtractJob.from_argv([*make_job(root), "--num-workers", "0"])


def test_sigterm_finishes_the_current_clip(root, tmp_path):
    rows = write_rows(tmp_path, 5)
    job, out = stopped_job(root), tmp_path / "out"
    with pytest.raises(Stopped) as stopped:
        extract(job, Clips(rows), make_extraction(out, CellVae(at=3, number=signal.SIGTERM)), Ranks(0, 1))
    assert stopped.value.exit_code == 128 + signal.SIGTERM
    listed = (out / "data.jsonl").read_text().splitlines()
    assert len(listed) == len(list((out / "features").glob("*.safetensors"))) == 2
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    extraction = make_extraction(out)
    extract(job, Clips(rows), extraction, Ranks(0, 1))
    assert extraction.vae.vae.calls == 3 + 1  # three clips, and gray
    assert len((out / "data.jsonl").read_text().splitlines()) == 5


def test_each_row_belongs_to_exactly_one_rank(tmp_path):
    rows = write_rows(tmp_path, 7)
    rows[4] = replace(rows[1], row=4, address="data.json[4]")  # stands twice
    shares = [[row.row for row in shard_rows(rows, Ranks(rank, 3))] for rank in range(3)]
    assert sorted(row for share in shares for row in share) == list(range(7))
    assert any({1, 4} <= set(share) for share in shares)
    assert max(map(len, shares)) <= 3
    parts = []
    for share in shares:
        part = Outcome()
        for done in make_extraction(tmp_path / "out").run([rows[row] for row in share]):
            part.add(done)
        parts.append(part)
    assert [row.record.row for row in Outcome.merged(parts).finished] == list(range(7))


def test_bar_reaches_the_terminal_past_a_stderr_pipe(tmp_path, monkeypatch):
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    monkeypatch.setenv("MINDSPEED_MM_TERMINAL", os.ttyname(theirs))
    with clip_progress(2, Ranks(0, 1)) as progress:
        for row in make_extraction(tmp_path / "out").run(write_rows(tmp_path, 2)):
            progress.step(worked=row.fresh)
    shown, deadline = "", time.monotonic() + 30
    waiting = select.poll()  # select.select refuses descriptors above 1023
    waiting.register(ours, select.POLLIN)
    # a terminal passes on what it gets in its own time
    while "2/2" not in shown and time.monotonic() < deadline:
        if waiting.poll(1000):
            shown += os.read(ours, 65536).decode()
    os.close(ours)
    os.close(theirs)
    assert "2/2" in shown
    assert "clip/s" in shown or "s/clip" in shown
