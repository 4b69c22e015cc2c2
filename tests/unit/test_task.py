"""A resilient task's options are checked where it is registered."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery
from celery.app.task import Context
from celery.exceptions import Retry, SoftTimeLimitExceeded
from unit.specimens import fresh_name, headers_with, replay_mark

from celery_resilience import (
    ConfigurationError,
    ResilientTask,
    Skip,
    Snooze,
    soft_limit,
)
from celery_resilience.message import HEADER
from celery_resilience.reasons import facts_of_failure
from celery_resilience.soft_limit import soft_limit_deferred


@pytest.fixture
def app() -> Celery:
    """An app with no broker to speak of."""
    app = Celery(fresh_name("unit"), set_as_current=False, broker="memory://")
    app.conf.resilience_redact = ["iban_of"]
    return app


def registered(
    app: Celery, body: Callable[..., Any] | None = None, **options: Any
) -> Any:
    """A task of *app* with these options."""

    def ship(order: int, card: str = "") -> int:
        return order

    name = fresh_name("shop.ship")
    app.task(base=ResilientTask, name=name, shared=False, **options)(body or ship)
    return app.tasks[name]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("failed_queue", None),
        ("failed_queue", False),
        ("failed_queue", "q"),
        ("redact", ()),
        ("redact", ["card"]),
        ("redact", {"card"}),
        ("max_crashes", None),
        ("max_crashes", 1),
        ("memory_limit_mib", None),
        ("memory_limit_mib", 300),
        ("memory_limit_mib", "25%"),
    ],
)
def test_a_good_option_is_taken(app: Celery, option: str, value: Any) -> None:
    """As it was written."""
    assert getattr(registered(app, **{option: value}), option) == value


@pytest.mark.parametrize(
    ("option", "value", "accepted"),
    [
        ("failed_queue", "", "the name of a queue, False or None"),
        ("failed_queue", True, "the name of a queue, False or None"),
        ("failed_queue", 5, "the name of a queue, False or None"),
        ("redact", "card", "a list of argument names"),
        ("redact", [5], "a list of argument names"),
        ("max_crashes", 0, "a whole number from 1, or None"),
        ("max_crashes", True, "a whole number from 1, or None"),
        ("max_crashes", "3", "a whole number from 1, or None"),
        ("memory_limit_mib", 0, "a number of MiB from 1, a share"),
        ("memory_limit_mib", "300", "a number of MiB from 1, a share"),
        ("memory_limit_mib", "0%", "a number of MiB from 1, a share"),
    ],
)
def test_a_bad_option_is_refused(
    app: Celery, option: str, value: Any, accepted: str
) -> None:
    """With the task, the option, what is accepted and the value."""
    with pytest.raises(ConfigurationError) as refused:
        registered(app, **{option: value})

    assert str(refused.value).startswith("task shop.ship")
    assert f"{option} must be {accepted}" in str(refused.value)
    assert f", got {value!r}" in str(refused.value)


def test_all_mistakes_of_a_task_are_told_at_once(app: Celery) -> None:
    """One start shows every one."""
    with pytest.raises(ConfigurationError) as refused:
        registered(app, max_crashes=0, redact="x", if_running="k")

    assert len(str(refused.value).split("; ")) == 3


def test_parameters_are_known_by_name(app: Celery) -> None:
    """Positional ones, without a bound self."""

    def body(
        self: Any, order: int, /, card: str = "", *rest: Any, key: int = 0
    ) -> None: ...

    assert registered(app).parameter_names == ("order", "card")
    assert registered(app, body, bind=True).parameter_names == ("order", "card")


def test_hidden_names_are_the_tasks_and_the_apps(app: Celery) -> None:
    """The setting holds for every task."""
    assert registered(app, redact=["card"]).hidden_names == ("card", "iban_of")


def test_a_direct_call_is_the_body(app: Celery) -> None:
    """No room is around it outside a worker."""
    assert registered(app)(7) == 7


def test_memory_is_given_back_before_all_else(app: Celery) -> None:
    """At exhaustion, nothing that makes an object could run."""
    seen: list[str] = []

    class Room:
        def before(self, *_: Any) -> None:
            seen.append("before")

        def after(self, *_: Any) -> None:
            seen.append("after")

    def exhausts() -> None:
        raise MemoryError

    rooms: Any = SimpleNamespace(
        around=(Room(),), give_way=lambda: seen.append("give way")
    )
    with pytest.raises(MemoryError):
        registered(app, exhausts)._run_body(rooms, Context(), (), {})
    assert seen == ["before", "give way", "after"]


def test_a_skip_is_a_success_where_a_task_is_applied_eagerly(app: Celery) -> None:
    """As in a worker; a direct call raises it into the body that it is part of."""

    def skips() -> None:
        raise Skip("nothing to do", result=42)

    task = registered(app, skips, autoretry_for=(Exception,))

    applied = task.apply()

    assert (applied.state, applied.result) == ("SUCCESS", 42)
    with pytest.raises(Skip):
        task()


def test_a_retry_inherits_its_replay_and_nothing_else(app: Celery) -> None:
    """It belongs to the same replay; crashes and snoozes were this delivery's."""
    task = registered(app)
    replay = replay_mark("r", "t")
    headers = {HEADER: {**replay, "crashes": 2, "alone": True}, "my": 1}
    # As Celery's tracer has it: each header by its name, and all of them.
    task.push_request(
        id="i", args=[7], kwargs={}, retries=1, headers=headers, **headers
    )

    headers = task.signature_from_request(args=[7], kwargs={}).options["headers"]

    assert headers == {HEADER: replay, "my": 1}
    task.pop_request()


