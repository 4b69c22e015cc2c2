"""Tasks of the test app with retry rules: each does what its script says, by attempt."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from celery.exceptions import SoftTimeLimitExceeded
from retrying import SOON_S

from celery_resilience import Never, On


class Told(Exception):
    """The server asks to be left alone for a while."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(retry_after_s)
        self.retry_after_s = retry_after_s


class Shut(ConnectionError):
    """Of a rule of its own."""


def act(self: Any, word: str) -> str:
    """Do what one word of a script says."""
    what, _, number = word.partition(":")
    if what == "connection":
        raise ConnectionError("the bank is away")
    if what == "cause":
        raise RuntimeError("no payment") from ConnectionError("the bank is away")
    if what == "value":
        raise ValueError("no such account")
    if what == "group":
        raise ExceptionGroup("all", [ConnectionError("one"), ValueError("two")])
    if what == "shut":
        raise Shut("closed for today")
    if what == "told":
        raise Told(float(number))
    if what == "soft":
        raise SoftTimeLimitExceeded
    if what == "other":
        raise KeyError("whatever")
    if what == "retry":
        raise self.retry(countdown=SOON_S, exc=ConnectionError("by hand"))
    return what


#: What most of the tasks below have.
RULES = (
    On(Shut, attempts=1),
    Never(ValueError),
    On(ConnectionError, attempts=6, backoff_s=(0.2, 0.4)),
    On("retry_tasks.Told", attempts=3, backoff_s=0.2, deadline_s=60),
)


def register(app: Any, base: Any, note: Callable[..., None]) -> None:
    """Add the tasks to *app*."""

    def task(name: str, **options: Any) -> Any:
        options.setdefault("retry_rules", RULES)
        return app.task(base=base, bind=True, shared=False, name=name, **options)

    def play(self: Any, script: list[str], *_: Any) -> str:
        """One attempt; the last word of the script is for all that follow."""
        number = self.request.retries
        note(self.name, self.request.id, number, time.time())
        return act(self, script[min(number, len(script) - 1)])

    async def play_async(self: Any, script: list[str]) -> str:
        return play(self, script)

    task("ruled")(play)
    task("ruled_late", acks_late=True)(play)
    task("ruled_async")(play_async)
    task("ruled_once", idempotency_key="play:{script}")(play)
    task("ruled_guarded", circuit="ruled")(play)
    task(
        "ruled_with_autoretry",
        autoretry_for=(Exception,),
        max_retries=1,
        retry_backoff=False,
        default_retry_delay=SOON_S,
    )(play)
    task(
        "ruled_for_a_while",
        retry_rules=[On(ConnectionError, attempts=None, backoff_s=0.3, deadline_s=1)],
    )(play)
    task("ruled_slowly", retry_rules=[On(ConnectionError, backoff_s=3)])(play)
    task(
        "ruled_by_budget",
        retry_rules=[On(ConnectionError, backoff_s=0.2, budget="small")],
    )(play)
