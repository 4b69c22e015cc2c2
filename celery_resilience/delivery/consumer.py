"""The worker's consumer: messages that never become a task's request.

Unknown, undecodable, refused and malformed messages are kept before Celery
rejects or acknowledges them, and none of them ends the worker.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from kombu.exceptions import ContentDisallowed

from celery_resilience import _kombu_redis, _pools
from celery_resilience._kombu import is_forgotten
from celery_resilience.delivery.deliveries import Deliveries
from celery_resilience.delivery.malformed import malformation
from celery_resilience.delivery.outbox import Outgoing
from celery_resilience.delivery.redis_visibility import RedisVisibility
from celery_resilience.draining import is_draining
from celery_resilience.events import emit
from celery_resilience.failure import Failure, fingerprint_of, type_name
from celery_resilience.message import (
    OriginalMessage,
    foreign_message,
    id_text,
    marks_of,
)
from celery_resilience.outcome import (
    ENDED,
    EVENTS,
    Ended,
    Outcome,
    Reason,
    Settlement,
)
from celery_resilience.redaction import safe_text
from celery_resilience.trace_ids import traceparent_of

logger = logging.getLogger("celery_resilience.delivery")

#: The bodies of larger messages hold the main process up while they are decoded.
LARGE_BYTES = 256 * 1024

#: Seconds that a child which waits for a job has to accept the one it is written.
ACCEPTED_WITHIN_S = 2.0


if TYPE_CHECKING:
    CeleryConsumer: TypeAlias = Any
else:
    CeleryConsumer = object  # the real one is given to `build_consumer_class`


class ResilientConsumer(CeleryConsumer):  # type: ignore[misc]
    """
    The part of a Consumer class that is ours; see `build_consumer_class`.

    Attributes:
        deliveries: The table of the worker's deliveries.
        visibility: Keeps the messages that this worker holds on Redis.
        prepare_tasks: Called before the strategies are made, at each start.
        is_failed_queue: Whether a queue is collected, and not consumed as tasks.
        shelve: Given a message and what Celery does with it; whether the message waits
            elsewhere. None: none does.
    """

    deliveries: ClassVar[Deliveries]
    visibility: ClassVar[RedisVisibility]
    prepare_tasks: ClassVar[Callable[[], None]]
    is_failed_queue: ClassVar[Callable[[str], bool]]
    shelve: ClassVar[Callable[[Any, Callable[[Any], Any]], bool] | None] = None

    def update_strategies(self) -> None:
        """Give every resilient task our Request before its strategy is made."""
        type(self).prepare_tasks()
        super().update_strategies()

    def add_task_queue(self, queue: Any, *args: Any, **kwargs: Any) -> None:
        """Consume from another queue, unless it is one that is collected."""
        name = getattr(queue, "name", queue)
        if type(self).is_failed_queue(name):
            logger.error(
                "refused to consume %s as tasks: it is a failed queue, or one of "
                "resilience_collect_queues; `failed collect` empties it",
                name,
            )
            return
        super().add_task_queue(queue, *args, **kwargs)

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        """The broker's connection is lost: hold on to what is running."""
        if not self.visibility.connection_lost(self):
            self.deliveries.given_back()
        super().on_connection_error_after_connected(exc)

    def on_close(self) -> None:
        """Celery drops what has not started; the broker delivers it again."""
        try:
            _pools.hear_what_is_accepted(
                self.pool, within_s=ACCEPTED_WITHIN_S, clock=time.monotonic
            )
        except Exception:
            logger.exception("what was written to a child may run twice")
        keep = self.deliveries.will_run(self)
        self.deliveries.note_untouched(self.pool)
        super().on_close()
        self.deliveries.drop_unstarted(keep)

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Callable[[Any], Any]:
        """Wrap Celery's handler so that a malformed message does not end the worker."""
        handle = super().create_task_handler(*args, **kwargs)
        shelve = type(self).shelve

        def receive(message: Any, is_shelved: bool = False) -> Any:
            try:
                if not is_shelved and shelve is not None and shelve(message, hold):
                    return None
                return handle(message)
            except Exception as exc:
                # Celery 5.7 ends the worker here, or on Redis, where kombu takes
                # a KeyError for a lost connection, reconnects for ever.
                defect = malformation(message)
                if not defect:
                    raise
                self._keep(
                    message, Reason.MALFORMED, exc, defect, lambda: _reject(message)
                )

        def hold(message: Any) -> Any:
            return receive(message, is_shelved=True)

        def on_task_received(message: Any) -> Any:
            if is_draining() and not is_forgotten(message):
                # A loop that blocks takes some more before it ends (``loops.py``,
                # Celery 5.7).
                message.reject_log_error(logger, self.connection_errors, requeue=True)
                return None
            if message.body and len(message.body) > LARGE_BYTES:
                emit(
                    "delivery.large_message_received",
                    task=_announced_name(message),
                    bytes=len(message.body),
                )
            return receive(message)

        return on_task_received

    def on_unknown_message(self, body: Any, message: Any) -> None:
        """Keep a message without a task's name, of another system perhaps."""
        then = super().on_unknown_message
        defect = malformation(message) or "the message names no task"
        self._keep(message, Reason.MALFORMED, None, defect, lambda: then(body, message))

    def on_unknown_task(self, body: Any, message: Any, exc: Exception) -> None:
        """Keep a message whose task this worker does not have."""
        then = super().on_unknown_task
        defect = malformation(message)
        if defect:
            self._keep(message, Reason.MALFORMED, exc, defect, lambda: _reject(message))
        else:
            self._keep(
                message,
                Reason.UNKNOWN_TASK,
                None,
                f"no task named {_task_name(message)!r} is registered",
                lambda: then(body, message, exc),
            )

    def on_invalid_task(self, body: Any, message: Any, exc: Exception) -> None:
        """Keep a message whose content is refused or cannot be a call."""
        then = super().on_invalid_task
        refused = isinstance(exc, ContentDisallowed)
        self._keep(
            message,
            Reason.NOT_ACCEPTED if refused else Reason.MALFORMED,
            exc,
            safe_text(exc),
            lambda: then(body, message, exc),
        )

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        """Keep a message whose body does not decode."""
        then = super().on_decode_error
        refused = isinstance(exc, ContentDisallowed)
        self._keep(
            message,
            Reason.NOT_ACCEPTED if refused else Reason.UNDECODABLE,
            exc,
            safe_text(exc),
            lambda: then(message, exc),
            settled_as="acknowledge",
        )

    def on_foreign(
        self, raw: Any, queue: str, forget: Callable[[], None] | None
    ) -> None:
        """
        Keep what lay on a virtual transport's queue and is no kombu message.

        It is gone from the queue, for kombu takes before it looks, unless there is
        something to *forget* it with.
        """
        body = raw if isinstance(raw, bytes) else json.dumps(raw, default=str).encode()
        original = foreign_message(body, queue)
        self._keep_original(
            original,
            Reason.MALFORMED,
            None,
            "not a message of kombu's: another system writes to this queue",
            then=forget or (lambda: None),
            acknowledged=forget is None,
        )

    def _keep(
        self,
        message: Any,
        reason: Reason,
        exc: BaseException | None,
        text: str,
        then: Callable[[], None],
        settled_as: str = "reject",
    ) -> None:
        """Keep *message*, and only then let Celery reject or acknowledge it."""
        held = self.deliveries.held

        def kept() -> None:
            held.discard(message)
            # Said first: if the connection is lost it is done on the next one.
            message.settled_as = settled_as
            if self.visibility.is_lost:
                _kombu_redis.leave_alone(message)
            then()

        held.add(message)
        original = self.deliveries.original(message)
        self._keep_original(original, reason, exc, text, kept)

    def _keep_original(
        self,
        original: OriginalMessage,
        reason: Reason,
        exc: BaseException | None,
        text: str,
        then: Callable[[], None],
        acknowledged: bool = False,
    ) -> None:
        deliveries = self.deliveries
        kind = type_name(type(exc)) if exc is not None else "NotRegistered"
        if reason is Reason.MALFORMED:
            kind = "InvalidTaskError"
        # The text of a decoder's error tells where in the body it is.
        defect = text if reason is Reason.MALFORMED else ""
        task = original.headers.get("task")
        task = task if isinstance(task, str) else ""
        settlement = Settlement(
            outcome=Outcome.FAILED,
            reason=reason,
            task=task,
            task_id=id_text(original.headers.get("id")),
            root_id=id_text(original.headers.get("root_id")) or None,
            parent_id=id_text(original.headers.get("parent_id")) or None,
            queue=original.queue,
            worker=deliveries.worker,
            failure=Failure(kind, text, fingerprint_of(reason, kind, task, defect)),
            marks=marks_of(original.headers),
            traceparent=traceparent_of(original.headers),
        )
        deliveries.received += 1
        deliveries.counts[Outcome.FAILED] += 1
        envelope = deliveries.keeps.message_for(settlement, original)
        emit(ENDED, ended=Ended(task, original.queue, Outcome.FAILED))
        emit(EVENTS[Outcome.FAILED], settlement=settlement)
        if envelope is None:
            then()
            return
        deliveries.outbox.put(
            Outgoing(
                message=envelope,
                then=then,
                keep=True,
                acknowledged=acknowledged,
                remade=True,
                what=f"a message of queue {original.queue} ({reason})",
            )
        )


def build_consumer_class(base: type[Any], **attributes: Any) -> type[Any]:
    """
    A Consumer class that keeps what never becomes a request, on top of *base*.

    Args:
        base: Celery's Consumer class, or the app's own.
        attributes: Those of `ResilientConsumer`.
    """
    if issubclass(base, ResilientConsumer):
        return base
    wrapped = {
        name: staticmethod(value) if callable(value) else value
        for name, value in attributes.items()
    }
    return type("ResilientConsumer", (ResilientConsumer, base), wrapped)


def _task_name(message: Any) -> Any:
    headers = message.headers or {}
    return headers["task"] if "task" in headers else message.payload.get("task")


def _announced_name(message: Any) -> str:
    """The task that a message's headers name, without decoding its body."""
    headers = message.headers
    name = headers.get("task") if isinstance(headers, dict) else None
    return name if isinstance(name, str) else ""


def _reject(message: Any) -> None:
    message.reject_log_error(logger, (OSError,))
