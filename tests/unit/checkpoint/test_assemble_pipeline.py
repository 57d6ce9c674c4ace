"""Two experts, a VAE and a text encoder become a WanVACEPipeline folder that diffusers loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, WanVACEPipeline
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from checkpoint.cli import main
from mindspeed_mm.progress import Progress
from tests.support.tiny import TEXT_FILE, VAE_FILE, tiny_transformer, write_official, write_transformer

pytestmark = pytest.mark.medium

SAVERS = {"vae": AutoencoderKLWan, "text_encoder": UMT5EncoderModel, "tokenizer": PreTrainedTokenizerBase}


@pytest.fixture
def argv(tmp_path: Path) -> list[str]:
    """Two experts, VAE, text encoder and tokenizer; the pipeline goes to `pipe`."""
    home = write_official(tmp_path / "a14b")
    for name, seed in (("high_noise_model", 1), ("low_noise_model", 2)):
        write_transformer(home / name, tiny_transformer(seed), torch.float32)
    parts = {
        "high_path": home / "high_noise_model",
        "low_path": home / "low_noise_model",
        "vae_path": home / VAE_FILE,
        "text_encoder_path": home / TEXT_FILE,
        "target_path": tmp_path / "pipe",
    }
    flags = [word for name, path in parts.items() for word in (f"--cfg.{name}", str(path))]
    return ["VACEConverter", "assemble_pipeline", *flags]


def test_a14b_becomes_a_pipeline_of_diffusers(
    tmp_path: Path, argv: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bars = []
    closed = Progress.close
    monkeypatch.setattr(Progress, "close", lambda bar: (bars.append((bar.done, bar.total)), closed(bar))[1])
    for _ in range(2):
        main(argv)
    assert len(bars) == 2
    assert all(done == total > 0 for done, total in bars)
    pipe = WanVACEPipeline.from_pretrained(tmp_path / "pipe", torch_dtype=torch.float32)
    assert pipe.config.boundary_ratio == 0.875
    high, low = tiny_transformer(1).state_dict(), tiny_transformer(2).state_dict()
    assert torch.equal(pipe.transformer.proj_out.weight, high["head.head.weight"])
    assert torch.equal(pipe.transformer_2.proj_out.weight, low["head.head.weight"])
    assert pipe.scheduler.config.flow_shift == 12
    assert pipe.tokenizer("a red ball").input_ids
    assert pipe.vae.config.z_dim == 16
    assert sorted(path.name for path in (tmp_path / "pipe").iterdir()) == sorted(
        ["model_index.json", "scheduler", "text_encoder", "tokenizer", "transformer", "transformer_2", "vae"]
    )


@pytest.mark.parametrize("part", SAVERS)
def test_every_part_is_read_back(
    tmp_path: Path,
    argv: list[str],
    part: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A disk that changes one byte of what was saved is noticed, and nothing is moved into place."""
    save = SAVERS[part].save_pretrained

    def lossy(self: object, folder: Path, **settings: object) -> object:
        saved = save(self, folder, **settings)
        file = next(
            path
            for path in folder.iterdir()
            if path.suffix == ".safetensors" or path.name == "tokenizer.json"
        )
        data = file.read_bytes()
        file.write_bytes(
            data.replace(b"ball", b"bell") if part == "tokenizer" else data[:-1] + bytes([data[-1] ^ 1])
        )
        assert file.read_bytes() != data
        return saved

    monkeypatch.setattr(SAVERS[part], "save_pretrained", lossy)
    with pytest.raises(SystemExit):
        main(argv)
    error = capsys.readouterr().err
    kind, where, _ = error.split(": ", 2)
    assert (kind, Path(where).name) == ("WeightsError", part)
    assert "different" in error
    assert not (tmp_path / "pipe").exists()
