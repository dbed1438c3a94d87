"""The node cache: one download per file and node, never a byte too many, never a wrong or partial file."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import multiprocessing
import os
import shutil
import signal
import stat
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import storage
from data_pipeline.cache import HOME, LOCK, PART, POLL_S, NodeCache, is_open_to_strangers
from data_pipeline.errors import ConfigError, DataError, EnvironmentFault
from data_pipeline.retry import RetryPolicy
from tests.support.processes import kill_group, run, start
from tests.support.servers import Answer, FlakyServer, Request, every, first, folder_bytes, serve_files, wait_until

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


def used_bytes(folder: Path) -> int:
    """Bytes of all copies, finished or not."""
    return folder_bytes(folder / HOME) - (folder / HOME / LOCK).stat().st_size


def counted_bytes(folder: Path) -> int:
    """What the lock says that is."""
    return int((folder / HOME / LOCK).read_bytes() or -1)


def fetch_local(cache: NodeCache, source: Path) -> Path:
    """A local file through the cache, which treats it like any other."""
    data = source.read_bytes()
    sha256 = hashlib.sha256(data).hexdigest()
    return cache.fetch(str(source), fingerprint=FINGERPRINT, name=source.name, sha256=sha256, size=len(data))


def make_sources(folder: Path, count: int, size: int) -> list[Path]:
    """Files of `size` bytes, each filled with its own byte."""
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{index}.idx" for index in range(count)]
    for index, path in enumerate(paths):
        path.write_bytes(bytes([index]) * size)
    return paths


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
        assert used_bytes(tmp_path) == 3 * SIZE and gets(server) == 5


def test_concurrent_downloads_stay_within_the_limit(tmp_path: Path) -> None:
    limit = 3 * SIZE
    cache = NodeCache(tmp_path, limit, FAST)
    seen: list[int] = []
    counted: list[int] = []
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            with cache._folder_locked():  # so that a file is not counted before, and its successor after, its eviction
                seen.append(used_bytes(tmp_path))
                counted.append(counted_bytes(tmp_path))
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
    assert max(seen) <= limit and used_bytes(tmp_path) == limit
    assert all(count >= bytes_ for count, bytes_ in zip(counted, seen, strict=True) if count >= 0)
    assert not [name for name in names(tmp_path) if name.endswith(PART)]


def test_nothing_is_evicted_for_a_file_that_must_wait_all_the_same(tmp_path: Path) -> None:
    sizes = {"kept": 40_000, "slow": 50_000, "large": 60_000}
    files = {f"/{name}": name[:1].encode() * size for name, size in sizes.items()}
    gate = threading.Event()
    cache = NodeCache(tmp_path, 100_000, FAST)
    with serve_files(files) as server, ThreadPoolExecutor(2) as pool:
        answer = server.answer

        def answer_late(request: Request) -> Answer:
            if request.path == "/slow" and request.method == "GET":
                gate.wait(10)
            return answer(request)

        def get(name: str) -> Path:
            sha256 = hashlib.sha256(files[f"/{name}"]).hexdigest()
            return cache.fetch(f"{server.url}/{name}", fingerprint="f", name=name, sha256=sha256, size=sizes[name])

        server.answer = answer_late
        try:
            kept = get("kept")
            slow = pool.submit(get, "slow")
            wait_until(lambda: used_bytes(tmp_path) == 90_000)
            large = pool.submit(get, "large")
            wait_until(lambda: f"f-large{PART}" in names(tmp_path))
            time.sleep(3 * POLL_S)
            assert kept.exists() and get("kept") == kept and not large.done()
        finally:
            gate.set()
        slow.result(10)
        assert large.result(10).read_bytes() == files["/large"] and used_bytes(tmp_path) <= 100_000


def test_a_discarded_copy_is_fetched_anew_and_stays_readable_to_who_has_it_open(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, SIZE, FAST)
    with serve_files(FILES) as server:
        path = fetch(cache, server, 0)
        path.write_bytes(bytes(SIZE))  # damaged, and of the right length
        assert fetch(cache, server, 0).read_bytes() == bytes(SIZE) and gets(server) == 1
        with open(path, "rb") as file:
            cache.discard(path)
            cache.discard(path)
            assert not path.exists() and file.read() == bytes(SIZE)
        assert fetch(cache, server, 0).read_bytes() == FILES["/shard-00000.tar"] and gets(server) == 2


def test_the_folder_is_listed_once_by_a_miss_that_must_evict_and_by_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = make_sources(tmp_path / "source", 40, 100)
    cache = NodeCache(tmp_path, 30 * 100)
    listings = 0
    real = os.scandir

    def counting(path: str | Path) -> Iterator[os.DirEntry[str]]:
        nonlocal listings
        listings += Path(path) == tmp_path / HOME
        return real(path)

    monkeypatch.setattr(os, "scandir", counting)
    seen = []
    for source in sources:
        for _ in range(2):
            path = fetch_local(cache, source)
            with contextlib.suppress(FileNotFoundError):
                assert path.read_bytes() == source.read_bytes()
        seen.append(listings)
    # The first one counts what is there.
    assert seen == [1] * 30 + list(range(2, 12))
    assert used_bytes(tmp_path) == counted_bytes(tmp_path) == 30 * 100


def test_a_count_too_high_evicts_nothing(tmp_path: Path) -> None:
    sources = make_sources(tmp_path / "source", 3, 100)
    cache = NodeCache(tmp_path, 200)
    first_path, second_path = (fetch_local(cache, source) for source in sources[:2])
    first_path.unlink()  # by hand
    third_path = fetch_local(cache, sources[2])
    assert second_path.exists() and third_path.exists()


@pytest.mark.parametrize("count", [b"", b"0" * 20, b"9" * 20, b"0" * 7, b"x" * 20])
def test_a_new_cache_does_not_trust_the_count_it_finds(tmp_path: Path, count: bytes) -> None:
    sources = make_sources(tmp_path / "source", 4, 100)
    for source in sources[:2]:
        fetch_local(NodeCache(tmp_path, 200), source)
    (tmp_path / HOME / LOCK).write_bytes(count)
    cache = NodeCache(tmp_path, 200)
    for source in sources[2:]:
        assert fetch_local(cache, source).read_bytes() == source.read_bytes()
        assert used_bytes(tmp_path) == counted_bytes(tmp_path) == 200


def test_a_killed_download_leaves_nothing_that_is_used(tmp_path: Path) -> None:
    (tmp_path / "go").touch()
    with serve_files(FILES, plan=lambda number: "hang" if number >= 1 else None) as server:
        child = start(child_command(tmp_path, server, 0), cwd=tmp_path)
        try:
            wait_until(lambda: gets(server) == 1, timeout_s=20)
            assert [name.endswith(PART) for name in names(tmp_path)] == [True]
            assert used_bytes(tmp_path) == SIZE  # its space is reserved
            limited = NodeCache(tmp_path, SIZE, FAST)
            assert used_bytes(tmp_path) == SIZE  # and not swept while it lives
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


def test_what_the_local_disk_refuses_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_sources(tmp_path / "source", 1, 100)[0]
    cache = NodeCache(tmp_path, SIZE)
    with pytest.raises(EnvironmentFault, match=r"^the cache cannot use [^\n]*data.cache_dir$"):
        cache.fetch(str(source), fingerprint="f", name="x" * 300, sha256="0" * 64, size=100)

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(EnvironmentFault, match=r"^the cache cannot use [^\n]*Errno 5[^\n]*data.cache_dir$"):
            fetch_local(cache, source)
    assert names(tmp_path) == []
    # What the source refuses is not the disk's fault.
    with pytest.raises(FileNotFoundError):
        cache.fetch(str(tmp_path / "absent"), fingerprint="f", name="x", sha256="0" * 64, size=100)
    (tmp_path / HOME / LOCK).unlink()
    (tmp_path / HOME / LOCK).mkdir()
    for use in (lambda: NodeCache(tmp_path, SIZE), lambda: fetch_local(cache, source)):
        with pytest.raises(EnvironmentFault, match=r"^the cache cannot use [^\n]*\.lock [^\n]*data.cache_dir$"):
            use()


def test_a_folder_made_for_the_cache_is_its_users_alone(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    path = fetch_local(NodeCache(folder, SIZE), make_sources(tmp_path / "source", 1, 100)[0])
    modes = [stat.S_IMODE(place.stat().st_mode) for place in (folder, folder / HOME, path, folder / HOME / LOCK)]
    assert modes == [0o700, 0o700, 0o600, 0o600]


@pytest.mark.parametrize(
    ("mode", "user", "group", "expected"),
    [
        (0o777, 1, 1, False),  # one's own
        (0o755, 2, 1, False),
        (0o777, 2, 1, True),
        (0o1777, 2, 1, True),  # its owner may do what the sticky bit forbids to others
        (0o2770, 2, 1, False),
        (0o2777, 2, 1, False),
        (0o2777, 2, 2, True),  # a group of others
        (0o2757, 2, 1, True),  # the group may not write
        (0o770, 2, 1, False),
    ],
)
def test_strangers_are_who_may_write_without_being_the_owner_or_of_the_group(
    mode: int, user: int, group: int, expected: bool
) -> None:
    found = os.stat_result((stat.S_IFDIR | mode, 0, 0, 1, user, group, 0, 0, 0, 0))
    assert is_open_to_strangers(found, owners=(1,), groups={1}) is expected


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder that other users reach; the test changes users, which root alone may do."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def as_user(user: int, group: int, act: Callable[[], object]) -> str:
    """What `act` answers in a child process of another user, or the error it raises."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(group)
            os.setuid(user)
            os.umask(0o077)
            signal.alarm(10)
            try:
                answer = str(act())
            except EnvironmentFault as error:
                answer = f"EnvironmentFault: {error}"
            os.write(writer, answer.encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader) as file:
        answer = file.read()
    os.waitpid(child, 0)
    return answer


