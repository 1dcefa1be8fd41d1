"""Start processes that belong together, restart or report those that end, and stop all of them."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from services.processes import stop, tree

logger = logging.getLogger("tlq.services")

HOST = "127.0.0.1"
#: A service must be healthy within this time after its start.
START_SECONDS = 180.0
#: While a service starts, a log line says so after each period of this length.
REMINDER_SECONDS = 20.0
#: A service that ends sooner after its start has failed to start, and is not restarted.
LEAST_SECONDS = 10.0
_POLL_SECONDS = 0.5
_LAST_LINES = 15


class ServiceError(RuntimeError):
    """A service cannot be started, or has ended."""


@dataclass(frozen=True)
class Service:
    """A process to keep running.

    Attributes:
        command: its command line.
        environment: added to the environment of this process.
        health: address that answers with 200 when the service is ready; empty if nothing has to wait for it.
        restarts: whether the service is restarted when it ends.
    """

    name: str
    command: list[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    health: str = ""
    restarts: bool = False


class Supervisor:
    """The services of one machine. They stop in reverse order of their start."""

    def __init__(self, folder: Path, logs: Path) -> None:
        """``folder``: working directory of the services; ``logs``: folder in which each writes <name>.log."""
        self.folder = folder
        self.logs = logs
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self._restartable: dict[str, tuple[Service, float]] = {}

    def start(self, service: Service) -> None:
        """Start a service and wait until it is healthy.

        Raises:
            ServiceError: the service ended, or was not healthy after ``START_SECONDS``.
        """
        self.logs.mkdir(parents=True, exist_ok=True)
        with self.log(service.name).open("ab") as log:
            process = subprocess.Popen(
                service.command,
                cwd=self.folder,
                env={**os.environ, **service.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that Ctrl-C reaches this process only, which stops the services in order
            )
        self.running[service.name] = process
        if service.restarts:
            self._restartable[service.name] = service, time.monotonic()
        if service.health:
            self._wait_until_healthy(service)

    def _wait_until_healthy(self, service: Service) -> None:
        """Wait for a service, and log what is waited for, how long at most, and when it is there."""
        start = time.monotonic()
        shown = 0.0
        logger.info("waiting for %s at %s (up to %.0f s)", service.name, service.health, START_SECONDS)
        while not is_healthy(service.health):
            self.check()
            waited = time.monotonic() - start
            if waited > START_SECONDS:
                raise ServiceError(
                    f"{service.name} does not answer at {service.health} after {START_SECONDS:.0f} s:\n"
                    + self._last_lines(service.name)
                )
            if waited - shown >= REMINDER_SECONDS:
                shown = waited
                logger.info("still waiting for %s, %.0f s so far", service.name, waited)
            time.sleep(_POLL_SECONDS)
        logger.info("%s is there after %.0f s", service.name, time.monotonic() - start)

    def watch(self) -> None:
        """Restart the services that allow it, until another service ends. Blocks and never returns.

        Raises:
            ServiceError: a service ended; the message holds its name and the last lines of its log.
        """
        while True:
            self._restart()
            self.check()
            time.sleep(_POLL_SECONDS)

    def _restart(self) -> None:
        """Restart services that have ended, except one that failed to start, which ``check`` reports."""
        for service, started in list(self._restartable.values()):
            status = self.running[service.name].poll()
            if status is not None and time.monotonic() - started > LEAST_SECONDS:
                logger.warning("%s ended with status %d and is restarted", service.name, status)
                self.start(service)

    def check(self) -> None:
        """Raise ServiceError if a service has ended."""
        for name, process in self.running.items():
            status = process.poll()
            if status is not None:
                raise ServiceError(f"{name} ended with status {status}:\n{self._last_lines(name)}")

    def stop(self) -> None:
        """Stop every service and its child processes. A second Ctrl-C does not interrupt this."""
        handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            while self.running:
                name, process = self.running.popitem()
                logger.info("stopping %s", name)
                stop(tree(process.pid))
                process.wait()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def log(self, name: str) -> Path:
        """The file with the output of a service."""
        return self.logs / f"{name}.log"

    def _last_lines(self, name: str) -> str:
        path = self.log(name)
        lines = path.read_text(errors="replace").splitlines()[-_LAST_LINES:]
        return "\n".join([*lines, f"(the whole log is {path})"])


def is_healthy(address: str) -> bool:
    """Whether ``address`` answers a GET request with status 200."""
    try:
        return httpx.get(address, timeout=5, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def check_port(port: int, service: str, variable: str) -> None:
    """Raise ServiceError if a process listens on ``port``."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise ServiceError(
                f"port {port} for {service} is not free ({error.strerror}); stop the process that listens "
                f"there (another `make serve`?) or set {variable} to another port"
            ) from error
