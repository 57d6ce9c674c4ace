"""Access control for the page: the server's rules, with the token as the password of HTTP basic auth.

Does not import torch or gradio.
"""

from __future__ import annotations

import base64
import binascii
import hmac
from collections.abc import MutableMapping

from mindspeed_mm.serve.guard import Guard, Message, Receive, Send

_OWN = "'self'"
# Nothing is loaded from, or sent to, another machine.
_POLICY = "; ".join(
    (
        f"default-src {_OWN}",
        f"script-src {_OWN} 'unsafe-inline' 'unsafe-eval' blob:",
        f"style-src {_OWN} 'unsafe-inline'",
        f"img-src {_OWN} data: blob:",
        f"media-src {_OWN} data: blob:",
        f"font-src {_OWN} data:",
        f"connect-src {_OWN} data: blob:",
        f"worker-src {_OWN} blob:",
        "object-src 'none'",
        f"base-uri {_OWN}",
        f"form-action {_OWN}",
        "frame-ancestors 'none'",
    )
)
_HEADERS = [
    (b"content-security-policy", _POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]


class PageGuard(Guard):
    """A `Guard` for pages. The password is the token, with any user name."""

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Handle one request."""
        await super().__call__(scope, receive, self._marked(send))

    def _check(self, path: str, method: str, headers: MutableMapping[str, str]) -> None:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        password = _password(given) if scheme.lower() == "basic" else None
        if (
            self.token is not None
            and password is not None
            and hmac.compare_digest(password.encode(), self.token.encode())
        ):
            headers = {**headers, "authorization": f"Bearer {self.token}"}
        super()._check("", method, headers)  # "": no path is exempt from the token

    def _marked(self, send: Send) -> Send:
        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [pair for pair in message["headers"] if pair[0] != b"www-authenticate"]
                if len(headers) != len(message["headers"]):
                    headers.append((b"www-authenticate", b'Basic realm="vace", charset="UTF-8"'))
                message = {**message, "headers": [*headers, *_HEADERS]}
            await send(message)

        return marked


def _password(given: str) -> str | None:
    try:
        text = base64.b64decode(given.strip(), validate=True).decode()
    except (binascii.Error, ValueError):
        return None
    return text.partition(":")[2]
