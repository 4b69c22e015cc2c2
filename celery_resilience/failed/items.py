"""An item of a batch as a failed task, whose replay runs a task for that item alone."""

from __future__ import annotations

import socket
import traceback
from collections.abc import Callable
from functools import partial
from os import getpid
from typing import Any, Protocol

from celery_resilience.failed.capture import Capture
from celery_resilience.failure import cut_traceback, describe, failure_of
from celery_resilience.message import OriginalMessage, id_text
from celery_resilience.outcome import Outcome, Reason, Settlement
from celery_resilience.redaction import mask, show_arguments


class Publish(Protocol):
    """Stores a message in its queue, or raises."""

    def __call__(self, message: OriginalMessage, *, declare: bool = False) -> None: ...


class ItemKeeper:
    """
    Makes failed tasks of items, in the process that works at them.

    Args:
        capture: Makes their envelopes.
        publish: Confirmed; the worker's outbox is another process's.
    """

    def __init__(self, capture: Capture, publish: Publish) -> None:
        self._capture = capture
        self._publish = publish

    def keep(
        self,
        signature: Any,
        message: OriginalMessage,
        exc: BaseException,
        *,
        task_id: str,
        request: Any,
    ) -> Callable[[], object]:
        """
        Make one at once; what this returns stores it.

        That does nothing where the routes keep no failure of the item's task, and it
        raises BrokerUnavailable or PublishRefused.

        Args:
            signature: What its replay runs.
            message: That of the signature.
            exc: Why the item failed.
            task_id: Of the failed task.
            request: Of the run that the batch is in.
        """
        shown = show_arguments(
            signature.args,
            signature.kwargs,
            parameters=getattr(signature.type, "parameter_names", ()),
            hidden=getattr(signature.type, "hidden_names", ()),
        )
        described = describe(exc, (signature.task or "").partition(".")[0])
        described["message"] = mask(described["message"], shown.secrets)
        text = "".join(traceback.format_exception(exc))
        settlement = Settlement(
            outcome=Outcome.FAILED,
            reason=Reason.EXCEPTION,
            task=signature.task,
            task_id=task_id,
            queue=message.queue,
            worker=request.hostname or socket.gethostname(),
            root_id=id_text(request.root_id) or None,
            parent_id=id_text(request.id) or None,
            pid=getpid(),
            failure=failure_of(described, mask(cut_traceback(text), shown.secrets)),
            args=shown.args,
            kwargs=shown.kwargs,
            arguments=shown.named,
            marks=message.marks,
        )
        envelope = self._capture.message_for(settlement, message)
        if envelope is None:
            return int
        return partial(self._publish, envelope, declare=True)
