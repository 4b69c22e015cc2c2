"""Why a run failed is known by its exception, or by who ran it."""

from __future__ import annotations

from celery_resilience.errors import CircuitIsOpen, KeyMismatch, MemoryLimitExceeded
from celery_resilience.outcome import Outcome, Reason, Settlement
from celery_resilience.reasons import facts_of_failure, reason_of


def test_our_own_exceptions_say_it_themselves() -> None:
    """Whatever was told; others have what was told, or are plain exceptions."""
    assert reason_of(KeyMismatch(), "retries_exhausted") == Reason.KEY_MISMATCH
    assert reason_of(ValueError(), "retries_exhausted") == "retries_exhausted"
    assert reason_of(ValueError()) == Reason.EXCEPTION
    limit = MemoryLimitExceeded.__new__(MemoryLimitExceeded)
    assert reason_of(limit) == Reason.MEMORY_LIMIT


def test_a_child_tells_the_reason_that_only_it_knows() -> None:
    """An ordinary exception has none to tell; an open circuit is one after all retries."""
    plain = facts_of_failure(ValueError("no"), "shop", is_exhausted=False)
    exhausted = facts_of_failure(ValueError("no"), "shop", is_exhausted=True)
    is_open = CircuitIsOpen.__new__(CircuitIsOpen)

    assert set(plain) == {"exception", "message", "fingerprint"}
    assert exhausted == {**plain, "reason": Reason.RETRIES_EXHAUSTED}
    for is_exhausted in (False, True):
        facts = facts_of_failure(is_open, "shop", is_exhausted=is_exhausted)
        assert facts["reason"] == Reason.CIRCUIT_OPEN


def test_a_settlement_knows_its_trace_and_key() -> None:
    """As the run told it, or else as the message has it."""
    traceparent = f"00-{'a' * 32}-{'b' * 16}-01"
    plain = Settlement(Outcome.FAILED, "exception", "t", "1", "q", "w")
    sent = Settlement(
        *(Outcome.FAILED, "exception", "t", "1", "q", "w"),
        traceparent=traceparent,
        marks={"key": ["k", ""]},
        facts={"idempotency_key": "other"},
    )
    ran = Settlement(
        *(Outcome.FAILED, "exception", "t", "1", "q", "w"),
        traceparent=traceparent,
        facts={"trace_id": "c" * 32, "idempotency_key": "k2"},
    )

    assert (plain.trace_id, plain.idempotency_key) == (None, None)
    assert (sent.trace_id, sent.idempotency_key) == ("a" * 32, "k")
    assert (ran.trace_id, ran.idempotency_key) == ("c" * 32, "k2")
