"""The Prefect server refuses foreign hosts and origins, and flow runs cannot choose their command."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from services.guarded_server import OwnPagesOnly, own_hosts
from tasks.cluster.work_pool import fixed_job_template


async def answers(scope: Any, _receive: Any, send: Any) -> None:
    assert scope["type"] == "http"
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"run created"})


async def status(headers: dict[str, str]) -> int:
    transport = httpx.ASGITransport(app=OwnPagesOnly(answers, own_hosts(4200)))  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:4200") as client:
        return (await client.post("/api/flow_runs/", headers=headers)).status_code


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, 200),
        ({"host": "localhost:4200"}, 200),
        ({"origin": "http://127.0.0.1:4200"}, 200),
        ({"origin": "http://localhost:4200"}, 200),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "http://127.0.0.1:8000"}, 403),
        ({"origin": "http://127.0.0.1:4200.evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": ""}, 403),
        ({"host": "evil.example:4200"}, 403),
        ({"host": "evil.example:4200", "origin": "http://evil.example:4200"}, 403),
        ({"host": "127.0.0.1"}, 403),
    ],
)
async def test_only_own_pages_and_programs_are_answered(headers: dict[str, str], expected: int) -> None:
    assert await status(headers) == expected


@pytest.mark.anyio
async def test_a_proxy_is_allowed_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    proxied = {"host": "prefect.example.org", "origin": "https://prefect.example.org"}
    assert await status(proxied) == 403
    monkeypatch.setenv("TLQ_ALLOWED_HOSTS", "prefect.example.org, other.example.org")
    assert await status(proxied) == 200


@pytest.mark.anyio
@pytest.mark.parametrize(("origin", "closed"), [(b"https://evil.example", True), (b"http://127.0.0.1:4200", False)])
async def test_a_websocket_of_another_site_is_closed(origin: bytes, closed: bool) -> None:
    sent: list[Any] = []
    reached: list[Any] = []

    async def app(scope: Any, _receive: Any, _send: Any) -> None:
        reached.append(scope)

    async def send(message: Any) -> None:
        sent.append(message["type"])

    scope = {"type": "websocket", "headers": [(b"host", b"127.0.0.1:4200"), (b"origin", origin)]}
    await OwnPagesOnly(app, own_hosts(4200))(scope, None, send)  # type: ignore[arg-type]
    assert (sent, len(reached)) == ((["websocket.close"], 0) if closed else ([], 1))


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def test_a_flow_run_cannot_choose_command_environment_or_folder() -> None:
    template = fixed_job_template(None, {"A": "1"})
    assert not {"command", "env", "working_dir", "stream_output"} & template["variables"]["properties"].keys()
    configuration = template["job_configuration"]
    assert (configuration["command"], configuration["env"], configuration["working_dir"]) == (None, {"A": "1"}, None)
    assert "{{ command }}" not in str(configuration)
