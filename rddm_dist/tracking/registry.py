"""Registered models: a version per set of weights, and the alias `champion` on the best one measured."""

from __future__ import annotations

import importlib.metadata
import logging
import math
import re
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.errors import ConfigError, EnvironmentFault, ModelError
from rddm_dist.model.weights import load_safetensors
from rddm_dist.tracking.store import SQLITE, ensure_experiment, open_client, sqlite_path

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.models import ModelSignature

log = logging.getLogger(__name__)

CHAMPION = "champion"
EXPERIMENT = "rddm"  # of versions that belong to no run
SCORE_TAG = "rddm.score."
# Two scores are comparable when these agree.
COMPARED = ("protocol", "size", "data_fingerprint", "images")
REQUIREMENTS = ("rddm-dist", "torch", "numpy", "safetensors", "pydantic", "PyYAML", "mlflow")
MODEL_URI = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>[0-9]+))")


@dataclass(frozen=True)
class Registration:
    """What became of a model: its version, whether the alias moved to it, why or why not, and its models:/ URI."""

    version: str
    alias_moved: bool
    reason: str
    model_uri: str


def register(
    model_path: str | Path,
    *,
    uri: str,
    name: str,
    digests: Mapping[str, str],
    score: Mapping[str, Any] | None = None,
    margin_db: float = 0.0,
    run_id: str | None = None,
) -> Registration:
    """Make a .safetensors export a version of the registered model `name`; weights that are one already are left alone.

    digests: weights (needed), data, config, code; score: psnr, protocol, data_fingerprint, images and whatever else is
    to be recorded. The alias `champion` goes to the first version, and then to one whose PSNR, under the same protocol
    on the same data, beats the champion's by `margin_db` and by more than nothing.
    """
    if not re.fullmatch(r"[A-Za-z0-9_. -]+", name):
        raise ConfigError(f"model name {name!r} may hold letters, digits, '_', '.', '-' and blanks only")
    _, config, _ = load_safetensors(model_path)
    client = open_client(uri)
    from mlflow import MlflowException

    try:
        known = _find_version(client, name, digests)
        if known is None:
            tags = {f"rddm.{key}_digest": value for key, value in digests.items()}
            tags |= {f"{SCORE_TAG}{key}": str(value) for key, value in (score or {}).items()}
            made = _create_version(client, Path(model_path), config, uri=uri, name=name, tags=tags, run_id=run_id)
            moves, reason = _compare(_champion(client, name), score, margin_db)
        else:
            made = known
            moves = _champion(client, name) is None
            reason = f"these weights are version {known.version} already" + (", now champion" if moves else "")
        if moves:
            client.set_registered_model_alias(name, CHAMPION, made.version)
    except (MlflowException, OSError) as error:
        raise EnvironmentFault(f"registering {name} at {uri} failed: {str(error).splitlines()[0]}") from error
    return Registration(str(made.version), moves, reason, f"models:/{name}/{made.version}")


def resolve(model_uri: str, *, uri: str) -> Path:
    """The local .safetensors file of models:/NAME@ALIAS or models:/NAME/VERSION; fetched if the store is remote."""
    match = MODEL_URI.fullmatch(model_uri)
    if match is None:
        raise ModelError(f"model {model_uri} must look like models:/name@alias or models:/name/3")
    if uri.startswith(SQLITE) and not sqlite_path(uri).exists():
        raise ModelError(f"{model_uri} does not exist: there is no registry at {uri}; name it with --tracking-uri")
    client = open_client(uri)
    import mlflow

    name, alias = match["name"], match["alias"]
    try:
        version = client.get_model_version_by_alias(name, alias).version if alias else match["version"]
        location = client.get_model_version_download_uri(name, str(version))
        folder = Path(mlflow.artifacts.download_artifacts(artifact_uri=location, tracking_uri=uri))
    except mlflow.MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise EnvironmentFault(f"{uri} cannot be asked for {model_uri}: {str(error).splitlines()[0]}") from error
        raise ModelError(_not_found(client, model_uri, name, uri)) from error
    except OSError as error:
        raise ModelError(f"{model_uri} is registered at {uri}, but its files cannot be read: {error}") from error
    files = sorted(folder.glob("artifacts/*.safetensors"))
    if not files:
        raise ModelError(f"{model_uri} at {uri} holds no .safetensors weights: it was not registered by rddm")
    return files[0]


def _not_found(client: MlflowClient, model_uri: str, name: str, uri: str) -> str:
    models = {model.name: model for model in client.search_registered_models()}
    if name not in models:
        return f"{model_uri} does not exist at {uri}; registered there: {', '.join(sorted(models)) or 'nothing'}"
    known = [f"models:/{name}/{version.version}" for version in client.search_model_versions(f"name='{name}'")]
    known += [f"models:/{name}@{alias}" for alias in sorted(models[name].aliases)]
    return f"{model_uri} does not exist at {uri}; known: {', '.join(known) or 'no version'}"


