"""Keep MLflow's files findable in a project folder that was moved or copied.

MLflow stores the absolute folder of every experiment, run and model in its database.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

#: Columns of MLflow 3's database that hold folders below its artifact root `mlruns`.
_FOLDERS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "storage_location"),
)


def follow_project(database: Path) -> int:
    """Point MLflow's folders to the ``mlruns`` next to its SQLite database, if there is one.

    Returns:
        The number of paths that were changed: 0 unless the project folder was moved or copied.
    """
    root = database.resolve().parent / "mlruns"
    if not (database.exists() and root.is_dir()):
        return 0
    changed = 0
    with closing(sqlite3.connect(database, timeout=60)) as connection, connection:
        for table, column in _FOLDERS:
            rows = connection.execute(f"SELECT rowid, {column} FROM {table} WHERE {column} LIKE '/%/mlruns/%'")
            for row, folder in rows.fetchall():
                moved = f"{root}/{folder.split('/mlruns/', 1)[1]}"
                if moved != folder:
                    connection.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", (moved, row))
                    changed += 1
    return changed
