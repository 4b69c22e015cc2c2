"""Every exception that is raised on purpose, and its way to the main process."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from celery.exceptions import Ignore, ImproperlyConfigured, Retry

from celery_resilience import errors
from celery_resilience.errors import (
    BrokerUnavailable,
    ConfigurationError,
    DropDelivery,
    MissingExtra,
    NoRoute,
    PublishRefused,
    ResilienceError,
    RetryNotPublished,
    SchemaMismatch,
    SendAgain,
    Skip,
    Snooze,
    StoreUnavailable,
    TooManyCrashes,
)

OURS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, ResilienceError)
]


@pytest.mark.parametrize("kind", OURS)
def test_a_docstring_is_the_default_message(kind: type[ResilienceError]) -> None:
    """Its first line; a message that is given beats it."""
    assert str(kind()) == (kind.__doc__ or "").split("\n")[0]
    assert str(kind("told")) == "told"


@pytest.mark.parametrize("kind", OURS)
def test_only_two_names_end_in_error(kind: type[ResilienceError]) -> None:
    """The others say what happened."""
    is_error = kind.__name__.endswith("Error")

    assert is_error == (kind in (ResilienceError, ConfigurationError))


def test_existing_handlers_still_catch() -> None:
    """Each inherits from what its reader already catches."""
    assert issubclass(ConfigurationError, ImproperlyConfigured)
    assert issubclass(MissingExtra, ImportError)
    assert issubclass(NoRoute, PublishRefused)
    assert issubclass(Snooze, Retry)
    assert issubclass(SendAgain, Ignore)
    assert issubclass(DropDelivery, Ignore)
    assert not issubclass(BrokerUnavailable, PublishRefused)
    assert not issubclass(SchemaMismatch, StoreUnavailable)


CROSSING: list[tuple[BaseException, dict[str, Any]]] = [
    (Skip("why", {"a": 1}), {"reason": "why", "result": {"a": 1}}),
    (Snooze(30, "busy"), {"countdown_s": 30, "reason": "busy", "when": 30}),
    (
        SendAgain("suspect", 0.5, {"alone": True}),
        {"reason": "suspect", "delay_s": 0.5, "marks": {"alone": True}},
    ),
    (DropDelivery("replay_duplicate"), {"reason": "replay_duplicate"}),
    (TooManyCrashes("three", 3), {"runs": 3}),
    (StoreUnavailable("away"), {}),
]


@pytest.mark.parametrize(
    ("exc", "facts"), CROSSING, ids=[type(exc).__name__ for exc, _ in CROSSING]
)
def test_an_exception_crosses_to_the_main_process(
    exc: BaseException, facts: dict[str, Any]
) -> None:
    """Pickled in the child, whole on the other side."""
    back = pickle.loads(pickle.dumps(exc))

    assert type(back) is type(exc)
    assert str(back) == str(exc)
    assert {name: getattr(back, name) for name in facts} == facts


def test_a_snooze_is_not_in_the_past() -> None:
    """Refused where it is written."""
    with pytest.raises(ValueError, match="at least 0, got -1"):
        Snooze(-1)

    assert Snooze(0).countdown_s == 0


def test_a_missing_library_is_told_with_what_brings_it() -> None:
    """Who needs it, which it is, and what to type."""
    missing = MissingExtra.of("psycopg", "postgres", "the store")

    assert str(missing) == (
        "the store needs psycopg, which is not installed: "
        "pip install 'celery-resilience[postgres]'"
    )


def test_a_retry_that_was_not_published_tells_both_reasons() -> None:
    """What the broker said, and what the task had raised; none may raise again."""

    class Hostile(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    told = RetryNotPublished.of(OSError("away"), ValueError("oops"))

    assert str(told) == (
        "the retry could not be published: away; the task had raised ValueError: oops"
    )
    assert str(RetryNotPublished.of(OSError("away"), None)).endswith(": away")
    assert "Hostile" in str(RetryNotPublished.of(Hostile(), Hostile()))
