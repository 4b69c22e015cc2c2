"""Every code block of docs/ is run, or read by what it is for; nothing is left out.

A page's blocks run in their order in an empty folder of their own, in which the
broker is the filesystem and workers are real. Python and `console` are executed;
unit files and data are parsed, and the commands in them must exist. A block whose
first line is a comment with a path becomes that file.
"""

from __future__ import annotations

import configparser
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import psutil
import pytest
import yaml
from polling import eventually

from celery_resilience.command import failed, resilience
from celery_resilience.explain import TaskExplained
from celery_resilience.flags import NAMES
from celery_resilience.settings import Settings

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(
    path.relative_to(DOCS) for path in DOCS.rglob("*.md") if "_build" not in path.parts
)
BLOCK = re.compile(
    r"^(?P<indent> *)```(?P<language>\S[^\n]*)\n(?P<text>.*?)^(?P=indent)```$",
    re.DOTALL | re.MULTILINE,
)
FILE = re.compile(r"^(?:#|;) ([\w./@-]+\.\w+)\n")

#: What only looks, so that it is asked again until it shows what the page shows.
LOOKS = re.compile(
    r"(?:\S+ )*?(?:failed_tasks|failed) (?:list|show|stats)\b|(?:cat|ls|tail|grep|test) "
)


@dataclass(frozen=True)
class Block:
    """One code block of a page."""

    language: str
    text: str

    @property
    def file(self) -> str | None:
        """The file that it is, if it is one."""
        found = FILE.match(self.text)
        return found[1] if found else None


def blocks_of(page: Path) -> list[Block]:
    """The page's code blocks, without the directives of the reference."""
    text = (DOCS / page).read_text()
    found = [
        Block(match["language"].strip(), textwrap.dedent(match["text"]))
        for match in BLOCK.finditer(text)
    ]
    assert len(re.findall("^ *```", text, re.MULTILINE)) == 2 * len(found), page
    return [block for block in found if not block.language.startswith("{")]


# --- running ---------------------------------------------------------------------------


class Page:
    """
    A reader at a terminal, in the folder of one page.

    Args:
        folder: Its own, and empty but for what a reader has checked out.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._count = 0
        (folder / ".venv").symlink_to(sys.prefix)
        shutil.copytree(
            ROOT / "example_project",
            folder / "example_project",
            ignore=shutil.ignore_patterns("__pycache__", ".demo", "*.sqlite3*"),
        )
        (folder / "home").mkdir()
        self._environment = folder / "home" / "environment"
        self._environment.write_text("")

    def type(self, command: str) -> subprocess.CompletedProcess[str]:
        """Run one command of a shell that remembers folder and exports."""
        state = shlex.quote(str(self._environment))
        script = (
            f"source {state}\n"
            'cd "${PWD_OF_PAGE:-.}"\n'
            f"{command}\n"
            "code=$?\n"
            'export PWD_OF_PAGE="$PWD"\n'
            f"export -p > {state}\n"
            "exit $code\n"
        )
        self._count += 1
        # Files, because what goes on in the background would keep a pipe open.
        out, err = (self.folder / "home" / f"{self._count}.{n}" for n in ("out", "err"))
        with open(out, "w") as stdout, open(err, "w") as stderr:
            done = subprocess.run(
                ["bash", "-c", script],
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                timeout=60,
                check=False,
                start_new_session=True,
                env={
                    **os.environ,
                    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                    "PYTHONWARNINGS": "",
                    "C_FORCE_ROOT": "1",
                    "COLUMNS": "200",
                    "PAGE": str(self.folder),  # marks our processes
                },
            )
        return subprocess.CompletedProcess(
            command, done.returncode, out.read_text(), err.read_text()
        )

    def console(self, block: Block) -> None:
        """Type each command, and compare what it prints with what the page shows."""
        for command, expected in commands_of(block.text):
            if LOOKS.match(command) and (expected or command.startswith("test ")):
                self._look(command, expected)
                continue
            done = self.type(command)
            assert done.returncode == 0, f"$ {command}\n{done.stdout}{done.stderr}"
            if expected:
                assert is_shown(expected, done), (
                    f"$ {command}\n{done.stdout}{done.stderr}"
                )

    def _look(self, command: str, expected: str) -> None:
        """Look until the page's output is there; a failure shows the last one."""
        seen: list[subprocess.CompletedProcess[str]] = []

        def look() -> bool:
            seen[:] = [self.type(command)]
            return is_shown(expected, seen[0])

        try:
            eventually(look, within_s=20, every_s=0.2)
        except AssertionError as exc:
            (done,) = seen
            raise AssertionError(
                f"$ {command}\n{expected}\n--- but\n{done.stdout}{done.stderr}"
            ) from exc

    def python(self, block: Block) -> None:
        """Run a block, or import the module that it is."""
        name = block.file or f"home/block{self._count}.py"
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.text)
        if Path(name).parent != Path() and block.file is not None:
            return  # a part of a project, which runs when it is whole
        run = name if block.file is None else f"-c 'import {module_of(name)}'"
        done = self.type(
            f'PYTHONPATH="$PAGE" python -W error::DeprecationWarning {run}'
        )
        assert done.returncode == 0, f"{block.text}\n{done.stdout}{done.stderr}"

    def close(self) -> None:
        """End what the page has left running: its own processes only."""
        for process in psutil.process_iter(["environ"]):
            environment = process.info["environ"] or {}
            if environment.get("PAGE") == str(self.folder):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL)
                    process.wait(10)


