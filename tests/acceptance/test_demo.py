"""`make demo` tells what happened, comes out even, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlencode
from urllib.request import Request, urlopen

import psutil
import pytest
from polling import eventually
from services import Service

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The example beside the installed package, as nobody but a newcomer has it."""
    folder = tmp_path / "checkout"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(
        ROOT / "example_project", folder / "example_project", ignore=ignored
    )
    (folder / "tests").mkdir()
    for name in ("__init__.py", "services.py"):
        shutil.copy(ROOT / "tests" / name, folder / "tests")
    (tmp_path / "temporary").mkdir()
    return folder


def demo(checkout: Path, *words: str) -> subprocess.Popen[str]:
    """Start the demo, with a temporary folder of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "example_project.demo", *words],
        cwd=checkout,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "TMPDIR": str(checkout.parent / "temporary")},
    )


def leftovers(checkout: Path) -> list[str]:
    """Processes and files of a demo that has ended."""
    temporary = checkout.parent / "temporary"
    found = [str(path) for path in temporary.iterdir()]
    for process in psutil.process_iter(["cwd", "cmdline"]):
        words = " ".join(process.info["cmdline"] or ())
        if str(checkout.parent) in f"{process.info['cwd']} {words}":
            found.append(words)
    return found


def test_the_sum_comes_out_even(checkout: Path) -> None:
    """Plain Celery loses and doubles; the resilient shop ships or refuses every order."""
    running = demo(checkout, "--json", "facts.json")
    page, _ = running.communicate(timeout=300)

    assert running.returncode == 0, page
    facts = json.loads((checkout / "facts.json").read_text())
    plain, resilient, total = facts["plain"], facts["resilient"], facts["sum"]
    assert plain["paid_only"] > 0
    assert plain["unpaid"] > 0
    assert plain["charged_twice"] > 0
    assert plain["mailed_twice"] > 0
    assert plain["unearned_cents"] > 0
    assert plain["lost"] + plain["shipped"] == total["orders"] == 1_150
    assert resilient["lost"] == resilient["unearned_cents"] == 0
    assert resilient["charged_twice"] == resilient["mailed_twice"] == 0
    assert resilient["kept"] + resilient["shipped"] == 1_150
    assert total["shipped"] + total["refused"] == 1_150
    assert total["unresolved"] == total["doubled"] == 0
    assert total["charged_cents"] == total["shipped_cents"] > 0
    assert total["reported_cents"] == total["charged_cents"]
    assert sum(facts["refused"].values()) == total["refused"] == 43
    assert "event=task_failed task=example_project.shop.tasks." in page
    for part in ("It comes out even.", "$ celery -A example_project.shop failed list"):
        assert part in page
    assert leftovers(checkout) == []


def test_the_shop_has_a_manage_py(checkout: Path) -> None:
    """What its README types in its folder works, in a new checkout."""
    (checkout / ".demo" / "queue").mkdir(parents=True)
    done = subprocess.run(
        [sys.executable, "manage.py", "failed_tasks", "list"],
        cwd=checkout / "example_project",
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )

    assert (done.returncode, done.stderr) == (0, "nothing matches\n")
    readme = (checkout / "example_project" / "README.md").read_text()
    assert "$ python manage.py failed_tasks list" in readme


@contextlib.contextmanager
def bank(checkout: Path) -> Iterator[Callable[..., int]]:
    """The bank's process; what it yields asks for money, and returns what was taken."""
    with subprocess.Popen(
        [sys.executable, "-m", "example_project.service"],
        cwd=checkout,
        env={**os.environ, "SHOP_FOLDER": str(checkout.parent / "temporary")},
        stdin=subprocess.PIPE,  # the process ends with it
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())

        def charge(**words: str | int) -> int:
            url = f"http://127.0.0.1:{port}/charge?{urlencode(words)}"
            with urlopen(Request(url, method="POST"), timeout=30) as answer:
                return int(json.load(answer)["taken_cents"])

        yield charge


def test_the_bank_takes_money_once_for_a_key(checkout: Path) -> None:
    """Also when it was restarted; without a key, each time. The ledger has what it took."""
    with bank(checkout) as charge:
        assert charge(order=2, cents=980, key="charge:2") == 980
        assert charge(order=2, cents=980, key="charge:2") == 0
        assert [charge(order=3, cents=750), charge(order=3, cents=750)] == [750, 750]
    with bank(checkout) as charge:
        assert charge(order=2, cents=980, key="charge:2") == 0
        assert charge(order=4, cents=100, key="charge:4") == 100

    ledger = checkout.parent / "temporary" / "ledger.jsonl"
    taken = [json.loads(line) for line in ledger.read_text().splitlines()]
    assert {line["effect"] for line in taken} == {"charged"}
    assert [line["line_no"] for line in taken] == [2, 3, 3, 4]


@pytest.mark.parametrize(
    ("broker", "number"),
    [
        ("filesystem", signal.SIGINT),
        ("redis", signal.SIGTERM),
        ("rabbitmq", signal.SIGINT),
    ],
)
def test_it_can_be_interrupted(
    checkout: Path,
    servers: Callable[[str], Service],
    broker: str,
    number: signal.Signals,
) -> None:
    """Ctrl-C in the middle of a day ends every process and removes every file."""
    if broker != "filesystem":
        servers(broker)  # skips where there is none
    running = demo(checkout, "--broker", broker)
    eventually(
        lambda: any(" worker " in it for it in leftovers(checkout)),
        within_s=90,
        what="the shop is open",
    )

    running.send_signal(number)
    page, _ = running.communicate(timeout=60)

    assert running.returncode == 130, page
    assert "interrupted" in page
    assert leftovers(checkout) == []
