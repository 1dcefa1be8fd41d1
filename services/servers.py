"""Start the servers and workers that schedule and track the pipeline on one machine, and stop them together.

    python -m services serve               # make serve: Prefect, MLflow, a worker, the deployments
    python -m services pool --workers 2    # make pool: Prefect and workers of the GPU pool

If PREFECT_API_URL or MLFLOW_TRACKING_URI is set, that server is used and none is started. All servers listen on the
loopback interface only. Ctrl-C or SIGTERM stops everything.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import httpx
import torch
from sqlalchemy.engine import URL

from services import database
from services.deployments import POOL, apply_deployments, cancel_runs, create_pool, release_lost_runs, server
from services.processes import ROOT, tree
from services.supervisor import HOST, Service, ServiceError, Supervisor, check_port
from tasks.config.environment import without_secrets
from tasks.registry.location import follow_project

logger = logging.getLogger("tlq.services")

LOCAL_WORKER = "worker"


def prefect_server(port: int, url: URL | None) -> Service:
    """The Prefect server; with PREFECT_SERVER_API_AUTH_STRING (`user:password`) it asks for this login."""
    environment = {
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_API_HOST": HOST,
        "PREFECT_SERVER_API_PORT": str(port),
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": f"http://{HOST}:{port}",
        **database.prefect_environment(url),
    }
    command = [sys.executable, "-m", "services.guarded_server", str(port)]
    return Service("prefect", command, environment, f"http://{HOST}:{port}/api/health")


def mlflow_server(port: int, url: URL | None) -> Service:
    """The MLflow server, with one process because SQLite has one writer.

    Clients write artifacts as files to the folder that `make demo` uses, so that runs with and without this server find
    each other's artifacts.
    """
    if url is None:
        follow_project(ROOT / "mlflow.db")
    command = [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"]
    return Service(
        "mlflow",
        [*command, "--no-serve-artifacts", "--default-artifact-root", str(ROOT / "mlruns")],
        {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **database.mlflow_environment(url, ROOT)},
        f"http://{HOST}:{port}/health",
    )


def worker(name: str, pool: str, environment: dict[str, str]) -> Service:
    """A Prefect worker that runs one flow at a time and is restarted when it ends."""
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--type", "process"]
    command += ["--name", name, "--limit", "1", "--install-policy", "never"]
    return Service(name, command, environment, restarts=True)


def gpu_workers(count: int) -> Iterator[Service]:
    """``count`` workers of the pool ``TLQ_POOL`` (default `gpu`), one per GPU if this machine has GPUs.

    Raises:
        ServiceError: ``count`` is larger than the number of GPUs.
    """
    pool = os.environ.get("TLQ_POOL", "gpu")
    gpus = visible_gpus()
    if gpus and count > len(gpus):
        raise ServiceError(f"{count} workers for {len(gpus)} GPUs; each uses one GPU, set WORKERS={len(gpus)} or fewer")
    for index in range(count):
        environment = {"CUDA_VISIBLE_DEVICES": gpus[index]} if gpus else {}
        yield worker(f"{pool}-{index}", pool, environment)


def visible_gpus() -> list[str]:
    """The GPUs of this process, named as in CUDA_VISIBLE_DEVICES; empty without a GPU."""
    if not torch.cuda.is_available():
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]


class Machine:
    """The services of this machine, started in order."""

    def __init__(self, prefect_port: int, mlflow_port: int, supervisor: Supervisor | None = None) -> None:
        """``supervisor``: starts the services; the default writes their logs to ``PREFECT_HOME``/logs."""
        home = Path(os.environ.setdefault("PREFECT_HOME", str(ROOT / ".prefect")))
        os.environ.setdefault("PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW", "ignore")
        os.environ.setdefault("PREFECT_WORKER_QUERY_SECONDS", "5")
        self.home = home
        self.ports = {"prefect": prefect_port, "mlflow": mlflow_port}
        self.supervisor = supervisor or Supervisor(ROOT, home / "logs")
        self.cancels_runs = False

    def serve(self) -> None:
        """Start both servers, apply the deployments of prefect.yaml, and start the worker that runs them."""
        starts_prefect = "PREFECT_API_URL" not in os.environ
        self.start_servers(with_mlflow=True)
        with server() as client:
            create_pool(client)
            if starts_prefect:
                for name in release_lost_runs(client):
                    logger.warning("run %s was lost when its worker was killed; its state is now Crashed", name)
            logger.info("applying the deployments of prefect.yaml")
            names = apply_deployments(ROOT, self.home / "prefect.yaml", client)
        logger.info("deployments: %s", ", ".join(names))
        self.supervisor.start(worker(LOCAL_WORKER, POOL, {}))
        self.cancels_runs = True

    def pool(self, workers: int) -> None:
        """Start a Prefect server unless the environment names one, create the pool `gpu`, and start its workers."""
        services = list(gpu_workers(workers))
        self.start_servers(with_mlflow=False)
        command = [sys.executable, "-m", "flows.pool", "--deploy"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ServiceError(f"the pool cannot be created: {' '.join(command[1:])}:\n{done.stdout}{done.stderr}")
        for service in services:
            self.supervisor.start(service)

    def start_servers(self, with_mlflow: bool) -> None:
        """Start the servers that the environment does not name, and set the variables that name them.

        Raises:
            ServiceError: a port is in use, the database cannot be used, or a server does not start.
        """
        start_prefect = "PREFECT_API_URL" not in os.environ
        start_mlflow = with_mlflow and not os.environ.get("MLFLOW_TRACKING_URI")
        if start_prefect:
            check_port(self.ports["prefect"], "Prefect", "TLQ_PREFECT_PORT")
        if start_mlflow:
            check_port(self.ports["mlflow"], "MLflow", "TLQ_MLFLOW_PORT")
        address = os.environ.get(database.VARIABLE)
        url = database.postgres(address) if address and (start_prefect or start_mlflow) else None
        if url is not None:
            database.create_schemas(url)
        if start_prefect:
            if login := os.environ.get("PREFECT_SERVER_API_AUTH_STRING"):
                os.environ["PREFECT_API_AUTH_STRING"] = login  # for the workers and flow runs
            os.environ["PREFECT_API_URL"] = f"http://{HOST}:{self.ports['prefect']}/api"
            self._start(prefect_server(self.ports["prefect"], url))
        if start_mlflow:
            self._start(mlflow_server(self.ports["mlflow"], url))
            os.environ["MLFLOW_TRACKING_URI"] = f"http://{HOST}:{self.ports['mlflow']}"

    def _start(self, service: Service) -> None:
        logger.info("starting %s, its log is %s", service.name, self.supervisor.log(service.name))
        self.supervisor.start(service)

    def stop(self) -> None:
        process = self.supervisor.running.get(LOCAL_WORKER)
        try:
            if self.cancels_runs and process is not None and process.poll() is None:
                cancel_runs(tree(process.pid))
        except httpx.HTTPError as error:
            logger.warning("the runs cannot be cancelled, so their processes are stopped: %s", error)
        finally:
            self.supervisor.stop()

    def summary(self) -> str:
        lines = [f"Prefect   {os.environ['PREFECT_API_URL'].removesuffix('/api')}"]
        if "MLFLOW_TRACKING_URI" in os.environ:
            lines.append(f"MLflow    {without_secrets(os.environ['MLFLOW_TRACKING_URI'])}")
        return "\n".join([*lines, f"logs      {self.supervisor.logs}", "Ctrl-C stops everything."])


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _log_to_terminal() -> None:
    """Log to stderr through a handler of the services' logger, because Prefect configures the root logger."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["serve", "pool"])
    parser.add_argument("--workers", type=int, default=2, help="workers of the pool `gpu` (default 2)")
    for name, port in (("prefect", 4200), ("mlflow", 5000)):
        default = int(os.environ.get(f"TLQ_{name.upper()}_PORT", port))
        parser.add_argument(f"--{name}-port", type=int, default=default, help=f"TLQ_{name.upper()}_PORT, else {port}")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    _log_to_terminal()
    for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT too, because a shell's background jobs ignore it by default
        signal.signal(number, _interrupt)
    machine = Machine(arguments.prefect_port, arguments.mlflow_port)
    try:
        if arguments.what == "serve":
            machine.serve()
        else:
            machine.pool(arguments.workers)
        sys.stdout.write(f"\n{machine.summary()}\n")
        sys.stdout.flush()
        machine.supervisor.watch()
    except ServiceError as error:
        sys.exit(f"\n{error}")
    except KeyboardInterrupt:
        logger.info("stopping everything")
    finally:
        machine.stop()
