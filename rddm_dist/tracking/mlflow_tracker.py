"""An MLflow run that mirrors a run's journal: one background thread forwards, training never waits for it.

`<run>/mlflow.json` holds the MLflow run id, how many bytes of the journal have been forwarded, the last forwarded step
of each metric and the artifacts still to send. So an outage delays points but loses none, a restart continues the same
MLflow run, and steps that a resumed run takes twice give one point each (the first). A crash between sending and noting
it down sends the same points again, with the same timestamps, which MLflow's stores keep once.
"""

from __future__ import annotations

import json
import logging
import math
import os
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.errors import EnvironmentFault, UserError
from rddm_dist.tracking.journal import complete_bytes, read_from
from rddm_dist.tracking.store import default_uri, ensure_experiment, open_client

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

__all__ = ["MlflowTracker", "default_uri"]

log = logging.getLogger(__name__)

STATE_FILE = "mlflow.json"
POLL_S = 2.0
RETRY_S, MAX_RETRY_S = 1.0, 60.0
MAX_METRICS, MAX_PARAMS = 1000, 100  # MLflow's limits per request
MAX_PARAM, MAX_TAG, MAX_DIGEST = 6000, 5000, 36


@dataclass
class _State:
    """What mlflow.json holds."""

    uri: str
    run_id: str
    offset: int = 0
    last_steps: dict[str, int] = field(default_factory=dict)
    artifacts: list[list[str]] = field(default_factory=list)


@dataclass(frozen=True)
class _Opening:
    """What a new MLflow run begins with."""

    params: Mapping[str, Any]
    tags: Mapping[str, str]
    dataset: tuple[str, str] | None


