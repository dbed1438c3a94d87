"""Is the storage writable, and the same from every node: each writes a token there, and reads those of others."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from cluster.findings import Finding
from cluster.node_report import LIMIT_S, RETRY, told
from data_pipeline import storage
from data_pipeline.errors import RddmError
from rddm_dist.limits import within

PREFIX = ".rddm-preflight-"
PATIENCE_S = 10.0  # what one node writes may reach another late on a network folder
POLL_S = 0.1
MAX_TOKENS = 64  # of other nodes, that each one reads
ADVICE = "mount one folder at that path on every node, writable for this user, or choose another --storage"


class SharedFolder:
    """One node's side of it. ident: names the folder of the tokens, the same on all nodes; home: the storage;
    patience_s: how long tokens of others may take to be seen here.

    The first node makes the folder before the others write, and cleans up after them: whatever was made for the tokens
    is then gone.
    """

    def __init__(self, home: str, ident: str, rank: int, *, patience_s: float = PATIENCE_S) -> None:
        self._home, self._ident, self._rank, self._patience_s = home, ident, rank, patience_s
        self._place = storage.join(home, f"{PREFIX}{ident}")
        self._made: list[Path] = []
        self._wrote = False

    def write(self) -> Finding | None:
        """Write this node's token.   -> what is wrong"""
        try:
            within(LIMIT_S, self._write)
        except TimeoutError:
            return self._silent()
        except (RddmError, OSError) as error:
            return Finding("storage", f"{self._home} cannot be written ({told(error)})", ADVICE)
        return None

    def look_for(self, others: Sequence[tuple[int, str]]) -> Finding | None:
        """Read the tokens of other nodes, given as (rank, name).   -> what is wrong"""
        behind = [other for other in others if other[0] > self._rank]
        chosen = [*behind, *(other for other in others if other[0] < self._rank)][:MAX_TOKENS]
        try:
            missing = within(LIMIT_S, lambda: self._missing(chosen))
        except TimeoutError:
            return self._silent()
        except (RddmError, OSError) as error:
            return Finding("storage", f"{self._home} cannot be read ({told(error)})", ADVICE)
        if not missing:
            return None
        names = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        return Finding("storage", f"{self._home} is another place here than on {names}", ADVICE)

    def clean(self) -> None:
        """Remove what this node wrote and made. Where that fails, the storage has been found unfit."""
        try:
            within(LIMIT_S, self._clean)
        except (RddmError, OSError):
            return

    def _silent(self) -> Finding:
        return Finding("storage", f"{self._home} does not answer within {LIMIT_S:.0f} s; is its server there?", ADVICE)

    def _token(self, rank: int) -> bytes:
        return f"{self._ident} {rank}\n".encode()

    def _name(self, rank: int) -> str:
        return storage.join(self._place, f"{rank}.token")

    def _write(self) -> None:
        if storage.is_local(self._place):
            folder = storage.local_path(self._place).absolute()
            self._made = [folder, *(path for path in folder.parents if not path.exists())]
            storage.make_folder(self._place)
        self._wrote = True  # perhaps in part
        storage.write_bytes_atomic(self._name(self._rank), self._token(self._rank), retry=RETRY)

    def _missing(self, others: Sequence[tuple[int, str]]) -> list[str]:
        deadline = time.monotonic() + self._patience_s
        left = list(others)
        while True:
            left = [(rank, name) for rank, name in left if not self._is_there(rank)]
            if not left or time.monotonic() > deadline:
                return [name for _, name in left]
            time.sleep(POLL_S)

    def _is_there(self, rank: int) -> bool:
        try:
            return storage.read_bytes(self._name(rank), retry=RETRY) == self._token(rank)
        except (FileNotFoundError, NotADirectoryError):
            return False

    def _clean(self) -> None:
        if self._wrote:
            storage.remove(self._name(self._rank), retry=RETRY)
            self._wrote = False
        for folder in self._made:
            try:
                folder.rmdir()
            except OSError:  # never made, or others are in it
                continue
        self._made = []
