"""`make demo` tells what happened, comes out even, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from polling import eventually

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


@pytest.fixture(params=["filesystem", "redis", "rabbitmq"])
def broker(request: pytest.FixtureRequest) -> str:
    """Each broker that the demo runs on."""
    if request.param != "filesystem":
        request.getfixturevalue("servers")(request.param)  # skips where there is none
    return str(request.param)


def test_the_sum_comes_out_even(checkout: Path, broker: str) -> None:
    """Plain Celery loses and doubles; the resilient shop ships or refuses every order."""
    running = demo(checkout, "--broker", broker, "--json", "facts.json")
    page, _ = running.communicate(timeout=300)

    assert running.returncode == 0, page
    facts = json.loads((checkout / "facts.json").read_text())
    plain, resilient, total = facts["plain"], facts["resilient"], facts["sum"]
    assert plain["paid_only"] > 0
    assert plain["unpaid"] > 0
    assert plain["doubled"] > 0
    assert plain["lost"] + plain["shipped"] == total["orders"] == 1_150
    assert resilient["lost"] == resilient["doubled"] == 0
    assert resilient["kept"] + resilient["shipped"] == 1_150
    assert total["shipped"] + total["refused"] == 1_150
    assert total["unresolved"] == total["doubled"] == 0
    assert total["charged_cents"] == total["shipped_cents"] > 0
    assert total["reported_cents"] == total["charged_cents"]
    assert sum(facts["refused"].values()) == total["refused"] == 43
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_can_be_interrupted(checkout: Path, number: signal.Signals) -> None:
    """Ctrl-C in the middle of a day ends every process and removes every file."""
    running = demo(checkout)
    eventually(lambda: len(leftovers(checkout)) > 3, what="the shop is open")

    running.send_signal(number)
    page, _ = running.communicate(timeout=60)

    assert running.returncode == 130, page
    assert "interrupted" in page
    assert leftovers(checkout) == []
