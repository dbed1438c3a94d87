"""Trainer files of the authors: variants, lineages, wrappers, schedules, round trips, and what must be refused."""

from __future__ import annotations

import functools
import itertools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data_pipeline.errors import ConfigError, ModelError
from rddm_dist.diffusion.schedule import Schedule, make_schedule
from rddm_dist.model.net import build_net
from rddm_dist.model.published import BUFFERS, LINEAGES, identify_network, read_published, write_published
from rddm_dist.model.recognition import recognise_schedule

GOLDEN_DIR = Path(__file__).parents[1] / "golden"
KEYS = json.loads((GOLDEN_DIR / "state_dict_keys.json").read_text())
SCHEDULES = np.load(GOLDEN_DIR / "schedules.npz")
FAMILIES = sorted({name.split("/")[0] for name in SCHEDULES.files if name.endswith("/alphas_cumsum")})

SMALL = {"dim": 8, "dim_mults": (1, 2)}
VARIANTS: list[dict[str, Any]] = [
    {"kind": "unet", **SMALL, "num_nets": num_nets, "condition": condition, "self_condition": self_condition}
    for num_nets, condition, self_condition in itertools.product((1, 2), ("none", "input", "input_mask"), (False, True))
] + [
    {"kind": "shared_encoder", **SMALL, "num_nets": 2, "condition": condition, "self_condition": self_condition}
    for condition, self_condition in itertools.product(("none", "input", "input_mask"), (False, True))
]
TWO_NETS = {"kind": "unet", **SMALL, "num_nets": 2, "condition": "input", "self_condition": False}


def make_state(model: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    return dict(_make_state(tuple(model.items()), seed))


@functools.cache
def _make_state(model: tuple[tuple[str, Any], ...], seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return build_net(**dict(model)).state_dict()


def official(**settings: Any) -> Schedule:
    return make_schedule(**{"num_timesteps": 20, "parity": "official", **settings})


def write(path: Path, model: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """Write a file with our weights and give what it holds."""
    given = {"schedule": official(), "step": 7000, **settings}
    write_published(path, make_state(model), model=model, **given)
    return torch.load(path, weights_only=True)


def assert_equal_states(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert list(ours) == list(theirs)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("model", VARIANTS, ids=lambda model: "-".join(str(value) for value in model.values()))
def test_what_is_written_is_read_back_bit_for_bit(tmp_path: Path, model: dict[str, Any]) -> None:
    path = tmp_path / "model-7.pt"
    # Both of them for one U-Net and for two, under every condition; only one has the shared encoder.
    lineage = LINEAGES[model["self_condition"] and model["kind"] == "unet"]
    document = write(path, model, lineage=lineage)
    found = read_published(path, self_condition=model["self_condition"])
    assert found.model == model and (found.step, found.lineage, found.weights) == (7000, lineage, "ema")
    assert_equal_states(found.state, make_state(model))
    first = path.read_bytes()
    write_published(path, found.state, model=found.model, schedule=official(), step=found.step, lineage=lineage)
    assert path.read_bytes() == first
    build_net(**found.model).load_state_dict(found.state)
    # Without the averaged copies, and behind the wrappers of training on several GPUs.
    del document["ema"]
    document["model"] = {
        f"module.{name}".replace(".model.", ".model.module."): tensor for name, tensor in document["model"].items()
    }
    torch.save(document, path)
    again = read_published(path, self_condition=model["self_condition"])
    assert again.model == model and (again.lineage, again.weights) == (lineage, "model")
    assert again.schedule == found.schedule
    assert_equal_states(again.state, found.state)
    assert [p.name for p in tmp_path.iterdir()] == ["model-7.pt"]


def test_a_file_of_two_unets_has_the_authors_layout(tmp_path: Path) -> None:
    with torch.device("meta"):
        names = list(build_net(dim=64, condition="none").state_dict())
    model = {**TWO_NETS, "dim_mults": (1, 2, 4, 8), "condition": "none"}
    document = write(tmp_path / "a", model, lineage="optimizer_per_net", schedule=official(num_timesteps=1000))
    assert list(document) == ["step", "model", "opt0", "opt1", "ema", "scaler"]
    buffers = [[name, list(document["model"][name].shape)] for name in BUFFERS]
    assert buffers == KEYS["ResidualDiffusion buffers (before model.*)"]
    assert list(document["model"]) == [*BUFFERS, *(f"model.{name}" for name in names)]
    assert len(document["model"]) == KEYS["ResidualDiffusion n_tensors"]
    ema = list(document["ema"])
    assert len(ema) == KEYS["EMA(0.0.10) key count"]
    assert [*ema[:4], "...", *ema[-3:]] == KEYS["EMA first/last keys"]
    assert set(ema) - {f"{copy}.{name}" for copy in ("online_model", "ema_model") for name in document["model"]} == set(
        KEYS["EMA non-model keys"]
    )
    assert document["ema"]["initted"].shape == document["ema"]["step"].shape == (1,)


def test_optimizers_of_a_written_file_load_into_those_of_its_lineage(tmp_path: Path) -> None:
    net = build_net(**TWO_NETS)
    document = write(tmp_path / "a", TWO_NETS, alpha_res=0.25)
    adam = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1)), *net.parameters()], lr=1.0)
    adam.load_state_dict(document["opt"])
    assert adam.param_groups[0]["lr"] == 8e-5 and adam.param_groups[0]["betas"] == (0.9, 0.99)
    document = write(tmp_path / "b", TWO_NETS, lineage="optimizer_per_net")
    for i, unet in enumerate(net.children()):
        radam = torch.optim.RAdam(unet.parameters(), lr=1.0)
        radam.load_state_dict(document[f"opt{i}"])
        assert radam.param_groups[0]["lr"] == 2e-4


