"""What a duplicate hears: decided from its call and the store's answer. No Celery."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from celery_resilience.chance import between
from celery_resilience.errors import (
    AlreadyDone,
    AlreadyRunning,
    AskAgain,
    DropDelivery,
    KeyMismatch,
    Skip,
    Snooze,
)
from celery_resilience.idempotency.backend import (
    ENDED_OTHERWISE,
    SUCCEEDED,
    ResultBackend,
)
from celery_resilience.idempotency.options import KeyOptions
from celery_resilience.idempotency.record import Begun, KeyState
from celery_resilience.idempotency.results import HANDED_OVER, Kept, unpack

logger = logging.getLogger("celery_resilience.idempotency")

#: Why a delivery was skipped or snoozed; counted by these words.
DUPLICATE = "duplicate"
KEY_HELD = "key_held"
LEASE_LOST = "lease_lost"
STORE_AWAY = "store_unavailable"

#: Seconds between two looks at a key that another run has; doubled each time.
FIRST_LOOK_S = 1.0
MAX_LOOK_S = 30.0

#: Seconds between two looks at a key whose task will be retried much later.
MAX_LOOK_AT_RETRY_S = 300.0

#: How often a message looks for the result of a task that goes on in another's place:
#: for an hour or two.
MAX_LOOKS = 24


class Call(NamedTuple):
    """
    One delivery of a task with a key.

    Attributes:
        task, task_id: Its names.
        name, fingerprint: Of its key.
        options: Of its task.
        snoozes: How often it was snoozed.
        dead_holder: The process that died while it ran this message.
        is_forced: An operator runs it again whatever it came to, and no run of it has
            begun yet.
        arguments: What `if_interrupted` is called with.
        is_in_canvas: Something waits for its result, which must be the true one.
        stores_result: The result backend stores what the task returns.
        let_go: Called where an earlier delivery of the same message has sent what
            follows in its canvas.
    """

    task: str
    task_id: str
    name: str
    fingerprint: str
    options: KeyOptions
    snoozes: int
    dead_holder: str | None
    is_forced: bool
    arguments: tuple[Sequence[Any], Mapping[str, Any]]
    is_in_canvas: bool
    stores_result: bool
    backend: ResultBackend
    let_go: Callable[[], None]


def mismatch(call: Call, begun: Begun) -> Exception:
    """What a call raises whose key belongs to other arguments."""
    return KeyMismatch(
        f"the key {call.name!r} of {call.task} belongs to a call with other "
        f"arguments, of task {begun.owner}"
    )


def done(call: Call, begun: Begun, accept: Sequence[str] | None) -> Exception:
    """What a duplicate raises whose effect has happened."""
    is_own = begun.owner == call.task_id
    if call.options.if_done == "error" and not is_own:
        return AlreadyDone(
            f"the effect of the key {call.name!r} has happened, in task {begun.owner}"
        )
    saved = unpack(begun.result, accept)
    if saved.kept is Kept.HERE and not is_own:
        return Skip(DUPLICATE, saved.value)
    status, stored = call.backend.result_of(begun.owner)
    is_stored = status == SUCCEEDED
    if saved.kept is Kept.HANDED_OVER and not is_stored:
        if is_own:
            # The other task goes on with what follows, too.
            return DropDelivery(DUPLICATE)
        if status is not None and call.snoozes < MAX_LOOKS:
            delay_s = look_again_s(call.snoozes, MAX_LOOK_AT_RETRY_S)
            return Snooze(delay_s, KEY_HELD)
    if is_own and is_stored:
        # Celery stores a result after it has sent what follows: not once more.
        call.let_go()
    if saved.kept is Kept.HERE:
        return Skip(DUPLICATE, saved.value)
    if not is_stored:
        logger.warning(
            "the result of the key %r is not kept: %s[%s] ends with None",
            call.name,
            call.task,
            call.task_id,
        )
    return Skip(DUPLICATE, stored if is_stored else None)


def busy(call: Call, begun: Begun) -> Exception:
    """What a duplicate raises while another run has the key."""
    waits_for_retry = begun.found is KeyState.RETRYING
    longest_s = MAX_LOOK_AT_RETRY_S if waits_for_retry else MAX_LOOK_S
    delay_s = look_again_s(call.snoozes, longest_s)
    delay_s = min(delay_s, max(begun.remaining_s, FIRST_LOOK_S))
    if begun.owner == call.task_id:
        # A redelivery: the run may still die, and then this message is what is left.
        return AskAgain(KEY_HELD, delay_s, {**snoozed(call), "crashed": None})
    if call.options.if_running == "skip" and not call.is_in_canvas:
        return Skip(KEY_HELD)
    if call.options.if_running == "error":
        return AlreadyRunning(f"task {begun.owner} has the key {call.name!r}")
    return Snooze(delay_s, KEY_HELD)


def runs_again(call: Call, begun: Begun) -> bool:
    """Whether *call* runs though its key is done."""
    if begun.owner != call.task_id and call.options.if_done == "rerun":
        return True
    if begun.result != HANDED_OVER:
        return False
    status, _ = call.backend.result_of(begun.owner)
    return status in ENDED_OTHERWISE


def look_again_s(snoozes: int, longest_s: float) -> float:
    """Seconds until a message looks at its key again: longer each time, and spread."""
    whole_s: float = min(FIRST_LOOK_S * 2 ** min(snoozes, 16), longest_s)
    return whole_s * between(0.75, 1.0)


def snoozed(call: Call) -> dict[str, Any]:
    """The marks of a message that looks at its key again."""
    return {"snoozes": call.snoozes + 1, "redeliveries": None}
