"""Weight files: safetensors with the configuration inside, and the digest that names a set of weights."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data_pipeline.errors import ModelError

FORMAT_VERSION = 1
# All metadata stands under one key: safetensors does not keep the order of several, and equal files should be equal.
METADATA_KEY = "rddm"


def save_safetensors(
    path: str | Path, state: Mapping[str, Tensor], *, config: Mapping[str, Any], extra: Mapping[str, str] | None = None
) -> None:
    """Write weights, the configuration they were trained with and further strings.

    The write is atomic, and equal inputs give equal bytes.
    state: tensors of any shape, type and device; config: plain values that JSON can hold.
    """
    path = Path(path)
    metadata = {"format_version": FORMAT_VERSION, "config": dict(config), "extra": dict(extra or {})}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(tensors, temporary, metadata={METADATA_KEY: json.dumps(metadata, sort_keys=True)})
        # safetensors leaves files that their owner alone may read.
        temporary.chmod(mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, str]]:
    """Read what save_safetensors wrote: (state on the CPU, config, extra); ModelError for anything else."""
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"weights {path} do not exist")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            text = (file.metadata() or {}).get(METADATA_KEY)
            state = {name: file.get_tensor(name) for name in file.keys()} if text else {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ModelError(f"weights {path} cannot be read ({error}): not a safetensors file, or cut short") from error
    if text is None:
        raise ModelError(f"weights {path} were not written by this project: they hold no configuration")
    metadata = json.loads(text)
    version = metadata["format_version"]
    if version > FORMAT_VERSION:
        raise ModelError(
            f"weights {path} have format version {version}, newer than the known {FORMAT_VERSION}; upgrade"
        )
    return state, metadata["config"], metadata["extra"]


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """sha256 over name, type, shape and bytes of every tensor in the order of their names, as hex."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
