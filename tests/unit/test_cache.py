"""The node cache: one download per file and node, never a byte too many, never a wrong or partial file."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import sys
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import storage
from data_pipeline.cache import HOME, PART, NodeCache
from data_pipeline.errors import ConfigError, DataError, EnvironmentFault
from data_pipeline.retry import RetryPolicy
from tests.support.processes import kill_group, run, start
from tests.support.servers import FlakyServer, every, first, folder_bytes, serve_files, wait_until

FAST = RetryPolicy(deadline_s=20.0, first_delay_s=0.01, max_delay_s=0.02, attempt_timeout_s=1.0)
SIZE = 50_000
FILES = {f"/shard-{index:05d}.tar": np.random.default_rng(index).bytes(SIZE) for index in range(8)}
FINGERPRINT = "f" * 64
CHILD = """
import sys, time
from pathlib import Path
from data_pipeline.cache import NodeCache
folder, limit, uri, name, sha256, size = sys.argv[1:]
cache = NodeCache(Path(folder), int(limit))
Path(folder, f"ready-{time.monotonic_ns()}").touch()
while not Path(folder, "go").exists():
    time.sleep(0.001)
print(cache.fetch(uri, fingerprint="f" * 64, name=name, sha256=sha256, size=int(size)))
"""


def fetch(cache: NodeCache, server: FlakyServer, index: int, *, fingerprint: str = FINGERPRINT) -> Path:
    name = f"shard-{index:05d}.tar"
    sha256 = hashlib.sha256(FILES[f"/{name}"]).hexdigest()
    return cache.fetch(f"{server.url}/{name}", fingerprint=fingerprint, name=name, sha256=sha256, size=SIZE)


def child_command(folder: Path, server: FlakyServer, index: int, *, limit: int = 10 * SIZE) -> list[str]:
    name = f"shard-{index:05d}.tar"
    sha256 = hashlib.sha256(FILES[f"/{name}"]).hexdigest()
    return [sys.executable, "-c", CHILD, str(folder), str(limit), f"{server.url}/{name}", name, sha256, str(SIZE)]


def names(folder: Path) -> list[str]:
    """What lies in the cache, but for its lock."""
    return sorted(path.name for path in (folder / HOME).iterdir() if path.name != ".lock")


def gets(server: FlakyServer) -> int:
    return sum(method == "GET" for method, _ in server.requests)


def grow_older(path: Path, seconds: float) -> None:
    """As if its last use were so much longer ago."""
    used = path.stat().st_mtime - seconds
    os.utime(path, (used, used))


def test_a_file_is_fetched_once_and_verified(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, 10 * SIZE, FAST)
    with serve_files(FILES) as server:
        paths = [fetch(cache, server, 0) for _ in range(3)]
        assert len(set(paths)) == 1 and paths[0].read_bytes() == FILES["/shard-00000.tar"]
        assert gets(server) == 1 and names(tmp_path) == [paths[0].name]
        other = fetch(cache, server, 0, fingerprint="e" * 64)  # a shard of the same name in another dataset
        assert other != paths[0] and gets(server) == 2
    assert storage.in_flight() == ()


def test_threads_and_processes_that_ask_at_once_share_one_download(tmp_path: Path) -> None:
    with serve_files(FILES, plan=first("slow", "slow")) as server:
        children = [start(child_command(tmp_path, server, 0), cwd=tmp_path) for _ in range(3)]
        try:
            cache = NodeCache(tmp_path, 10 * SIZE, FAST)
            wait_until(lambda: len(list(tmp_path.glob("ready-*"))) == len(children), timeout_s=20)
            (tmp_path / "go").touch()
            with ThreadPoolExecutor(8) as pool:
                paths = set(pool.map(lambda _: fetch(cache, server, 0), range(8)))
            answers = {child.communicate(timeout=30)[0].strip() for child in children}
        finally:
            for child in children:
                kill_group(child)
        assert answers == {str(path) for path in paths} and len(paths) == 1
        assert gets(server) == 1 and server.bytes_served == SIZE
        assert paths.pop().read_bytes() == FILES["/shard-00000.tar"] and len(names(tmp_path)) == 1


def test_the_least_recently_used_file_makes_room(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, 3 * SIZE + 10, FAST)
    with serve_files(FILES) as server:
        paths = [fetch(cache, server, index) for index in range(3)]
        for age, path in zip((30, 20, 10), paths, strict=True):
            grow_older(path, age)
        fetch(cache, server, 0)  # used again: the second one is now the oldest
        grow_older(fetch(cache, server, 3), 5)
        assert [path.exists() for path in paths] == [True, False, True]
        fetch(cache, server, 4)
        assert [path.exists() for path in paths] == [True, False, False]
        assert folder_bytes(tmp_path / HOME) == 3 * SIZE and gets(server) == 5


def test_concurrent_downloads_stay_within_the_limit(tmp_path: Path) -> None:
    limit = 3 * SIZE
    cache = NodeCache(tmp_path, limit, FAST)
    seen: list[int] = []
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            with cache._folder_locked():  # so that a file is not counted before, and its successor after, its eviction
                seen.append(folder_bytes(tmp_path / HOME))
            done.wait(0.001)

    def use(number: int) -> None:
        index = number % len(FILES)
        path = fetch(cache, server, index)
        try:
            content = path.read_bytes()
        except FileNotFoundError:  # evicted meanwhile, which the limit makes likely here
            return
        assert content == FILES[f"/shard-{index:05d}.tar"]

    with serve_files(FILES, plan=every(3, "slow", "drop", "truncate")) as server, ThreadPoolExecutor(7) as pool:
        watcher = threading.Thread(target=watch)
        watcher.start()
        list(pool.map(use, range(32)))
        done.set()
        watcher.join(10)
    assert max(seen) <= limit and folder_bytes(tmp_path / HOME) == limit
    assert not [name for name in names(tmp_path) if name.endswith(PART)]


def test_a_killed_download_leaves_nothing_that_is_used(tmp_path: Path) -> None:
    (tmp_path / "go").touch()
    with serve_files(FILES, plan=lambda number: "hang" if number >= 1 else None) as server:
        child = start(child_command(tmp_path, server, 0), cwd=tmp_path)
        try:
            wait_until(lambda: gets(server) == 1, timeout_s=20)
            assert [name.endswith(PART) for name in names(tmp_path)] == [True]
            assert folder_bytes(tmp_path / HOME) == SIZE  # its space is reserved
            limited = NodeCache(tmp_path, SIZE, FAST)
            assert folder_bytes(tmp_path / HOME) == SIZE  # and not swept while it lives
        finally:
            os.kill(child.pid, signal.SIGKILL)
            kill_group(child)
        server.fail(lambda number: None)
        path = fetch(limited, server, 1)  # its space is free again
        assert path.read_bytes() == FILES["/shard-00001.tar"] and names(tmp_path) == [path.name]
        path = fetch(NodeCache(tmp_path, 10 * SIZE, FAST), server, 0)
        assert path.read_bytes() == FILES["/shard-00000.tar"]


def test_leftovers_of_killed_downloads_are_swept_and_taken_over(tmp_path: Path) -> None:
    with serve_files(FILES) as server:
        cache = NodeCache(tmp_path, 10 * SIZE, FAST)
        path = fetch(cache, server, 0)
        path.rename(path.with_name(path.name + PART))
        assert fetch(cache, server, 0) == path and names(tmp_path) == [path.name]
        path.rename(path.with_name(path.name + PART))
        NodeCache(tmp_path, 10 * SIZE, FAST)
        assert names(tmp_path) == []


def test_a_download_that_fails_leaves_nothing(tmp_path: Path) -> None:
    policy = RetryPolicy(deadline_s=0.3, first_delay_s=0.01, attempt_timeout_s=0.2)
    cache = NodeCache(tmp_path, 10 * SIZE, policy)
    with serve_files(FILES, plan=lambda number: "drop" if number else None) as server:
        with pytest.raises(EnvironmentFault, match="data.read_deadline_s"):
            fetch(cache, server, 0)
        assert names(tmp_path) == []
        server.fail(lambda number: None)
        with pytest.raises(FileNotFoundError):
            cache.fetch(f"{server.url}/absent", fingerprint=FINGERPRINT, name="absent", sha256="0" * 64, size=10)
        assert names(tmp_path) == []


@pytest.mark.parametrize("size", [SIZE, SIZE - 1, SIZE + 1, 1])
def test_a_file_that_is_not_the_one_named_is_fetched_again_once_and_refused(tmp_path: Path, size: int) -> None:
    cache = NodeCache(tmp_path, 10 * SIZE, FAST)
    uri_name = "shard-00000.tar"
    with serve_files(FILES) as server:
        for _ in range(2):
            server.fail(lambda number: None)
            with pytest.raises(DataError, match=r"shard-00000.tar is not the file the manifest names \(sha256\)"):
                cache.fetch(
                    f"{server.url}/{uri_name}", fingerprint=FINGERPRINT, name=uri_name, sha256="0" * 64, size=size
                )
            assert gets(server) == 2 and names(tmp_path) == []


def test_bytes_damaged_on_the_way_are_fetched_again(tmp_path: Path) -> None:
    files = dict(FILES)
    damaged = bytearray(FILES["/shard-00000.tar"])
    damaged[SIZE // 2] ^= 1
    files["/shard-00000.tar"] = bytes(damaged)

    def heal(number: int) -> None:
        if number == 2:  # size and content have been served once
            files["/shard-00000.tar"] = FILES["/shard-00000.tar"]

    with serve_files(files, plan=heal) as server:
        cache = NodeCache(tmp_path, 10 * SIZE, FAST)
        assert fetch(cache, server, 0).read_bytes() == FILES["/shard-00000.tar"]
        assert gets(server) == 2


def test_a_cached_file_that_lost_bytes_is_fetched_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = NodeCache(tmp_path, SIZE, FAST)
    with serve_files(FILES) as server:
        path = fetch(cache, server, 0)
        os.truncate(path, SIZE // 2)
        assert fetch(cache, server, 0).read_bytes() == FILES["/shard-00000.tar"] and gets(server) == 2
        assert "fetching it again" in caplog.text


def test_an_evicted_file_stays_readable_to_who_has_it_open(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, SIZE, FAST)
    with serve_files(FILES) as server:
        path = fetch(cache, server, 0)
        with open(path, "rb") as file:
            fetch(cache, server, 1)
            assert not path.exists() and file.read() == FILES["/shard-00000.tar"]


def test_files_are_used_at_most_once_a_second_on_disk(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, 10 * SIZE, FAST)
    with serve_files(FILES) as server:
        path = fetch(cache, server, 0)
        grow_older(path, 5)
        before = path.stat().st_mtime_ns
        fetch(cache, server, 0)
        touched = path.stat().st_mtime_ns
        assert touched - before > 4e9
        fetch(cache, server, 0)
        assert path.stat().st_mtime_ns == touched


def test_a_limit_too_small_names_the_key(tmp_path: Path) -> None:
    with serve_files(FILES) as server:
        with pytest.raises(ConfigError, match="data.cache_gb"):
            fetch(NodeCache(tmp_path, SIZE - 1, FAST), server, 0)
        assert server.requests == [] and names(tmp_path) == []
    with pytest.raises(ConfigError, match="data.cache_gb"):
        NodeCache(tmp_path, 0)


def test_a_folder_that_cannot_be_used_names_the_key(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(EnvironmentFault, match="data.cache_dir"):
        NodeCache(tmp_path / "file", SIZE)


def test_files_of_others_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.part").write_bytes(bytes(10 * SIZE))
    with serve_files(FILES) as server:
        cache = NodeCache(tmp_path, SIZE, FAST)
        fetch(cache, server, 0)
        fetch(cache, server, 1)
    assert (tmp_path / "thesis.part").stat().st_size == 10 * SIZE


def test_memory_and_local_locations_are_cached_alike(tmp_path: Path) -> None:
    content = FILES["/shard-00000.tar"]
    sha256 = hashlib.sha256(content).hexdigest()
    cache = NodeCache(tmp_path / "cache", 10 * SIZE, FAST)
    for place in (f"memory://{uuid.uuid4().hex}/x.tar", str(tmp_path / "x.tar")):
        storage.write_bytes_atomic(place, content)
        path = cache.fetch(place, fingerprint=hashlib.sha256(place.encode()).hexdigest(), name="x.tar",
                           sha256=sha256, size=SIZE)  # fmt: skip
        storage.remove(place)
        assert path.read_bytes() == content


def _fetch_in_child(cache: NodeCache, url: str) -> str:
    name = "shard-00000.tar"
    sha256 = hashlib.sha256(FILES[f"/{name}"]).hexdigest()
    return str(cache.fetch(f"{url}/{name}", fingerprint=FINGERPRINT, name=name, sha256=sha256, size=SIZE))


def test_a_cache_goes_to_forked_processes(tmp_path: Path) -> None:
    with serve_files(FILES) as server:
        cache = NodeCache(tmp_path, 10 * SIZE, FAST)
        fetch(cache, server, 1)  # the parent has connections that the child must not use
        with multiprocessing.get_context("fork").Pool(2) as pool:
            paths = pool.starmap_async(_fetch_in_child, [(cache, server.url)] * 4).get(timeout=20)
        assert set(paths) == {str(fetch(cache, server, 0))} and gets(server) == 2


FULL_DISK = """
import hashlib, sys
from pathlib import Path
from data_pipeline import cache as module
from data_pipeline.errors import EnvironmentFault
from data_pipeline.retry import RetryPolicy
folder, source = Path(sys.argv[1]), Path(sys.argv[2])
cache = module.NodeCache(folder, 10**9, RetryPolicy())
def fetch(name):
    data = (source / name).read_bytes()
    return cache.fetch(str(source / name), fingerprint="f", name=name, sha256=hashlib.sha256(data).hexdigest(),
                       size=len(data))