def test_averaged_weights_are_preferred_and_the_last_ones_can_be_had(tmp_path: Path) -> None:
    path = tmp_path / "model-1.pt"
    document = write(path, TWO_NETS)
    last = make_state(TWO_NETS, seed=1)
    document["model"].update({f"model.{name}": tensor for name, tensor in last.items()})
    torch.save(document, path)
    assert_equal_states(read_published(path).state, make_state(TWO_NETS))
    found = read_published(path, weights="model")
    assert found.weights == "model"
    assert_equal_states(found.state, last)
    del document["ema"]
    torch.save(document, path)
    found = read_published(path)
    assert found.weights == "model"
    assert_equal_states(found.state, last)
    with pytest.raises(ConfigError, match="weights=best is not known; choose one of ema, model"):
        read_published(path, weights="best")


def test_wrappers_missing_copies_and_missing_buffers_are_tolerated(tmp_path: Path) -> None:
    path = tmp_path / "model-1.pt"
    document = write(path, TWO_NETS)
    expected = make_state(TWO_NETS)
    module = document["model"]
    averaged = {f"ema_model.{name}": tensor for name, tensor in module.items()}
    wrapped = {name.replace("model.unet", "model.module.unet"): tensor for name, tensor in module.items()}
    variants = [
        {"ema": averaged},
        {"ema": {f"module.{name}": tensor for name, tensor in averaged.items()}},
        {"ema": {f"ema_model.module.{name}": tensor for name, tensor in module.items()}},
        {"ema": {}, "model": {f"module.{name}": tensor for name, tensor in module.items()}},
        {"ema": {}, "model": wrapped},
        {"ema": {}, "model": {name: tensor for name, tensor in module.items() if name.startswith("model.")}},
    ]
    for changes in variants:
        torch.save({**document, **changes}, path)
        found = read_published(path)
        assert_equal_states(found.state, expected)
        assert (found.schedule is None) == ("alphas" not in str(list(changes.get("model", module))[:3]))
        assert (found.tables is None) == (found.schedule is None)
        assert (found.weights == "ema") == bool(changes["ema"])


def test_the_searched_objective_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "model-1.pt"
    model = {**TWO_NETS, "num_nets": 1}
    for lineage in LINEAGES:
        document = write(path, model, alpha_res=0.75, lineage=lineage)
        assert next(iter(document["model"])) == "alpha_res" and read_published(path).alpha_res == 0.75
    write(path, model)
    assert read_published(path).alpha_res is None


