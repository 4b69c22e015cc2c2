"""
What a key costs: against plain Celery, beside the peers, and for each store.

Peers are installed from the package index, each into an environment of its own, with
the Celery and the redis-py of this one. One that cannot be installed, or does not run
with them, is told by name.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

from redis import Redis

from benchmarks.figures import Figure
from benchmarks.sides import MARKS, WARM_UP, make_app
from benchmarks.store import running_store
from celery_resilience.holder import holder_name
from celery_resilience.idempotency.key import store_key
from celery_resilience.idempotency.record import Claim, KeyState, Verdict
from celery_resilience.idempotency.results import pack
from celery_resilience.install import installation_of
from tests import services
from tests.tcp_proxy import proxy_to, url_through

ROOT = Path(__file__).parent.parent

#: The releases that are compared with, by the kind of their side.
PEERS = {
    "once": "celery-once==3.0.1",
    "singleton": "celery-singleton==0.3.1",
    "heimdall": "celery-heimdall==1.0.1",
}

#: What each environment has in the release of this one. kombu 5.7 imports packaging for
#: Redis (``transport/redis.py:119``), and does not ask for it.
SHARED = ("celery", "kombu", "redis", "packaging")

#: What a side is called, with its bounds: of a run, and of sending.
OURS = {
    "no_key": ("no key", None, None),
    "key": ("a key", 1.25, 1.05),
    "reserved": ("a key and unique_enqueue", None, 1.30),
}

#: Calls in a block, and how often each side has a block, each after one of plain.
BLOCK = 100
ROUNDS = 40

COUNTED = 200
PAIRS_OF_A_STORE = 2_000
STORES = ("redis", "postgresql", "mariadb", "sqlite")

TIMEOUT_S = 90.0


class NotRun(Exception):
    """A side cannot be measured."""


class Seconds(NamedTuple):
    """
    Time for one call.

    Attributes:
        passed: As a clock has it.
        busy: Of the processor, in the one process of this side.
    """

    passed: float
    busy: float


class Side:
    """
    One app: a process that sends, and a worker with the solo pool.

    Args:
        kind: As `benchmarks.sides` has it.
        python: Of its environment.
        server: The Redis of all sides.
        folder: For its logs.
        store_port: Of what the store is reached by, where that is no direct way.
    """

    def __init__(
        self,
        kind: str,
        python: Path | str,
        server: services.Service,
        folder: Path,
        store_port: int | None = None,
    ) -> None:
        self.kind = kind
        self._client = Redis(port=server.port)
        self._log = folder / f"{kind}.log"
        environment = {
            **os.environ,
            "BENCH_KIND": kind,
            "BENCH_BROKER_URL": server.url,
            "BENCH_STORE_URL": f"redis://127.0.0.1:{store_port or server.port}/1",
            "C_FORCE_ROOT": "1",
        }
        with self._log.open("ab") as log:
            spawn: dict[str, Any] = {
                "cwd": ROOT,
                "env": environment,
                "stderr": log,
                "start_new_session": True,
            }
            self._sender = subprocess.Popen(
                [str(python), "-m", "benchmarks.sides"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                **spawn,
            )
            self._worker = subprocess.Popen(
                [
                    *(str(python), "-m", "celery", "-A", "benchmarks.sides", "worker"),
                    *("--pool", "solo", "--queues", f"{kind}.run"),
                    *("--hostname", f"{kind}@bench", "--loglevel", "WARNING"),
                    *("--without-gossip", "--without-mingle", "--without-heartbeat"),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                **spawn,
            )

    def block(self, count: int) -> tuple[Seconds, Seconds]:
        """
        What sending a call takes, and running one, of *count* after `WARM_UP` others.

        Raises:
            NotRun: One of its processes has ended, or nothing was run.
        """
        assert self._sender.stdin is not None
        assert self._sender.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._sender.stdin.write(f"{count}\n")
            self._sender.stdin.flush()
        answer = self._sender.stdout.readline()
        if not answer:
            raise NotRun(self._last_words())
        # All at once, to a worker that waits for them.
        self._client.rename(self.kind, f"{self.kind}.run")
        first, last = self._mark(), self._mark()
        passed, busy = map(float, answer.split())
        return Seconds(passed, busy), Seconds(
            (last.passed - first.passed) / (count - 1),
            (last.busy - first.busy) / (count - 1),
        )

    def wait_for_last(self) -> None:
        """Until the last message is acknowledged."""
        services.wait_for(
            lambda: self._client.hlen("unacked") == 0, TIMEOUT_S, "acknowledgement"
        )

    def stop(self) -> None:
        """End its processes."""
        for process in (self._sender, self._worker):
            process.terminate()
            process.wait(60)

    def _mark(self) -> Seconds:
        end = time.monotonic() + TIMEOUT_S
        while time.monotonic() < end and self._worker.poll() is None:
            found: Any = self._client.blpop([MARKS], timeout=1)
            if found is not None:
                return Seconds(*map(float, found[1].split()))
        raise NotRun(self._last_words())

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"nothing was run within {TIMEOUT_S:.0f} s"


def measure() -> Iterator[Figure]:
    """Runs and sends beside the peers, and the round trips of a run."""
    with (
        services.running("redis") as server,
        tempfile.TemporaryDirectory(prefix="resilience-bench-") as folder,
    ):
        _flush_as_usual(server.url)
        yield from _sides(server, Path(folder))
        yield _round_trips_of_a_run(server, Path(folder))


def _flush_as_usual(redis_url: str) -> None:
    """As Redis is used; the tests' own flushes each write, for it is killed."""
    Redis.from_url(redis_url).config_set("appendfsync", "everysec")


