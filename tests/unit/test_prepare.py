"""What is found out about a run before its workers start."""

from __future__ import annotations

import pytest

from data_pipeline.errors import ConfigError
from rddm_dist.config import Config, RunSection, TrackingSection, TrainSection
from rddm_dist.training.prepare import check_tracking, registry_of

AT_A_URL = RunSection(storage="s3://bucket/runs")


def test_only_names_of_a_registry_need_a_tracking_server() -> None:
    assert registry_of(Config(run=AT_A_URL, train=TrainSection(init_from="/models/one.safetensors"))) == ""
    served = TrackingSection(uri="http://mlflow:5000")
    named = TrainSection(init_from="models:/rain@champion")
    assert registry_of(Config(run=AT_A_URL, train=named, tracking=served)) == served.uri
    with pytest.raises(ConfigError, match="run.storage=s3://bucket/runs holds none; set tracking.uri"):
        registry_of(Config(run=AT_A_URL, train=named))
    assert registry_of(Config(train=named)).startswith("sqlite:///")


def test_mlflows_default_store_needs_a_folder() -> None:
    check_tracking(Config())
    check_tracking(Config(run=AT_A_URL, tracking=TrackingSection(backend="none")))
    check_tracking(Config(run=AT_A_URL, tracking=TrackingSection(uri="http://mlflow:5000")))
    with pytest.raises(ConfigError, match="set tracking.uri to a server, or tracking.backend=none"):
        check_tracking(Config(run=AT_A_URL))
