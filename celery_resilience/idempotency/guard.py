"""Lets one run at a time have a key: asks the store, and says what that came to."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from celery_resilience import _celery_run
from celery_resilience.errors import AskAgain, RunInterrupted, Skip, StoreUnavailable
from celery_resilience.events import emit
from celery_resilience.holder import holder_name
from celery_resilience.idempotency import duplicates
from celery_resilience.idempotency.backend import ResultBackend
from celery_resilience.idempotency.duplicates import Call
from celery_resilience.idempotency.heartbeat import Heartbeat
from celery_resilience.idempotency.key import MadeKey, store_key
from celery_resilience.idempotency.record import Begun, Claim, KeyState, Verdict
from celery_resilience.idempotency.registered import TaskKeys, received_key
from celery_resilience.idempotency.store import KeyStore
from celery_resilience.idempotency.task import KeyedRun
from celery_resilience.message import KEY, id_text

logger = logging.getLogger("celery_resilience.idempotency")

#: How often a finish is tried: the effect has happened, and should be remembered.
FINISH_TRIES = 3

#: The state in which a run finds a key of which nobody knows what it came to.
IN_DOUBT = (KeyState.RUNNING, KeyState.INTERRUPTED)


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
            stores_result=_celery_run.stores_result(task, request),
            backend=ResultBackend(task),
            let_go=partial(_celery_run.let_canvas_go, request),
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
            if begun.verdict is Verdict.DONE and duplicates.runs_again(call, begun):
                claim = claim._replace(is_forced=True)
                begun = self._begin(claim)
        except Exception as exc:
            # StoreUnavailable, or what a driver raises unforeseen.
            return self._without_store(claim, call, exc)
        if begun.verdict is Verdict.DONE:
            raise duplicates.done(call, begun, self._accept)
        if begun.verdict is Verdict.BUSY:
            raise duplicates.busy(call, begun)
        if begun.verdict is Verdict.MISMATCH:
            raise duplicates.mismatch(call, begun)
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
        delay_s = duplicates.look_again_s(call.snoozes, duplicates.MAX_LOOK_S)
        logger.warning(
            "%s[%s] waits %.0f s for the store of its key: %s",
            call.task,
            call.task_id,
            delay_s,
            exc,
        )
        raise AskAgain(
            duplicates.STORE_AWAY, delay_s, duplicates.snoozed(call)
        ) from exc

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


def _may_have_run(request: Any, marks: Mapping[str, Any]) -> bool:
    """Whether a run of this very message may have begun: force is for one run."""
    info = request.delivery_info or {}
    return bool(info.get("redelivered")) or "crashes" in marks
