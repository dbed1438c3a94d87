"""The architectures known by name, and their weight files: from published ones, to .safetensors and back."""

from __future__ import annotations

import importlib.util
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from data_pipeline import storage
from data_pipeline.errors import ConfigError, EnvironmentFault, ModelError
from rddm_dist.evaluation.networks.inception import FEATURES, InceptionV3
from rddm_dist.evaluation.networks.lpips import make_alex, make_vgg

METADATA_KEY = "architecture"

Kind = Literal["features", "lpips"]


@dataclass(frozen=True)
class Architecture:
    """A network by name: what it is for, and where its weights are published.

    dim: of a feature network, which gives logits as well; heads: of LPIPS, their name in torchmetrics.
    """

    name: str
    kind: Kind
    make: Callable[[], nn.Module]
    url: str
    dim: int = 0
    heads: str = ""

    @property
    def advice(self) -> str:
        """Where to get the weights, and the command that converts them."""
        weights = self.url.rpartition("/")[2]
        return (
            f"get {self.url} and run: rddm features convert --architecture {self.name} --weights {weights} "
            f"--out {self.name}.safetensors"
        )


INCEPTION_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
)
ALEX_URL = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"
VGG_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture("inception-v3-fid", "features", InceptionV3, INCEPTION_URL, dim=FEATURES),
        Architecture("lpips-alex", "lpips", make_alex, ALEX_URL, heads="alex"),
        Architecture("lpips-vgg", "lpips", make_vgg, VGG_URL, heads="vgg"),
    )
}
_LOAD_ERRORS = (
    RuntimeError, OSError, EOFError, pickle.UnpicklingError, ValueError, LookupError, TypeError, AttributeError,
    AssertionError, OverflowError,
)  # fmt: skip


def get_architecture(name: str, *, key: str = "--architecture") -> Architecture:
    """ConfigError for a name that is not known; `key`: what the name was given as."""
    if name not in ARCHITECTURES:
        raise ConfigError(f"{key}={name} is not known; choose one of {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def convert(architecture: str, *, weights: str | Path, out: str | Path, heads: str | Path = "") -> Path:
    """Write published weights as a .safetensors file that says its architecture; equal weights give equal bytes.

    weights: a state dict saved by PyTorch under the published names (the trunk, for LPIPS); heads: of LPIPS, the same;
    default: those that torchmetrics carries. Only tensors are unpickled. The write is atomic.
    Raises ConfigError for flags that do not fit, ModelError for files that are absent, damaged or of another network.
    """
    known, out = get_architecture(architecture), Path(out)
    if out.suffix != ".safetensors":
        raise ConfigError(f"--out {out}: the name of the file must end in .safetensors")
    if heads and known.kind != "lpips":
        raise ConfigError(f"--heads goes with LPIPS networks; {architecture} has none")
    state = _read_state(Path(weights), key="--weights", advice=known.advice)
    if known.kind == "lpips":
        state = {name: tensor for name, tensor in state.items() if name.startswith("features.")}
        state |= _read_heads(Path(heads) if heads else _carried_heads(known.heads))
    fitted = _fit(state, known, source=f"--weights {weights}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        storage.write_bytes_atomic(str(out), save(fitted, metadata={METADATA_KEY: architecture}))
    except OSError as error:
        raise EnvironmentFault(f"--out {out} cannot be written: {error}") from error
    return out


def read_architecture(path: Path) -> Architecture:
    """Which network a .safetensors file holds. ModelError for a file that does not say, or cannot be read."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            name = (file.metadata() or {}).get(METADATA_KEY)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} cannot be read ({error}): not a safetensors file, or cut short") from error
    if name is None:
        raise ModelError(
            f"{path} does not say which network it holds; make it with rddm features convert, or give it the metadata "
            f"{METADATA_KEY}: {', '.join(ARCHITECTURES)}"
        )
    if name not in ARCHITECTURES:
        raise ModelError(f"{path} holds a network {name}; known are {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def load_network(path: Path, architecture: Architecture) -> nn.Module:
    """The network of a .safetensors file, on the CPU and in evaluation mode. ModelError where they do not fit."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} cannot be read ({error}): not a safetensors file, or cut short") from error
    fitted = _fit(state, architecture, source=str(path))
    with torch.device("meta"):  # no memory, and no time for numbers that are replaced
        net = architecture.make()
    # Not strict: PyTorch would ask for counters of batches, which we leave out; `_fit` has checked the names.
    net.load_state_dict(fitted, strict=False, assign=True)
    return net.eval().requires_grad_(False)


def _fit(state: Mapping[str, Tensor], architecture: Architecture, *, source: str) -> dict[str, Tensor]:
    """The parameters as float32. ModelError for one that is missing, unknown, misshapen or not finite."""
    with torch.device("meta"):
        expected = architecture.make().state_dict()
    given = {name: tensor for name, tensor in state.items() if not name.endswith(".num_batches_tracked")}
    for name in sorted(expected.keys() ^ given.keys()):
        fault = "has no parameter" if name in expected else "has a parameter that is not part of it,"
        raise ModelError(f"{source} is no {architecture.name} network: it {fault} {name}; {architecture.advice}")
    for name, tensor in given.items():
        if tensor.shape != expected[name].shape:
            raise ModelError(
                f"{source} is no {architecture.name} network: {name} is {tuple(tensor.shape)}, not "
                f"{tuple(expected[name].shape)}; {architecture.advice}"
            )
        if not tensor.isfinite().all():
            raise ModelError(f"{source}: {name} holds numbers that are not finite; {architecture.advice}")
    return {name: tensor.float().contiguous() for name, tensor in given.items()}


def _read_heads(path: Path) -> dict[str, Tensor]:
    """LPIPS heads under our names.   lin0.model.1.weight  ->  heads.0.weight"""
    state = _read_state(path, key="--heads", advice="leave it out to take the heads that torchmetrics carries")
    return {name.replace("lin", "heads.", 1).replace(".model.1.", "."): tensor for name, tensor in state.items()}


def _carried_heads(name: str) -> Path:
    """The file of LPIPS heads inside torchmetrics, which is not imported for it."""
    found = importlib.util.find_spec("torchmetrics")
    if found is None or not found.submodule_search_locations:
        raise EnvironmentFault("torchmetrics, which carries the LPIPS heads, is not installed; give --heads FILE")
    return Path(found.submodule_search_locations[0]) / "functional" / "image" / "lpips_models" / f"{name}.pth"


def _read_state(path: Path, *, key: str, advice: str) -> dict[str, Tensor]:
    """A state dict as PyTorch saves it, of plain tensors; nothing else is unpickled."""
    if not path.is_file():
        raise ModelError(f"{key} {path} does not exist; {advice}")
    try:
        document: Any = torch.load(path, map_location="cpu", weights_only=True)
    except _LOAD_ERRORS as error:
        reason = " ".join(str(error).split())[:120]
        raise ModelError(f"{key} {path} is no file of weights that PyTorch saved ({reason}); {advice}") from error
    is_state = isinstance(document, dict) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) and tensor.layout == torch.strided
        for name, tensor in document.items()
    )
    if not is_state:
        raise ModelError(f"{key} {path} is not a state dict of tensors; {advice}")
    return document
