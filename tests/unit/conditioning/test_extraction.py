"""Each row once, nothing twice, nothing lost."""

import json
import multiprocessing
import signal
import time
from dataclasses import replace

import pytest
import torch

from mindspeed_mm.conditioning.extraction import Failed
from mindspeed_mm.data.features import Finished, read_feature, read_info
from mindspeed_mm.data.sample import SampleRecord
from mindspeed_mm.errors import DataError
from mindspeed_mm.safetensors_header import read_safetensors_header
from tests.support.extract_world import CellVae, H, W, load, make_extraction, write_rows

pytestmark = pytest.mark.medium


def run(save_path, rows, **settings):
    extraction = make_extraction(save_path, **settings)
    return extraction, list(extraction.run(rows))


def files(save_path):
    return sorted(path.name for path in (save_path / "features").iterdir())


def contents(save_path):
    return {path.name: path.read_bytes() for path in (save_path / "features").iterdir()}


def test_equal_captions_on_two_clips_are_two_features(tmp_path):
    _, rows = run(tmp_path / "out", write_rows(tmp_path, 3, ["one caption"]))
    assert len({row.key for row in rows}) == len(files(tmp_path / "out")) == 3


def test_two_rows_are_two_features_and_a_list_is_one(tmp_path):
    (row,) = write_rows(tmp_path, 1)
    rows = [
        replace(row, captions=("a",)),
        replace(row, captions=("b c",)),
        replace(row, captions=("a", "b c")),
    ]
    _, done = run(tmp_path / "out", rows)
    assert len({row.key for row in done}) == 3
    both = read_feature(tmp_path / "out/features" / f"{done[2].key}.safetensors")
    assert [len(prompt) for prompt in both.prompt_embeds] == [2, 3]


def test_repeated_row_is_encoded_once_and_listed_twice(tmp_path):
    (row,) = write_rows(tmp_path, 1)
    extraction, done = run(tmp_path / "out", [row, replace(row, row=1, address="data.json[1]")])
    assert [row.fresh for row in done] in ([True, False], [False, True])
    assert done[0].key == done[1].key
    assert extraction.vae.vae.calls == 2  # the video, and gray


