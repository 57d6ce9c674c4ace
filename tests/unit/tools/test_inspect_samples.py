"""mm-inspect: every kind of path, a sheet for each, one line per error, and no torch before it is needed."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from mindspeed_mm.conditioning.vace import encode_features
from mindspeed_mm.data.config import VideoConfig
from mindspeed_mm.data.features import write_feature
from mindspeed_mm.data.manifest import read_manifest
from mindspeed_mm.data.sample import FeatureRecord
from mindspeed_mm.data.transforms import load_sample
from mindspeed_mm.data.video_writer import write_video
from mindspeed_mm.models.wan.vae import WanVae
from mindspeed_mm.tools import sheets
from mindspeed_mm.tools.inspect_samples import main
from mindspeed_mm.tools.sheets import feature_sheet, sample_sheet
from tests.support.clips import numbered, write_clip
from tests.support.errors import absent, meant, names
from tests.support.tiny import tiny_vae, write_tokenizer, write_vae

pytestmark = pytest.mark.medium


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Four rows: everything, video alone, mask alone, and one without its file; and a data config."""
    folder = tmp_path_factory.mktemp("dataset")
    write_clip(folder / "v.mp4", 12, height=64, width=80)
    mask = np.zeros((12, 64, 80, 3), np.uint8)
    mask[:, :32] = 255
    write_video(folder / "m.mkv", mask, 16, lossless=True)
    Image.fromarray(numbered(1)[0]).save(folder / "r.png")
    full = {
        "video": "v.mp4",
        "cap": ["一", "two"],
        "src_video": "v.mp4",
        "src_video_mask": "m.mkv",
        "src_ref_images": ["r.png"],
    }
    rows = [
        full,
        {"video": "v.mp4", "cap": "x"},
        {"video": "v.mp4", "cap": "x", "src_video_mask": "m.mkv"},
        {"video": "no.mp4", "cap": "x"},
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "data.txt").write_text(f"{folder},rows.json\n")
    settings = {
        "basic_parameters": {"data_path": str(folder / "data.txt")},
        "preprocess_parameters": {"num_frames": 5},
    }
    (folder / "config.json").write_text(json.dumps({"dataset_param": settings}))
    return folder


@pytest.fixture(scope="module")
def feature(dataset):
    """A feature file of the full row, listed in a data.jsonl; and the VAE."""
    record = read_manifest(_good(dataset))[0]
    sample = load_sample(record, VideoConfig(num_frames=9))
    vae = WanVae(tiny_vae(0), "tiny")
    latents, context = encode_features(vae, sample)
    prompts = (torch.zeros(3, 32), torch.zeros(4, 32))
    made = FeatureRecord(
        latents=latents, vace_context=context, prompt_embeds=prompts, num_refs=1, key="k" * 64
    )
    path = dataset / "out" / "features" / "k.safetensors"
    write_feature(
        path, made, {"captions": json.dumps(["一", "two"]), "frames": "9", "fps": "16", "source": "v.mp4"}
    )
    (dataset / "out" / "data.jsonl").write_text(json.dumps({"file": "k.safetensors"}) + "\n")
    return path, vae


def _good(dataset):
    path = dataset / "good.json"
    path.write_text(json.dumps(json.loads((dataset / "rows.json").read_text())[:3]))
    return path


def test_dataset_is_checked_and_its_first_row_drawn(dataset, tmp_path, capsys):
    main([str(dataset), "--out", str(tmp_path / "s.png"), "--workers", "0"])
    said = capsys.readouterr().out
    assert "clips       3 of 4, 1 bad" in said
    assert "left out: rows.json[3].video: " in said
    assert "s.png: rows.json[0], 9 frames (keep)" in said
    assert Image.open(tmp_path / "s.png").width == 1640


def test_captions_that_will_be_cut_are_counted(dataset, tmp_path, capsys):
    write_tokenizer(tmp_path / "umt5")
    config = json.loads((dataset / "config.json").read_text())
    config["dataset_param"]["basic_parameters"]["data_path"] = str(_good(dataset))
    config["dataset_param"]["tokenizer_config"] = {
        "from_pretrained": str(tmp_path / "umt5"),
        "model_max_length": 3,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = ["--out", str(tmp_path / "s.png"), "--workers", "0"]
    main([str(tmp_path / "config.json"), *options])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "captions have" in line]
    assert "good.json[0]" in line
    main([str(tmp_path / "config.json"), *options, "--index", "0"])
    assert re.search(r"\b1 of 2 captions\b.*\b3 tokens\b", capsys.readouterr().out)  # of the row's two
    main([str(_good(dataset)), *options, "--tokenizer", str(tmp_path / "umt5")])  # 512 tokens
    assert "captions have" not in capsys.readouterr().out


