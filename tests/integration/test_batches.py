"""Thousands of items in bounded memory: skipped, failed, resumed and replayed one by one."""

from __future__ import annotations

import os
import random
import signal
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import FleetMaker
from fleet_runner import Fleet
from polling import eventually
from services import Service, free_port
from session_fleets import statement
from sqlalchemy import create_engine, text

#: Opens at the third failure of three.
QUICK = {"min_calls": 3, "failure_rate": 0.5, "jitter": 0, "open_s": 2}


def report_of(fleet: Fleet, result: Any, within_s: float = 60) -> dict[str, Any]:
    """What a batch came to, once its task has ended well."""
    texts = "\n".join(worker.text for worker in fleet.workers)
    eventually(
        lambda: result.state in ("SUCCESS", "FAILURE"),
        within_s=within_s,
        what=lambda: texts[-4000:],
    )
    report: dict[str, Any] = result.get(timeout=1)
    return report


def counts(report: dict[str, Any]) -> tuple[int, int, int]:
    """Of the three things that an item may come to."""
    return report["ok"], report["skipped"], report["failed"]


def rows_of(fleet: Fleet, task_id: str) -> list[int]:
    """The rows that a task has worked at, in order."""
    return [line[1] for line in fleet.notes("row") if line[2] == task_id]


def runs_of(fleet: Fleet, result: Any) -> list[int]:
    """The retries that each run of a task had counted."""
    return [line[2] for line in fleet.notes() if line[1:2] == [result.id]][:]


def settled(fleet: Fleet, task_id: str) -> list[Any]:
    """What the main process has heard of a task's batches."""
    return [line[2] for line in fleet.notes("settled") if line[1] == task_id]


