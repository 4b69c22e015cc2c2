"""Failed tasks on their way into a store and out of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from celery_resilience.errors import ConfigurationError
from celery_resilience.failed.archive import (
    RedactedLine,
    dump_line,
    load_line,
    put_archive,
)
from celery_resilience.failed.pages import pages
from celery_resilience.failed.record import State
from celery_resilience.failed.store import FailedTaskStore, Kept

#: Failed tasks that are imported or forgotten together.
PAGE = 100


@dataclass(slots=True)
class ImportReport:
    """
    What an import did.

    Attributes:
        imported: Failed tasks that are new.
        known: Those that were there, and stayed as they were.
    """

    imported: int = 0
    known: int = 0


def import_lines(
    store: FailedTaskStore, lines: Iterable[bytes], *, dry_run: bool
) -> ImportReport:
    """
    Take in what a raw export or an archive holds; what is there stays as it is.

    Raises:
        ConfigurationError: A line is not of a raw export; what came before it was
            imported.
    """
    report = ImportReport()
    for page in pages(_loaded(lines), PAGE):
        ids = {kept.record.id for kept in page}
        new = ids - store.known([*ids]) if dry_run else store.insert(page)
        report.imported += len(new)
        report.known += len(page) - len(new)
    return report


def prune(store: FailedTaskStore, ids: Iterable[str], *, archive: Path | None) -> int:
    """
    Forget failed tasks that no replay is under way for; returns how many.

    Args:
        archive: A new file, compressed, that takes them first.

    Raises:
        ConfigurationError: The file is there already.
        OSError: It could not be written; nothing was forgotten.
    """
    if archive is None:
        return sum(
            len(store.remove(page)) for page in pages(_resting(store, ids), PAGE)
        )
    if archive.exists():
        raise ConfigurationError(f"{archive} is there already: name a new file")
    ids = [*ids]
    written: dict[str, bytes] = {}

    def noted() -> Iterator[Kept]:
        for kept in _resting(store, ids):
            written[kept.record.id] = _digest(kept)
            yield kept

    put_archive(archive, noted())
    # What was changed since then is not in the archive as it is now.
    return sum(
        len(store.remove([k for k in page if written.get(k.record.id) == _digest(k)]))
        for page in pages(_resting(store, ids), PAGE)
    )


def _resting(store: FailedTaskStore, ids: Iterable[str]) -> Iterator[Kept]:
    return (
        kept for kept in store.kept(ids) if kept.record.state is not State.REPLAYING
    )


def _loaded(lines: Iterable[bytes]) -> Iterator[Kept]:
    for number, line in enumerate(lines, 1):
        try:
            yield load_line(line)
        except RedactedLine:
            raise ConfigurationError(
                f"line {number} is redacted, and its message is not in it: only what "
                "`export --raw` wrote can be imported"
            ) from None
        except ValueError as exc:
            raise ConfigurationError(f"line {number}: {exc}") from None


def _digest(kept: Kept) -> bytes:
    return hashlib.blake2b(dump_line(kept), digest_size=16).digest()