def test_a_retry_without_a_replay_has_no_mark(app: Celery) -> None:
    """The header is gone with the last mark."""
    task = registered(app)
    task.push_request(
        id="i", args=[7], kwargs={}, retries=1, headers={HEADER: {"crashes": 2}}
    )

    headers = task.signature_from_request(args=[7], kwargs={}).options["headers"]

    assert HEADER not in headers
    task.pop_request()


@contextlib.contextmanager
def soft_limit_handler(handle: Any, *, waits: bool) -> Iterator[None]:
    """Hear soft limits as a process does that has no children, or as a child."""
    before = signal.signal(signal.SIGUSR1, handle)
    try:
        if waits:
            soft_limit.let_handlers_wait()
        yield
    finally:
        soft_limit._waiting = None
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("waits", [False, True], ids=["held back", "waits"])
def test_a_soft_limit_waits_for_our_own_code(waits: bool) -> None:
    """The signal has no effect inside, and comes behind the outermost block."""
    heard: list[str] = []
    with soft_limit_handler(lambda *_: heard.append("soft limit"), waits=waits):
        with soft_limit_deferred():
            with soft_limit_deferred():
                signal.raise_signal(signal.SIGUSR1)
                signal.raise_signal(signal.SIGUSR1)
                heard.append("our code")
            heard.append("still ours")
        heard.append("the body")
        signal.raise_signal(signal.SIGUSR1)

    assert heard == ["our code", "still ours", "soft limit", "the body", "soft limit"]


@pytest.mark.parametrize("waits", [False, True], ids=["held back", "waits"])
def test_our_code_that_fails_is_left_all_the_same(waits: bool) -> None:
    """A soft limit is heard at once then."""
    heard: list[str] = []
    with soft_limit_handler(lambda *_: heard.append("soft limit"), waits=waits):
        with pytest.raises(KeyError), soft_limit_deferred(), soft_limit_deferred():
            raise KeyError
        signal.raise_signal(signal.SIGUSR1)
        assert heard == ["soft limit"]

    assert signal.SIGUSR1 not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_a_thread_of_the_bodys_holds_no_soft_limit_up() -> None:
    """It is for the thread that runs the body, which is not in our code."""
    heard: list[str] = []
    inside, leave = threading.Event(), threading.Event()

    def be_inside() -> None:
        with soft_limit_deferred():
            inside.set()
            leave.wait(10)

    with soft_limit_handler(lambda *_: heard.append("soft limit"), waits=True):
        thread = threading.Thread(target=be_inside)
        thread.start()
        inside.wait(10)
        signal.raise_signal(signal.SIGUSR1)
        assert heard == ["soft limit"]
        leave.set()
        thread.join()


def over_both_limits(heard: list[str]) -> None:
    """Our code, in which both signals come."""
    assert soft_limit.MEMORY_SIGNAL is not None
    with soft_limit_deferred():
        os.kill(os.getpid(), soft_limit.MEMORY_SIGNAL)
        os.kill(os.getpid(), signal.SIGUSR1)
        heard.append("our code")


def test_the_signal_of_memory_waits_as_a_soft_limit_does() -> None:
    """What the first of them raises ends our code; the other is not heard of again."""
    heard: list[str] = []
    assert soft_limit.MEMORY_SIGNAL is not None

    def over_memory(*_: object) -> None:
        heard.append("memory")
        raise MemoryError

    with soft_limit_handler(lambda *_: heard.append("soft limit"), waits=True):
        handler: Any = soft_limit.waiting_handler(over_memory)
        before = signal.signal(soft_limit.MEMORY_SIGNAL, handler)
        try:
            with pytest.raises(MemoryError):
                over_both_limits(heard)
        finally:
            signal.signal(soft_limit.MEMORY_SIGNAL, before)

    assert heard == ["our code", "memory"]


