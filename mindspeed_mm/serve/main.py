"""Runs `vace serve`. Imports fastapi and uvicorn only after the arguments have been checked."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mindspeed_mm.config.flags import FlagParser, add_flags, given
from mindspeed_mm.config.overrides import Overrides
from mindspeed_mm.config.schema import parse
from mindspeed_mm.errors import ConfigError, LaunchError
from mindspeed_mm.files import read_json_object, read_text, write_json
from mindspeed_mm.generation.config import RunConfig
from mindspeed_mm.locks import lock_folder
from mindspeed_mm.log import get_logger, one_line_errors
from mindspeed_mm.outputs import check_folder
from mindspeed_mm.serve.config import ServeConfig
from mindspeed_mm.serve.fields import FIELDS
from mindspeed_mm.tasks.jobs.generate import GenerateJob

if TYPE_CHECKING:
    import uvicorn

LOGGER = get_logger(__name__)
PROG = "vace serve"
TOKEN = "VACE_TOKEN"
_RUN_KEYS = tuple(
    name for name in RunConfig.model_fields if name not in ("output_path", "prompts_file", "from_latents")
)
_NEEDED = {
    "serve": ("fastapi", "uvicorn", "multipart", "prometheus_client"),
    "ui": ("gradio", "requests"),
    "ray": ("ray",),
}
_SHORTEST_TOKEN = 16


def job_parser(prog: str = PROG) -> FlagParser:
    """Build the parser of `vace serve`."""
    parser = FlagParser(prog, "Serve a model over HTTP: the /v1/videos API.")
    add_model_flags(parser, "inference JSON: the weights, how they run, and defaults for requests")
    add_flags(parser, ServeConfig, "the server")
    return parser


def add_model_flags(parser: FlagParser, config_help: str) -> None:
    """Add the flags of every command that starts a server: those of the model and of a dry run."""
    parser.add_argument("config", metavar="CONFIG.json", nargs="?", help=config_help)
    parser.add_argument("--model", metavar="FOLDER", help="model folder, instead of CONFIG.json")
    parser.add_argument(
        "--set",
        action="append",
        metavar="KEY=VALUE",
        help="replace a nested key of the JSON, e.g. dtype=fp32",
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything and stop")
    parser.add_argument("--print-config", action="store_true", help="print the settings as JSON, and exit")


@one_line_errors
def main(argv: Sequence[str] | None = None, prog: str = PROG) -> None:
    """Run the command. Returns when a signal stops the server."""
    namespace = job_parser(prog).parse_strict(sys.argv[1:] if argv is None else argv)
    settings = parse(ServeConfig, given(namespace, ServeConfig), prog)
    token = read_token(settings)
    values = read_model(namespace.config, namespace.model, Overrides.parse(namespace.set or ()), settings)
    check_folder(settings.data_dir, "data_dir")
    if settings.loras_dir is not None and not Path(settings.loras_dir).is_dir():
        raise ConfigError("no such folder", where=f"--loras-dir {settings.loras_dir}")
    if namespace.print_config:
        shown = {"server": settings.model_dump(mode="json"), "jobs": values, "token": token is not None}
        import json

        LOGGER.info(json.dumps(shown, indent=2, ensure_ascii=False))
        return
    check_installed(prog, "serve", *(("ray",) if settings.engine == "ray" else ()))
    if namespace.dry_run:
        LOGGER.info("the server's settings and weights are in order")
        return
    with lock_folder(Path(settings.data_dir), choose="data_dir"):
        serve(settings, token, values)


def check_installed(prog: str, *extras: Literal["serve", "ui", "ray"]) -> None:
    """Raise ConfigError if packages of `extras` are missing.

    The error names the missing packages, and advises installing the last of `extras`.
    """
    lacking = [name for extra in extras for name in _NEEDED[extra] if find_spec(name) is None]
    if lacking:
        raise ConfigError(
            f"{', '.join(lacking)}: not installed", where=prog, fix=f"run pip install -e '.[{extras[-1]}]'"
        )


def read_token(settings: ServeConfig) -> str | None:
    """Return the token that clients must send, or None.

    Raises ConfigError if the token is invalid, or missing although other machines can connect.
    """
    text = os.environ.get(TOKEN, "")
    if settings.token_file is not None:
        text = next(iter(read_text(settings.token_file).splitlines()), "")
    text = text.strip()
    if text and (len(text) < _SHORTEST_TOKEN or not text.isascii() or " " in text):
        raise ConfigError(
            f"has {len(text)} characters",
            where=settings.token_file or TOKEN,
            expected=f"at least {_SHORTEST_TOKEN}, ASCII, without spaces",
        )
    if not text and not settings.is_loopback:
        raise ConfigError(
            f"{settings.host} lets other machines connect, and there is no token",
            where="host",
            fix=f"set {TOKEN} or --token-file, or keep --host 127.0.0.1",
        )
    return text or None


def read_model(
    config: str | None, folder: str | None, overrides: Overrides, settings: ServeConfig
) -> dict[str, Any]:
    """Return the keys common to the inference JSONs of all jobs: weights, run settings and defaults.

    Raises ConfigError and WeightsError.
    """
    if (config is None) == (folder is None):
        raise ConfigError("expected either CONFIG.json or --model FOLDER", where=PROG)
    data_dir = Path(settings.data_dir).absolute()
    if config is not None:
        values = overrides.apply(read_json_object(config))
        values = {**values, "output_path": str(data_dir), "prompt": "a template"}
        for key in ("tasks", "prompts_file", "from_latents", "name", "task", "outpaint"):
            values.pop(key, None)
        checked = GenerateJob.from_values(values, Path(config))
    else:
        from mindspeed_mm.generation.loaders import resolve_model_dir

        model = resolve_model_dir(Path(str(folder)).absolute()).model_dump(mode="json")
        values = overrides.apply({"model": model, "output_path": str(data_dir), "prompt": "a template"})
        checked = GenerateJob.from_values(values, Path("--model"))
    kept = {
        key: values[key] for key in (*_RUN_KEYS, *FIELDS) if values.get(key) is not None and key != "prompt"
    }
    if loras := checked.videos[0].loras:
        kept["loras"] = [lora.model_dump(mode="json") for lora in loras]
    return {"model": checked.model.model_dump(mode="json"), **kept}


def serve(settings: ServeConfig, token: str | None, base: Mapping[str, Any]) -> None:
    """Serve until a signal arrives. Raises LaunchError if the port is in use."""
    server, listening, address = open_server(settings, token, base)
    LOGGER.info(
        f"{settings.model_name or model_name(base)} at {address}  (API: /docs, queue: "
        f"{Path(settings.data_dir).absolute()}); Ctrl-C stops, and the queue waits"
    )
    server.run(sockets=[listening])


def open_server(
    settings: ServeConfig, token: str | None, base: Mapping[str, Any]
) -> tuple[uvicorn.Server, socket.socket, str]:
    """Return a server that is not yet running, its listening socket, and its address.

    Raises LaunchError if the port is in use.
    """
    import uvicorn

    from mindspeed_mm.serve.app import Service, build_app
    from mindspeed_mm.serve.engine import Engine
    from mindspeed_mm.serve.folders import JobFolders
    from mindspeed_mm.serve.jobs import JobStore

    data_dir = Path(settings.data_dir).absolute()
    store, folders = JobStore(data_dir), JobFolders(data_dir)
    folders.sweep(store.ids())
    template = data_dir / "template.json"
    write_json(template, {**base, "prompt": "a template", "output_path": str(data_dir)})
    worker = {
        "data_dir": str(data_dir),
        "template": str(template),
        "base": dict(base),
        "job_timeout": settings.job_timeout,
        "loras_dir": settings.loras_dir and str(Path(settings.loras_dir).absolute()),
    }
    if settings.engine == "ray":
        from mindspeed_mm.serve.ray_engine import RayEngine

        engine: Engine = RayEngine(store, folders, settings, worker)
    else:
        engine = Engine(store, folders, settings, worker)
    name = settings.model_name or model_name(base)
    listening = listen(settings)
    app = build_app(Service(settings, store, folders, engine, name, base), token)
    config = uvicorn.Config(
        app, log_level="warning", server_header=False, timeout_keep_alive=30, limit_concurrency=256
    )
    return uvicorn.Server(config), listening, address_of(listening)


def address_of(listening: socket.socket) -> str:
    """Return the URL `http://host:port` of a listening socket."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def listen(settings: ServeConfig) -> socket.socket:
    """Open the listening socket. Raises LaunchError."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listening = socket.socket(family)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((settings.host, settings.port))
        listening.listen(2048)  # connections wait from here on, instead of being refused
    except OSError as error:
        listening.close()
        raise LaunchError(
            f"cannot listen on {settings.host}:{settings.port}: {error.strerror}",
            where="port",
            fix="choose another --port, or 0 for a free one",
        ) from None
    return listening


def model_name(base: Mapping[str, Any]) -> str:
    """Return the name of the weights folder, which is the model's name in requests."""
    first = base["model"]["transformer"][0]
    path = Path(first if isinstance(first, str) else first[0])
    return path.parent.name if path.suffix else path.name