def test_feature_holds_conditioning_and_its_source(tmp_path):
    (row,) = write_rows(tmp_path, 1, ["ein Ball, 红色"])
    reference = tmp_path / "ref.png"
    reference.write_bytes(b"\x80")
    row = replace(row, src_video=row.video, src_ref_images=(reference,))
    _, (done,) = run(tmp_path / "out", [row])
    path = tmp_path / "out/features" / f"{done.key}.safetensors"
    info, record = read_info(path), read_feature(path)
    assert done.shape == info.shape == (1 + 2, H // 8, W // 8)
    assert done.num_refs == info.num_refs == record.num_refs == 1
    assert record.key == done.key
    assert record.latents.dtype == torch.bfloat16
    assert not record.vace_context[16:, :1].any()
    assert json.loads(info.metadata["captions"]) == ["ein Ball, 红色"]
    assert info.metadata["frames"] == "5"
    assert info.metadata["source"] == str(row.video)


def test_second_run_encodes_and_opens_nothing(tmp_path):
    rows = write_rows(tmp_path, 3)
    run(tmp_path / "out", rows)
    before = contents(tmp_path / "out")
    extraction = make_extraction(tmp_path / "out")
    extraction.load = None  # would raise if it were called
    assert [row.fresh for row in extraction.run(rows)] == [False] * 3
    assert extraction.vae.vae.calls == 0
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("change", [{"num_frames": 9}, {"text": "another t5"}, {"weights": "another vae"}])
def test_changed_settings_make_new_features(tmp_path, change):
    rows = write_rows(tmp_path, 2)
    _, before = run(tmp_path / "out", rows)
    _, after = run(tmp_path / "out", rows, **change)
    assert all(row.fresh for row in after)
    assert not {row.key for row in before} & {row.key for row in after}
    assert len(files(tmp_path / "out")) == 4


@pytest.mark.parametrize("change", [{"num_frames": 9}, {"weights": "another vae"}])
def test_new_pixel_settings_reuse_prompt_embeddings(tmp_path, change):
    rows = write_rows(tmp_path, 2)
    rows[1] = replace(rows[1], captions=("another one, 雪", "two"))
    run(tmp_path / "out", rows)
    again, done = run(tmp_path / "out", rows, **change)
    assert again.text.text_encoder.prompts == []
    assert again.vae.vae.calls == 2 + 1  # both clips, and gray
    run(tmp_path / "anew", rows, **change)
    now = contents(tmp_path / "out")
    assert all(now[name] == value for name, value in contents(tmp_path / "anew").items())
    (tmp_path / "out/features" / f"{done[0].key}.safetensors").unlink()
    other, _ = run(tmp_path / "out", rows[:1], **change)  # the feature that held its caption last is gone
    assert other.text.text_encoder.prompts == ["a red ball"]


@pytest.mark.parametrize("change", ["caption", "text encoder"])
def test_new_captions_reuse_latents(tmp_path, change):
    rows = write_rows(tmp_path, 2)
    run(tmp_path / "out", rows)
    text = "t5" if change == "caption" else "another t5"
    if change == "caption":
        rows[1] = replace(rows[1], captions=("another one, 雪", "two"))
    extraction = make_extraction(tmp_path / "out", text=text)
    extraction.load = None  # would raise if it were called
    done = list(extraction.run(rows))
    assert sum(row.fresh for row in done) == (1 if change == "caption" else 2)
    assert extraction.vae.vae.calls == 0
    _, fresh = run(tmp_path / "anew", rows, text=text)
    assert {row.key for row in fresh} == {row.key for row in done}
    now = contents(tmp_path / "out")
    assert all(now[name] == value for name, value in contents(tmp_path / "anew").items())


def test_latents_that_were_deleted_or_torn_are_recreated(tmp_path):
    rows = write_rows(tmp_path, 1)
    _, (before,) = run(tmp_path / "out", rows)
    path = tmp_path / "out/features" / f"{before.key}.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    extraction, (after,) = run(tmp_path / "out", [replace(rows[0], captions=("another",))])
    assert after.fresh
    assert extraction.vae.vae.calls == 2  # the video, and gray


def flip(path, name):
    """One bit of a tensor of a feature."""
    header, start, _ = read_safetensors_header(path, DataError)
    content = bytearray(path.read_bytes())
    content[start + header[name]["data_offsets"][0]] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("part", ["video", "prompt_ids"])
def test_damaged_feature_is_recreated_not_reused(tmp_path, part):
    """New captions want its latents, new pixel settings its prompts; both rows end with sound features."""
    rows = write_rows(tmp_path, 2)
    rows[1] = replace(rows[1], captions=("of the second row",))
    _, done = run(tmp_path / "out", rows)
    sound = contents(tmp_path / "out")
    first = tmp_path / "out/features" / f"{done[0].key}.safetensors"
    flip(first, part)
    if part == "video":
        more, settings = [*rows, replace(rows[0], captions=("another",), row=2)], {}
    else:
        more, settings = rows, {"num_frames": 9}
    extraction, again = run(tmp_path / "out", more, **settings)
    assert [row.record.row for row in again if isinstance(row, Finished)] == [row.row for row in more]
    assert not [row for row in again if isinstance(row, Failed)]
    assert extraction.text.text_encoder.prompts == (["another"] if part == "video" else ["a red ball"])
    for row in again:
        read_feature(tmp_path / "out/features" / f"{row.key}.safetensors")
    if part == "video":  # the damaged one is of this run, too
        assert contents(tmp_path / "out")[first.name] == sound[first.name]


def test_only_what_changed_is_redone(tmp_path):
    rows = write_rows(tmp_path, 4)
    run(tmp_path / "out", rows)
    rows[1].video.write_bytes(b"another clip under the same name")
    rows[2] = replace(rows[2], captions=("another caption",))
    _, done = run(tmp_path / "out", rows)
    assert sorted(row.record.row for row in done if row.fresh) == [1, 2]


def test_touched_file_of_the_same_content_is_not_redone(tmp_path):
    rows = write_rows(tmp_path, 2)
    run(tmp_path / "out", rows)
    rows[0].video.touch()
    assert not any(row.fresh for row in run(tmp_path / "out", rows)[1])


def test_soft_mask_concerns_only_rows_with_a_mask(tmp_path):
    row = write_rows(tmp_path, 1)[0]
    masked = replace(row, src_mask=row.video)
    digests = {row.video: "x"}
    hard = make_extraction(tmp_path).keys
    soft = replace(hard, pixels={**hard.pixels, "soft_mask": True})
    assert hard.key(row, digests) == soft.key(row, digests)
    assert hard.key(masked, digests) != soft.key(masked, digests)


def test_same_file_in_another_role_is_another_feature(tmp_path):
    row = write_rows(tmp_path, 1)[0]
    keys = make_extraction(tmp_path).keys
    digests = {row.video: "x"}
    roles = [
        row,
        replace(row, src_video=row.video),
        replace(row, src_mask=row.video),
        replace(row, src_ref_images=(row.video,)),
    ]
    assert len({keys.key(role, digests) for role in roles}) == 4


def test_torn_feature_is_recreated(tmp_path):
    rows = write_rows(tmp_path, 2)
    run(tmp_path / "out", rows)
    whole = contents(tmp_path / "out")
    torn = tmp_path / "out/features" / files(tmp_path / "out")[0]
    torn.write_bytes(torn.read_bytes()[:-7])
    assert sum(row.fresh for row in run(tmp_path / "out", rows)[1]) == 1
    assert contents(tmp_path / "out") == whole


def test_corrupt_row_is_reported_and_the_rest_continues(tmp_path):
    rows = write_rows(tmp_path, 3)
    rows[1].video.write_bytes(b"corrupt")
    missing = SampleRecord(video=tmp_path / "gone.clip", captions=("a",), address="data.json[3]", row=3)
    _, done = run(tmp_path / "out", [*rows, missing])
    failed = [row for row in done if isinstance(row, Failed)]
    assert [row.reason.split(":")[0] for row in failed] == ["data.json[1]", "data.json[3]"]
    assert "no frames" in failed[0].reason
    assert "gone.clip" in failed[1].reason
    assert sum(isinstance(row, Finished) for row in done) == 2


def hang(record):
    if record.row == 1:
        time.sleep(600)
    return load(record)


def test_clip_that_hangs_the_decoder_costs_one_row(tmp_path):
    rows = write_rows(tmp_path, 3)
    extraction = make_extraction(tmp_path / "out", workers=1, timeout=8.0)
    extraction.load = hang
    started = time.monotonic()
    done = list(extraction.run(rows))
    assert time.monotonic() - started < 60
    (failed,) = [row for row in done if isinstance(row, Failed)]
    assert failed.record.row == 1
    assert "--sample-timeout" in failed.reason
    assert len(files(tmp_path / "out")) == 2


def in_child(function, *arguments):
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    process.join(120)
    return process.exitcode


def run_until_killed(folder, at):
    extraction = make_extraction(folder / "out", CellVae(at=at, number=signal.SIGKILL))
    list(extraction.run(write_rows(folder / "rows", 6)))


def test_kill_9_loses_nothing_and_repeats_nothing(tmp_path):
    assert in_child(run_until_killed, tmp_path, 5) == -signal.SIGKILL
    survivors = contents(tmp_path / "out")
    whole = {name for name in survivors if not name.startswith(".")}
    assert 0 < len(whole) < 6
    extraction, done = run(tmp_path / "out", write_rows(tmp_path / "rows", 6))
    assert sorted(row.record.row for row in done) == [0, 1, 2, 3, 4, 5]
    assert sum(row.fresh for row in done) == 6 - len(whole)
    assert extraction.vae.vae.calls == 6 - len(whole) + 1  # and gray
    run(tmp_path / "reference", write_rows(tmp_path / "rows", 6))
    finished = {name: data for name, data in contents(tmp_path / "out").items() if not name.startswith(".")}
    assert finished == contents(tmp_path / "reference")


def test_stop_signal_lets_the_current_row_finish(tmp_path):
    rows, extraction = write_rows(tmp_path, 5), make_extraction(tmp_path / "out")
    done = list(extraction.run(rows, stop=lambda: extraction.vae.vae.calls >= 3))
    assert [row.record.row for row in done] == [0, 1]
    assert len(files(tmp_path / "out")) == 2


class StuckVae(CellVae):
    def encode(self, video):
        time.sleep(600)


def run_stuck(folder):
    list(make_extraction(folder / "out", StuckVae(), timeout=1.0).run(write_rows(folder / "rows", 1)))


def test_device_that_never_answers_ends_the_process(tmp_path):
    assert in_child(run_stuck, tmp_path) == 1
