"""Items in chunks: each ends well, is skipped or fails, and a later run goes on."""

from __future__ import annotations

import logging
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from functools import partial
from itertools import islice
from types import TracebackType
from typing import Any, Self

from celery_resilience.batches.helpers import Helpers
from celery_resilience.batches.options import BatchOptions
from celery_resilience.batches.scope import ItemScope, SavepointScope
from celery_resilience.batches.sources import Page, Source, source_of
from celery_resilience.batches.stream import LOOK_AGAIN_S, NoCheckpoint
from celery_resilience.batches.surroundings import Surroundings
from celery_resilience.batches.tally import BatchReport, Outcome, Tally
from celery_resilience.errors import (
    CONTROL_FLOW,
    SOFT_LIMITS,
    BrokerUnavailable,
    ConfigurationError,
    MemoryLimitExceeded,
    PublishRefused,
    Snooze,
    StoreUnavailable,
    TooManyErrors,
)
from celery_resilience.failure import type_name
from celery_resilience.redaction import mask, safe_text
from celery_resilience.soft_limit import soft_limit_deferred

logger = logging.getLogger("celery_resilience.batches")

#: What says nothing of the item at which it was raised: the batch ends by it, as by an
#: open circuit.
ENDS_BATCH: tuple[type[BaseException], ...] = (
    *CONTROL_FLOW,
    *SOFT_LIMITS,
    MemoryError,
    MemoryLimitExceeded,
    ConfigurationError,
    StoreUnavailable,
    BrokerUnavailable,
)

#: Calls of helpers that may have been begun, for each thread, when the first of them is
#: waited for: a slow one does not leave the other threads idle at once.
AHEAD = 4


def _is_open_circuit(exc: BaseException) -> bool:
    """Whether a circuit is open, of ours or of pybreaker's own."""
    # It imports redis-py, which not every fleet needs.
    pybreaker: Any = sys.modules.get("pybreaker")
    # Without the name where another thread is about to import it.
    return isinstance(exc, getattr(pybreaker, "CircuitBreakerError", ()))


def _goes_on(exc: BaseException) -> bool:
    """Whether another run goes on: what has ended of the chunk is not done again."""
    return isinstance(exc, CONTROL_FLOW) or _is_open_circuit(exc)