def module_of(file: str) -> str:
    """The module that a file is."""
    return file.removesuffix(".py")


def commands_of(text: str) -> Iterator[tuple[str, str]]:
    """Each command of a console block with what the page shows of its output."""
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        lines = part.rstrip("\n").split("\n")
        count = 1
        while lines[count - 1].endswith("\\"):
            count += 1
        yield "\n".join(lines[:count]), "\n".join(lines[count:])


def is_shown(expected: str, done: subprocess.CompletedProcess[str]) -> bool:
    """Whether a command printed it; `…` stands for what differs, also for lines."""
    if done.returncode != 0:
        return False
    pattern = re.escape(_plain(expected)).replace("…", ".*?")
    return (
        re.fullmatch(pattern, _plain(done.stdout + done.stderr), re.DOTALL) is not None
    )


def _plain(text: str) -> str:
    """A text without the widths of its columns."""
    return "\n".join(" ".join(line.split()) for line in text.strip().splitlines())


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    """A reader in a folder of their own."""
    reader = Page(tmp_path)
    yield reader
    reader.close()


@pytest.mark.parametrize(
    "name", [str(name) for name in PAGES if blocks_of(name)], ids=lambda name: name
)
def test_every_block_of_a_page_works(name: str, page: Page) -> None:
    """In the order of the page."""
    for block in blocks_of(Path(name)):
        read = READERS.get(block.language)
        if block.language == "console":
            page.console(block)
        elif block.language == "python":
            page.python(block)
        else:
            assert read is not None, f"nobody reads a block of {block.language!r}"
            read(block)


# --- reading ---------------------------------------------------------------------------


def read_ini(block: Block) -> None:
    """A unit of systemd, or a program of supervisord."""
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(block.text)
    file = block.file or ""
    if file.endswith(".service"):
        assert set(parser.sections()) == {"Unit", "Service", "Install"}
        service = parser["Service"]
        check_command(service["ExecStart"])
        assert service["KillMode"] == "mixed"
        assert int(service["TimeoutStopSec"]) > 0
        if shutil.which("systemd-analyze"):
            verify_unit(block)
        return
    assert file.endswith(".conf"), block.text
    for section in parser.sections():
        assert section.startswith("program:"), section
        program = parser[section]
        check_command(program["command"])
        assert program["stopsignal"] == "TERM"
        assert program["stopasgroup"] == "false"
        assert int(program["stopwaitsecs"]) > 0


