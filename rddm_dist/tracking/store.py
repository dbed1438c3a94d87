"""The door to MLflow: opens a tracking store quietly and finds or makes the experiment in it."""

from __future__ import annotations

import logging
import os
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.errors import ConfigError, EnvironmentFault

if TYPE_CHECKING:
    from mlflow import MlflowClient

SQLITE = "sqlite:///"
SERVERS = ("http://", "https://", "databricks")
# A server that is away should be noticed in seconds, not in MLflow's minutes; whoever set these keeps their values.
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}


def default_uri(storage: str | Path) -> str:
    """The store that the runs of one storage folder share."""
    return f"{SQLITE}{Path(storage).resolve() / 'mlflow.db'}"


def open_client(uri: str) -> MlflowClient:
    """A client of the store at `uri`. The first use of an SQLite file makes its tables, which takes seconds.

    Raises ConfigError for a kind of store that MLflow no longer has, EnvironmentFault for an SQLite file that cannot be
    written. A server is not contacted before the first call.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if uri.startswith(SQLITE):
        _check_sqlite(uri)
    elif uri.startswith("file:") or ("://" not in uri and not uri.startswith("databricks")):
        raise ConfigError(f"tracking.uri={uri} is not a store; give http(s)://server or sqlite:////folder/mlflow.db")
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.WARNING)
        logger.handlers.clear()  # to our log files like everybody else's, not to the console
        logger.propagate = True
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def ensure_experiment(client: MlflowClient, *, uri: str, name: str) -> str:
    """The id of the experiment, made if it is not there. Artifacts of an SQLite store go to `mlartifacts` beside it."""
    found = client.get_experiment_by_name(name)
    if found is None:
        return str(client.create_experiment(name, artifact_location=_artifact_location(uri)))
    if found.lifecycle_stage != "active":
        raise ConfigError(f"tracking.experiment={name} is deleted in {uri}; restore it there or choose another name")
    return str(found.experiment_id)


def sqlite_path(uri: str) -> Path:
    return Path(uri.removeprefix(SQLITE)).resolve()


def _artifact_location(uri: str) -> str | None:
    """Where a new experiment keeps artifacts; None leaves it to the server."""
    if uri.startswith(SQLITE):
        return (sqlite_path(uri).parent / "mlartifacts").as_uri()
    if uri.startswith(SERVERS):
        return None
    # MLflow would take ./mlruns of whichever process comes first.
    raise ConfigError(
        f"tracking.uri={uri}: a database names no place for artifacts; give the address of an `mlflow server` on it"
    )


def _check_sqlite(uri: str) -> None:
    """Fail at once where MLflow would try again for minutes: no folder, no permission, not a database."""
    path = sqlite_path(uri)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(path, timeout=20)
        try:
            connection.execute("BEGIN IMMEDIATE")
            connection.rollback()
        finally:
            connection.close()
    except (OSError, sqlite3.Error) as error:
        raise EnvironmentFault(f"tracking.uri={uri} cannot be used: {error}; free it or change tracking.uri") from error
