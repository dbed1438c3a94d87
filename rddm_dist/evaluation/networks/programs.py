"""Networks that others exported: torch.export's .pt2 files, and TorchScript.

A program is code: what it computes, and what PyTorch runs to rebuild it, is the word of whoever made the file. Load
only what you would run; a .safetensors file of a known architecture holds numbers alone.

What torch.export.load does in PyTorch 2.11 and 2.13: weights and tensor constants lie in the archive as raw bytes, but
a payload may ask to be unpickled (tensor subclasses, custom objects, in 2.13 opaque ones), which PyTorch does without
weights_only; sample inputs, and whole state dicts of older versions, are tried with weights_only and, where that fails,
without. So files that hold any such payload are refused before PyTorch sees them. Symbolic sizes are evaluated as
expressions, and the graph becomes Python source. torch.jit.load has a reader of its own that makes no Python objects.
Neither is a sandbox.
"""

from __future__ import annotations

import io
import json
import pickle
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from data_pipeline.errors import ModelError

RAW_PAYLOADS = ("weight_", "tensor_")  # names of payloads that are bytes of tensors
_READ_ERRORS = (
    RuntimeError, OSError, EOFError, pickle.UnpicklingError, ValueError, LookupError, TypeError, AttributeError,
    AssertionError, zipfile.BadZipFile,
)  # fmt: skip

Format = Literal["pt2", "torchscript"]


@dataclass(frozen=True, eq=False)
class Program:
    """An exported network. run: takes `num_images` tensors of images and returns what the network returns."""

    run: Callable[..., Any]
    num_images: int


def program_format(path: Path) -> Format | None:
    """What kind of program a file is, by its content; None for none."""
    if not zipfile.is_zipfile(path):
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.partition("/")[2] for name in archive.namelist()]
    except zipfile.BadZipFile:
        return None
    if "archive_format" in names:
        return "pt2"
    return "torchscript" if "constants.pkl" in names and any(name.startswith("code/") for name in names) else None


def load_program(path: Path, *, device: str) -> Program:
    """Load a .pt2 or TorchScript file. ModelError for a file that is neither, is damaged, or would be unpickled."""
    form = program_format(path)
    if form is None:
        raise ModelError(
            f"{path} is no network: neither a .safetensors file nor a program of torch.export (.pt2) or TorchScript; "
            "weights alone go through rddm features convert"
        )
    try:
        if form == "torchscript":
            return _load_script(path, device)
        _refuse_pickles(path)
        return _load_exported(path, device)
    except _READ_ERRORS as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise ModelError(
            f"{path} cannot be loaded by PyTorch {torch.__version__} ({reason}); export it again"
        ) from error


def _load_exported(path: Path, device: str) -> Program:
    program = torch.export.load(path)
    if torch.device(device).type != "cpu":
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, device)
    # The checks of guards are generated code, and say nothing that our checks of the outputs do not.
    return Program(program.module(check_guards=False), len(program.graph_signature.user_inputs))


def _load_script(path: Path, device: str) -> Program:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`torch.jit.load` is deprecated", category=DeprecationWarning)
        module = torch.jit.load(path, map_location=device)
    module.eval()
    return Program(module, len(module.forward.schema.arguments) - 1)  # the first is the module itself


def _refuse_pickles(path: Path) -> None:
    """Raise ModelError where loading would unpickle more than plain tensors."""
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            place = name.partition("/")[2]
            if place.startswith(("data/weights/", "data/constants/")) and place.endswith(".json"):
                payloads = json.loads(archive.read(name))["config"].values()
                is_raw = all(
                    entry["use_pickle"] is False and entry["path_name"].startswith(RAW_PAYLOADS) for entry in payloads
                )
            elif place.startswith("data/sample_inputs/"):
                is_raw = _is_plain(archive.read(name))
            else:
                is_raw = not place.endswith(".pt")  # whole state dicts, from older versions
            if not is_raw:
                raise ModelError(f"{path}: {place} holds more than plain tensors, and code in it is not run")


def _is_plain(content: bytes) -> bool:
    """Whether a file of torch.save holds plain data alone."""
    try:
        torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, LookupError, TypeError, AttributeError):
        return False
    return True


def run_program(program: Program, *images: Tensor, source: str) -> Any:
    """What the program returns. ModelError where it cannot take these images, other than for want of memory."""
    try:
        return program.run(*images)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ModelError(
            f"{source} fails on images of shape {tuple(images[0].shape)} ({reason}); export it with a dynamic batch "
            "size, height and width, for float32 in [0, 255]"
        ) from error