def test_a_folder_of_another_user_that_anybody_may_write_to_is_refused(public_folder: Path) -> None:
    for place in ("folder", "home"):
        folder = public_folder / place
        home = folder / HOME
        home.mkdir(parents=True)
        changed = folder if place == "folder" else home
        changed.chmod(0o777)
        NodeCache(folder, SIZE)  # one's own
        os.chown(changed, 54_321, 54_321)
        with pytest.raises(EnvironmentFault, match=r"belongs to user 54321 and anybody may write[^\n]*data.cache_dir"):
            NodeCache(folder, SIZE)
    (public_folder / "tmp").mkdir()
    (public_folder / "tmp").chmod(0o1777)  # root's, as /tmp is
    assert as_user(54_321, 54_321, lambda: NodeCache(public_folder / "tmp", SIZE).limit_bytes) == str(SIZE)
    assert (public_folder / "tmp" / HOME).stat().st_mode & 0o7777 == 0o700
    answer = as_user(54_322, 54_321, lambda: NodeCache(public_folder / "tmp", SIZE))
    assert answer.startswith("EnvironmentFault: the cache cannot use") and "data.cache_dir" in answer


def test_a_folder_that_a_group_shares_is_shared(public_folder: Path) -> None:
    sources = make_sources(public_folder / "source", 3, 100)
    folder, group = public_folder / "cache", 54_321
    folder.mkdir()
    os.chown(folder, 0, group)
    folder.chmod(0o2770)

    def get(index: int) -> bytes:
        return fetch_local(NodeCache(folder, 200), sources[index]).read_bytes()[:1]

    def get_with(user: int, index: int) -> str:
        return as_user(user, group, lambda: get(index))

    assert get_with(54_321, 0) == str(b"\x00")
    grow_older(folder / HOME / f"{FINGERPRINT[:32]}-0.idx", 10)
    assert get_with(54_322, 0) == str(b"\x00")  # and marks it as used
    assert get_with(54_322, 1) == str(b"\x01")
    grow_older(folder / HOME / f"{FINGERPRINT[:32]}-0.idx", 10)
    assert get_with(54_322, 2) == str(b"\x02")  # evicts the other user's
    assert [name[33:] for name in names(folder)] == ["1.idx", "2.idx"]
    os.chown(folder / HOME / LOCK, 0, 0)
    answer = get_with(54_321, 1)
    assert answer.startswith("EnvironmentFault: the cache cannot use") and "PermissionError" in answer
    assert "data.cache_dir" in answer and "\n" not in answer


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
