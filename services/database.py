"""The databases of the servers: files in the project's folder, or one PostgreSQL database."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, OperationalError

from services.supervisor import ServiceError
from tasks.config.environment import redacted, without_secrets

VARIABLE = "TLQ_DATABASE_URL"

#: One schema per server, because Prefect and MLflow both have a table `alembic_version`.
SCHEMAS = ("prefect", "mlflow")


def postgres(url: str) -> URL:
    """Parse and check ``TLQ_DATABASE_URL``.

    Raises:
        ServiceError: the variable is not the address of a PostgreSQL database.
    """
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise ServiceError(
            f"{VARIABLE} is no database address; give postgresql://user:password@host/database"
        ) from error
    if parsed.get_backend_name() != "postgresql" or not parsed.database:
        raise ServiceError(
            f"{VARIABLE} is {without_secrets(url)}; give postgresql://user:password@host/database, "
            "or unset it for SQLite"
        )
    return parsed


def create_schemas(url: URL) -> None:
    """Create the schemas that do not exist.

    Raises:
        ServiceError: no driver is installed, or the database rejects the connection.
    """
    try:
        engine = sqlalchemy.create_engine(url.set(drivername="postgresql+psycopg2"))
    except ImportError as error:
        raise ServiceError(f"{VARIABLE} needs psycopg2, the extra 'postgres', which make setup installs") from error
    try:
        with engine.begin() as connection:
            for schema in SCHEMAS:
                connection.execute(sqlalchemy.schema.CreateSchema(schema, if_not_exists=True))
    except OperationalError as error:
        address = url.render_as_string(hide_password=False)
        reason = redacted(str(error.orig).splitlines()[0], address)
        raise ServiceError(f"{VARIABLE}: {without_secrets(address)} cannot be used: {reason}") from None
    finally:
        engine.dispose()


def prefect_environment(url: URL | None) -> dict[str, str]:
    """Settings of the Prefect server. Without ``url`` it uses a SQLite file in PREFECT_HOME."""
    if url is None:
        return {}
    query = {
        ("ssl" if name == "sslmode" else name): value for name, value in url.query.items()
    }  # asyncpg's name for it
    address = url.set(drivername="postgresql+asyncpg", query=query)
    return {
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": address.render_as_string(hide_password=False),
        # extensions are in public
        "PREFECT_SERVER_DATABASE_SQLALCHEMY_CONNECT_ARGS_SEARCH_PATH": "prefect, public",
    }


def mlflow_environment(url: URL | None, folder: Path) -> dict[str, str]:
    """Settings of the MLflow server. Without ``url`` it uses the same file as `make demo`.

    They are environment variables, because other users can read a command line with its password.
    """
    if url is None:
        return {"MLFLOW_BACKEND_STORE_URI": f"sqlite:///{folder / 'mlflow.db'}"}
    address = url.set(drivername="postgresql+psycopg2").update_query_dict({"options": "-csearch_path=mlflow"})
    return {"MLFLOW_BACKEND_STORE_URI": address.render_as_string(hide_password=False)}
