"""The one way to send a message later. Policy only: the caller publishes."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

from celery_resilience.message import SENT_AT, OriginalMessage

#: Seconds of delay from which the copy starts a trace of its own: nobody waits for one
#: that stays open for so long.
NEW_TRACE_AFTER_S = 300.0


def send_again(
    message: OriginalMessage, *, delay_s: float, marks: Mapping[str, Any]
) -> OriginalMessage:
    """
    The copy of *message* that is sent in its place, the one way to send a message later.

    Its bytes, retries, priority, chain and links are unchanged; it is run not
    before *delay_s* seconds from now. The original is acknowledged once the
    broker has the copy: killed in between, there are two. The copy has a name, so
    that Redis stores it once where it is published again for want of an answer. One that
    is sent much later starts a trace of its own.

    Args:
        message: The message as it was delivered.
        delay_s: Seconds until it may run.
        marks: Ours, added to those that it has; None takes one away.
    """
    due = datetime.now(UTC) + timedelta(seconds=delay_s)
    at = due if delay_s > 0 else None
    if delay_s >= NEW_TRACE_AFTER_S:
        message = message.in_new_trace()
    if SENT_AT in message.marks:
        # It waits from then on.
        marks = {SENT_AT: due.timestamp(), **marks}
    return message.without_past().marked(**marks, sent=uuid4().hex).due_at(at)
