"""Diffusion settings that cannot be: `rddm train --dry-run` ends with exit code 2 and one line that names the key."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.errors import ConfigError, ModelError
from rddm_dist.cli import main as entry
from rddm_dist.config import Config
from rddm_dist.factory import make_net
from rddm_dist.loading import load_model
from rddm_dist.model.weights import save_safetensors
from rddm_dist.training.prepare import check_settings
from tests.support.datasets import make_dataset
from tests.support.runs import write_config

TWO = ("model.num_nets=2", "diffusion.objective=pred_res_noise")
NOISE = ("diffusion.objective=pred_noise", "diffusion.schedule.kind=ddim")
DDPM = ("diffusion.process=ddpm", "diffusion.schedule.kind=ddim")
POWER = "diffusion.schedule.kind=power"
KEPT = (
    "sample.schedule.alpha_kind=ddim",
    "sample.schedule.betas=squaredcos",
    "sample.schedule.keeps_estimate=true",
)
PATH = "sample.path"
PATHS = "simultaneous, residual_first, noise_first, two_pass"


@pytest.fixture(scope="module")
def config_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound run of one network (pred_res, linear schedule, 20 timesteps) on packed pairs without masks."""
    folder = tmp_path_factory.mktemp("run")
    return write_config(folder, make_dataset(folder, count=2, size=(16, 24)))


Planned = Callable[..., tuple[int | str | None, list[str]]]


