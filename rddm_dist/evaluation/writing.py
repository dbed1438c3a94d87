"""Files of an evaluation, at a path or a URL: written whole or not at all, and one line where they cannot be."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data_pipeline import storage
from data_pipeline.errors import EnvironmentFault
from rddm_dist.tracking.journal import json_safe


def write_json(path: str | Path, value: Mapping[str, Any]) -> None:
    """Valid JSON of the value, atomically."""
    write_text(path, json.dumps(json_safe(value), indent=1, allow_nan=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write a file, at a path or a URL, whole or not at all; a process killed midway leaves what was there."""
    storage.write_bytes_atomic(str(path), text.encode())


@contextlib.contextmanager
def writing(place: str) -> Iterator[None]:
    """A full disk, or a folder that is not writable, as an EnvironmentFault in one line."""
    try:
        yield
    except OSError as error:
        raise EnvironmentFault(
            f"{place} cannot be written ({error.strerror or error}); make room or choose another --out, then run the "
            "command again: what is done is kept"
        ) from error
