"""Whom the page answers: itself, and nobody's page from elsewhere."""

import ipaddress
import socket
from urllib.parse import urlsplit

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

# What the page sends; there is nothing else to be told, and no files.
POSTS = ("/gradio_api/queue/join", "/gradio_api/cancel", "/gradio_api/reset")
MAX_BODY = 4 * 2**20  # bytes; a text is cut long before that


class Guard:
    """Middleware that refuses what the page itself does not ask.

    A page of somebody else cannot ask under its own name, also where that name is made to point
    here: ``Host`` must be an address, this machine's name or ``host``. Nor can it ask by the right
    address: a browser then tells its ``Origin``.
    """

    def __init__(self, app: ASGIApp, host: str) -> None:
        self.app, self.names = app, {"localhost", host.lower(), socket.gethostname().lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        refusal = self._refusal(scope) if scope["type"] in ("http", "websocket") else None
        if refusal is None:
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": refusal[1]})
        else:
            await PlainTextResponse(refusal[1], refusal[0])(scope, receive, send)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        """The status and the words to refuse a request with, or None."""
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        host, origin = headers.get(b"host", ""), headers.get(b"origin")
        if not self._is_here(host):
            return 400, "This page has another name."
        if origin is not None and origin.split("//")[-1].lower() != host.lower():
            return 403, "This page answers to no other page."
        if scope["type"] == "http" and scope["method"] not in ("GET", "HEAD"):
            if scope["method"] != "POST" or scope["path"].rstrip("/") not in POSTS:
                return 403, "This page takes nothing of that kind."
            size = headers.get(b"content-length", "")
            if not size.isdecimal() or int(size) > MAX_BODY:
                return 413, "This is too long."
        return None

    def _is_here(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if name in self.names:
            return True
        try:
            return bool(ipaddress.ip_address(name))
        except ValueError:
            return False
