"""A server that ends by itself is told of, with its reason."""

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
from conftest import deaths
from polling import eventually
from services import EndedByItself, Service, exit_code, kill_group
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