def test_channels_that_can_be_read_in_two_ways_are_told_apart_by_the_argument() -> None:
    readings = {
        (3, None): ("none", False), (3, False): ("none", False), (6, None): ("input", False), (6, True): ("none", True),
        (9, None): ("input_mask", False), (9, True): ("input", True), (12, None): ("input_mask", True),
        (12, True): ("input_mask", True),
    }  # fmt: skip
    for (channels, self_condition), (condition, is_self_conditioned) in readings.items():
        state = make_state({**TWO_NETS, "condition": condition, "self_condition": is_self_conditioned})
        assert state["unet0.init_conv.weight"].shape[1] == channels
        found = identify_network(state, self_condition=self_condition)
        assert (found["condition"], found["self_condition"]) == (condition, is_self_conditioned)
    for condition, is_self_conditioned, asked in (("none", False, True), ("input_mask", True, False)):
        state = make_state({**TWO_NETS, "condition": condition, "self_condition": is_self_conditioned})
        with pytest.raises(ModelError, match=f"does not fit self_condition={asked}"):
            identify_network(state, self_condition=asked)


def by_hand(layout: str) -> dict[str, Tensor]:
    """A network's weights under the published keys, in the published order, at an eighth of the published width.

    Only the heads of attention have a fixed width. Every number of the file is another one.
    """
    state, count = {}, 0
    for name, shape in KEYS[layout]["state_dict"]:
        heads = 0 if "to_qkv" in name else 1 if "to_out" in name and name.endswith("weight") else None
        small = [size // 8 if size >= 64 and axis != heads else size for axis, size in enumerate(shape)]
        length = int(np.prod(small))
        state[name] = (torch.arange(count, count + length).float() / 1e6).reshape(small)
        count += length
    return state


def buffers_by_hand(num_timesteps: int = 1000, sum_scale: float = 0.5) -> dict[str, Tensor]:
    """The 12 tables of decreasing alpha and increasing beta^2 of the linear family, written out from closed forms."""
    t, last = np.arange(num_timesteps, dtype=np.float64), num_timesteps
    total = last * (last + 1)
    alpha, beta2 = 2 * (last - t) / total, sum_scale * 2 * (t + 1) / total
    alphas, betas2 = (t + 1) * (2 * last - t) / total, sum_scale * (t + 1) * (t + 2) / total
    alphas_before, betas2_before = alphas - alpha, betas2 - beta2
    rest = 1 - alphas
    rest[-1] = 1e-6
    first = t == 0
    variance = np.where(first, 0, beta2 * betas2_before / betas2)
    tables = {
        "alphas": alpha,
        "alphas_cumsum": alphas,
        "one_minus_alphas_cumsum": rest,
        "betas2": beta2,
        "betas": beta2**0.5,
        "betas2_cumsum": betas2,
        "betas_cumsum": betas2**0.5,
        "posterior_mean_coef1": np.where(first, 0, betas2_before / betas2),
        "posterior_mean_coef2": np.where(first, 0, (beta2 * alphas_before - betas2_before * alpha) / betas2),
        "posterior_mean_coef3": np.where(first, 1, beta2 / betas2),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
    }
    assert list(tables) == [name for name, _ in KEYS["ResidualDiffusion buffers (before model.*)"]]
    return {name: torch.from_numpy(table).float() for name, table in tables.items()}


@pytest.mark.parametrize("layout", ["unet0", "two", "shared"])
def test_files_written_by_hand_from_the_published_keys_are_read_and_written_alike(tmp_path: Path, layout: str) -> None:
    """Independent of the writer, in which the reader's mistakes could be mirrored."""
    if layout == "shared":
        network = by_hand("UnetRes(share_encoder=1,cond)")
    else:
        unet = by_hand("Unet(uncond)")
        network = {f"unet0.{name}": tensor for name, tensor in unet.items()}
        network |= {f"unet1.{name}": -tensor for name, tensor in unet.items()} if layout == "two" else {}
    module = {**buffers_by_hand(), **{f"model.{name}": tensor for name, tensor in network.items()}}
    ema = {"initted": torch.ones(1), "step": torch.tensor([1000])}
    ema |= {f"{copy}.{name}": tensor for copy in ("online_model", "ema_model") for name, tensor in module.items()}
    path = tmp_path / "model-1.pt"
    torch.save({"step": 1000, "model": module, "opt": {}, "ema": ema, "scaler": None}, path)
    found = read_published(path)
    assert_equal_states(found.state, network)
    assert found.model == {
        "kind": "shared_encoder" if layout == "shared" else "unet",
        "dim": 8,
        "dim_mults": (1, 2, 4, 8),
        "num_nets": 1 if layout == "unet0" else 2,
        "condition": "input" if layout == "shared" else "none",
        "self_condition": False,
    }
    assert found.schedule == {
        "num_timesteps": 1000, "parity": "official", "kind": "linear", "alpha": "decreased", "beta2": "increased",
        "sum_scale": 0.5,
    }  # fmt: skip
    write_published(
        tmp_path / "again", found.state, model=found.model, schedule=make_schedule(**found.schedule), step=found.step
    )
    again = torch.load(tmp_path / "again", weights_only=True)
    assert list(again["model"]) == list(module) and list(again["ema"]) == list(ema)
    for name, tensor in module.items():
        torch.testing.assert_close(again["model"][name], tensor, rtol=1e-6, atol=1e-9, msg=name)


def test_equal_weights_give_equal_bytes_under_any_name(tmp_path: Path) -> None:
    for name in ("one.pt", "other.pt"):
        write(tmp_path / name, {**TWO_NETS, "num_nets": 1, "dim_mults": (1,)})
    assert (tmp_path / "one.pt").read_bytes() == (tmp_path / "other.pt").read_bytes()


@pytest.mark.parametrize("dim", [32, 192])
@pytest.mark.parametrize("mults", [(1,), (1, 2, 4, 8), (2, 3)])
def test_width_and_levels_are_found_from_the_shapes(dim: int, mults: tuple[int, ...]) -> None:
    for kind in ("unet", "shared_encoder"):
        with torch.device("meta"):
            state = build_net(kind=kind, dim=dim, dim_mults=mults).state_dict()
        found = identify_network(state)
        assert (found["kind"], found["dim"], found["dim_mults"]) == (kind, dim, mults)


@pytest.mark.parametrize("family", FAMILIES)
def test_published_schedules_are_recognised_from_their_buffers(family: str) -> None:
    table = {name: torch.from_numpy(SCHEDULES[f"{family}/{name}"]) for name in BUFFERS}
    found = recognise(table)
    assert found is not None and found["parity"] == "official" and found["num_timesteps"] == len(table["alphas"])
    expected = {"ddimconv": "ddim", "power": "power", "exp6": "power", "linear": "linear"}[family.split("_")[0]]
    assert found["kind"] == expected and found["sum_scale"] == (0.01 if family.endswith("_s0.01") else 1.0)
    schedule = make_schedule(**found)
    for name in ("alphas_cumsum", "betas2_cumsum", "betas_cumsum"):
        ours = getattr(schedule, BUFFERS[name])[1:]
        torch.testing.assert_close(ours, table[name], rtol=0, atol=2e-6)


def recognise(table: dict[str, Tensor]) -> dict[str, Any] | None:
    return recognise_schedule(
        alpha=table["alphas"],
        alpha_cumsum=table["alphas_cumsum"],
        beta2=table["betas2"],
        beta2_cumsum=table["betas2_cumsum"],
        one_minus_alpha_cumsum=table["one_minus_alphas_cumsum"],
    )


@pytest.mark.parametrize("parity", ["official", "clean"])
@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "linear", "alpha": "average", "beta2": "decreased", "sum_scale": 0.3},
        {"kind": "power", "alpha": "decreased", "alpha_power": 0.3, "beta2": "increased", "beta2_power": 2.5},
        {"kind": "power", "alpha": "normal", "beta2": "average", "sum_scale": 0.01},
        {"kind": "ddim", "betas": "linear"},
        {"kind": "ddim", "betas": "scaled_linear"},
        {"kind": "ddim", "betas": "squaredcos"},
        {"alpha_kind": "linear", "alpha": "decreased", "beta2_kind": "power", "beta2": "increased", "beta2_power": 3.0},
        {"alpha_kind": "ddim", "betas": "squaredcos", "beta2_kind": "linear", "beta2": "increased"},
    ],
)
@pytest.mark.parametrize("num_timesteps", [50, 1000])
def test_every_schedule_is_written_and_recognised(
    tmp_path: Path, parity: str, settings: dict[str, Any], num_timesteps: int
) -> None:
    schedule = make_schedule(**settings, num_timesteps=num_timesteps, parity=parity)
    model = {**TWO_NETS, "num_nets": 1, "dim_mults": (1,)}
    write(tmp_path / "a", model, schedule=schedule)
    found = read_published(tmp_path / "a").schedule
    assert found is not None and found["parity"] == parity
    if settings.get("kind") == "power":
        assert {name: found[name] for name in settings} == settings
    again = make_schedule(**found)
    for name in ("alpha_cumsum", "beta2_cumsum", "one_minus_alpha_cumsum"):
        torch.testing.assert_close(getattr(again, name), getattr(schedule, name), rtol=0, atol=3e-6)