class MlflowTracker:
    """Forwards the journal of one run to one MLflow run. Lives on rank 0, from start() to close()."""

    def __init__(self, run_dir: str | Path, *, uri: str, experiment: str, run_name: str) -> None:
        self._state_path = Path(run_dir) / STATE_FILE
        self._uri, self._experiment, self._run_name = uri, experiment, run_name
        self._client: MlflowClient | None = None
        self._lock = threading.Lock()  # guards the state
        self._wake, self._closing, self._abandoned = threading.Event(), threading.Event(), threading.Event()
        self._final_status = "FINISHED"
        self._is_complete = False
        self._is_reopened = False
        self._is_told = False

    def start(
        self,
        *,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        journal: Path,
        dataset: tuple[str, str] | None = None,
    ) -> str:
        """Create the MLflow run, or continue the one in mlflow.json, and begin to forward `journal`.   -> its id

        params and tags: plain values; dataset: (uri, fingerprint) of the training data.
        Raises EnvironmentFault for a new run whose store cannot be reached. A continued run only warns, and catches up
        when the store is back. Another uri than before makes a new run there and sends it the whole journal.
        """
        self._journal, self._opening = Path(journal), _Opening(flatten(params), tags, dataset)
        state = self._load_state()
        if state is None or state.uri != self._uri:
            try:
                self._client = open_client(self._uri)
                state = _State(self._uri, self._create_run(self._client))
            except UserError:
                raise
            except Exception as error:
                raise EnvironmentFault(
                    f"tracking.uri={self._uri} cannot be reached ({_first_line(error)}); start the server, change "
                    "tracking.uri, or train with tracking.backend=none"
                ) from error
            self._is_reopened = True
        self._state = state
        self._save_state()
        self._thread = threading.Thread(target=self._forward, name="mlflow-forwarder", daemon=True)
        self._thread.start()
        return state.run_id

    @property
    def run_id(self) -> str:
        return self._state.run_id

    def log_artifact(self, path: str | Path, folder: str) -> None:
        """Send a file to the run's artifacts, soon."""
        with self._lock:
            self._state.artifacts.append([str(Path(path).resolve()), folder])
            self._save_state()
        self._wake.set()

    def close(self, status: str = "FINISHED", *, deadline_s: float = 30.0) -> bool:
        """Send what is left and end the MLflow run as FINISHED, KILLED or FAILED.   -> whether all of it went

        Gives up after `deadline_s`; what is left then stays in the journal, and the next start sends it.
        """
        self._final_status = status
        self._closing.set()
        self._wake.set()
        self._thread.join(deadline_s)
        self._abandoned.set()
        self._wake.set()
        if not self._is_complete:
            log.warning(
                "MLflow at %s did not take everything in time; metrics are safe in %s, the same command sends the rest",
                self._uri,
                self._journal,
            )
        return self._is_complete

    def _forward(self) -> None:
        """The thread: send what is new, sleep, again; after a failure wait longer and longer."""
        failures = 0
        while not self._abandoned.is_set():
            is_last_round = self._closing.is_set()
            try:
                client = self._reopened_client()
                while self._send_points(client) or self._send_artifact(client):
                    if self._abandoned.is_set():
                        return
                if failures:
                    log.info("MLflow at %s is back; everything has been forwarded", self._uri)
                failures = 0
                if is_last_round:
                    client.set_terminated(self._state.run_id, status=self._final_status)
                    self._is_complete = True
                    return
            except Exception as error:  # whatever MLflow, a driver or the network raises, training goes on
                if not failures:
                    log.warning("MLflow at %s failed, trying again (%s)", self._uri, _first_line(error))
                log.debug("forwarding to MLflow failed", exc_info=True)
                failures += 1
            if is_last_round or not self._closing.is_set():
                longest = RETRY_S if is_last_round else MAX_RETRY_S
                self._wake.wait(min(longest, RETRY_S * 2 ** (failures - 1)) if failures else POLL_S)
                self._wake.clear()

    def _reopened_client(self) -> MlflowClient:
        """The client; of a continued run also sets the MLflow run running again, or makes a new one if it is gone."""
        from mlflow import MlflowException

        if self._client is None:
            self._client = open_client(self._uri)
        if not self._is_reopened:
            try:
                self._client.update_run(self._state.run_id, status="RUNNING")
                self._log_tags(self._client, self._state.run_id)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                log.warning("MLflow run %s is gone from %s; starting a new one", self._state.run_id, self._uri)
                run_id = self._create_run(self._client)
                with self._lock:
                    self._state = _State(self._uri, run_id, artifacts=self._state.artifacts)
                    self._save_state()
            self._is_reopened = True
        return self._client

    def _create_run(self, client: MlflowClient) -> str:
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param

        experiment_id = ensure_experiment(client, uri=self._uri, name=self._experiment)
        run_id = str(client.create_run(experiment_id, run_name=self._run_name).info.run_id)
        params = [Param(key, str(value)[:MAX_PARAM]) for key, value in self._opening.params.items()]
        for first in range(0, len(params), MAX_PARAMS):
            client.log_batch(run_id, params=params[first : first + MAX_PARAMS])
        self._log_tags(client, run_id)
        if self._opening.dataset is not None:
            uri, fingerprint = self._opening.dataset
            source = json.dumps({"uri": uri, "fingerprint": fingerprint})
            dataset = Dataset("train", fingerprint[:MAX_DIGEST], source_type="rddm", source=source)
            client.log_inputs(run_id, datasets=[DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])
        return run_id

    def _log_tags(self, client: MlflowClient, run_id: str) -> None:
        from mlflow.entities import RunTag

        tags = [RunTag(key, str(value)[:MAX_TAG]) for key, value in self._opening.tags.items()]
        if tags:
            client.log_batch(run_id, tags=tags)

    def _send_points(self, client: MlflowClient) -> bool:
        """Forward journal records worth one request.   -> whether there were any"""
        from mlflow.entities import Metric, RunTag

        if not self._journal.exists():
            return False
        points: list[Metric] = []
        tags: list[RunTag] = []
        last_steps, offset = dict(self._state.last_steps), self._state.offset
        if offset > complete_bytes(self._journal):
            raise RuntimeError(f"{self._journal} is shorter than what was forwarded; it was changed by hand")
        for record, behind in read_from(self._journal, offset):
            metrics = record.get("metrics", {})
            if points and len(points) + len(metrics) > MAX_METRICS:
                break
            for key, value in metrics.items():
                step = int(record["step"])
                if step <= last_steps.get(key, -1):
                    continue
                last_steps[key] = step
                points.append(Metric(key, float(value), int(record["time"] * 1000), step))
                if not math.isfinite(float(value)):
                    # SQL stores clamp inf to the largest float.
                    tags.append(RunTag(f"nonfinite.{key}", f"{value} at step {step}"))
            offset = behind
        if offset == self._state.offset:
            return False
        if points:
            client.log_batch(self._state.run_id, metrics=points, tags=tags)
        with self._lock:
            self._state.offset, self._state.last_steps = offset, last_steps
            self._save_state()
        return True

    def _send_artifact(self, client: MlflowClient) -> bool:
        """Send the oldest waiting artifact.   -> whether there was one"""
        with self._lock:
            if not self._state.artifacts:
                return False
            path, folder = self._state.artifacts[0]
        if Path(path).is_file():
            client.log_artifact(self._state.run_id, path, folder)
        else:
            log.warning("artifact %s is gone and cannot be sent to MLflow", path)
        with self._lock:
            self._state.artifacts.pop(0)
            self._save_state()
        return True

    def _load_state(self) -> _State | None:
        return _State(**json.loads(self._state_path.read_text())) if self._state_path.exists() else None

    def _save_state(self) -> None:
        """What is not written down is sent again by the next start; a full disk does not end the run."""
        temporary = self._state_path.with_name(f".{STATE_FILE}.tmp")
        try:
            self._state_path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(asdict(self._state)))
            os.replace(temporary, self._state_path)
        except OSError as error:
            level = logging.DEBUG if self._is_told else logging.WARNING
            log.log(level, "%s cannot be written: %s", self._state_path, error.strerror or error)
            self._is_told = True


def is_behind(run_dir: Path, journal: Path) -> bool:
    """Whether MLflow still lacks journal records or artifacts of a run that it was told about."""
    path = run_dir / STATE_FILE
    if not path.exists():
        return False
    state = _State(**json.loads(path.read_text()))
    return bool(state.artifacts) or (journal.exists() and state.offset < complete_bytes(journal))


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
