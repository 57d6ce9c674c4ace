"""Checks the caller, the origin and the size of a request before it reaches a route.

This is plain ASGI, so that the size of a body is checked as it arrives, and no more than the limit is stored.
Does not import torch.
"""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from mindspeed_mm.serve.config import ServeConfig
from mindspeed_mm.serve.problem import ApiError, describe_error, error_body

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]
OPEN_PATHS = frozenset({"/health", "/ready"})  # health probes, which need no token and return no data


class Guard:
    """ASGI middleware that checks Host, Origin, token and size, in this order."""

    def __init__(self, app: App, settings: ServeConfig, token: str | None) -> None:
        self.app, self.settings, self.token = app, settings, token
        self.limit = settings.max_upload_mb << 20

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]
        }
        started = False

        async def watch(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            self._check(scope["path"], scope["method"], headers)
            await self.app(scope, self._counted(receive, headers), watch)
        except ApiError as error:
            if started:
                raise
            await answer(send, error)

    def _check(self, path: str, method: str, headers: MutableMapping[str, str]) -> None:
        host = headers.get("host", "")
        if host_name(host) not in self.settings.hosts:
            raise ApiError(
                421,
                "wrong_host",
                f"got {host!r:.100}",
                where="Host",
                expected="a name of this server",
                fix="start the server with --allowed-hosts NAME",
            )
        origin = headers.get("origin")
        if origin is not None and origin not in self.settings.cors_origins and not _is_own(origin, host):
            raise ApiError(
                403,
                "wrong_origin",
                f"got {origin!r:.100}",
                where="Origin",
                expected="a page of this server",
                fix="start the server with --cors-origins ORIGIN",
            )
        if self.token is None or path in OPEN_PATHS or method == "OPTIONS":
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self.token.encode()):
            raise ApiError(
                401,
                "wrong_token",
                "the token is missing or wrong",
                where="Authorization",
                expected="Bearer and the server's token",
            )

    def _counted(self, receive: Receive, headers: MutableMapping[str, str]) -> Receive:
        """Wrap `receive` to raise ApiError if the body is too long or stops arriving for too long."""
        length = headers.get("content-length", "")
        if length.isascii() and length.isdigit() and int(length[:20]) > self.limit:
            raise self._too_large()
        size, is_complete = 0, False

        async def counted() -> Message:
            nonlocal size, is_complete
            if is_complete:  # only a disconnect can follow, and it may come at any time
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), self.settings.idle_timeout)
            except asyncio.TimeoutError:
                seconds = f"{self.settings.idle_timeout:g} s"
                raise ApiError(408, "timeout", f"nothing came for {seconds}", fix="send it again") from None
            is_complete = not message.get("more_body", False)
            size += len(message.get("body", b""))
            if size > self.limit:
                raise self._too_large()
            return message

        return counted

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            "too_large",
            "the request is too large",
            expected=f"at most {self.settings.max_upload_mb} MiB",
            fix="send smaller files, or start the server with --max-upload-mb",
        )


async def answer(send: Send, error: ApiError) -> None:
    """Send an error as an ASGI response, outside any route."""
    body = json.dumps(error_body(error.status, describe_error(error))).encode()
    extra: Iterable[tuple[bytes, bytes]] = [(b"www-authenticate", b"Bearer")] if error.status == 401 else []
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),  # the rest of the body is not read
        *extra,
    ]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def host_name(host: str) -> str:
    """Return a Host header in lower case and without the port.

    `Example.org:80` → `example.org`, `[::1]:80` → `[::1]`.
    """
    name = host.lower()
    if name.startswith("["):
        return name.partition("]")[0] + "]"
    return name.partition(":")[0]


def _is_own(origin: str, host: str) -> bool:
    """Return whether the request comes from a page of this server."""
    return origin.lower() in (f"http://{host.lower()}", f"https://{host.lower()}")
