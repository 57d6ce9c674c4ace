"""The web application: the pages in both languages, behind the guard.

It has no share link and no telemetry, and loads nothing from other machines.
"""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import gradio as gr
from fastapi import FastAPI
from fastapi.responses import RedirectResponse

from mindspeed_mm.serve.config import ServeConfig
from mindspeed_mm.ui.config import Language, UiConfig
from mindspeed_mm.ui.guard import PageGuard
from mindspeed_mm.ui.page import build_page, theme
from mindspeed_mm.ui.service import Service


def build_app(settings: UiConfig, outer: ServeConfig, password: str | None, service: Service) -> PageGuard:
    """Build the application with the pages `/en/` and `/zh/`. `/` redirects to that of `settings.lang`."""
    here = Path(__file__).parent
    script = "\n".join((here / name).read_text(encoding="utf-8") for name in ("painter.js", "grower.js"))
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    app = FastAPI(title="vace ui", openapi_url=None, docs_url=None, redoc_url=None)

    @app.get("/")
    def home() -> RedirectResponse:
        return RedirectResponse(f"/{settings.lang}/")

    for lang in get_args(Language):
        gr.mount_gradio_app(
            app,
            build_page(lang, service),
            path=f"/{lang}",
            allowed_paths=[str(service.work)],
            show_error=False,
            max_file_size=settings.max_upload_mb << 20,
            ssr_mode=False,
            enable_monitoring=False,
            run_history=False,
            footer_links=[],
            mcp_server=False,
            pwa=False,
            theme=theme(),
            css=style,
            head=f"<script>{script}</script>",
        )
    return PageGuard(app, outer, password)
