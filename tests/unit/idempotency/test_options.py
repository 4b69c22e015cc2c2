"""Options of a key are checked where the task is registered."""

from __future__ import annotations

import re
from typing import Any

import pybreaker
import pytest
from celery import Celery

from celery_resilience import ConfigurationError, ResilientTask


def registered(conf: dict[str, Any] | None = None, /, **options: Any) -> Any:
    """A task with these options, bound to an app."""
    app = Celery("shop", set_as_current=False, broker="memory://")
    app.conf.update(conf or {})
    options.setdefault("idempotency_key", "charge:{order_id}")

    @app.task(base=ResilientTask, name="shop.charge", shared=False, **options)
    def charge(order_id: int) -> None: ...

    return app.tasks["shop.charge"]


def test_a_key_asks_that_a_message_outlives_its_worker() -> None:
    """Late acknowledgement, unless the task says otherwise."""
    assert registered().acks_late is True
    assert registered().reject_on_worker_lost is True
    assert registered(acks_late=False).acks_late is False
    assert registered(reject_on_worker_lost=False).reject_on_worker_lost is False
    assert registered(idempotency_key=None).acks_late is False


def test_a_key_that_comes_by_an_annotation_asks_for_the_same() -> None:
    """Also where the app says something; but an annotation that does is heard."""
    key = {"idempotency_key": "charge:{order_id}"}

    def annotated(conf: dict[str, Any] | None = None, /, **more: Any) -> Any:
        annotations = {"shop.charge": {**key, **more}}
        conf = {"task_annotations": annotations, **(conf or {})}
        return registered(conf, idempotency_key=None)

    assert annotated().has_key
    assert annotated().acks_late is True
    assert annotated().reject_on_worker_lost is True
    assert annotated({"task_acks_late": False}).acks_late is True
    assert annotated(acks_late=False).acks_late is False
    assert annotated({"task_acks_late": True}, acks_late=False).acks_late is False


def test_where_we_are_off_a_key_asks_for_nothing() -> None:
    """Plain Celery would deliver what kills its process for ever."""
    task = registered({"resilience_enabled": False})

    assert task.acks_late is False
    assert task.reject_on_worker_lost is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"idempotency_keep_s": 0}, "idempotency_keep_s must be a number of seconds"),
        ({"idempotency_keep_s": None}, "idempotency_keep_s must be a number of sec"),
        ({"idempotency_lease_s": -1}, "idempotency_lease_s must be a number of seco"),
        ({"idempotency_lease_s": True}, "idempotency_lease_s must be a number of se"),
        ({"if_running": "wait"}, "if_running must be one of 'snooze', 'skip', 'err"),
        ({"if_done": "skip"}, "if_done must be one of 'return_saved', 'error', 're"),
        ({"if_done": len}, "if_done must be one of 'return_saved', 'error', 'rerun"),
        ({"if_interrupted": "skip"}, "or a callable that looks whether the effect"),
        ({"unique_enqueue": 1}, "unique_enqueue must be True or False, got 1"),
        *(
            ({name: value, "idempotency_key": None}, f"{name}: nothing without an ide")
            for name, value in (
                ("unique_enqueue", True),
                ("if_running", "skip"),
                ("if_done", "error"),
                ("if_interrupted", "fail"),
                ("idempotency_keep_s", 60),
                ("idempotency_lease_s", 60),
            )
        ),
        ({"idempotency_key": "charge"}, "without one all calls are the same effect"),
        ({"idempotency_key": lambda: "x"}, "takes no call that the task takes"),
        ({"idempotency_key": lambda a, b: "x"}, "takes no call that the task takes"),
        ({"if_interrupted": lambda: True}, "if_interrupted is called as the task is"),
        ({"idempotency_key": "x:{amount}"}, "got {amount} in 'x:{amount}'"),
        ({"idempotency_key": 17}, "idempotency_key must be a template"),
    ],
)
def test_a_wrong_option_is_refused(options: dict[str, Any], said: str) -> None:
    """The message names the task, the option, and what is accepted."""
    with pytest.raises(ConfigurationError) as refused:
        registered(**options)

    assert str(refused.value).startswith("task shop.charge: ")
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("idempotancy_key", "idempotency_key"),
        ("if_runing", "if_running"),
        ("idempotency_keep", "idempotency_keep_s"),
        ("max_crash", "max_crashes"),
    ],
)
def test_a_misspelt_option_is_refused(name: str, meant: str) -> None:
    """Celery takes any option: the task would have no key, and nobody would know."""
    said = f"unknown option {name}, did you mean {meant}?"
    with pytest.raises(ConfigurationError, match=re.escape(said)):
        registered(**{name: "x"})


