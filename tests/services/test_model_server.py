"""The server of registered models reads a whole body before the model's code does, and refuses what cannot be read."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from services.guarded_server import Message
from services.model_server import ReadableJson

JSON = [(b"content-type", b"application/json; charset=utf-8")]


async def echo(
    scope: Message, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]
) -> None:
    body = (await receive()).get("body", b"") if scope["method"] == "POST" else b"got"
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


def answer(parts: list[bytes], method: str = "POST", headers: Any = JSON, most: int = 100) -> tuple[int, bytes]:
    """Status and body of the answer to a request whose body arrives in parts; (0, b"") if there is none."""
    sent: list[Message] = []
    last = len(parts) - 1
    messages: list[Message] = [
        {"type": "http.request", "body": part, "more_body": number < last} for number, part in enumerate(parts)
    ]

    async def receive() -> Message:
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    scope: Message = {"type": "http", "method": method, "headers": headers}
    asyncio.run(ReadableJson(echo, most)(scope, receive, send))
    return (sent[0]["status"], sent[1]["body"]) if sent else (0, b"")


def test_a_body_in_parts_reaches_the_model_whole() -> None:
    assert answer([b'{"a"', b": [1, ", b"2]}"]) == (200, b'{"a": [1, 2]}')


def test_other_requests_pass() -> None:
    assert answer([b""], method="GET") == (200, b"got")
    assert answer([b"a,b\n1,2"], headers=[(b"content-type", b"text/csv")]) == (200, b"a,b\n1,2")


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b"[" * 100_000, 400, "nested too deeply"),
        (b'{"a": ', 400, "no valid JSON"),
        (b"\xff\xfe\xfa", 400, "no valid JSON"),
        (b"[" + b"1," * 100_000 + b"1]", 413, "more than 150000 bytes"),
    ],
)
def test_a_body_that_cannot_be_read_is_refused_with_the_reason(body: bytes, status: int, reason: str) -> None:
    found, text = answer([body], most=150_000)
    assert found == status
    assert reason in json.loads(text)["message"]


def test_a_client_that_leaves_gets_no_answer() -> None:
    assert answer([]) == (0, b"")
