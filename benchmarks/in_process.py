"""Microseconds for each delivery in the main process, and in the child.

Celery's own code runs with a pool and a channel that do nothing, so that what is
left is its work for a delivery, and ours on top of it.
"""

from __future__ import annotations

import gc
import itertools
import json
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

from celery import Celery, Task
from celery.app import trace
from celery.worker import state, strategy
from kombu.message import Message

from benchmarks.figures import Figure
from celery_resilience import Resilience, ResilientTask
from celery_resilience.install import installation_of
from celery_resilience.worker import WorkerSetup

BATCH = 500
REPEATS = 60

STAGES = ("received", "given to the pool", "settled and acknowledged")


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
        marks = [time.perf_counter()]
        for message in messages:
            self._handle(
                message, None, message.ack_log_error, message.reject_log_error, None
            )
        marks.append(time.perf_counter())
        for request in self.requests:
            request.execute_using_pool(self.pool)
        marks.append(time.perf_counter())
        for request, callback in zip(self.requests, self.pool.callbacks, strict=True):
            request.on_accepted(pid=1, time_accepted=0.0)
            callback((0, "None", 0.001))
        marks.append(time.perf_counter())
        self.requests.clear()
        self.pool.callbacks.clear()
        return [end - start for start, end in itertools.pairwise(marks)]

    def _message(self) -> Any:
        return Message(
            body=json.dumps([[], {}, {}]),
            content_type="application/json",
            content_encoding="utf-8",
            headers=_headers(self._name, f"{self._name}-{next(self._numbers)}"),
            delivery_info={"exchange": "", "routing_key": "celery"},
            properties={"reply_to": "", "correlation_id": ""},
            delivery_tag="tag",
            channel=SimpleNamespace(
                no_ack_consumers=None, basic_ack=lambda *_, **__: None
            ),
        )


def _headers(task: str, id: str) -> dict[str, Any]:
    return {
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


def make_app() -> tuple[Celery, Any, Any]:
    """An app with the same empty task, plain and resilient."""
    app = Celery("bench", broker="memory://", set_as_current=False)
    app.conf.update(task_acks_late=True, task_ignore_result=True)
    Resilience(app)

    def nothing() -> None:
        return None

    plain: Any = app.task(base=Task, name="plain")(nothing)
    resilient: Any = app.task(base=ResilientTask, name="resilient")(nothing)
    app.finalize()
    return app, app.tasks[plain.name], app.tasks[resilient.name]


def measure() -> Iterator[Figure]:
    """Both processes' figures."""
    app, plain, resilient = make_app()
    worker = SimpleNamespace(
        hostname="bench",
        app=app,
        consumer_cls="celery.worker.consumer:Consumer",
        _process_task=None,
    )
    setup = WorkerSetup(installation_of(app), worker)
    setup.apply()
    setup.prepare_tasks()
    trace.setup_worker_optimizations(app, "bench")
    try:
        yield from _main_process(app, plain, resilient)
        yield _child(app, plain, resilient)
    finally:
        trace.reset_worker_optimizations(app)


def _main_process(app: Celery, plain: Any, resilient: Any) -> Iterator[Figure]:
    mains = [MainProcess(app, task) for task in (plain, resilient)]
    best: list[list[float]] = [[float("inf")] * len(STAGES) for _ in mains]
    for _ in range(REPEATS):
        for main, least in zip(mains, best, strict=True):
            least[:] = map(min, least, _quietly(main.deliver, BATCH))
    before, after = ([s / BATCH * 1e6 for s in stages] for stages in best)
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


def _child(app: Celery, plain: Any, resilient: Any) -> Figure:
    best = [float("inf"), float("inf")]
    for task in (plain, resilient):
        task.__trace__ = trace.build_tracer(task.name, task, app=app)
    for _ in range(REPEATS):
        for i, task in enumerate((plain, resilient)):
            best[i] = min(best[i], _quietly(_run, task, BATCH))
    before, after = (seconds / BATCH * 1e6 for seconds in best)
    return Figure(
        "child: more for each run",
        after - before,
        "µs",
        at_most=10,
        raw=[f"plain {before:.1f}, resilient {after:.1f}"],
    )


def _run(task: Any, count: int) -> float:
    body = json.dumps([[], {}, {}])
    requests = [
        {**_headers(task.name, f"id-{i}"), "delivery_info": {"redelivered": False}}
        for i in range(count)
    ]
    start = time.perf_counter()
    for request in requests:
        trace.fast_trace_task(
            task.name, request["id"], request, body, "application/json", "utf-8"
        )
    return time.perf_counter() - start


def _quietly(measured: Callable[..., Any], *args: Any) -> Any:
    gc.collect()
    gc.disable()
    try:
        return measured(*args)
    finally:
        gc.enable()
