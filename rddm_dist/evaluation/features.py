"""Feature networks and LPIPS from local files: what FID, KID, IS and LPIPS see images through."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.errors import ModelError
from rddm_dist.evaluation.networks.architectures import ARCHITECTURES, Kind, load_network, read_architecture
from rddm_dist.evaluation.networks.lpips import LpipsNetwork
from rddm_dist.evaluation.networks.programs import Program, load_program, run_program

TRIAL_IMAGES, TRIAL_SIDE = 2, 64
NAMES: dict[Kind, str] = {"features": "a feature network", "lpips": "an LPIPS network"}


@dataclass(frozen=True, eq=False)
class FeatureNetwork:
    """Images to feature vectors of `dim` numbers and, where `has_logits`, to logits of classes.

    name: its architecture, or the name of a program's file; digest: sha256 of the file.
    """

    name: str
    digest: str
    dim: int
    has_logits: bool
    device: str
    run: Callable[[Tensor], tuple[Tensor, Tensor | None]]

    def describe(self) -> dict[str, Any]:
        """For a report: name, sha256 of the file, dim, logits."""
        return {"name": self.name, "sha256": self.digest, "dim": self.dim, "logits": self.has_logits}

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """images: (B, 3, H, W) float32 in [0, 255], on any device
        ->  features (B, dim) float32, logits (B, K) float32 or None; on the network's device, without gradients.

        ValueError for another shape or type of images, ModelError where a program fails on them.
        """
        _check_images(images)
        with _float32(self.device):
            return self.run(images.to(self.device))


@dataclass(frozen=True, eq=False)
class Lpips:
    """A perceptual distance of two images.

    name, digest: as of FeatureNetwork; smallest: the least height and width of images, in pixels, that the network
    takes; 1 of programs, which do not say.
    """

    name: str
    digest: str
    smallest: int
    device: str
    run: Callable[[Tensor, Tensor], Tensor]

    def describe(self) -> dict[str, Any]:
        """For a report: name, sha256 of the file."""
        return {"name": self.name, "sha256": self.digest}

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """x, y: (B, 3, H, W) float32 in [0, 255], on any device
        ->  (B,) float64, on the network's device, without gradients.

        ValueError for another shape or type of images, ModelError where a program fails on them, DataError for images
        of fewer than `smallest` pixels on a side.
        """
        _check_images(x)
        _check_images(y)
        if x.shape != y.shape:
            raise ValueError(f"LPIPS compares images of one shape; got {tuple(x.shape)} and {tuple(y.shape)}")
        with _float32(self.device):
            return self.run(x.to(self.device), y.to(self.device)).double()


def load_features(path: str | Path, *, device: str = "cpu") -> FeatureNetwork:
    """Load a feature network: a .safetensors file of `rddm features convert`, a .pt2 or a TorchScript program.

    A program takes images (B, 3, H, W) float32 in [0, 255] of any B, H and W, and returns features (B, D), or features
    and logits (B, K); a trial call checks that. See `networks.programs` for what is trusted.
    Raises ModelError in one line for a file that is absent, damaged, an LPIPS network or none.
    """
    file = _existing(path, flag="--features", kind="features")
    digest = _digest(file)
    if file.suffix == ".safetensors":
        architecture = read_architecture(file)
        _check_kind(architecture.kind, wanted="features", file=file)
        net = load_network(file, architecture).to(device)
        return FeatureNetwork(architecture.name, digest, architecture.dim, True, device, net)
    run = _feature_runner(_load_checked(file, wanted="features", device=device), file)
    features, logits = _trial_features(run, file, device)
    return FeatureNetwork(file.stem, digest, features.shape[1], logits is not None, device, run)


def load_lpips(path: str | Path, *, device: str = "cpu") -> Lpips:
    """Load an LPIPS network: a .safetensors file of `rddm features convert`, a .pt2 or a TorchScript program.

    A program takes two batches of images (B, 3, H, W) float32 in [0, 255] of any B, H and W, and returns (B,); a trial
    call checks that. See `networks.programs` for what is trusted.
    Raises ModelError in one line for a file that is absent, damaged, a feature network or none.
    """
    file = _existing(path, flag="--lpips", kind="lpips")
    digest = _digest(file)
    if file.suffix == ".safetensors":
        architecture = read_architecture(file)
        _check_kind(architecture.kind, wanted="lpips", file=file)
        net = load_network(file, architecture).to(device)
        assert isinstance(net, LpipsNetwork)
        return Lpips(architecture.name, digest, net.smallest, device, net)
    run = partial(run_program, _load_checked(file, wanted="lpips", device=device), source=str(file))
    _trial_lpips(run, file, device)
    return Lpips(file.stem, digest, 1, device, run)


def _feature_runner(program: Program, file: Path) -> Callable[[Tensor], tuple[Tensor, Tensor | None]]:
    """The program's output as (features, logits or None), in float32."""

    def run(images: Tensor) -> tuple[Tensor, Tensor | None]:
        given = run_program(program, images, source=str(file))
        parts = tuple(given) if isinstance(given, (tuple, list)) else (given,)
        is_fit = len(parts) in (1, 2) and all(_is_matrix(part, len(images)) for part in parts)
        if not is_fit:
            shapes = ", ".join(
                str(tuple(part.shape)) if isinstance(part, Tensor) else type(part).__name__ for part in parts
            )
            raise ModelError(
                f"--features {file} gives {shapes or 'nothing'} for {len(images)} images; a feature network gives "
                "(B, D), or (B, D) and logits (B, K)"
            )
        return parts[0].float(), parts[1].float() if len(parts) == 2 else None

    return run