def verify_unit(block: Block) -> None:
    """Let systemd read a unit, where there is one; its programs need not be here."""
    done = subprocess.run(
        ["systemd-analyze", "verify", "/dev/stdin"],
        input=block.text,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Unknown" not in done.stderr, done.stderr


def read_yaml(block: Block) -> None:
    """Objects of Kubernetes."""
    documents = list(yaml.safe_load_all(block.text))
    for document in documents:
        assert {"apiVersion", "kind", "metadata", "spec"} <= set(document)
        pod = document["spec"]["template"]["spec"]
        labels = document["spec"]["template"]["metadata"]["labels"]
        assert document["spec"]["selector"]["matchLabels"].items() <= labels.items()
        assert pod["terminationGracePeriodSeconds"] > 0
        for container in pod["containers"]:
            assert container["image"]
            check_command(shlex.join(container["command"]))


def check_command(text: str) -> None:
    """A command line of `celery` whose commands and flags there are."""
    words = shlex.split(text)
    assert Path(words[0]).name == "celery", text
    assert words[1] == "-A", text
    command: Any = celery_commands()[words[3]]
    rest = words[4:]
    while isinstance(command, click.Group):
        command = command.commands[rest.pop(0)]
    known = {name for param in command.params for name in param.opts}
    known |= (
        {f"--{name.replace('_', '-')}" for name in NAMES}
        if words[3] == "worker"
        else set()
    )
    for word in rest:
        if word.startswith("-"):
            assert word.split("=")[0] in known, f"{text}: {word}"


def celery_commands() -> dict[str, click.Command]:
    """Commands of `celery` that a unit may run."""
    from celery.bin.worker import worker

    return {"worker": worker, "failed": failed, "resilience": resilience}


def read_text(block: Block) -> None:
    """A drawing; nothing that anybody could type."""
    assert not re.search(r"^\s*(\$|celery|pip|python) ", block.text, re.MULTILINE)


READERS: dict[str, Callable[[Block], object]] = {
    "ini": read_ini,
    "yaml": read_yaml,
    "toml": lambda block: tomllib.loads(block.text),
    "json": lambda block: json.loads(block.text),
    "text": read_text,
}


# --- what is told ----------------------------------------------------------------------


def prose() -> str:
    """What people have written, without the reference that is made from the code."""
    pages = [page for page in PAGES if page.parts[0] != "reference"]
    return "\n".join((DOCS / page).read_text() for page in pages)


@pytest.mark.parametrize("name", Settings.__dataclass_fields__)
def test_every_setting_is_told(name: str) -> None:
    """Where it is needed, not only in the table."""
    assert re.search(rf"\bresilience_{name}\b", prose(), re.IGNORECASE)


@pytest.mark.parametrize(
    "words",
    [
        *(f"failed {verb}" for verb in failed.commands),
        *(f"resilience {verb}" for verb in resilience.commands),
        *(f"--{name.replace('_', '-')}" for name in NAMES),
    ],
)
def test_every_command_and_flag_is_told(words: str) -> None:
    """With its group, as it is typed."""
    assert re.search(rf"(?<!\w){words}\b", prose())


def test_no_setting_is_told_that_is_not_there() -> None:
    """A page that is ahead of the code is wrong."""
    told = set(re.findall(r"\bresilience_([a-z_]+)\b", prose() + reference()))
    packages, tables = {"celery_resilience"}, {"failed", "starts", "once"}
    inspected = {"memory"}
    assert told - set(Settings.__dataclass_fields__) - packages <= tables | inspected


def reference() -> str:
    """The other pages."""
    pages = [page for page in PAGES if page.parts[0] == "reference"]
    return "\n".join((DOCS / page).read_text() for page in pages)


def test_a_decision_is_short() -> None:
    """Question, choice, and what was given up, in thirty lines."""
    decisions = [page for page in PAGES if page.parts[0] == "decisions"]
    assert len(decisions) > 3
    for page in decisions:
        text = (DOCS / page).read_text()
        assert len(text.splitlines()) <= 30, page
        for heading in ("## Question", "## Choice", "## What we gave up"):
            assert heading in text, page


def test_the_pages_build_without_a_warning(tmp_path: Path) -> None:
    """And the reference has every setting, flag and verb of the code."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "sphinx", "-W", "-q", "-b", "html"),
            *("-d", str(tmp_path / "trees"), str(DOCS), str(tmp_path / "html")),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    html = {
        path.stem: path.read_text()
        for path in (tmp_path / "html" / "reference").glob("*.html")
    }
    for name in Settings.__dataclass_fields__:
        assert f"resilience_{name}<" in html["settings"]
    for name in NAMES:
        assert f"--{name.replace('_', '-')}<" in html["settings"]
    for verb in failed.commands:
        assert f"celery -A shop failed {verb} " in html["commands"]
    for verb in resilience.commands:
        assert f"celery -A shop resilience {verb} " in html["resilience-commands"]
    for name in TaskExplained.__dataclass_fields__:
        assert f"<strong>{name}</strong>" in html["explain"]
