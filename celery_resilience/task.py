"""ResilientTask: the order of the rooms around a task body."""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable, Sequence
from functools import cached_property, wraps
from types import MethodType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from celery import Task
from celery.app.task import Context
from celery.exceptions import Ignore, Reject, Retry, SoftTimeLimitExceeded

from celery_resilience import _celery
from celery_resilience.body import HEARS_OF_CIRCUITS, RUNNING
from celery_resilience.errors import (
    AlreadyDone,
    AlreadyRunning,
    CircuitIsOpen,
    ConfigurationError,
    HeldFromAutoretry,
    KeyMismatch,
    MissingExtra,
    Replaced,
    ResilienceError,
    RetryNotPublished,
    RunInterrupted,
    Skip,
    Snooze,
    TaskExited,
)
from celery_resilience.events import emit
from celery_resilience.message import (
    HEADER,
    KEY,
    RETRY,
    SENT_AT,
    has_past,
    id_text,
    marks_of,
)
from celery_resilience.redaction import safe_text
from celery_resilience.run_view import (
    COUNTED_FACT,
    COUNTS,
    HANDED_OVER,
    KEY_NAME,
    KEYED_RUN,
    RUN_FACTS,
    RunView,
)
from celery_resilience.settings import is_enabled
from celery_resilience.soft_limit import soft_limit_deferred
from celery_resilience.task_options import Names, nearly_options, wrong_options

if TYPE_CHECKING:
    from celery_resilience.circuits.task import IfOpen, TaskCircuit
    from celery_resilience.idempotency.options import IfDone, IfInterrupted, IfRunning
    from celery_resilience.idempotency.registered import TaskKeys
    from celery_resilience.idempotency.task import KeyedRun
    from celery_resilience.install import ChildRooms, Installation
    from celery_resilience.retries.rules import Never, On
    from celery_resilience.retries.task import TaskRules

logger = logging.getLogger("celery_resilience.task")

#: Where a request remembers the exception with which its retries were spent.
EXHAUSTED = "_resilience_exhausted"

#: Where a request remembers that another message reports how its replay ended.
REPLACED = "_resilience_replaced"

#: What a run is told that does not get its key.
REFUSALS = (AlreadyDone, AlreadyRunning, KeyMismatch, RunInterrupted)

#: Marks that a retry inherits: it belongs to the same replay, has the same key, and
#: failed as often before.
INHERITED_MARKS = ("replay", KEY, RETRY)

#: Those that another task inherits.
INHERITED_BY_ANOTHER = ("replay",)

#: Options that a task with a key has, unless it says otherwise.
ASKED_BY_KEY = ("acks_late", "reject_on_worker_lost")

#: In the place of what a circuit has let a run through by.
_NO_PERMIT = object()

#: What Celery's `apply_async` takes by position after the task's id.
POSITIONAL = ("producer", "link", "link_error", "shadow")


