"""Which failed queue a failure goes to."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from celery_resilience.failed.routes import failed_queue_for, failed_queues
from celery_resilience.outcome import Reason

DEFAULT = "shop.failed"

FAILURE: dict[str, Any] = {
    "task": "shop.orders.ship",
    "exception": "shop.errors.NoStock",
    "reason": "exception",
    "default": DEFAULT,
}

TABLE: list[tuple[Any, str | None, dict[str, Any]]] = [
    # routes, expected, what differs from FAILURE
    ({}, DEFAULT, {}),
    # a task's glob
    ({"shop.orders.ship": "q"}, "q", {}),
    ({"shop.*": "q"}, "q", {}),
    ({"shop.?rders.*": "q"}, "q", {}),
    ({"shop.[op]rders.*": "q"}, "q", {}),
    ({"*": "q"}, "q", {}),
    ({"SHOP.*": "q"}, DEFAULT, {}),
    ({"shop": "q"}, DEFAULT, {}),
    ({"orders.ship": "q"}, DEFAULT, {}),
    # an exception's name
    ({"shop.errors.NoStock": "q"}, "q", {}),
    ({"NoStock": "q"}, "q", {}),
    ({"shop.errors.*": "q"}, "q", {}),
    ({"*.NoStock": "q"}, "q", {}),
    ({"nostock": "q"}, DEFAULT, {}),
    ({"Stock": "q"}, DEFAULT, {}),
    ({"KeyError": "q"}, "q", {"exception": "KeyError"}),
    # a reason
    ({"worker_lost": "q"}, "q", {"reason": "worker_lost"}),
    ({"worker_lost": "q"}, DEFAULT, {}),
    ({"unknown_task": "q"}, "q", {"task": "", "reason": "unknown_task"}),
    # None drops
    ({"NoStock": None}, None, {}),
    ({"shop.*": None}, None, {}),
    # the first match wins
    ({"NoStock": "a", "shop.*": "b"}, "a", {}),
    ({"shop.*": "b", "NoStock": "a"}, "b", {}),
    ({"NoStock": None, "shop.*": "b"}, None, {}),
    ({"other.*": "a", "shop.*": "b", "*": "c"}, "b", {}),
    # the task's own queue beats them
    ({"shop.*": "b"}, "own", {"own": "own"}),
    ({"shop.*": None}, "own", {"own": "own"}),
    ({}, "own", {"own": "own"}),
    ({"shop.*": "b"}, None, {"own": False}),
    ({}, None, {"own": False}),
    ({"shop.*": "b"}, "b", {"own": None}),
    # expired and revoked are kept only where a route names them
    ({}, None, {"reason": "expired"}),
    ({"*": "q"}, None, {"reason": "expired"}),
    ({"shop.*": "q"}, None, {"reason": "revoked"}),
    ({"expired": "q"}, "q", {"reason": "expired"}),
    ({"expired": "q"}, None, {"reason": "revoked"}),
    ({"shop.*": "a", "revoked": "q"}, "q", {"reason": "revoked"}),
    ({"expired": None}, None, {"reason": "expired"}),
    ({}, None, {"reason": "expired", "own": "own"}),
    ({"expired": "q"}, "q", {"reason": "expired", "own": "own"}),
    ({"expired": "q"}, None, {"reason": "expired", "own": False}),
]


@pytest.mark.parametrize(("routes", "queue", "changes"), TABLE)
def test_the_queue_of_a_failure(
    routes: dict[str, str | None], queue: str | None, changes: dict[str, Any]
) -> None:
    """By the task's option, then the first route that matches, then the default."""
    found = failed_queue_for(**{**FAILURE, **changes}, routes=tuple(routes.items()))

    assert found == queue


@given(
    st.sampled_from(list(Reason)),
    st.text(max_size=10),
    st.text(max_size=10),
    st.lists(st.tuples(st.text(min_size=1, max_size=5), st.none() | st.just("q"))),
)
def test_no_failure_is_dropped_unless_a_route_says_so(
    reason: Reason, task: str, exception: str, routes: list[tuple[str, str | None]]
) -> None:
    """Without a None among the routes, every real failure has a queue."""
    found = failed_queue_for(
        task=task,
        exception=exception,
        reason=reason,
        routes=[(pattern, queue) for pattern, queue in routes if queue],
        default=DEFAULT,
    )

    if reason in (Reason.EXPIRED, Reason.REVOKED):
        assert found in (None, "q")
    else:
        assert found in (DEFAULT, "q")


def test_every_failed_queue_is_named_once_with_the_default_first() -> None:
    """These are what is collected, and what no worker may consume as tasks."""
    queues = failed_queues(
        routes=(("a", "zeta"), ("b", None), ("c", "alpha"), ("d", "zeta")),
        default=DEFAULT,
        own=[None, False, "mine", "alpha", "beta", DEFAULT],
    )

    assert queues == [DEFAULT, "zeta", "alpha", "beta", "mine"]


def test_an_app_without_routes_has_one_failed_queue() -> None:
    """The default."""
    assert failed_queues(routes=(), default=DEFAULT, own=[None, True]) == [DEFAULT]
