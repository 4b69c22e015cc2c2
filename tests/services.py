"""Private servers for tests, the demo and the benchmarks, and one tool.

Each is an instance of its own on a free port in a temporary folder, which its
owner may kill. A server's program is looked for in the environment
(`RESILIENCE_REDIS_SERVER=/path/to/redis-server`), then on PATH and in the
folders where Debian puts it; else a container engine is asked; else, for root,
Debian's package is installed. The tool, promtool, runs in no container, and is
unpacked from its package instead of installed. `python -m tests.services redis
promtool` does that search and gets what is missing; without words, for all.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import glob
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

START_TIMEOUT_S = 90
STOP_TIMEOUT_S = 20


#: Lines of a server's log that are told when it has ended by itself.
LAST_LINES = 150


class Missing(Exception):
    """A server, or a tool, cannot be had on this machine."""


class EndedByItself(Exception):
    """A server has ended, and nobody here has ended it."""


def given_program(name: str) -> str | None:
    """The path of a program that the environment tells, or None."""
    return os.environ.get(f"RESILIENCE_{name.upper().replace('-', '_')}") or None


def free_port() -> int:
    """A port that nobody listened on a moment ago."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Service:
    """
    One private server.

    Attributes:
        name: Such as "redis".
        package: Debian's package.
        image: The container image, and the port inside it.
        programs: Programs, by name, that must be found.
        folders: Where they may be besides PATH; globs.
        gently: The signal that ends it without waiting for its clients.
    """

    name: str
    package: str
    image: tuple[str, int]
    programs: Sequence[str]
    folders: Sequence[str] = ()
    gently: signal.Signals = signal.SIGTERM

    def __init__(self) -> None:
        self.port = free_port()
        self.folder = Path(tempfile.mkdtemp(prefix=f"resilience-{self.name}-"))
        self.processes: list[subprocess.Popen[bytes]] = []
        self._container: str | None = None
        self._is_prepared = False
        self._oom_kills = 0

    # --- to be written for each server ------------------------------------------

    def command(self) -> Sequence[str]:
        """The command that runs the server in the foreground."""
        raise NotImplementedError

    def environment(self) -> dict[str, str]:
        """Variables for the command, besides the present ones."""
        return {}

    def container_environment(self) -> dict[str, str]:
        """Variables for the container."""
        return {}

    def container_command(self) -> Sequence[str]:
        """The container's command, where it is not the image's own."""
        return ()

    def prepare(self) -> None:
        """Make the data folder; called once."""

    def user(self) -> str | None:
        """The user that must run the server instead of root."""
        return None

    def is_ready(self) -> bool:
        """Whether the server answers."""
        raise NotImplementedError

    @property
    def url(self) -> str:
        """The URL for Celery or SQLAlchemy."""
        raise NotImplementedError

    # --- what tests use -------------------------------------------------------------

    @classmethod
    def program(cls, name: str) -> str | None:
        """The path of one of the server's programs, or None."""
        if path := given_program(name):
            return path
        for pattern in cls.folders:
            for path in sorted(glob.glob(f"{pattern}/{name}"), reverse=True):
                return path
        return shutil.which(name)

    @classmethod
    def is_installed(cls) -> bool:
        """Whether all its programs are on this machine."""
        return all(cls.program(name) for name in cls.programs)

    @classmethod
    def provide(cls) -> str:
        """
        Make sure that the server can be started, and say how.

        Raises:
            Missing: It cannot.
        """
        if cls.is_installed():
            return str(cls.program(cls.programs[0]))
        if has_container_engine():
            return f"container {cls.image[0]}"
        if has_packages():
            install_packages([cls.package])
            if cls.is_installed():
                return str(cls.program(cls.programs[0]))
        raise Missing(
            f"{cls.name}: no {cls.programs[0]} in the environment, on PATH or in a "
            f"container, and {cls.package} cannot be installed"
        )

    def start(self) -> None:
        """
        Start it, for the first time or again, and wait until it answers.

        Raises:
            EndedByItself: It does not, for it has ended.
        """
        self._oom_kills = oom_kills()
        if self.is_installed():
            if not self._is_prepared:
                self._own_folder()
                self.prepare()
                self._is_prepared = True
            self._spawn(self.command())
        else:
            self._start_container()
        wait_for(
            lambda: bool(self.is_ready() or self.death()),
            START_TIMEOUT_S,
            f"{self.name} on port {self.port}",
        )
        if death := self.death():
            raise EndedByItself(death)

    def death(self) -> str:
        """How it has ended, with the end of its log; "" where nothing has by itself."""
        ends = [
            f"{_program_of(process)} (pid {process.pid}) {how}"
            for process in self.processes
            if (how := described(exit_code(process)))
        ]
        if not ends:
            return ""
        log = (self.folder / "server.log").read_text(errors="replace").splitlines()
        killed = oom_kills() - self._oom_kills
        return (
            f"{self.name} on port {self.port} has ended by itself: {', '.join(ends)}; "
            f"Linux has killed {killed} processes for want of memory since its start\n"
            f"the end of its log, in {self.folder}:\n" + "\n".join(log[-LAST_LINES:])
        )

    def stop(self) -> None:
        """Stop it gently."""
        self._end(self.gently)

    def kill(self) -> None:
        """Kill it with what it was doing."""
        self._end(signal.SIGKILL)

    def freeze(self) -> None:
        """Let it keep its connections and answer nothing."""
        self._signal(signal.SIGSTOP)
        wait_for(self._is_frozen, STOP_TIMEOUT_S, f"{self.name} stands still")

    def _is_frozen(self) -> bool:
        """Each thread stops by itself, after the signal; Linux tells of each."""
        groups = {str(process.pid) for process in self.processes}
        return all(
            state in "TtZX"
            for path in Path("/proc").glob("[0-9]*/task/[0-9]*/stat")
            for state, _, group in [_state_of(path)]
            if group in groups
        )

    def thaw(self) -> None:
        """Undo `freeze`."""
        self._signal(signal.SIGCONT)

    def remove(self) -> None:
        """
        Stop it and remove its data.

        Raises:
            EndedByItself: It did not run any more; it is removed all the same.
        """
        death = self.death()
        self.thaw()
        self._end(self.gently)
        shutil.rmtree(self.folder, ignore_errors=True)
        if death:
            raise EndedByItself(death)

    def _own_folder(self) -> None:
        user = self.user()
        if user is not None:
            shutil.chown(self.folder, user)

    def _run(self, name: str, *words: str) -> None:
        """Run one of the server's programs to its end."""
        done = subprocess.run(
            [str(self.program(name)), *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            user=self.user(),
            cwd=self.folder,
            check=False,
        )
        if done.returncode != 0:
            raise EndedByItself(
                f"{name} {described(done.returncode)}; it said:\n{done.stdout}"
            )

    def _spawn(self, command: Sequence[str]) -> subprocess.Popen[bytes]:
        with open(self.folder / "server.log", "ab") as log:
            process = subprocess.Popen(
                list(command),
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                cwd=self.folder,
                env={**os.environ, **self.environment()},
                start_new_session=True,
                user=self.user(),
            )
        self.processes.append(process)
        return process

    def _signal(self, number: signal.Signals) -> None:
        if self._container is not None:
            _docker("kill", f"--signal={number.name}", self._container)
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)

    def _end(self, number: signal.Signals) -> None:
        if self._container is not None:
            _docker("rm", "--force", self._container)
            self._container = None
        for process in reversed(self.processes):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                kill_group(process)
        self.processes.clear()

    def _start_container(self) -> None:
        image, port = self.image
        variables = [f"--env={k}={v}" for k, v in self.container_environment().items()]
        self._container = _docker(
            "run",
            "--detach",
            f"--publish=127.0.0.1:{self.port}:{port}",
            *variables,
            image,
            *self.container_command(),
        ).strip()