class Batch:
    """
    Many items, worked at one by one; see `RunView.batch`.

    Leaving its `with` commits what has ended, unless something was raised.

    Args:
        options: What was asked for.
        around: The run that it is in.
    """

    def __init__(self, options: BatchOptions, around: Surroundings) -> None:
        self.name = options.name
        self._options = options
        self._around = around
        self._passes = (*ENDS_BATCH, *options.stop)
        self._scope = ItemScope(self.takes)
        if options.session is not None and options.savepoints:
            self._scope = SavepointScope(self.takes, options.session)
        self._tally = Tally()
        #: Counts that the last chunk was committed with.
        self._saved: dict[str, Any] = {}
        #: Of items that a batch that failed had counted: they are forgiven.
        self._forgiven = (0, 0)
        self._told = (0, 0, 0)
        self._source: Source | None = None
        self._total: int | None = None
        self._page: Page | None = None
        #: Items of the page that have ended, and whether another is worked at.
        self._ended = 0
        self._is_out = False
        self._went_wrong = False
        self._has_told_of_key = False
        #: What has passed through the present item's scope.
        self._passed: BaseException | None = None
        self._place: Any = None
        #: Whether a run after this one would go on elsewhere than this one began.
        self._has_come_on = False
        self._is_done = False
        self._to_keep: list[Callable[[], object]] = []
        self._helpers: Helpers | None = None

    # --- what the user calls ---------------------------------------------------------

    @property
    def report(self) -> BatchReport:
        """What became of the items so far, those of earlier runs included."""
        return self._tally.report(self.name)

    def items(self, source: Any, *, by: str | None = None) -> Iterator[Any]:
        """
        The items of *source* that no earlier run has done, in chunks.

        Args:
            source: SQLAlchemy's `select()` or `Query`, Django's QuerySet, or an iterable
                that gives the same items in the same order each time.
            by: The unique column by which a query is read; None: the batch's `key`,
                where that is a name, or else "id".

        Raises:
            ConfigurationError: The batch has `concurrency`, which is for `map`; or
                has read its items already.
            Snooze: The rest is another run's, or the store is away as it begins. Let it
                pass.
        """
        if self._options.concurrency != 1:
            raise ConfigurationError(
                f"batch {self.name!r}: concurrency={self._options.concurrency} is for "
                "batch.map(function, source), which calls the function in threads"
            )
        self._begin(source, by)
        return self._items()

    def item(self, item: Any) -> AbstractContextManager[None]:
        """
        The scope in which *item* is worked at.

        What is raised in it is noted with the item's id, as skipped if its type is one
        of `skip` and else as failed, and the batch goes on. What says nothing of the
        item passes: `Retry`, `Snooze` and their like, a soft limit, an open circuit,
        `MemoryError`, and the types of `stop`.

        Raises:
            TooManyErrors: More went wrong than the batch may have.
        """
        self._scope.item = item
        return self._scope

    def map(
        self, function: Callable[[Any], Any], source: Any, *, by: str | None = None
    ) -> Iterator[tuple[Any, Any]]:
        """
        Each item of *source* with what *function* returns for it, in their order.

        With `concurrency` the function is called in so many threads, each call in this
        one's context. What it raises is noted as in `item`, and the item left out.

        Args:
            function: Takes an item. In a thread, it must not use the batch's session.
            source, by: As for `items`.
        """
        self._begin(source, by)
        return self._mapped(function)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        end: BaseException | None = exc
        try:
            if self._helpers is not None:
                self._helpers.stop()
            if exc is None:
                if self._is_out:
                    self._account()
                self._cut()
            elif self._may_cut(exc):
                self._cut_if_it_can()
            if isinstance(exc, SOFT_LIMITS) and self._has_come_on:
                end = Snooze(0, f"a soft limit: another run goes on with {self.name}")
                raise end from exc
        except BaseException as raised:
            end = raised
            raise
        finally:
            self._scope.item = self._page = self._passed = None
            self._to_keep.clear()
            self._around.ended(self.report, end)

    # --- how far it is ---------------------------------------------------------------

    def untold(self, exc: BaseException | None) -> Mapping[str, Any]:
        """
        What the run tells of the batch at its end: items that were committed since.

        After TooManyErrors, what went wrong so far is forgiven, so that a replay of the
        task may go on.

        Args:
            exc: What the task's body raised.
        """
        committed = Tally.of_state(self._saved["tally"]) if self._saved else Tally()
        counts = (committed.ok, committed.skipped, committed.failed)
        if isinstance(exc, TooManyErrors):
            self._forgiven = (committed.went_wrong, committed.items)
        fresh = [now - before for now, before in zip(counts, self._told, strict=True)]
        if any(fresh) or isinstance(exc, TooManyErrors):
            self._told = counts
            self._save()
        names = ("ok", "skipped", "failed")
        return {"name": self.name, **dict(zip(names, fresh, strict=True))}

    def _begin(self, source: Any, by: str | None) -> None:
        if self._source is not None:
            raise ConfigurationError(
                f"batch {self.name!r} has read its items already: begin another batch"
            )
        options = self._options
        self._source = source_of(
            source, key=by or options.column, session=options.session
        )
        if isinstance(source, Sequence):
            self._total = len(source)
        state = self._around.checkpoint.load()
        if state is not None:
            self._saved = state
            self._place = state["place"]
            self._tally = Tally.of_state(state["tally"])
            self._forgiven = tuple(state["forgiven"])
            self._told = tuple(state["told"])

    def _pages(self) -> Iterator[Page]:
        assert self._source is not None
        while not self._is_done:
            page = self._source.page(self._place, self._options.chunk)
            if not page.rows:
                self._is_done = True
                return
            self._page, self._ended = page, 0
            yield page
            self._commit(page.place)
            self._is_done = page.is_last
            self._page = None

    def _items(self) -> Iterator[Any]:
        is_stopping = self._around.is_stopping
        for page in self._pages():
            for item in page.rows:
                self._is_out = True
                yield item
                self._account()
                if is_stopping():
                    self._hand_over()

    def _mapped(self, function: Callable[[Any], Any]) -> Iterator[tuple[Any, Any]]:
        is_stopping = self._around.is_stopping
        for page in self._pages():
            for item, call in self._calls(function, page.rows):
                self._is_out = True
                try:
                    result = call()
                except BaseException as exc:
                    if not self.takes(item, exc):
                        raise
                else:
                    yield item, result
                    result = None
                self._account()
                if is_stopping():
                    self._hand_over()

    def _calls(
        self, function: Callable[[Any], Any], items: Sequence[Any]
    ) -> Iterator[tuple[Any, Callable[[], Any]]]:
        """Each item with what gives its result, which helpers may have begun with."""
        count = self._options.concurrency
        if count == 1:
            for item in items:
                yield item, partial(function, item)
            return
        if self._helpers is None:
            name, at_end = f"batch-{self.name}", self._around.at_thread_end
            self._helpers = Helpers(count, name, at_end)
        begun: deque[Future[Any]] = deque()
        waiting = iter(items)
        for item in items:
            for next_item in islice(waiting, AHEAD * count - len(begun)):
                call = self._around.in_thread(partial(function, next_item))
                begun.append(self._helpers.submit(call))
            yield item, begun.popleft().result

    def _account(self) -> None:
        """The item that was out has ended."""
        self._is_out = False
        self._ended += 1
        if self._went_wrong:
            self._went_wrong = False
        else:
            self._tally.ok += 1

    def _hand_over(self) -> None:
        """
        End the run after the present item.

        Raises:
            Snooze: Unless that was the last item of all.
        """
        assert self._page is not None
        if self._page.is_last and self._ended == len(self._page.rows):
            return
        self._cut()
        raise Snooze(0, f"its worker stops: another run goes on with {self.name}")

    def _cut(self) -> None:
        """Let the chunk end after the items that have ended."""
        page, ended = self._page, self._ended
        if page is not None and ended:
            self._page = None
            self._commit(page.places[ended - 1])

    def _may_cut(self, exc: BaseException) -> bool:
        """Whether nothing half done would be committed with the items that have ended."""
        options = self._options
        if options.session is None:
            return isinstance(exc, SOFT_LIMITS) or _goes_on(exc)
        # Raised elsewhere, it has left what the item had done in the session.
        is_undone = options.savepoints and exc is self._passed
        return is_undone and _goes_on(exc)

    def _cut_if_it_can(self) -> None:
        try:
            self._cut()
        except Exception:
            # The batch ends by something else; all of the chunk is done again.
            logger.warning(
                "batch %s: its last chunk was not committed", self.name, exc_info=True
            )

    def _commit(self, place: Any) -> None:
        """
        Commit what has ended, and remember how far it is.

        Failed items are kept first: a commit that fails then keeps one too many, which
        its key tells, and never one too few.
        """
        assert self._source is not None
        self._check_limits(None)
        with soft_limit_deferred():
            try:
                for store in self._to_keep:
                    store()
            except (BrokerUnavailable, PublishRefused) as exc:
                raise Snooze(LOOK_AGAIN_S, f"failed items of a batch: {exc}") from exc
            self._source.commit()
            self._place = place
            self._saved = {"place": place, "tally": self._tally.state()}
            self._save()
            self._to_keep.clear()
            self._has_come_on = not isinstance(self._around.checkpoint, NoCheckpoint)
            self._around.progressed(self.report, self._total)

    def _save(self) -> None:
        if not self._saved:
            self._saved = {"place": None, "tally": Tally().state()}
        self._saved.update(forgiven=self._forgiven, told=self._told)
        self._around.checkpoint.save(self._saved)

    # --- what went wrong -------------------------------------------------------------

    def takes(self, item: Any, exc: BaseException) -> bool:
        """
        Note that *item* did not go well; False: the exception says nothing of it.

        Raises:
            TooManyErrors: More went wrong than the batch may have.
        """
        if (
            not isinstance(exc, Exception)
            or isinstance(exc, self._passes)
            or _is_open_circuit(exc)
        ):
            self._passed = exc
            return False
        if self._went_wrong:
            return True  # in an earlier scope of the same item
        outcome: Outcome = "failed"
        if isinstance(exc, self._options.skip):
            outcome = "skipped"
        elif self._around.keep is not None:
            self._to_keep.append(self._around.keep(self._key_of(item), exc))
        id = message = ""
        if self._tally.has_room:
            secrets = self._around.secrets(item)
            id = mask(safe_text(self._id_of(item)), secrets)
            message = mask(safe_text(exc), secrets)
        self._went_wrong = True
        self._tally.add(outcome, id, type_name(type(exc)), message)
        self._check_limits(exc)
        return True

    def _check_limits(self, exc: BaseException | None) -> None:
        tally = self._tally
        went_wrong = tally.went_wrong - self._forgiven[0]
        verdict = self._options.limits.verdict(
            went_wrong=went_wrong, items=tally.items - self._forgiven[1]
        )
        if verdict is not None:
            raise TooManyErrors.of(verdict, self.report) from exc

    def _key_of(self, item: Any) -> Any:
        key = self._options.key
        if callable(key):
            return key(item)
        name = "id" if key is None else key
        try:
            return item[name] if isinstance(item, Mapping) else getattr(item, name)
        except (KeyError, AttributeError) as exc:
            raise ConfigurationError(
                f"batch {self.name!r}: key={name!r} names no attribute or field of its "
                f"items, which are of type {type_name(type(item))}"
            ) from exc

    def _id_of(self, item: Any) -> str:
        """What names an item in a report: its key, or its number."""
        if self._options.key is None and isinstance(item, int):
            return str(item)
        try:
            return str(self._key_of(item))
        except Exception as exc:
            if self._options.key is not None and not self._has_told_of_key:
                # The key may be wrong, or the item, as it is bad; its text is not told.
                self._has_told_of_key = True
                logger.warning(
                    "batch %r: key= names no item that goes wrong, as it raises %s: "
                    "numbers are told instead (told once)",
                    self.name,
                    type_name(type(exc.__cause__ or exc)),
                )
            return f"#{self._tally.items + 1}"
