"""ResilientTask: the order of the rooms around a task body."""

from __future__ import annotations

import contextlib
import inspect
import signal
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from types import MethodType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypedDict

from celery import Task
from celery.app.task import Context
from celery.exceptions import Ignore, Reject, Retry

from celery_resilience import _celery
from celery_resilience.errors import (
    ConfigurationError,
    MissingExtra,
    Replaced,
    RetryNotPublished,
    Skip,
    TaskExited,
)
from celery_resilience.failure import describe
from celery_resilience.message import HEADER, id_text, marks_of
from celery_resilience.outcome import Reason
from celery_resilience.redaction import safe_text

if TYPE_CHECKING:
    from celery_resilience.install import ChildRooms, Installation

#: Where a request remembers the exception with which its retries were spent.
EXHAUSTED = "_resilience_exhausted"

#: Where a request remembers that another message reports how its replay ended.
REPLACED = "_resilience_replaced"

#: Marks that a retry or a replacement inherits: it belongs to the same replay.
INHERITED_MARKS = ("replay",)


#: Names of arguments; one string is no list of them.
Names = list[str] | tuple[str, ...] | set[str] | frozenset[str]


class TaskOptions(TypedDict, total=False):
    """
    The options of a resilient task, for type checkers: they check what they see here.

    `@app.task(base=ResilientTask, **TaskOptions(max_crashes=2))` is the same to
    Celery as `@app.task(base=ResilientTask, max_crashes=2)`, whose options no checker
    knows. What they mean is told at `ResilientTask`.
    """

    failed_queue: str | Literal[False] | None
    redact: Names
    max_crashes: int | None


