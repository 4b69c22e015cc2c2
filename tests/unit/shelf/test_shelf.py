"""What a worker puts into the store comes back, once, when it is due."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from typing import Any

import pytest
from kombu.message import Message
from unit.specimens import a_message

from celery_resilience.delivery.send_again import send_again
from celery_resilience.errors import BrokerUnavailable, NoRoute, StoreUnavailable
from celery_resilience.events import observe
from celery_resilience.message import HEADER, OriginalMessage
from celery_resilience.outcome import Outcome
from celery_resilience.packing import message_to_text
from celery_resilience.shelf import policy
from celery_resilience.shelf import shelf as shelf_module
from celery_resilience.shelf.consumer import MAX_COUNTED, Shelving
from celery_resilience.shelf.shelf import AWAY_S, CLAIM, LEASE_S, Shelf
from celery_resilience.shelf.store import Claimed, Shelved


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


class Store:
    """A shelf in memory that is away when it is told so."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.rows: dict[str, tuple[float, str]] = {}
        self.is_away = False
        self.loses_answers = False
        self.asked = 0

    def _ask(self) -> None:
        self.asked += 1
        if self.is_away:
            raise StoreUnavailable("away")

    def put(self, messages: Sequence[tuple[Shelved, float]]) -> None:
        """Kept."""
        self._ask()
        for it, delay_s in messages:
            self.rows[it.id] = self.clock() + delay_s, it.text
        if self.loses_answers:
            raise StoreUnavailable("no answer")

    def claim(self, limit: int, lease_s: float) -> Claimed:
        """Those that are due."""
        self._ask()
        now = self.clock()
        due = sorted((at, id_) for id_, (at, _) in self.rows.items() if at <= now)
        found = [Shelved(id_, self.rows[id_][1]) for _, id_ in due[:limit]]
        for it in found:
            self.rows[it.id] = now + lease_s, it.text
        next_at = min((at for at, _ in self.rows.values()), default=None)
        left = len(self.rows) - len(found)
        return Claimed(found, None if next_at is None else next_at - now, left)

    def remove(self, ids: Sequence[str]) -> None:
        """Forgotten."""
        self._ask()
        for id_ in ids:
            self.rows.pop(id_, None)


class Broker:
    """A publisher that refuses what it is told to refuse."""

    def __init__(self) -> None:
        self.taken: list[OriginalMessage] = []
        self.is_away = False
        self.refused: set[str] = set()

    def publish(self, message: OriginalMessage, *, declare: bool = False) -> None:
        """Taken."""
        if self.is_away:
            raise BrokerUnavailable("away")
        if message.queue in self.refused:
            raise NoRoute("no such queue")
        self.taken.append(message)

    def close(self) -> None:
        """Nothing is open."""


@pytest.fixture
def clock() -> Clock:
    """One clock for all."""
    return Clock()


@pytest.fixture
def store(clock: Clock) -> Store:
    """An empty one."""
    return Store(clock)


@pytest.fixture
def broker() -> Broker:
    """One that takes all."""
    return Broker()


@pytest.fixture
def shelf(store: Store, broker: Broker, clock: Clock) -> Shelf:
    """A shelf whose thread is the test's."""
    return Shelf(lambda: store, broker, clock=clock)


def copy(**changes: Any) -> OriginalMessage:
    """What is published when it is due."""
    return send_again(a_message(**changes), delay_s=0, marks={"waits_since": 1.0})


def put(shelf: Shelf, *messages: OriginalMessage, delay_s: float = 60) -> list[bool]:
    """Messages; whether each was stored, once `settle` is called."""
    stored: list[bool] = []
    for message in messages:
        shelf.put(message, delay_s, stored.append)
    return stored


def work(shelf: Shelf) -> None:
    """As its thread does it."""
    try:
        shelf.work()
    except Exception as exc:
        shelf._went_away(exc)


# --- the thread -----------------------------------------------------------------------