def test_a_schedule_of_nobody_is_not_recognised() -> None:
    schedule = official()
    table = {name: getattr(schedule, ours)[1:] if ours else schedule.beta2[1:].sqrt() for name, ours in BUFFERS.items()}
    assert recognise(table) is not None
    assert recognise({**table, "alphas_cumsum": table["alphas_cumsum"] ** 1.01}) is None
    assert recognise({**table, "betas2_cumsum": table["betas2_cumsum"] * float("nan")}) is None
    assert recognise({**table, "betas2_cumsum": table["betas2_cumsum"][:-1]}) is None
    assert recognise({name: tensor[:0] for name, tensor in table.items()}) is None
    assert recognise({name: tensor.sum() for name, tensor in table.items()}) is None


class Harmful:
    """Unpickled, it would make a folder."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self._path,)


def assert_refused(path: Path, match: str) -> None:
    with pytest.raises(ModelError, match=match) as error:
        read_published(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_a_file_that_would_run_code_is_refused_and_runs_none(tmp_path: Path) -> None:
    path, trace = tmp_path / "model-1.pt", tmp_path / "trace"
    document = write(path, TWO_NETS)
    torch.save({**document, "scaler": Harmful(trace)}, path)
    assert_refused(path, "holds more than plain data, and code in it is not run")
    torch.save({**document, "scaler": Harmful(trace)}, path, _use_new_zipfile_serialization=False)
    assert_refused(path, "holds more than plain data, and code in it is not run")
    assert not trace.exists()


def test_damaged_files_and_placeholders_are_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "model-100.pt"
    assert_refused(path, "does not exist")
    assert_refused(tmp_path, "is a folder; give the trainer's file")
    path.write_text("\n")
    assert_refused(path, "has 1 bytes: it is a placeholder")
    write(path, {**TWO_NETS, "num_nets": 1, "dim_mults": (1,)})
    whole = path.read_bytes()
    for damaged in (whole[:-100], whole[: len(whole) // 2], whole[1000:], b"\0" * 1000, b"text " * 100):
        path.write_bytes(damaged)
        assert_refused(path, "no trainer file, or it is damaged")


def test_files_of_other_kinds_are_refused_with_what_they_hold(tmp_path: Path) -> None:
    path = tmp_path / "model-1.pt"
    document = write(path, TWO_NETS)
    module = document["model"]
    others: list[tuple[Any, str]] = [
        (torch.zeros(200), "holds Tensor; a trainer file has step, model"),
        (make_state(TWO_NETS), "holds unet0.init_conv.weight, .* and .* more; a trainer file has step"),
        ({**document, "step": "7"}, "a trainer file has step"),
        ({**document, "model": {"a": 1}}, "model is not a state dict of tensors"),
        ({**document, "model": {"a": torch.eye(3).to_sparse()}}, "model is not a state dict of tensors"),
        ({**document, "ema": {}, "model": {**module, "alpha_res": torch.zeros(2)}}, "alpha_res must be one number"),
        (
            {**document, "ema": {}, "model": {**module, "alpha_res": torch.tensor(float("nan"))}},
            r"alpha_res must be one number, it is \[nan\]",
        ),
        ({**document, "ema": torch.zeros(2)}, "ema is not a state dict of tensors"),
        ({**document, "ema": {}, "model": {**module, "alphas": torch.zeros(3)}}, "tables of its schedule differ in"),
        ({**document, "ema": {}, "model": {**module, "alphas": torch.zeros(())}}, "are not rows of numbers"),
        (
            {**document, "ema": {}, "model": {**module, "betas_of_others": torch.zeros(3)}},
            "holds betas_of_others besides",
        ),
        ({**document, "ema": {}, "model": {}}, "no network without the convolution unet0.init_conv.weight"),
    ]
    for content, match in others:
        torch.save(content, path)
        assert_refused(path, match)


def test_keys_and_shapes_of_no_variant_are_refused_naming_what_is_missing() -> None:
    state = make_state(TWO_NETS)

    def refused(changed: dict[str, Tensor], match: str) -> None:
        with pytest.raises(ModelError, match=match) as error:
            identify_network(changed)
        assert "\n" not in str(error.value)

    refused(
        {name: t for name, t in state.items() if name != "unet1.mid_attn.fn.norm.g"}, "missing unet1.mid_attn.fn.norm.g"
    )
    refused({**state, "unet0.extra": torch.zeros(1)}, "unknown unet0.extra")
    refused({**state, "unet1.final_conv.bias": torch.zeros(4)}, "of another shape unet1.final_conv.bias")
    refused(
        {**state, "unet0.init_conv.weight": torch.zeros(12, 6, 7, 7)}, "model.dim=12 must be a positive multiple of 8"
    )
    refused({**state, "unet0.init_conv.weight": torch.zeros(8, 5, 7, 7)}, "no network has 5 channels in and 3 out")
    refused(
        {**state, "unet0.init_conv.weight": torch.zeros(8)}, "no network without the convolution unet0.init_conv.weight"
    )
    refused({name: t for name, t in state.items() if ".downs." not in name}, "model.dim_mults")
    refused({}, "found were nothing")
    refused(
        {name.replace("unet", "net"): t for name, t in state.items()},
        "no network without the convolution unet0.init_conv.weight",
    )


def test_what_no_lineage_holds_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lineage=exp9 is not known; choose one of one_optimizer, optimizer_per_net"):
        write(tmp_path / "a", TWO_NETS, lineage="exp9")
    with pytest.raises(ConfigError, match="has no shared_encoder network"):
        write(tmp_path / "a", {**TWO_NETS, "kind": "shared_encoder"}, lineage="optimizer_per_net")
    state = make_state(TWO_NETS)
    state.popitem()
    with pytest.raises(
        ModelError, match="the weights: no network has these keys and shapes: missing unet1.final_conv.bias"
    ):
        write_published(tmp_path / "a", state, model=TWO_NETS, schedule=official(), step=1)
    assert list(tmp_path.iterdir()) == []


def test_no_damage_of_a_few_bytes_ends_in_anything_but_one_line(tmp_path: Path) -> None:
    """Whatever a damaged file still says: a model of the same keys, or a ModelError."""
    path = tmp_path / "model-1.pt"
    write(path, {**TWO_NETS, "num_nets": 1, "dim_mults": (1,)})
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    pickled = path.read_bytes().index(b"step")
    outcomes = {"read": 0, "refused": 0}
    for seed in range(24):
        draw = np.random.default_rng(seed)
        changed = whole.copy()
        end = pickled + 4000 if seed % 2 else len(whole)
        changed[draw.integers(0, end, 5)] = draw.integers(0, 256, 5)
        path.write_bytes(changed.tobytes())
        try:
            read_published(path)
            outcomes["read"] += 1
        except ModelError as error:
            assert "\n" not in str(error)
            outcomes["refused"] += 1
    assert outcomes["refused"] > 0
