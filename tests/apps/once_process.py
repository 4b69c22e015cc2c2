"""A process of its own that claims keys by `once`.

`hold URL KEY` claims a key, writes an effect, says "held" and waits for its end.
`race URL ROUNDS` forks sixteen processes, which meet before each round and claim the
round's number together, each in a transaction of its own; and says who was the first.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from typing import Any

from sqlalchemy import Engine, create_engine, text

from celery_resilience import once

NAMESPACE = "race"
RACERS = 16


def engine_for(url: str) -> Engine:
    """An engine whose SQLite waits longer than a test does."""
    patience: dict[str, Any] = {"timeout": 60} if url.startswith("sqlite") else {}
    return create_engine(url, connect_args=patience)


def say(line: str) -> None:
    """Tell the test."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def hold(engine: Engine, key: str) -> None:
    """Claim *key* and never commit."""
    with engine.connect() as connection:
        assert once(connection, key, namespace=NAMESPACE)
        connection.execute(text("INSERT INTO effects (name) VALUES (:n)"), {"n": key})
        say("held")
        sys.stdin.read()


def race(url: str, rounds: int) -> None:
    """Say which rounds each process has won."""
    context = multiprocessing.get_context("fork")
    meeting = context.Barrier(RACERS)
    results = context.SimpleQueue()

    def run() -> None:
        engine = engine_for(url)
        won = []
        for number in range(rounds):
            meeting.wait(60)
            with engine.begin() as connection:
                if once(connection, str(number), namespace=NAMESPACE):
                    connection.execute(
                        text("INSERT INTO effects (name) VALUES (:n)"),
                        {"n": str(number)},
                    )
                    won.append(number)
        results.put(won)

    racers = [context.Process(target=run, daemon=True) for _ in range(RACERS)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    say(json.dumps([results.get() for racer in racers if racer.exitcode == 0]))


if __name__ == "__main__":
    _, what, url, argument = sys.argv
    if what == "hold":
        hold(engine_for(url), argument)
    else:
        race(url, int(argument))
