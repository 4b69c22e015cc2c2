"""What the README tells a newcomer to type works as it is written there."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from polling import eventually

README = (Path(__file__).parents[2] / "README.md").read_text()

PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
CONSOLE = re.findall(r"```console\n(.*?)```", README, re.DOTALL)


def block_with(words: str) -> str:
    """The README's one block of Python in which *words* stand."""
    (found,) = [block for block in PYTHON if words in block]
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A newcomer's folder, with the README's `shop.py`."""
    (tmp_path / "shop.py").write_text(PYTHON[0])
    return tmp_path


def typed(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run one line as the newcomer's shell does."""
    bin_folder = Path(sys.executable).parent
    return subprocess.run(
        line,
        shell=True,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={
            **os.environ,
            "PATH": f"{bin_folder}:{os.environ['PATH']}",
            "C_FORCE_ROOT": "1",
        },
    )


def test_twenty_lines_run(folder: Path) -> None:
    """Each line of the two sessions does what the text around it says."""
    install, session, replay = CONSOLE
    assert install == "$ pip install celery-resilience\n"
    start, send, look = [line.removeprefix("$ ") for line in session.splitlines()]
    assert typed(start, folder).returncode == 0
    eventually((folder / "worker.pid").exists)
    worker = psutil.Process(int(_pid(folder)))
    try:
        assert typed(send, folder).returncode == 0
        listed = eventually(
            lambda: (
                (done := typed(look, folder)).stdout.count("\n") == 2 and done.stdout
            ),
            what=(folder / "worker.log").read_text(),
        )
        assert "shop.ship" in listed
        assert "FileNotFoundError" in listed

        *lines, expected, end = replay.splitlines()
        for line in lines:
            done = typed(line.removeprefix("$ "), folder)
            assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == expected
        assert typed(look, folder).stdout == ""
        assert typed(end.removeprefix("$ "), folder).returncode == 0
        eventually(lambda: not worker.is_running(), what="the worker ends")
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.terminate()
        eventually(lambda: not (folder / "worker.pid").exists(), what="the worker ends")


def _pid(folder: Path) -> str:
    return eventually(lambda: (folder / "worker.pid").read_text().strip())


def test_the_python_of_commands_runs(folder: Path) -> None:
    """The API example imports, lists and plans a replay."""
    (folder / "api.py").write_text(block_with("import FailedTasks"))
    done = typed(f"{sys.executable} -W error::DeprecationWarning api.py", folder)
    assert done.returncode == 0, done.stderr


def test_the_same_key_has_one_effect(folder: Path) -> None:
    """The task with a key, sent twice: one key is done, and one run had it."""
    with (folder / "shop.py").open("a") as shop:
        shop.write(block_with("idempotency_key="))
    (start, send), keys = (
        (line.removeprefix("$ ") for line in CONSOLE[1].splitlines()[:2]),
        "celery -A shop resilience keys list -o json",
    )
    send = send.replace("shop.ship.delay(7)", "shop.charge.delay(7, 1990)")
    assert typed(start, folder).returncode == 0
    eventually((folder / "worker.pid").exists)
    worker = psutil.Process(int(_pid(folder)))
    try:
        for _ in range(2):
            assert typed(send, folder).returncode == 0
        eventually(lambda: not list((folder / "queue").glob("*.msg")))
        eventually(lambda: '"done"' in typed(keys, folder).stdout)
        (key,) = json.loads(typed(keys, folder).stdout)
    finally:
        worker.terminate()
        eventually(lambda: not worker.is_running(), what="the worker ends")

    assert (key["name"], key["state"], key["runs"]) == ("charge:7", "done", 1)
    said = (folder / "worker.log").read_text()
    # The second may come while the first runs, and is snoozed then.
    assert re.search(r"stopped after \d+ s: \d+ deliveries, 1 succeeded", said), said


def test_every_setting_verb_and_flag_is_told() -> None:
    """What can be typed stands in the README, and what stands there can be typed."""
    from celery import Celery

    from celery_resilience import Resilience
    from celery_resilience.command import failed
    from celery_resilience.flags import NAMES
    from celery_resilience.settings import Settings

    Resilience(Celery("told"))
    told = set(re.findall(r"^\| `resilience_(\w+)`", README, re.MULTILINE))
    assert told == set(Settings.__dataclass_fields__)
    lines = re.findall(
        r"celery -A shop failed ([a-z]+ \| [a-z |]+)$", README, re.MULTILINE
    )
    verbs = {verb for line in lines for verb in line.split(" | ")}
    assert verbs == set(failed.commands)
    for name in NAMES:
        assert f"`--{name.replace('_', '-')}`" in README
