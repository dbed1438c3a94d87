"""Where the files of a pack go, and what an interrupted pack leaves for the next one.

While a dataset is made, OUT/.packing holds the plan, the results of checks, the tiles that wait for their shards, a
receipt for each finished shard and, on a local disk, the shards themselves. On a URL, which has no renaming, shards
stand under their names at once. The manifest comes last: before it there is no dataset.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from data_pipeline import storage
from data_pipeline.errors import ConfigError, DataError, EnvironmentFault, UserError
from data_pipeline.manifest import MANIFEST_NAME, Manifest, ShardInfo
from data_pipeline.pack_executors import threads
from data_pipeline.pack_owner import (
    LOCK_NAME,
    OWNER_NAME,
    WORK_PREFIX,
    UrlClaim,
    lock_file,
    refuse_fresh_owner,
    take_lock,
)

log = logging.getLogger(__name__)

STAGING = ".packing"
PLAN_NAME = "plan.json"
CUT_PREFIX = "cut-"
MANIFEST_TEMPORARY = re.compile(rf"\.{re.escape(MANIFEST_NAME)}-[0-9a-f]{{8}}")  # as storage names what it replaces by
LOOKERS = 16  # requests at once


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

    Raises ConfigError for a location that cannot be written, DataError where something else is there,
    EnvironmentFault where it cannot be seen.
    """
    if not out.removeprefix("file://").strip():
        raise ConfigError("--out is empty; give a folder or an s3:// URL")
    if out.partition("://")[0] in storage.READ_ONLY:
        raise ConfigError(f"--out {out} cannot be written; give a folder or an s3:// URL")
    try:
        if storage.is_local(out) and storage.local_path(out).exists() and not storage.local_path(out).is_dir():
            raise DataError(f"--out {out} is a file; give a folder")
        names = storage.list_names(out)
        if MANIFEST_NAME in names:
            return True
        plan = read_plan(out) if STAGING in names else None
    except OSError as error:
        raise EnvironmentFault(f"--out {out} cannot be used: {error.strerror or error}") from error
    known = {STAGING} | (plan.files if plan else set())
    others = [name for name in names if name not in known and not MANIFEST_TEMPORARY.fullmatch(name)]
    if others:
        raise DataError(f"--out {out} holds {others[0]} but no dataset; give another folder or empty it")
    return False


def is_interrupted(out: str) -> bool:
    """Whether a pack that nobody finishes now left something at `out`. Raises DataError where one is at work."""
    if STAGING not in storage.list_names(out):
        return False
    if not storage.is_local(out):
        refuse_fresh_owner(out, storage.join(out, STAGING))
        return True
    with contextlib.suppress(FileNotFoundError):  # of the lock: finished at this moment
        lock = os.open(storage.local_path(out) / STAGING / LOCK_NAME, os.O_RDONLY)
        try:
            lock_file(lock, out)
        finally:
            os.close(lock)
    return True


def read_plan(out: str) -> Plan | None:
    """The plan of the pack that was begun at `out`, if there is one."""
    try:
        return Plan(**json.loads(storage.read_bytes(storage.join(storage.join(out, STAGING), PLAN_NAME))))
    except FileNotFoundError:
        return None


def clear_staging(out: str) -> None:
    """Remove what a pack that was killed at its very end left beside its finished dataset.

    It stays where the one who packed is just about to do that, and where nothing can be removed (logged).
    """
    try:
        if not any(name == STAGING or MANIFEST_TEMPORARY.fullmatch(name) for name in storage.list_names(out)):
            return
        try:
            lock = take_lock(out, storage.join(out, STAGING))
            refuse_fresh_owner(out, storage.join(out, STAGING))
        except DataError:
            return  # it is being finished
        try:
            _sweep_temporaries(out)
            _remove_staging(out)
            storage.remove(storage.join(storage.join(out, STAGING), OWNER_NAME))
        finally:
            if lock is not None:
                os.close(lock)
    except (OSError, EnvironmentFault) as error:
        log.warning("%s of a killed pack cannot be removed: %s", storage.join(out, STAGING), error)