def test_a_process_that_hears_no_soft_limit_waits_for_none() -> None:
    """As one in which somebody ignores the signal."""
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        soft_limit.let_handlers_wait()
        assert soft_limit._waiting is None
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGUSR1, before)


class Turnstile:
    """A circuit in which a soft limit passes while a run is let through."""

    def __init__(self) -> None:
        self.left: list[tuple[Any, BaseException | None]] = []

    def enter(self) -> str:
        """Let it through."""
        signal.raise_signal(signal.SIGUSR1)
        return "permit"

    def leave(self, permit: Any, exc: BaseException | None, task: Any) -> None:
        """Remember."""
        self.left.append((permit, exc))


@pytest.mark.parametrize("waits", [False, True], ids=["held back", "waits"])
def test_a_permit_is_given_back_where_a_soft_limit_came_with_it(
    monkeypatch: pytest.MonkeyPatch, waits: bool
) -> None:
    """The body has not run, and nobody else would give it back."""

    class SoftLimit(Exception):
        pass

    def raise_it(*_: object) -> None:
        raise SoftLimit

    app = Celery("shop", set_as_current=False)

    @app.task(base=ResilientTask, name=f"guarded {waits}", shared=False)
    def guarded() -> None:
        raise AssertionError("it is not run")

    task: Any = app.tasks[f"guarded {waits}"]
    turnstile = Turnstile()
    monkeypatch.setattr(type(task), "_circuit", turnstile)
    with (
        soft_limit_handler(raise_it, waits=waits),
        pytest.raises(SoftLimit) as raised,
    ):
        task._run_guarded(None, None, (), {})

    assert turnstile.left == [("permit", raised.value)]


class Facts:
    """Notes what a child tells."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []

    def send(self, task_id: str, facts: dict[str, Any]) -> None:
        """Note it."""
        self.sent.append(facts)


class Late:
    """Our own code at one place behind a body, within which a soft limit passes."""

    def __init__(self, place: str) -> None:
        self.place = place

    def before(self, task: Any, request: Any) -> None:
        """Nothing."""

    def after(self, task: Any, request: Any, exc: BaseException | None) -> None:
        """A room looks."""
        self.pass_at("room")

    def enter(self) -> str:
        """The circuit lets it through."""
        return "permit"

    def leave(self, permit: Any, exc: BaseException | None, task: Any) -> None:
        """The circuit is told."""
        self.pass_at("circuit")

    def pass_at(self, place: str) -> None:
        """The soft limit passes, if it is to pass here."""
        if place == self.place:
            signal.raise_signal(signal.SIGUSR1)


@pytest.mark.parametrize("ending", [Retry, Snooze, ValueError, None])
@pytest.mark.parametrize("place", ["room", "circuit", "past"])
def test_a_soft_limit_hides_no_retry_that_was_sent(
    monkeypatch: pytest.MonkeyPatch, place: str, ending: type[Exception] | None
) -> None:
    """It runs in any case; whatever else the run came to, the limit fails it."""
    app = Celery("shop", set_as_current=False)
    name = fresh_name("late")

    @app.task(base=ResilientTask, name=name, shared=False)
    def late() -> None:
        if ending is Snooze:
            raise Snooze(1)
        if ending is not None:
            raise ending

    def pass_limit(*_: object) -> None:
        raise SoftTimeLimitExceeded

    task: Any = app.tasks[name]
    room, facts = Late(place), Facts()
    monkeypatch.setattr(type(task), "_circuit", room)
    monkeypatch.setattr(
        task._installation,
        "child",
        SimpleNamespace(
            facts=facts,
            describe=facts_of_failure,
            around=(room,),
            give_way=None,
            is_ending=lambda exc: False,
        ),
    )
    monkeypatch.setattr(
        type(task), "_before_body", lambda *_: lambda: room.pass_at("past")
    )
    request = Context(headers_with({"crashes": 1}), called_directly=False, retries=0)
    task.request_stack.push(request)
    expected = Retry if ending is Retry else SoftTimeLimitExceeded
    with (
        soft_limit_handler(pass_limit, waits=True),
        pytest.raises(expected) as raised,
    ):
        task()
    task.request_stack.pop()

    assert not isinstance(raised.value, Snooze)
    if ending is Retry:
        assert facts.sent == []
