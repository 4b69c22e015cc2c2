"""A broken dependency is left alone by the whole fleet, and no task is lost by it."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any

import pytest
from conftest import FleetMaker
from fleet_runner import Fleet
from polling import always, eventually
from services import Service

#: A broker, and the store of its circuits.
FLEETS = [("redis", "redis"), ("rabbitmq", "postgresql"), ("filesystem", "sqlite")]

#: Seconds for which a dependency is away while many tasks need it.
OUTAGE_S = 20

#: Opens at the third failure of three.
QUICK: dict[str, Any] = {"min_calls": 3, "failure_rate": 0.5, "jitter": 0}


@pytest.fixture
def down(tmp_path: Path) -> Path:
    """The dependency is away while this file is there."""
    path = tmp_path / "down"
    path.touch()
    return path


def fleet_with(make_fleet: FleetMaker, *, open_s: float, **bank: Any) -> Fleet:
    """On Redis alone."""
    return make_fleet(
        "redis", resilience_circuits={"bank": {**QUICK, "open_s": open_s, **bank}}
    )


def trip(fleet: Fleet, down: Path) -> None:
    """Let it open."""
    for _ in range(3):
        seen = len(fleet.notes("failed_call"))
        fleet.send("pay", str(down))
        eventually(lambda seen=seen: len(fleet.notes("failed_call")) > seen)
    eventually(
        lambda: "circuit bank opened" in texts(fleet), what=lambda: texts(fleet)[-3000:]
    )
    # Until all know it: what a process goes by may be half a second old.
    always(lambda: "circuit bank closed" not in texts(fleet), for_s=1.5)


def texts(fleet: Fleet) -> str:
    """What all workers have logged."""
    return "\n".join(worker.text for worker in fleet.workers)


def result_of(fleet: Fleet, result: Any, within_s: float = 30) -> Any:
    """What a task came to."""
    eventually(result.ready, within_s=within_s, what=lambda: texts(fleet)[-4000:])
    return result.get(timeout=1)


@pytest.mark.parametrize(("broker", "store"), FLEETS)
def test_tasks_wait_for_an_open_circuit_and_spend_no_retry(
    make_fleet: FleetMaker, down: Path, broker: str, store: str
) -> None:
    """They are sent again, and done once the dependency is back."""
    fleet = make_fleet(
        broker,
        store="sqlite" if store == "redis" else store,
        resilience_circuits={"bank": {**QUICK, "open_s": 8}},
    )
    fleet.worker()
    trip(fleet, down)

    down.unlink()  # what becomes of a probe is not this test's
    waiting = [fleet.send("pay", str(down)) for _ in range(5)]
    eventually(
        lambda: texts(fleet).count("task snoozed: ") >= 5,
        what=lambda: texts(fleet)[-3000:],
    )

    assert [result_of(fleet, it, 60) for it in waiting] == ["paid"] * 5
    runs = [line for line in fleet.notes("pay") if line[1] in {w.id for w in waiting}]
    assert {line[2] for line in runs} == {0}
    assert len(runs) == 5
    fleet.workers[0].stop()
    counts = fleet.workers[0].outcomes()
    assert counts["succeeded"] == 5
    assert counts["snoozed"] >= 5
    assert counts["failed"] == 3


def test_what_a_task_may_do_when_its_circuit_is_open(
    make_fleet: FleetMaker, down: Path
) -> None:
    """Fail with its reason, return something else, know it, or be snoozed within."""
    fleet = fleet_with(make_fleet, open_s=600)
    fleet.worker(concurrency=1)  # another child may see it half a second later
    trip(fleet, down)

    failed = fleet.send("pay_or_fail", str(down))
    owed = fleet.send("pay_or_owe", str(down))
    known = fleet.send("pay_or_know", str(down))
    within = fleet.send("pay_within", str(down))
    auto = fleet.send("pay_with_autoretry", str(down))

    record = fleet.record_of(failed.id)
    assert record["reason"] == "circuit_open"
    assert record["exception"].endswith("CircuitOpen")
    assert result_of(fleet, owed) == "owed"
    assert result_of(fleet, known) == "bank is open"
    for waiting in (within, auto):
        eventually(lambda waiting=waiting: waiting.state == "RETRY")
        eventually(lambda waiting=waiting: f"{waiting.id}] for " in texts(fleet))
    assert len(fleet.notes("failed_call")) == 3


def test_an_autoretry_counts_as_what_the_body_raised(
    make_fleet: FleetMaker, down: Path
) -> None:
    """Celery's Retry alone counts nothing."""
    fleet = fleet_with(make_fleet, open_s=600)
    fleet.worker()
    for _ in range(2):
        fleet.send("pay_with_autoretry", str(down))

    eventually(
        lambda: "circuit bank opened" in texts(fleet), what=lambda: texts(fleet)[-3000:]
    )


