"""A resilient task's options are checked where it is registered."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery
from celery.app.task import Context
from unit.specimens import fresh_name, replay_mark

from celery_resilience import ConfigurationError, ResilientTask, Skip
from celery_resilience.message import HEADER
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


def test_a_soft_limit_waits_for_our_own_code() -> None:
    """The signal is held back inside, and comes behind."""
    heard: list[str] = []
    before = signal.signal(signal.SIGUSR1, lambda *_: heard.append("soft limit"))
    try:
        with soft_limit_deferred():
            signal.raise_signal(signal.SIGUSR1)
            heard.append("our code")
    finally:
        signal.signal(signal.SIGUSR1, before)

    assert heard == ["our code", "soft limit"]


def test_a_soft_limit_that_was_blocked_stays_blocked() -> None:
    """By whoever blocked it; ours ends with our block, also with an error."""
    with pytest.raises(KeyError), soft_limit_deferred(), soft_limit_deferred():
        raise KeyError

    assert signal.SIGUSR1 not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


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


def test_a_permit_is_given_back_where_a_soft_limit_came_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The body has not run, and nobody else would give it back."""

    class SoftLimit(Exception):
        pass

    def raise_it(*_: object) -> None:
        raise SoftLimit

    app = Celery("shop", set_as_current=False)

    @app.task(base=ResilientTask, name="guarded")
    def guarded() -> None:
        raise AssertionError("it is not run")

    task: Any = app.tasks["guarded"]
    turnstile = Turnstile()
    monkeypatch.setattr(type(task), "_circuit", turnstile)
    before = signal.signal(signal.SIGUSR1, raise_it)
    try:
        with pytest.raises(SoftLimit) as raised:
            task._run_guarded(None, None, (), {})
    finally:
        signal.signal(signal.SIGUSR1, before)

    assert turnstile.left == [("permit", raised.value)]
