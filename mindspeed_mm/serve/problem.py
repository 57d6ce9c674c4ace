"""ApiError: an error of the client or the server, with an HTTP status. Does not import torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mindspeed_mm.errors import ConfigError, MindSpeedMMError


class ApiError(ConfigError):
    """An error response. `code` is for programs, the other fields are for people."""

    def __init__(
        self,
        status: int,
        code: str,
        problem: str,
        *,
        where: str = "",
        expected: str = "",
        fix: str = "",
        retry_after: int | None = None,
    ) -> None:
        super().__init__(problem, where=where, expected=expected, fix=fix)
        self.status, self.code, self.retry_after = status, code, retry_after


def describe_error(error: MindSpeedMMError) -> dict[str, str]:
    """Return the nonempty fields of an error, with its one-line text as `message`."""
    kind = {"ConfigError": "invalid_request", "DataError": "invalid_input"}
    code = error.code if isinstance(error, ApiError) else kind.get(type(error).__name__, "failed")
    fields = {
        "code": code,
        "message": " ".join(str(error).split()),
        "where": error.where,
        "problem": error.problem,
        "expected": error.expected,
        "fix": error.fix,
    }
    return {name: text for name, text in fields.items() if text}


def error_body(status: int, details: Mapping[str, str]) -> dict[str, Any]:
    """Return the JSON body of an error response."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"type": kind, "param": details.get("where"), **details}}
