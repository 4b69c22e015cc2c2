"""The only user of undocumented names of Celery's, with those beside it.

This one has what every process needs that imports a task. `_celery_run` has what the
run of a task needs, `_celery_worker` what a worker does; see `_pools` and `_kombu` for
others. Each function names the release in which its door was read.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from types import SimpleNamespace
from typing import Any

from celery import _state
from celery.app.task import Task
from celery.canvas import Signature
from celery.result import denied_join_result

from celery_resilience.errors import ConfigurationError, HeldFromAutoretry
from celery_resilience.message import OriginalMessage
from celery_resilience.serialization import serialized

# --- apps ---------------------------------------------------------------------------


def is_made_for_asking(app: Any) -> bool:
    """Whether Celery has made *app* for who asked before there was any."""
    return bool(app.main == "default" and not app.set_as_current)


def only_app() -> Any | None:
    """
    The app of this process, where there is just one.

    The current app is one of each thread (``_state.py:64``, Celery 5.7).
    """
    try:
        found = [
            app for app in [*_state._get_active_apps()] if not is_made_for_asking(app)
        ]
    except (AttributeError, RuntimeError):
        # Not there any more; or another thread has made one.
        return None
    return found[0] if len(found) == 1 else None


def running() -> tuple[Any, Any] | None:
    """
    The task that runs in this thread, and its request; None where none does.

    The innermost one that was sent or applied: what is called as a function is a part of
    its caller (``_state.py:136``, ``app/task.py:545``, Celery 5.7).
    """
    task: Any = _state.get_current_task()
    if task is None:
        return None
    request: Any = task.request_stack.top
    if request is not None and request.id is not None:
        return task, request
    for task in reversed(_state._task_stack.stack):
        for request in reversed(task.request_stack.stack):
            if request.id is not None:
                return task, request
    return None


# --- the options of a task ----------------------------------------------------------


def is_acknowledged_on(task: Task[Any, Any], *, time_limit: bool) -> bool:
    """
    Whether a late-acked task is acknowledged when it failed.

    Celery 5.7 has one option each for failures and time limits; before it,
    one for both, and an option of the later name means nothing.
    """
    name = "acks_on_timeout" if time_limit else "acks_on_failure"
    flag = getattr(task, name) if hasattr(Task, name) else None
    if flag is None:
        flag = task.acks_on_failure_or_timeout
    return True if flag is None else bool(flag)


def time_limit_of(task: Task[Any, Any], *, soft: bool = False) -> float | None:
    """
    Seconds until a run of *task* is ended in a prefork pool; None: never.

    A task takes the app's limit as its own since Celery 5.7. Before it, the pool
    has the app's limit, for tasks without their own.
    """
    name = "soft_time_limit" if soft else "time_limit"
    own: float | None = getattr(task, name)
    app: float | None = task.app.conf[f"task_{name}"]
    return app if own is None else own


# --- around a task body -------------------------------------------------------------


def has_a_call(task: type[Any], *, after: type[Any]) -> bool:
    """Whether a base class of *task* behind *after* has a `__call__` of the app's own."""
    mro = task.__mro__
    bases = mro[mro.index(after) + 1 :]
    return next(base for base in bases if "__call__" in vars(base)) is not Task


def is_a_delivery(request: Any) -> bool:
    """
    Whether a worker's tracer is about to run the body of *request*.

    Not where a task is called directly, or by `apply()`, or by itself.
    """
    return not (request.called_directly or request._protected or request.is_eager)


def is_in_body(request: Any) -> bool:
    """Whether a worker runs the body of *request*, and no call of the task in it."""
    return (
        request is not None
        and bool(request._protected)
        and not (request.called_directly or request.is_eager)
    )


def signature_of(signature: Any, task_id: Any) -> Any:
    """
    The signature whose message will have *task_id*, or None.

    A chain's member, or a chord's body, once it is frozen (Celery 5.7, ``canvas.py``).
    """
    parts = [*(getattr(signature, "tasks", None) or ())]
    body = getattr(signature, "body", None)
    if not parts and body is None:
        return signature if signature.options.get("task_id") == task_id else None
    for part in (*parts, *(() if body is None else (body,))):
        found = signature_of(part, task_id)
        if found is not None:
            return found
    return None