def test_a_message_comes_back_when_it_is_due(
    shelf: Shelf, store: Store, broker: Broker, clock: Clock
) -> None:
    """Byte for byte, and is gone from the store then."""
    events: list[tuple[str, dict[str, Any]]] = []
    stops = [
        observe(name, lambda name=name, **facts: events.append((name, facts)))
        for name in ("shelf.filled", "shelf.emptied")
    ]
    message = copy(body=b"\x00\xff", properties={"priority": 3, "x": b"\xfe"})
    stored = put(shelf, message)
    work(shelf)
    assert stored == []
    shelf.settle()
    assert stored == [True]
    assert broker.taken == []

    clock.now += 59
    work(shelf)
    assert broker.taken == []
    clock.now += 2
    work(shelf)
    assert broker.taken == [message]
    assert store.rows == {}
    assert events == [
        ("shelf.filled", {"messages": 1}),
        ("shelf.emptied", {"messages": 1, "left": 0}),
    ]
    for stop in stops:
        stop()


def test_time_on_the_way_to_the_store_counts(
    shelf: Shelf, store: Store, clock: Clock
) -> None:
    """It is due when it was to be."""
    put(shelf, copy(), delay_s=60)
    clock.now += 45
    work(shelf)

    assert [at for at, _ in store.rows.values()] == [1_060.0]


def test_all_that_is_due_is_published_without_a_pause(
    shelf: Shelf, store: Store, broker: Broker, clock: Clock
) -> None:
    """More than one claim has."""
    put(shelf, *(copy() for _ in range(2 * CLAIM + 10)))
    work(shelf)
    clock.now += 61
    for _ in range(3):
        work(shelf)

    assert len(broker.taken) == 2 * CLAIM + 10
    assert store.rows == {}


