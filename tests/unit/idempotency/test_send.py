"""What a send with a key puts on the broker, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, Task
from unit.specimens import fresh_name

from celery_resilience import ResilientTask
from celery_resilience.install import installation_of
from celery_resilience.message import HEADER, KEY


@pytest.fixture
def app(tmp_path: Path) -> Iterator[Celery]:
    """An app whose keys are in SQLite, and whose broker is this process."""
    app = Celery(fresh_name("unit"), set_as_current=False, broker="memory://")
    app.conf.resilience_store_url = f"sqlite:///{tmp_path}/keys.sqlite3"
    app.conf.task_default_queue = fresh_name("queue")
    yield app
    installation_of(app)._store("backend").close()
    app.close()


def charging(
    app: Celery, base: type[Any] = ResilientTask, **options: Any
) -> tuple[Any, list[Any]]:
    """A task of *app* with a key, and the orders that it charges in this process."""
    charged: list[Any] = []

    def charge(order_id: Any, amount: int = 10) -> Any:
        charged.append(order_id)
        return order_id

    options.setdefault("idempotency_key", "charge:{order_id}")
    name = fresh_name("shop.charge")
    app.task(base=base, name=name, shared=False, **options)(charge)
    return app.tasks[name], charged


def on_broker(app: Celery) -> list[dict[str, Any]]:
    """The headers of the messages that wait."""
    found = []
    with app.connection() as connection:
        queue = connection.SimpleQueue(app.conf.task_default_queue)
        while queue.qsize():
            found.append(queue.get_nowait().headers)
    return found


@pytest.mark.parametrize(
    "options", [{"task_id": "frozen"}, {"link_error": "celery.accumulate"}]
)
def test_what_is_waited_for_by_its_id_is_sent(
    app: Celery, options: dict[str, Any]
) -> None:
    """The end of a chain, a chord's body, and what has an errback."""
    task, _ = charging(app, unique_enqueue=True)
    if "link_error" in options:
        options = {"link_error": app.tasks["celery.accumulate"].s()}
    first = task.delay(1)
    assert task.delay(1).id == first.id

    second = task.apply_async((1,), **options)

    assert second.id != first.id
    assert {headers["id"] for headers in on_broker(app)} == {first.id, second.id}


def test_the_last_of_a_chain_is_sent(app: Celery) -> None:
    """As the one before it sends it, with the id that its sender waits for."""
    task, _ = charging(app, unique_enqueue=True)
    task.delay(1)
    last = task.si(1)
    last.freeze("waited-for")

    last.apply_async((), chain=[], parent_id="before", root_id="before")

    assert "waited-for" in {headers["id"] for headers in on_broker(app)}


def test_eager_calls_have_no_keys(app: Celery) -> None:
    """None is reserved for a message that nobody has sent; none must be made."""
    app.conf.task_always_eager = True
    task, charged = charging(app, unique_enqueue=True)

    assert [task.delay(1).get() for _ in range(3)] == [1, 1, 1]
    assert charged == [1, 1, 1]
    assert task.delay(float("nan")).successful()


class Narrow(Task):  # type: ignore[type-arg]
    """A base class as apps write them: all but the arguments by name."""

    abstract = True

    def apply_async(self, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        """Celery's."""
        options["headers"] = {**(options.get("headers") or {}), "tenant": "t"}
        return super().apply_async(args, kwargs, **options)


@pytest.mark.parametrize("key", [None, "charge:{order_id}"])
@pytest.mark.parametrize(
    "bases", [(ResilientTask, Narrow), (Narrow, ResilientTask)], ids=["in", "out"]
)
def test_a_base_class_may_take_options_by_name(
    app: Celery, bases: tuple[type[Any], ...], key: str | None
) -> None:
    """On either side of ours, with a key and without."""
    base = type("Mixed", bases, {"abstract": True})
    task, _ = charging(app, base, idempotency_key=key)

    task.delay(1)
    task.apply_async((2,), task_id="two")

    assert [(h["tenant"], KEY in h[HEADER]) for h in on_broker(app)] == [
        ("t", key is not None)
    ] * 2


def test_options_may_be_given_by_position(app: Celery) -> None:
    """As Celery takes them."""
    task, _ = charging(app)

    task.apply_async((1,), {}, "one", None, None, None, "shadow")

    (headers,) = on_broker(app)
    assert (headers["id"], headers["shadow"]) == ("one", "shadow")


def test_another_calls_key_is_not_taken_over(app: Celery) -> None:
    """Who hands its own headers on does not mean our marks."""
    task, _ = charging(app)
    theirs = {HEADER: {"key": ["charge:99", "f" * 32]}, "trace": "t"}

    task.apply_async((1,), headers=theirs)

    (headers,) = on_broker(app)
    assert headers[HEADER]["key"][0] == "charge:1"
    assert headers["trace"] == "t"


class Model:
    """Stands for a model of pydantic's, which no serializer takes."""

    def dumped(self) -> dict[str, Any]:
        """As Celery sends it."""
        return {"id": 7}


def test_a_key_is_made_of_what_celery_dumps(app: Celery) -> None:
    """A model is dumped on its way, and its worker sees what was dumped."""

    def dump(args: Any, kwargs: Any) -> tuple[Any, Any]:
        return [value.dumped() for value in args], kwargs

    as_dumped: Callable[..., Any] = staticmethod(dump)
    task, _ = charging(app, _dump_pydantic_arguments=as_dumped)

    task.delay(Model())

    (sent,) = on_broker(app)
    made = task._keys.maker.make(({"id": 7},), {})
    assert sent[HEADER]["key"] == [made.name, made.fingerprint]
