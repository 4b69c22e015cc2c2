"""What a batch asks of the run that it is in, and tells it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery, chain
from celery.exceptions import Ignore, Reject, Retry

import celery_resilience
from celery_resilience import (
    CircuitOpen,
    ConfigurationError,
    ResilientTask,
    Skip,
    Snooze,
    events,
)
from celery_resilience._celery import message_of
from celery_resilience.batches.options import BatchOptions
from celery_resilience.batches.task import BATCHES, Streams
from celery_resilience.install import installation_of
from celery_resilience.run_view import RUN_FACTS, RunView


class Shop:
    """One task of an app without a broker, and what its batches come to."""

    def __init__(self) -> None:
        self.app = Celery("shop", broker="memory://", set_as_current=False)
        self.app.conf.result_backend = "cache+memory://"
        self.now = 100.0
        self.kept: list[Any] = []
        self.counted: list[Any] = []
        self.states: list[Any] = []
        self.backend_fails = False

        @self.app.task(
            base=ResilientTask, bind=True, shared=False, name="enrich", redact=["pin"]
        )
        def enrich(self: Any, pin: str) -> None: ...

        self.task: Any = self.app.tasks["enrich"]
        self.task.update_state = self._update_state
        self.streams = Streams(
            lambda: None,
            is_stopping=lambda: True,
            task_of=lambda name: self.task,
            keep=self._keep,
            count=lambda request, *what, **labels: self.counted.append((what, labels)),
            clock=lambda: self.now,
        )

    def request(self) -> Any:
        """Of a run."""
        return SimpleNamespace(
            id="t1",
            task="enrich",
            is_eager=False,
            called_directly=False,
            ignore_result=False,
            args=["1234"],
            kwargs={},
        )

    def _update_state(self, **words: Any) -> None:
        self.states.append(words)
        if self.backend_fails:
            raise OSError("away")

    def _keep(
        self, signature: Any, exc: BaseException, **words: Any
    ) -> Callable[[], object]:
        self.kept.append((signature, words["task_id"]))
        return int


@pytest.fixture
def shop() -> Shop:
    """A shop."""
    return Shop()


@pytest.fixture
def heard() -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """The events of batches."""
    told: list[tuple[str, dict[str, Any]]] = []
    stops = [
        events.observe(name, lambda name=name, **facts: told.append((name, facts)))
        for name in ("batches.progressed", "batches.ended")
    ]
    yield told
    for stop in stops:
        stop()


def test_progress_is_told_to_the_backend_once_a_second(shop: Shop) -> None:
    """However many chunks end meanwhile."""
    with shop.streams.batch(shop.request(), name="rows", chunk=1) as made:
        for _ in made.items(range(40)):
            shop.now += 0.25

    assert [state["meta"]["ok"] for state in shop.states] == list(range(1, 41, 4))
    assert shop.states[0] == {
        "task_id": "t1",
        "state": "PROGRESS",
        "meta": {"name": "rows", "ok": 1, "skipped": 0, "failed": 0, "total": 40},
    }


def test_a_backend_that_fails_is_not_asked_again(
    shop: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    """Progress is no reason to fail; one line says that it is not told."""
    shop.backend_fails = True
    with shop.streams.batch(shop.request(), name="rows", chunk=1) as made:
        for _ in made.items(range(9)):
            shop.now += 5

    assert len(shop.states) == 1
    assert caplog.text.count("its progress is not told any more: away") == 1


def test_no_state_is_stored_where_no_result_is(shop: Shop) -> None:
    """`ignore_result` is obeyed."""
    request = shop.request()
    request.ignore_result = True

    with shop.streams.batch(request, name="rows", chunk=1) as made:
        list(made.items(range(9)))

    assert shop.states == []


def test_observers_hear_of_chunks_and_of_the_end(
    shop: Shop, heard: list[tuple[str, dict[str, Any]]]
) -> None:
    """With the counts of all runs so far."""
    batch = shop.streams.batch(shop.request(), name="rows", chunk=2, skip=ValueError)
    with batch as made:
        for item in made.items(range(3)):
            with made.item(item):
                if item == 1:
                    raise ValueError

    about = {"task": "enrich", "task_id": "t1", "batch": "rows"}
    one = {**about, "ok": 1, "skipped": 1, "failed": 0}
    two = {**about, "ok": 2, "skipped": 1, "failed": 0}
    assert heard == [
        ("batches.progressed", {**one, "total": 3}),
        ("batches.progressed", {**two, "total": 3}),
        ("batches.ended", {**two, "end": "completed"}),
    ]


@pytest.mark.parametrize(
    ("raised", "end"), [(Snooze(1), "interrupted"), (KeyError(), "failed")]
)
def test_observers_hear_how_a_batch_was_cut_off(
    shop: Shop,
    heard: list[tuple[str, dict[str, Any]]],
    raised: Exception,
    end: str,
) -> None:
    """Whether another run goes on."""
    with pytest.raises(type(raised)), shop.streams.batch(shop.request(), name="rows"):
        raise raised

    assert heard[-1][1]["end"] == end


def test_without_a_store_a_stopping_worker_lets_it_end(
    shop: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    """The next run would begin anew."""
    with shop.streams.batch(shop.request(), name="rows", chunk=1) as made:
        assert list(made.items(range(3))) == [0, 1, 2]

    assert "there is no store: a batch of enrich begins anew in each run" in caplog.text


def test_secrets_of_task_and_item_are_masked(shop: Shop) -> None:
    """In the message and in the id."""
    batch = shop.streams.batch(shop.request(), name="rows", key="password")
    with batch as made:
        for item in made.items([{"password": "hunter2"}]):
            with made.item(item):
                raise ValueError("pin 1234 and hunter2")

    (sample,) = made.report["samples"]
    assert sample["message"] == "pin *** and ***"
    assert sample["id"] == "***"


def test_an_item_is_the_same_failed_task_each_time(shop: Shop) -> None:
    """And another one for another item, batch or task."""
    ids = []
    for name, task_id in [("a", "t1"), ("a", "t1"), ("b", "t1"), ("a", "t2")]:
        request = shop.request()
        request.id = task_id
        words: dict[str, Any] = {"key": int, "keep_failed": shop.task.s}
        with shop.streams.batch(request, name=name, **words) as made:
            for item in made.items([1, 2]):
                with made.item(item):
                    raise KeyError
        ids.append([kept_id for _, kept_id in shop.kept])
        shop.kept.clear()

    assert ids[0] == ids[1]
    assert len({kept_id for pair in ids for kept_id in pair}) == 6


def test_a_run_has_one_batch_of_a_name(shop: Shop) -> None:
    """Their places would be one."""
    request = shop.request()
    shop.streams.batch(request, name="rows")

    with pytest.raises(ConfigurationError, match="this run had one of that name"):
        shop.streams.batch(request, name="rows")
    shop.streams.batch(request, name="lines")


def test_what_ended_is_told_when_the_task_ends(shop: Shop) -> None:
    """Not where another run of it goes on."""
    request = shop.request()
    with shop.streams.batch(request, name="rows") as made:
        list(made.items(range(3)))

    shop.streams.after(shop.task, request, Snooze(1))
    assert RUN_FACTS not in vars(request)
    shop.streams.after(shop.task, request, None)

    told = {"name": "rows", "ok": 3, "skipped": 0, "failed": 0}
    assert vars(request)[RUN_FACTS] == {"batch": [told]}
    assert shop.counted[0] == (
        ("batch_items", 3),
        {"batch": "rows", "outcome": "ok"},
    )
    assert list(vars(request)[BATCHES]) == ["rows"]


@pytest.mark.parametrize(
    ("exc", "goes_on"),
    [
        (Skip("done"), False),
        (Ignore(), False),
        (Reject("no"), False),
        (CircuitOpen(), False),
        (ValueError(), False),
        (Reject("later", requeue=True), True),
        (Retry(), True),
    ],
    ids=repr,
)
def test_a_batch_is_told_where_no_other_run_goes_on(
    shop: Shop, exc: Exception, goes_on: bool
) -> None:
    """However the task ended."""
    request = shop.request()
    with shop.streams.batch(request, name="rows") as made:
        list(made.items(range(3)))

    shop.streams.after(shop.task, request, exc)

    assert (RUN_FACTS not in vars(request)) == goes_on


def test_a_hidden_label_fails_no_task(
    shop: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    """What it did is committed; its items are not counted."""

    def refuse(*_: object, **labels: object) -> None:
        raise ConfigurationError("batch is hidden by resilience_redact")

    shop.streams._count = refuse
    request = shop.request()
    with shop.streams.batch(request, name="rows") as made:
        list(made.items(range(3)))

    shop.streams.after(shop.task, request, None)

    assert "batch is hidden by resilience_redact" in caplog.text


@pytest.mark.parametrize("function", [RunView.batch, celery_resilience.batch])
def test_every_way_to_begin_one_has_the_same_defaults(function: Any) -> None:
    """Each names them, for who reads its signature."""
    defaults = {field.name: field.default for field in fields(BatchOptions)}
    parameters = inspect.signature(function).parameters
    named = {n: p.default for n, p in parameters.items() if n not in ("self", "name")}

    assert named == {name: defaults[name] for name in named}
    assert defaults.keys() - named.keys() <= {"name", "keep_failed"}


def test_a_misspelt_word_is_a_wrong_option(shop: Shop) -> None:
    """The same error as for a wrong value, with the word that is meant."""
    view = RunView(None, installation_of(shop.app))
    begin: Any
    for begin in (view.batch, celery_resilience.batch):
        said = (
            r"batch\(\): unknown option chunks, did you mean chunk\? \(it takes key, "
        )
        with pytest.raises(ConfigurationError, match=said):
            begin("rows", chunks=3)
        with pytest.raises(ConfigurationError, match=r"unknown option skp, .* skip"):
            begin(name="rows", skp=())


# --- the message of an item's task ------------------------------------------------------


def test_a_signatures_message_is_recorded_as_it_would_be_sent(shop: Shop) -> None:
    """To its queue, with its options; and nothing is sent."""
    signature = shop.task.s("1234").set(queue="slow", priority=3, expires=60)
    message = message_of(signature, "t9")

    assert message.headers["task"] == "enrich"
    assert message.headers["id"] == "t9"
    assert message.queue == message.routing_key == "slow"
    assert message.properties["priority"] == 3
    assert message.body.startswith(b'[["1234"], {}, ')
    assert message.content_type == "application/json"
    with shop.app.connection_for_read() as connection:
        assert connection.SimpleQueue("slow").qsize() == 0


def test_what_is_no_signature_of_one_task_is_refused(shop: Shop) -> None:
    """With what is taken."""
    for wrong in (7, None, chain(shop.task.s("1"), shop.task.si("2"))):
        with pytest.raises(ConfigurationError, match="the signature of one task"):
            message_of(wrong, "t9")
    shop.app.conf.task_always_eager = True
    with pytest.raises(ConfigurationError, match="is it eager"):
        message_of(shop.task.s("1234"), "t9")
