"""The settings of `vace ui`. Does not import torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mindspeed_mm.config.schema import Config

Language = Literal["en", "zh"]


class UiConfig(Config):
    """One page."""

    host: str = Field(default="127.0.0.1", description="address to listen on; any but loopback needs a token")
    port: int = Field(default=7860, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    lang: Language = Field(default="en", description="language of the page at /; the other is a click away")
    server: str | None = Field(
        default=None,
        description="address of a vace serve, as http://127.0.0.1:8000 (default: one of the page's own)",
    )
    data_dir: str = Field(
        default="./outputs/ui", description="folder of uploads, saved settings, and the own server's queue"
    )
    root: str = Field(
        default=".", description="folder that the tabs Inspect and Curves may read; nothing outside of it"
    )
    token_file: str | None = Field(
        default=None, description="file whose first line is the password of the page (or set VACE_TOKEN)"
    )
    allowed_hosts: tuple[str, ...] = Field(
        default=(), description="names by which browsers may call the page, besides loopback and --host"
    )
    devices: int = Field(default=1, ge=1, le=1024, description="devices of the page's own server")
    max_upload_mb: int = Field(default=512, ge=1, le=1 << 20, description="size of one upload")
