"""Microseconds for each call where it is sent, in the main process, and in the child.

Celery's own code runs with a producer, a pool and a channel that do nothing, so that
what is left is its work for a call, and ours on top of it. Keys are asked of a Redis
that answers at once. What others do on the machine meanwhile is not counted: the time
is this thread's own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import json
import logging
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

from celery import Celery, Task
from celery.app import trace
from celery.app.task import Context
from celery.worker import state, strategy
from kombu.message import Message
from sqlalchemy import create_engine, text
from sqlalchemy.orm import scoped_session, sessionmaker

from benchmarks.figures import Figure
from celery_resilience import Resilience, ResilientTask, TaskContext
from celery_resilience.body import RUNNING
from celery_resilience.idempotency.guard import KeyGuard
from celery_resilience.idempotency.redis_store import VERSION, RedisKeyStore
from celery_resilience.install import installation_of
from celery_resilience.memory.task import MemoryAround
from celery_resilience.message import HEADER, KEY
from celery_resilience.sessions.task import Sessions
from celery_resilience.soft_limit import let_handlers_wait
from celery_resilience.stores.redis import RedisServer
from celery_resilience.telemetry.metrics import Metrics
from celery_resilience.worker import WorkerSetup

#: Short, for what interrupts a batch takes its time in it.
BATCH = 25
REPEATS = 800

STAGES = ("received", "given to the pool", "settled and acknowledged")

#: The names of the tasks: of Celery, of ours, and of ours with a key.
KINDS = ("plain", "resilient", "keyed")


class NullPool:
    """Remembers what it was given."""

    def __init__(self) -> None:
        self.callbacks: list[Callable[[Any], None]] = []

    def apply_async(self, *_: Any, callback: Callable[[Any], None], **__: Any) -> None:
        """Run nothing."""
        self.callbacks.append(callback)


class MainProcess:
    """
    Celery's message handler of one task, with nothing behind it.

    Args:
        app: The app.
        task: One of its tasks.
    """

    def __init__(self, app: Celery, task: Any) -> None:
        self.pool = NullPool()
        self.requests: list[Any] = []
        consumer = SimpleNamespace(
            app=app,
            hostname="bench",
            connection_errors=(OSError,),
            event_dispatcher=None,
            timer=SimpleNamespace(call_at=None),
            apply_eta_task=None,
            disable_rate_limits=True,
            task_buckets={},
            on_task_request=self.requests.append,
            _limit_task=None,
            _limit_post_eta=None,
            pool=self.pool,
            controller=SimpleNamespace(state=state),
        )
        self._handle: Any = strategy.default(task, app, consumer)
        self._name = task.name
        self._numbers = itertools.count()

    def deliver(self, count: int) -> list[float]:
        """Seconds for each of `STAGES`, for *count* deliveries."""
        messages = [self._message() for _ in range(count)]
        marks = [time.thread_time()]
        for message in messages:
            self._handle(
                message, None, message.ack_log_error, message.reject_log_error, None
            )
        marks.append(time.thread_time())
        for request in self.requests:
            request.execute_using_pool(self.pool)
        marks.append(time.thread_time())
        for request, callback in zip(self.requests, self.pool.callbacks, strict=True):
            request.on_accepted(pid=1, time_accepted=0.0)
            callback((0, "None", 0.001))
        marks.append(time.thread_time())
        self.requests.clear()
        self.pool.callbacks.clear()
        return [end - start for start, end in itertools.pairwise(marks)]

    def _message(self) -> Any:
        return Message(
            body=_body(self._name, 1),
            content_type="application/json",
            content_encoding="utf-8",
            headers=_headers(self._name, next(self._numbers)),
            delivery_info={"exchange": "", "routing_key": "celery"},
            properties={"reply_to": "", "correlation_id": ""},
            delivery_tag="tag",
            channel=SimpleNamespace(
                no_ack_consumers=None, basic_ack=lambda *_, **__: None
            ),
        )


class SilentProducer:
    """Takes every message, and sends none."""

    connection = SimpleNamespace(_reraise_as_library_errors=contextlib.nullcontext)

    def publish(self, *_: Any, **__: Any) -> None:
        """Send nothing."""


class SilentRedis(RedisServer):
    """Lets every run have its key, without a round trip."""

    def __init__(self) -> None:
        super().__init__("redis://", "bench")

    def _make_client(self) -> Any:
        return SimpleNamespace(
            connection_pool=SilentPool(),
            set=lambda *_, **__: None,
            get=lambda _: VERSION,
            info=lambda _: {},
        )


class SilentPool:
    """Has connections on which nothing is sent, and a run is let have its key."""

    max_connections = 100

    def get_connection(self, command_name: str | None = None) -> Any:
        """One of them."""
        answers = itertools.cycle((1, None))
        return SimpleNamespace(
            can_read=lambda timeout: False,
            send_packed_command=lambda _: None,
            read_response=lambda: next(answers),
        )


def _headers(task: str, number: int) -> dict[str, Any]:
    id = f"{task}-{number}"
    headers: dict[str, Any] = {
        "lang": "py",
        "task": task,
        "id": id,
        "root_id": id,
        "parent_id": None,
        "group": None,
        "retries": 0,
        "eta": None,
        "expires": None,
        "timelimit": [None, None],
        "argsrepr": "()",
        "kwargsrepr": "{}",
        "origin": "bench",
        "ignore_result": True,
    }
    if task == "keyed":
        headers[HEADER] = {KEY: [f"bench:{number}", "0" * 32]}
    return headers


def _body(task: str, number: int) -> str:
    return json.dumps([_args(task, number), {}, {}])


def _args(task: str, number: int) -> list[int]:
    return [number] if task == "keyed" else []


def make_app() -> tuple[Celery, list[Any]]:
    """An app with the same empty task of each of `KINDS`."""
    app = Celery("bench", broker="memory://", set_as_current=False)
    app.conf.update(
        task_acks_late=True, task_ignore_result=True, resilience_store_url="redis://"
    )
    Resilience(app)

    def nothing() -> None:
        return None

    def keyed(number: int) -> None:
        return None

    task: Any = app.task
    task(base=Task, name="plain")(nothing)
    task(base=ResilientTask, name="resilient")(nothing)
    task(base=ResilientTask, name="keyed", idempotency_key="bench:{number}")(keyed)
    app.finalize()
    return app, [app.tasks[name] for name in KINDS]


def measure() -> Iterator[Figure]:
    """What a call costs in each process."""
    app, tasks = make_app()
    gc.freeze()  # what is there already would be looked through each time
    yield from _sender(tasks)
    worker = SimpleNamespace(
        hostname="bench",
        app=app,
        consumer_cls="celery.worker.consumer:Consumer",
        _process_task=None,
        pool_cls="prefork",
    )
    installation = installation_of(app)
    setup = WorkerSetup(installation, worker)
    setup.apply()
    setup.prepare_tasks()
    # Where OpenTelemetry's SDK is imported, by redis-py say, a worker counts until it
    # is ready, and no longer where nothing is exported.
    setup.metrics.metrics.detach()
    assert installation.child is not None
    store = RedisKeyStore(SilentRedis())
    guard = KeyGuard(
        lambda: store,
        namespace="bench",
        if_store_down="wait",
        serializer="json",
        accept=None,
    )
    installation.child = dataclasses.replace(installation.child, keys=guard)
    _enter_child(installation.child.around)
    trace.setup_worker_optimizations(app, "bench")
    try:
        yield from _main_process(app, tasks)
        yield from _counted(app, tasks[1], setup.metrics.metrics)
        yield from _child(app, tasks)
        yield from _sessions(tasks[1])
        yield from _log(tasks[1])
    finally:
        trace.reset_worker_optimizations(app)


def _enter_child(around: Iterable[Any]) -> None:
    """Be as a child of a prefork pool: it looks at its memory, and hears soft limits."""
    for room in around:
        if isinstance(room, MemoryAround):
            room.enter_child(0)
    signal.signal(signal.SIGUSR1, lambda *_: None)
    let_handlers_wait()


def _sender(tasks: list[Any]) -> Iterator[Figure]:
    producer: Any = SilentProducer()

    def send(task: Any, count: int) -> float:
        calls = [_args(task.name, n) for n in range(count)]
        start = time.thread_time()
        for args in calls:
            task.apply_async(args, producer=producer)
        return time.thread_time() - start

    plain, resilient, keyed = _least(send, tasks)
    raw = [f"plain {plain:.1f}, resilient {resilient:.1f}, with a key {keyed:.1f}"]
    yield Figure(
        "sender: more for each call", resilient - plain, "µs", at_most=2, raw=raw
    )
    yield Figure("sender: more for a key", keyed - resilient, "µs")


def _least(measured: Callable[[Any, int], float], tasks: list[Any]) -> list[float]:
    """The best time of each task in microseconds."""
    best = [float("inf")] * len(tasks)
    for _ in range(REPEATS):
        for place, task in enumerate(tasks):
            best[place] = min(best[place], _quietly(measured, task, BATCH))
    return [seconds / BATCH * 1e6 for seconds in best]


def _main_process(app: Celery, tasks: list[Any]) -> Iterator[Figure]:
    mains = [MainProcess(app, task) for task in tasks]
    best: list[list[float]] = [[float("inf")] * len(STAGES) for _ in mains]
    for _ in range(REPEATS):
        for main, least in zip(mains, best, strict=True):
            least[:] = map(min, least, _quietly(main.deliver, BATCH))
    before, after, keyed = ([s / BATCH * 1e6 for s in stages] for stages in best)
    yield Figure(
        "main process: more for each delivery",
        sum(after) - sum(before),
        "µs",
        at_most=10,
        raw=[
            f"plain {sum(before):.1f}, resilient {sum(after):.1f}",
            *(
                f"{stage}: {b:.1f} + {a - b:.1f}"
                for stage, b, a in zip(STAGES, before, after, strict=True)
            ),
        ],
    )
    yield Figure(
        "main process: more for a key", sum(keyed) - sum(after), "µs", at_most=5
    )


def _counted(app: Celery, task: Any, metrics: Metrics) -> Iterator[Figure]:
    main = MainProcess(app, task)

    def deliver(count: int) -> float:
        return sum(main.deliver(count))

    def count_up(count: int) -> float:
        for _ in range(count // BATCH):
            main.deliver(BATCH)
        start = time.thread_time()
        metrics.tick()
        return time.thread_time() - start

    before = _best(deliver)
    metrics.attach()
    noted = _best(deliver) - before
    # Once a second, whatever has come: here, of a worker that is busy.
    many = 40 * BATCH
    counted = min(_quietly(count_up, many) for _ in range(20)) / many * 1e6
    metrics.detach()
    yield Figure(
        "main process: more for a delivery that is counted",
        noted + counted,
        "µs",
        at_most=6,
        raw=[f"noted {noted:.1f}, counted later {counted:.1f}"],
    )


def _child(app: Celery, tasks: list[Any]) -> Iterator[Figure]:
    for task in tasks:
        task.__trace__ = trace.build_tracer(task.name, task, app=app)
    plain, resilient, keyed = _least(_run, tasks)
    yield Figure(
        "child: more for each run",
        resilient - plain,
        "µs",
        at_most=10,
        raw=[f"plain {plain:.1f}, resilient {resilient:.1f}"],
    )
    yield Figure(
        "child: more for a key, besides its round trips",
        keyed - resilient,
        "µs",
        at_most=40,
        raw=[f"with a key {keyed:.1f}"],
    )


def _sessions(task: Any) -> Iterator[Figure]:
    """What is looked at around a body: without a database, and with a session."""
    engine = create_engine("sqlite://")
    session = scoped_session(sessionmaker(engine))

    def uses_a_session() -> None:
        session.execute(text("SELECT 1"))
        session.commit()
        session.remove()

    def without(body: Callable[[], object], count: int) -> float:
        start = time.thread_time()
        for _ in range(count):
            body()
        return time.thread_time() - start

    plain = _best(partial(without, uses_a_session))
    room = Sessions()
    request = SimpleNamespace(id="bench")

    def within(body: Callable[[], object], count: int) -> float:
        start = time.thread_time()
        for _ in range(count):
            room.before(task, request)
            body()
            room.after(task, request, None)
            room.after_result(task, request.id)
        return time.thread_time() - start

    nothing = _best(partial(without, int))
    yield Figure(
        "child: sessions, more for a run without a database",
        _best(partial(within, int)) - nothing,
        "µs",
        at_most=2,
    )
    yield Figure(
        "child: sessions, more for a run with a session on SQLite",
        _best(partial(within, uses_a_session)) - plain,
        "µs",
        raw=[f"without {plain:.1f}"],
    )


def _log(task: Any) -> Iterator[Figure]:
    """What binding a task to its lines costs for a run, and for each line."""
    request = Context({"id": "bench"})

    def bind() -> None:
        RUNNING.reset(RUNNING.set((task, request)))

    def each(call: Callable[[], object], count: int) -> float:
        start = time.thread_time()
        for _ in range(count):
            call()
        return time.thread_time() - start

    nothing = _best(partial(each, int))
    yield Figure(
        "child: log, more for a run", _best(partial(each, bind)) - nothing, "µs"
    )
    blank = vars(logging.LogRecord("bench", 20, "", 0, "line", (), None))
    filter_it = TaskContext().filter

    def record() -> None:
        logging.makeLogRecord(blank)

    def bound() -> None:
        filter_it(logging.makeLogRecord(blank))

    token = RUNNING.set((task, request))
    unbound = _best(partial(each, record))
    more = _best(partial(each, bound)) - unbound
    RUNNING.reset(token)
    yield Figure(
        "child: log, more for each line",
        more,
        "µs",
        at_most=1,
        raw=[f"a record without {unbound:.1f}"],
    )


def _best(measured: Callable[[int], float]) -> float:
    """The best time in microseconds."""
    times: list[float] = [_quietly(measured, BATCH) for _ in range(REPEATS // 4)]
    return min(times) / BATCH * 1e6


def _run(task: Any, count: int) -> float:
    body = _body(task.name, 1)
    requests = [
        {**_headers(task.name, n), "delivery_info": {"redelivered": False}}
        for n in range(count)
    ]
    start = time.thread_time()
    for request in requests:
        trace.fast_trace_task(
            task.name, request["id"], request, body, "application/json", "utf-8"
        )
    return time.thread_time() - start


def _quietly(measured: Callable[..., Any], *args: Any) -> Any:
    gc.collect()
    gc.disable()
    try:
        return measured(*args)
    finally:
        gc.enable()