def test_a_store_that_is_away_gives_its_messages_back(
    shelf: Shelf, store: Store, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """They are held as before; it is said once, and looked for again in time."""
    store.is_away = True
    stored = put(shelf, copy(), copy())
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            work(shelf)
            clock.now += AWAY_S + 0.1
        shelf.settle()
        assert stored == [False, False]
        assert shelf.is_away
        store.is_away = False
        work(shelf)

    assert not shelf.is_away
    said = [r.message for r in caplog.records if "snoozed messages" in r.message]
    assert [text.rpartition(" is ")[2][:4] for text in said] == ["away", "back"]


def test_what_may_have_been_stored_is_not_run_twice(
    shelf: Shelf, store: Store, broker: Broker, clock: Clock
) -> None:
    """It is held by the worker, so that the store forgets it."""
    store.loses_answers = True
    stored = put(shelf, copy(), delay_s=1)
    work(shelf)
    shelf.settle()
    assert stored == [False]
    assert len(store.rows) == 1
    store.loses_answers = False
    clock.now += AWAY_S + 1
    work(shelf)

    assert store.rows == {}
    assert broker.taken == []


def test_a_message_that_is_no_text_is_held(
    shelf: Shelf, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And those beside it are stored."""
    bad = copy(body=b"bad")

    def refuses(message: OriginalMessage) -> str:
        if message is bad:
            raise TypeError("no text")
        return message_to_text(message)

    monkeypatch.setattr(shelf_module, "message_to_text", refuses)
    stored = put(shelf, bad, copy())
    work(shelf)
    shelf.settle()

    assert sorted(stored) == [False, True]
    assert len(store.rows) == 1
    assert not shelf.is_away


def test_a_broker_that_is_away_loses_nothing(
    shelf: Shelf, store: Store, broker: Broker, clock: Clock
) -> None:
    """The claim lapses, and it is published then."""
    put(shelf, copy())
    work(shelf)
    broker.is_away = True
    clock.now += 61
    work(shelf)
    assert len(store.rows) == 1
    broker.is_away = False
    clock.now += LEASE_S + 1
    work(shelf)

    assert len(broker.taken) == 1
    assert store.rows == {}


def test_a_message_that_nobody_takes_holds_up_no_other(
    shelf: Shelf, store: Store, broker: Broker, clock: Clock
) -> None:
    """A queue that is gone, or a row that is none."""
    put(shelf, copy(queue="gone"), copy())
    work(shelf)
    store.rows["torn"] = 0.0, "{"
    broker.refused.add("gone")
    clock.now += 61
    work(shelf)

    assert [message.queue for message in broker.taken] == ["shop"]
    assert len(store.rows) == 2


def test_what_was_published_is_forgotten_when_the_store_is_back(
    shelf: Shelf, store: Store, broker: Broker, clock: Clock
) -> None:
    """The store died between; nothing is published twice by this worker."""
    put(shelf, copy())
    work(shelf)
    clock.now += 61
    publish = broker.publish

    def dies(message: OriginalMessage, *, declare: bool = False) -> None:
        publish(message)
        store.is_away = True

    broker.publish = dies  # type: ignore[method-assign]
    work(shelf)
    store.is_away = False
    clock.now += LEASE_S + 1
    work(shelf)

    assert len(broker.taken) == 1
    assert store.rows == {}


def test_the_last_shelf_ends_when_the_store_is_empty(
    store: Store, broker: Broker, clock: Clock
) -> None:
    """Where celery-resilience is off, nothing more comes."""
    put(filled := Shelf(lambda: store, broker, clock=clock), copy())
    work(filled)
    last = Shelf(lambda: store, broker, is_last=True, clock=clock)
    work(last)
    assert not last._is_stopping

    clock.now += 100
    work(last)
    clock.now += 100
    work(last)

    assert len(broker.taken) == 1
    assert last._is_stopping


# --- how often is looked ---------------------------------------------------------------


@pytest.mark.parametrize("chance", [0.0, 0.5, 1.0])
def test_an_empty_shelf_is_looked_at_seldom(chance: float) -> None:
    """A full one when the next is due, and not at the same time by all."""
    assert 7 <= policy.look_again_in_s(None, chance) <= 15
    assert 0.5 <= policy.look_again_in_s(-3, chance) <= 1
    assert 7 <= policy.look_again_in_s(600, chance) <= 15
    assert policy.look_again_in_s(5, chance) == 5


@pytest.mark.parametrize(
    ("limit", "held"), [(None, 1_000), (0, 1_000), (100, 50), (9_000, 1_000)]
)
def test_the_cap_is_below_celerys_own(limit: int | None, held: int) -> None:
    """At which a worker takes nothing more, and nothing would be handed over."""
    assert policy.most_held(limit) == held


@pytest.mark.parametrize(
    ("headers", "waits_s"),
    [
        ({"eta": "1970-01-01T00:01:40+00:00", HEADER: {"sent": "x"}}, 90.0),
        ({"eta": "1970-01-01T00:01:40", HEADER: {"sent": "x"}}, 90.0),
        ({"eta": "1970-01-01T00:01:40+00:00"}, None),
        ({"eta": None, HEADER: {"sent": "x"}}, None),
        ({"eta": "soon", HEADER: {"sent": "x"}}, None),
        ({"eta": 7, HEADER: {"sent": "x"}}, None),
        ({"eta": "1970-01-01T00:01:40+00:00", HEADER: {"sent": 7}}, None),
        ({}, None),
    ],
)
def test_only_what_was_sent_again_waits(headers: Any, waits_s: float | None) -> None:
    """Another message with an ETA is Celery's."""
    assert policy.waits_s(headers, 10.0) == waits_s


# --- the consumer ------------------------------------------------------------------------


class Qos:
    """Counts."""

    max_prefetch: int | None = None

    def __init__(self) -> None:
        self.value = 8

    def increment_eventually(self) -> None:
        """One more."""
        self.value += 1

    def decrement_eventually(self) -> None:
        """One less."""
        self.value -= 1


class Consumer:
    """Celery's, as far as it is used."""

    connection_errors = (OSError,)

    def __init__(self) -> None:
        self.qos = Qos()


class Deliveries:
    """The table, as far as it is used."""

    worker = "celery@unit"

    def __init__(self) -> None:
        self.open_count = 1_000
        self.received = 0
        self.counts: dict[Outcome, int] = {Outcome.REQUEUED: 0}
        self.held: set[Any] = set()
        self.is_told_to_all = False

    def can_come_again(self, message: Any) -> bool:
        """Unless it was told to all."""
        return not self.is_told_to_all


class Received(Message):  # type: ignore[misc]
    """A message that counts how it was settled."""

    def __init__(self, **headers: Any) -> None:
        super().__init__(
            body=b"[]",
            headers={
                "task": "shop.ship",
                "id": "t",
                "eta": "1970-01-01T01:00:00+00:00",
                HEADER: {"sent": "x"},
                **headers,
            },
        )
        self.acks = 0

    def ack_log_error(self, *args: Any, **kwargs: Any) -> None:
        """Once."""
        self.acks += 1


@pytest.fixture
def deliveries() -> Deliveries:
    """A worker that holds as much as it may."""
    return Deliveries()


@pytest.fixture
def lost() -> deque[bool]:
    """Whether the connection is lost."""
    return deque([False], maxlen=1)


@pytest.fixture
def shelving(shelf: Shelf, deliveries: Deliveries, lost: deque[bool]) -> Shelving:
    """In a worker."""
    shelving = Shelving(
        shelf,
        deliveries,
        copy_of=lambda message, due: copy(),
        is_lost=lambda: lost[0],
        most_held=1_000,
        clock=lambda: 10.0,
    )
    shelving.consumer = Consumer()
    return shelving


def never(message: Any) -> None:
    """What must not be called."""
    raise AssertionError("it is held")


def test_a_stored_message_is_acknowledged_and_counted(
    shelving: Shelving, deliveries: Deliveries, store: Store
) -> None:
    """Not before it is stored; and others are fetched in its place meanwhile."""
    settlements: list[Any] = []
    stop = observe(
        "delivery.requeued", lambda settlement: settlements.append(settlement)
    )
    message = Received()
    assert shelving.takes(message, never)
    assert message in deliveries.held
    assert shelving.consumer.qos.value == 9
    shelving.settle()
    assert message.acks == 0

    work(shelving.shelf)
    shelving.settle()
    assert message.acks == 1
    assert deliveries.held == set()
    assert (deliveries.received, deliveries.counts[Outcome.REQUEUED]) == (1, 1)
    assert shelving.consumer.qos.value == 8
    assert [(s.reason, s.task, s.task_id) for s in settlements] == [
        ("shelved", "shop.ship", "t")
    ]
    assert len(store.rows) == 1
    stop()


def test_a_message_is_held_where_the_store_does_not_answer(
    shelving: Shelving, deliveries: Deliveries, store: Store
) -> None:
    """As without a shelf; and so are those that follow."""
    store.is_away = True
    held: list[Any] = []
    message = Received()
    assert shelving.takes(message, held.append)
    work(shelving.shelf)
    shelving.settle()

    assert held == [message]
    assert message.acks == 0
    assert shelving.consumer.qos.value == 8
    assert not shelving.takes(Received(), never)


@pytest.mark.parametrize(
    "message",
    [
        Received(eta=None),
        Received(eta="1970-01-01T00:00:12+00:00"),
        Received(**{HEADER: {"snoozes": 1}}),
    ],
    ids=["no eta", "soon", "not sent again"],
)
def test_what_is_soon_due_or_of_others_is_left_to_celery(
    shelving: Shelving, message: Any
) -> None:
    """However many are held."""
    assert not shelving.takes(message, never)


def test_a_worker_that_holds_few_keeps_all(
    shelving: Shelving, deliveries: Deliveries
) -> None:
    """Nor is a broadcast handed over, which nobody can send to one worker."""
    deliveries.open_count = 999
    assert not shelving.takes(Received(), never)
    deliveries.open_count = 1_000
    deliveries.is_told_to_all = True
    assert not shelving.takes(Received(), never)
    deliveries.is_told_to_all = False
    assert shelving.takes(Received(), never)


def test_what_the_broker_delivers_again_is_not_on_the_shelf_too(
    shelving: Shelving, deliveries: Deliveries, store: Store
) -> None:
    """The connection was lost while it was stored."""
    message = Received()
    assert shelving.takes(message, never)
    qos = shelving.consumer.qos
    work(shelving.shelf)
    assert len(store.rows) == 1
    deliveries.held.clear()
    shelving.consumer = Consumer()
    shelving.settle()
    work(shelving.shelf)

    assert store.rows == {}
    assert message.acks == 0
    assert (qos.value, shelving.consumer.qos.value) == (9, 8)


def test_nothing_is_settled_while_the_connection_is_lost(
    shelving: Shelving, lost: deque[bool]
) -> None:
    """On Redis it is acknowledged on the next one."""
    message = Received()
    assert shelving.takes(message, never)
    work(shelving.shelf)
    lost.append(True)
    shelving.settle()
    assert message.acks == 0
    lost.append(False)
    shelving.settle()

    assert message.acks == 1


def test_no_more_are_fetched_than_the_store_can_take(shelving: Shelving) -> None:
    """And none where Celery has a limit of its own."""
    for _ in range(MAX_COUNTED + 5):
        assert shelving.takes(Received(), never)
    assert shelving.consumer.qos.value == 8 + MAX_COUNTED
    work(shelving.shelf)
    shelving.settle()
    assert shelving.consumer.qos.value == 8
    shelving.consumer.qos.max_prefetch = 2_000
    assert shelving.takes(Received(), never)
    assert shelving.consumer.qos.value == 8
