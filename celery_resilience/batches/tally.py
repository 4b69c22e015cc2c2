"""What became of a batch's items. Policy only: no Celery, no I/O, no clock."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

from celery_resilience.redaction import cut, safe_text

#: What became of an item that did not go well.
Outcome = Literal["skipped", "failed"]

#: Items of which a report tells, and the bytes that they may have together: with the
#: place of the batch they are one value in the store.
MAX_SAMPLES = 100
MAX_SAMPLES_BYTES = 40_000
MAX_ID_CHARS = 64
MAX_MESSAGE_CHARS = 200

#: Types of exceptions that are counted apart; those that come later are `OTHER`.
MAX_TYPES = 50
MAX_TYPE_CHARS = 100
OTHER = "other"


class Sample(TypedDict):
    """
    One item that did not go well.

    Attributes:
        id: What names the item.
        outcome: "skipped" or "failed".
        exception: Qualified name of the exception's type.
        message: Its text, redacted and cut.
    """

    id: str
    outcome: Outcome
    exception: str
    message: str


class BatchReport(TypedDict):
    """
    What became of the items of a batch, in all of its runs: plain data for JSON.

    Attributes:
        name: Of the batch.
        ok, skipped, failed: How many items; each is in one of the three.
        errors: How many by the type of their exception.
        samples: The first of those skipped and failed, at most 100.
    """

    name: str
    ok: int
    skipped: int
    failed: int
    errors: dict[str, int]
    samples: list[Sample]


@dataclass(slots=True)
class Tally:
    """The counts of a batch; those of an item that is still worked at are not in it."""

    ok: int = 0
    skipped: int = 0
    failed: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)

    def add(self, outcome: Outcome, id: str, exception: str, message: str) -> None:
        """
        Count an item that did not go well.

        Args:
            outcome: What became of it.
            id, message: Told of the first ones; any text where there is no room.
            exception: Qualified name of its type.
        """
        if outcome == "skipped":
            self.skipped += 1
        else:
            self.failed += 1
        kind = exception[:MAX_TYPE_CHARS]
        if kind not in self.errors and len(self.errors) >= MAX_TYPES:
            kind = OTHER
        self.errors[kind] = self.errors.get(kind, 0) + 1
        if self.has_room:
            sample: Sample = {
                "id": cut(safe_text(id), MAX_ID_CHARS),
                "outcome": outcome,
                "exception": kind,
                "message": cut(safe_text(message), MAX_MESSAGE_CHARS),
            }
            if len(json.dumps([*self.samples, sample])) <= MAX_SAMPLES_BYTES:
                self.samples.append(sample)

    @property
    def has_room(self) -> bool:
        """Whether id and text of another bad item may be told."""
        return len(self.samples) < MAX_SAMPLES

    @property
    def went_wrong(self) -> int:
        """Items that were skipped or failed."""
        return self.skipped + self.failed

    @property
    def items(self) -> int:
        """Items that have ended."""
        return self.ok + self.skipped + self.failed

    def report(self, name: str) -> BatchReport:
        """A copy for the user."""
        return {
            "name": name,
            "ok": self.ok,
            "skipped": self.skipped,
            "failed": self.failed,
            "errors": dict(self.errors),
            "samples": [sample.copy() for sample in self.samples],
        }

    def state(self) -> dict[str, Any]:
        """What is saved with the place of the batch."""
        return {
            "counts": [self.ok, self.skipped, self.failed],
            "errors": dict(self.errors),
            "samples": list(self.samples),
        }

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> Tally:
        """The counts that were saved."""
        ok, skipped, failed = state["counts"]
        return cls(ok, skipped, failed, dict(state["errors"]), list(state["samples"]))


@dataclass(frozen=True, slots=True)
class ErrorLimits:
    """
    How much may go wrong before a batch is not worth going on with.

    Attributes:
        max_errors: Items that may be skipped or fail; None: any number.
        max_error_rate: Their share of all items; None: any.
        min_items: The share is looked at from so many items on.
    """

    max_errors: int | None = None
    max_error_rate: float | None = None
    min_items: int = 1

    def verdict(self, *, went_wrong: int, items: int) -> str | None:
        """Why the batch must stop; None: it may go on."""
        if self.max_errors is not None and went_wrong > self.max_errors:
            return f"more than max_errors={self.max_errors}"
        rate = self.max_error_rate
        if rate is not None and items >= self.min_items and went_wrong > rate * items:
            return f"more than max_error_rate={rate:g}"
        return None
