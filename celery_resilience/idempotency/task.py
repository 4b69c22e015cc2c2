"""A run takes its key before the body, and says after it what the key came to."""

from __future__ import annotations

import contextlib
import logging
import random
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any, NamedTuple

from celery import states
from celery.exceptions import Retry

from celery_resilience import _celery
from celery_resilience.errors import (
    AlreadyDone,
    AlreadyRunning,
    AskAgain,
    DropDelivery,
    KeyMismatch,
    RunInterrupted,
    Skip,
    Snooze,
    StoreUnavailable,
)
from celery_resilience.events import emit
from celery_resilience.holder import holder_name
from celery_resilience.idempotency.backend import ResultBackend
from celery_resilience.idempotency.heartbeat import Heartbeat, lease_lost
from celery_resilience.idempotency.key import MadeKey, store_key
from celery_resilience.idempotency.options import KeyOptions
from celery_resilience.idempotency.record import Begun, Claim, KeyState, Verdict
from celery_resilience.idempotency.registered import TaskKeys, received_key
from celery_resilience.idempotency.results import HANDED_OVER, Kept, pack, unpack
from celery_resilience.idempotency.store import KeyStore
from celery_resilience.message import KEY, id_text

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

#: Seconds after its due time for which a retry's key is kept for it, in the queue.
RETRY_GRACE_S = 3_600.0

#: How often a finish is tried: the effect has happened, and should be remembered.
FINISH_TRIES = 3

#: The state in which a run finds a key of which nobody knows what it came to.
IN_DOUBT = (KeyState.RUNNING, KeyState.INTERRUPTED)


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


class KeyedRun:
    """
    A run that has its key.

    Once another run has it, whatever this one comes to counts no more: what says so
    here raises Snooze where the other is another task's, whose result will be this
    one's too, and DropDelivery where it is another delivery of this very message.

    Attributes:
        claim: What it took.
        epoch: The fencing number; 0 where the store was away and the task runs
            without its key.
    """

    __slots__ = ("_guard", "_has_ended", "_stores_result", "claim", "epoch")

    def __init__(
        self, guard: KeyGuard, claim: Claim, epoch: int, *, stores_result: bool
    ) -> None:
        self._guard = guard
        self._has_ended = False
        self._stores_result = stores_result
        self.claim = claim
        self.epoch = epoch

    def ended_by(self, exc: BaseException, *, is_ending: bool) -> None:
        """
        The body ended in an exception.

        Args:
            is_ending: It ends the process, and is not the task's own.
        """
        if is_ending:
            self.abandoned()
        elif isinstance(exc, Skip):
            self.done(exc.result)
        elif isinstance(exc, Snooze):
            self.retrying(exc.countdown_s)
        elif isinstance(exc, Retry):
            self.retrying(0.0)
        else:
            self.failed()

    def done(self, result: Any) -> None:
        """The effect has happened."""
        if self._has_ended or not self.epoch:
            return
        data = pack(result, self._guard.serializer, has_backend=self._stores_result)
        self._end(KeyState.DONE, data)

    def failed(self) -> None:
        """The body ended in an error; another run may begin."""
        if not self._has_ended and self.epoch:
            self._end(KeyState.FAILED)

    def interrupted(self) -> None:
        """Nobody knows whether the effect has happened."""
        if not self._has_ended and self.epoch:
            self._end(KeyState.INTERRUPTED)

    def retrying(self, countdown_s: float) -> None:
        """The same task will come again; said before its message is published."""
        if not self._has_ended and self.epoch:
            self._end(KeyState.RETRYING, until_s=max(countdown_s, 0.0) + RETRY_GRACE_S)

    def handed_over(self) -> None:
        """Another task goes on under this one's id, and will store its result."""
        if not self._has_ended and self.epoch:
            self._end(KeyState.DONE, HANDED_OVER)

    def still_runs(self) -> None:
        """The message of a retry could not be published."""
        self._has_ended = False

    def abandoned(self) -> None:
        """The process ends: the lease lapses."""
        self._guard.heartbeat.remove(self.claim)
        self._has_ended = True

    def _end(
        self, state: KeyState, result: bytes | None = None, until_s: float = 0.0
    ) -> None:
        self._has_ended = True
        self._guard.heartbeat.remove(self.claim)
        owner = self._guard.finish(self.claim, state, result, until_s)
        if owner is None:
            return
        lease_lost(self.claim)
        if owner == self.claim.owner:
            raise DropDelivery(LEASE_LOST)
        raise Snooze(FIRST_LOOK_S, LEASE_LOST)