class Output:
    """A dataset in the making: one at a time for a folder, and for a URL as far as UrlClaim can tell.

    Leaving without publish() by bad input (UserError) removes everything that was written, folders that were made
    included; leaving by anything else keeps what is finished for the next call. What another process has taken over is
    left alone. Raises DataError when another process is at it, EnvironmentFault when the place cannot be written.
    """

    def __init__(self, out: str) -> None:
        self._out = out
        self._is_local = storage.is_local(out)
        self._lock: int | None = None
        self._claim = None if self._is_local else UrlClaim(out, storage.join(out, STAGING))
        self._made: list[Path] = []  # folders this call made, innermost first
        self._plan: Plan | None = None
        self._is_published = False
        self._is_lost = False  # another process has finished the dataset
        self.staging = storage.join(str(storage.local_path(out).absolute()) if self._is_local else out, STAGING)

    def __enter__(self) -> Output:
        try:
            if self._is_local:
                folder = storage.local_path(self._out).absolute()
                self._made = [path for path in (folder, *folder.parents) if not path.exists()]
                self._lock = take_lock(self._out, self.staging)
            if self._claim is not None:
                self._claim.take()
            if storage.exists(storage.join(self._out, MANIFEST_NAME)):
                _remove_staging(self._out)
                raise DataError(f"--out {self._out} was finished by another process just now; run the command again")
            if self._is_local:
                _sweep_temporaries(self._out)
                for path in Path(self.staging).glob(f"{WORK_PREFIX}*"):
                    shutil.rmtree(path)  # of a pack that was killed
            self._plan = read_plan(self._out)
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

    def check(self) -> None:
        """Raise DataError where another process was seen to have taken over, what its look-out met otherwise. Cheap."""
        if self._claim is not None and self._claim.fault is not None:
            raise self._claim.fault

    def place_cuts(self, digest: str) -> str:
        """Where the tiles of the pack of this digest wait, without numbers. Those of others are removed."""
        own = f"{CUT_PREFIX}{digest[:32]}-"
        for name in storage.list_names(self.staging):
            if name.startswith(CUT_PREFIX) and not name.startswith(own):
                storage.remove(storage.join(self.staging, name))
        return storage.join(self.staging, own)

    def begin(self, plan: Plan) -> dict[str, ShardInfo]:
        """Start or continue. What another plan left is removed.   -> name -> a shard that is finished already"""
        if self._claim is not None:
            self._claim.check()
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
        """Put what is not there yet under its name, the manifest last.

        Raises DataError, and writes no manifest, where a shard or index is not what was written, and where another
        process has taken over or finished. On a URL one that does so between this look and the manifest, a request
        apart, is not seen.
        """
        assert self._plan is not None, "begin() comes first"
        if self._is_local:
            staging, folder = Path(self.staging), storage.local_path(self._out)
            for name in sorted(self._plan.files):
                if (staging / name).exists():
                    os.replace(staging / name, folder / name)
        self._check_files(manifest)
        if self._claim is not None:
            self._claim.check()
            if read_plan(self._out) != self._plan:
                raise DataError(f"--out {self._out}: another process has changed the plan; wait for it and pack again")
        if storage.exists(storage.join(self._out, MANIFEST_NAME)):
            self._is_lost = True
            raise DataError(f"--out {self._out} was finished by another process meanwhile; run the command again")
        manifest.save(self._out)
        self._is_published = True

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        try:
            if not self._is_lost and (self._claim is None or self._claim.is_held()):
                self._settle(error)
        finally:
            self._release()
        if isinstance(error, OSError):
            raise _unwritable(self._out, error) from error

    def _settle(self, error: BaseException | None) -> None:
        """Keep what spares work after an interruption, else remove what is no part of a dataset."""
        is_bad_input = isinstance(error, UserError) and not isinstance(error, EnvironmentFault)
        if not self._is_published and not is_bad_input and self._count_finished():
            log.warning("what is finished of %s is kept; the same command goes on from there", self._out)
            return
        if not self._is_published and self._plan is not None:
            self._sweep(self._plan)
        _remove_staging(self._out)

    def _release(self) -> None:
        """Let others in, and leave no empty folder that was made here."""
        if self._lock is not None:
            os.close(self._lock)
        if self._claim is not None:
            self._claim.release()
        for folder in self._made:
            if folder.exists() and not any(folder.iterdir()):
                folder.rmdir()

    def _check_files(self, manifest: Manifest) -> None:
        """Raise DataError where a shard or an index is not there with its size."""
        expected = {shard.name: shard.bytes for shard in manifest.shards}
        expected |= {shard.index_name: shard.index_bytes for shard in manifest.shards}
        wrong = set(expected) - set(storage.list_names(self._out))
        if not wrong:
            with threads(LOOKERS) as work:
                sizes = work.map(storage.size, [storage.join(self._out, name) for name in expected])
                wrong = {name for name, found in zip(expected, sizes, strict=True) if found != expected[name]}
        if wrong:
            raise DataError(
                f"--out {self._out}: {min(wrong)} is not as it was written; see that nobody else writes there and pack "
                "again"
            )

    def _count_finished(self) -> int:
        """Files in the staging folder that spare work."""
        names = set(storage.list_names(self.staging)) - {PLAN_NAME, OWNER_NAME}
        return sum(name.endswith(".json") for name in names)

    def _is_whole(self, info: ShardInfo, staged: set[str], placed: set[str]) -> bool:
        """Whether tar and index of a receipt are where they should be."""
        for folder, names in ((self.staging, staged), (self._out, placed)):
            if info.name in names:
                other = self.staging if info.index_name in staged else self._out
                has_index = info.index_name in staged | placed
                return (
                    has_index
                    and storage.size(storage.join(folder, info.name)) == info.bytes
                    and storage.size(storage.join(other, info.index_name)) == info.index_bytes
                )
        return False

    def _sweep(self, plan: Plan) -> None:
        """Remove the shards of a plan, wherever they are, and their receipts."""
        for folder in (self._out, self.staging):
            for name in set(storage.list_names(folder)) & (plan.files | {f"{shard}.json" for shard in plan.shards}):
                storage.remove(storage.join(folder, name))


@contextlib.contextmanager
def placing(out: str) -> Iterator[None]:
    """Tell in one line that `out` cannot be written."""
    try:
        yield
    except OSError as error:
        raise _unwritable(out, error) from error


def _sweep_temporaries(out: str) -> None:
    """Remove manifests that a killed pack had begun to write. For the holder of the lock."""
    for name in storage.list_names(out):
        if MANIFEST_TEMPORARY.fullmatch(name):
            storage.remove(storage.join(out, name))


def _remove_staging(out: str) -> None:
    """Remove the staging folder. For the holder of the lock, which goes last; owner.json is removed by its owner."""
    staging = storage.join(out, STAGING)
    if not storage.is_local(out):
        for name in storage.list_names(staging):
            if name != OWNER_NAME:
                storage.remove(storage.join(staging, name))
        return
    folder = storage.local_path(staging)
    for path in sorted(folder.iterdir(), key=lambda path: path.name == LOCK_NAME):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    try:
        folder.rmdir()
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.ENOENT):  # another process has come in, and gone again
            raise


def _unwritable(out: str, error: OSError) -> EnvironmentFault:
    return EnvironmentFault(f"--out {out} cannot be written: {error.strerror or error}")