class Redis(Service):
    """Redis that keeps what it is told over a kill."""

    name = "redis"
    package = "redis-server"
    image = ("redis:7-alpine", 6379)
    programs = ("redis-server",)

    def command(self) -> Sequence[str]:
        return [
            str(self.program("redis-server")),
            *("--port", str(self.port)),
            *("--bind", "127.0.0.1"),
            *("--dir", str(self.folder)),
            *("--appendonly", "yes"),
            *("--appendfsync", "always"),
            *("--save", ""),
        ]

    def is_ready(self) -> bool:
        with (
            contextlib.suppress(OSError),
            socket.create_connection(("127.0.0.1", self.port), 1) as sock,
        ):
            sock.sendall(b"PING\r\n")
            return sock.recv(16).startswith(b"+PONG")
        return False

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"


class RedisCluster(Redis):
    """A cluster of one Redis, which has every slot."""

    name = "redis-cluster"

    def command(self) -> Sequence[str]:
        return [*super().command(), *self._cluster_options()]

    def container_command(self) -> Sequence[str]:
        return ["redis-server", *self._cluster_options()]

    def is_ready(self) -> bool:
        return super().is_ready() and b"cluster_state:ok" in self._ask(
            "CLUSTER ADDSLOTSRANGE 0 16383\r\nCLUSTER INFO\r\n"
        )

    @property
    def url(self) -> str:
        return f"redis+cluster://127.0.0.1:{self.port}/0"

    def _cluster_options(self) -> Sequence[str]:
        return [
            *("--cluster-enabled", "yes", "--cluster-port", str(self._bus_port)),
            *("--cluster-announce-ip", "127.0.0.1"),
            *("--cluster-announce-port", str(self.port)),
        ]

    @functools.cached_property
    def _bus_port(self) -> int:
        return free_port()

    def _ask(self, words: str) -> bytes:
        with (
            contextlib.suppress(OSError),
            socket.create_connection(("127.0.0.1", self.port), 1) as sock,
        ):
            sock.sendall(words.encode())
            answer = b""
            while b"cluster_stats" not in answer and (more := sock.recv(4_096)):
                answer += more
            return answer
        return b""


