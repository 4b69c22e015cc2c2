"""The table of what a worker holds, and the copy that is sent in a message's place."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from kombu.message import Message
from unit.specimens import a_message, headers_with

from celery_resilience.crashes.gate import Gate
from celery_resilience.delivery.deliveries import MAX_SOURCES, Deliveries
from celery_resilience.delivery.send_again import NEW_TRACE_AFTER_S, send_again
from celery_resilience.message import OriginalMessage
from celery_resilience.outcome import Outcome


@dataclass(eq=False)
class Request:
    """A request, as far as the table looks at it."""

    name: str
    runs_alone: bool = False
    was_dropped: bool = False
    time_start: float | None = None
    _apply_result: Any = None
    requeued: int = 0
    error: Exception | None = None

    @property
    def message(self) -> Any:
        return self

    def requeue(self) -> None:
        if self.error is not None:
            raise self.error
        self.requeued += 1

    def dropped(self) -> None:
        self.was_dropped = True


@pytest.fixture
def gate() -> Gate:
    """A gate before a pool that takes everything."""
    gate = Gate(lambda request: gate.admit(request))
    return gate


@pytest.fixture
def deliveries(gate: Gate) -> Deliveries:
    """An empty table."""
    unused: Any = None
    return Deliveries(
        worker="celery@unit",
        outbox=unused,
        facts=unused,
        keeps=unused,
        crashes=unused,
        gate=gate,
    )


def test_the_counts_add_up(deliveries: Deliveries) -> None:
    """What was received is settled or still open."""
    requests = [Request(str(n)) for n in range(5)]
    for request in requests:
        deliveries.opened(request)
    deliveries.closed(requests[0], Outcome.SUCCEEDED)
    deliveries.closed(requests[1], Outcome.SUCCEEDED)
    deliveries.closed(requests[2], Outcome.FAILED)

    assert deliveries.received == 5
    assert deliveries.counts == {Outcome.SUCCEEDED: 2, Outcome.FAILED: 1}
    assert len(deliveries._open) == 2


def test_two_deliveries_of_one_task_are_two(deliveries: Deliveries) -> None:
    """A table by task id would hide one of them."""
    one, two = Request("same id"), Request("same id")
    deliveries.opened(one)
    deliveries.opened(two)
    deliveries.closed(one, Outcome.SUCCEEDED)

    deliveries.drop_unstarted(keep=set())

    assert (one.was_dropped, two.was_dropped) == (False, True)


def test_what_has_not_started_is_dropped(deliveries: Deliveries) -> None:
    """What runs is kept; what was settled is no more ours."""
    running, waiting, ended = (Request(name) for name in "rwe")
    for request in (running, waiting, ended):
        deliveries.opened(request)
    deliveries.closed(ended, Outcome.SUCCEEDED)

    deliveries.drop_unstarted(keep={running})

    assert [r.was_dropped for r in (running, waiting, ended)] == [False, True, False]


def test_what_no_pool_was_given_is_handed_back_once(deliveries: Deliveries) -> None:
    """What lies before a child may be run by it, though it has not accepted it."""
    running = Request("r", time_start=1.0)
    given, waiting = Request("g", _apply_result=lambda: None), Request("w")
    for request in (running, given, waiting):
        deliveries.opened(request)
    deliveries.note_untouched(pool=None)
    deliveries.drop_unstarted(keep={running})

    deliveries.hand_back()
    deliveries.hand_back()
    assert [r.requeued for r in (running, given, waiting)] == [0, 0, 1]


def test_what_cannot_be_handed_back_is_left_to_the_end_of_the_connection(
    deliveries: Deliveries,
) -> None:
    """A broker that is away is no reason not to stop."""
    waiting = Request("w", error=ConnectionError("gone"))
    deliveries.opened(waiting)
    deliveries.note_untouched(pool=None)

    deliveries.hand_back()

    assert waiting.requeued == 0


def test_a_settlement_is_counted_where_somebody_counts(deliveries: Deliveries) -> None:
    """For --stop-after-tasks."""
    counted: list[int] = []
    deliveries.on_closed = lambda: counted.append(1)
    deliveries.closed(Request("a"), Outcome.SUCCEEDED)

    assert counted == [1]


def test_what_waits_at_the_gate_is_dropped_with_it(
    deliveries: Deliveries, gate: Gate
) -> None:
    """It is not executed later, for the broker delivers it again."""
    running, suspect = Request("r"), Request("s", runs_alone=True)
    for request in (running, suspect):
        deliveries.opened(request)
        gate.admit(request)

    deliveries.drop_unstarted(keep={running})
    gate.left(running)

    assert suspect.was_dropped
    assert not gate._running


def test_a_queue_is_looked_up_once(deliveries: Deliveries) -> None:
    """And anew when the consumer is connected again: its tags have changed."""
    message = Message(delivery_info={"exchange": "", "routing_key": "shop"})

    assert deliveries.queue_of(message) == "shop"
    deliveries._queues = dict.fromkeys(deliveries._queues, "remembered")
    assert deliveries.queue_of(message) == "remembered"
    deliveries.consumer_started(None)
    assert deliveries.queue_of(message) == "shop"


# --- send_again -----------------------------------------------------------------------


def sent(message: OriginalMessage, delay_s: float = 5, **marks: Any) -> OriginalMessage:
    """A copy that is sent again."""
    return send_again(message, delay_s=delay_s, marks=marks)


def test_a_copy_is_due_later() -> None:
    """In UTC, so many seconds from now."""
    before = datetime.now(UTC)
    eta = datetime.fromisoformat(sent(a_message(), 30).headers["eta"])
    after = datetime.now(UTC)

    assert before + timedelta(seconds=30) <= eta <= after + timedelta(seconds=30)


def test_a_copy_without_delay_is_due_now() -> None:
    """An eta that has passed is taken away."""
    old = a_message(headers={**a_message().headers, "eta": "2026-01-01T00:00:00"})

    assert sent(old, 0).headers["eta"] is None


def test_a_copy_is_the_same_task() -> None:
    """Bytes, id, retries, priority and expiry are unchanged; its past is gone."""
    message = a_message(
        headers={**headers_with({"crashes": 1}), "x-death": [1], "retries": 2},
        properties={**a_message().properties, "priority": 9, "expiration": "5"},
        redelivered=True,
    )

    copy = sent(message, 0, snoozes=1)

    assert copy.body == message.body
    assert copy.headers["retries"] == 2
    assert copy.headers["id"] == "task-1"
    assert copy.properties == message.properties
    assert copy.marks == {"crashes": 1, "snoozes": 1, "sent": copy.marks["sent"]}
    assert "x-death" not in copy.headers
    assert copy.redelivered is False
    assert copy.queue == message.queue


def test_a_copy_waits_from_when_it_may_run() -> None:
    """And not from when its original was sent; one that tells no time gets none."""
    marked = a_message(headers=headers_with({"sent_at": 5.0}))
    before = time.time()

    at = sent(marked, 60).marks["sent_at"]

    assert before + 60 <= at <= time.time() + 60
    assert sent(marked, 0, sent_at=7.0).marks["sent_at"] == 7.0
    assert "sent_at" not in sent(a_message(), 60).marks


def test_a_copy_that_is_sent_much_later_starts_a_trace_of_its_own() -> None:
    """It names the old one; one that is sent soon goes on with it."""
    traceparent = f"00-{'a' * 32}-{'b' * 16}-01"
    message = a_message(headers={**a_message().headers, "traceparent": traceparent})

    soon, late = sent(message, NEW_TRACE_AFTER_S - 1), sent(message, NEW_TRACE_AFTER_S)

    assert soon.headers["traceparent"] == traceparent
    assert "trace" not in soon.marks
    assert "traceparent" not in late.headers
    assert late.marks["trace"] == traceparent


@pytest.mark.parametrize(
    "info",
    [
        {"exchange": "", "routing_key": ["q"]},
        {"exchange": "", "routing_key": 5},
    ],
    ids=["key list", "key number"],
)
def test_a_queue_is_always_a_text(deliveries: Deliveries, info: dict[str, Any]) -> None:
    """A foreign message on Redis ends the worker; or its envelope the collector."""
    assert isinstance(deliveries.queue_of(Message(delivery_info=info)), str)


def test_what_is_kept_still_runs(deliveries: Deliveries, gate: Gate) -> None:
    """
    On threads, gevent and solo everything reserved is kept, what waits too.

    Cleared from the gate and not dropped it never runs, and on Redis its
    message is adopted and kept invisible until the worker ends.
    """
    suspect, waiting = Request("s", runs_alone=True), Request("w")
    for request in (suspect, waiting):
        deliveries.opened(request)
        gate.admit(request)

    deliveries.drop_unstarted(keep={suspect, waiting})
    gate.left(suspect)

    assert waiting.was_dropped or waiting in gate._running


def test_routing_keys_with_ids_fill_no_memory(deliveries: Deliveries) -> None:
    """The queue of each is found again when it is asked for."""
    deliveries.consumer = None
    keys = [f"order.{number}" for number in range(MAX_SOURCES + 5)]
    found = [
        deliveries.queue_of(Message(delivery_info={"exchange": "", "routing_key": key}))
        for key in keys
    ]

    assert found == keys
    assert len(deliveries._queues) <= MAX_SOURCES