@pytest.mark.parametrize(
    ("name", "value", "meant"),
    [
        ("circuits", ["bank"], "circuit"),
        ("circuits", None, "circuit"),
        ("redacted", "x", "redact"),
        ("redactor", len, "redact"),
        ("if_open", True, "if_circuit_open"),
    ],
)
def test_a_name_that_an_app_may_have_for_something_else_is_its_own(
    name: str, value: Any, meant: str, caplog: pytest.LogCaptureFixture
) -> None:
    """One is told beside which option of ours it stands, once."""
    assert vars(type(registered(**{name: value})))[name] is value

    said = f"task shop.charge has {name}, which is none of our options: {meant} is"
    assert caplog.messages.count(said) == 1


@pytest.mark.parametrize(
    ("name", "value", "meant"),
    [
        ("circuits", "bank", "circuit"),
        ("circuits", pybreaker.CircuitBreaker(), "circuit"),
        ("redacted", ["card"], "redact"),
        ("if_open", "fail", "if_circuit_open"),
        ("if_open", len, "if_circuit_open"),
    ],
)
def test_such_a_name_with_what_our_option_takes_is_refused(
    name: str, value: Any, meant: str
) -> None:
    """The task would run unguarded, and a line in the log is soon overlooked."""
    said = f"task shop.charge: unknown option {name}, did you mean {meant}?"
    with pytest.raises(ConfigurationError, match=re.escape(said)):
        registered(**{name: value})


def test_a_base_class_may_say_what_duplicates_of_its_tasks_become() -> None:
    """Also where some of them have no key."""
    app = Celery("shop", set_as_current=False, broker="memory://")

    class Base(ResilientTask):
        abstract = True
        if_running = "skip"

    @app.task(base=Base, name="keyless", shared=False)
    def keyless() -> None: ...

    @app.task(base=Base, name="keyed", shared=False, idempotency_key="nightly")
    def keyed() -> None: ...

    assert not app.tasks["keyless"].has_key
    assert app.tasks["keyed"].has_key


@pytest.mark.parametrize(
    "function",
    [
        lambda order, cents=0: "x",
        lambda *args, **kwargs: "x",
        lambda order, **_: "x",
        lambda order, *, cents: "x",
        lambda order, /, cents: "x",
        lambda first, second=None: "x",
        lambda first: "x",
        str,
    ],
)
def test_a_callable_that_takes_some_call_is_taken(function: Any) -> None:
    """Only the caller knows how it calls."""
    app = Celery("shop", set_as_current=False, broker="memory://")

    @app.task(base=ResilientTask, name="t", idempotency_key=function, shared=False)
    def charge(order: int, cents: int = 0) -> None: ...

    assert app.tasks["t"].has_key


@pytest.mark.parametrize("name", ["idempotency_key", "if_running", "unique_enqueue"])
@pytest.mark.parametrize("key", [None, "charge:{order_id}"])
def test_an_option_of_tasks_is_none_of_a_call(name: str, key: str | None) -> None:
    """Celery would put it on the message, where nobody reads it."""
    task = registered(idempotency_key=key)

    with pytest.raises(ConfigurationError, match=f"{name}: no option of a call"):
        task.apply_async((1,), **{name: "x"})


def test_an_option_of_the_apps_own_is_none_of_ours() -> None:
    """Any name that is not nearly one of ours."""
    assert registered(tenant="acme", key="x").tenant == "acme"


def test_every_mistake_is_told_at_once() -> None:
    """With those of the other rooms."""
    with pytest.raises(ConfigurationError) as refused:
        registered(if_running="x", if_done="y", max_crashes=0)

    for name in ("if_running", "if_done", "max_crashes"):
        assert name in str(refused.value)


def test_a_callable_key_is_no_method() -> None:
    """A function among the options of a task takes the task's arguments, no more."""
    task = registered(idempotency_key=lambda order_id: f"x{order_id}")

    made = task._keys.maker.make((1,), {})

    assert made.name == "x1"


def test_a_bound_task_has_no_argument_self() -> None:
    """Neither a function with `bind=True` nor a class's `run`."""
    app = Celery("shop", set_as_current=False, broker="memory://")

    class Charge(ResilientTask):
        name = "shop.class"
        idempotency_key = "charge:{order_id}"

        def run(self, order_id: int) -> None: ...

    app.register_task(Charge())

    @app.task(
        base=ResilientTask,
        bind=True,
        idempotency_key="b:{order_id}",
        name="b",
        shared=False,
    )
    def bound(self: Any, order_id: int) -> None: ...

    for name in ("shop.class", "b"):
        assert app.tasks[name]._keys.maker.make((1,), {}).name.endswith(":1")


def test_self_is_no_argument() -> None:
    """Of a bound task, whose key cannot be made of it."""
    app = Celery("shop", set_as_current=False, broker="memory://")

    @app.task(base=ResilientTask, bind=True, idempotency_key="{self}", shared=False)
    def other(self: Any, order_id: int) -> None: ...

    with pytest.raises(ConfigurationError, match=r"got \{self\}"):
        app.finalize()
