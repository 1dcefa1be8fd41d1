"""The Prefect server of `make serve`, closed to the web pages of other sites.

    python -m services.guarded_server 4200

Prefect itself answers any page that the user's browser has open, whatever its origin, and a page could start a flow
run. Here a request must name this server in its Host header, so that no foreign name that resolves to this machine
passes, and a page must come from this server. `TLQ_ALLOWED_HOSTS` adds the names of a proxy in front of the server.
"""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from services.supervisor import HOST
from tasks.config.environment import value

Message = MutableMapping[str, Any]
App = Callable[[Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]]


def own_hosts(port: int) -> frozenset[str]:
    """Host headers under which the server is reached: this machine's loopback names, and those of a proxy."""
    extra = {host.strip().lower() for host in value("TLQ_ALLOWED_HOSTS").split(",") if host.strip()}
    return frozenset({f"{HOST}:{port}", f"localhost:{port}"} | extra)


class OwnPagesOnly:
    """ASGI middleware that refuses requests to other hosts and from pages of other origins."""

    def __init__(self, app: App, hosts: frozenset[str]) -> None:
        self._app = app
        self._hosts = hosts

    async def __call__(
        self, scope: Message, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]
    ) -> None:
        if scope["type"] == "lifespan" or self._allowed(scope["headers"]):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            text = b"this server answers its own pages and this machine's programs only; see TLQ_ALLOWED_HOSTS\n"
            headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(text)).encode())]
            await send({"type": "http.response.start", "status": 403, "headers": headers})
            await send({"type": "http.response.body", "body": text})

    def _allowed(self, headers: list[tuple[bytes, bytes]]) -> bool:
        named = [value.decode("latin-1").lower() for name, value in headers if name == b"host"]
        origins = [value.decode("latin-1").lower() for name, value in headers if name == b"origin"]
        return len(named) == 1 and named[0] in self._hosts and all(map(self._own, origins))

    def _own(self, origin: str) -> bool:
        return urlsplit(origin).netloc in self._hosts


def main() -> None:
    import uvicorn
    from prefect.server.api.server import create_app

    port = int(sys.argv[1])
    app = OwnPagesOnly(create_app(final=True), own_hosts(port))
    uvicorn.run(app, host=HOST, port=port, timeout_keep_alive=5, log_level="warning")


if __name__ == "__main__":
    main()
