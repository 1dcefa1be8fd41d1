"""The registered model: loaded in a process without the project, and served over HTTP."""

from __future__ import annotations

import base64
import json
import os
import shutil
import struct
import subprocess
import sys
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException
from support.listeners import listeners
from support.registry_results import write_project, write_variant
from support.servers import wait_until_ready
from support.tiny import png
from support.tiny_project import free_port

from services.processes import tree
from tasks.config.params import section
from tasks.config.sections import EvaluateParams, ModelParams, RegisterParams
from tasks.registry.connection import connect
from tasks.registry.location import follow_project
from tasks.stages.register import Registrar, register_all

ROOT = Path(__file__).parents[3]
URI = "models:/tiny-w3a16@champion"
QUESTION = "What is it?"


@pytest.fixture(scope="module")
def registered(
    tiny_checkpoint: Path, new_tracking: Callable[[Path], str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """A project folder with a champion, whose weights are those of the tiny model."""
    folder = tmp_path_factory.mktemp("registered")
    write_project(folder)
    write_variant(folder, "rtn-w3a16", right=48)
    shutil.copytree(tiny_checkpoint, folder / "models/rtn-w3a16", dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", new_tracking(folder))
        params = section("register", RegisterParams)
        registrar = Registrar(connect(), params, section("evaluate", EvaluateParams), section("model", ModelParams))
        register_all(registrar, ["rtn-w3a16"])
        yield folder


@pytest.fixture(scope="module")
def server(registered: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serve the champion from a separate folder; yields its address."""
    port = free_port()
    path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    folder = tmp_path_factory.mktemp("elsewhere")
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "services.model_server", URI, "--port", str(port)],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": path},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        wait_until_ready(f"{address}/ping", process, folder / "log")
        assert listeners(tree(process.pid)) == {"127.0.0.1"}
        yield address
    finally:
        os.killpg(process.pid, 15)
        process.wait(30)


def post(server: str, body: Any, **headers: str) -> tuple[int, Any]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(f"{server}/invocations", data, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        text = error.read().decode()
        return error.code, json.loads(text) if text.startswith("{") else text


def ask(image: Any, question: Any) -> dict[str, Any]:
    return table([image, question])


def table(*rows: list[Any]) -> dict[str, Any]:
    return {"dataframe_split": {"columns": ["image", "question"], "data": list(rows)}}


def encoded(seed: int = 0) -> str:
    return base64.b64encode(png(seed)).decode()


def test_a_question_about_an_image_is_answered(server: str, registered: Path) -> None:
    status, answer = post(server, ask(encoded(), QUESTION))
    assert status == 200
    (served,) = answer["predictions"]
    frame = pd.DataFrame({"image": [png(0)], "question": [QUESTION]})
    assert mlflow.pyfunc.load_model(URI).predict(frame) == [served]


def test_base64_in_lines_is_read(server: str) -> None:
    """As the command `base64` and Python's `encodebytes` write it."""
    status, answer = post(server, ask(base64.encodebytes(png(0)).decode(), QUESTION))
    assert (status, answer) == post(server, ask(encoded(), QUESTION))
    assert status == 200


def header_of_a_huge_picture() -> str:
    """The beginning of a PNG file of 13000 by 13000 pixels."""
    size = struct.pack(">II", 13_000, 13_000)
    header = b"IHDR" + size + b"\x08\x02\x00\x00\x00"
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + bytes(4)).decode()


JUNK = {
    "no image column": (
        {"dataframe_split": {"columns": ["question"], "data": [[QUESTION]]}},
        "missing inputs ['image']",
    ),
    "no question column": ({"dataframe_split": {"columns": ["image"], "data": [[encoded()]]}}, "missing inputs"),
    "not base64": (ask("%%% not base64 %%%", QUESTION), "row 0: column image: not base64"),
    "not an image": (ask(base64.b64encode(b"some text").decode(), QUESTION), "row 0: column image: unreadable image"),
    "half an image": (ask(base64.b64encode(png(0)[:200]).decode(), QUESTION), "row 0: column image: unreadable image"),
    "a data URL": (ask(f"data:image/png;base64,{encoded()}", QUESTION), "row 0: column image: not base64"),
    "an empty image": (ask("", QUESTION), "row 0: column image: empty"),
    "no image": (ask(None, QUESTION), "row 0: column image: empty"),
    "a number as image": (ask(7, QUESTION), "row 0: column image: of type int"),
    "a list as image": (ask([1, 2], QUESTION), "row 0: column image: of type list"),
    "an empty question": (ask(encoded(), "  "), "row 0: column question: empty"),
    "no question": (ask(encoded(), None), "row 0: column question: empty"),
    "not base64 in the third row": (
        table([encoded(), QUESTION], [encoded(), QUESTION], ["%%%", QUESTION]),
        "row 2: column image: not base64",
    ),
    "no image in the second row": (
        table([encoded(), QUESTION], [None, QUESTION], [encoded(), QUESTION]),
        "row 1: column image: empty",
    ),
    "no question in the second row": (
        table([encoded(), QUESTION], [encoded(), None]),
        "row 1: column question: empty",
    ),
    "a question that is a number in the second row": (
        table([encoded(), QUESTION], [encoded(), 7]),
        "row 1: column question: ",
    ),
    "a number as image in the second row": (
        table([encoded(), QUESTION], [7, QUESTION]),
        "row 1: column image: of type int",
    ),
    "a book": (ask(encoded(), "why " * 200), "more than the 448 that leave room to answer"),
    "no table": ({"question": QUESTION}, "dataframe_split"),
    "no JSON": (b"{", "valid JSON"),
    "no rows": ({"dataframe_split": {"columns": ["image", "question"], "data": []}}, "no rows"),
    "a picture of 169 megapixels": (ask(header_of_a_huge_picture(), QUESTION), "row 0: column image: "),
    "a megabyte of text": (ask(encoded(), "why" * 350_000), "row 0: "),
}


@pytest.mark.parametrize("case", JUNK)
def test_invalid_requests_get_status_400_and_the_reason(server: str, case: str) -> None:
    body, reason = JUNK[case]
    status, answer = post(server, body)
    assert status == 400, answer
    assert reason in answer["message"]


def test_deep_json_is_refused_and_the_server_goes_on(server: str) -> None:
    for body in (b'{"dataframe_split": ' + b"[" * 100_000, b"[" * 100_000 + b"]" * 100_000):
        status, answer = post(server, body)
        assert (status, "nested too deeply" in answer["message"]) == (400, True)
    assert post(server, ask(encoded(), QUESTION))[0] == 200


@pytest.mark.parametrize("content", ["text/plain", "application/json"])
@pytest.mark.parametrize("headers", [{"Origin": "http://evil.example"}, {"Host": "evil.example"}])
def test_a_page_of_another_site_cannot_ask(server: str, headers: dict[str, str], content: str) -> None:
    """By its origin, and by the host in case a foreign name resolves to this machine."""
    if "Host" in headers:
        headers = {"Host": f"evil.example:{server.rpartition(':')[2]}"}
    status, answer = post(server, ask(encoded(), QUESTION), **{"Content-Type": content, **headers})
    assert status == 403, answer
    own = {"Origin": server, "Content-Type": "application/json"}
    assert post(server, ask(encoded(), QUESTION), **own)[0] == 200


def test_errors_name_the_bad_row(registered: Path) -> None:
    frame = pd.DataFrame({"image": [png(0), b"junk"], "question": [QUESTION, QUESTION]})
    with pytest.raises(MlflowException, match="row 1: column image: unreadable image"):
        mlflow.pyfunc.load_model(URI).predict(frame)


def test_no_row_is_answered_before_all_cells_are_checked(registered: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlflow.pyfunc.load_model(URI)
    inner = model.unwrap_python_model()
    monkeypatch.setattr(inner, "_answer", lambda *_: pytest.fail("a row was answered"))
    frame = pd.DataFrame({"image": [png(0), "%%%"], "question": [QUESTION, QUESTION]})
    with pytest.raises(MlflowException, match="row 1: column image: not base64"):
        model.predict(frame)


def test_a_chat_template_without_end_is_refused_in_a_servers_thread(
    registered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow's server predicts in a thread, which no signal reaches."""
    monkeypatch.setattr("tlq.inputs.chat.TEMPLATE_SECONDS", 0.2)
    model = mlflow.pyfunc.load_model(URI)
    loop = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3
    model.unwrap_python_model().processor.chat_template = loop
    frame = pd.DataFrame({"image": [png(0)], "question": [QUESTION]})
    with ThreadPoolExecutor(1) as pool, pytest.raises(MlflowException, match=r"^row 0: .* not finished after 0\.2 sec"):
        pool.submit(model.predict, frame).result(30)


def test_the_version_brings_its_own_code(registered: Path, tmp_path: Path) -> None:
    """The model's imports come from the version, not from a project around it."""
    script = f"import mlflow\nmlflow.pyfunc.load_model({URI!r})\nimport tlq\nprint(tlq.__path__)"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "/artifacts/code/tlq'" in done.stdout


def test_a_checkpoint_that_changed_is_refused(registered: Path) -> None:
    report = registered / "models/rtn-w3a16/calibration.json"
    before = report.read_text()
    try:
        report.write_text('{"changed": true}')
        with pytest.raises(ValueError, match="is not the checkpoint that was registered"):
            mlflow.pyfunc.load_model(URI)
    finally:
        report.write_text(before)


def test_the_path_of_a_moved_checkpoint_can_be_configured(registered: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(registered / "models/rtn-w3a16", moved)
    with pytest.raises(FileNotFoundError, match="nowhere is gone"):
        mlflow.pyfunc.load_model(URI, model_config={"checkpoint": "nowhere"})
    model = mlflow.pyfunc.load_model(URI, model_config={"checkpoint": str(moved)})
    assert model.predict(pd.DataFrame({"image": [png(0)], "question": [QUESTION]}))


def test_a_project_that_was_moved_loads_its_champion_from_the_new_place(
    registered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old folder is gone: MLflow's folders and the checkpoint are found next to the database."""
    moved = tmp_path / "moved"
    shutil.copytree(registered, moved)
    monkeypatch.chdir(moved)
    hidden = registered.rename(registered.with_name("hidden"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{moved}/mlflow.db")
    try:
        client = connect()
        run = client.get_run(client.get_model_version_by_alias("tiny-w3a16", "champion").run_id)
        assert Path(run.info.artifact_uri).is_relative_to(moved)
        assert "metrics.json" in [entry.path for entry in client.list_artifacts(run.info.run_id)]
        monkeypatch.chdir(tmp_path)
        model = mlflow.pyfunc.load_model(URI)
        (answer,) = model.predict(pd.DataFrame([{"image": png(0), "question": QUESTION}]))
        assert isinstance(answer, str)
    finally:
        hidden.rename(registered)
    assert follow_project(moved / "mlflow.db") == 0
