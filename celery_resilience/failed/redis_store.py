"""Failed tasks in Redis: a hash for each, and sorted sets of their ids."""

from __future__ import annotations

import builtins
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

from celery_resilience.failed.filters import Filter, is_match
from celery_resilience.failed.merge import Record, merged
from celery_resilience.failed.pages import pages
from celery_resilience.failed.record import FailedTask, State, Summary
from celery_resilience.failed.rows import (
    CLAIM,
    GHOST,
    GHOST_S,
    KEPT,
    RECORD,
    SHORTEST_START,
    SUMMARY,
    TASK,
    TOP,
    claim_of,
    kept_of,
    record_of,
    row_of,
    row_of_kept,
    summary_of,
    task_of,
)
from celery_resilience.failed.store import Claim, Kept, Usage
from celery_resilience.redaction import storable
from celery_resilience.stores.redis import RedisServer

ROOM = "failed"
VERSION = 1

#: Failed tasks, and bytes of them, that one script writes: Redis does nothing else
#: meanwhile.
PAGE = 100
PAGE_BYTES = 4 * 2**20

#: Hashes read in one round trip; of whole documents, each of which may be large.
READ = 500
DOCUMENTS = 50

#: What the fields of a hash are; all others are texts.
TIMES = frozenset({"first_failed_at", "last_failed_at", "claimed_at", "settled_at"})
COUNTS = frozenset({"number", "replays", "size"})
FLAGS = frozenset({"in_chord", "wants_new_id", "is_forced"})
BYTES = frozenset({"document", "revision"})

#: Fields that a hash need not have, where they are not nothing.
DEFAULTS: Mapping[str, Any] = {"replays": 0, "wants_new_id": False, "is_forced": False}