def _find_version(client: MlflowClient, name: str, digests: Mapping[str, str]) -> ModelVersion | None:
    """The version of these weights under this configuration: the same weights may be read in another way."""
    wanted = {f"rddm.{key}_digest": digests[key] for key in ("weights", "config") if key in digests}
    for version in client.search_model_versions(f"name='{name}'"):
        if all(version.tags.get(tag) == digest for tag, digest in wanted.items()):
            return version
    return None


def _champion(client: MlflowClient, name: str) -> ModelVersion | None:
    """The version with the alias, or None."""
    version = client.get_registered_model(name).aliases.get(CHAMPION)
    return None if version is None else client.get_model_version(name, str(version))


def _compare(champion: ModelVersion | None, score: Mapping[str, Any] | None, margin_db: float) -> tuple[bool, str]:
    """Whether a new version with this score replaces the champion, and why."""
    if champion is None:
        return True, "there was no champion"
    psnr, best = _decibels((score or {}).get("psnr")), _decibels(champion.tags.get(f"{SCORE_TAG}psnr"))
    if score is None or psnr is None or best is None:
        whose = "its" if best is None else "this model's"
        return False, f"cannot be compared with the champion, version {champion.version}: {whose} PSNR is not known"
    different = [key for key in COMPARED if str(score.get(key)) != str(champion.tags.get(f"{SCORE_TAG}{key}"))]
    if different:
        return False, f"not comparable with the champion, version {champion.version}: another {', '.join(different)}"
    gain = psnr - best
    words = f"{gain:+.3f} dB against the champion, version {champion.version} (margin {margin_db:g} dB)"
    return (gain > 0 and gain >= margin_db), words


def _decibels(value: Any) -> float | None:
    """A recorded mean PSNR; None where there is none (no score, or no finite value to take the mean of)."""
    if value is None or value == "None":
        return None
    number = float(value)
    return number if math.isfinite(number) else None


def _create_version(
    client: MlflowClient,
    model_path: Path,
    config: Mapping[str, Any],
    *,
    uri: str,
    name: str,
    tags: dict[str, str],
    run_id: str | None,
) -> ModelVersion:
    """Upload the weights with the code that runs them as a logged model, and make a version of it."""
    from mlflow import MlflowException
    from mlflow.models import Model

    if run_id:
        experiment = client.get_run(run_id).info.experiment_id
    else:
        experiment = ensure_experiment(client, uri=uri, name=EXPERIMENT)
    logged = client.create_logged_model(experiment, name=name, source_run_id=run_id, model_type="pyfunc")
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / "model"
        description = Model(model_uuid=logged.model_id, run_id=run_id, model_id=logged.model_id)
        _write_pyfunc(local, model_path, config, description)
        client.log_model_artifacts(logged.model_id, str(local))
    client.finalize_logged_model(logged.model_id, "READY")
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    # Of a logged model without a run MLflow would ask the store that is the default where the process stands.
    model_id = logged.model_id if run_id else None
    return client.create_model_version(
        name, source=logged.artifact_location, run_id=run_id, tags=tags, model_id=model_id
    )


def _write_pyfunc(folder: Path, model_path: Path, config: Mapping[str, Any], description: Any) -> None:
    """The model folder: MLmodel, pyfunc.py as source, the weights as an artifact, the packages it needs."""
    import mlflow.pyfunc

    with warnings.catch_warnings():
        # MLflow would like an example to derive the signature from; ours is written out.
        warnings.filterwarnings("ignore", ".*input example", UserWarning)
        mlflow.pyfunc.save_model(
            path=str(folder),
            python_model=str(Path(__file__).with_name("pyfunc.py")),
            artifacts={"weights": str(model_path)},
            signature=pyfunc_signature(config),
            pip_requirements=_requirements(),
            mlflow_model=description,
        )


def pyfunc_signature(config: Mapping[str, Any]) -> ModelSignature:
    """What the registered model takes: images; images and masks by name where it sees masks; numbers where it
    generates."""
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import ParamSchema, ParamSpec, Schema, TensorSpec

    pixels = np.dtype("uint8")
    images = Schema([TensorSpec(pixels, (-1, -1, -1, 3))])
    inputs, generates = images, bool(config.get("diffusion", {}).get("generate"))
    if generates:
        inputs = Schema([TensorSpec(np.dtype("int64"), (-1,))])
    elif config.get("model", {}).get("condition") == "input_mask":
        inputs = Schema([TensorSpec(pixels, (-1, -1, -1, 3), "images"), TensorSpec(pixels, (-1, -1, -1), "masks")])
    sample = config.get("sample", {})
    params = [
        ParamSpec("steps", "long", int(sample.get("steps", 5))),
        ParamSpec("eta", "double", float(sample.get("eta", 0.0))),
        ParamSpec("seed", "long", 0),
    ]
    if generates:
        params.append(ParamSpec("side", "long", 0))
    return ModelSignature(inputs=inputs, outputs=images, params=ParamSchema(params))


def _requirements() -> list[str]:
    """The installed versions (public part only: torch's +cpu is no version an index has)."""
    pins = []
    for package in REQUIREMENTS:
        try:
            pins.append(f"{package}=={importlib.metadata.version(package).partition('+')[0]}")
        except importlib.metadata.PackageNotFoundError:
            pins.append(package)  # run from a source tree
    return pins
