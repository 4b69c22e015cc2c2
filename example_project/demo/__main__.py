"""`python -m example_project.demo`, which is what `make demo` runs."""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

from example_project import chaos
from example_project.demo.day import LINES, Day, Sum, day_of, line_of, refusals
from example_project.demo.open_shop import CHILDREN, OpenShop
from example_project.demo.page import Page
from example_project.ledger import Effect
from tests import services

PHASES = (
    ("morning", chaos.MORNING, "down=0"),
    ("the address service is down", chaos.OUTAGE, "down=1"),
    ("afternoon", chaos.AFTERNOON, "down=0"),
)

#: Seconds of one step of a day.
STEP_S = 0.1

INTERRUPTED = 130

OnProgress = Callable[[str, int], None]


def main() -> int:
    """Run the demo; returns 0 when the sum came out even."""
    words = _parser().parse_args()
    page = Page()
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        with contextlib.ExitStack() as stack:
            stack.callback(signal.signal, signal.SIGINT, signal.SIG_IGN)
            broker_url = None
            if words.broker != "filesystem":
                broker_url = stack.enter_context(services.running(words.broker)).url
            folder = stack.enter_context(_folder(words.keep))
            stack.callback(signal.signal, signal.SIGINT, signal.SIG_IGN)
            facts = tell(page, words.broker, broker_url, folder)
        page.end(facts["seconds"], words.keep)
    except KeyboardInterrupt:
        page.trouble("interrupted; every process has ended and every file is removed")
        return INTERRUPTED
    except (RuntimeError, services.Missing) as exc:
        page.trouble(str(exc))
        return 1
    if words.json:
        words.json.write_text(json.dumps(facts))
    return 0 if facts["is_even"] else 1


def tell(
    page: Page, broker: str, broker_url: str | None, folder: Path
) -> dict[str, Any]:
    """
    The whole story.

    Args:
        page: Where it is told.
        broker, broker_url: The transport; None: files in *folder*.
        folder: Empty; both shops live in it.

    Returns:
        What was counted.
    """
    began = time.monotonic()
    page.headline(orders=len(LINES), broker=broker, children=CHILDREN)
    page.chapter("The day")
    with (
        OpenShop("plain", folder / "plain", broker_url) as plain_shop,
        OpenShop("resilient", folder / "resilient", broker_url) as shop,
    ):
        with page.progress(len(LINES)) as on_progress:
            _together(
                _day(plain_shop, partial(on_progress, "plain Celery")),
                _day(shop, partial(on_progress, "celery-resilience")),
            )
        plain = _count_day(plain_shop, kept=())
        resilient = _count_day(shop, kept=map(line_of, shop.failed()))

        page.chapter("In the evening")
        page.comparison(plain, resilient)
        _look(page, shop)
        _repair(page, shop)
        total, refused = _count(shop)
        page.chapter("The sum")
        page.sum(total, refused)

    seconds = time.monotonic() - began
    return _facts(plain, resilient, total, refused, seconds)


def _day(shop: OpenShop, on_progress: OnProgress) -> Iterator[None]:
    """A day at the shop; each step is a moment in which the others' days go on."""
    on_progress("opening", 0)
    shop.open()
    for name, lines, words in PHASES:
        shop.service(words)
        shop.take_orders(lines)
        is_last = lines is PHASES[-1][1]
        for _ in shop.closing_the_day() if is_last else shop.settling():
            on_progress(name, len(shop.tally.counts[Effect.SHIPPED]))
            yield
    on_progress("closed", len(shop.tally.counts[Effect.SHIPPED]))


def _count_day(shop: OpenShop, *, kept: Iterable[int]) -> Day:
    return day_of(
        shop.tally,
        kept=kept,
        killed=len(shop.killed()),
        largest_mib=shop.largest_mib,
    )


def _together(*days: Iterator[None]) -> None:
    """Let several go on at once, each a step at a time."""
    for _ in zip_longest(*days):
        time.sleep(STEP_S)


def _look(page: Page, shop: OpenShop) -> None:
    page.chapter(
        "What was kept",
        "Each failure once, with its reason, its traceback and the original message.",
    )
    _type(page, shop, "stats")
    _type(page, shop, "list", "--limit", "6")
    page.logged(shop.logged_failure())


def _repair(page: Page, shop: OpenShop) -> None:
    page.chapter(
        "The repair",
        "The address service is well. Release 2 reads latin-1, and dates like "
        "02.11.2026.\nWhat no release will take is refused; the rest is run again, "
        "each order from where it\nfailed, with the rest of its chain.",
    )
    shop.service("ill=0")
    shop.release = 2
    shop.start_worker()
    _type(page, shop, "discard", "--exception", "LineRefused", "--yes")
    _type(page, shop, "discard", "--reason", "worker_lost", "--yes")
    _type(page, shop, "replay", "--all", "--yes", "--wait")
    _together(shop.settling())
    shop.report_revenue()
    _together(shop.closing_the_day())


def _type(page: Page, shop: OpenShop, *words: str) -> None:
    page.typed(words)
    shop.command(*words)


def _count(shop: OpenShop) -> tuple[Sum, dict[str, int]]:
    failed = shop.failed("--state", "all")
    discarded = [task for task in failed if task["state"] == "discarded"]
    resolved = [task for task in failed if task["state"] == "resolved"]
    shipped = shop.tally.lines(Effect.SHIPPED)
    return (
        Sum(
            orders=len(LINES),
            shipped=len(shipped),
            refused=len({line_of(task) for task in discarded} - shipped),
            unresolved=len(failed) - len(discarded) - len(resolved),
            doubled=shop.tally.doubled(),
            charged_cents=shop.tally.cents[Effect.CHARGED],
            shipped_cents=shop.tally.cents[Effect.SHIPPED],
            reported_cents=shop.reported_cents(),
        ),
        refusals(discarded),
    )


def _facts(
    plain: Day, resilient: Day, total: Sum, refused: dict[str, int], seconds: float
) -> dict[str, Any]:
    return {
        "plain": {**asdict(plain), "lost": plain.lost},
        "resilient": {**asdict(resilient), "lost": resilient.lost},
        "sum": asdict(total),
        "refused": refused,
        "is_even": total.is_even,
        "seconds": round(seconds, 1),
    }


@contextlib.contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        keep.mkdir(parents=True)
        yield keep.resolve()
        return
    folder = Path(tempfile.mkdtemp(prefix="resilience-demo-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m example_project.demo")
    parser.add_argument(
        "--broker",
        choices=("filesystem", "redis", "rabbitmq"),
        default="filesystem",
        help="the last two on a private server, which ends with the demo",
    )
    parser.add_argument(
        "--keep",
        type=Path,
        metavar="FOLDER",
        help="a new folder for queues, databases, ledgers and logs; it is not removed",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write what was counted to a file"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
