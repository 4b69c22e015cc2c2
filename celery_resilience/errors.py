"""Every exception that this package raises on purpose.

An exception's docstring is its message when it is raised without one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from celery.exceptions import (
    Ignore,
    ImproperlyConfigured,
    Reject,
    Retry,
    SoftTimeLimitExceeded,
)

from celery_resilience.redaction import safe_text


class ResilienceError(Exception):
    """Something in celery-resilience went wrong."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or (type(self).__doc__ or "").split("\n")[0])


class ConfigurationError(ResilienceError, ImproperlyConfigured):
    """A setting or a task option has a value that is not accepted."""


class MissingExtra(ResilienceError, ImportError):
    """A library is needed that is not installed."""

    @classmethod
    def of(cls, library: str, extra: str, why: str) -> MissingExtra:
        """Name the library, the extra that brings it, and what asked for it."""
        return cls(
            f"{why} needs {library}, which is not installed: "
            f"pip install 'celery-resilience[{extra}]'"
        )


class StoreUnavailable(ResilienceError):
    """The store did not answer; nothing is known about what it holds."""


class TooBusy(StoreUnavailable):
    """Others were always quicker to change what is stored."""


class SchemaMismatch(ResilienceError):
    """The store's tables were made by another release of celery-resilience."""


class BrokerUnavailable(ResilienceError):
    """The broker did not answer within the time limit."""


class PublishRefused(ResilienceError):
    """The broker answered, and did not take the message."""


class NoRoute(PublishRefused):
    """NO_ROUTE: the broker has no queue of that name."""


class NotFound(ResilienceError):
    """There is no failed task with that id."""


class RetryNotPublished(ResilienceError):
    """The task's retry could not be published."""

    @classmethod
    def of(cls, publish_error: object, cause: object) -> RetryNotPublished:
        """Name what the broker said, and what the task had raised."""
        raised = ""
        if cause is not None:
            raised = f"; the task had raised {type(cause).__name__}: {safe_text(cause)}"
        return cls(
            f"the retry could not be published: {safe_text(publish_error)}{raised}"
        )


class BroadcastIsOnce(ResilienceError):
    """A broadcast cannot be sent again to one worker: this run was its only one."""


class TaskExited(ResilienceError):
    """The task raised SystemExit or another exception that is not an Exception.

    It stands in for the original in the result backend, where the original
    would end the process of whoever asks for the result.
    """


class TaskRanOutOfMemory(ResilienceError):
    """The task raised MemoryError.

    It stands in for the original in the worker's main process, where Celery
    5.7 takes a MemoryError for its own and exits
    (``celery/worker/request.py:679``).
    """


class MemoryLimitExceeded(ResilienceError):
    """The run had more memory than its limit.

    Raised within the body where that can still clean up: catch it, let go, raise it
    again.

    Args:
        message: What happened, with the figures.
        task: The task's name.
        used_mib: What the run had above its start.
        limit_mib: What it may have.
    """

    def __init__(
        self,
        message: str | None = None,
        task: str = "",
        used_mib: float = 0.0,
        limit_mib: float = 0.0,
    ) -> None:
        super().__init__(message)
        self.task = task
        self.used_mib = used_mib
        self.limit_mib = limit_mib

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.task, self.used_mib, self.limit_mib)


class Skip(Ignore):
    """End the task as SUCCESS without its effect; chains and chords go on.

    An Ignore, so that `autoretry_for = (Exception,)` lets it pass.

    Args:
        reason: Why, for the log and the counts.
        result: What is stored as the task's result.
    """

    def __init__(self, reason: str = "", result: Any = None) -> None:
        super().__init__(reason, result)
        self.reason = reason
        self.result = result


class Snooze(Retry):
    """Run the task again later without spending a retry.

    Args:
        countdown_s: Seconds until it runs again, at least 0.
        reason: Why, for the log and the counts.
    """

    def __init__(self, countdown_s: float, reason: str = "") -> None:
        if countdown_s < 0:
            raise ValueError(f"countdown_s must be at least 0, got {countdown_s!r}")
        when: Any = countdown_s
        super().__init__(message=reason or "snoozed", when=when)
        self.countdown_s = countdown_s
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.countdown_s, self.reason)


class CircuitIsOpen(ResilienceError):
    """The circuit is open: the call was not made.

    What is raised is a `CircuitOpen`.

    Args:
        message: Its text; None: made of the others.
        name: The circuit's.
        retry_after_s: Seconds until it is worth another look.
        generation: Which opening it is.
    """

    def __init__(
        self,
        message: str | None = None,
        name: str = "",
        retry_after_s: float = 0.0,
        generation: int = 0,
    ) -> None:
        # Made a thousand times a second while a dependency is away.
        self.message = message
        self.name = name
        self.retry_after_s = retry_after_s
        self.generation = generation

    def __str__(self) -> str:
        if self.message or not self.name:
            return self.message or (type(self).__doc__ or "").split("\n")[0]
        return f"circuit {self.name} is open for another {self.retry_after_s:.1f} s"

    def __reduce__(self) -> tuple[Any, ...]:
        said = (self.message, self.name, self.retry_after_s, self.generation)
        return type(self), said


