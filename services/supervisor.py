"""Starting processes that belong together, watching them, and stopping every one of them."""

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
START_SECONDS = 180.0
LEAST_SECONDS = 10.0
_POLL_SECONDS = 0.5
_LAST_LINES = 15


class ServiceError(RuntimeError):
    """A service cannot be started, or has ended by itself."""


@dataclass(frozen=True)
class Service:
    """A process to keep running.

    Attributes:
        command: its command line.
        environment: added to this process's own.
        health: address that answers with 200 once it is ready; empty if starting is all there is to wait for.
        restarts: whether it is started again when it ends, as one that others can do without for a moment.
    """

    name: str
    command: list[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    health: str = ""
    restarts: bool = False


class Supervisor:
    """Services of one machine: what is started last is stopped first."""

    def __init__(self, folder: Path, logs: Path) -> None:
        """``folder``: where services work; ``logs``: where each writes <name>.log."""
        self.folder = folder
        self.logs = logs
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self._restartable: dict[str, tuple[Service, float]] = {}

    def start(self, service: Service) -> None:
        """Start a service and wait until it is healthy.

        Raises:
            ServiceError: it ended, or was not healthy after ``START_SECONDS``.
        """
        self.logs.mkdir(parents=True, exist_ok=True)
        with self._log(service.name).open("ab") as log:
            process = subprocess.Popen(
                service.command,
                cwd=self.folder,
                env={**os.environ, **service.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches this process only, which stops them in order
            )
        self.running[service.name] = process
        if service.restarts:
            self._restartable[service.name] = service, time.monotonic()
        if service.health:
            self._wait_until_healthy(service)

    def _wait_until_healthy(self, service: Service) -> None:
        until = time.monotonic() + START_SECONDS
        while not is_healthy(service.health):
            self.check()
            if time.monotonic() > until:
                raise ServiceError(
                    f"{service.name} does not answer at {service.health} after {START_SECONDS:.0f} s:\n"
                    + self._last_lines(service.name)
                )
            time.sleep(_POLL_SECONDS)

    def watch(self) -> None:
        """Return never: start again what may be, raise as soon as another service ends.

        Raises:
            ServiceError: names it, with the last lines of its log.
        """
        while True:
            self._restart()
            self.check()
            time.sleep(_POLL_SECONDS)

    def _restart(self) -> None:
        """Start services that were killed; one that ends soon after its start is left to ``check``."""
        for service, started in list(self._restartable.values()):
            status = self.running[service.name].poll()
            if status is not None and time.monotonic() - started > LEAST_SECONDS:
                logger.warning("%s ended with status %d; it is started again", service.name, status)
                self.start(service)

    def check(self) -> None:
        """Raises ServiceError if a service has ended."""
        for name, process in self.running.items():
            status = process.poll()
            if status is not None:
                raise ServiceError(f"{name} ended by itself with status {status}:\n{self._last_lines(name)}")

    def stop(self) -> None:
        """Stop everything, also what services have started themselves. A second Ctrl-C does not interrupt this."""
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

    def _log(self, name: str) -> Path:
        return self.logs / f"{name}.log"

    def _last_lines(self, name: str) -> str:
        path = self._log(name)
        lines = path.read_text(errors="replace").splitlines()[-_LAST_LINES:]
        return "\n".join([*lines, f"(all of it is in {path})"])


def is_healthy(address: str) -> bool:
    """Whether a GET of ``address`` is answered with 200."""
    try:
        return httpx.get(address, timeout=5, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def check_port(port: int, service: str, variable: str) -> None:
    """Raises ServiceError if something listens on ``port`` already."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise ServiceError(
                f"port {port} for {service} cannot be had ({error.strerror}); stop what listens there "
                f"(another `make serve`?) or choose another port with {variable}"
            ) from error
