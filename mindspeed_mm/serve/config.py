"""The settings of `vace serve`: its address, limits and devices. Does not import torch."""

from __future__ import annotations

import ipaddress
from typing import Literal

from pydantic import Field, model_validator

from mindspeed_mm.config.schema import Config


class ServeConfig(Config):
    """The settings of a server."""

    host: str = Field(
        default="127.0.0.1", description="address to listen on; others than loopback need a token"
    )
    port: int = Field(default=8000, ge=0, le=65535, description="port to listen on; 0 = any free port")
    data_dir: str = Field(
        default="./outputs/serve", description="folder of the queue, the uploads and the videos"
    )
    token_file: str | None = Field(
        default=None,
        description=(
            "file whose first line every client sends as `Authorization: Bearer …` (or set VACE_TOKEN)"
        ),
    )
    allowed_hosts: tuple[str, ...] = Field(
        default=(), description="additional host names under which clients may reach this server"
    )
    cors_origins: tuple[str, ...] = Field(
        default=(),
        description="origins of web pages that may call this server, as https://example.org (default: none)",
    )
    model_name: str | None = Field(
        default=None, description="name of the model in requests (default: the folder's name)"
    )
    engine: Literal["processes", "ray"] = Field(
        default="processes",
        description="workers are processes of this machine, or replicas of Ray Serve on any machines",
    )
    ray_address: str | None = Field(
        default=None, description="cluster of --engine ray: auto, or host:port (default: one on this machine)"
    )
    loras_dir: str | None = Field(
        default=None, description="folder of the LoRAs that requests may name (default: none)"
    )
    devices: int = Field(
        default=1, ge=1, le=1024, description="number of local processes or Ray replicas, one per device"
    )
    max_queue: int = Field(
        default=100,
        ge=1,
        le=1_000_000,
        description="maximum number of queued videos; further requests get 429",
    )
    max_upload_mb: int = Field(
        default=512, ge=1, le=1 << 20, description="maximum size of one request's uploads in MB"
    )
    max_files: int = Field(default=16, ge=1, le=1000, description="maximum number of files in one request")
    max_clip_seconds: float = Field(
        default=120.0, gt=0, le=1e6, description="maximum length of an uploaded clip"
    )
    max_clip_pixels: int = Field(
        default=3840 * 2160,
        ge=256,
        le=1 << 30,
        description="maximum width x height of an uploaded clip or image",
    )
    max_video_pixels: int = Field(
        default=81 * 1280 * 720 * 2,
        ge=256,
        le=1 << 40,
        description="maximum frames x width x height of one result",
    )
    idle_timeout: float = Field(
        default=60.0, gt=0, le=86400, description="maximum seconds that an upload may pause"
    )
    job_timeout: float = Field(
        default=7200.0, gt=0, le=1e7, description="maximum seconds to generate one video"
    )
    load_timeout: float = Field(
        default=3600.0,
        gt=0,
        le=1e7,
        description="seconds after which workers that are still loading are restarted",
    )
    keep_hours: float | None = Field(
        default=None,
        gt=0,
        le=1e6,
        description="delete a finished video after this many hours (default: never)",
    )

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def hosts(self) -> frozenset[str]:
        """The names that a Host header may have, in lower case and without a port."""
        names = {"localhost", "127.0.0.1", "[::1]", *self.allowed_hosts}
        if self.host not in ("0.0.0.0", "::"):
            names.add(f"[{self.host}]" if ":" in self.host else self.host)
        return frozenset(name.lower() for name in names)

    @model_validator(mode="after")
    def _check_origins(self) -> ServeConfig:
        for origin in self.cors_origins:
            if not origin.startswith(("http://", "https://")) or origin.count("/") != 2:
                raise ValueError(f"cors_origins: expected scheme://host[:port], got {origin!r:.100}")
        return self