def test_chains_and_chords_go_on_after_a_snooze(
    make_fleet: FleetMaker, down: Path
) -> None:
    """The result that others wait for comes later."""
    fleet = fleet_with(make_fleet, open_s=8)
    fleet.worker()
    trip(fleet, down)
    tasks = fleet.app.tasks
    chained = (tasks["pay"].si(str(down)) | tasks["ok"].s()).apply_async()
    header = [tasks["pay"].si(str(down)) for _ in range(3)]
    chord = (chord_of(header) | tasks["ok"].s()).apply_async()
    eventually(lambda: texts(fleet).count("task snoozed: ") >= 4)
    down.unlink()

    assert result_of(fleet, chained) == "paid"
    assert result_of(fleet, chord) == ["paid"] * 3
    assert len(fleet.notes("ok")) == 2


def chord_of(header: list[Any]) -> Any:
    """A group that a chord is made of."""
    from celery import group

    return group(header)


def test_a_killed_probe_is_replaced_when_its_lease_has_passed(
    make_fleet: FleetMaker, down: Path
) -> None:
    """The circuit is not half-open for ever."""
    fleet = fleet_with(make_fleet, open_s=1, probe_lease_s=2)
    fleet.worker()
    trip(fleet, down)
    down.unlink()
    first = fleet.send("probe_dies", str(down))
    eventually(lambda: fleet.notes("died"))
    others = [fleet.send("pay", str(down)) for _ in range(3)]

    assert [result_of(fleet, it) for it in [first, *others]] == ["paid"] * 4
    assert len(fleet.notes("died")) == 1


