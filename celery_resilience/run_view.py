"""What a running body may ask of celery-resilience."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from celery_resilience.draining import is_draining
from celery_resilience.known_words import known_words

if TYPE_CHECKING:
    from celery_resilience.batches.batch import Batch
    from celery_resilience.batches.options import ErrorTypes
    from celery_resilience.circuits.breaker import FleetBreaker
    from celery_resilience.install import Installation
    from celery_resilience.telemetry.business import RunCounts

Result = TypeVar("Result")

#: Where a request remembers the name of its key, its run with it, and that another
#: task goes on under its id.
KEY_NAME = "_resilience_key"
KEYED_RUN = "_resilience_run"
HANDED_OVER = "_resilience_handed_over"

#: Where it keeps what its run has counted.
COUNTS = "_resilience_counts"

#: Where it keeps what its run tells the main process besides how it ended.
RUN_FACTS = "_resilience_facts"

#: The facts of what it has counted, and that the budget of a retry has paid for it.
COUNTED_FACT = "counted"
PAID_FACT = "budget_paid"


class RunView:
    """
    The running body's view of what surrounds it, as `self.resilience`.

    Args:
        request: Of the run; None outside of one.
        installation: What is installed in the task's app.
    """

    def __init__(self, request: Any, installation: Installation) -> None:
        self._request = request
        self._installation = installation
        self._said = {} if request is None else vars(request)

    @property
    def key(self) -> str | None:
        """
        The idempotency key of this run, the same in each run of the same effect.

        Hand it to a service that takes one: what a key cannot undo, the service then
        does not repeat. None outside of a worker, and for a call without a key.
        """
        return self._said.get(KEY_NAME)

    @property
    def fencing_token(self) -> int:
        """A number that grows with each run of the same key; 0 without a key."""
        run = self._said.get(KEYED_RUN)
        return 0 if run is None else run.epoch

    def count(self, name: str, amount: float = 1, /, **labels: Any) -> None:
        """
        Count *amount* more of what this task does, as a metric of the worker.

        The sum goes to the worker when the body has ended, also where it failed or is
        retried; a run that is killed takes it along.

        Args:
            name: Lower case words, such as "orders"; Prometheus adds `_total`.
            amount: At least 0; what is negative or not finite is not counted, and told
                once.
            labels: Few values each: text, int, bool or None. No ids.

        Raises:
            ConfigurationError: The name, a label or the type of the amount is none.
        """
        self._counts().count(name, amount, labels)

    def observe(self, name: str, value: float, /, **labels: Any) -> None:
        """
        Put *value* into a histogram of the worker, otherwise as `count`.

        Args:
            name, labels: As for `count`.
            value: It may be negative; what is not finite is not taken, and told once.

        Raises:
            ConfigurationError: The name, a label or the type of the value is none.
        """
        self._counts().observe(name, value, labels)

    def _counts(self) -> RunCounts:
        found: RunCounts | None = self._said.get(COUNTS)
        if found is None:
            found = self._installation.new_counts()
            if self._installation.has_metrics:
                self._said[COUNTS] = found
        return found

    def circuit(self, name: str) -> FleetBreaker:
        """
        The circuit *name*, shared by the fleet, as a pybreaker.

        `with self.resilience.circuit("payments"):` guards a call: while the circuit is
        open it raises `CircuitOpen`, and the task's `if_circuit_open` says what becomes
        of the task.

        Raises:
            ConfigurationError: The name is none.
        """
        return self._installation.breakers.get(name)

    def stream(
        self,
        source: Any,
        key: str = "id",
        size: int = 1_000,
        *,
        name: str | None = None,
        session: Any = None,
    ) -> Iterator[Any]:
        """
        The rows of a query or the items of an iterable, in bounded memory.

        A query is read in pages, each after the key of the last row before it. When the
        row after a page is asked for, the session is committed and the place saved: a
        run that was killed, failed, or has to end as its worker stops is followed by
        one that goes on there. What was done since the last full page is done again.

        Args:
            source: SQLAlchemy's `select()` or `Query`, Django's QuerySet, or an iterable
                that gives the same items in the same order each time.
            key: A unique column without NULL, by which a query is read.
            size: Rows of a page, from 1; at most two pages are in memory.
            name: At most 64 characters; where a task has several streams that it does
                not always begin in the same order.
            session: SQLAlchemy's, for a `select()`; with an iterable it is committed
                after each page.

        Raises:
            TypeError: The source is none of these.
            ValueError: The query has a limit, or its key is missing or not unique.
            Snooze: The rest is another run's; or the store is away as it begins. Let it
                pass.
        """
        return self._installation.streams.rows(
            self._request, source, key=key, size=size, name=name, session=session
        )

    @known_words("batch")
    def batch(
        self,
        name: str,
        *,
        key: Callable[[Any], Any] | str | None = None,
        chunk: int = 500,
        skip: ErrorTypes = (),
        stop: ErrorTypes = (),
        max_errors: int | None = 100,
        max_error_rate: float | None = None,
        min_items: int = 50,
        concurrency: int = 1,
        session: Any = None,
        savepoints: bool = True,
        keep_failed: Callable[[Any], Any] | None = None,
    ) -> Batch:
        """
        Many items, each worked at in a scope of its own: `with ... as batch:`.

        A bad item is noted with its id and reason, and the others go on. Each chunk is
        committed and its place saved, with the counts: a run that was killed, retried or
        replayed, or that a deploy, a soft limit or an open circuit has cut off, is
        followed by one that goes on there, without a retry spent.

        Args:
            name: At most 57 characters; one batch of a run has it.
            key: What names an item: a callable that takes it, or the name of an
                attribute or field. None: "id", or the item's number.
            chunk: Items from one commit to the next, from 1. They are in memory.
            skip: Types of exceptions that skip their item. With others it has failed.
            stop: Types that end the batch: the task ends with the exception.
            max_errors: Items that may be skipped or fail; None: any number.
            max_error_rate: Their share, from 0 to 1; None: any.
            min_items: The share is looked at from so many items on.
            concurrency: Threads in which `batch.map` calls its function, up to 256.
            session: SQLAlchemy's, which is committed after each chunk.
            savepoints: Each item has one in the session; what a bad item did is undone.
            keep_failed: Takes the key of a failed item, and returns the signature of a
                task for it, such as `enrich_row.s`: the item is kept as a failed task,
                whose replay runs that. In a worker only.

        Raises:
            ConfigurationError: An option is wrong, or the run had a batch of that name.
        """
        return self._installation.streams.batch(
            self._request,
            name=name,
            key=key,
            chunk=chunk,
            skip=skip,
            stop=stop,
            max_errors=max_errors,
            max_error_rate=max_error_rate,
            min_items=min_items,
            concurrency=concurrency,
            session=session,
            savepoints=savepoints,
            keep_failed=keep_failed,
        )

    @property
    def stopping(self) -> bool:
        """
        Whether the worker drains: a long body may end early, or hand over.

        Costs a fraction of a microsecond, so that a loop may ask in each round. Always
        False in a child that was spawned and not forked.
        """
        return is_draining()

    def run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """
        What *coroutine* returns, run on an event loop that outlives this run.

        Each thread of a process has one, so that an asynchronous engine keeps its
        connections between tasks. What the coroutine leaves running is cancelled. Not
        on gevent and eventlet, whose greenlets share a thread.

        Raises:
            RuntimeError: A loop runs in this thread: await it instead.
        """
        from celery_resilience.async_runner import run

        return run(coroutine)