@pytest.fixture
def planned(config_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Planned:
    """Plan the run with these overrides in this process.   -> exit code, lines on stderr"""

    def call(*overrides: str) -> tuple[int | str | None, list[str]]:
        monkeypatch.setattr(sys, "argv", ["rddm", "train", str(config_path), "--dry-run", *overrides])
        with pytest.raises(SystemExit) as ended:
            entry.main()
        return ended.value.code, capfd.readouterr().err.splitlines()

    return call


REFUSED: list[tuple[tuple[str, ...], list[str]]] = [
    # Schedules: unknown names, by the key that chose the kind; exponents; the final noise; T.
    (("diffusion.schedule.kind=cosine",), ["diffusion.schedule.kind='cosine'", "'linear', 'power' or 'ddim'"]),
    (("diffusion.schedule.beta2_kind=cosine",), ["diffusion.schedule.beta2_kind='cosine'", "'same'"]),
    (("diffusion.schedule.kind=ddim", "diffusion.schedule.betas=cosine"), ["diffusion.schedule.betas='cosine'"]),
    (("diffusion.schedule.beta2=normal",), ["diffusion.schedule.beta2=normal", "kind=linear", "average"]),
    (
        (POWER, "diffusion.schedule.alpha_kind=linear", "diffusion.schedule.alpha=normal"),
        ["diffusion.schedule.alpha=normal", "diffusion.schedule.alpha_kind=linear", "decreased, increased, average"],
    ),
    (
        (POWER, "diffusion.schedule.beta2_kind=linear", "diffusion.schedule.beta2_power=2"),
        ["diffusion.schedule.beta2_power=2.0", "diffusion.schedule.beta2_kind=linear", "use beta2_kind=power"],
    ),
    ((POWER, "diffusion.schedule.beta2_power=-0.5"), ["diffusion.schedule.beta2_power=-0.5", "equal to 0"]),
    ((POWER, "diffusion.schedule.alpha_power=.nan"), ["diffusion.schedule.alpha_power=nan", "finite"]),
    ((POWER, "diffusion.schedule.alpha_power=.inf"), ["diffusion.schedule.alpha_power=inf", "finite"]),
    (("diffusion.sum_scale=.inf",), ["diffusion.sum_scale=inf", "finite"]),
    (("diffusion.sum_scale=1e+39",), ["diffusion.sum_scale=1e+39", "1e-30..1e+30"]),
    (("diffusion.sum_scale=1.0e-60",), ["diffusion.sum_scale=1e-60", "1e-30..1e+30"]),
    (("diffusion.num_timesteps=0",), ["diffusion.num_timesteps=0"]),
    (("diffusion.num_timesteps=1", "sample.steps=1", POWER), [POWER, "diffusion.num_timesteps", "at least 2"]),
    (("diffusion.parity=exact",), ["diffusion.parity='exact'", "'clean' or 'official'"]),
    (("diffusion.time_input=hours",), ["diffusion.time_input='hours'", "'index' or 'clocks'"]),
    # Objectives and processes.
    (("diffusion.loss=huber",), ["diffusion.loss='huber'", "'l1' or 'l2'"]),
    (("diffusion.process=heat",), ["diffusion.process='heat'", "'rddm' or 'ddpm'"]),
    (("diffusion.objective=pred_v", "diffusion.schedule.kind=ddim"), ["diffusion.objective=pred_v", "process=rddm"]),
    ((*DDPM, "diffusion.sum_scale=0.5"), ["diffusion.process=ddpm", "diffusion.sum_scale=1"]),
    ((*DDPM, "diffusion.parity=official"), ["diffusion.process=ddpm", "diffusion.parity=clean"]),
    ((*DDPM, "diffusion.objective=auto"), ["diffusion.objective=auto", "set diffusion.process=rddm"]),
    (("diffusion.objective=auto", "diffusion.schedule.kind=ddim", "sample.use=noise"), ["sample.use=noise", "auto"]),
    (("diffusion.residual_clip=[.nan, 1]",), ["diffusion.residual_clip", "nan", "finite"]),
    # Noise alone where 1 - alpha_cumsum is 0.
    (("diffusion.objective=pred_noise",), ["diffusion.objective=pred_noise", "timestep 20", "kind=ddim"]),
    ((*TWO, "sample.use=noise"), ["sample.use=noise", "timestep 20", "1 - alpha_cumsum is 0"]),
    (
        (*NOISE, "sample.schedule.alpha_kind=linear"),
        ["diffusion.objective=pred_noise", "1 - alpha_cumsum is 0", "sample.schedule.alpha_kind=same or ddim"],
    ),
    (("diffusion.objective=auto", "diffusion.schedule.kind=power"), ["diffusion.objective=auto", "kind=ddim"]),
    # Networks: their number, what they see.
    (("model.num_nets=2",), ["model.num_nets=2", "diffusion.objective=pred_res", "set model.num_nets=1"]),
    (("diffusion.objective=auto", "model.kind=shared_encoder"), ["model.kind=shared_encoder", "model.kind=unet"]),
    (("model.condition=input_mask",), ["model.condition=input_mask", "pack with --mask"]),
    (("model.condition=text",), ["model.condition='text'", "'none', 'input' or 'input_mask'"]),
    (("diffusion.generate=true", "model.condition=input_mask"), ["model.condition=input_mask", "model.condition=none"]),
    (("model.dim=12",), ["model.dim=12 must be a multiple of 8"]),
    # Samplers.
    (("sample.steps=0",), ["sample.steps=0"]),
    (("sample.eta=.nan",), ["sample.eta=nan", "finite"]),
    (("sample.use=x0",), ["sample.use=x0", "diffusion.objective=pred_res", "all, residual"]),
    (("sample.schedule.alpha_kind=cosine",), ["sample.schedule.alpha_kind='cosine'", "'same'"]),
    (("sample.schedule.beta2_power=2",), ["sample.schedule.beta2_power=2.0", "set sample.schedule.beta2_kind"]),
    (
        ("sample.schedule.alpha_kind=linear", "sample.schedule.alpha_power=2"),
        ["sample.schedule.alpha_power=2.0", "sample.schedule.alpha_kind=linear", "use alpha_kind=power"],
    ),
    (
        ("sample.schedule.beta2_kind=linear", "sample.schedule.beta2=normal"),
        ["sample.schedule.beta2=normal", "sample.schedule.beta2_kind=linear"],
    ),
    (
        ("sample.schedule.betas=squaredcos",),
        ["sample.schedule.betas=squaredcos has no effect", "beta2_kind to ddim"],
    ),
    (
        ("sample.schedule.beta2_kind=power", "sample.schedule.keeps_estimate=true"),
        ["sample.schedule.keeps_estimate=true has no effect", "set sample.schedule.alpha_kind"],
    ),
    (
        (*NOISE, f"{PATH}=noise_first", *KEPT),
        ["sample.schedule.keeps_estimate=true", f"{PATH}=noise_first", f"{PATH}=simultaneous"],
    ),
    # Paths: the name, the form of the vertices, both ends, the order; what does not go with a path.
    ((f"{PATH}=down",), [f"{PATH}=down is not known", PATHS, "vertices"]),
    ((f"{PATH}=3",), [f"{PATH}=3 is not known", PATHS]),
    ((f"{PATH}=[[1, 1], [0.5], [0, 0]]",), [f"{PATH} has the vertex [0.5]", "pairs [alpha_cumsum, beta_cumsum]"]),
    ((f"{PATH}=[[1, 1], [.nan, 0.3], [0, 0]]",), [f"{PATH} has the vertex [nan, 0.3]"]),
    ((f"{PATH}=[[1, 1], [low, 0.3], [0, 0]]",), [f"{PATH} has the vertex ['low', 0.3]"]),
    ((f"{PATH}=['11', [0, 0]]",), [f"{PATH} has the vertex 11"]),
    ((f"{PATH}=[]",), [f"{PATH} needs at least 2 vertices, got 0"]),
    ((f"{PATH}=[[1, 1], [0.5, 0.5]]",), [f"{PATH} ends at (0.5, 0.5)", "(0, 0)"]),
    ((f"{PATH}=[[1, 1], [0.5, 0.5], [0.4, 0.7], [0, 0]]",), [f"{PATH} rises from (0.5, 0.5) to (0.4, 0.7)"]),
    ((*NOISE, f"{PATH}=[[1, 1], [0, 0]]"), [f"{PATH} starts at (1, 1)", "the schedule ends at (0.09"]),
    ((f"{PATH}=noise_first", "sample.update=x0"), ["sample.update=x0", f"{PATH}=noise_first", "pred_noise, eta0"]),
    ((f"{PATH}=two_pass", "sample.update=eta1"), ["sample.update=eta1", f"{PATH}=two_pass", "pred_noise, x0"]),
    ((*DDPM, "diffusion.objective=pred_v", f"{PATH}=noise_first"), ["diffusion.objective=pred_v", f"{PATH}="]),
]


@pytest.mark.parametrize(("overrides", "words"), REFUSED, ids=lambda value: " ".join(value)[:60])
def test_what_cannot_be_is_one_line_that_names_the_key(
    planned: Planned, overrides: tuple[str, ...], words: list[str]
) -> None:
    code, lines = planned(*overrides)
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    assert all(word in lines[0] for word in words), lines[0]
    # A message speaks of keys that exist.
    assert "sample.schedule.kind" not in lines[0] and "literal[" not in lines[0]


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        TWO,
        NOISE,
        (*NOISE, "sample.schedule.alpha_kind=linear", "sample.schedule.keeps_estimate=true"),
        (*NOISE, *KEPT, "sample.path=two_pass"),
        ("sample.path=noise_first", *KEPT),
        ("diffusion.objective=pred_noise", "diffusion.parity=official"),
        ("diffusion.objective=auto", "diffusion.schedule.kind=ddim"),
        (*DDPM, "diffusion.objective=pred_v"),
        ("diffusion.generate=true", "model.condition=none"),
        ("sample.path=[[1, 1e-0], [0.25, 1], [0, 0.5], [0, 0]]",),
        ("sample.path=residual_first", "sample.update=eta0"),
        ("sample.steps=20", "sample.eta=1"),
        (POWER, "diffusion.schedule.alpha_power=0", "diffusion.schedule.beta2_power=300", "diffusion.sum_scale=1e-9"),
    ],
    ids=" ".join,
)
def test_what_lies_just_within_is_planned(planned: Planned, overrides: tuple[str, ...]) -> None:
    """The refusals above are of their one fault: next to each there is something that can be."""
    assert planned(*overrides) == (0, [])


