"""Configuration: what is accepted, what is refused with which line, and which keys may change."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from data_pipeline.errors import ConfigError
from rddm_dist.config import (
    EXECUTION,
    EXTENDABLE,
    IDENTITY,
    LATER_KEYS,
    Config,
    Section,
    differences,
    identity_digest,
    iter_keys,
    load_config,
    to_yaml,
)

ROOT = Path(__file__).resolve().parents[2]
PRESETS = sorted((ROOT / "configs" / "train").glob("*.yaml"))


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_every_preset_loads_and_survives_a_round_trip(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    assert config.run.name == path.stem
    assert load_config(write(tmp_path, to_yaml(config))) == config


def test_every_key_has_a_class_and_a_description() -> None:
    classes = {kind for _, kind, _ in iter_keys(Config())}
    assert classes == {IDENTITY, EXTENDABLE, EXECUTION}
    for section in Config.model_fields.values():
        for name, field in type(section.default).model_fields.items():
            assert isinstance(field.default, Section) or field.description, name


def test_overrides_are_yaml_values(tmp_path: Path) -> None:
    path = write(tmp_path, "train: {steps: 5}")
    config = load_config(
        path, ["train.steps=7", "model.dim_mults=[1, 2]", "diffusion.schedule.kind=power", "optim.lr=1e-4"]
    )
    assert config.train.steps == 7
    assert config.model.dim_mults == (1, 2)
    assert config.diffusion.schedule.kind == "power"
    assert config.optim.lr == 1e-4


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.stepz=3", "unknown key train.stepz; did you mean train.steps?"),
        ("trian.steps=3", "did you mean train"),
        ("train.steps=0", "train.steps=0: input should be greater than or equal to 1"),
        ("train.steps=many", "train.steps='many'"),
        ("model.dim=12", "dim=12 must be a multiple of 8"),
        ("model.num_nets=1", "set model.num_nets=2"),
        ("diffusion.objective=pred_all", "diffusion.objective='pred_all'"),
        ("optim.schedule=cosine", "optim.decay_steps=0 must exceed optim.warmup_steps=0"),
        ("data.lanes=3", "data.lanes=3 does not divide train.global_batch=16"),
        ("diffusion.residual_clip=[1, -1]", "must be increasing"),
        ("sample.steps=2000", "sample.steps=2000 exceeds diffusion.num_timesteps=1000"),
        ("diffusion.objective=auto", "set model.num_nets=1"),
        ("diffusion.generate=true", "asks for one; set model.condition=none"),
        ("sample.schedule.alpha=increased", "set sample.schedule.alpha_kind to linear, power or ddim"),
        ("train=3", "must have the form section.key=value"),
        ("steps", "must have the form section.key=value"),
    ],
)
def test_a_wrong_key_or_value_is_one_line_that_says_what_to_change(tmp_path: Path, override: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, ""), [override])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_or_broken_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(tmp_path / "absent.yaml")
    for text in ("a: [1", "- 1\n- 2"):
        with pytest.raises(ConfigError) as caught:
            load_config(write(tmp_path, text))
        assert "\n" not in str(caught.value)


def test_only_identity_keys_change_the_digest(tmp_path: Path) -> None:
    path = write(tmp_path, "")
    base = load_config(path)
    for override in ("train.steps=7", "engine.zero_stage=3", "data.uri=elsewhere", "train.micro_batch=1"):
        assert identity_digest(load_config(path, [override])) == identity_digest(base)
    for override in ("optim.lr=1e-3", "train.global_batch=8", "train.seed=1", "diffusion.sum_scale=0.01"):
        changed = load_config(path, [override])
        assert identity_digest(changed) != identity_digest(base)
        assert len(differences(base, changed, IDENTITY)) == 1


def test_local_paths_become_absolute_and_urls_stay(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, ""), ["data.uri=here/data", "data.eval_uri=s3://bucket/eval"])
    assert config.data.uri == str(Path("here/data").absolute())
    assert config.data.eval_uri == "s3://bucket/eval"


def test_several_datasets_with_weights_and_a_growing_crop_survive_writing_and_reading(tmp_path: Path) -> None:
    text = "data: {uri: [a, s3://bucket/b], weights: [1, 0.5], crop: {0: 64, 5000: 96}, preprocess: {equalize: true}}"
    config = load_config(write(tmp_path, text))
    assert config.data.uris == (str(Path("a").absolute()), "s3://bucket/b")
    assert config.data.crop_schedule == {0: 64, 5000: 96}
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    again = load_config(tmp_path / "again.yaml")
    assert again == config and identity_digest(again) == identity_digest(config)
    assert Config.model_validate(config.model_dump(mode="json")) == config
    assert load_config(write(tmp_path, ""), ["data.uri=one"]).data.uris == (str(Path("one").absolute()),)
    assert load_config(write(tmp_path, "")).data.uris == ()
    same = [load_config(write(tmp_path, ""), [f"data.{given}"]) for given in ("crop=8", "crop={0: 8}")]
    assert same[0] == same[1]
    same = [load_config(write(tmp_path, ""), [f"data.degrade={given}"]) for given in ("noise", "noise( sigma = 25.0 )")]
    assert same[0] == same[1]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.weights=[1, 2]", "data.weights has 2 values for the 1 dataset(s) of data.uri"),
        ("data.weights=[0]", "data.weights"),
        ("data.crop={10: 64}", "must map first steps to sides in pixels, from step 0 on"),
        ("data.crop=-8", "must map first steps to sides in pixels"),
        ("data.crop=big", "data.crop"),
        ("data.preprocess.resize=-1", "data.preprocess.resize"),
        ("data.bad_sample_budget=2", "data.bad_sample_budget"),
        ("data.read_deadline_s=0", "data.read_deadline_s"),
    ],
)
def test_a_wrong_setting_of_the_data_is_one_line(tmp_path: Path, override: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, "data: {uri: a}"), [override])
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_key_that_came_later_does_not_change_what_earlier_runs_were() -> None:
    for name, value in LATER_KEYS.items():
        assert (name, IDENTITY, value) in list(iter_keys(Config()))
    keys = {name: value for name, kind, value in iter_keys(Config()) if kind == IDENTITY and name not in LATER_KEYS}
    expected = hashlib.sha256(json.dumps(keys, sort_keys=True).encode()).hexdigest()
    assert identity_digest(Config()) == expected
    changed = Config.model_validate({"optim": {"noise_lr": 1e-3}})
    assert identity_digest(changed) != expected
