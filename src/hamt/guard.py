"""Whom a local server answers: who asks by its name, and no page of somebody else."""

import ipaddress
import socket
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from hamt.errors import UserError


class Guard:
    """Middleware that refuses what is not asked for here.

    A page of somebody else cannot ask under its own name, also where that name is made to point
    here: ``Host`` must be an address, this machine's name or ``host``. Nor can it ask by the right
    address: a browser then tells its ``Origin``.

    Args:
        app: what is guarded.
        host: the name or address that it is served at.
        posts: the paths that take something.
        max_body: bytes that they take at most.
    """

    def __init__(self, app: ASGIApp, host: str, posts: Sequence[str], max_body: int) -> None:
        self.app, self.names = app, {"localhost", host.lower(), socket.gethostname().lower()}
        self.posts, self.max_body = posts, max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        refusal = self._refusal(scope) if scope["type"] in ("http", "websocket") else None
        if refusal is None:
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": refusal[1]})
        else:
            told = {"message": refusal[1], "type": "invalid_request_error"}
            await JSONResponse({"error": told}, refusal[0])(scope, receive, send)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        """The status and the words to refuse a request with, or None."""
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        host, origin = headers.get(b"host", ""), headers.get(b"origin")
        if not self._is_here(host):
            return 400, "There is another name for this server."
        if origin is not None and origin.split("//")[-1].lower() != host.lower():
            return 403, "This server answers to no other page."
        if scope["type"] == "http" and scope["method"] not in ("GET", "HEAD"):
            if scope["method"] != "POST" or scope["path"].rstrip("/") not in self.posts:
                return 403, "This server takes nothing of that kind."
            if b"transfer-encoding" in headers:  # which would count, and not the length
                return 411, "Say how long this is (Content-Length)."
            size = headers.get(b"content-length", "")
            if not size.isdecimal() or int(size) > self.max_body:
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


def in_url(host: str) -> str:
    """A host as it stands in an address of the web: one of IPv6 in brackets."""
    return f"[{host}]" if ":" in host else host


def check_address(host: str, port: int | None) -> None:
    """Find out whether a server could listen here.

    Raises:
        UserError: if not.
    """
    try:
        found = socket.getaddrinfo(host, port or 0, type=socket.SOCK_STREAM)
        family, kind, _, _, address = found[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        where = f"{host}, port {port}" if port else host
        raise UserError(
            f"cannot serve at {where} ({error.strerror or error}): give another --host or --port"
        ) from error