def test_settings_are_checked_before_any_data_is_there() -> None:
    """The same checks guard a plan whose datasets are still to be packed."""
    values: dict[str, Any] = {"model": {"num_nets": 1}, "diffusion": {"objective": "pred_noise"}}
    with pytest.raises(ConfigError, match="diffusion.objective=pred_noise cannot recover the image") as error:
        check_settings(Config.model_validate(values), world_size=1)
    assert "\n" not in str(error.value)


def test_weights_whose_keys_match_no_variant_are_refused(tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "model": {"dim": 8, "dim_mults": [1, 2], "num_nets": 1},
        "diffusion": {"objective": "pred_res", "num_timesteps": 20},
        "sample": {"steps": 2},
    }
    config = Config.model_validate(values)
    state = make_net(config).state_dict()
    path = tmp_path / "model.safetensors"
    for changed, said in (
        ({**state, "unet0.extra": torch.zeros(1)}, "parameter unet0.extra is missing or unknown"),
        ({name: tensor for name, tensor in state.items() if name != "unet0.init_conv.bias"}, "unet0.init_conv.bias"),
        ({f"decoder.{name}": tensor for name, tensor in state.items()}, "parameter decoder.unet0"),
        ({**state, "unet0.init_conv.bias": torch.zeros(9)}, r"unet0.init_conv.bias is \(9,\), not \(8,\)"),
    ):
        save_safetensors(path, changed, config=config.model_dump(mode="json"))
        with pytest.raises(ModelError, match=said) as error:
            load_model(str(path))
        assert str(path) in str(error.value) and "\n" not in str(error.value)
