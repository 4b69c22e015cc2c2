"""A server that ends by itself is told of, with its reason; promtool is found."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import deaths, provide
from polling import eventually
from services import (
    EndedByItself,
    Missing,
    Service,
    exit_code,
    kill_group,
    provide_promtool,
)
from sqlalchemy import NullPool, create_engine, text
from sqlalchemy.exc import OperationalError


class Mortal(Service):
    """Ends as its first line of input says, or at once."""

    name = "mortal"
    programs = (sys.executable,)
    script = "print('alive', flush=True); import time; time.sleep(60)"

    def command(self) -> Sequence[str]:
        return [sys.executable, "-c", self.script]

    def is_ready(self) -> bool:
        return "alive" in (self.folder / "server.log").read_text()


class StillBorn(Mortal):
    """Does not come up."""

    script = "import sys; sys.exit('no such option')"


@pytest.fixture
def mortal() -> Iterator[Mortal]:
    """A server that runs."""
    server = Mortal()
    server.start()
    yield server
    server.stop()
    server.remove()


def test_a_server_that_was_killed_says_so_and_why(mortal: Mortal) -> None:
    """Its name, its end and the end of its log."""
    assert mortal.death() == ""
    assert list(deaths([mortal])) == []
    (process,) = mortal.processes
    os.kill(process.pid, signal.SIGKILL)

    death = eventually(mortal.death)

    assert death.startswith(f"mortal on port {mortal.port} has ended by itself: ")
    assert f"(pid {process.pid}) was ended by SIGKILL" in death
    assert death.endswith("\nalive")
    assert list(deaths([mortal])) == [("mortal has ended", death)]


def test_its_removal_fails_and_removes_it(mortal: Mortal) -> None:
    """Also where every test has passed."""
    os.kill(mortal.processes[0].pid, signal.SIGTERM)
    eventually(mortal.death)

    with pytest.raises(EndedByItself, match="was ended by SIGTERM"):
        mortal.remove()

    assert not mortal.folder.exists()
    assert mortal.processes == []


@pytest.mark.parametrize("how", ["stop", "kill", "remove"])
def test_a_server_that_was_told_to_end_did_not_end_by_itself(
    mortal: Mortal, how: str
) -> None:
    """Nobody is told."""
    getattr(mortal, how)()

    assert mortal.death() == ""


def test_a_server_that_does_not_come_up_is_not_waited_for() -> None:
    """Its exit code and its words are told at once."""
    server = StillBorn()

    with pytest.raises(EndedByItself, match=r"exited with 1(.|\n)*no such option"):
        server.start()
    server.stop()
    server.remove()


def test_a_killed_postgresql_leaves_no_backend(own_server: Any) -> None:
    """One that lives on does what its client asks for, and stops the next start."""
    server = own_server("postgresql")
    engine = create_engine(server.url, poolclass=NullPool)
    connection = engine.connect()
    pid = connection.execute(text("SELECT pg_backend_pid()")).scalar_one()
    backend = psutil.Process(pid)

    server.kill()

    assert not backend.is_running() or backend.status() == psutil.STATUS_ZOMBIE
    with pytest.raises(OperationalError):
        connection.execute(text("SELECT 1"))
    connection.invalidate()
    connection.close()
    server.start()
    with engine.connect() as again:
        assert again.execute(text("SELECT 1")).scalar_one() == 1


def test_a_mariadb_shares_no_folder_with_another(own_server: Any) -> None:
    """One that starts deletes the temporary tables of the others there."""
    server = own_server("mariadb")
    engine = create_engine(server.url, poolclass=NullPool)

    with engine.connect() as connection:
        folder = connection.execute(text("SELECT @@tmpdir")).scalar_one()

    assert Path(folder).is_relative_to(server.folder)


def test_a_process_keeps_its_pid_until_its_group_is_killed() -> None:
    """Else Linux may give the pid to another, and a late kill would be its end."""
    code = "import os, time; os.fork() or time.sleep(60)"
    process = subprocess.Popen(
        [sys.executable, "-c", f"{code}; print(os.getpid(), flush=True)"],
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert eventually(lambda: exit_code(process) is not None)

    assert exit_code(process) == 0
    os.kill(process.pid, 0)  # it is there
    kill_group(process)
    assert process.stdout is not None
    assert process.stdout.read() == f"{process.pid}\n".encode()
    process.stdout.close()


def test_a_process_that_was_reaped_is_not_killed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its pid may be another's by now."""
    process = subprocess.Popen([sys.executable, "-c", ""], start_new_session=True)
    process.wait()
    killed: list[int] = []
    monkeypatch.setattr(os, "killpg", lambda group, number: killed.append(group))

    kill_group(process)

    assert (killed, exit_code(process)) == ([], 0)


# --- promtool -------------------------------------------------------------------------


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An account without promtool, and the only folder on its PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("RESILIENCE_PROMTOOL", raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    return folder


def write_program(file: Path, body: str = "") -> Path:
    """A program that the shell runs, with the PATH of this machine."""
    file.write_text(f"#!/bin/sh\nPATH=/usr/bin:/bin\n{body}\n")
    file.chmod(0o755)
    return file


def write_debian(folder: Path, program: str = "promtool") -> Path:
    """An apt-get that notes its words, and a dpkg-deb whose package has a program."""
    notes = folder / "notes"
    apt_get = f'echo "$2" >> {notes}; [ "$2" != download ] || touch "$3.deb"'
    write_program(folder / "apt-get", apt_get)
    unpack = f"mkdir -p $3/usr/bin; touch $3/usr/bin/{program}"
    write_program(folder / "dpkg-deb", unpack)
    return notes


def test_promtool_is_where_the_environment_says_or_on_the_path(
    bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The environment wins, and nothing is fetched."""
    notes = write_debian(bare)
    on_path = write_program(bare / "promtool")

    assert provide_promtool() == str(on_path)
    monkeypatch.setenv("RESILIENCE_PROMTOOL", "/opt/promtool")
    assert provide_promtool() == "/opt/promtool"
    assert not notes.exists()


def test_promtool_is_unpacked_once(bare: Path, tmp_path: Path) -> None:
    """From Debian's package, which is not installed and leaves nothing else."""
    notes = write_debian(bare)

    found = {provide_promtool() for _ in range(2)}

    cache = tmp_path / "cache" / "celery-resilience"
    assert found == {str(cache / "promtool")}
    assert [path.name for path in cache.iterdir()] == ["promtool"]
    assert notes.read_text().split() == ["update", "download"]


@pytest.mark.parametrize("has", ["no Debian", "no network", "another package"])
def test_without_promtool_a_test_skips_by_name_and_fails_in_ci(
    bare: Path, monkeypatch: pytest.MonkeyPatch, has: str
) -> None:
    """As without a server."""
    if has == "no network":
        write_program(bare / "apt-get", "echo no such host >&2; exit 100")
    elif has == "another package":
        write_debian(bare, program="other")

    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match=r"^missing promtool: "):
        provide("promtool")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(Missing, match=r"^promtool: "):
        provide("promtool")
