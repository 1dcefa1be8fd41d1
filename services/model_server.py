"""Serve a registered model over HTTP, closed to the web pages of other sites.

    python -m services.model_server models:/demo-w3a16@champion --port 5001

This is MLflow's scoring server with the guard of `services.guarded_server` in front of it, and a check that its body
can be read: MLflow answers status 500 to JSON that is nested too deeply for Python's parser, here it is 400.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Awaitable, Callable

from services.guarded_server import App, Message, OwnPagesOnly, own_hosts
from services.supervisor import HOST

#: Largest body of a request. A picture of the largest size that is decoded fits in it as base64.
MOST_BYTES = 512 * 2**20


class ReadableJson:
    """ASGI middleware that answers 400 to a JSON body that cannot be parsed, and 413 to one that is too large."""

    def __init__(self, app: App, most: int = MOST_BYTES) -> None:
        self._app = app
        self._most = most

    async def __call__(
        self, scope: Message, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]
    ) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        body, ended = bytearray(), False
        while not ended:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            ended = not message.get("more_body", False)
            if len(body) > self._most:
                await _refuse(send, 413, f"the body has more than {self._most} bytes; send fewer or smaller pictures")
                return
        if _is_json(scope) and (reason := _unreadable(bytes(body))) is not None:
            await _refuse(send, 400, reason)
            return
        whole: Message = {"type": "http.request", "body": bytes(body), "more_body": False}
        given = iter([whole])

        async def again() -> Message:
            return next(given, None) or await receive()

        await self._app(scope, again, send)


def _is_json(scope: Message) -> bool:
    return any(name == b"content-type" and b"json" in value.lower() for name, value in scope["headers"])


def _unreadable(body: bytes) -> str | None:
    """Why a body is no JSON; None if it is."""
    try:
        json.loads(body)
    except RecursionError:
        return "the JSON is nested too deeply; a request is one table of images and questions"
    except ValueError as error:
        return f"the body is no valid JSON ({error})"
    return None


async def _refuse(send: Callable[[Message], Awaitable[None]], status: int, reason: str) -> None:
    text = json.dumps({"error_code": "BAD_REQUEST", "message": reason}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(text)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="registered model, models:/demo-w3a16@champion for instance")
    parser.add_argument("--port", type=int, default=5001)
    arguments = parser.parse_args()
    import uvicorn
    from mlflow.pyfunc import load_model, scoring_server

    served = scoring_server.init(load_model(arguments.model))
    app = OwnPagesOnly(ReadableJson(served), own_hosts(arguments.port))
    uvicorn.run(app, host=HOST, port=arguments.port, timeout_keep_alive=5, log_level="warning")


if __name__ == "__main__":
    main()