class KeyGuard:
    """
    Lets one run at a time have a key, and gives duplicates what it came to.

    Args:
        store: The keys of this process, or None when the app has no store; called at
            each use, because a process opens its own.
        namespace: The app's.
        if_store_down: "wait": the task is snoozed; "run": it runs without its key.
        serializer: The app's `result_serializer`.
        accept: The content types that the app takes results in.
    """

    def __init__(
        self,
        store: Callable[[], KeyStore | None],
        *,
        namespace: str,
        if_store_down: str,
        serializer: str,
        accept: Sequence[str] | None,
    ) -> None:
        self._store = store
        self._namespace = namespace
        self._if_store_down = if_store_down
        self._accept = accept
        self.serializer = serializer
        self.heartbeat = Heartbeat(store)

    def call(
        self,
        task: Any,
        keys: TaskKeys,
        request: Any,
        marks: Mapping[str, Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> Call | None:
        """
        What is asked for this delivery; None: it has no key.

        Args:
            task: The task.
            keys: How its keys are made, where the message carries none.
            request: Celery's, of the run.
            marks: Ours on the message.

        Raises:
            NoKey: No key can be made of these arguments.
        """
        made = (
            MadeKey(*marks[KEY])
            if KEY in marks
            else received_key(keys.maker, args, kwargs)
        )
        if made is None:
            return None
        return Call(
            task=task.name,
            task_id=id_text(request.id),
            name=made.name,
            fingerprint=made.fingerprint,
            options=keys.options,
            snoozes=marks.get("snoozes", 0),
            dead_holder=marks.get("crashed"),
            is_forced=marks.get("forced", False) and not _may_have_run(request, marks),
            arguments=(args, kwargs),
            is_in_canvas=bool(
                request.chord or request.chain or request.callbacks or request.group
            ),
            stores_result=_celery.stores_result(task, request),
            backend=ResultBackend(task),
            let_go=partial(_celery.let_canvas_go, request),
        )

    def begin(self, call: Call) -> KeyedRun:
        """
        Take the key of *call*.

        Raises:
            Skip: The effect has happened; with its result.
            Snooze, AskAgain: Another run has the key, or the store is away.
            KeyMismatch, AlreadyRunning, AlreadyDone, RunInterrupted: As the task's
                options say.
        """
        options = call.options
        claim = Claim(
            key=store_key(self._namespace, call.task, call.name),
            name=call.name,
            task=call.task,
            owner=call.task_id,
            token=secrets.token_hex(8),
            holder=holder_name(),
            fingerprint=call.fingerprint,
            lease_s=options.lease_s,
            keep_s=options.keep_s,
            dead_holder=call.dead_holder,
            is_forced=call.is_forced,
        )
        try:
            begun = self._begin(claim)
            if begun.verdict is Verdict.DONE and _runs_again(call, begun):
                claim = claim._replace(is_forced=True)
                begun = self._begin(claim)
        except Exception as exc:
            # StoreUnavailable, or what a driver raises unforeseen.
            return self._without_store(claim, call, exc)
        if begun.verdict is Verdict.DONE:
            raise self._done(call, begun)
        if begun.verdict is Verdict.BUSY:
            raise self._busy(call, begun)
        if begun.verdict is Verdict.MISMATCH:
            raise KeyMismatch(
                f"the key {call.name!r} of {call.task} belongs to a call with other "
                f"arguments, of task {begun.owner}"
            )
        run = KeyedRun(self, claim, begun.epoch, stores_result=call.stores_result)
        self.heartbeat.add(claim)
        if begun.found in IN_DOUBT and not call.is_forced:
            self._after_interruption(call, run)
        return run

    def finish(
        self, claim: Claim, state: KeyState, result: bytes | None, until_s: float
    ) -> str | None:
        """Say what a run came to; a store that is away never fails the task."""
        for tried in range(1, FINISH_TRIES + 1):
            try:
                store = self._store()
                if store is None:
                    return None
                return store.finish(claim, state, result=result, until_s=until_s)
            except Exception as exc:
                # StoreUnavailable, or what a driver raises unforeseen.
                if tried == FINISH_TRIES:
                    logger.warning(
                        "%s[%s] has ended, and its key %r does not say so (%s): a "
                        "duplicate may have the effect again once the lease has lapsed",
                        claim.task,
                        claim.owner,
                        claim.name,
                        exc,
                    )
                    emit("idempotency.finish_failed", claim=claim, state=state)
        return None

    def _begin(self, claim: Claim) -> Begun:
        store = self._store()
        if store is None:
            raise StoreUnavailable("this worker has no store")
        try:
            return store.begin(claim)
        except StoreUnavailable:
            # It may have heard: the same claim once more has the same answer, while
            # another would find the key of a run that nobody has begun.
            return store.begin(claim)

    def _without_store(self, claim: Claim, call: Call, exc: Exception) -> KeyedRun:
        if self._if_store_down == "run":
            logger.warning(
                "%s[%s] runs without its key %r: %s",
                call.task,
                call.task_id,
                call.name,
                exc,
            )
            emit("idempotency.unprotected", claim=claim)
            return KeyedRun(self, claim, 0, stores_result=call.stores_result)
        delay_s = look_again_s(call.snoozes, MAX_LOOK_S)
        logger.warning(
            "%s[%s] waits %.0f s for the store of its key: %s",
            call.task,
            call.task_id,
            delay_s,
            exc,
        )
        raise AskAgain(STORE_AWAY, delay_s, _snoozed(call)) from exc

    def _done(self, call: Call, begun: Begun) -> Exception:
        """What a duplicate raises whose effect has happened."""
        is_own = begun.owner == call.task_id
        if call.options.if_done == "error" and not is_own:
            return AlreadyDone(
                f"the effect of the key {call.name!r} has happened, in task {begun.owner}"
            )
        saved = unpack(begun.result, self._accept)
        if saved.kept is Kept.HERE and not is_own:
            return Skip(DUPLICATE, saved.value)
        status, stored = call.backend.result_of(begun.owner)
        is_stored = status == states.SUCCESS
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

    def _busy(self, call: Call, begun: Begun) -> Exception:
        """What a duplicate raises while another run has the key."""
        waits_for_retry = begun.found is KeyState.RETRYING
        longest_s = MAX_LOOK_AT_RETRY_S if waits_for_retry else MAX_LOOK_S
        delay_s = look_again_s(call.snoozes, longest_s)
        delay_s = min(delay_s, max(begun.remaining_s, FIRST_LOOK_S))
        if begun.owner == call.task_id:
            # A redelivery: the run may still die, and then this message is what is left.
            return AskAgain(KEY_HELD, delay_s, {**_snoozed(call), "crashed": None})
        if call.options.if_running == "skip" and not call.is_in_canvas:
            return Skip(KEY_HELD)
        if call.options.if_running == "error":
            return AlreadyRunning(f"task {begun.owner} has the key {call.name!r}")
        return Snooze(delay_s, KEY_HELD)

    def _after_interruption(self, call: Call, run: KeyedRun) -> None:
        """Act on a run that ended with its process, as the task's options say."""
        policy = call.options.if_interrupted
        if policy == "rerun":
            return
        if policy == "fail":
            run.interrupted()
            raise RunInterrupted(
                f"a run with the key {call.name!r} ended with its process, and its "
                "effect may have happened; look, then replay it with --force, or "
                "discard it"
            )
        assert callable(policy)
        args, kwargs = call.arguments
        try:
            happened = policy(*args, **kwargs)
        except Skip as skip:
            run.done(skip.result)
            raise
        except BaseException:
            run.interrupted()
            raise
        if happened:
            run.done(None)
            raise Skip("happened")


@contextlib.contextmanager
def retrying(run: KeyedRun, countdown: Any, eta: Any) -> Iterator[None]:
    """
    Publish the message with which a run's own task comes again.

    Its key is handed over first: the message may be delivered at once.
    """
    run.retrying(seconds_until(countdown, eta, default_s=0.0))
    try:
        yield
    except BaseException:
        run.still_runs()
        raise


def _may_have_run(request: Any, marks: Mapping[str, Any]) -> bool:
    """Whether a run of this very message may have begun: force is for one run."""
    info = request.delivery_info or {}
    return bool(info.get("redelivered")) or "crashes" in marks


def _runs_again(call: Call, begun: Begun) -> bool:
    """Whether *call* runs though its key is done."""
    if begun.owner != call.task_id and call.options.if_done == "rerun":
        return True
    if begun.result != HANDED_OVER:
        return False
    status, _ = call.backend.result_of(begun.owner)
    return status in (states.FAILURE, states.REVOKED)


def look_again_s(snoozes: int, longest_s: float) -> float:
    """Seconds until a message looks at its key again: longer each time, and spread."""
    whole_s: float = min(FIRST_LOOK_S * 2 ** min(snoozes, 16), longest_s)
    return whole_s * random.uniform(0.75, 1.0)


def seconds_until(countdown: Any, eta: Any, default_s: float) -> float:
    """Seconds until a retry is due, as Celery was told."""
    if isinstance(eta, datetime):
        at = eta if eta.tzinfo is not None else eta.replace(tzinfo=UTC)
        return (at - datetime.now(UTC)).total_seconds()
    if isinstance(countdown, int | float):
        return float(countdown)
    return default_s


def _snoozed(call: Call) -> dict[str, Any]:
    return {"snoozes": call.snoozes + 1, "redeliveries": None}
