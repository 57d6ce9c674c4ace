"""Who may call: host, origin, token, address."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from mindspeed_mm.errors import ConfigError
from mindspeed_mm.serve.config import ServeConfig
from mindspeed_mm.serve.main import read_token
from tests.support.errors import raises
from tests.support.server import Server

TOKEN = "0123456789abcdef"


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "[::2]"])
def test_foreign_host_header_is_rejected(server: Server, host: str) -> None:
    assert server.client.get("/v1/videos", headers={"host": host}).status_code == 421


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:80", "127.0.0.1:8000", "[::1]:8000"])
def test_loopback_host_header_passes(server: Server, host: str) -> None:
    assert server.client.get("/v1/videos", headers={"host": host}).status_code == 200


def test_page_of_another_origin_is_rejected(server: Server) -> None:
    assert server.client.get("/v1/videos", headers={"origin": "http://evil.example"}).status_code == 403
    for origin in ("null", "http://[", "http://127.0.0.1:81"):
        assert server.client.get("/v1/videos", headers={"origin": origin}).status_code == 403
    assert server.client.get("/v1/videos", headers={"origin": "http://127.0.0.1"}).status_code == 200


def test_cors_is_off_unless_an_origin_is_allowed(tmp_path: Path) -> None:
    page = {"origin": "https://studio.example"}
    made = Server(tmp_path, cors_origins=("https://studio.example",))
    with made.client:
        allowed = made.client.get("/v1/videos", headers=page)
        assert allowed.headers["access-control-allow-origin"] == "https://studio.example"
        asked = {**page, "access-control-request-method": "POST"}
        assert made.client.options("/v1/videos", headers=asked).status_code == 200


def test_server_with_a_token_answers_no_one_without_it(tmp_path: Path) -> None:
    made = Server(tmp_path, token=TOKEN)
    with made.client:
        for header in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": TOKEN},
            {"authorization": f"Basic {TOKEN}"},
        ):
            refused = made.client.get("/v1/videos", headers=header)
            assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
        assert made.client.get("/metrics").status_code == 401
        assert made.client.get("/health").status_code == 200
        assert made.client.get("/v1/videos", headers={"authorization": f"bearer {TOKEN}"}).status_code == 200


def test_other_addresses_than_loopback_need_a_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("VACE_TOKEN", raising=False)
    for host in ("0.0.0.0", "::", "192.168.1.7", "studio.example"):
        with raises(ConfigError, host, "token", where="host"):
            read_token(ServeConfig(host=host))
    assert read_token(ServeConfig(host="::1")) is None
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    assert read_token(ServeConfig(host="0.0.0.0", token_file=str(file))) == TOKEN


def test_short_token_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VACE_TOKEN", "secret")
    with raises(ConfigError, 6, 16, where="VACE_TOKEN"):
        read_token(ServeConfig())


def test_client_that_pauses_within_an_upload_is_cut_off(tmp_path: Path) -> None:
    async def stalled() -> dict[str, object]:
        if not sent:
            sent.append({"type": "http.request", "body": b"{", "more_body": True})
            return sent[0]
        await asyncio.sleep(60)
        return {}

    async def send(message: dict[str, object]) -> None:
        answers.append(message)

    sent: list[dict[str, object]] = []
    answers: list[dict[str, object]] = []
    made = Server(tmp_path, idle_timeout=0.05)
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/videos", "headers": headers, "query_string": b""}
    made.engine.start()
    asyncio.run(made.client.app(scope, stalled, send))
    assert answers[0]["status"] == 408