def test_ten_thousand_rows_survive_three_kills(make_fleet: FleetMaker) -> None:
    """What is bad is skipped with its id, the rest is done, and memory stays flat."""
    chance = random.Random(20261130)
    bad = sorted(chance.sample(range(10_000), 37))
    deaths = sorted(chance.sample(range(1_000, 10_000), 3))
    fleet = make_fleet("redis")
    fleet.worker(concurrency=1)

    result = fleet.send("import_fat_rows", 10_000, bad, deaths, 500)
    report = report_of(fleet, result, 120)

    assert counts(report) == (9_963, 37, 0)
    assert [int(sample["id"]) for sample in report["samples"]] == bad
    assert report["errors"] == {"ValueError": 37}
    lines = Path(f"{fleet.ledger}.rows").read_text().split()
    done = Counter(map(int, lines))
    assert set(done) == set(range(10_000)) - set(bad)
    again = {row for row, times in done.items() if times > 1}
    chunks = {row // 500 for row in deaths}
    assert {row // 500 for row in again} <= chunks
    assert len(fleet.notes("import_fat_rows")) == 4
    (grown_mib,) = [line[1] for line in fleet.notes("grown_mib")]
    # The last run read 320 MB; a chunk has 16.
    assert grown_mib < 100
    # Killed runs told nothing; the last one tells for them.
    expected = {"name": "rows", "ok": 9_963, "skipped": 37, "failed": 0}
    assert eventually(lambda: settled(fleet, result.id)) == [[expected]]


@pytest.mark.parametrize(
    ("broker", "store"),
    [("redis", "redis"), ("rabbitmq", "postgresql")],
)
def test_a_deploy_a_kill_and_a_retry_go_on_with_the_batch(
    make_fleet: FleetMaker, tmp_path: Path, broker: str, store: str
) -> None:
    """The next run begins where the last one's committed items end."""
    fleet = make_fleet(broker, store="sqlite" if store == "redis" else store)
    first = fleet.worker(concurrency=3)
    gate = tmp_path / "gate"
    deployed = fleet.send("import_slowly", 60, 25, str(gate))
    killed = fleet.send("import_slowly", 60, 25, "", "kill")
    retried = fleet.send("import_slowly", 60, 25, "", "retry")
    assert counts(report_of(fleet, killed)) == (60, 0, 0)
    assert counts(report_of(fleet, retried)) == (60, 0, 0)
    eventually(lambda: rows_of(fleet, deployed.id)[-1:] == [25])

    os.killpg(first.pid, signal.SIGTERM)
    eventually(lambda: "stopping (SIGTERM)" in first.text, within_s=10)
    gate.touch()
    assert first.wait(within_s=20) == 0
    fleet.worker(concurrency=1)

    assert counts(report_of(fleet, deployed)) == (60, 0, 0)
    assert rows_of(fleet, deployed.id) == list(range(60))
    assert rows_of(fleet, killed.id) == [*range(26), *range(20, 60)]
    assert rows_of(fleet, retried.id) == [*range(26), *range(25, 60)]
    assert runs_of(fleet, deployed)[:2] == [0, 0]
    assert first.outcomes()["snoozed"] == 1


@pytest.mark.parametrize("pool", ["threads", "gevent", "solo"])
def test_every_pool_has_batches(
    make_fleet: FleetMaker, tmp_path: Path, pool: str
) -> None:
    """Threads that help, an open circuit, a retry and a deploy are as in a child."""
    fleet = make_fleet("redis", resilience_circuits={"bank": QUICK})
    first = fleet.worker(pool=pool, concurrency=4)
    down, gate = tmp_path / "down", tmp_path / "gate"
    down.touch()

    _threads_wait_together(fleet)
    _an_open_circuit_snoozes_it(fleet, down)
    retried = fleet.send("import_slowly", 60, 25, "", "retry")
    assert counts(report_of(fleet, retried)) == (60, 0, 0)
    assert rows_of(fleet, retried.id) == [*range(26), *range(25, 60)]

    deployed = fleet.send("import_slowly", 60, 25, str(gate))
    eventually(lambda: rows_of(fleet, deployed.id)[-1:] == [25])
    first.signal(signal.SIGTERM)
    eventually(lambda: "stopping (SIGTERM)" in first.text, within_s=10)
    gate.touch()
    assert first.wait(within_s=20) == 0
    fleet.worker(pool=pool, concurrency=4)

    assert counts(report_of(fleet, deployed)) == (60, 0, 0)
    assert rows_of(fleet, deployed.id) == list(range(60))
    assert runs_of(fleet, deployed)[:2] == [0, 0]


def test_what_a_batch_meets_in_a_day(
    make_fleet: FleetMaker, servers: Callable[[str], Service], tmp_path: Path
) -> None:
    """One fleet: circuit, soft limit, threads, progress, limits, kept items, database."""
    fleet = make_fleet("redis", resilience_circuits={"bank": QUICK})
    port = free_port()
    fleet.worker("--metrics-port", f"127.0.0.1:{port}", concurrency=2)
    down = tmp_path / "down"
    down.touch()

    _an_open_circuit_snoozes_it(fleet, down)
    _a_soft_limit_cuts_it_in_slices(fleet)
    _threads_wait_together(fleet)
    _its_progress_is_told(fleet, tmp_path)
    _too_many_errors_fail_it_and_a_replay_goes_on(fleet, tmp_path)
    _what_stops_it_is_no_items_fault(fleet, tmp_path)
    _a_failed_item_is_replayed_alone(fleet)
    _a_failed_insert_does_not_poison_its_chunk(fleet, servers("postgresql").url)
    _nothing_is_doubled_in_the_table_when_it_is_killed(fleet, servers("postgresql").url)
    _its_items_are_a_metric(port)


def _an_open_circuit_snoozes_it(fleet: Fleet, down: Path) -> None:
    """Without a retry spent, and what had ended is not done again."""
    result = fleet.send("call_for_each", str(down), 80)
    eventually(lambda: result.state == "RETRY", what=lambda: fleet.workers[0].text)
    down.unlink()

    report = report_of(fleet, result)

    failed = [line[1] for line in fleet.notes("failed_call")]
    assert 3 <= len(failed) <= 6
    assert counts(report) == (80 - len(failed), 0, len(failed))
    assert [int(sample["id"]) for sample in report["samples"]] == failed
    assert report["errors"] == {"ConnectionError": len(failed)}
    assert rows_of(fleet, result.id) == [n for n in range(80) if n not in failed]
    runs = [line[2] for line in fleet.notes("call_for_each")]
    assert len(runs) >= 2
    assert set(runs) == {0}


def _a_soft_limit_cuts_it_in_slices(fleet: Fleet) -> None:
    """A run that came on is followed by another; no item is left out."""
    result = fleet.send("import_in_slices", 14, 0.2)

    assert counts(report_of(fleet, result)) == (14, 0, 0)
    assert rows_of(fleet, result.id) == list(range(14))
    runs = [line[2] for line in fleet.notes("import_in_slices")]
    assert len(runs) >= 3
    assert set(runs) == {0}


def _threads_wait_together(fleet: Fleet) -> None:
    """As part of the run, and what they bring is in order."""
    result = fleet.send("wait_for_each", 40, 0.2)

    report = report_of(fleet, result)

    assert counts(report) == (36, 4, 0)
    assert [sample["id"] for sample in report["samples"]] == ["3", "13", "23", "33"]
    ((_, elapsed_s, fetched),) = fleet.notes("waited")
    assert fetched == [[n, result.id, result.id] for n in range(40) if n % 10 != 3]
    assert elapsed_s < 40 * 0.2 / 2


def _its_progress_is_told(fleet: Fleet, folder: Path) -> None:
    """To whoever asks for the task's result."""
    gate = folder / "gate"
    result = fleet.send("import_slowly", 30, 15, str(gate))

    eventually(lambda: result.state == "PROGRESS")

    told = {"name": "rows", "ok": 10, "skipped": 0, "failed": 0, "total": 30}
    assert result.info == told
    gate.touch()
    assert counts(report_of(fleet, result)) == (30, 0, 0)


def _too_many_errors_fail_it_and_a_replay_goes_on(fleet: Fleet, folder: Path) -> None:
    """With the counts in the reason, and what went wrong before is forgiven."""
    mended = folder / "mended"
    result = fleet.send("import_too_many", str(mended))
    record = fleet.record_of(result.id)
    assert record["exception"] == "celery_resilience.errors.TooManyErrors"
    assert "more than max_errors=5: 0 skipped and 6 failed, 26 ok" in record["message"]
    mended.touch()

    fleet.failed.replay([record["id"]])
    eventually(lambda: fleet.records()[result.id]["state"] == "resolved")

    rows = rows_of(fleet, result.id)
    assert rows == [*range(20), *range(20, 31, 2), *range(30, 40)]
    total = Counter[str]()
    for (told,) in settled(fleet, result.id):
        total.update({name: told[name] for name in ("ok", "skipped", "failed")})
    # Five of them went wrong in a chunk that was committed.
    assert total == {"ok": 35, "skipped": 0, "failed": 5}


def _what_stops_it_is_no_items_fault(fleet: Fleet, folder: Path) -> None:
    """The task has the exception itself where the batch has it in `stop`."""
    result = fleet.send("import_with_stop", 10)

    record = fleet.record_of(result.id)

    assert record["exception"] == "PermissionError"
    assert rows_of(fleet, result.id) == [0]


def _a_failed_item_is_replayed_alone(fleet: Fleet) -> None:
    """It is a failed task of its own, with nothing in it that is not to be shown."""
    result = fleet.send("import_or_keep", 20, [3, 17], "hunter2hunter2")
    report = report_of(fleet, result)
    assert counts(report) == (18, 0, 2)
    assert [sample["message"] for sample in report["samples"]] == [
        "'row 3 ***'",
        "'row 17 ***'",
    ]
    kept = fleet.records(task="import_one")
    assert sorted(record["args"] for record in kept.values()) == ["(17,)", "(3,)"]
    three = next(r for r in kept.values() if r["args"] == "(3,)")
    assert three["parent_id"] == result.id
    assert three["exception"] == "KeyError"
    assert "in import_or_keep" in three["traceback"]

    fleet.failed.replay([three["id"]])

    eventually(
        lambda: fleet.records()[three["task_id"]]["state"] == "resolved", within_s=20
    )
    assert [line[1] for line in fleet.notes("one")] == [3]
    others = fleet.records(task="import_one", state="unresolved")
    assert [record["args"] for record in others.values()] == ["(17,)"]


def _a_failed_insert_does_not_poison_its_chunk(fleet: Fleet, url: str) -> None:
    """Each item has a savepoint."""
    table = _empty_table(url)
    ids = [1, 2, 2, 3, 4, 4, 5, 6, 7]

    report = report_of(fleet, fleet.send("import_into_table", url, ids))

    assert counts(report) == (7, 0, 2)
    assert [sample["id"] for sample in report["samples"]] == ["2", "4"]
    assert table() == [1, 2, 3, 4, 5, 6, 7]


def _nothing_is_doubled_in_the_table_when_it_is_killed(fleet: Fleet, url: str) -> None:
    """A chunk is in one transaction, which a killed run has not committed."""
    table = _empty_table(url)

    result = fleet.send("import_into_table", url, list(range(10)), "kill")
    report = report_of(fleet, result)

    assert counts(report) == (10, 0, 0)
    assert table() == list(range(10))


def _its_items_are_a_metric(port: int) -> None:
    """Of the worker, by batch and by what became of them."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as got:
        text = got.read().decode()

    assert 'batch_items_total{batch="waits",outcome="ok"} 36\n' in text, text
    assert 'batch_items_total{batch="waits",outcome="skipped"} 4\n' in text


def _empty_table(url: str) -> Callable[[], list[int]]:
    """Makes one; returns what tells its ids."""
    statement(url, "DROP TABLE IF EXISTS bought")
    statement(url, "CREATE TABLE bought (id INT PRIMARY KEY)")

    def ids() -> list[int]:
        engine = create_engine(url)
        with engine.connect() as connection:
            found = connection.execute(text("SELECT id FROM bought ORDER BY id"))
            rows = list(found.scalars())
        engine.dispose()
        return rows

    return ids