kept = [fetch(name).name for name in ("a", "b", "c", "d")]
print(kept, sorted(path.name for path in (folder / module.HOME).iterdir() if path.name != ".lock"))
try:
    fetch("large")
except EnvironmentFault as error:
    print(error)
print(sorted(path.name for path in (folder / module.HOME).iterdir() if path.name != ".lock"))
"""


def test_a_full_disk_evicts_first_and_is_told_when_nothing_is_left_to_evict(tmp_path: Path) -> None:
    source, disk = tmp_path / "source", tmp_path / "disk"
    source.mkdir()
    disk.mkdir()
    for name in "abcd":
        (source / name).write_bytes(name.encode() * 400_000)
    (source / "large").write_bytes(bytes(1_500_000))
    mounted = f"mount -t tmpfs -o size=1m none {disk}"
    if run(["unshare", "-rm", "sh", "-c", mounted], cwd=tmp_path, timeout_s=10).code != 0:
        pytest.skip("a small disk cannot be mounted here")
    command = f"{mounted} && exec {sys.executable} -c '{FULL_DISK}' {disk} {source}"
    finished = run(["unshare", "-rm", "sh", "-c", command], cwd=tmp_path, timeout_s=30)
    lines = finished.stdout.splitlines()
    assert finished.code == 0 and len(lines) == 3, finished.text
    assert lines[0] == "['f-a', 'f-b', 'f-c', 'f-d'] ['f-c', 'f-d']"
    assert lines[1].startswith("no space for 1500000 bytes") and "data.cache_dir" in lines[1]
    assert "data.cache_gb" in lines[1] and lines[2] == "[]"