class RedisFailedTaskStore:
    """
    `FailedTaskStore` in Redis 6.2 or later.

    Args:
        server: Where the hashes are.
    """

    def __init__(self, server: RedisServer) -> None:
        self._server = server
        self._prefix = server.prefix(ROOM)

    # --- taking documents in --------------------------------------------------------

    def keep(self, documents: Sequence[Mapping[str, Any]]) -> None:
        """Take documents from failed queues in; the same one again changes nothing."""
        self._ready()
        for page in pages(documents, PAGE):
            by_id: dict[str, list[Mapping[str, Any]]] = {}
            for document in page:
                by_id.setdefault(document["id"], []).append(document)
            while by_id:
                # What somebody else wrote meanwhile is merged with in the next round.
                others = self._write(self._merged(by_id))
                by_id = {id: by_id[id] for id in others}

    def check(self) -> None:
        """Raise what `keep` would, if it is known now that it would."""
        self._ready()
        self._server.write(ROOM, VERSION)

    def _merged(
        self, by_id: Mapping[str, Sequence[Mapping[str, Any]]]
    ) -> Iterator[tuple[bytes, dict[str, Any]]]:
        """The revision and the new row of each record that documents change."""
        rows = self._rows(list(by_id), (*RECORD, "revision"))
        for id, row in rows:
            before: Record | None = None if row is None else record_of(row)
            after = before
            for document in by_id[id]:
                after = merged(after, document)
            if after is not None and after != before:
                yield b"" if row is None else row.revision, row_of(after)

    def _write(self, rows: Iterable[tuple[bytes, Mapping[str, Any]]]) -> set[str]:
        """Write rows whose revision is still that; returns the ids of the others."""
        others: set[str] = set()
        words: list[Any] = []
        count = size = 0
        for revision, row in rows:
            set_words, unset = _written(row)
            words += [row["id"], revision, *_counted(set_words), *_counted(unset)]
            count, size = count + 1, size + row["size"]
            if count == PAGE or size > PAGE_BYTES:
                others |= self._run_for_ids("keep", GHOST_S, *words)
                words, count, size = [], 0, 0
        if words:
            others |= self._run_for_ids("keep", GHOST_S, *words)
        return others

    # --- looking ----------------------------------------------------------------------

    def list(
        self, wanted: Filter, *, limit: int | None = None, oldest_first: bool = False
    ) -> Iterator[Summary]:
        """The failed tasks that match, last failed first, in flat memory."""
        self._ready()
        names = (*SUMMARY, "arguments") if wanted.args else SUMMARY
        left = limit
        # A first page of what is asked for: most often that is enough.
        size = READ if limit is None else min(READ, limit)
        for ids in self._ids(wanted, size=size, oldest_first=oldest_first):
            for _, row in self._rows(ids, names):
                if left == 0:
                    return
                if row is None or row.reason == GHOST:
                    continue
                summary = summary_of(row)
                if is_match(wanted, summary, row.arguments if wanted.args else ""):
                    left = None if left is None else left - 1
                    yield summary

    def _ids(
        self, wanted: Filter, *, size: int, oldest_first: bool
    ) -> Iterator[Sequence[str]]:
        """Pages of ids, in their order, of perhaps more than is wanted."""
        if wanted.ids is not None:
            yield from self._given_ids(wanted.ids, oldest_first=oldest_first)
            return
        key, low, high = self._index(wanted)
        seen: set[bytes] = set()  # those of the time at which a page ended
        while size:
            # Scores are negative times.
            start, end = (high, low) if oldest_first else (low, high)
            with self._server.client() as client:
                found = client.zrange(
                    *(key, start, end),
                    byscore=True,
                    desc=oldest_first,
                    withscores=True,
                    offset=0,
                    num=size + len(seen),
                )
            new = [id for id, _ in found if id not in seen]
            if not new:
                return
            yield [id.decode() for id in new]
            last = found[-1][1]
            seen = {id for id, score in found if score == last}
            if oldest_first:
                high = last
            else:
                low = last
            size = READ

    def _index(self, wanted: Filter) -> tuple[str, float, float]:
        """The smallest index that has all that is wanted, and its range of scores."""
        name = "at" if wanted.state is None else f"state:{wanted.state}"
        low = float("-inf") if wanted.until is None else -wanted.until
        high = float("inf") if wanted.since is None else -wanted.since
        return self._prefix + name, low, high

    def _given_ids(
        self, ids: Sequence[str], *, oldest_first: bool
    ) -> Iterator[Sequence[str]]:
        times = {
            id: row.last_failed_at
            for page in pages(ids, READ)
            for id, row in self._rows(page, ("state", "last_failed_at"))
            if row is not None
        }
        sign = 1 if oldest_first else -1
        yield from pages(sorted(times, key=lambda id: (sign * times[id], id)), READ)

    def count(self, wanted: Filter) -> int:
        """How many match."""
        if wanted != Filter(state=wanted.state, since=wanted.since, until=wanted.until):
            return sum(1 for _ in self.list(wanted))
        self._ready()
        with self._server.client() as client:
            return int(client.zcount(*self._index(wanted)))

    def get(self, id: str) -> FailedTask | None:
        """One failed task with its message."""
        return next(self.get_many([id]), None)

    def get_many(self, ids: Iterable[str]) -> Iterator[FailedTask]:
        """Those of *ids* that there are, in their order, with their messages."""
        self._ready()
        for page in pages(ids, DOCUMENTS):
            for _, row in self._rows(page, TASK):
                if row is not None and row.reason != GHOST:
                    yield task_of(row)

    def known(self, ids: Sequence[str]) -> set[str]:
        """Those of *ids*, whole ones, that there are."""
        self._ready()
        return {
            id
            for page in pages(ids, READ)
            for id, row in self._rows(page, ("state", "reason"))
            if row is not None and row.reason != GHOST
        }

    def resolve(self, start: str, *, limit: int = 2) -> Sequence[str]:
        """The ids that begin with *start*, or else those whose task id does."""
        self._ready()
        start = storable(start)
        found: builtins.list[bytes] = []
        if start and set(start.lower()) <= set("0123456789abcdef"):
            low = start.lower().encode()
            found += self._members("ids", low, low + b"g", limit)
        task_id = _bytes(start)
        found += self._members("task_ids", task_id + b"\0", task_id + b"\1", limit)
        if not found and len(start) >= SHORTEST_START:
            found = self._members("task_ids", task_id, task_id + b"\xff", limit)
        ids = (member.rpartition(b"\0")[2].decode() for member in found)
        return [*dict.fromkeys(ids)][:limit]

    def _members(self, name: str, low: bytes, high: bytes, limit: int) -> Any:
        with self._server.client() as client:
            return client.zrange(
                *(self._prefix + name, b"[" + low, b"(" + high),
                bylex=True,
                offset=0,
                num=limit,
            )

    def stats(self) -> Mapping[str, Any]:
        """Counts by state, and of the unresolved by reason, task and age."""
        self._ready()
        counted = ("reason", "task", "exception", "failed_queue")
        now = float(self._server.run(ROOM, "now"))
        with (
            self._server.client() as client,
            client.pipeline(transaction=False) as pipe,
        ):
            for state in State:
                pipe.zcard(f"{self._prefix}state:{state}")
            for name in counted:
                pipe.hgetall(f"{self._prefix}unresolved:{name}")
            pipe.zrange(self._prefix + "first", 0, 0, withscores=True)
            *found, first = pipe.execute()
        by_state, by_word = found[: len(State)], found[len(State) :]
        return {
            **{str(state): count for state, count in zip(State, by_state, strict=True)},
            "oldest_s": max(0.0, now - first[0][1]) if first else None,
            **{
                f"by_{name}": _top(counts)
                for name, counts in zip(counted, by_word, strict=True)
            },
        }

    def usage(self) -> Mapping[str, Usage]:
        """What the failed tasks of each failed queue take."""
        self._ready()
        with (
            self._server.client() as client,
            client.pipeline(transaction=False) as pipe,
        ):
            pipe.hgetall(self._prefix + "count")
            pipe.hgetall(self._prefix + "size")
            counts, sizes = pipe.execute()
        return {
            queue.decode(): Usage(int(count), int(sizes.get(queue, 0)))
            for queue, count in counts.items()
        }

    # --- moving elsewhere -------------------------------------------------------------

    def kept(self, ids: Iterable[str]) -> Iterator[Kept]:
        """All that is held of those of *ids* that there are, in their order."""
        self._ready()
        for page in pages(ids, DOCUMENTS):
            for _, row in self._rows(page, (*KEPT, "reason", "revision")):
                if row is not None and row.reason != GHOST:
                    yield kept_of(row)

    def insert(self, tasks: Sequence[Kept]) -> set[str]:
        """Take in those of *tasks* that are not there; returns their ids."""
        self._ready()
        ids = {task.record.id for task in tasks}
        return ids - self._write((b"", row_of_kept(task)) for task in tasks)

    def remove(self, tasks: Sequence[Kept]) -> set[str]:
        """Forget those of *tasks* that are still as they were read; returns their ids."""
        self._ready()
        removed: set[str] = set()
        for page in pages(tasks, DOCUMENTS):
            given = {task.record.id: task for task in page}
            words: list[Any] = []
            for id, row in self._rows(list(given), (*KEPT, "revision")):
                if row is not None and kept_of(row) == given[id]:
                    words += [id, row.revision]
            if words:
                removed |= self._run_for_ids("remove", *words)
        return removed

    # --- replaying ----------------------------------------------------------------------

    def claim(
        self,
        ids: Sequence[str],
        *,
        to_queue: str | None = None,
        wants_new_id: bool = False,
        is_forced: bool = False,
    ) -> Sequence[Claim]:
        """Take those of *ids* that are unresolved for a replay."""
        self._ready()
        tokens = {id: uuid4().hex for id in ids}
        taken: set[str] = set()
        for page in pages(tokens, PAGE):
            words = [word for id in page for word in (id, tokens[id])]
            taken |= self._run_for_ids(
                "claim",
                _bytes(to_queue or ""),
                *(int(wants_new_id), int(is_forced)),
                *words,
            )
        claims = self._claims([id for id in tokens if id in taken])
        # Reopened in between, a record is somebody else's.
        return [claim for claim in claims if claim.token == tokens[claim.id]]

    def _claims(self, ids: Sequence[str]) -> Sequence[Claim]:
        return [
            claim_of(row)
            for page in pages(ids, DOCUMENTS)
            for _, row in self._rows(page, CLAIM)
            if row is not None and row.token is not None
        ]

    def mark_sent(self, claims: Sequence[tuple[Claim, str | None]]) -> None:
        """The broker has the messages of these claims."""
        for page in pages(claims, PAGE):
            words = [
                word
                for claim, new_id in page
                for word in (claim.id, claim.number, _bytes(new_id or ""))
            ]
            self._server.run(ROOM, "mark_sent", *words)

    def release(self, claim: Claim, note: str) -> None:
        """Nothing was sent for *claim*: its record is unresolved again."""
        self._server.run(ROOM, "release", claim.id, claim.token, _bytes(note))

    def finish(self, ids: Sequence[str], note: str) -> None:
        """Resolve replays that no worker will report."""
        self._set_state(
            ids, [State.REPLAYING], State.RESOLVED, note=note, unset=["phase"]
        )

    def take_stale_claims(self, *, older_than_s: float, limit: int) -> Sequence[Claim]:
        """Claims whose owner died before it sent them, with their old token."""
        self._ready()
        ids = self._server.run(ROOM, "take_stale", older_than_s, limit)
        return self._claims([id.decode() for id in ids])

    def start(self, id: str, *, token: str, copy: str) -> bool:
        """Ask for leave to run a replayed message."""
        self._ready()
        return bool(self._server.run(ROOM, "start", id, token, copy))

    def discard(self, ids: Sequence[str]) -> int:
        """Mark unresolved ones as never to be replayed; returns how many were."""
        return self._set_state(ids, [State.UNRESOLVED], State.DISCARDED)

    def reopen(self, ids: Sequence[str]) -> int:
        """Make discarded ones, and replays that never came back, unresolved again."""
        return self._set_state(
            ids,
            [State.DISCARDED, State.REPLAYING],
            State.UNRESOLVED,
            unset=["phase", "token", "copy", "note"],
        )

    def _set_state(
        self,
        ids: Sequence[str],
        states: Sequence[State],
        state: State,
        *,
        note: str | None = None,
        unset: Sequence[str] = (),
    ) -> int:
        self._ready()
        words = ["state", str(state)]
        if note is not None:
            words += ["note", note]
        return sum(
            self._server.run(
                *(ROOM, "set_state", f",{','.join(states)},"),
                *_counted([_bytes(word) for word in words]),
                *_counted(unset),
                *page,
            )
            for page in pages(ids, PAGE)
        )

    # --- hashes -------------------------------------------------------------------------

    def _ready(self) -> None:
        self._server.ready(ROOM, VERSION)

    def _rows(
        self, ids: Sequence[str], names: Sequence[str]
    ) -> Iterator[tuple[str, Any]]:
        """Each id with its row, or None where there is none."""
        found = self._server.read(
            [f"{self._prefix}task:{id}" for id in ids], ["state", *names]
        )
        for id, (state, *values) in zip(ids, found, strict=True):
            if state is None:
                yield id, None
            else:
                fields = zip(names, values, strict=True)
                row = {name: _read(name, value) for name, value in fields}
                yield id, SimpleNamespace(**{**row, "id": id})

    def _run_for_ids(self, script: str, *words: Any) -> set[str]:
        return {id.decode() for id in self._server.run(ROOM, script, *words)}


def _read(name: str, value: bytes | None) -> Any:
    """What a field of a hash means."""
    if value is None:
        return DEFAULTS.get(name)
    if name in BYTES:
        return value
    if name in TIMES:
        return float(value)
    if name in COUNTS:
        return int(value)
    if name in FLAGS:
        return value == b"1"
    return value.decode()


def _written(row: Mapping[str, Any]) -> tuple[list[Any], list[str]]:
    """A row as words to set, and fields to unset."""
    words: list[Any] = []
    for name, value in row.items():
        if value is not None and name != "id":
            words += [name, _bytes(value)]
    return words, [name for name, value in row.items() if value is None]


def _bytes(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, bool):
        return b"1" if value else b"0"
    text = repr(value) if isinstance(value, float) else str(value)
    return text.encode(errors="replace")


def _counted(words: Sequence[Any]) -> list[Any]:
    """Words after their number."""
    return [len(words), *words]


def _top(counts: Mapping[bytes, bytes]) -> dict[str, int]:
    """The names that are counted most, as SQL orders them."""
    named = [(-int(count), name.decode()) for name, count in counts.items()]
    return {name: -count for count, name in sorted(named)[:TOP]}
