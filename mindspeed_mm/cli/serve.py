"""`vace serve`: the HTTP API over a resident model."""

from __future__ import annotations

from functools import partial

from mindspeed_mm.cli.command import Command, ConfigFile
from mindspeed_mm.serve.main import job_parser, main

PROG = "vace serve"


COMMAND = Command(
    verb="serve",
    summary="Serve a model over HTTP: the /v1/videos API with masks and references",
    usage="CONFIG.json | --model FOLDER [--key value]...",
    parser=lambda _: job_parser(PROG),
    run=partial(main, prog=PROG),
    files=(ConfigFile("", "inference JSON (or without --config)"),),
    common={
        "weights": ("model", "model-name", "loras-dir"),
        "listen": ("host", "port", "token-file", "allowed-hosts", "cors-origins"),
        "storage": ("data-dir", "keep-hours"),
        "devices": ("devices", "engine", "ray-address"),
        "limits": ("max-queue", "max-upload-mb", "max-video-pixels", "job-timeout"),
    },
)