class RabbitMQ(Service):
    """RabbitMQ with an epmd of its own, which ends with it."""

    name = "rabbitmq"
    package = "rabbitmq-server"
    image = ("rabbitmq:3-alpine", 5672)
    programs = ("rabbitmq-server", "epmd")
    folders = ("/usr/lib/rabbitmq/bin", "/usr/lib/erlang/erts-*/bin")

    def __init__(self) -> None:
        super().__init__()
        self.epmd_port = free_port()
        self.dist_port = free_port()

    def prepare(self) -> None:
        (self.folder / "rabbitmq.conf").write_text(
            f"listeners.tcp.1 = 127.0.0.1:{self.port}\n"
            "log.console = false\nlog.file.level = error\n"
            "vm_memory_high_watermark.relative = 0.8\n"
            "disk_free_limit.absolute = 50MB\n"
        )
        (self.folder / "plugins").write_text("[].\n")

    def environment(self) -> dict[str, str]:
        folder = str(self.folder)
        return {
            "HOME": folder,
            "ERL_EPMD_PORT": str(self.epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": f"resilience{self.port}@localhost",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_DIST_PORT": str(self.dist_port),
            "RABBITMQ_CONFIG_FILE": f"{folder}/rabbitmq",
            "RABBITMQ_CONF_ENV_FILE": f"{folder}/none",
            "RABBITMQ_ENABLED_PLUGINS_FILE": f"{folder}/plugins",
            "RABBITMQ_MNESIA_BASE": f"{folder}/mnesia",
            "RABBITMQ_LOG_BASE": f"{folder}/log",
            "RABBITMQ_PID_FILE": f"{folder}/pid",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface "
            # Idle, it does not look for work.
            "{127,0,0,1} +S 2:2 +sbwt none +sbwtdcpu none +sbwtdio none",
        }

    def command(self) -> Sequence[str]:
        self._spawn([str(self.program("epmd")), "-port", str(self.epmd_port)])
        return [str(self.program("rabbitmq-server"))]

    def is_ready(self) -> bool:
        with (
            contextlib.suppress(OSError),
            socket.create_connection(("127.0.0.1", self.port), 1) as sock,
        ):
            sock.sendall(b"AMQP\x00\x00\x09\x01")
            sock.settimeout(2)
            return sock.recv(1) == b"\x01"
        return False

    @property
    def url(self) -> str:
        return f"amqp://guest:guest@127.0.0.1:{self.port}//"


class PostgreSQL(Service):
    """PostgreSQL with one database and no password."""

    name = "postgresql"
    package = "postgresql"
    image = ("postgres:16-alpine", 5432)
    programs = ("postgres", "initdb")
    folders = ("/usr/lib/postgresql/*/bin",)
    gently = signal.SIGINT  # SIGTERM waits for clients to leave

    def user(self) -> str | None:
        if os.geteuid() != 0:
            return None
        with contextlib.suppress(KeyError):
            return pwd.getpwnam("postgres").pw_name
        return "nobody"

    def prepare(self) -> None:
        self._run(
            "initdb",
            *("--pgdata", f"{self.folder}/data"),
            *("--username", "shop"),
            "--auth=trust",
            "--encoding=UTF8",
            "--no-sync",
        )

    def command(self) -> Sequence[str]:
        return [
            str(self.program("postgres")),
            *("-D", f"{self.folder}/data"),
            *("-p", str(self.port)),
            *("-c", "listen_addresses=127.0.0.1"),
            *("-c", f"unix_socket_directories={self.folder}"),
        ]

    def kill(self) -> None:
        """
        Kill it with its backends, which lead groups of their own.

        One that outlived it would do what its client asks for, until it notices.
        """
        # Stopped, it starts none and reaps none: each pid stays its backend's.
        self.freeze()
        backends = [pid for p in self.processes for pid in children_of(p.pid)]
        for backend in backends:
            os.kill(backend, signal.SIGKILL)
        super().kill()
        # It does not start beside one that still has its shared memory.
        wait_for(
            lambda: all(
                _state_of(Path(f"/proc/{backend}/stat"))[0] in "ZX"
                for backend in backends
            ),
            STOP_TIMEOUT_S,
            "the backends have ended",
        )

    def container_environment(self) -> dict[str, str]:
        return {"POSTGRES_USER": "shop", "POSTGRES_HOST_AUTH_METHOD": "trust"}

    def is_ready(self) -> bool:
        # A server that still starts answers with an error, "E"; one that is
        # ready asks for nothing more, "R".
        body = b"\x00\x03\x00\x00user\x00shop\x00database\x00postgres\x00\x00"
        with (
            contextlib.suppress(OSError),
            socket.create_connection(("127.0.0.1", self.port), 1) as sock,
        ):
            sock.settimeout(2)
            sock.sendall((len(body) + 4).to_bytes(4, "big") + body)
            return sock.recv(1) == b"R"
        return False

    @property
    def url(self) -> str:
        return f"postgresql+psycopg://shop@127.0.0.1:{self.port}/postgres"


class MariaDB(Service):
    """
    MariaDB with one database and no password.

    Its defaults are the laxest there are, so that what holds here is what our own
    sessions ask for: no strict mode, Latin-1, another time zone than UTC.
    """

    name = "mariadb"
    package = "mariadb-server"
    image = ("mariadb:10.11", 3306)
    programs = ("mariadbd", "mariadb-install-db")
    folders = ("/usr/sbin", "/usr/bin")
    lax = (
        "--sql-mode=",
        "--character-set-server=latin1",
        "--default-time-zone=+05:00",
        "--max-allowed-packet=4M",
    )

    def user(self) -> str | None:
        if os.geteuid() != 0:
            return None
        with contextlib.suppress(KeyError):
            return pwd.getpwnam("mysql").pw_name
        return "nobody"

    def prepare(self) -> None:
        self._run(
            "mariadb-install-db",
            "--no-defaults",
            f"--datadir={self.folder}/data",
            f"--tmpdir={self.folder}",
            "--auth-root-authentication-method=normal",
            "--skip-name-resolve",
            "--innodb-log-file-size=8M",
            "--innodb-buffer-pool-size=8M",
            "--innodb-flush-method=nosync",
        )

    def command(self) -> Sequence[str]:
        return [
            str(self.program("mariadbd")),
            "--no-defaults",
            f"--datadir={self.folder}/data",
            # One that starts deletes every temporary table there, also another
            # server's, which may then end in the middle of a DESCRIBE.
            f"--tmpdir={self.folder}",
            f"--port={self.port}",
            "--bind-address=127.0.0.1",
            f"--socket={self.folder}/socket",
            f"--pid-file={self.folder}/pid",
            "--skip-name-resolve",
            "--innodb-buffer-pool-size=32M",
            # Written at each commit, which outlives a kill of the process.
            "--innodb-flush-log-at-trx-commit=2",
            "--innodb-fast-shutdown=2",
            *self.lax,
        ]

    def container_environment(self) -> dict[str, str]:
        return {"MARIADB_ALLOW_EMPTY_ROOT_PASSWORD": "1", "MARIADB_DATABASE": "test"}

    def is_ready(self) -> bool:
        # One that is ready greets with protocol 10.
        with (
            contextlib.suppress(OSError),
            socket.create_connection(("127.0.0.1", self.port), 1) as sock,
        ):
            sock.settimeout(2)
            return sock.recv(5)[4:] == b"\x0a"
        return False

    @property
    def url(self) -> str:
        return f"mysql+pymysql://root@127.0.0.1:{self.port}/test"


SERVICES: dict[str, type[Service]] = {
    service.name: service
    for service in (Redis, RedisCluster, RabbitMQ, PostgreSQL, MariaDB)
}


@contextlib.contextmanager
def running(name: str) -> Iterator[Service]:
    """
    A private server for the length of a block.

    Raises:
        Missing: It cannot be had here.
    """
    SERVICES[name].provide()
    service = SERVICES[name]()
    try:
        service.start()
        yield service
    finally:
        service.remove()


def exit_code(process: subprocess.Popen[Any]) -> int | None:
    """
    What `process.poll()` returns, but the process is not reaped.

    Its pid, which may be its group's, is nobody else's until `kill_group`.
    """
    if process.returncode is not None:
        return process.returncode
    options = os.WEXITED | os.WNOHANG | os.WNOWAIT
    status = os.waitid(os.P_PID, process.pid, options)
    if status is None:
        return None
    has_exited = status.si_code == os.CLD_EXITED
    return status.si_status if has_exited else -status.si_status


def _program_of(process: subprocess.Popen[bytes]) -> str:
    words = process.args
    return Path(str(words[0] if isinstance(words, list) else words)).name


def described(code: int | None) -> str:
    """How a process ended, in words; "" where it has not."""
    if code is None:
        return ""
    if code >= 0:
        return f"exited with {code}"
    return f"was ended by {signal.Signals(-code).name}"


def kill_group(process: subprocess.Popen[Any]) -> None:
    """
    Kill a process that leads a group with what is left of the group.

    Not where the process is reaped already: Linux may have given its pid to another,
    and with the pid the group.
    """
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def oom_kills() -> int:
    """How many processes Linux has killed for want of memory since it started."""
    found = re.search(
        r"^oom_kill (\d+)$", Path("/proc/vmstat").read_text(), re.MULTILINE
    )
    return int(found[1]) if found else 0


def children_of(parent: int) -> list[int]:
    """The pids of a process's children."""
    return [
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/stat")
        if _state_of(path)[1] == str(parent)
    ]


def _state_of(stat: Path) -> list[str]:
    """State, parent and process group of a thread (proc(5))."""
    with contextlib.suppress(OSError):
        return stat.read_text().rpartition(")")[2].split()[:3]
    return ["X", "", ""]  # it has ended


def wait_for(holds: Callable[[], bool], within_s: float, what: str) -> None:
    """Poll until *holds*; raises TimeoutError naming *what*."""
    end = time.monotonic() + within_s
    while not holds():
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {within_s} s")
        time.sleep(0.05)


@functools.cache
def has_container_engine() -> bool:
    """Whether a container engine runs, not only its client."""
    if shutil.which("docker") is None:
        return False
    done = subprocess.run(["docker", "info"], capture_output=True, check=False)
    return done.returncode == 0


def has_packages() -> bool:
    """Whether Debian's packages can be installed here."""
    return os.geteuid() == 0 and shutil.which("apt-get") is not None


def install_packages(packages: Sequence[str]) -> None:
    """Install Debian packages without starting their services."""
    _run_for_package("apt-get", "-qq", "update")
    install = ("install", "--no-install-recommends", "--yes", *packages)
    _run_for_package("apt-get", "-qq", *install)


def unpack_program(package: str, path: str, into: Path) -> None:
    """
    Put one program of a Debian package into a folder, and install nothing.

    Args:
        path: Of the program, in the package.
    """
    into.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=into) as folder:
        _run_for_package("apt-get", "-qq", "update")
        _run_for_package("apt-get", "-qq", "download", package, cwd=folder)
        for deb in Path(folder).glob("*.deb"):
            _run_for_package("dpkg-deb", "-x", str(deb), folder)
        try:
            # Whoever unpacks it at the same time finds none of it or all.
            os.replace(Path(folder, path), into / Path(path).name)
        except FileNotFoundError as exc:
            raise Missing(f"no {path} in the package {package}") from exc


