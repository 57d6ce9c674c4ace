"""Runs `vace ui`. Imports gradio only after the arguments have been checked."""

from __future__ import annotations

import os
import secrets
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mindspeed_mm.config.flags import FlagParser, add_flags, given
from mindspeed_mm.config.overrides import Overrides
from mindspeed_mm.config.schema import parse
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.files import format_json, read_json_object
from mindspeed_mm.locks import lock_folder
from mindspeed_mm.log import get_logger, one_line_errors
from mindspeed_mm.outputs import check_folder
from mindspeed_mm.serve.config import ServeConfig
from mindspeed_mm.serve.main import (
    add_model_flags,
    address_of,
    check_installed,
    listen,
    open_server,
    read_model,
    read_token,
)
from mindspeed_mm.ui.config import UiConfig

LOGGER = get_logger(__name__)
PROG = "vace ui"
_PACKAGE = Path(__file__).resolve().parents[1]
_TINY = "tiny/inference.json"


def job_parser(prog: str = PROG) -> FlagParser:
    """Build the parser of `vace ui`."""
    parser = FlagParser(prog, "A page in the browser: edit clips, inspect datasets, follow runs.")
    add_model_flags(
        parser,
        "inference JSON of the page's own server (default: the tiny weights that come with the package)",
    )
    add_flags(parser, UiConfig, "the page")
    return parser


@one_line_errors
def main(argv: Sequence[str] | None = None, prog: str = PROG) -> None:
    """Run the command. Returns when a signal stops the page."""
    namespace = job_parser(prog).parse_strict(sys.argv[1:] if argv is None else argv)
    settings = parse(UiConfig, given(namespace, UiConfig), prog)
    outer = ServeConfig(
        host=settings.host,
        port=settings.port,
        token_file=settings.token_file,
        allowed_hosts=settings.allowed_hosts,
        max_upload_mb=settings.max_upload_mb,
    )
    password = read_token(outer)
    folder = Path(settings.data_dir).absolute()
    inner = ServeConfig(
        port=0, data_dir=str(folder), devices=settings.devices, max_upload_mb=settings.max_upload_mb
    )
    base: dict[str, Any] = {}
    is_tiny = settings.server is None and namespace.config is None and namespace.model is None
    if settings.server is None:
        config, overrides = namespace.config, Overrides.parse(namespace.set or ())
        base = (
            _read_tiny(inner, overrides) if is_tiny else read_model(config, namespace.model, overrides, inner)
        )
    elif namespace.config or namespace.model or namespace.set:
        raise ConfigError(
            "cannot be used with CONFIG.json, --model or --set, which configure the page's own server",
            where="--server",
        )
    if not Path(settings.root).is_dir():
        raise ConfigError("no such folder", where=f"--root {settings.root}")
    check_folder(settings.data_dir, "data_dir")
    if namespace.print_config:
        shown = {"page": settings.model_dump(mode="json"), "jobs": base, "token": password is not None}
        LOGGER.info(format_json(shown, indent=2))
        return
    check_installed(prog, "serve", "ui")
    if namespace.dry_run:
        LOGGER.info("the page's settings and weights are in order")
        return
    with lock_folder(folder, choose="data_dir"):
        if settings.server is not None:
            run(settings, outer, password, settings.server, None, is_tiny=False)
            return
        token = secrets.token_urlsafe(32)  # keeps other users of this machine out of the page's server
        with own_server(inner, token, base) as address:
            run(settings, outer, password, address, token, is_tiny=is_tiny)


def _read_tiny(settings: ServeConfig, overrides: Overrides) -> dict[str, Any]:
    """Call `read_model` with the tiny weights of the checkout or the package."""
    places = [_PACKAGE.parent / "examples/vace", _PACKAGE / "starter"]
    place = next((place for place in places if (place / _TINY).is_file()), None)
    if place is None:
        raise ConfigError(
            "the tiny weights are not installed",
            where=PROG,
            fix="pass CONFIG.json, --model FOLDER or --server URL",
        )
    model = read_json_object(place / _TINY)["model"]
    weights = place / "tiny/weights"

    def here(text: str) -> str:
        return str(weights / text.partition("tiny/weights/")[2])

    found = {
        name: [here(item) for item in value] if isinstance(value, list) else here(value)
        for name, value in model.items()
    }
    own = Overrides.parse([f"model={format_json(found)}"])
    return read_model(str(place / _TINY), None, Overrides((*own.items, *overrides.items)), settings)


@contextmanager
def own_server(settings: ServeConfig, token: str, base: dict[str, Any]) -> Iterator[str]:
    """Run `vace serve` in a thread of this process on a free loopback port, and yield its address.

    The server and its workers end with the block.
    """
    server, listening, address = open_server(settings, token, base)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, name="server", daemon=True)
    thread.start()
    try:
        yield address
    finally:
        server.should_exit = True
        thread.join(30)


def run(
    settings: UiConfig,
    outer: ServeConfig,
    password: str | None,
    server: str,
    token: str | None,
    *,
    is_tiny: bool,
) -> None:
    """Serve the page until a signal arrives. Raises LaunchError if the port is in use."""
    folder = Path(settings.data_dir).absolute()
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    os.environ["GRADIO_TEMP_DIR"] = str(folder / "uploads")
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    import uvicorn

    from mindspeed_mm.serve.client import Client
    from mindspeed_mm.ui.app import build_app
    from mindspeed_mm.ui.sample import write_sample
    from mindspeed_mm.ui.service import Service

    client = Client(server, token, patience=0.0)
    service = Service(client, folder, Path(settings.root), sample=None)
    if is_tiny:
        service.sample = write_sample(service.work)
    app = build_app(settings, outer, password, service)
    listening = listen(outer)
    LOGGER.info(f"the page is at {address_of(listening)}  (videos: {folder}); Ctrl-C stops it")
    config = uvicorn.Config(app, log_level="warning", server_header=False, timeout_graceful_shutdown=3)
    uvicorn.Server(config).run(sockets=[listening])