def _trial_features(
    run: Callable[[Tensor], tuple[Tensor, Tensor | None]], file: Path, device: str
) -> tuple[Tensor, Tensor | None]:
    """Features and logits of a few grey levels; ModelError for a network that is not finite or not deterministic."""
    images = _trial_images(device)
    with _float32(device):
        features, logits = run(images)
        again, _ = run(images)
    _check_trial(features, again, flag="--features", file=file)
    return features, logits


def _trial_lpips(run: Callable[[Tensor, Tensor], Tensor], file: Path, device: str) -> None:
    """Raise ModelError for a program that does not tell images apart by one finite number a pair, always the same."""
    images = _trial_images(device)
    with _float32(device):
        distance, again = (run(images, images.flip(0)) for _ in range(2))
    if not isinstance(distance, Tensor) or distance.shape != (TRIAL_IMAGES,):
        shape = tuple(distance.shape) if isinstance(distance, Tensor) else type(distance).__name__
        raise ModelError(
            f"--lpips {file} gives {shape} for {TRIAL_IMAGES} pairs of images; an LPIPS network gives (B,)"
        )
    _check_trial(distance, again, flag="--lpips", file=file)
    if not distance.any():
        # torch.export takes two inputs for one where the same tensor was given as both.
        raise ModelError(f"--lpips {file} gives 0 for different images; export it with two different example tensors")


def _check_trial(first: Tensor, again: Tensor, *, flag: str, file: Path) -> None:
    if not first.isfinite().all():
        raise ModelError(f"{flag} {file} gives numbers that are not finite for a plain image: its weights are damaged")
    if not torch.allclose(first, again, rtol=1e-3):  # GPUs may round in another order
        raise ModelError(
            f"{flag} {file} gives other numbers for the same images; export it in evaluation mode, without dropout"
        )


def _trial_images(device: str) -> Tensor:
    """(2, 3, 64, 64) float32 in [0, 255]: a ramp, and the same backwards."""
    count = 3 * TRIAL_SIDE * TRIAL_SIDE
    ramp = torch.linspace(0, 255, count, device=device)
    return torch.stack([ramp, ramp.flip(0)]).view(TRIAL_IMAGES, 3, TRIAL_SIDE, TRIAL_SIDE)


def _load_checked(file: Path, *, wanted: Kind, device: str) -> Program:
    """A program that takes as many images as the wanted kind: one batch, or two."""
    program = load_program(file, device=device)
    kinds: dict[int, Kind] = {1: "features", 2: "lpips"}
    if program.num_images not in kinds:
        raise ModelError(
            f"{file} is a program of {program.num_images} arguments; a feature network takes one, images, and an LPIPS "
            "network two: export it inside a module that does"
        )
    _check_kind(kinds[program.num_images], wanted=wanted, file=file)
    return program


def _check_kind(found: Kind, *, wanted: Kind, file: Path) -> None:
    if found != wanted:
        raise ModelError(
            f"--{wanted} {file} is {NAMES[found]}; give {NAMES[wanted]} ({_known(wanted)}), and this one to --{found}"
        )


def _existing(path: str | Path, *, flag: str, kind: Kind) -> Path:
    file = Path(path)
    if not file.is_file():
        first = next(architecture for architecture in ARCHITECTURES.values() if architecture.kind == kind)
        raise ModelError(f"{flag} {file} is not a file; {first.advice}")
    return file


def _known(kind: Kind) -> str:
    return ", ".join(name for name, architecture in ARCHITECTURES.items() if architecture.kind == kind)


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _is_matrix(value: Any, rows: int) -> bool:
    return isinstance(value, Tensor) and value.ndim == 2 and len(value) == rows and value.is_floating_point()


def _check_images(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.float32:
        raise ValueError(f"images must be (B, 3, H, W) float32; got {tuple(images.shape)} {images.dtype}")


@contextmanager
def _float32(device: str) -> Iterator[None]:
    """No gradients, and float32 throughout, whatever the block stands in: no autocast, no TF32 of convolutions."""
    kind = torch.device(device).type
    with (
        torch.no_grad(),
        torch.autocast(kind, enabled=False),
        torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False),
    ):
        yield