class PassesAutoretry(Retry):
    """Of the exceptions that `autoretry_for = (Exception,)` lets pass."""


class CircuitSnooze(Snooze):
    """A circuit is open: the main process sends the message again, with our marks.

    Args:
        countdown_s: Seconds until it runs again.
        name: The circuit's.
        since: Wall time in seconds since which circuits keep the task waiting.
    """

    def __init__(self, countdown_s: float, name: str, since: float) -> None:
        super().__init__(countdown_s, "circuit_open")
        self.name = name
        self.marks = {"waits_since": since}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.countdown_s, self.name, self.marks["waits_since"])


class RetryByRule(Retry):
    """One of the task's retry rules has sent it again.

    Attributes:
        raised: What the body had raised; not beyond the process that ran it.
    """

    raised: BaseException | None = None


class RetrySnooze(Snooze):
    """A retry is not due yet: the main process sends its message again, with our marks.

    Args:
        countdown_s: Seconds until it is looked at again.
        reason: Why, for the log and the counts.
        marks: Ours on the message; None takes one away.
    """

    def __init__(self, countdown_s: float, reason: str, marks: Mapping[str, Any]):
        super().__init__(countdown_s, reason)
        self.marks = dict(marks)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.countdown_s, self.reason, self.marks)


class HeldFromAutoretry(PassesAutoretry):
    """Carries what a body raised past `autoretry_for`: a retry rule is for it."""

    def __init__(self, raised: BaseException) -> None:
        super().__init__(type(raised).__name__)
        self.raised = raised

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.raised,)


class SendAgain(Ignore):
    """Tell the main process to send this delivery's message again, unchanged in state.

    Raised by our own rooms before the body starts, never by a task.
    """

    def __init__(self, reason: str, delay_s: float, marks: Mapping[str, Any]) -> None:
        super().__init__(reason, delay_s, dict(marks))
        self.reason = reason
        self.delay_s = delay_s
        self.marks = dict(marks)


class DropDelivery(Ignore):
    """Tell the main process to acknowledge this delivery without running it.

    Raised by our own rooms before the body starts, never by a task.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Replaced(Ignore):
    """Tell the main process that another message goes on with this one's replay."""

    def __init__(self) -> None:
        super().__init__("replaced")
        self.reason = "replaced"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


class TooManyCrashes(ResilienceError):
    """Every allowed run of this task ended with its process."""

    def __init__(self, message: str | None = None, runs: int = 0) -> None:
        super().__init__(message)
        self.runs = runs

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.runs)


class MessageTooLarge(ResilienceError, ValueError):
    """A message has more bytes than its task's `max_message_kib`; it was not sent."""


class NotSerializable(ResilienceError, TypeError):
    """Arguments would not arrive as they are; their message was not sent."""


#: What steers Celery, and says nothing of how a call went.
CONTROL_FLOW: tuple[type[Exception], ...] = (Ignore, Reject, Retry)

#: What a rule for a base class, such as Exception, is not meant for.
NAMED_ONLY: tuple[type[Exception], ...] = (
    *CONTROL_FLOW,
    ResilienceError,
    SoftTimeLimitExceeded,
)


#: By which a task is asked to end.
SOFT_LIMITS: tuple[type[Exception], ...] = (SoftTimeLimitExceeded,)


class TooManyErrors(ResilienceError):
    """More items of a batch went wrong than it may have.

    Attributes:
        report: What became of the items, see `BatchReport`.
    """

    def __init__(
        self, message: str | None = None, report: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(message)
        self.report = dict(report or {})

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.report)

    @classmethod
    def of(cls, verdict: str, report: Mapping[str, Any]) -> TooManyErrors:
        """Say how many, and what most of them were."""
        kinds = sorted(report["errors"].items(), key=lambda kind: -kind[1])
        most = ", ".join(f"{kind} ({count})" for kind, count in kinds[:3])
        return cls(
            f"batch {report['name']}: {verdict}: {report['skipped']} skipped and "
            f"{report['failed']} failed, {report['ok']} ok; {most}",
            report,
        )


class NoKey(ResilienceError, TypeError):
    """No idempotency key can be made of these arguments."""


class KeyMismatch(ResilienceError):
    """The idempotency key belongs to a call with other arguments."""


class AlreadyRunning(ResilienceError):
    """Another run has the idempotency key."""


class AlreadyDone(ResilienceError):
    """The effect of this idempotency key has happened."""


class RunInterrupted(ResilienceError):
    """An earlier run of this key ended with its process: its effect may have happened."""


class LeftBehind(ResilienceError):
    """The task left a transaction, a connection or a session's state behind."""


class AskAgain(SendAgain):
    """Tell the main process to send the message again, as a snooze.

    Not a Snooze, with which Celery would store RETRY over what the run has stored that
    this message is a redelivery of.
    """
