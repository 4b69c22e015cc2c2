"""
Starts Python in a process that has imported Celery already, or Django too.

Two thirds of what a small test costs is the start of interpreters. A server, which is
this file as a program, has imported what every worker imports and has no thread; it
forks for each start. The process is a child of the test's own, in a session, folder and
environment of its own, and imports the test's app itself. What needs a new interpreter
is started with `subprocess` (see `can_be_warm`).
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

#: Importing ours turns nothing on, of which `unit/test_house.py` makes sure.
IMPORTED = (
    *("celery", "celery.bin.celery", "celery.canvas", "celery.app.control"),
    *("kombu.transport.redis", "kombu.transport.pyamqp", "kombu.transport.filesystem"),
    *("click", "psutil", "pybreaker", "redis", "sqlalchemy"),
    *("celery.apps.worker", "celery.concurrency.prefork", "celery.worker.consumer"),
    *("celery_resilience.command", "celery_resilience.worker"),
)

#: Of a project of Django: what `manage.py` imports before it knows its settings.
DJANGO = (
    *IMPORTED,
    "django.core.management",
    "django.core.management.commands.migrate",
)

_PR_SET_CHILD_SUBREAPER = 36
_MAX_REQUEST = 1 << 20


def can_be_warm(command: Sequence[str], environment: Mapping[str, str]) -> bool:
    """
    Whether a process may be forked that has imported Celery.

    Not where the modules are replaced by greenlets' first, not where Sentry or
    OpenTelemetry are set up before they are imported, and not with `fleet_cold`.
    """
    conf = environment.get("FLEET_CONF", "")
    return (
        sys.platform == "linux"
        and command[0] == sys.executable
        and (list(command[1:3]) == ["-m", "celery"] or command[1].endswith(".py"))
        and not any(word.endswith(("gevent", "eventlet")) for word in command)
        and "fleet_sentry" not in conf
        and "fleet_spans" not in conf
        and "fleet_cold" not in conf
    )


class WarmPopen(subprocess.Popen[Any]):
    """
    `subprocess.Popen` of Python with all three streams, by a server.

    Args:
        imported: What its server has imported.
    """

    def __init__(self, *args: Any, imported: tuple[str, ...], **options: Any) -> None:
        self._imported = imported
        super().__init__(*args, **options)

    def _execute_child(self, *words: Any) -> None:
        args, cwd, env = words[0], words[5], words[6]
        pipes, starts_session = words[10:16], words[21]
        stdin, _, _, stdout, _, stderr = pipes
        request = {
            "argv": args[1:],
            "cwd": os.fspath(cwd),
            "environment": dict(env),
            "starts_session": bool(starts_session),
        }
        try:
            self.pid = _server(self._imported).start(request, (stdin, stdout, stderr))
            self._child_created = True
        finally:
            self._close_pipe_fds(*pipes)


def popen(
    command: Sequence[str], *, imported: tuple[str, ...] = IMPORTED, **options: Any
) -> subprocess.Popen[Any]:
    """As `subprocess.Popen`, warm where that is possible."""
    if can_be_warm(command, options["env"]):
        return WarmPopen(command, imported=imported, **options)
    return subprocess.Popen(command, **options)


def run(command: Sequence[str], *, timeout: float, **options: Any) -> Any:
    """As `subprocess.run` with captured texts, warm where that is possible."""
    pipe = subprocess.PIPE
    options |= {"stdin": subprocess.DEVNULL, "stdout": pipe, "stderr": pipe}
    options["text"] = True
    with popen(command, **options) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


class _Server:
    """The process that forks, for this one; it ends with it."""

    def __init__(self, imported: tuple[str, ...]) -> None:
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _MAX_REQUEST)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno()), *imported],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        if self._ours.recv(16) != b"ready":
            raise RuntimeError("the server of warm processes has not started")
        self._libc = ctypes.CDLL(None, use_errno=True)
        atexit.register(self._close)

    def start(self, request: Mapping[str, Any], fds: Sequence[int]) -> int:
        """Start a process with these descriptors as 0, 1 and 2; returns its pid."""
        # Who forks it ends at once, so that it becomes a child of the nearest ancestor
        # that asks for such: this process, and at no other time.
        self._libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        try:
            socket.send_fds(self._ours, [json.dumps(request).encode()], fds)
            return int(self._ours.recv(16))
        finally:
            self._libc.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)

    def _close(self) -> None:
        self._ours.close()
        self._process.wait()


@functools.cache
def _server(imported: tuple[str, ...]) -> _Server:
    return _Server(imported)


# --- the server ----------------------------------------------------------------------


def main() -> None:
    """Import, and fork for each request until the other end is closed."""
    server = socket.socket(fileno=int(sys.argv[1]))
    for name in sys.argv[2:]:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # billiard collects before each fork of a child
    server.send(b"ready")
    while True:
        text, fds, _, _ = socket.recv_fds(server, _MAX_REQUEST, 3)
        if not text:
            return
        request = json.loads(text)
        pids, pid_end = os.pipe()
        go, go_end = os.pipe()
        between = os.fork()
        if not between:
            pid = os.fork()
            if pid:
                os.write(pid_end, str(pid).encode())
                os._exit(0)
            server.close()
            for fd in (pids, pid_end, go_end):
                os.close(fd)
            os.read(go, 1)  # until its parent is the test's process
            os.close(go)
            _become(request, fds)
        os.waitpid(between, 0)
        server.send(os.read(pids, 16))
        for fd in (*fds, pids, pid_end, go, go_end):
            os.close(fd)


def _become(request: Mapping[str, Any], fds: Sequence[int]) -> None:
    """Be `python …`, as far as that can be told."""
    if request["starts_session"]:
        os.setsid()
    os.chdir(request["cwd"])
    for own, fd in enumerate(fds):
        os.dup2(fd, own)
    for fd in fds:
        os.close(fd)
    os.environ.clear()
    os.environ.update(request["environment"])
    first, *words = request["argv"]
    folder = os.getcwd() if first.startswith("-") else os.path.dirname(first) or "."
    paths = os.environ.get("PYTHONPATH", "").split(":")
    sys.path[:1] = [os.path.abspath(folder), *(path for path in paths if path)]
    sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    code = 1
    try:
        _run(first, words)
        code = 0
    except SystemExit as exc:
        if isinstance(exc.code, str):
            sys.stderr.write(f"{exc.code}\n")
        code = exc.code if isinstance(exc.code, int) else int(exc.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        _end(code)


def _run(first: str, words: list[str]) -> None:
    if first == "-m":
        sys.argv = words
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [first, *words]
        runpy.run_path(first, run_name="__main__")


def _end(code: int) -> None:
    """End as an interpreter does: threads, what was registered, what is unwritten."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
