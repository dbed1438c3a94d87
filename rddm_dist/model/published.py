"""The authors' trainer files: their networks and schedules as ours, and ours in their layout.

A file is a dict saved by torch: `step`; `model`, the state dict of the diffusion module (12 coefficient buffers, then
the network under `model.`, in between `alpha_res` where the objective was searched); `opt`, or `opt0` and `opt1` of the
lineage with one optimizer per network; `ema`, with `ema_model.` and mostly `online_model.` copies of `model`.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.errors import ConfigError, ModelError
from rddm_dist.diffusion.schedule import Schedule
from rddm_dist.model.inputs import CONDITIONS
from rddm_dist.model.net import Network, build_net
from rddm_dist.model.recognition import recognise_schedule

# Their buffers, in order, and our tables without row 0; betas are the roots of betas2.
BUFFERS = {
    "alphas": "alpha",
    "alphas_cumsum": "alpha_cumsum",
    "one_minus_alphas_cumsum": "one_minus_alpha_cumsum",
    "betas2": "beta2",
    "betas": "",
    "betas2_cumsum": "beta2_cumsum",
    "betas_cumsum": "beta_cumsum",
    "posterior_mean_coef1": "posterior_coef1",
    "posterior_mean_coef2": "posterior_coef2",
    "posterior_mean_coef3": "posterior_coef3",
    "posterior_variance": "posterior_variance",
    "posterior_log_variance_clipped": "posterior_log_variance",
}
LINEAGES = ("one_optimizer", "optimizer_per_net")
WEIGHTS = ("ema", "model")

# What torch.load raises for files that are cut short, are something else or hold more than data.
_LOAD_ERRORS = (
    RuntimeError, OSError, EOFError, pickle.UnpicklingError, ValueError, LookupError, TypeError, AttributeError,
    AssertionError, OverflowError, MemoryError, ImportError,
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Published:
    """What a trainer file holds.

    state: weights under our keys, float32; model: arguments of `build_net`; schedule: arguments of `make_schedule`, or
    None where the buffers are absent or fit none; tables: the buffers, (T,) by their names in BUFFERS, or None where
    one is absent; weights: which of the file's copies, "ema" or "model"; alpha_res: the weight of the objective search
    (above 0.5 the residual won) or None; lineage: one of LINEAGES.
    """

    state: dict[str, Tensor]
    model: dict[str, Any]
    schedule: dict[str, Any] | None
    tables: dict[str, Tensor] | None
    step: int
    weights: str
    alpha_res: float | None
    lineage: str


def read_published(path: str | Path, *, self_condition: bool | None = None, weights: str = "ema") -> Published:
    """Read a trainer file of either lineage without running any code in it.

    A first convolution of 6 or 9 channels may see its own estimate or one more image: `self_condition` tells, None
    takes the reading without it where there is one. weights="model" takes the weights of the last step instead of the
    averaged ones. Raises ModelError in one line for all that is not such a file.
    """
    path = Path(path)
    if weights not in WEIGHTS:
        raise ConfigError(f"weights={weights} is not known; choose one of {', '.join(WEIGHTS)}")
    document = _load(path)
    if weights == "ema" and not any("ema_model." in name for name in document.get("ema", {})):
        weights = "model"
    module = document["model"]
    if weights == "ema":
        module = _under("ema_model.", document["ema"])
    module = _stripped(module)
    network = {name: tensor.float() for name, tensor in _under("model.", module).items()}
    known = {*BUFFERS, "alpha_res", *(f"model.{name}" for name in network)}
    unknown = [name for name in module if name not in known]
    if unknown:
        raise ModelError(f"{path} holds {_list(unknown)} besides network and schedule; it is of another method")
    if "alpha_res" in module and (module["alpha_res"].numel() != 1 or not bool(module["alpha_res"].isfinite())):
        raise ModelError(f"{path}: alpha_res must be one number, it is {module['alpha_res'].flatten()[:3].tolist()}")
    settings = identify_network(network, self_condition=self_condition, source=str(path))
    tables = {name: module[name] for name in BUFFERS} if all(name in module for name in BUFFERS) else None
    if tables and any(table.shape != (max(table.numel(), 1),) for table in tables.values()):
        raise ModelError(f"{path}: the tables of its schedule are not rows of numbers; it is damaged")
    if tables and len({len(table) for table in tables.values()}) > 1:
        raise ModelError(f"{path}: the tables of its schedule differ in length; it is damaged")
    return Published(
        state={name: network[name].contiguous() for name in _meta_net(settings).state_dict()},
        model=settings,
        schedule=_recognise(tables) if tables else None,
        tables=tables,
        step=document["step"],
        weights=weights,
        alpha_res=float(module["alpha_res"]) if "alpha_res" in module else None,
        lineage=LINEAGES["opt0" in document],
    )


def identify_network(
    state: Mapping[str, Tensor], *, self_condition: bool | None = None, source: str = "the state dict"
) -> dict[str, Any]:
    """Arguments of `build_net` for the network that has exactly these keys and shapes.

    state: tensors by their keys in the published layout; self_condition: as for `read_published`. Raises ModelError in
    one line for keys that no network has, naming what is missing.
    """
    is_shared = any(name.startswith("ups_no_skip.") for name in state)
    prefix, end = ("", "final_conv_2.weight") if is_shared else ("unet0.", "unet0.final_conv.weight")
    first, last = state.get(f"{prefix}init_conv.weight"), state.get(end)
    if first is None or last is None or first.ndim != 4 or last.ndim != 4:
        absent = f"{prefix}init_conv.weight" if first is None or first.ndim != 4 else end
        raise ModelError(f"{source}: no network without the convolution {absent}; found were {_list(state)}")
    dim, channels = first.shape[:2]
    widths: list[int] = []
    while (shrink := state.get(f"{prefix}downs.{len(widths)}.3.weight")) is not None:
        widths.append(len(shrink) if shrink.ndim else 0)
    mults = [width // max(dim, 1) for width in widths]
    if last.shape[0] != 3 or channels % 3 or not 3 <= channels <= 12:
        raise ModelError(
            f"{source}: no network has {channels} channels in and {last.shape[0]} out; known are 3, 6, 9 or 12 and 3"
        )
    settings = {
        "kind": "shared_encoder" if is_shared else "unet",
        "dim": dim,
        "dim_mults": tuple(mults),
        "num_nets": 1 if not is_shared and not any(name.startswith("unet1.") for name in state) else 2,
        **_images(channels // 3, self_condition, source),
    }
    try:
        expected = _meta_net(settings).state_dict()
    except ConfigError as error:
        raise ModelError(f"{source}: no network has these shapes: {error}") from error
    _check_fit(state, expected, source)
    return settings


def write_published(
    path: str | Path,
    state: Mapping[str, Tensor],
    *,
    model: Mapping[str, Any],
    schedule: Schedule,
    step: int,
    lineage: str = "one_optimizer",
    alpha_res: float | None = None,
) -> None:
    """Write weights as a trainer file of the authors; `read_published` gives them back bit for bit.

    state: our keys, float32; model: arguments of `build_net`. The weights stand as `model` and as both copies of `ema`;
    the optimizers are fresh. The write is atomic, and equal inputs give equal bytes. Raises ConfigError for an unknown
    lineage or one that lacks the network, ModelError for weights that do not fit `model`.
    """
    if lineage not in LINEAGES:
        raise ConfigError(f"lineage={lineage} is not known; choose one of {', '.join(LINEAGES)}")
    if lineage == "optimizer_per_net" and model.get("kind") == "shared_encoder":
        raise ConfigError("lineage=optimizer_per_net has no shared_encoder network; take lineage=one_optimizer")
    net = _meta_net(model)
    expected = net.state_dict()
    _check_fit(state, expected, "the weights")
    module: dict[str, Tensor] = {} if alpha_res is None else {"alpha_res": torch.tensor([alpha_res])}
    for name, table in BUFFERS.items():
        module[name] = (getattr(schedule, table) if table else schedule.beta2.sqrt())[1:].cpu().clone()
    module |= {f"model.{name}": state[name].detach().cpu().float().contiguous() for name in expected}
    ema = {"initted": torch.ones(1), "step": torch.tensor([step])}
    ema |= {f"{copy}.{name}": tensor for copy in ("online_model", "ema_model") for name, tensor in module.items()}
    document = {"step": step, "model": module, **_optimizers(net, lineage, alpha_res), "ema": ema, "scaler": None}
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:  # given a name, torch would write it into the file
            torch.save(document, file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _load(path: Path) -> dict[str, Any]:
    """The file as a dict that has `step`, `model` and, if any, `ema` of the right types."""
    if path.is_dir():
        raise ModelError(f"checkpoint {path} is a folder; give the trainer's file in it, such as {path / 'model-1.pt'}")
    if not path.is_file():
        raise ModelError(f"checkpoint {path} does not exist")
    if path.stat().st_size < 100:
        raise ModelError(f"checkpoint {path} has {path.stat().st_size} bytes: it is a placeholder; get the file itself")
    try:
        document = torch.load(path, map_location="cpu", weights_only=True)
    except _LOAD_ERRORS as error:
        reason = " ".join(str(error).split())[:120]
        unsafe = "Weights only load failed" in reason or isinstance(error, pickle.UnpicklingError)
        told = "it holds more than plain data, and code in it is not run" if unsafe else f"cannot be read ({reason})"
        raise ModelError(f"checkpoint {path}: {told}; it is no trainer file, or it is damaged") from error
    if not isinstance(document, dict) or "model" not in document or not isinstance(document.get("step"), int):
        has = _list(document) if isinstance(document, dict) else type(document).__name__
        raise ModelError(f"checkpoint {path} holds {has}; a trainer file has step, model, opt or opt0, and ema")
    for part in ("model", "ema"):
        tensors = document.get(part, {})
        is_state = isinstance(tensors, dict) and all(map(_is_plain, tensors.values()))
        if not is_state:
            raise ModelError(f"checkpoint {path}: {part} is not a state dict of tensors")
    return document


def _is_plain(value: Any) -> bool:
    """Whether it is an ordinary tensor of real numbers."""
    is_dense = isinstance(value, Tensor) and value.layout == torch.strided
    return is_dense and not (value.is_complex() or value.is_quantized)


def _stripped(module: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the `module.` that wrappers for several GPUs put in front of names, or in front of the network's."""
    plain = {name.removeprefix("module."): tensor for name, tensor in module.items()}
    return {name.replace("model.module.", "model.", 1): tensor for name, tensor in plain.items()}


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix` (after a wrapper's `module.`), without it."""
    plain = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return {name.removeprefix(prefix): tensor for name, tensor in plain.items() if name.startswith(prefix)}


def _images(count: int, self_condition: bool | None, source: str) -> dict[str, Any]:
    """Condition and self-conditioning of a first convolution that sees `count` images."""
    if self_condition is None:
        self_condition = count > len(CONDITIONS)
    others = count - 1 - self_condition
    if not 0 <= others < len(CONDITIONS):
        raise ModelError(f"{source} sees {count} image(s), which does not fit self_condition={self_condition}")
    return {"condition": CONDITIONS[others], "self_condition": self_condition}


def _meta_net(settings: Mapping[str, Any]) -> Network:
    """A network without memory, for its keys and shapes."""
    with torch.device("meta"):
        return build_net(**settings)


def _check_fit(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str) -> None:
    """Raise ModelError unless both have the same keys and shapes."""
    missing = [name for name in expected if name not in state]
    unknown = [name for name in state if name not in expected]
    misfits = [name for name in expected if name in state and state[name].shape != expected[name].shape]
    told = [
        f"{what} {_list(names)}"
        for what, names in (("missing", missing), ("unknown", unknown), ("of another shape", misfits))
        if names
    ]
    if told:
        raise ModelError(f"{source}: no network has these keys and shapes: {'; '.join(told)}")


def _recognise(tables: Mapping[str, Tensor]) -> dict[str, Any] | None:
    return recognise_schedule(
        alpha=tables["alphas"],
        alpha_cumsum=tables["alphas_cumsum"],
        beta2=tables["betas2"],
        beta2_cumsum=tables["betas2_cumsum"],
        one_minus_alpha_cumsum=tables["one_minus_alphas_cumsum"],
    )


def _optimizers(net: Network, lineage: str, alpha_res: float | None) -> dict[str, Any]:
    """States of the authors' optimizers before their first step, in the layout of torch."""
    searched = [] if alpha_res is None else [torch.nn.Parameter(torch.zeros(1, device="meta"))]
    if lineage == "one_optimizer":
        adam = torch.optim.Adam([*searched, *net.parameters()], lr=8e-5, betas=(0.9, 0.99))
        return {"opt": adam.state_dict()}
    groups = [list(unet.parameters()) for unet in net.children()]
    groups[0] = [*searched, *groups[0]]
    return {f"opt{i}": torch.optim.RAdam(group, lr=2e-4).state_dict() for i, group in enumerate(groups)}


def _list(names: Iterable[str]) -> str:
    """Up to three names and how many there are more."""
    shown = [str(name)[:80] for name in names]
    return ", ".join(shown[:3]) + (f" and {len(shown) - 3} more" if len(shown) > 3 else "") if shown else "nothing"