def enter_body(request: Any) -> None:
    """
    Let a call of the same task within its body be a direct one.

    What Celery's own `__call__` does in a worker before it calls `run`
    (``app/trace.py:877``, Celery 5.7).
    """
    request._protected = 1


def let_decide_before_autoretry(
    task: Any, is_decided: Callable[[BaseException], bool]
) -> None:
    """
    Carry past `autoretry_for` what *is_decided* says so of, once for each task.

    What `autoretry_for` wraps is an attribute of the task, which it looks up at each
    call (``app/autoretry.py:33``, Celery 5.7).
    """
    body = vars(task).get("_orig_run")
    if body is None or hasattr(body, "decides_first"):
        return

    @wraps(body)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return body(*args, **kwargs)
        except Exception as exc:
            if is_in_body(task.request_stack.top) and is_decided(exc):
                raise HeldFromAutoretry(exc) from None
            raise

    run.decides_first = True
    task._orig_run = run


# --- what is sent -------------------------------------------------------------------


def sent_arguments(
    task: Any, args: Any, kwargs: Any, serializer: str | None
) -> tuple[Any, Any]:
    """
    The arguments of a call as `apply_async` hands them to the serializer.

    Without pydantic's models, which Celery 5.7 dumps there (``app/task.py:730``);
    earlier releases do not take them.
    """
    dump = getattr(task, "_dump_pydantic_arguments", None)
    if dump is None or serializer == "pickle":
        return args, kwargs
    dumped: tuple[Any, Any] = dump(args, kwargs)
    return dumped


class _Recorder:
    """In the place of a producer: notes the first message that is published by it."""

    def __init__(self) -> None:
        self.published: tuple[Any, dict[str, Any]] | None = None
        self.connection = SimpleNamespace(_reraise_as_library_errors=nullcontext)

    def publish(self, body: Any, **options: Any) -> None:
        """Note it; what follows is the event that it was sent."""
        if self.published is None:
            self.published = (body, options)


def message_of(signature: Any, task_id: str) -> OriginalMessage:
    """
    The message that a signature would be sent as; it is not sent.

    What `amqp.send_task_message` hands to its producer (``app/amqp.py:610``,
    Celery 5.7).

    Raises:
        ConfigurationError: It is no signature of one task; or `apply_async` did not come
            to send one.
    """
    if not isinstance(signature, Signature) or signature.task.startswith("celery."):
        raise ConfigurationError(
            "what keeps a failed item must be the signature of one task, such as "
            f"enrich.s(7), got {signature!r}"
        )
    recorder = _Recorder()
    producer: Any = recorder
    if not signature.app.conf.task_always_eager:
        # No backend prepares for a result that nobody waits for.
        with denied_join_result():
            signature.apply_async(task_id=task_id, producer=producer)
    if recorder.published is None:
        raise ConfigurationError(
            f"the task {signature.task} was not sent as a message: is it eager, or its "
            "apply_async another?"
        )
    body, options = recorder.published
    content_type, encoding, data = serialized(body, options.pop("serializer"))
    declared = options.pop("declare", None) or ()
    queue = next((q.name for q in declared), options["routing_key"])
    headers = options.pop("headers")
    exchange = options.pop("exchange") or ""
    routing_key = options.pop("routing_key")
    return OriginalMessage(
        body=data,
        headers=headers,
        properties={
            name: value
            for name, value in options.items()
            if value is not None and name in _MESSAGE_PROPERTIES
        },
        content_type=content_type,
        content_encoding=encoding,
        exchange=getattr(exchange, "name", exchange),
        routing_key=routing_key or "",
        queue=queue,
    )


#: Of the options of a publish, those that arrive with the message.
_MESSAGE_PROPERTIES = ("correlation_id", "reply_to", "priority", "delivery_mode")
