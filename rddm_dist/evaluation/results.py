"""Results of units as Parquet files named by everything they follow from (the pyarrow door).

A unit's table has one row per image: what was scored, or `kind` and `error` of one that failed; features and logits of
a feature network as lists. On its way from a worker it may also carry columns of pictures, which go to files of their
own and are not kept in the table.
"""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline import storage
from data_pipeline.errors import EnvironmentFault

log = logging.getLogger(__name__)

Table = pa.Table

FOLDER, SUFFIX = "results", ".parquet"
UNIT_KEY = b"rddm_unit"
PNG, CASE = "png", "case"  # columns of pictures
VECTORS = ("features", "target_features", "logits")
UNREADABLE, NOT_FINITE = "unreadable", "not finite"


def make_table(rows: Sequence[Mapping[str, Any]], *, unit: str) -> pa.Table:
    """A table of rows whose keys may differ.   rows: str, int, float, bytes, or float32 vectors under VECTORS"""
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {}
    for name in names:
        values = [row.get(name) for row in rows]
        columns[name] = pa.array(values, type=pa.list_(pa.float32())) if name in VECTORS else pa.array(values)
    return pa.table(columns).replace_schema_metadata({UNIT_KEY: unit.encode()})


def to_bytes(table: pa.Table) -> bytes:
    """A Parquet file, with checksums over its pages."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
    return buffer.getvalue()


def from_bytes(data: bytes) -> pa.Table:
    """The table of a Parquet file that to_bytes made."""
    # One thread: with pyarrow's own a process that ends soon after now and then aborts (pyarrow 25).
    return pq.read_table(io.BytesIO(data), page_checksum_verification=True, use_threads=False)


def without(table: pa.Table, names: Sequence[str]) -> pa.Table:
    """The table without these columns, which it may lack."""
    return table.drop_columns([name for name in names if name in table.column_names])


def rows_of(table: pa.Table) -> list[dict[str, Any]]:
    """The rows without vectors, each with the values it has; NaN is a value."""
    kept = without(table, VECTORS).to_pylist()
    return [{name: value for name, value in row.items() if value is not None} for row in kept]


def vectors_of(table: pa.Table, name: str) -> Iterator[tuple[str, np.ndarray]]:
    """(key, vector) of every row that has one.   -> (D,) float32"""
    if name not in table.column_names:
        return
    for key, value in zip(table["key"].to_pylist(), table[name], strict=True):
        if value.is_valid:
            yield key, value.values.to_numpy()


class ResultStore:
    """The results of one job below `folder`, a path or a URL: one file per unit, written whole or not at all.

    A file is named UNIT-CONTENT.parquet, after what it follows from and what it holds, so that damage shows.
    Raises EnvironmentFault for a folder that cannot be made.
    """

    def __init__(self, folder: str, job_digest: str) -> None:
        self.folder = storage.join(storage.join(folder, FOLDER), job_digest)
        try:
            storage.make_folder(self.folder)
        except OSError as error:
            raise EnvironmentFault(f"--out {folder} cannot be written ({error.strerror}); choose another") from error
        names = sorted(name for name in storage.list_names(self.folder) if name.endswith(SUFFIX))
        self._present = {name.partition("-")[0]: name for name in names}

    def get(self, unit: str, *, whole: bool = True) -> pa.Table | None:
        """The table of a unit; None for one that is not there or is damaged.

        whole: nor for one with images that could not be read, which may be better the next time.
        """
        name = self._present.get(unit)
        if name is None:
            return None
        path = storage.join(self.folder, name)
        try:
            data = storage.read_bytes(path)
        except OSError as error:
            log.warning("%s cannot be read and is computed again: %s", path, error)
            return None
        if name != _file_name(unit, data):
            log.warning("%s is damaged and computed again: its content is not what its name says", path)
            return None
        table = from_bytes(data)
        if (table.schema.metadata or {}).get(UNIT_KEY) != unit.encode():
            log.warning("%s is not the result it is named after and computed again", path)
            return None
        is_whole = "kind" not in table.column_names or UNREADABLE not in table["kind"].to_pylist()
        return table if is_whole or not whole else None

    def put(self, unit: str, table: pa.Table) -> None:
        """Keep a table in place of what there was of the unit."""
        data = to_bytes(table)
        name, old = _file_name(unit, data), self._present.get(unit)
        storage.write_bytes_atomic(storage.join(self.folder, name), data)
        self._present[unit] = name
        if old not in (None, name):
            storage.remove(storage.join(self.folder, old))


def _file_name(unit: str, data: bytes) -> str:
    return f"{unit}-{hashlib.sha256(data).hexdigest()[:32]}{SUFFIX}"
