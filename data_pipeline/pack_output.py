"""Where the files of a pack go, and what an interrupted pack leaves for the next one.

While a dataset is made, OUT/.packing holds the plan, the results of checks, a receipt for each finished shard and, on
a local disk, the shards themselves. On a URL, which has no renaming, shards stand under their names at once. The
manifest comes last: before it there is no dataset.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from data_pipeline import storage
from data_pipeline.errors import ConfigError, DataError, EnvironmentFault, UserError
from data_pipeline.manifest import MANIFEST_NAME, Manifest, ShardInfo
from data_pipeline.pack_jobs import WORK_PREFIX

log = logging.getLogger(__name__)

STAGING = ".packing"
LOCK_NAME = "lock"
PLAN_NAME = "plan.json"


@dataclass(frozen=True)
class Plan:
    """What is being made. digest: of everything that decides the bytes of the shards."""

    digest: str
    num_shards: int

    @property
    def shards(self) -> list[str]:
        """Names without extension, in order."""
        return [f"shard-{number:05d}" for number in range(self.num_shards)]

    @property
    def files(self) -> set[str]:
        return {f"{name}.{extension}" for name in self.shards for extension in ("tar", "idx")}


def is_dataset(out: str) -> bool:
    """Whether `out` holds a finished dataset; if not, it must be free for one or hold an interrupted one.

    Raises ConfigError for a kind of location that cannot be written, DataError where something else is there,
    EnvironmentFault where it cannot be seen.
    """
    if out.partition("://")[0] in storage.READ_ONLY:
        raise ConfigError(f"--out {out} cannot be written; give a folder or an s3:// URL")
    try:
        if storage.is_local(out) and storage.local_path(out).exists() and not storage.local_path(out).is_dir():
            raise DataError(f"--out {out} is a file; give a folder")
        names = storage.list_names(out)
        if MANIFEST_NAME in names:
            return True
        plan = _read_plan(out) if STAGING in names else None
    except OSError as error:
        raise EnvironmentFault(f"--out {out} cannot be used: {error.strerror or error}") from error
    others = sorted(set(names) - {STAGING} - (plan.files if plan else set()))
    if others:
        raise DataError(f"--out {out} holds {others[0]} but no dataset; give another folder or empty it")
    return False


def clear_staging(out: str) -> None:
    """Remove what a pack that was killed at its very end left beside its finished dataset."""
    if STAGING not in storage.list_names(out):
        return
    lock = _take_lock(out)
    _remove_staging(out)
    if lock is not None:
        os.close(lock)


class Output:
    """A dataset in the making: one at a time for a local folder.

    Leaving without publish() by bad input (UserError) removes everything that was written, folders that were made
    included; leaving by anything else keeps what is finished for the next call. Raises DataError when another process
    is at it, EnvironmentFault when the place cannot be written.
    """

    def __init__(self, out: str) -> None:
        self._out = out
        self._is_local = storage.is_local(out)
        self._lock: int | None = None
        self._made: list[Path] = []  # folders this call made, innermost first
        self._plan: Plan | None = None
        self._is_published = False
        self.staging = storage.join(str(storage.local_path(out).absolute()) if self._is_local else out, STAGING)

    def __enter__(self) -> Output:
        try:
            if self._is_local:
                folder = storage.local_path(self._out).absolute()
                self._made = [path for path in (folder, *folder.parents) if not path.exists()]
                self._lock = _take_lock(self._out)
            if storage.exists(storage.join(self._out, MANIFEST_NAME)):
                raise DataError(f"--out {self._out} was finished by another process just now; run the command again")
            if self._is_local:
                for path in Path(self.staging).glob(f"{WORK_PREFIX}*"):
                    shutil.rmtree(path)  # of a pack that was killed
            self._plan = _read_plan(self._out)
        except BaseException as error:
            self._release()
            if isinstance(error, OSError):
                raise _unwritable(self._out, error) from error
            raise
        return self

    @property
    def shard_folder(self) -> str:
        """Where shards are written."""
        return self.staging if self._is_local else self._out

    def kept_num_shards(self, digest: str) -> int:
        """Shards of the interrupted pack of this digest, 0 where there is none."""
        return self._plan.num_shards if self._plan is not None and self._plan.digest == digest else 0

    def begin(self, plan: Plan) -> dict[str, ShardInfo]:
        """Start or continue. What another plan left is removed.   -> name -> a shard that is finished already"""
        if self._plan is not None and self._plan != plan:
            self._sweep(self._plan)
        self._plan = plan
        storage.write_bytes_atomic(storage.join(self.staging, PLAN_NAME), json.dumps(asdict(plan)).encode())
        staged, placed = set(storage.list_names(self.staging)), set(storage.list_names(self._out))
        finished = {}
        for name in plan.shards:
            if f"{name}.json" in staged:
                receipt = json.loads(storage.read_bytes(storage.join(self.staging, f"{name}.json")))
                info = ShardInfo(**receipt)
                if self._is_whole(info, staged, placed):
                    finished[name] = info
        return finished

    def publish(self, manifest: Manifest) -> None:
        """Put what is not there yet under its name, the manifest last."""
        assert self._plan is not None, "begin() comes first"
        if self._is_local:
            staging, folder = Path(self.staging), storage.local_path(self._out)
            for name in sorted(self._plan.files):
                if (staging / name).exists():
                    os.replace(staging / name, folder / name)
        manifest.save(self._out)
        self._is_published = True

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        is_bad_input = isinstance(error, UserError) and not isinstance(error, EnvironmentFault)
        if not self._is_published and not is_bad_input and self._count_finished():
            log.warning("what is finished of %s is kept; the same command goes on from there", self._out)
        else:
            if not self._is_published and self._plan is not None:
                self._sweep(self._plan)
            _remove_staging(self._out)
        self._release()
        if isinstance(error, OSError):
            raise _unwritable(self._out, error) from error

    def _release(self) -> None:
        """Let others in, and leave no empty folder that was made here."""
        if self._lock is not None:
            os.close(self._lock)
        for folder in self._made:
            if folder.exists() and not any(folder.iterdir()):
                folder.rmdir()

    def _count_finished(self) -> int:
        """Files in the staging folder that spare work."""
        return sum(name.endswith(".json") and name != PLAN_NAME for name in storage.list_names(self.staging))

    def _is_whole(self, info: ShardInfo, staged: set[str], placed: set[str]) -> bool:
        """Whether tar and index of a receipt are where they should be."""
        for folder, names in ((self.staging, staged), (self._out, placed)):
            if info.name in names:
                has_index = info.index_name in staged | placed
                return has_index and storage.size(storage.join(folder, info.name)) == info.bytes
        return False

    def _sweep(self, plan: Plan) -> None:
        """Remove the shards of a plan, wherever they are, and their receipts."""
        for folder in (self._out, self.staging):
            for name in set(storage.list_names(folder)) & (plan.files | {f"{shard}.json" for shard in plan.shards}):
                storage.remove(storage.join(folder, name))


def _read_plan(out: str) -> Plan | None:
    try:
        return Plan(**json.loads(storage.read_bytes(storage.join(storage.join(out, STAGING), PLAN_NAME))))
    except FileNotFoundError:
        return None


def _remove_staging(out: str) -> None:
    staging = storage.join(out, STAGING)
    if storage.is_local(out):
        shutil.rmtree(storage.local_path(staging))
        return
    for name in storage.list_names(staging):
        storage.remove(storage.join(staging, name))


def _take_lock(out: str) -> int | None:
    """The staging folder, made and locked for this process until the descriptor is closed; None for a URL."""
    if not storage.is_local(out):
        return None
    path = storage.local_path(out) / STAGING / LOCK_NAME
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            continue  # the one who held it has finished and removed the folder
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(lock)
            raise DataError(
                f"--out {out} is being packed by another process; wait for it or give another folder"
            ) from error
        if os.fstat(lock).st_nlink:
            return lock
        os.close(lock)  # of a folder that is gone


def _unwritable(out: str, error: OSError) -> EnvironmentFault:
    return EnvironmentFault(f"--out {out} cannot be written: {error.strerror or error}")
