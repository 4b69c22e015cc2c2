"""What an app may say about its circuits."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from celery import Celery
from pybreaker import CircuitBreaker
from unit.test_house import run_python

from celery_resilience import (
    CircuitOpen,
    ConfigurationError,
    Resilience,
    ResilientTask,
)
from celery_resilience.circuits.fleet import Circuits
from celery_resilience.circuits.options import CircuitOptions, circuit_options
from celery_resilience.circuits.task import Breakers, snooze_s, when_open
from celery_resilience.errors import CircuitSnooze
from celery_resilience.install import install

GOOD: list[dict[str, Any]] = [
    {},
    {"failure_rate": 1, "window_s": 0.5, "min_calls": 1, "consecutive": 5},
    {"slow_call_s": 2.5, "open_s": 5, "max_open_s": 5, "jitter": 0},
    {"release_per_s": 0.5, "ramp_from": None},
    {"ramp_from": 8},
    {"probes": 3, "probe_lease_s": 10, "exclude": [ValueError]},
    {"probe": "shop.health:Bank.is_up"},
    {"probe": None},
    {"open_s": 3_600},
    {"queues": ["bank", "mail"]},
]

BAD: list[tuple[str, Any, str]] = [
    ("failure_rate", 0, "a share above 0 and at most 1"),
    ("failure_rate", 15, "a share above 0 and at most 1"),
    ("failure_rate", True, "a share above 0 and at most 1"),
    ("failure_rate", float("nan"), "a share above 0 and at most 1"),
    ("window_s", 0, "a number of seconds above 0"),
    ("window_s", "60", "a number of seconds above 0"),
    ("min_calls", 0, "a whole number from 1"),
    ("min_calls", 2.0, "a whole number from 1"),
    ("consecutive", 0, "a whole number from 1, or None"),
    ("slow_call_s", -1, "a number of seconds above 0"),
    ("open_s", float("inf"), "a number of seconds above 0"),
    ("jitter", 2, "a share from 0 to 1"),
    ("probes", None, "a whole number from 1"),
    ("probe_lease_s", 0, "a number of seconds above 0"),
    ("release_per_s", 0, "a number above 0"),
    ("ramp_from", 0, "a whole number from 1, or None"),
    ("exclude", ValueError, "a list of types of exceptions"),
    ("exclude", ["ValueError"], "a list of types of exceptions"),
    ("probe", "shop.health", "the name of a function, package.module:function"),
    ("probe", "shop.health:", "the name of a function"),
    ("probe", print, "the name of a function"),
]


@pytest.mark.parametrize("options", GOOD)
def test_good_options_are_taken(options: dict[str, Any]) -> None:
    """As they are; the cap of the open time is never below it."""
    taken = circuit_options("bank", options)

    for name, value in options.items():
        assert getattr(taken, name) == (
            tuple(value) if isinstance(value, list) else value
        )
    assert taken.max_open_s >= taken.open_s
    assert circuit_options("bank", {}) == CircuitOptions()


@pytest.mark.parametrize(("option", "value", "accepted"), BAD)
def test_bad_options_are_refused(option: str, value: Any, accepted: str) -> None:
    """With the circuit, the option, what is accepted and the value."""
    with pytest.raises(ConfigurationError) as refused:
        circuit_options("bank", {option: value})

    said = str(refused.value)
    assert said.startswith(f"resilience_circuits: bank: {option} must be {accepted}")
    assert said.endswith(f"got {value!r}")


def test_every_mistake_is_told_at_once() -> None:
    """A misspelt name with the one that is meant, and what is not there yet."""
    wrong = {"open": 5, "failure_rat": 0.5, "queues": "bank", "probes": 0}
    with pytest.raises(ConfigurationError) as refused:
        circuit_options("bank", wrong)

    said = str(refused.value)
    assert "unknown option failure_rat, did you mean failure_rate?" in said
    assert "queues must be a list of queue names, got 'bank'" in said
    assert len(said.split("; ")) == 4
    with pytest.raises(ConfigurationError, match="max_open_s must be at least open_s"):
        circuit_options("bank", {"open_s": 9, "max_open_s": 5})


# --- of a task --------------------------------------------------------------------------


def app_with(**options: Any) -> Celery:
    """An app with one task."""
    app = Celery("shop", set_as_current=False, broker="memory://")
    Resilience(app)

    @app.task(base=ResilientTask, shared=False, name="t", **options)
    def task() -> None: ...

    app.finalize()
    return app


@pytest.mark.parametrize(
    "options",
    [
        {"circuit": "bank"},
        {"circuit": CircuitBreaker()},
        {"circuit": "bank", "if_circuit_open": "fail"},
        {"if_circuit_open": lambda: 5},
    ],
)
def test_a_good_task_option_is_taken(options: dict[str, Any]) -> None:
    """Also where the circuit is only within the body."""
    assert app_with(**options).tasks["t"].name == "t"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"circuit": ""}, "a circuit's name must be 1 to 64 characters"),
        ({"circuit": 5}, "circuit must be the name of a circuit, or a pybreaker"),
        ({"circuit": CircuitBreaker}, "circuit must be the name of a circuit"),
        ({"if_circuit_open": "wait"}, "if_circuit_open must be 'snooze', 'pause'"),
        ({"if_circuit_open": None}, "if_circuit_open must be 'snooze', 'pause'"),
        ({"if_circuit_open": "pause"}, "'pause' needs a circuit= whose entry"),
        ({"circuit": "b", "if_circuit_open": "pause"}, "'pause' needs a circuit="),
    ],
)
def test_a_bad_task_option_is_refused(options: dict[str, Any], said: str) -> None:
    """Where the task is registered."""
    with pytest.raises(ConfigurationError) as refused:
        app_with(**options).tasks["t"]

    assert said in str(refused.value)


def test_a_wrong_circuit_is_refused_with_its_app() -> None:
    """When it is first asked for; a worker asks at its start."""
    app = app_with()
    app.conf.resilience_circuits = {"bank": {"probes": 0}}
    with pytest.raises(ConfigurationError, match="bank: probes must be"):
        install(app).circuit_options()


def test_pybreaker_is_not_imported_without_circuits() -> None:
    """Nor by an app that only names one."""
    printed = run_python(
        """
        import sys
        from celery import Celery
        from celery_resilience import Resilience, ResilientTask
        import celery_resilience.worker

        app = Celery("shop", set_as_current=False, broker="memory://")
        Resilience(app)

        @app.task(base=ResilientTask, name="t", circuit="bank")
        def task(): ...

        app.finalize()
        app.tasks["t"]
        print("pybreaker" in sys.modules)
        """
    )

    assert printed == "False"


def test_settings_are_read_when_a_circuit_is_used() -> None:
    """A decorated function is there before the app is configured."""
    app = Celery("shop", set_as_current=False, broker="memory://")
    resilience = Resilience(app)

    @resilience.circuit("bank")
    def pay() -> str:
        return "paid"

    app.conf.resilience_store_url = "redis://127.0.0.1:9/0"
    app.conf.resilience_circuits = {"bank": {"open_s": 7}}
    assert pay() == "paid"
    assert resilience.circuit("bank")._circuit.options.open_s == 7


def test_circuits_are_off_with_the_rest() -> None:
    """As plain Celery: every call is let through, and nobody is asked."""
    app = app_with()
    app.conf.resilience_enabled = False
    app.conf.resilience_circuits = {"bank": {"min_calls": 1}}
    circuit = install(app).breakers.get("bank")
    for _ in range(3):
        with pytest.raises(ConnectionError), circuit:
            raise ConnectionError
    assert circuit.current_state == "closed"
    assert circuit._circuit.note.read_at == 0


# --- how long a task waits ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("retry_after_s", "visible_s", "least_s", "most_s"),
    [
        (10, 3_600, 10, 20),
        (0.1, 3_600, 0.1, 1.1),
        (10_000, 3_600, 450, 900),
        (10_000, 60, 15, 30),
        (25, 60, 15, 30),
    ],
)
def test_a_snooze_is_spread_and_capped(
    retry_after_s: float, visible_s: float, least_s: float, most_s: float
) -> None:
    """Never beyond half the visibility timeout."""
    assert snooze_s(retry_after_s, None, 0.0, visible_s) == pytest.approx(least_s)
    assert snooze_s(retry_after_s, None, 1.0, visible_s) == pytest.approx(most_s)
    assert most_s <= visible_s / 2


@pytest.mark.parametrize(
    ("turn_s", "waits_s"), [(-5.0, 10.0), (10.02, 10.02), (100.0, 100.0)]
)
def test_a_ticket_says_when(turn_s: float, waits_s: float) -> None:
    """The first comes back as soon as the circuit may be tried."""
    assert snooze_s(10, turn_s, 0.7, 3_600) == pytest.approx(waits_s)


def test_turns_beyond_the_cap_are_spread_below_it() -> None:
    """Not piled up at it."""
    waits = [snooze_s(10, 5_000, chance / 10, 3_600) for chance in range(11)]

    assert min(waits) == pytest.approx(450)
    assert max(waits) == pytest.approx(900)


class Waiting:
    """A task as `when_open` sees it."""

    if_circuit_open = "snooze"


class Request:
    """Of a run, with our marks."""

    def __init__(self, **marks: Any) -> None:
        self.resilience = marks


def opened(task: type[Any], request: Request, now: float = 1_000_000.0) -> Any:
    """What becomes of a task, at a time."""
    refused = CircuitOpen(None, "own", 5.0, 0)
    return when_open(
        task(),
        request,
        refused,
        (7,),
        {"card": "x"},
        breakers=Breakers(Circuits(lambda: None, dict)),
        visible_s=3_600,
        clock=lambda: now,
    )


def test_a_task_waits_for_a_day_at_most() -> None:
    """From its first snooze, whatever was between; then it fails, with its reason."""
    with pytest.raises(CircuitSnooze) as first:
        opened(Waiting, Request())
    assert first.value.marks == {"waits_since": 1_000_000.0}
    assert 5 <= first.value.countdown_s <= 10
    with pytest.raises(CircuitSnooze) as second:
        opened(Waiting, Request(**first.value.marks), now=1_080_000.0)
    assert second.value.marks == first.value.marks
    with pytest.raises(CircuitOpen, match="kept the task waiting for 86400 s"):
        opened(Waiting, Request(**first.value.marks), now=1_086_400.0)
    again = pickle.loads(pickle.dumps(second.value))
    assert (again.marks, again.countdown_s) == (
        second.value.marks,
        second.value.countdown_s,
    )


def test_a_task_may_fail_or_do_something_else() -> None:
    """By its own word, or a function of its arguments."""

    class Failing:
        if_circuit_open = "fail"

    class Owing:
        if_circuit_open = staticmethod(lambda order_id, card: (order_id, card))

    with pytest.raises(CircuitOpen):
        opened(Failing, Request())
    assert opened(Owing, Request()) == (7, "x")
