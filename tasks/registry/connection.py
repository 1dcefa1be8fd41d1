"""Connect to MLflow, retry calls on a conflict, and page through searches."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from tasks.config.environment import redacted, without_secrets
from tasks.registry.location import follow_project
from tlq.runtime.files import FREE_SOME, is_full, new_file

if TYPE_CHECKING:
    from mlflow import MlflowClient

DEFAULT_TRACKING_URI = "sqlite:///mlflow.db"


def connect() -> MlflowClient:
    """Client of ``MLFLOW_TRACKING_URI``, or of mlflow.db in this folder.

    Raises:
        ConnectionError: MLflow does not answer.
    """
    import mlflow
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    uri = os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_TRACKING_URI
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    logging.getLogger("alembic").setLevel(logging.WARNING)  # it logs seventy steps when it creates a database
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # it logs the traceback of what it raises
    mlflow.set_tracking_uri(uri)
    try:
        with _alone_in_database(uri):
            client = mlflow.MlflowClient()
            client.search_experiments(max_results=1)
            if uri.startswith("sqlite:///"):
                follow_project(Path(uri.removeprefix("sqlite:///")))
    except SQLAlchemyError as error:
        if is_full(error):
            raise OSError(f"MLflow's database {without_secrets(uri)}: the disk is full; {FREE_SOME}") from None
        raise ValueError(
            f"MLflow's database {without_secrets(uri)} cannot be read ({redacted(first_line(error), uri)}); correct "
            "MLFLOW_TRACKING_URI, or move the file away and bring it back from a copy"
        ) from None  # the cause's text may hold the password
    except MlflowException as error:
        raise ConnectionError(
            f"MLflow at {without_secrets(uri)} does not answer ({redacted(first_line(error), uri)}); start it, or "
            "correct MLFLOW_TRACKING_URI"
        ) from (error if uri == without_secrets(uri) else None)  # the cause's text may hold the password
    return client


@contextmanager
def _alone_in_database(uri: str) -> Iterator[None]:
    """Hold a lock file next to an SQLite database, because MLflow 3.17 creates the tables without a lock."""
    if not uri.startswith("sqlite:///"):
        yield
        return
    path = Path(uri.removeprefix("sqlite:///"))
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: MLflow's database must be a file; correct MLFLOW_TRACKING_URI")
    with FileLock(path.with_name(f"{path.name}.lock")):
        if not path.exists():
            _create(path)
        yield


def _create(path: Path) -> None:
    """Create MLflow's database whole, or not at all: MLflow cannot go on with tables of which some exist."""
    import mlflow

    with new_file(path.resolve()) as temporary:
        temporary.unlink(missing_ok=True)  # of a process that was killed
        mlflow.MlflowClient(f"sqlite:///{temporary}").search_experiments(max_results=1)


def retry_on_conflict(action: Callable[[], None], attempts: int = 5) -> None:
    """Retry an idempotent MLflow call after a unique-constraint conflict.

    MLflow's stores insert a row if a query did not find it. A row that another process inserts in between breaks a
    constraint of the database (BAD_REQUEST); the next query finds it.
    """
    from mlflow.exceptions import MlflowException

    for left in reversed(range(attempts)):
        try:
            return action()
        except MlflowException as error:
            if error.error_code != "BAD_REQUEST" or not left:
                raise
    raise ValueError(f"attempts is {attempts}; it must be at least 1")


def pages(search: Callable[[str | None], Any]) -> Iterable[Any]:
    """Yield all results of an MLflow search, page by page."""
    token = None
    while True:
        found = search(token)
        yield from found
        token = found.token
        if not token:
            return


def first_line(error: BaseException) -> str:
    """First line of an error's message, short enough for a log or a tag."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
