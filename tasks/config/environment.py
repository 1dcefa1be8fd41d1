"""Every environment variable of this project: name, meaning, default, and the functions that read them.

Variables decide where and how a stage runs, never its result. The list includes two that the library itself reads
(``tlq.runtime``, ``tlq.plan``).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit, urlunsplit


@dataclass(frozen=True)
class Variable:
    """An environment variable.

    Attributes:
        readers: programs that read the variable, for the documentation.
        default: value or rule if the variable is not set, for the documentation.
    """

    name: str
    readers: str
    meaning: str
    default: str


VARIABLES: dict[str, Variable] = {
    variable.name: variable
    for variable in (
        Variable(
            "TLQ_DEVICE", "stage", "device that computes everything: `cpu`, `cuda`, `cuda:1`", "all GPUs, else CPU"
        ),
        Variable("TLQ_RANKS", "stage", "processes that share a stage on this machine", "one per GPU, else 1"),
        Variable(
            "TLQ_HOST_MEMORY", "stage", "GiB of hidden states that a process keeps in memory", "half of the free memory"
        ),
        Variable("TLQ_DEVICE_MEMORY", "stage", "GiB of device memory to plan for, if less than all", "the free memory"),
        Variable("TLQ_LOG", "stage", "level of the log; `debug` adds tracebacks of expected errors", "info"),
        Variable("TLQ_IMAGE_PIXELS", "all", "pixels above which an image is refused", "100000000"),
        Variable(
            "TLQ_RESTARTS", "stage, worker", "lost worker runs, or failures of a rank, before a stage gives up", "20"
        ),
        Variable("TLQ_HOST", "all", "address under which other machines reach this one", "127.0.0.1"),
        Variable("TLQ_POOL", "stage, worker", "Prefect work pool whose workers compute", "none: this machine computes"),
        Variable("TLQ_POOL_WORKERS", "stage", "worker runs per stage, at most 16", "one per online worker"),
        Variable("TLQ_POOL_WAIT", "stage", "seconds without any worker before a stage gives up", "600"),
        Variable("TLQ_POOL_SILENCE", "stage", "seconds without a heartbeat before a worker run counts as lost", "30"),
        Variable("TLQ_PARALLEL", "flow", "variants processed at the same time", "2, with a GPU 1, with a pool 16"),
        Variable("TLQ_DATABASE_URL", "services", "PostgreSQL database for both servers", "SQLite files"),
        Variable("TLQ_ALLOWED_HOSTS", "services", "host names of a proxy in front of Prefect", "none"),
        Variable("TLQ_PREFECT_PORT", "services", "port of the Prefect server", "4200"),
        Variable("TLQ_MLFLOW_PORT", "services", "port of the MLflow server", "5000"),
    )
}

#: Variables that programs set for the processes that they start; users do not set them.
INTERNAL = ("TLQ_STORE", "TLQ_STORE_SECRET", "TLQ_GROUP", "TLQ_FLOW_OWNER", "TLQ_FLOW_PROCESS")


def value(name: str, default: str = "") -> str:
    """The text of a variable, or ``default`` if the variable is unset or empty.

    Raises:
        KeyError: the variable is not in ``VARIABLES``.
    """
    return os.environ.get(VARIABLES[name].name) or default


def positive(name: str, default: int) -> int:
    """The value of a variable as a positive integer.

    Raises:
        KeyError: the variable is not in ``VARIABLES``.
        ValueError: the text is not a positive number.
    """
    stated = os.environ.get(VARIABLES[name].name, str(default))
    if not stated.isdigit() or int(stated) < 1:
        raise ValueError(f"{name} is {stated!r}, must be a positive number")
    return int(stated)


#: Parts of the names of query parameters whose values are secrets.
_SECRET_NAMES = ("pass", "pwd", "token", "secret", "key")


def without_secrets(address: str) -> str:
    """An address without user, password and query, for messages, logs and links."""
    parts = urlsplit(address)
    return urlunsplit((parts.scheme, parts.netloc.rsplit("@", 1)[-1], parts.path, "", "")) if parts.netloc else address


def redacted(text: str, address: str) -> str:
    """``text`` without what ``without_secrets`` leaves out of an address, as a library's message may repeat it."""
    parts = urlsplit(address)
    userinfo, at, _ = parts.netloc.rpartition("@")
    secrets = {address: without_secrets(address), userinfo: "...", parts.query: "..."} if at or parts.query else {}
    named = [entry.partition("=") for entry in parts.query.split("&")]
    values = [value for name, _, value in named if any(word in name.lower() for word in _SECRET_NAMES)]
    for value in (userinfo.partition(":")[2], *values):
        secrets |= {value: "...", unquote(value): "..."}
    for secret, shown in secrets.items():
        text = text.replace(secret, shown) if secret else text
    return text