class FragileBank:
    """
    A dependency that collapses, for a while, where too many call it at once.

    Attributes:
        port: Where it listens.
        is_away: Each caller is hung up on.
        collapses: How often it has collapsed.
    """

    CAN_SERVE = 5
    CALL_S = 0.25
    COLLAPSED_S = 2.0

    def __init__(self) -> None:
        self.is_away = True
        self.collapses = 0
        self._collapsed_until = 0.0
        self._lock = Lock()
        self._calls = 0
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        Thread(target=self._listen, daemon=True).start()

    def close(self) -> None:
        """Listen no more."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _listen(self) -> None:
        while True:
            try:
                caller, _ = self._listener.accept()
            except OSError:
                return
            Thread(target=self._serve, args=(caller,), daemon=True).start()

    def _serve(self, caller: socket.socket) -> None:
        with caller:
            began = time.monotonic()
            with self._lock:
                self._calls += 1
                is_served = not self.is_away and began > self._collapsed_until
                if is_served and self._calls > self.CAN_SERVE:
                    self.collapses += 1
                    self._collapsed_until = began + self.COLLAPSED_S
                    is_served = False
            # Those that are served meanwhile are hung up on, too.
            Event().wait(self.CALL_S)
            with self._lock:
                self._calls -= 1
                is_served = is_served and began > self._collapsed_until
            if is_served and time.monotonic() > self._collapsed_until:
                caller.sendall(b"+")


@pytest.mark.parametrize("ramp_from", [2, None])
def test_a_fragile_dependency_drains_after_an_outage(
    make_fleet: FleetMaker, ramp_from: int | None
) -> None:
    """Without the ramp, what has waited comes at once, and it collapses again."""
    bank = FragileBank()
    fleet = make_fleet(
        "redis",
        store="redis",
        resilience_circuits={
            "bank": {
                "window_s": 5,
                "min_calls": 8,
                "open_s": 3,
                "max_open_s": 3,
                "release_per_s": 100,
                "ramp_from": ramp_from,
            }
        },
    )
    for _ in range(2):
        fleet.worker(pool="threads", concurrency=16)
    ids = {fleet.send("pay_at", bank.port).id for _ in range(40)}
    eventually(
        lambda: "circuit bank opened" in texts(fleet), what=lambda: texts(fleet)[-3000:]
    )
    always(lambda: not fleet.notes("paid"), for_s=OUTAGE_S, every_s=1)
    bank.is_away = False

    if ramp_from is None:
        eventually(lambda: bank.collapses > 3, within_s=120)
    else:
        eventually(
            lambda: {line[1] for line in fleet.notes("paid")} == ids,
            within_s=120,
            what="all are paid",
        )
        # It begins with two at once; the sixth that is let in is noticed by its failure.
        assert bank.collapses <= 3
    assert fleet.records() == {}
    bank.close()


def test_a_duplicate_gives_its_permit_back(make_fleet: FleetMaker, down: Path) -> None:
    """A half-open circuit is not held by a task that has nothing to do."""
    fleet = fleet_with(make_fleet, open_s=2, probe_lease_s=600)
    fleet.worker()
    other = down.with_name("other")
    paid = fleet.send("pay_once", str(other))
    assert result_of(fleet, paid) == "paid"
    trip(fleet, down)

    again = fleet.send("pay_once", str(other))
    assert result_of(fleet, again) == "paid"
    assert len(fleet.notes("pay_once")) == 1
    assert "circuit bank closed" not in texts(fleet)
    down.unlink()

    assert result_of(fleet, fleet.send("pay", str(down))) == "paid"


def test_a_plain_pybreaker_is_a_circuit(make_fleet: FleetMaker, down: Path) -> None:
    """Of each child."""
    fleet = make_fleet("redis")
    fleet.worker(concurrency=1)
    for number in range(3):
        fleet.send("pay_by_own", str(down))
        eventually(lambda number=number: len(fleet.notes("failed_call")) > number)
    waiting = fleet.send("pay_by_own", str(down))

    eventually(lambda: waiting.state == "RETRY", what=lambda: texts(fleet)[-3000:])
    assert len(fleet.notes("failed_call")) == 3


@pytest.mark.parametrize("pool", ["threads", "solo", "gevent"])
def test_every_pool_has_circuits(make_fleet: FleetMaker, down: Path, pool: str) -> None:
    """Shared with all others."""
    fleet = fleet_with(make_fleet, open_s=8)
    fleet.worker(pool=pool)
    trip(fleet, down)
    waiting = [fleet.send("pay", str(down)) for _ in range(3)]
    eventually(lambda: texts(fleet).count("task snoozed: ") >= 3)
    down.unlink()

    assert [result_of(fleet, it) for it in waiting] == ["paid"] * 3


def test_a_store_that_dies_fails_no_task(
    make_fleet: FleetMaker,
    own_server: Callable[[str], Service],
    down: Path,
) -> None:
    """Each process goes on by itself, and says so once."""
    store = own_server("redis")
    fleet = make_fleet(
        "rabbitmq",
        resilience_store_url=store.url,
        resilience_circuits={"bank": {**QUICK, "consecutive": 3, "open_s": 600}},
    )
    fleet.worker(concurrency=1)
    up = str(down.with_name("up"))
    assert result_of(fleet, fleet.send("pay", up)) == "paid"
    store.kill()

    for _ in range(20):
        assert result_of(fleet, fleet.send("pay", up)) == "paid"
    trip(fleet, down)
    waiting = fleet.send("pay", up)
    eventually(lambda: f"{waiting.id}] for " in texts(fleet))
    said = [line for line in texts(fleet).splitlines() if "this process's own" in line]
    assert len(said) <= 2  # the main process, and its child


# --- pause ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("broker", "pool"),
    [
        ("redis", "prefork"),
        ("rabbitmq", "prefork"),
        ("filesystem", "threads"),
        ("rabbitmq", "gevent"),
    ],
)
def test_the_queues_of_an_open_circuit_are_not_consumed(
    make_fleet: FleetMaker,
    servers: Callable[[str], Service],
    down: Path,
    broker: str,
    pool: str,
) -> None:
    """By no worker, also one that starts later; others go on; one takes the probe."""
    bank = {**QUICK, "open_s": 8, "queues": ["bank"]}
    fleet = make_fleet(
        broker,
        store="postgresql" if broker == "rabbitmq" else "sqlite",
        resilience_circuits={"bank": bank},
        task_default_queue="other",
        fleet_queues={"bank": {}, "other": {}},
    )
    fleet.worker(pool=pool)

    def pay(path: str) -> Any:
        return fleet.send("pay_or_pause", path, queue="bank", routing_key="bank")

    for _ in range(3):
        seen = len(fleet.notes("failed_call"))
        pay(str(down))
        eventually(lambda seen=seen: len(fleet.notes("failed_call")) > seen)
    eventually(lambda: "queue bank is paused" in texts(fleet), within_s=10)
    late = fleet.worker(pool=pool)
    waiting = [pay(str(down)) for _ in range(10)]
    other = fleet.send("ok", 5, queue="other", routing_key="other")
    assert result_of(fleet, other) == 5
    assert not any(f"{it.id}] received" in texts(fleet) for it in waiting)
    assert "queue bank is paused" in late.text
    down.unlink()

    assert [result_of(fleet, it, 60) for it in waiting] == ["paid"] * 10
    eventually(
        lambda: all("queue bank is consumed again" in w.text for w in fleet.workers)
    )
    assert texts(fleet).count("circuit bank is half-open") == 1


def test_a_worker_does_not_stop_as_empty_while_its_queue_is_paused(
    make_fleet: FleetMaker, down: Path
) -> None:
    """Paused before it started, the queue has messages that are its own."""
    fleet = make_fleet(
        "redis",
        resilience_circuits={"bank": {**QUICK, "queues": ["bank"]}},
        task_default_queue="bank",
        fleet_queues={"bank": {}},
    )
    fleet.command("resilience", "circuits", "open", "bank")
    waiting = fleet.send("pay_or_pause", str(down.with_name("up")))
    worker = fleet.worker("--stop-when-empty")
    assert "queue bank is paused" in worker.text
    always(lambda: worker.is_alive, for_s=5, what=lambda: worker.text)
    fleet.command("resilience", "circuits", "close", "bank")

    assert worker.wait() == 0
    assert "queue bank is consumed again" in worker.text
    assert waiting.get(timeout=1) == "paid"


# --- the command ------------------------------------------------------------------------


def test_an_operator_changes_circuits_for_the_fleet(
    make_fleet: FleetMaker, down: Path
) -> None:
    """Kept open, closed, disabled and reset; each is seen by a running worker."""
    fleet = fleet_with(make_fleet, open_s=600)
    fleet.worker()
    up = str(down.with_name("up"))

    def said(*words: str, code: int = 0) -> str:
        done = fleet.command("resilience", "circuits", *words)
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    def answer(path: str) -> Any:
        return result_of(fleet, fleet.send("pay_or_owe", path))

    assert answer(up) == "paid"
    assert "bank: open until" in said("open", "bank", "--for-s", "60")
    eventually(lambda: answer(up) == "owed", within_s=10)
    (document,) = (
        it for it in json.loads(said("list", "-o", "json")) if it["name"] == "bank"
    )
    assert document["forced"] == "open"
    assert "bank: closed" in said("close", "bank")
    eventually(lambda: answer(up) == "paid", within_s=10)

    assert "bank: disabled until" in said("disable", "bank")
    always(lambda: "circuit bank closed" not in texts(fleet), for_s=1.5)
    for _ in range(4):
        record = fleet.record_of(fleet.send("pay_or_owe", str(down)).id)
        assert record["reason"] == "exception"
    assert "bank: closed" in said("reset", "bank")
    listed = [line.split("\t")[:3] for line in said().splitlines()]
    assert ["bank", "closed", "-"] in listed
    assert "no circuit 'bnk', did you mean bank?" in said("open", "bnk", code=1)


def test_a_wrong_circuit_ends_the_start_of_a_worker(make_fleet: FleetMaker) -> None:
    """In one line; a command with an unreachable store ends with 4."""
    fleet = make_fleet("filesystem", resilience_circuits={"bank": {"probes": 0}})
    done = fleet.command("worker", "--pool", "solo")
    assert done.returncode != 0
    assert "resilience_circuits: bank: probes must be a whole number" in done.stderr

    fleet.conf["resilience_circuits"] = {}
    fleet.conf["resilience_store_url"] = "redis://127.0.0.1:9/0"
    away = fleet.command("resilience", "circuits")
    assert away.returncode == 4
    assert "unreachable" in away.stderr
