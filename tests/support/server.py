"""A server without models: a queue, folders and routes, behind the guard."""

from __future__ import annotations

from pathlib import Path

from starlette.testclient import TestClient

from mindspeed_mm.serve.app import Service, build_app
from mindspeed_mm.serve.config import ServeConfig
from mindspeed_mm.serve.engine import Engine
from mindspeed_mm.serve.folders import JobFolders
from mindspeed_mm.serve.jobs import JobStore

TINY = Path(__file__).resolve().parents[2] / "examples/vace/tiny/weights"
BASE = {
    "model": {
        "transformer": [str(TINY / "vace")],
        "vae": str(TINY / "Wan2.1_VAE.pth"),
        "text_encoder": str(TINY / "models_t5_umt5-xxl-enc-bf16.pth"),
    },
    "height": 64,
    "width": 64,
    "num_frames": 17,
}


class IdleEngine(Engine):
    """Workers that are always ready and never take a job: tests do, through the queue."""

    def start(self) -> None:
        """Start nothing."""
        self.loaded = True

    def stop(self) -> None:
        """Stop nothing."""

    def state(self) -> tuple[str, str]:
        """As the test sets it."""
        return ("ready", "") if self.loaded else ("loading", "the weights are being read")


class Server:
    """A running application, and what is behind it."""

    def __init__(self, folder: Path, token: str | None = None, **settings: object) -> None:
        folder.mkdir(exist_ok=True)
        config = ServeConfig(data_dir=str(folder), **settings)
        self.store, self.folders = JobStore(folder), JobFolders(folder)
        self.engine = IdleEngine(self.store, self.folders, config, {"data_dir": str(folder)})
        service = Service(config, self.store, self.folders, self.engine, "tiny", BASE)
        self.client = TestClient(build_app(service, token), base_url="http://127.0.0.1")