#: Options that Celery would take with a call, and nobody would read there.
_ONLY_OF_TASKS = frozenset(
    {
        *("idempotency_key", "idempotency_keep_s", "idempotency_lease_s"),
        *("if_running", "if_done", "if_interrupted", "unique_enqueue"),
    }
)


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
        idempotency_key: Names the effect of a call, which happens once: a template
            over the arguments, such as "charge:{order_id}"; a callable that takes
            them and returns the key, or None for no key; or True: all arguments. With
            it `acks_late` and `reject_on_worker_lost` are True unless the task says
            otherwise.
        idempotency_keep_s: Seconds a finished key is remembered.
        idempotency_lease_s: Seconds a run holds its key without a heartbeat.
        if_running: What becomes of a duplicate while another run has the key:
            "snooze" (it looks again later), "skip" (it ends; within a canvas it is
            snoozed) or "error".
        if_done: What becomes of a duplicate of a finished one: "return_saved" (it ends
            as SUCCESS with the saved result), "error" or "rerun".
        if_interrupted: What becomes of a run after one that ended with its process, of
            which nobody knows whether it had its effect: "rerun", "fail", or a callable
            that takes the arguments, looks, and returns whether the effect happened.
        unique_enqueue: A second send while the first waits is not sent, and returns
            the first one's AsyncResult.
        max_message_kib: More KiB of arguments and canvas, encoded and not compressed, are
            refused where they are sent, and so are arguments that would not arrive as
            they are. None: none is refused, and a worker warns of more than 256.
        memory_limit_mib: What a run may take besides what its child has at the start
            of it, in MiB, or as a share ("25%") of the container's memory; above it the
            run fails as `memory_limit`. None: `resilience_memory_limit_mib`. In the
            prefork pool only.
        retry_rules: What is tried again, how often and until when: a tuple of `On(…)` and
            `Never(…)`, the first that matches what the body raised. They decide before
            `autoretry_for`, and bring their own limits beside `max_retries`. What no
            rule is for stays Celery's.
        circuit: Name of the circuit that guards the task's body, or a
            `pybreaker.CircuitBreaker`: while it is open, the task does not run.
        if_circuit_open: What becomes of the task then, and where the body calls through
            an open one: "snooze" (it is sent again later, without a retry spent),
            "pause" (the same, and no worker consumes the circuit's queues), "fail", or a callable that takes the arguments and returns the result.
    """

    abstract = True

    failed_queue: str | Literal[False] | None = None
    redact: Names = ()
    max_crashes: int | None = None
    idempotency_key: str | Literal[True] | Callable[..., str | None] | None = None
    idempotency_keep_s: float = 86_400.0
    idempotency_lease_s: float = 60.0
    if_running: IfRunning = "snooze"
    if_done: IfDone = "return_saved"
    if_interrupted: IfInterrupted = "rerun"
    unique_enqueue: bool = False
    max_message_kib: float | None = None
    memory_limit_mib: float | str | None = None
    retry_rules: Sequence[On | Never] = ()
    circuit: Any = None
    if_circuit_open: IfOpen = "snooze"

    #: Set when the task is bound to an app.
    _installation: ClassVar[Installation | None] = None
    _base_has_a_call: ClassVar[bool] = True
    _keys: ClassVar[TaskKeys | None] = None
    _circuit: ClassVar[TaskCircuit | None] = None
    _rules: ClassVar[TaskRules | None] = None

    #: Options that are True because the task has a key.
    asked_by_key: ClassVar[tuple[str, ...]] = ()

    #: What the task itself says, and no base class or annotation.
    own_options: ClassVar[frozenset[str]] = frozenset()

    #: Those that the task itself leaves to the app.
    _left_to_app: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def bind(cls, app: Any) -> Any:
        """Bind to *app*; a key asks that a message outlives its worker."""
        if not cls.__bound__:
            cls.own_options = frozenset(vars(cls))
            cls._left_to_app = tuple(
                name for name in ASKED_BY_KEY if getattr(cls, name) is None
            )
        return super().bind(app)

    @classmethod
    def annotate(cls) -> None:
        """
        Apply `task_annotations`, which may give the task a key.

        Celery has filled in before this what the app says; without that, it is seen
        what nobody says.
        """
        of_app = {name: getattr(cls, name) for name in cls._left_to_app}
        for name in of_app:
            setattr(cls, name, None)
        super().annotate()
        unsaid = [name for name in of_app if getattr(cls, name) is None]
        app: Any = cls.app
        conf = app.conf
        has_key = cls.idempotency_key is not None and is_enabled(
            conf, prefix=getattr(conf, "prefix", None) or ""
        )
        cls.asked_by_key = tuple(unsaid) if has_key else ()
        for name in unsaid:
            setattr(cls, name, True if has_key else of_app[name])

    @classmethod
    def on_bound(cls, app: Any) -> None:
        """Check the options, and install into *app* if nothing else did."""
        from celery_resilience.install import install

        cls._installation = install(app)
        cls._base_has_a_call = _celery.has_a_call(cls, after=ResilientTask)
        run_on_loop(cls)
        cls._keys, cls._circuit, cls._rules = check_options(cls, cls._installation)
        super().on_bound(app)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """
        Run the body, in a worker with the rooms around it.

        Where they are off, or the task is applied eagerly, only Skip is ours.

        0. replay fence and crash count, only for messages with a past;
        1. the circuit lets it through;
        2. the idempotency key is taken;
        3. what the body may leave behind is looked at, before and after it;
        4. the body;
        5. where it has failed, the retry rules are asked; the key is finished, and the
           circuit told;
        6. the facts of a failure, for the settlement in the main process.
        """
        request = self.request_stack.top
        rooms = None if self._installation is None else self._installation.child
        if (
            rooms is None
            or request is None
            or not _celery.is_a_delivery(request)
            or self.name.startswith("celery.")
        ):
            token = running = None
            if request is not None and request.is_eager:
                # Nobody hears that its circuit is open but who has applied it.
                token = HEARS_OF_CIRCUITS.set(False)
                running = RUNNING.set((self, request))
            try:
                return super().__call__(*args, **kwargs)
            except Skip as skip:
                if request is None or request.called_directly:
                    raise
                return skip.result
            except Snooze as snooze:
                if rooms is not None or not _celery.is_in_body(request):
                    raise
                assert request is not None
                # Plain Celery takes it for a retry that has been sent.
                count = request.retries + 1
                return super().retry(countdown=snooze.countdown_s, max_retries=count)
            finally:
                if token is not None and running is not None:
                    RUNNING.reset(running)
                    HEARS_OF_CIRCUITS.reset(token)
        after_body = None
        try:
            if HEADER in request.__dict__ and isinstance(request.headers, dict):
                # What the body hands on of its headers is not about its messages.
                request.headers.pop(HEADER, None)
            if has_past(request.__dict__) or _is_redelivered(request):
                after_body = self._before_body(rooms, request)
            if self._circuit is not None:
                return self._run_guarded(rooms, request, args, kwargs)
            if self._keys is not None:
                return self._run_keyed(rooms, request, args, kwargs)
            return self._run_body(rooms, request, args, kwargs)
        except Skip as skip:
            self._tell(rooms, request, {"skipped": safe_text(skip.reason)})
            return skip.result
        except Ignore as ignore:
            if REPLACED in vars(request):
                raise Replaced from ignore
            raise
        except (Retry, Reject):
            raise
        except BaseException as exc:
            sent = retry_before(exc)
            if sent is not None:
                raise sent from None
            if not rooms.is_ending(exc):
                self._send_facts(rooms, request, exc)
                if not isinstance(exc, Exception):
                    # It would end the child, or be lost on threads and gevent.
                    raise TaskExited(f"{type(exc).__name__}: {safe_text(exc)}") from exc
            # As without us: each frame is formatted and sent for each failure.
            exc.__traceback__ = exc.__traceback__ and exc.__traceback__.tb_next
            raise
        finally:
            self._leave(rooms, request, after_body)

    def _leave(
        self,
        rooms: ChildRooms,
        request: Context,
        after_body: Callable[[], None] | None,
    ) -> None:
        """Tell what was counted, and that a message with a past has run."""
        try:
            if COUNTS in vars(request) or RUN_FACTS in vars(request):
                with soft_limit_deferred():
                    self._tell(rooms, request, {})
            if after_body is not None:
                with soft_limit_deferred():
                    after_body()
        except SoftTimeLimitExceeded as late:
            sent = retry_before(late)
            if sent is None:
                raise
            raise sent from None

    def _run_guarded(
        self,
        rooms: ChildRooms,
        request: Context,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run the body if its circuit lets it, and tell what came of it."""
        circuit = self._circuit
        assert circuit is not None
        permit: Any = _NO_PERMIT
        run = self._run_body if self._keys is None else self._run_keyed
        try:
            with soft_limit_deferred():
                # A soft limit that passed meanwhile is raised here, with the permit.
                permit = circuit.enter()
            result = run(rooms, request, args, kwargs)
        except BaseException as exc:
            if permit is _NO_PERMIT:
                if isinstance(exc, CircuitIsOpen):
                    return self._when_open(request, exc, args, kwargs)
                raise
            with soft_limit_deferred():
                # What ends the process says nothing of the dependency; a duplicate
                # and a snooze neither, and give back what they were let through by.
                circuit.leave(permit, exc, self)
            exc.__traceback__ = exc.__traceback__ and exc.__traceback__.tb_next
            raise
        with soft_limit_deferred():
            circuit.leave(permit, None, self)
        return result

    def _when_open(
        self,
        request: Context,
        exc: CircuitIsOpen,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        assert self._installation is not None
        return self._installation.when_circuit_open(self, request, exc, args, kwargs)

    def _run_keyed(
        self,
        rooms: ChildRooms,
        request: Context,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run the body between taking a key and saying what it came to."""
        run = None
        try:
            with soft_limit_deferred():
                # A soft limit that passed meanwhile is raised here, with the key taken.
                run = self._begin_keyed(rooms, request, args, kwargs)
            result = self._run_body(rooms, request, args, kwargs)
            if run is not None:
                with soft_limit_deferred():
                    run.done(result)
        except BaseException as exc:
            if run is not None:
                with soft_limit_deferred():
                    if HANDED_OVER in vars(request):
                        run.handed_over()
                    run.ended_by(exc, is_ending=rooms.is_ending(exc))
            exc.__traceback__ = exc.__traceback__ and exc.__traceback__.tb_next
            raise
        return result

    def _run_body(
        self,
        rooms: ChildRooms,
        request: Context,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run the body, with the rooms that look at what it leaves behind."""
        if self._rules is not None:
            self._rules.before(self, request)
        held: HeldFromAutoretry | None = None
        token = HEARS_OF_CIRCUITS.set(self.if_circuit_open != "fail")
        running = RUNNING.set((self, request))
        try:
            with soft_limit_deferred():
                for room in rooms.around:
                    room.before(self, request)
            try:
                if self._base_has_a_call:
                    result = super().__call__(*args, **kwargs)
                else:
                    _celery.enter_body(request)
                    result = self.run(*args, **kwargs)
            except CircuitIsOpen as exc:
                # Of a circuit within the body.
                if rooms.give_way is not None:
                    rooms.give_way()
                result = self._when_open(request, exc, args, kwargs)
            except HeldFromAutoretry as exc:
                held, result = exc, None
            if held is not None:
                # Out of its handler, which would become what it was raised in.
                raise held.raised
        except BaseException as exc:
            if rooms.give_way is not None:
                rooms.give_way()
            exc.__traceback__ = exc.__traceback__ and exc.__traceback__.tb_next
            try:
                self._after_body(rooms, request, exc)
            except SoftTimeLimitExceeded as late:
                sent = retry_before(late)
                if sent is None:
                    raise
                raise sent from None
            raise
        finally:
            RUNNING.reset(running)
            HEARS_OF_CIRCUITS.reset(token)
        self._after_body(rooms, request, None)
        return result

    def _after_body(
        self, rooms: ChildRooms, request: Context, exc: BaseException | None
    ) -> None:
        """
        Let the rooms look, the innermost first; then ask the retry rules.

        Raises:
            ResilienceError: A room changes what the run came to; the others still look.
            RetryByRule: The task is tried again.
        """
        if not rooms.around and (exc is None or self._rules is None):
            return
        verdict: ResilienceError | None = None
        with soft_limit_deferred():
            for room in reversed(rooms.around):
                try:
                    room.after(self, request, verdict or exc)
                except ResilienceError as raised:
                    verdict = raised
                except Exception:
                    logger.exception("%s: %s could not look", self.name, room)
            failure = verdict or exc
            if self._rules is not None and isinstance(failure, Exception):
                self._retry_by_rule(self._rules, request, failure)
        if verdict is not None:
            raise verdict from exc

    def _retry_by_rule(
        self, rules: TaskRules, request: Context, exc: Exception
    ) -> None:
        """
        Send the task again where one of its rules says so, and what it left is undone.

        Raises:
            RetryByRule: It is sent.
        """
        # Celery's own retry may have been the last one already.
        if vars(request).get(EXHAUSTED) != id(exc) and rules.after(self, request, exc):
            vars(request)[EXHAUSTED] = id(exc)

    def _begin_keyed(
        self,
        rooms: ChildRooms,
        request: Context,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> KeyedRun | None:
        assert self._keys is not None
        marks = marks_of(request.__dict__)
        call = rooms.keys.call(self, self._keys, request, marks, args, kwargs)
        if call is None:
            return None
        vars(request)[KEY_NAME] = call.name
        try:
            run = vars(request)[KEYED_RUN] = rooms.keys.begin(call)
        except REFUSALS as refused:
            # Their message says all; where in our code they are raised says nothing.
            refused.__traceback__ = None
            raise
        return run

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
            is_exhausted = vars(request).get(EXHAUSTED) == id(exc)
            facts = rooms.describe(exc, package, is_exhausted=is_exhausted)
            if KEY_NAME in vars(request):
                facts["idempotency_key"] = vars(request)[KEY_NAME]
            emit("run.failed", task=self, request=request, exc=exc, facts=facts)
            self._tell(rooms, request, facts)

    @staticmethod
    def _tell(rooms: ChildRooms, request: Context, facts: dict[str, Any]) -> None:
        """Send the facts of a run, once, with what its rooms tell and it has counted."""
        facts.update(vars(request).pop(RUN_FACTS, {}))
        counts = vars(request).pop(COUNTS, None)
        if counts is not None:
            facts[COUNTED_FACT] = counts.fact()
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
            if isinstance(publish_error, Ignore | Retry):
                # Not the broker's: another run has the key, and this one's retry
                # counts no more.
                raise publish_error from None
            raise RetryNotPublished.of(
                publish_error, kwargs.get("exc")
            ) from publish_error
        except BaseException as exc:
            if request is not None and not request.called_directly:
                vars(request)[EXHAUSTED] = id(exc)
            raise

    def apply_async(
        self,
        args: Any = None,
        kwargs: Any = None,
        task_id: str | None = None,
        *more: Any,
        **options: Any,
    ) -> Any:
        """
        Celery's, with the message's key: made here once, for whatever becomes of it.

        Raises:
            NoKey: No key can be made of these arguments.
            MessageTooLarge: The message has more than `max_message_kib`.
            NotSerializable: With `max_message_kib`: arguments would not arrive as they
                are.
            ConfigurationError: An option is one of tasks, not of calls.
        """
        if not _ONLY_OF_TASKS.isdisjoint(options):
            raise ConfigurationError(
                f"{', '.join(sorted(_ONLY_OF_TASKS & options.keys()))}: no option of a "
                f"call; it is one of the task {self.name}, where it is registered"
            )
        if task_id is not None:
            options["task_id"] = task_id
        if more:
            # By their names, as a base class of the app's own may take them.
            options.update(zip(POSITIONAL, more, strict=False))
        keys, installation = self._keys, self._installation
        publish: Any = self._publish
        has_limit = self.max_message_kib is not None
        if installation is None or not installation.settings.enabled:
            return publish(args, kwargs, **options)
        options["headers"] = _with_time(options.get("headers"))
        if (keys is None and not has_limit) or self.app.conf.task_always_eager:
            return publish(args, kwargs, **options)
        if has_limit:
            publish = self._publish_guarded
        if keys is None:
            return publish(args, kwargs, **options)
        request = None if task_id is None else self.request_stack.top
        is_own = request is not None and task_id == request.id
        return installation.key_sender.send(
            self,
            keys,
            publish,
            args,
            kwargs,
            options,
            own=vars(request).get(KEYED_RUN) if is_own else None,
        )

    def _publish(self, args: Any, kwargs: Any, **options: Any) -> Any:
        """Celery's `apply_async`, which tells nobody that it could not publish."""
        try:
            return super().apply_async(args, kwargs, **options)
        except Exception:
            if self._installation is not None:
                self._installation.publish_failed(self)
            raise

    def _publish_guarded(self, args: Any, kwargs: Any, **options: Any) -> Any:
        """Celery's `apply_async`, of a message that is measured."""
        assert self._installation is not None
        return self._installation.send_guarded(
            self, self._publish, args, kwargs, options
        )

    @property
    def has_key(self) -> bool:
        """Whether its calls have idempotency keys."""
        return self._keys is not None

    @property
    def circuit_name(self) -> str | None:
        """Of the circuit around its body; None also for a pybreaker of the app's own."""
        return None if self._circuit is None else self._circuit.name

    @property
    def resilience(self) -> RunView:
        """What the running body may ask of celery-resilience."""
        assert self._installation is not None, "an abstract task has no run"
        return RunView(self.request_stack.top, self._installation)

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
        marks = inherited_marks(request, INHERITED_BY_ANOTHER)
        if request is not None and marks:
            heir = _celery.signature_of(sig, request.id)
            if heir is not None and isinstance(
                self.app.tasks.get(heir.task), ResilientTask
            ):
                headers = heir.options.get("headers") or {}
                heir.options["headers"] = {**headers, **marks}
                vars(request)[REPLACED] = True
        try:
            return super().on_replace(sig)
        except Ignore:
            # It is sent.
            if request is not None and KEYED_RUN in vars(request):
                vars(request)[HANDED_OVER] = True
            raise

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


def run_on_loop(task: type[ResilientTask]) -> None:
    """Let a worker run an `async def` body; who calls it directly awaits it."""
    found = inspect.getattr_static(task, "run")
    is_static = isinstance(found, staticmethod)
    body = found.__func__ if is_static else found
    if not inspect.iscoroutinefunction(body):
        return

    @wraps(body)
    def run(*args: Any, **kwargs: Any) -> Any:
        coroutine = body(*args, **kwargs)
        if not _celery.is_in_body(task.request_stack.top):
            return coroutine
        from celery_resilience.async_runner import run as run_coroutine

        return run_coroutine(coroutine)

    task.run = staticmethod(run) if is_static else run  # type: ignore[method-assign]


def _with_time(headers: Any) -> dict[str, Any]:
    """Headers with our mark of the present moment, from which a task's wait counts."""
    sent_at = round(time.time(), 3)
    if not headers:
        return {HEADER: {SENT_AT: sent_at}}
    marks = marks_of(headers) if HEADER in headers else {}
    return {**headers, HEADER: {**marks, SENT_AT: sent_at}}


def inherited_marks(
    request: Context | None, names: tuple[str, ...] = INHERITED_MARKS
) -> dict[str, Any]:
    """The header by which what follows a run belongs to it, or {}."""
    marks = marks_of(None if request is None else vars(request))
    kept = {name: marks[name] for name in names if name in marks}
    if KEY in names and request is not None and KEYED_RUN in vars(request):
        claim = vars(request)[KEYED_RUN].claim
        kept[KEY] = [claim.name, claim.fingerprint]
    return {HEADER: kept} if kept else {}


def retry_before(exc: BaseException) -> Retry | None:
    """
    The retry that was sent before a soft limit passed in our own code after it.

    It runs in any case, so that the run has not failed. A snooze is not sent yet.
    """
    found: BaseException | None = exc
    if not isinstance(exc, SoftTimeLimitExceeded):
        return None
    while found is not None:
        if isinstance(found, Retry) and not isinstance(found, Snooze):
            return found
        found = found.__context__
    return None


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


def check_options(
    task: type[ResilientTask], installation: Installation
) -> tuple[TaskKeys | None, TaskCircuit | None, TaskRules | None]:
    """
    Check a task's options where it is registered.

    Returns:
        How its keys are made, the circuit around it, and its retry rules; None where
        it has none.

    Raises:
        ConfigurationError: Some are wrong; the message names the task, each
            option, its value and what is accepted.
    """
    # Without asking for their values: a class property of Celery's binds the class.
    known = {name for base in ResilientTask.__mro__ for name in vars(base)}
    wrong = wrong_options(task, known)
    # Celery binds a task again when its app is finalized.
    is_again = "_keys" in vars(task)
    own = {name: vars(task).get(name) for name in task.own_options - known}
    for name, meant in () if is_again else nearly_options(own):
        logger.warning(
            "task %s has %s, which is none of our options: %s is",
            task.name,
            name,
            meant,
        )
    keys = circuit = rules = None
    try:
        keys = installation.task_keys(task)
    except ConfigurationError as exc:
        wrong.append(str(exc))
    try:
        circuit = installation.task_circuit(task)
    except ConfigurationError as exc:
        wrong.append(str(exc))
    try:
        rules = installation.task_rules(task)
    except ConfigurationError as exc:
        wrong.append(str(exc))
    if wrong:
        raise ConfigurationError(f"task {task.name}: {'; '.join(wrong)}")
    found = None if is_again else rules
    for name in () if found is None else found.idle_autoretries(task):
        logger.warning(
            "task %s has autoretry_for = %s, which its retry_rules decide: it is never "
            "asked for",
            task.name,
            name,
        )
    return keys, circuit, rules
