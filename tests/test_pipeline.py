"""The whole pipeline in a fresh copy of the project: servers, a schedule, registry, report, DVC."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet as pq
import pytest
import yaml
from support.documents import blocks
from support.listeners import listeners
from support.servers import client
from support.tiny_project import ROOT, VARIANTS, Services, dvc, make_project, run, serving

from services.deployments import apply_deployments, server
from services.processes import FLOW_RUN, tree, with_environment

CHROMIUM = os.environ.get("TLQ_CHROMIUM") or shutil.which("chromium") or ""
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--no-proxy-server",
    "--disable-background-networking",
    "--disable-sync",
)
RUN_SECONDS = 900.0


class Prefect:
    """The requests of the tests to a Prefect server."""

    def __init__(self, address: str) -> None:
        self.client = client(f"{address}/api")

    def request(self, method: str, path: str, content: Any = None) -> Any:
        """The answer's content."""
        answer = self.client.request(method, path, json=content)
        return answer.json() if answer.content else None

    def get(self, path: str) -> Any:
        return self.request("GET", path)

    def post(self, path: str, **content: Any) -> Any:
        return self.request("POST", path, content)

    def finished(self, run_id: str) -> dict[str, Any]:
        """The flow run, when it is in a final state."""
        until = time.monotonic() + RUN_SECONDS
        while time.monotonic() < until:
            found = self.get(f"/flow_runs/{run_id}")
            if found["state_type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED"):
                return dict(found)
            time.sleep(0.5)
        raise AssertionError(f"not finished after {RUN_SECONDS} s: {found['state']}")

    def scheduled(self, deployment: str, seconds: float = 60) -> dict[str, Any]:
        """The run that a schedule has made."""
        until = time.monotonic() + seconds
        filters = {"deployments": {"id": {"any_": [deployment]}}, "sort": "EXPECTED_START_TIME_ASC", "limit": 1}
        while time.monotonic() < until:
            runs = self.post("/flow_runs/filter", **filters)
            if runs:
                return dict(runs[0])
            time.sleep(0.5)
        raise AssertionError(f"no run was scheduled within {seconds} s")

    def artifacts(self, run_id: str) -> dict[str, dict[str, Any]]:
        found = self.post("/artifacts/filter", flow_runs={"id": {"any_": [run_id]}})
        return {artifact["key"]: artifact for artifact in found}


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    """Servers, deployments and a worker of a fresh copy of the project."""
    folder = make_project(tmp_path_factory.mktemp("project"))
    with serving(folder, {"PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "1"}) as started:
        yield started


@pytest.fixture(scope="module")
def prefect(services: Services) -> Prefect:
    return Prefect(services.prefect)


@pytest.fixture(scope="module")
def scheduled_run(prefect: Prefect) -> dict[str, Any]:
    """The run of the pipeline that a schedule started, finished."""
    deployment = prefect.get("/deployments/name/quantize/quantize")
    soon = datetime.now(UTC) + timedelta(seconds=5)
    schedule = {"interval": 7 * 86400, "anchor_date": soon.isoformat()}
    prefect.request("POST", f"/deployments/{deployment['id']}/schedules", [{"active": True, "schedule": schedule}])
    return prefect.finished(prefect.scheduled(deployment["id"])["id"])


@pytest.fixture(scope="module")
def project(services: Services, scheduled_run: dict[str, Any]) -> Path:
    """The copy of the project after the scheduled run."""
    assert scheduled_run["state_type"] == "COMPLETED", scheduled_run["state"]["message"]
    return services.folder


def test_deployments_can_be_filled_in_and_ship_with_a_paused_schedule(prefect: Prefect) -> None:
    for name in ("quantize", "evaluate", "sweep"):
        deployment = prefect.get(f"/deployments/name/{name}/{name}")
        fields = deployment["parameter_openapi_schema"]["properties"]
        assert all(field.get("description") for field in fields.values()), name
        assert deployment["global_concurrency_limit"]["limit"] == 1
        assert deployment["concurrency_options"]["collision_strategy"] == "ENQUEUE"
        assert "tlq" in deployment["tags"]
    weekly = prefect.get("/deployments/name/quantize/quantize")["schedules"]
    assert [(each["schedule"]["cron"], each["active"]) for each in weekly if each["slug"] == "weekly"] == [
        ("0 3 * * 0", False)
    ]


def test_every_server_listens_on_loopback_only(services: Services, prefect: Prefect) -> None:
    assert listeners(tree(services.process.pid)) == {"127.0.0.1"}


def test_a_schedule_runs_the_pipeline_and_a_version_is_registered(
    project: Path, services: Services, scheduled_run: dict[str, Any]
) -> None:
    assert scheduled_run["auto_scheduled"]
    found = client(services.mlflow).get("/api/2.0/mlflow/model-versions/search", params={"max_results": 10})
    versions = {version["version"]: version for version in found.json()["model_versions"]}
    assert {version["name"] for version in versions.values()} == {"demo-w3a16"}
    assert set(versions) == {"1", "2"}


def test_runs_through_the_server_and_without_it_share_their_files(project: Path, services: Services) -> None:
    by_name = "/api/2.0/mlflow/experiments/get-by-name"
    found = client(services.mlflow).get(by_name, params={"experiment_name": "tlq"}).json()
    location = Path(found["experiment"]["artifact_location"].removeprefix("file://"))
    assert location.parent == project / "mlruns"
    assert list(location.rglob("metrics.json"))


def test_the_run_shows_scores_pictures_and_the_way_to_mlflow(
    services: Services, prefect: Prefect, project: Path, scheduled_run: dict[str, Any]
) -> None:
    artifacts = prefect.artifacts(scheduled_run["id"])
    rows = json.loads(artifacts["scores"]["data"])
    assert [row["variant"] for row in rows] == ["full", *VARIANTS]
    assert rows[1]["registered"] == "demo-w3a16/1"
    assert services.mlflow in artifacts["mlflow"]["data"]
    for key in ("scores-picture", "importance-picture"):
        assert artifacts[key]["type"] == "image"
        assert artifacts[key]["data"].startswith("data:image/png;base64,")
    assert "variant" in artifacts["scores-text"]["data"]


@pytest.mark.browser
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium: apt-get install chromium, or set TLQ_CHROMIUM to its path")
def test_the_prefect_ui_lists_deployments_and_the_finished_run(
    services: Services, prefect: Prefect, project: Path, scheduled_run: dict[str, Any], tmp_path: Path
) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install '.[dev]'")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        page = browser.new_context(viewport={"width": 1280, "height": 1000}).new_page()
        page.set_default_timeout(60_000)

        page.goto(f"{services.prefect}/deployments")
        for name in ("quantize", "evaluate", "sweep"):
            page.get_by_text(name, exact=True).first.wait_for()
        page.screenshot(path=tmp_path / "deployments.png")
        page.goto(f"{services.prefect}/runs/flow-run/{scheduled_run['id']}")
        page.get_by_text("Completed").first.wait_for()
        page.get_by_text("Artifacts", exact=True).click()
        for key in ("scores", "scores-text", "scores-picture", "importance-picture", "mlflow"):
            page.get_by_text(key, exact=True).first.wait_for()
        page.screenshot(path=tmp_path / "artifacts.png")
        for key in ("scores-picture", "importance-picture"):
            picture = prefect.artifacts(scheduled_run["id"])[key]["id"]
            page.goto(f"{services.prefect}/artifacts/artifact/{picture}")
            page.wait_for_function("[...document.images].some(each => each.complete && each.naturalWidth > 400)")
        browser.close()


def test_a_cancelled_run_leaves_no_process_and_params_yaml_as_it_was(
    project: Path, prefect: Prefect, services: Services
) -> None:
    before = (project / "params.yaml").read_text()
    deployment = prefect.get("/deployments/name/quantize/quantize")["id"]
    # Of these settings nothing before the evaluation depends on; the flow runs its first stage there.
    parameters = {"options": {"settings": {"register.min_items": 2}, "force": ["baseline"]}}
    run_id = prefect.post(f"/deployments/{deployment}/create_flow_run", parameters=parameters)["id"]
    wait_for(lambda: any("tasks.stages.evaluate" in each for each in commands_of(run_id)))
    assert "min_items: 2" in (project / "params.yaml").read_text()
    prefect.post(f"/flow_runs/{run_id}/set_state", state={"type": "CANCELLING"})
    assert prefect.finished(run_id)["state_type"] == "CANCELLED"
    assert commands_of(run_id) == []

    def task_states() -> dict[str, str]:
        runs = prefect.post("/task_runs/filter", flow_runs={"id": {"any_": [run_id]}})
        return {each["name"]: each["state_type"] for each in runs}

    wait_for(lambda: not {"PENDING", "RUNNING"} & set(task_states().values()), 60, task_states)
    assert task_states()["baseline"] == "CANCELLED"
    assert set(task_states().values()) == {"COMPLETED", "CANCELLED"}
    assert (project / "params.yaml").read_text() == before


def commands_of(run_id: str) -> list[str]:
    """Command lines of the processes that work for a flow run."""
    return [" ".join(each.cmdline()) for each in with_environment(FLOW_RUN, run_id)]


def wait_for(condition: Callable[[], bool], seconds: float = 300, found: Callable[[], object] = str) -> None:
    """Wait until a condition holds; ``found`` says what there is if it does not."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"not within {seconds} s: {found()}"
        time.sleep(0.2)


def test_applying_the_deployments_again_keeps_schedules_as_the_ui_left_them(
    services: Services, prefect: Prefect, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", f"{services.prefect}/api")
    deployment = prefect.get("/deployments/name/quantize/quantize")
    weekly = next(each for each in deployment["schedules"] if each["slug"] == "weekly")
    path = f"/deployments/{deployment['id']}/schedules/{weekly['id']}"
    prefect.request("PATCH", path, {"active": True})
    try:
        with server() as client:
            names = apply_deployments(services.folder, tmp_path / "prefect.yaml", client)
        after = prefect.get("/deployments/name/quantize/quantize")["schedules"]
    finally:
        prefect.request("PATCH", path, {"active": False})
    assert names == ["quantize", "evaluate", "sweep"]
    assert [each["active"] for each in after if each["slug"] == "weekly"] == [True]


def test_prefect_has_named_tasks(prefect: Prefect, scheduled_run: dict[str, Any]) -> None:
    runs = prefect.post("/task_runs/filter", flow_runs={"id": {"any_": [scheduled_run["id"]]}})
    assert {"prepare", "calibrate@tlq-w3a16", "evaluate@rtn-w3a16", "register"} <= {each["name"] for each in runs}


@pytest.mark.parametrize("headers", [{"origin": "https://evil.example"}, {"host": "evil.example:{port}"}])
def test_pages_of_other_sites_are_refused(services: Services, headers: dict[str, str]) -> None:
    """By origin, and by host in case a foreign name resolves to this machine."""
    path = {services.prefect: "/api/flow_runs/filter", services.mlflow: "/api/2.0/mlflow/experiments/create"}
    for address, request in path.items():
        sent = {name: value.format(port=httpx.URL(address).port) for name, value in headers.items()}
        with pytest.raises(httpx.HTTPStatusError, match="403"):
            client(address).post(request, json={"name": "x"}, headers=sent)


def test_stopping_the_services_ends_every_process(services: Services, scheduled_run: dict[str, Any]) -> None:
    """The last test of the services; the tests below need their results only."""
    processes = services.descendants()
    assert len(processes) > 3
    assert services.stop() == 0
    assert not [process for process in processes if process.is_running()]


def test_the_flow_without_a_server_finds_nothing_to_do_and_prints_every_variant(project: Path, tmp_path: Path) -> None:
    """With a Prefect home of its own, because the services use the project's."""
    lines = run(project, "env", f"PREFECT_HOME={tmp_path}", sys.executable, "-m", "flows.quantize").splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("variant "))
    assert [line.split()[0] for line in lines[start + 2 : start + 5]] == ["full", *VARIANTS]
    assert not [line for line in lines if "Running stage" in line]
    # The cancelled run removed the baseline's result; DVC puts it back from its cache.
    reasons = (": skipped, nothing that it depends on has changed", ": its result was in DVC's cache")
    assert len([line for line in lines if any(reason in line for reason in reasons)]) == 12
    assert [line for line in lines if line.startswith("  demo-w3a16 version ")]


def test_no_stage_is_stale_after_the_run(project: Path) -> None:
    assert "up to date" in dvc(project, "status")
    assert "Running stage" not in dvc(project, "repro")


def test_metrics_are_one_row_per_variant(project: Path) -> None:
    shown = json.loads(dvc(project, "metrics", "show", "--json"))
    files = shown[""]["data"]
    assert sorted(files) == sorted(f"evaluation/{name}/summary.json" for name in ("full", *VARIANTS))
    assert {"score", "kl", "nll", "retention"} <= set(files["evaluation/tlq-w3a16/summary.json"]["data"])


def test_every_variant_is_registered_with_answers_per_item(project: Path) -> None:
    rows = {row["variant"]: row for row in json.loads((project / "registry.json").read_text())}
    assert {rows[name]["model"] for name in VARIANTS} == {"demo-w3a16"}
    assert {rows[name]["version"] for name in VARIANTS} == {1, 2}
    items = pq.read_table(project / "evaluation/tlq-w3a16/items.parquet").to_pandas()
    assert len(items) == 4 * 6
    assert {"reply", "target", "score", "kl", "nll"} <= set(items.columns)


def test_the_readmes_registered_model_answers(project: Path) -> None:
    (block,) = [block for block in blocks("python", documents=[ROOT / "README.md"]) if "models:/" in block.code]
    question = pq.read_table(project / "data/demo/world/textvqa.parquet").to_pylist()[0]
    (project / "docs").mkdir(exist_ok=True)
    (project / "docs/sign.png").write_bytes(question["image"]["bytes"])
    run(project, sys.executable, "-c", block.code)


def test_pictures_are_drawn(project: Path) -> None:
    for name in ("scores.png", "importance.png"):
        assert (project / "report" / name).read_bytes().startswith(b"\x89PNG")


def test_a_page_is_written_and_every_checkpoint_has_its_card(project: Path) -> None:
    page = (project / "report/index.html").read_text()
    commit = run(project, "git", "rev-parse", "HEAD").strip()
    checkpoint = yaml.safe_load((project / "dvc.lock").read_text())["stages"]["calibrate@tlq-w3a16"]["outs"][0]
    for expected in (commit, checkpoint["md5"], "<strong>Demo benchmarks.</strong>"):
        assert expected in page
    for name in VARIANTS:
        card = (project / "models" / name / "README.md").read_text()
        assert card == (project / "report/cards" / f"{name}.md").read_text()


def test_one_recipes_choice_makes_only_its_own_stages_stale(project: Path) -> None:
    path = project / "params.yaml"
    before = path.read_text()
    params = yaml.safe_load(before)
    params["recipes"]["tlq"] = {"equalization": {"points": 10}}
    path.write_text(yaml.safe_dump(params))
    try:
        stale = json.loads(dvc(project, "status", "--json"))
    finally:
        path.write_text(before)
    assert set(stale) == {"calibset", "calibrate@tlq-w3a16"}  # calibset lists what every recipe uses