def measure_stores() -> Iterator[Figure]:
    """Begin and finish in turn, without a worker, and their round trips."""
    for name in STORES:
        yield from _store(name)


def _sides(server: services.Service, folder: Path) -> Iterator[Figure]:
    with contextlib.ExitStack() as stack:
        sides: dict[str, Side] = {}
        reasons: dict[str, str] = {}
        for kind in ("plain", *OURS, *PEERS):
            try:
                python = _environment(kind, folder) if kind in PEERS else sys.executable
                side = Side(kind, python, server, folder)
                stack.callback(side.stop)
                side.block(BLOCK)
                sides[kind] = side
            except NotRun as exc:
                reasons[kind] = str(exc)
        plain = sides.pop("plain")
        pairs: dict[str, list[tuple[tuple[Seconds, Seconds], ...]]] = {}
        before = os.getloadavg()[0]
        for number in range(ROUNDS):
            kinds = list(sides)
            shift = number % len(kinds)
            for kind in kinds[shift:] + kinds[:shift]:
                order = [sides[kind], plain][:: 1 if number % 2 else -1]
                blocks = {side.kind: side.block(BLOCK) for side in order}
                pair = blocks[kind], blocks[plain.kind]
                pairs.setdefault(kind, []).append(pair)
        load = f"load {before:.1f} before, {os.getloadavg()[0]:.1f} after"
    for place, what in ((1, "run"), (0, "send")):
        for kind in (*OURS, *PEERS):
            name, *bounds = OURS.get(kind, (PEERS.get(kind, ""), None, None))
            yield _ratio(
                f"{what} with {name}",
                [(ours[place], plain[place]) for ours, plain in pairs.get(kind, ())],
                bounds[1 - place],
                reasons.get(kind, load),
            )


