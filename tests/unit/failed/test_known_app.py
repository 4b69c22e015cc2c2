"""What an app's dead letters are read with."""

from __future__ import annotations

from typing import Any

import pytest
from celery import Celery
from kombu import Exchange, Queue

from celery_resilience import ResilientTask
from celery_resilience.failed.known_app import AppKnowledge


@pytest.fixture
def app() -> Celery:
    """An app with two queues, and a task of either kind."""
    app = Celery("shop", set_as_current=False, broker="memory://")
    app.conf.update(
        task_default_queue="shop",
        task_queues=[
            Queue("shop"),
            Queue(
                "orders",
                Exchange("topic", type="topic"),
                routing_key="order.#",
                queue_arguments={"x-delivery-limit": 3},
            ),
        ],
        task_routes={"plain": {"queue": "orders"}},
        resilience_redact=["pin"],
    )

    @app.task(name="plain", bind=True, shared=False)
    def plain(self: Any, user: str, pin: str) -> None: ...

    @app.task(name="resilient", base=ResilientTask, redact=["card"], shared=False)
    def resilient(user: str, card: str) -> None: ...

    app.finalize()
    return app


@pytest.fixture
def known(app: Celery) -> AppKnowledge:
    """What it knows."""
    return AppKnowledge(app, ["pin"])


def test_the_arguments_of_every_task_have_their_names(known: AppKnowledge) -> None:
    """Of a plain one too, so that a positional secret is known by its name."""
    assert known.names_of("plain") == (("user", "pin"), ["pin"])
    assert known.names_of("resilient") == (("user", "card"), ("card", "pin"))
    assert known.names_of("unknown") is None


def test_a_queue_is_found_by_what_it_is_bound_with(known: AppKnowledge) -> None:
    """Exchange and routing key together."""
    assert known.bound_queue("topic", "order.#") == "orders"
    assert known.bound_queue("topic", "order.new") is None


def test_a_task_goes_where_the_app_sends_it(app: Celery, known: AppKnowledge) -> None:
    """By its routes; by default to the default queue."""
    assert known.home_of("plain") == "orders"
    assert known.home_of("resilient") == "shop"
    assert known.home_of("") == "shop"


def test_a_router_that_raises_stops_nothing(app: Celery, known: AppKnowledge) -> None:
    """It is the user's code, and may want arguments."""

    def route(name: str, args: Any, kwargs: Any, options: Any, **_: Any) -> Any:
        return {"queue": args[0]}

    app.conf.task_routes = [route]
    app.amqp.flush_routes()

    assert known.home_of("plain") == "shop"


def test_a_delivery_limit_is_known_where_the_app_declares_it(
    known: AppKnowledge,
) -> None:
    """Else the text does without."""
    assert known.delivery_limit_of("orders") == 3
    assert known.delivery_limit_of("shop") is None
    assert known.delivery_limit_of("elsewhere") is None
