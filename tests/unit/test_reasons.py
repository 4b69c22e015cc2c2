"""Why a run failed is known by its exception, or by who ran it."""

from __future__ import annotations

from celery_resilience.errors import KeyMismatch, MemoryLimitExceeded
from celery_resilience.outcome import Outcome, Reason, Settlement
from celery_resilience.reasons import reason_of


def test_our_own_exceptions_say_it_themselves() -> None:
    """Whatever was told; others have what was told, or are plain exceptions."""
    assert reason_of(KeyMismatch(), "retries_exhausted") == Reason.KEY_MISMATCH
    assert reason_of(ValueError(), "retries_exhausted") == "retries_exhausted"
    assert reason_of(ValueError()) == Reason.EXCEPTION
    limit = MemoryLimitExceeded.__new__(MemoryLimitExceeded)
    assert reason_of(limit) == Reason.MEMORY_LIMIT


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