def _ratio(
    name: str, pairs: list[tuple[Seconds, Seconds]], at_most: Any, note: str
) -> Figure:
    """The median of the pairs' ratios to plain Celery."""
    if not pairs:
        return Figure(name, None, "x", at_most=at_most, raw=[note])
    ratios = [ours.passed / plain.passed for ours, plain in pairs]
    low, value, high = statistics.quantiles(ratios, n=4)
    raw = [f"{len(pairs)} pairs, half of them between {low:.3f} and {high:.3f}; {note}"]
    for what, part in (
        ("median", lambda times: statistics.median(s.passed for s in times)),
        ("quietest tenth", lambda times: _quietest(s.passed for s in times)),
        ("processor time", lambda times: statistics.median(s.busy for s in times)),
    ):
        ours, plain = (part(side) * 1e6 for side in zip(*pairs, strict=True))
        raw.append(f"{what}: {ours:.0f} / {plain:.0f} µs = {ours / plain:.3f}")
    return Figure(name, value, "x", at_most=at_most, raw=raw)


def _quietest(seconds: Iterable[float]) -> float:
    return statistics.quantiles(seconds, n=10)[0]


def _environment(kind: str, folder: Path) -> Path:
    """
    The Python of a new environment that has a peer.

    Raises:
        NotRun: It could not be installed.
    """
    python = folder / kind / "bin" / "python"
    ours = [f"{name}=={version(name)}" for name in SHARED]
    for command in (
        [sys.executable, "-m", "venv", str(folder / kind)],
        [str(python), "-m", "pip", "install", "--quiet", *ours, PEERS[kind]],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = (done.stderr or done.stdout).strip().splitlines()
            raise NotRun(said[-1] if said else f"{command[0]}: {done.returncode}")
    return python


def _round_trips_of_a_run(server: services.Service, folder: Path) -> Figure:
    """Counted on the way from a worker to its store."""
    with proxy_to(server) as proxy:
        side = Side("key", sys.executable, server, folder, proxy.port)
        counts: list[int] = []
        try:
            for _ in range(2):
                side.block(COUNTED)
                side.wait_for_last()
                counts.append(proxy.turns)
        finally:
            side.stop()
    turns, runs = counts[1] - counts[0], COUNTED + WARM_UP
    return _round_trips("round trips to Redis in a run", turns, runs)


def _round_trips(name: str, turns: int, times: int) -> Figure:
    raw = [f"{turns} in {times}"]
    return Figure(name, turns / times, "", at_most=2, raw=raw)


def _store(name: str) -> Iterator[Figure]:
    with running_store(name) as (url, server):
        if name == "redis":
            _flush_as_usual(url)
        seconds = list(_begun_and_finished(url, PAIRS_OF_A_STORE))
        low, value, _ = (s * 1e6 for s in statistics.quantiles(seconds, n=4))
        yield Figure(
            f"begin and finish on {name}",
            value,
            "µs",
            at_most=60 if name == "sqlite" else None,
            raw=[f"a quarter below {low:.1f}; load {os.getloadavg()[0]:.1f}"],
        )
        if server is None:
            return
        with proxy_to(server) as proxy:
            turns = [
                proxy.turns
                for _ in _begun_and_finished(url_through(proxy, url), COUNTED + 1)
            ]
        counted = turns[-1] - turns[0]
        yield _round_trips(f"round trips to {name} for both", counted, COUNTED)


def _begun_and_finished(url: str, count: int) -> Iterator[float]:
    """Seconds for each pair, the first ones left out."""
    store = installation_of(make_app("memory://", "key", url)).key_store()
    result = pack(None, "json", has_backend=False)
    owner = str(uuid4())
    for number in range(-WARM_UP, count):
        claim = Claim(
            key=store_key("bench", "nothing", f"{owner}:{number}"),
            name=f"bench:{number}",
            task="nothing",
            owner=owner,
            token=secrets.token_hex(8),
            holder=holder_name(),
            fingerprint="0" * 32,
        )
        start = time.perf_counter()
        begun = store.begin(claim)
        other = store.finish(claim, KeyState.DONE, result=result)
        seconds = time.perf_counter() - start
        assert (begun.verdict, other) == (Verdict.RUN, None)
        if number >= 0:
            yield seconds
