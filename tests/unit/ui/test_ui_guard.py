"""Who may open the page."""

from __future__ import annotations

import base64
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="pip install -e '.[serve]'")

from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from mindspeed_mm.serve.config import ServeConfig
from mindspeed_mm.ui.guard import PageGuard

TOKEN = "0123456789abcdef"


def client(token: str | None = None) -> TestClient:
    async def page(_: Any) -> PlainTextResponse:
        return PlainTextResponse("page")

    app = Starlette(routes=[Route("/{path:path}", page, methods=["GET", "POST"])])
    return TestClient(PageGuard(app, ServeConfig(), token), base_url="http://127.0.0.1")


def basic(password: str) -> dict[str, str]:
    return {"authorization": "Basic " + base64.b64encode(f"me:{password}".encode()).decode()}


def test_password_is_the_token_under_any_name():
    page = client(TOKEN)
    refused = page.get("/")
    assert refused.status_code == 401
    assert refused.headers["www-authenticate"].startswith("Basic ")
    assert page.get("/", headers=basic(TOKEN)).text == "page"
    assert page.get("/", headers=basic("wrong")).status_code == 401
    assert page.get("/", headers={"authorization": "Basic ???"}).status_code == 401


@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_no_path_of_a_page_is_open_to_all(path: str):
    assert client(TOKEN).get(path).status_code == 401


def test_host_and_origin_match_the_page():
    page = client()
    assert page.get("/", headers={"host": "evil.example"}).status_code == 421
    assert page.post("/", headers={"origin": "http://evil.example"}).status_code == 403
    assert page.post("/", headers={"origin": "http://127.0.0.1"}).status_code == 200


def test_browser_loads_nothing_from_elsewhere():
    headers = client().get("/").headers
    policy = headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "connect-src 'self'" in policy
    assert "http" not in policy
    assert headers["x-content-type-options"] == "nosniff"
