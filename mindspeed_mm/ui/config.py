"""The settings of `vace ui`. Does not import torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mindspeed_mm.config.schema import Config

Language = Literal["en", "zh"]


class UiConfig(Config):
    """The settings of the page."""

    host: str = Field(
        default="127.0.0.1", description="address to listen on; others than loopback need a token"
    )
    port: int = Field(default=7860, ge=0, le=65535, description="port to listen on; 0 = any free port")
    lang: Language = Field(default="en", description="default language of the page")
    server: str | None = Field(
        default=None,
        description="URL of a vace serve, such as http://127.0.0.1:8000 (default: the page starts its own)",
    )
    data_dir: str = Field(
        default="./outputs/ui",
        description="folder for uploads, saved settings, and the queue of the page's own server",
    )
    root: str = Field(default=".", description="the only folder that the tabs Inspect and Curves may read")
    token_file: str | None = Field(
        default=None, description="file whose first line is the password of the page (or set VACE_TOKEN)"
    )
    allowed_hosts: tuple[str, ...] = Field(
        default=(), description="additional host names under which the page may be reached"
    )
    devices: int = Field(default=1, ge=1, le=1024, description="number of devices of the page's own server")
    max_upload_mb: int = Field(default=512, ge=1, le=1 << 20, description="maximum size of one upload in MB")
