"""Checkpoints written without a training run: any tensors, cut among any number of ranks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline import storage
from rddm_dist.training import checkpoint as ckpt
from rddm_dist.training.fragments import Key, Snapshot

BATCH = 6


def save(
    folder: str | Path, step: int, kinds: Mapping[str, Mapping[str, Tensor]], *, ranks: int = 1, **progress: Any
) -> ckpt.Checkpoint:
    """Commit a checkpoint of `step` in a row of checkpoints: kind -> parameter -> float32, cut evenly among `ranks`."""
    uri = ckpt.step_folder(str(folder), step)
    storage.make_folder(uri)
    files = {}
    for rank in range(ranks):
        sources = []
        for kind, tensors in kinds.items():
            for name, tensor in tensors.items():
                flat = tensor.reshape(-1)
                low, high = flat.numel() * rank // ranks, flat.numel() * (rank + 1) // ranks
                if high > low:
                    sources.append((Key(kind, name, low), flat[low:high]))
        snapshot = Snapshot(sources)
        snapshot.take()
        name = f"rank-{rank:05d}"
        digest = snapshot.write(storage.join(uri, f"{name}.safetensors"))
        receipt = json.dumps({"attempt": "a", "bytes": snapshot.num_bytes, "sha256": digest}).encode()
        storage.write_bytes_atomic(storage.join(uri, f"{name}.json"), receipt)
        files[f"{name}.safetensors"] = (snapshot.num_bytes, digest)
        files[f"{name}.json"] = (len(receipt), ckpt.sha256_of(receipt))
    values = {
        "step": step, "position": step * BATCH, "optimizer_step": step, "config_digest": "c" * 64,
        "data_fingerprint": "d" * 64, "world_size": ranks, "zero_stage": 0,
    }  # fmt: skip
    shapes = {name: tuple(tensor.shape) for name, tensor in next(iter(kinds.values())).items()}
    return ckpt.write_commit(uri, ckpt.Progress(**{**values, **progress}), shapes, files)


def leave_unfinished(folder: Path, step: int, *, num_bytes: int = 100) -> Path:
    """What a save leaves that was cut short: a rank's file without a commit."""
    place = Path(ckpt.step_folder(str(folder), step))
    place.mkdir(parents=True)
    (place / "rank-00000.safetensors").write_bytes(bytes(num_bytes))
    return place


def flip_a_bit(checkpoint: ckpt.Checkpoint) -> Path:
    """Damage the last byte of a committed checkpoint's first tensor file.   -> that file"""
    path = next(iter(sorted(Path(checkpoint.uri).glob("*.safetensors"))))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return path


def make_newer(checkpoint: ckpt.Checkpoint) -> None:
    """Make a checkpoint one of a later version of the package."""
    path = Path(checkpoint.uri) / ckpt.COMMIT
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": ckpt.FORMAT_VERSION + 1}))


def drawn(seed: int, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Parameters of these shapes, float32."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
