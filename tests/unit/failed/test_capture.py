"""What must be stored before the ack, for each way in which a delivery ends."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.specimens import (
    a_failure,
    a_message,
    a_settlement,
    replay_mark,
)

from celery_resilience.failed.capture import Capture
from celery_resilience.failed.envelope import loads
from celery_resilience.outcome import Outcome, Reason, Settlement

REPLAY = replay_mark("r" * 32, "t1")
CRASHED = {"crashes": 1}
DEFAULT = "shop.failed"


def kept(
    settlement: Settlement,
    *,
    routes: dict[str, str | None] | None = None,
    own: str | bool | None = None,
) -> tuple[str, str] | None:
    """The kind and queue of what must be stored, or None."""
    capture = Capture(
        namespace="shop",
        default_queue=DEFAULT,
        routes=tuple((routes or {}).items()),
        own_queue=lambda name: own,
        clock=lambda: 1_234.5,
        release="v1",
    )
    message = capture.message_for(settlement, a_message())
    if message is None:
        return None
    return loads(message.body)["kind"], message.queue


def ended(outcome: Outcome, **facts: Any) -> Settlement:
    """A settlement of that outcome; a revoke has a failure too."""
    if outcome is Outcome.REVOKED:
        facts = {
            "reason": Reason.REVOKED,
            "failure": a_failure(exception="revoked"),
            **facts,
        }
    return a_settlement(outcome=outcome, **facts)


ENVELOPE = ("failed", DEFAULT)
REPORT = ("settled", DEFAULT)

#: By outcome: what is stored for a message with an ordinary past, and a replay.
TABLE = {
    Outcome.SUCCEEDED: (REPORT, REPORT),
    Outcome.SKIPPED: (REPORT, REPORT),
    Outcome.FAILED: (ENVELOPE, ENVELOPE),
    Outcome.REVOKED: (None, REPORT),
    Outcome.RETRIED: (None, None),
    Outcome.SNOOZED: (None, None),
    Outcome.REQUEUED: (None, None),
}


@pytest.mark.parametrize("outcome", list(Outcome))
def test_each_outcome_with_a_past(outcome: Outcome) -> None:
    """A failure has an envelope; what makes an earlier capture void has a report."""
    ordinary, replay = TABLE[outcome]

    assert kept(ended(outcome, marks=CRASHED)) == ordinary
    assert kept(ended(outcome, marks=REPLAY)) == replay


def test_a_failure_goes_where_the_routes_say() -> None:
    """By task, exception or reason."""
    failure = a_settlement()

    assert kept(failure, routes={"shop.*": "a"}) == ("failed", "a")
    assert kept(failure, routes={"NoStock": "b"}) == ("failed", "b")
    assert kept(failure, routes={"exception": "c"}) == ("failed", "c")
    assert kept(failure, routes={"NoStock": None}) is None
    assert kept(failure, routes={"NoStock": None}, own="mine") == ("failed", "mine")


def test_a_task_may_keep_nothing() -> None:
    """`failed_queue = False`: neither its failures nor their reports."""
    assert kept(a_settlement(), own=False) is None
    assert kept(ended(Outcome.SUCCEEDED, marks=CRASHED), own=False) is None


@pytest.mark.parametrize("reason", [Reason.EXPIRED, Reason.REVOKED])
def test_a_revoke_is_kept_only_where_a_route_asks(reason: Reason) -> None:
    """And then with its message, so that it can be replayed."""
    revoked = ended(Outcome.REVOKED, reason=reason)

    assert kept(revoked) is None
    assert kept(revoked, routes={"*": "q"}) is None
    assert kept(revoked, routes={str(reason): "q"}) == ("failed", "q")
    assert kept(revoked, routes={str(reason): "q"}, own="mine") == ("failed", "q")


def test_a_replay_that_fails_is_kept_whatever_the_routes_say() -> None:
    """Its record waits for an answer."""
    failure = a_settlement(marks=REPLAY)

    assert kept(failure, routes={"*": None}) == ENVELOPE
    assert kept(failure, routes={"*": "q"}) == ("failed", "q")


def test_a_replay_that_was_revoked_is_told() -> None:
    """Where a route keeps revokes as an envelope, else as a report."""
    revoked = ended(Outcome.REVOKED, marks=REPLAY)

    assert kept(revoked) == REPORT
    assert kept(revoked, routes={"*": None}) == REPORT
    assert kept(revoked, routes={"revoked": "q"}) == ("failed", "q")


def test_a_report_goes_to_a_queue_that_is_collected() -> None:
    """A route that drops failures does not drop the report of a success."""
    success = ended(Outcome.SUCCEEDED, marks=REPLAY)

    assert kept(success, routes={"shop.*": None}) == REPORT
    assert kept(success, routes={"shop.*": "q"}) == ("settled", "q")
    assert kept(success, own="mine") == ("settled", "mine")


def test_an_envelope_has_the_time_and_release_of_the_capture() -> None:
    """The clock is an argument."""
    capture = Capture(
        namespace="shop",
        default_queue=DEFAULT,
        routes=(),
        own_queue=lambda name: None,
        clock=lambda: 1_234.5,
        release="v1",
    )

    message = capture.message_for(a_settlement(), a_message())

    assert message is not None
    document = loads(message.body)
    assert (document["failed_at"], document["release"]) == (1_234.5, "v1")
    assert document["app"] == "shop"


def test_the_own_queue_is_that_of_the_task() -> None:
    """It is asked for by the task's name, once for each failure."""
    asked: list[str] = []

    def own_queue(name: str) -> str:
        asked.append(name)
        return f"{name}.failed"

    capture = Capture(
        namespace="shop",
        default_queue=DEFAULT,
        routes=(),
        own_queue=own_queue,
        clock=lambda: 0.0,
        release=None,
    )

    message = capture.message_for(a_settlement(task="a.b"), a_message())

    assert asked == ["a.b"]
    assert message is not None
    assert message.queue == "a.b.failed"


@given(st.sampled_from(list(Reason)), st.sampled_from([{}, CRASHED, REPLAY]))
def test_every_final_failure_is_kept_without_routes(
    reason: Reason, marks: dict[str, Any]
) -> None:
    """Whatever its reason, unless it expired or was revoked."""
    found = kept(a_settlement(reason=reason, marks=marks))

    if reason in (Reason.EXPIRED, Reason.REVOKED) and marks != REPLAY:
        assert found is None
    else:
        assert found == ENVELOPE


@pytest.mark.parametrize("outcome", [Outcome.FAILED, Outcome.SUCCEEDED])
def test_a_replay_of_a_task_that_keeps_nothing_any_more_is_told(
    outcome: Outcome,
) -> None:
    """Its record, of an earlier release, would say replaying for ever."""
    assert kept(ended(outcome, marks=REPLAY), own=False) is not None


def test_a_dropped_copy_of_a_replay_tells_nothing() -> None:
    """Its report resolves the record while the other copy still runs."""
    dropped = ended(Outcome.SKIPPED, reason="replay_duplicate", marks=REPLAY)

    assert kept(dropped) is None