def test_long_captions_are_named_without_a_tokenizer(dataset, tmp_path, capsys):
    rows = [{"video": "v.mp4", "cap": "a red ball bounces " * count} for count in (20, 200)]
    (dataset / "long.json").write_text(json.dumps(rows))
    main([str(dataset / "long.json"), "--out", str(tmp_path / "s.png"), "--workers", "0"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "captions may" in line]
    assert line.startswith("1 captions ")
    assert names(line, "512 tokens")
    assert "long.json[1]; --tokenizer" in line


@pytest.mark.parametrize("index", [0, 1, 2])
def test_any_row_can_be_drawn_with_the_settings_of_a_data_config(dataset, tmp_path, capsys, index):
    main([str(dataset / "config.json"), "--index", str(index), "--out", str(tmp_path / "s.jpg")])
    assert f"rows.json[{index}], 5 frames (trim)" in capsys.readouterr().out
    Image.open(tmp_path / "s.jpg").load()


def test_sheet_shows_what_is_kept_and_what_is_generated(dataset):
    record = read_manifest(_good(dataset))[0]
    sample = load_sample(record, VideoConfig(num_frames=9))
    bare = sample_sheet(
        read_manifest(_good(dataset))[1],
        load_sample(read_manifest(_good(dataset))[1], VideoConfig(num_frames=9)),
    )
    assert (
        sample_sheet(record, sample).height > bare.height + 4 * 100
    )  # src_video, mask, inactive, reactive, references


def test_sheet_has_the_remarks_on_every_file(tmp_path, monkeypatch):
    write_clip(tmp_path / "v.mp4", 5, height=64, width=80)
    labels = Image.fromarray(np.eye(64, 80, dtype=np.uint8)).convert("P")
    labels.putpalette([0, 0, 0, 128, 0, 0] + [0] * 750)
    labels.save(tmp_path / "m.png")
    pages = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    pages[0].save(tmp_path / "r.tif", save_all=True, append_images=pages[1:])
    row = {"video": "v.mp4", "cap": "x", "src_video_mask": "m.png", "src_ref_images": ["r.tif"]}
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    (record,) = read_manifest(tmp_path / "rows.json")
    drawn = {}
    monkeypatch.setattr(sheets, "draw_sheet", lambda *arguments, **named: drawn.update(named))
    sheets.sample_sheet(record, load_sample(record, VideoConfig(num_frames=5)))
    remarks = [fact for fact in drawn["facts"] if fact.startswith("src_")]
    assert [remark.partition(":")[0] for remark in remarks] == ["src_video_mask", "src_ref_images[0]"]
    assert "palette" in remarks[0]
    assert "pages" in remarks[1]


@pytest.mark.parametrize("count", [1, 3])
def test_json_of_one_object_a_line_is_a_dataset(dataset, tmp_path, capsys, count):
    rows = json.loads((dataset / "rows.json").read_text())[1:2] * count
    (dataset / "lines.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    main([str(dataset / "lines.json"), "--out", str(tmp_path / "s.png"), "--workers", "0"])
    assert f"clips       {count} of {count}" in capsys.readouterr().out


def test_folder_of_clips_and_texts_is_a_dataset(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--out", str(tmp_path / "s.png")])
    error = capsys.readouterr().err
    assert error.startswith(f"DataError: {tmp_path}: ")
    assert names(error, "clips", ".mp4", ".txt")
    write_clip(tmp_path / "v.mp4", 5, height=32, width=48)
    (tmp_path / "v.txt").write_text("a red ball")
    main([str(tmp_path), "--out", str(tmp_path / "s.png"), "--workers", "0"])
    assert "clips       1 of 1" in capsys.readouterr().out


def test_table_named_json_says_so(tmp_path, capsys):
    (tmp_path / "data.json").write_text("video,prompt\nv.mp4,x\n")
    with pytest.raises(SystemExit):
        main([str(tmp_path / "data.json"), "--out", str(tmp_path / "s.png")])
    assert "data.json: contains CSV" in capsys.readouterr().err


def test_feature_is_drawn_with_and_without_the_vae(dataset, feature, tmp_path, capsys):
    path, vae = feature
    main([str(dataset / "out"), "--out", str(tmp_path / "s.png")])
    assert "--vae" in capsys.readouterr().out
    assert feature_sheet(path).size == Image.open(tmp_path / "s.png").size
    write_vae(tmp_path / "vae.pth", vae.model)
    main([str(path), "--vae", str(tmp_path / "vae.pth"), "--out", str(tmp_path / "decoded.png")])
    coloured, decoded = (np.asarray(Image.open(tmp_path / name)) for name in ("s.png", "decoded.png"))
    assert decoded.shape[1] == coloured.shape[1]
    assert decoded.shape != coloured.shape or (decoded != coloured).any()


class CountingDecoder:
    """Decodes to gray at the latents' mean, and counts its inputs."""

    device = torch.device("cpu")

    def __init__(self):
        self.given = []

    def decode(self, latents):
        self.given.append(tuple(latents.shape))
        frames = 4 * (latents.shape[2] - 1) + 1
        gray = latents.mean(dim=(1, 2, 3, 4)).tanh()
        return gray[:, None, None, None, None].expand(
            -1, 3, frames, 8 * latents.shape[3], 8 * latents.shape[4]
        )


def test_feature_sheet_decodes_only_what_it_draws(tmp_path):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(16, 21 + 2, 4, 6, generator=generator)
    context = torch.randn(96, 21 + 2, 4, 6, generator=generator)
    context[16:32, 2:], context[16:, :2] = (
        latents[:, 2:],
        0,
    )  # everything is generated, from the video itself
    prompts = (torch.zeros(3, 32),)
    made = FeatureRecord(
        latents=latents.bfloat16(),
        vace_context=context.bfloat16(),
        prompt_embeds=prompts,
        num_refs=2,
        key="k",
    )
    write_feature(tmp_path / "k.safetensors", made, {})
    vae = CountingDecoder()
    short = feature_sheet(tmp_path / "k.safetensors", vae, decode_frames=17)
    assert vae.given == [(2, 16, 5, 4, 6), (2, 16, 1, 4, 6)]
    vae.given.clear()
    long = feature_sheet(tmp_path / "k.safetensors", vae)
    assert vae.given == [(2, 16, 21, 4, 6), (2, 16, 1, 4, 6)]
    assert short.width == long.width == feature_sheet(tmp_path / "k.safetensors").width


def test_large_frames_are_decoded_one_clip_at_a_time(tmp_path):
    made = FeatureRecord(
        latents=torch.zeros(16, 1, 60, 104),
        vace_context=torch.ones(96, 1, 60, 104),
        prompt_embeds=(torch.zeros(3, 32),),
        num_refs=0,
        key="k",
    )
    write_feature(tmp_path / "k.safetensors", made, {})
    vae = CountingDecoder()
    feature_sheet(tmp_path / "k.safetensors", vae)
    assert vae.given == [(1, 16, 1, 60, 104), (1, 16, 1, 60, 104)]


def test_mask_of_a_feature_is_unfolded_to_what_went_in(feature):
    sheet = np.asarray(feature_sheet(feature[0]))
    white = (sheet == 255).all(axis=-1).sum(axis=1)  # pixels in each line; the mask's upper half is white
    black = (sheet == 0).all(axis=-1).sum(axis=1)
    upper, lower = np.flatnonzero(white > 500), np.flatnonzero(black > 500)
    assert len(upper) > 40
    assert len(lower) > 40
    assert upper.max() < lower.max()


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (["nowhere.txt"], [f"nowhere.txt: {absent('nowhere.txt')}"]),
        (["{d}/rows.json", "--index", "9"], ["--index 9: {d}/rows.json", "0..3"]),
        (["{d}/rows.json", "--index", "3"], [f"rows.json[3].video: {{d}}/no.mp4: {absent('no.mp4')}"]),
        (
            ["{d}/rows.json", "--index", "0", "--out", "x.gif"],
            ["--out x.gif: ", ".png, .jpg or .webp"],
        ),
        (["{d}/rows.json", "--indx", "0"], [f"'--indx' {meant('--index')}"]),
        (["{d}/v.mp4"], ["v.mp4: expected text", "binary"]),
        (["{d}/rows.json", "--workers", "0", "--skip-bad-samples", "0"], ["--skip-bad-samples N"]),
    ],
)
def test_bad_input_ends_in_one_line(dataset, capsys, arguments, facts):
    with pytest.raises(SystemExit) as end:
        main([argument.format(d=dataset) for argument in arguments])
    said = capsys.readouterr().err
    assert end.value.code == 1
    assert [fact for fact in facts if fact.format(d=dataset) not in said] == []
    assert said.count("\n") == 1


def test_help_and_mistakes_do_not_wait_for_torch():
    code = (
        "import sys\nfrom mindspeed_mm.tools.inspect_samples import main\n"
        "for argv in (['--help'], ['nowhere.txt']):\n"
        "    try:\n        main(argv)\n    except SystemExit:\n        pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.mark.parametrize(
    "out", ["file/sheet.png", "/proc/sheet.png", "folder.png", f"{'x' * 256}.png", "/dev/null.gif"]
)
def test_sheet_that_cannot_be_written_is_rejected_first(tmp_path, monkeypatch, capsys, out):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(SystemExit) as stop:
        main(["missing.jsonl", "--out", out])
    assert stop.value.code == 1
    assert "--out" in capsys.readouterr().err
