"""The journal: what was appended comes back, whatever happened in between."""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path

import pytest

from rddm_dist.tracking.journal import CHUNK, Journal, follow_journal, read_journal


def test_records_come_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    journal = Journal(path)
    for step in range(3):
        journal.append({"step": step, "metrics": {"train/loss": 0.1 * step}})
    assert read_journal(path) == [{"step": step, "metrics": {"train/loss": 0.1 * step}} for step in range(3)]
    journal.close()


def test_a_journal_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert read_journal(tmp_path / "metrics.jsonl") == []


def test_reopening_appends(tmp_path: Path) -> None:
    for step in range(3):
        journal = Journal(tmp_path / "metrics.jsonl")
        journal.append({"step": step})
        journal.close()
    assert [record["step"] for record in read_journal(tmp_path / "metrics.jsonl")] == [0, 1, 2]


@pytest.mark.parametrize("torn", ['{"step": 1, "met', "x" * (2 * CHUNK + 5)])
def test_a_torn_last_line_is_ignored_and_then_cut_off(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step":0}\n' + torn)
    assert read_journal(path) == [{"step": 0}]
    journal = Journal(path)
    journal.append({"step": 1})
    journal.close()
    assert path.read_text() == '{"step":0}\n{"step":1}\n'


def test_a_journal_of_one_torn_line_starts_anew(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"st')
    Journal(path).close()
    assert path.read_bytes() == b""


def test_numbers_that_json_lacks_are_strings_that_float_reads(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    journal = Journal(path)
    journal.append({"metrics": {"a": math.nan, "b": math.inf, "c": [-math.inf, 1.5]}})
    journal.close()
    metrics = json.loads(path.read_text(), parse_constant=pytest.fail)["metrics"]
    assert metrics == {"a": "nan", "b": "inf", "c": ["-inf", 1.5]}
    assert math.isnan(float(metrics["a"])) and float(metrics["b"]) == math.inf


def test_a_follower_hears_what_comes_after_it_began(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step":0}\n{"st')
    records = follow_journal(path)
    journal = Journal(path)
    assert list(records()) == []
    journal.append({"step": 1})
    journal.append({"step": 2})
    assert list(records()) == [{"step": 1}, {"step": 2}]
    assert list(records()) == []
    journal.append({"step": 3})
    assert list(records()) == [{"step": 3}]
    journal.close()


def test_a_follower_may_begin_before_the_journal(tmp_path: Path) -> None:
    records = follow_journal(tmp_path / "metrics.jsonl")
    assert list(records()) == []
    journal = Journal(tmp_path / "metrics.jsonl")
    journal.append({"step": 1})
    assert list(records()) == [{"step": 1}]
    journal.close()


def test_threads_do_not_mix_their_lines(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "metrics.jsonl")

    def write(writer: int) -> None:
        for step in range(50):
            journal.append({"writer": writer, "step": step, "text": "x" * 500})

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    journal.close()
    records = read_journal(tmp_path / "metrics.jsonl")
    for writer in range(4):
        assert [record["step"] for record in records if record["writer"] == writer] == list(range(50))
