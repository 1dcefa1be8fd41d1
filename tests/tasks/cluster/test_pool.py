"""Stages on a real work pool of a local Prefect server: kills change no bit, and no process or run remains."""

from __future__ import annotations

import http.server
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from prefect.client.schemas.objects import StateType
from support.listeners import listeners
from support.ranked_job import assert_equal, finish, processes_of, wait_until_gone
from support.site import WORKERS, Site, layers_done, running_site, wait_until

from flows.stages import REPRO
from services.processes import tree
from tasks.cluster import work_pool
from tasks.cluster.work_pool import Pool

#: A stage for one worker, like `evaluate`; it prints its process.
SIDE = """
import os, sys, time
from pathlib import Path
from tasks.command import run
from tasks.cluster.launch import is_rank, on_ranks
from tasks.cluster.rank import RankCommand

def work():
    time.sleep(1)
    Path(sys.argv[1]).write_text(f"{is_rank()} {os.environ.get('WORLD_SIZE')} {time.time()}")

run(lambda: on_ranks(RankCommand("side", tuple(sys.argv[1:])), work, most=1))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with running_site(tmp_path_factory.mktemp("site")) as site:
        yield site


@pytest.fixture(scope="module")
def expected(site: Site) -> dict[str, torch.Tensor]:
    """Result of the job in one process."""
    return finish(site.start("alone", TLQ_POOL=""), site.job / "alone")


@pytest.fixture
def workers(site: Site) -> Site:
    site.start_workers()
    return site


def agents_of(folder: Path) -> list[psutil.Process]:
    return [process for process in processes_of(folder) if "tasks.cluster.agent" in process.cmdline()]


def test_a_pool_without_a_server_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with pytest.raises(ValueError, match="TLQ_POOL is 'gpu', but PREFECT_API_URL names no server"), Pool.connect("gpu"):
        pass
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:1/api")
    with pytest.raises(ConnectionError, match="does not answer"), Pool.connect("gpu"):
        pass


def test_a_server_that_stays_busy_ends_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers 503 to everything, as Prefect does while its SQLite is locked."""
    monkeypatch.setattr(work_pool, "_RETRIES", 1)

    class Busy(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(503)
            self.send_header("Retry-After", "0")
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            """Nothing is logged."""

    with http.server.HTTPServer(("127.0.0.1", 0), Busy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{server.server_port}/api")
        with pytest.raises(ConnectionError, match="too busy: 503 .*run the same command again"), Pool.connect("gpu"):
            pass
        server.shutdown()


def test_a_stage_without_workers_ends_with_an_error(site: Site) -> None:
    output, _ = (process := site.start("waiting", TLQ_POOL_WAIT="3")).communicate(timeout=120)
    assert process.returncode == 1
    assert "pool gpu: no worker took up a run within 3 s; found 0 online, needed at least 1 (2 wanted)" in output
    assert "Traceback" not in output
    assert [run.state_type for run in site.runs("waiting")] == [StateType.CANCELLED] * WORKERS


def test_a_cancelled_stage_cancels_its_runs(workers: Site) -> None:
    process = workers.start("cancelled")
    wait_until(lambda: agents_of(workers.job / "cancelled") or process.poll() is not None)
    assert process.poll() is None, process.communicate()[0][-3000:]
    process.terminate()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 143
    assert output.count("interrupted; run the same command again to continue") == 1
    assert [run.state_type for run in workers.runs("cancelled")] == [StateType.CANCELLED] * WORKERS
    workers.assert_nothing_left("cancelled")


@pytest.mark.soak
def test_kills_of_stage_worker_and_run_change_no_bit(workers: Site, expected: dict[str, torch.Tensor]) -> None:
    folder = workers.job / "killed"
    process = workers.start("killed")
    wait_until(lambda: len(processes_of(folder)) > WORKERS + 1)  # the first rank is there
    process.kill()
    process.communicate()
    wait_until_gone(folder)
    wait_until(lambda: not workers.busy())
    assert {run.state_type for run in workers.runs("killed")} == {StateType.CANCELLED}

    process = workers.start("killed")
    wait_until(lambda: layers_done(folder))
    victim = workers.workers[0]
    for child in psutil.Process(victim.pid).children(recursive=True):
        child.kill()
    victim.kill()
    victim.wait()
    workers.start_workers()
    assert_equal(finish(process, folder), expected)
    workers.assert_nothing_left("killed")
    states = [run.state_type for run in workers.runs("killed")]
    assert {StateType.CRASHED, StateType.COMPLETED} <= set(states)


@pytest.mark.soak
def test_concurrent_variants_all_reach_dvc_lock(workers: Site, tmp_path: Path) -> None:
    """As in the flow's evaluations: each is a DVC stage here, and one flow run of the pool."""
    names = ["a", "b"]
    (tmp_path / "side.py").write_text(SIDE)
    stages = "\n".join(f"  evaluate-{name}:\n    cmd: python -m side {name}\n    outs: [{name}]" for name in names)
    (tmp_path / "dvc.yaml").write_text(f"stages:\n{stages}\n")
    environment = workers.environment
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    environment["PYTHONPATH"] += f"{os.pathsep}{tmp_path}"
    init = [sys.executable, "-m", "dvc", "init", "--no-scm", "--quiet"]
    subprocess.run(init, cwd=tmp_path, env=environment, check=True)
    running = [subprocess.Popen([*REPRO, f"evaluate-{name}"], cwd=tmp_path, env=environment) for name in names]
    heard: set[str] = set()
    while any(process.poll() is None for process in running):
        parents = [workers.server, *workers.workers, *(each for each in running if each.poll() is None)]
        heard |= listeners(process for parent in parents for process in tree(parent.pid))
        time.sleep(0.5)
    assert [process.wait(400) for process in running] == [0] * len(names)
    assert heard == {"127.0.0.1"}
    lock = (tmp_path / "dvc.lock").read_text()
    assert all(f"evaluate-{name}:" in lock for name in names)
    assert {(tmp_path / name).read_text()[:6] for name in names} == {"True 1"}
    assert workers.busy() == []


@pytest.mark.soak
def test_random_kills_of_any_process_change_no_bit(workers: Site, expected: dict[str, torch.Tensor]) -> None:
    """SIGKILL hits ranks, agents, flow runs, workers and the stage; workers and stage are started again."""
    chance = random.Random(11)
    folder = workers.job / "everything"
    wanted = int(os.environ.get("TLQ_TEST_KILLS", "20"))
    kills = dict.fromkeys(("rank", "agent", "flow run", "worker", "worker and flow run", "stage"), 0)
    process = workers.start("everything")
    while sum(kills.values()) < wanted:
        if chance.random() < 0.5:  # kills that follow each other closely, and kills in the middle of the work
            done = layers_done(folder)
            wait_until(lambda done=done, stage=process: stage.poll() is not None or layers_done(folder) > done)
        time.sleep(chance.uniform(0, 8))
        if process.poll() == 0:  # finished before its time: again from the start
            assert_equal(finish(process, folder), expected)
            process = workers.start("everything")
            continue
        assert process.poll() is None, process.communicate()[0][-3000:]
        kind = min(kills, key=lambda name: (kills[name], chance.random()))
        if victims := victims_of(kind, workers, folder, process, chance):
            for victim in victims:
                victim.send_signal(signal.SIGKILL)
            kills[kind] += 1
            sys.stderr.write(f"{time.strftime('%H:%M:%S')} {kills}, {layers_done(folder)} layers done\n")
        if kind == "stage" and victims:
            process.communicate()
            process = workers.start("everything")
        workers.start_workers()
    assert_equal(finish(process, folder), expected)
    wait_until_gone(folder)
    wait_until(lambda: not workers.busy())


def victims_of(
    kind: str, site: Site, folder: Path, stage: subprocess.Popen[str], chance: random.Random
) -> list[psutil.Process]:
    """Processes to kill together; empty if none of them runs at this moment."""
    agents = agents_of(folder)
    others = [process for process in processes_of(folder) if process.pid != stage.pid]
    worker = psutil.Process(chance.choice(site.workers).pid)
    chosen = {
        "rank": [process for process in others if process not in agents],
        "agent": agents,
        "flow run": [process.parent() for process in agents],
        "worker": [worker],
        "stage": [psutil.Process(stage.pid)] if agents else [],
    }
    if kind == "worker and flow run":
        below = worker.children(recursive=True)
        return [worker, *below] if below else []
    return [chance.choice(chosen[kind])] if chosen[kind] else []