class ResilientTask(Task):  # type: ignore[type-arg]
    """
    Base class of tasks whose failures are settled once, kept, shown and replayed.

    With it alone a task keeps its acknowledgement, retries, limits and results
    as the app says.

    Attributes:
        failed_queue: Name of the failed queue; None: by the routes; False: the
            task's failures are not kept.
        redact: Names of arguments that are never shown or logged, besides
            `resilience_redact`.
        max_crashes: Runs that may kill their process before the task is failed;
            None: `resilience_max_crashes`.
    """

    abstract = True

    failed_queue: str | Literal[False] | None = None
    redact: Names = ()
    max_crashes: int | None = None

    #: Set when the task is bound to an app.
    _installation: ClassVar[Installation | None] = None
    _base_has_a_call: ClassVar[bool] = True

    @classmethod
    def on_bound(cls, app: Any) -> None:
        """Check the options, and install into *app* if nothing else did."""
        from celery_resilience.install import install

        cls._installation = install(app)
        cls._base_has_a_call = _celery.has_a_call(cls, after=ResilientTask)
        check_options(cls)
        super().on_bound(app)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """
        Run the body, in a worker with the rooms around it.

        Where they are off, or the task is applied eagerly, only Skip is ours.

        0. replay fence and crash count, only for messages with a past;
        1. the body;
        2. the facts of a failure, for the settlement in the main process.
        """
        request = self.request_stack.top
        rooms = None if self._installation is None else self._installation.child
        if (
            rooms is None
            or request is None
            or not _celery.is_a_delivery(request)
            or self.name.startswith("celery.")
        ):
            try:
                return super().__call__(*args, **kwargs)
            except Skip as skip:
                if request is None or request.called_directly:
                    raise
                return skip.result
        after_body = None
        try:
            if HEADER in request.__dict__ or _is_redelivered(request):
                after_body = self._before_body(rooms, request)
            if self._base_has_a_call:
                return super().__call__(*args, **kwargs)
            _celery.enter_body(request)
            return self.run(*args, **kwargs)
        except Skip as skip:
            rooms.facts.send(id_text(request.id), {"skipped": safe_text(skip.reason)})
            return skip.result
        except Ignore as ignore:
            if REPLACED in vars(request):
                raise Replaced from ignore
            raise
        except (Retry, Reject):
            raise
        except BaseException as exc:
            if not rooms.is_ending(exc):
                self._send_facts(rooms, request, exc)
                if not isinstance(exc, Exception):
                    # It would end the child, or be lost on threads and gevent.
                    raise TaskExited(f"{type(exc).__name__}: {safe_text(exc)}") from exc
            # As without us: each frame is formatted and sent for each failure.
            exc.__traceback__ = exc.__traceback__ and exc.__traceback__.tb_next
            raise
        finally:
            if after_body is not None:
                with soft_limit_deferred():
                    after_body()

    def _before_body(
        self, rooms: ChildRooms, request: Context
    ) -> Callable[[], None] | None:
        """Ask whether a message with a past may run; returns what to do after it."""
        marks = marks_of(request.__dict__)
        with soft_limit_deferred():
            if "replay" in marks:
                rooms.fence.before(marks)
            if not self.acks_late:
                return None
            if "replay" not in marks and _is_redelivered(request):
                rooms.fence.before_redelivery(request.id or "")
            return rooms.starts.before(
                id_text(request.id),
                request.retries,
                marks,
                is_redelivered=_is_redelivered(request),
                max_crashes=self.max_crashes,
            )

    def _send_facts(
        self, rooms: ChildRooms, request: Context, exc: BaseException
    ) -> None:
        with soft_limit_deferred():
            package = (self.run.__module__ or "").partition(".")[0]
            facts = describe(exc, package)
            if vars(request).get(EXHAUSTED) == id(exc):
                facts["reason"] = Reason.RETRIES_EXHAUSTED
            rooms.facts.send(id_text(request.id), facts)

    def retry(self, *args: Any, **kwargs: Any) -> Any:
        """
        Celery's retry; one that cannot be published fails the task, with both reasons.

        Celery 5.7 rejects the message instead (``app/task.py:960``), which on
        most brokers drops it.
        """
        request = self.request_stack.top
        try:
            return super().retry(*args, **kwargs)
        except Retry:
            raise
        except Reject as reject:
            publish_error: BaseException = reject.args[0]
            raise RetryNotPublished.of(
                publish_error, kwargs.get("exc")
            ) from publish_error
        except BaseException as exc:
            if request is not None and not request.called_directly:
                vars(request)[EXHAUSTED] = id(exc)
            raise

    def signature_from_request(
        self, request: Context | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """A retry's signature, with the mark of its replay and no other."""
        signature = super().signature_from_request(request, *args, **kwargs)
        request = self.request_stack.top if request is None else request
        marks = inherited_marks(request)
        headers = signature.options.get("headers") or {}
        if marks or HEADER in headers:
            headers = {k: v for k, v in headers.items() if k != HEADER}
            signature.options["headers"] = {**headers, **marks}
        return signature

    def on_replace(self, sig: Any) -> Any:
        """Celery's replacement, which belongs to the same replay."""
        request = self.request_stack.top
        marks = inherited_marks(request)
        if request is not None and marks:
            heir = _celery.signature_of(sig, request.id)
            if heir is not None and isinstance(
                self.app.tasks.get(heir.task), ResilientTask
            ):
                headers = heir.options.get("headers") or {}
                heir.options["headers"] = {**headers, **marks}
                vars(request)[REPLACED] = True
        return super().on_replace(sig)

    def delay_on_commit(self, *args: Any, **kwargs: Any) -> None:
        """Send the task when the Django transaction is committed."""
        self._of_django("delay_on_commit")(*args, **kwargs)

    def apply_async_on_commit(self, *args: Any, **kwargs: Any) -> None:
        """Send the task with options when the Django transaction is committed."""
        self._of_django("apply_async_on_commit")(*args, **kwargs)

    def _of_django(self, name: str) -> Callable[..., None]:
        """
        A method of Celery's DjangoTask, or of the app's own base class mixed in.

        Celery gives DjangoTask only to tasks without a base of their own
        (``fixups/django.py``), and it imports Django.

        Raises:
            MissingExtra: Django is not installed.
        """
        own: Callable[..., None] | None = getattr(super(), name, None)
        if own is not None:
            return own
        try:
            from celery.contrib.django.task import DjangoTask
        except ModuleNotFoundError as exc:
            raise MissingExtra.of("Django", "django", name) from exc
        return MethodType(getattr(DjangoTask, name), self)

    @cached_property
    def parameter_names(self) -> tuple[str, ...]:
        """Names of the body's positional parameters, without a bound `self`."""
        return parameters_of(self.run)

    @cached_property
    def hidden_names(self) -> tuple[str, ...]:
        """Names of arguments that are never shown."""
        settings = self._installation and self._installation.settings
        return (*self.redact, *(settings.redact if settings else ()))


def inherited_marks(request: Context | None) -> dict[str, Any]:
    """The header by which what follows a run belongs to the same replay, or {}."""
    marks = marks_of(None if request is None else vars(request))
    kept = {name: marks[name] for name in INHERITED_MARKS if name in marks}
    return {HEADER: kept} if kept else {}


def parameters_of(run: Any) -> tuple[str, ...]:
    """Names of the positional parameters of a task's body, without a bound `self`."""
    try:
        parameters = inspect.signature(run).parameters.values()
    except (TypeError, ValueError):
        return ()
    return tuple(
        p.name
        for p in parameters
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    )


def _is_redelivered(request: Context) -> bool:
    return bool(request.delivery_info and request.delivery_info.get("redelivered"))


@contextlib.contextmanager
def soft_limit_deferred() -> Iterator[None]:
    """Hold a soft time limit's signal back while our own code runs."""
    soft_limit = getattr(signal, "SIGUSR1", None)  # billiard/pool.py:228
    if soft_limit is None:
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {soft_limit})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_names(value: Any) -> bool:
    return isinstance(value, list | tuple | set | frozenset) and all(
        isinstance(name, str) for name in value
    )


_CHECKS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "failed_queue": (
        lambda value: (
            value in (None, False) or (isinstance(value, str) and value != "")
        ),
        "the name of a queue, False or None",
    ),
    "redact": (_is_names, "a list of argument names"),
    "max_crashes": (
        lambda value: value is None or _is_count(value),
        "a whole number from 1, or None",
    ),
}

#: Options of the public contract whose feature this release does not have.
NOT_IN_THIS_RELEASE = (
    "idempotency_key",
    "idempotency_keep_s",
    "idempotency_lease_s",
    "if_running",
    "if_done",
    "if_interrupted",
    "unique_enqueue",
    "retry_rules",
    "circuit",
    "if_circuit_open",
    "memory_limit_mib",
    "max_message_kib",
)


def check_options(task: type[ResilientTask]) -> None:
    """
    Check a task's options where it is registered.

    Raises:
        ConfigurationError: Some are wrong; the message names the task, each
            option, its value and what is accepted.
    """
    wrong = [
        f"{name} must be {accepted}, got {getattr(task, name)!r}"
        for name, (is_right, accepted) in _CHECKS.items()
        if not is_right(getattr(task, name))
    ]
    wrong += [
        f"{name} is not in this release of celery-resilience: remove it"
        for name in NOT_IN_THIS_RELEASE
        if getattr(task, name, None)
    ]
    if wrong:
        raise ConfigurationError(f"task {task.name}: {'; '.join(wrong)}")
