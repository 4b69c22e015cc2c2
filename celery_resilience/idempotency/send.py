"""The sender's side: a message carries its key, and may be the only one that waits."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from uuid import uuid4

from celery_resilience import _celery
from celery_resilience.errors import NoKey
from celery_resilience.idempotency.canonical import is_stable
from celery_resilience.idempotency.key import KeyMaker, MadeKey, store_key
from celery_resilience.idempotency.options import KeyOptions
from celery_resilience.idempotency.record import Claim
from celery_resilience.idempotency.registered import TaskKeys, received_key
from celery_resilience.idempotency.store import KeyStore
from celery_resilience.idempotency.task import KeyedRun, retrying, seconds_until
from celery_resilience.message import HEADER, KEY, marks_of
from celery_resilience.serialization import deserialized, serialized

logger = logging.getLogger("celery_resilience.idempotency")

#: Seconds after a message's due time for which its reservation holds, in the queue.
RESERVED_S = 300.0


def sent_key(
    maker: KeyMaker,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    serializer: str,
) -> MadeKey | None:
    """
    The key of a call that is about to be sent.

    Of the arguments as the worker will see them, after the serializer.

    Returns:
        None: this call has none, or the body would not take these arguments.

    Raises:
        NoKey: No key can be made of them.
    """
    if not (is_stable(args) and (not kwargs or is_stable(kwargs))):
        args, kwargs = _as_received((list(args), dict(kwargs)), serializer)
    return received_key(maker, args, kwargs)


def _as_received(value: Any, serializer: str) -> Any:
    content_type, encoding, data = serialized(value, serializer)
    return deserialized(content_type, encoding, data, accept=[content_type])


class KeySender:
    """
    Sends the messages of tasks with keys; one of a key waits at a time where they ask.

    Args:
        store: The keys of this process, or None when the app has no store.
        namespace: The app's.
    """

    def __init__(self, store: Callable[[], KeyStore | None], *, namespace: str) -> None:
        self._store = store
        self._namespace = namespace

    def send(
        self,
        task: Any,
        keys: TaskKeys,
        publish: Callable[..., Any],
        args: Any,
        kwargs: Any,
        options: dict[str, Any],
        *,
        own: KeyedRun | None,
    ) -> Any:
        """
        Send a message with its key, or find the one that waits already.

        Args:
            task: The task.
            keys: How its keys are made.
            publish: Celery's `apply_async`, with all that follows.
            options: Its keywords.
            own: The run whose own task id this message has: its retry, which has the
                key on it, or the same task once more in its place.

        Raises:
            NoKey: No key can be made of these arguments, by who calls the task.
        """
        headers = options.get("headers") or {}
        marks = marks_of(headers) if headers else {}
        if own is not None and KEY in marks:
            with retrying(own, options.get("countdown"), options.get("eta")):
                return publish(args, kwargs, **options)
        serializer = options.get("serializer") or task.serializer
        sent = _celery.sent_arguments(task, args, kwargs, serializer)
        try:
            made = sent_key(keys.maker, sent[0] or (), sent[1] or {}, serializer)
        except NoKey:
            if "parent_id" not in options:
                raise
            # The next of a canvas: the task before it has had its effect, and would
            # fail for it. It is sent, and fails where its worker finds the same.
            made = None
        marks.pop(KEY, None)
        if made is not None:
            marks[KEY] = [made.name, made.fingerprint]
        if marks or HEADER in headers:
            options["headers"] = {**headers, HEADER: marks}
        if made is not None and own is not None and made.name == own.claim.name:
            with retrying(own, options.get("countdown"), options.get("eta")):
                return publish(args, kwargs, **options)
        if (
            made is None
            or not keys.options.is_unique_enqueue
            or _is_waited_for(options)
        ):
            return publish(args, kwargs, **options)
        task_id = options["task_id"] = str(uuid4())
        waiting = self._reserve(made, keys.options, task.name, task_id, options)
        if waiting is not None:
            return task.AsyncResult(waiting)
        try:
            return publish(args, kwargs, **options)
        except BaseException:
            self.release(made.name, task.name, task_id)
            raise

    def _reserve(
        self,
        made: MadeKey,
        key_options: KeyOptions,
        task: str,
        task_id: str,
        options: Mapping[str, Any],
    ) -> str | None:
        """None: send it. Else the task id that waits already."""
        delay_s = seconds_until(options.get("countdown"), options.get("eta"), 0.0)
        claim = Claim(
            key=store_key(self._namespace, task, made.name),
            name=made.name,
            task=task,
            owner=task_id,
            token=task_id[:32],
            fingerprint=made.fingerprint,
            lease_s=max(delay_s, 0.0) + RESERVED_S,
            keep_s=key_options.keep_s,
        )
        try:
            store = self._store()
            return None if store is None else store.reserve(claim)
        except Exception as exc:
            # StoreUnavailable, or what a driver raises unforeseen. Its run will ask.
            logger.warning("%s[%s] is sent unreserved: %s", task, task_id, exc)
            return None

    def release(self, name: str, task: str, task_id: str) -> None:
        """The message *task_id* was not sent, or will not run: another may be sent."""
        try:
            store = self._store()
            if store is not None:
                store.release(store_key(self._namespace, task, name), task_id)
        except Exception as exc:
            logger.warning("the key %r stays reserved for a while: %s", name, exc)


def _is_waited_for(options: Mapping[str, Any]) -> bool:
    """Whether something waits for this very message, so that no other may stand for it.

    Whoever gives a task an id waits for it: so does every part of a canvas.
    """
    waits = ("task_id", "link", "link_error", "chain", "chord", "group_id")
    return any(options.get(name) for name in waits)