def _run_for_package(*command: str, cwd: str | None = None) -> None:
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=cwd, check=False
    )
    if done.returncode != 0:
        raise Missing(f"{' '.join(command)}: {done.stderr.strip()[-500:]}")


def provide_promtool() -> str:
    """
    Make sure that Prometheus's checker of rules can be run, and return its path.

    Raises:
        Missing: It cannot.
    """
    if path := given_program("promtool") or shutil.which("promtool"):
        return path
    unpacked = cache_folder() / "promtool"
    if not unpacked.exists():
        if not has_packages():
            raise Missing(
                "promtool: neither in the environment nor on PATH, and Debian's "
                "prometheus cannot be unpacked"
            )
        try:
            unpack_program("prometheus", "usr/bin/promtool", unpacked.parent)
        except Missing as exc:
            raise Missing(f"promtool: {exc}") from exc
    return str(unpacked)


def cache_folder() -> Path:
    """Where programs are kept that were unpacked."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches, "celery-resilience")


def _docker(*words: str) -> str:
    return subprocess.run(
        ["docker", *words], check=True, capture_output=True, text=True
    ).stdout


#: How each server, and the tool, is made sure of; by name.
PROVIDERS: dict[str, Callable[[], str]] = {
    **{name: service.provide for name, service in SERVICES.items()},
    "promtool": provide_promtool,
}


def main() -> int:
    """Look for servers and the tool, get what is missing, and say what was found."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("names", nargs="*", default=list(PROVIDERS))
    missing = 0
    for name in parser.parse_args().names:
        try:
            print(f"{name}: {PROVIDERS[name]()}")
        except Missing as exc:
            print(f"missing {exc}", file=sys.stderr)
            missing += 1
    return 1 if missing and os.environ.get("CI") == "true" else 0


if __name__ == "__main__":
    sys.exit(main())
