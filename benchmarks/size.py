"""Bytes that a failed task takes in each kind of store, its indexes included.

`python -m benchmarks.size`; the figures of docs/howto/size-the-store.md are its.
"""

from __future__ import annotations

import base64
import gzip
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine, text

from benchmarks.fleet import make_app
from benchmarks.store import failure
from celery_resilience.failed.envelope import dumps
from celery_resilience.install import installation_of
from tests import services

RECORDS = 20_000
PAGE = 1_000

#: KiB of random arguments, which nothing can compress, added to a message.
ARGUMENTS_KIB = (0, 8)

#: What a server is asked for its size, in bytes.
QUESTIONS = {
    "postgresql": "SELECT pg_total_relation_size('resilience_failed')",
    "mariadb": (
        "SELECT data_length + index_length FROM information_schema.tables "
        "WHERE table_name = 'resilience_failed'"
    ),
}


def measure() -> Iterator[tuple[str, int, float, float]]:
    """Store, KiB of arguments, bytes in the store and in an envelope, per record."""
    for kib in ARGUMENTS_KIB:
        envelopes = [dumps(_failure(number, kib)) for number in range(200)]
        envelope = sum(map(len, envelopes)) / len(envelopes)
        packed = len(gzip.compress(b"\n".join(envelopes))) / len(envelopes)
        yield "archive", kib, packed, envelope
        with tempfile.TemporaryDirectory(prefix="resilience-size-") as folder:
            path = Path(folder) / "failed.sqlite3"
            _fill(f"sqlite:///{path}", kib)
            yield "sqlite", kib, path.stat().st_size / RECORDS, envelope
        for name in ("postgresql", "mariadb", "redis"):
            if name in services.SERVICES:
                with services.running(name) as server:
                    size = _size_of(name, server.url)
                    before = size()
                    _fill(server.url, kib)
                    yield name, kib, (size() - before) / RECORDS, envelope


def _failure(number: int, kib: int) -> dict[str, Any]:
    document = failure(number)
    if kib:
        noise = base64.b64encode(random.Random(number).randbytes(kib * 768))
        document["original"]["body"] = base64.b64encode(noise).decode()
    return document


def _fill(url: str, kib: int) -> None:
    app = make_app("memory://", "resilient", url)
    store = installation_of(app).failed_store()
    for start in range(0, RECORDS, PAGE):
        store.keep([_failure(n, kib) for n in range(start, start + PAGE)])
    close = getattr(installation_of(app)._store("backend"), "close", None)
    if close is not None:
        close()


def _size_of(name: str, url: str) -> Callable[[], float]:
    if name == "redis":
        from redis import Redis

        client: Any = Redis.from_url(url)
        return lambda: float(client.info("memory")["used_memory"])

    def ask() -> float:
        engine = create_engine(url)
        try:
            with engine.connect() as connection:
                if name == "mariadb":
                    connection.execute(text("ANALYZE TABLE resilience_failed"))
                return float(connection.execute(text(QUESTIONS[name])).scalar() or 0)
        except Exception:
            return 0.0  # there is no table yet
        finally:
            engine.dispose()

    return ask


if __name__ == "__main__":
    for name, kib, size, envelope in measure():
        print(
            f"{name:<12}{kib:>3} KiB of arguments: {size:>7,.0f} bytes a record, "
            f"envelope {envelope:,.0f}",
            flush=True,
        )
