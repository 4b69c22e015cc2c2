"""The compose file brings the shop up, as far as that can be seen without an engine.

Its words are read by hand; then each of the shop's services is started as a process,
with the command, the environment and the health check of the file, in the file's order.
Only addresses and folders are the test's.
"""

from __future__ import annotations

import configparser
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen
from uuid import uuid4

import psycopg
import pytest
import yaml
from amqp.exceptions import PreconditionFailed
from kombu import Connection
from polling import eventually
from services import Service, free_port, kill_group

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "example_project"
FILE = ROOT / "docker-compose.yml"
COMPOSE: dict[str, Any] = yaml.safe_load(FILE.read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]

#: The services that run the shop's image.
SHOP = [name for name, service in SERVICES.items() if "build" in service]
SERVERS = [name for name in SERVICES if name not in SHOP]

# --- the words of the file --------------------------------------------------------------

#: What the Compose Specification knows at the top, in a service and in a health check,
#: as far as this file needs it; a misspelt word is none of these.
TOP_WORDS = {"name", "services", "volumes"}
WORDS = {
    *("build", "command", "depends_on", "environment", "healthcheck", "hostname"),
    *("image", "init", "mem_limit", "ports", "profiles", "restart"),
    *("stop_grace_period", "stop_signal", "volumes"),
}
CHECK_WORDS = {"test", "interval", "timeout", "retries", "start_period"}
CONDITIONS = {
    *("service_started", "service_healthy", "service_completed_successfully"),
}


def seconds(duration: str) -> int:
    """A duration as this file writes it: whole seconds."""
    found = re.fullmatch(r"(\d+)s", duration)
    assert found, f"{duration!r} is no duration in seconds"
    return int(found[1])


def conditions(name: str) -> dict[str, dict[str, Any]]:
    """What a service starts behind, with the condition."""
    return SERVICES[name].get("depends_on", {})


def test_every_word_is_one_of_the_specification() -> None:
    """A misspelt one would be refused, or ignored, on somebody's server."""
    assert {word for word in COMPOSE if not word.startswith("x-")} == TOP_WORDS
    for service in SERVICES.values():
        assert set(service) <= WORDS
        assert set(service["healthcheck"]) == CHECK_WORDS
        assert service["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL")
        assert set(service.get("build", {})) <= {"context", "dockerfile"}


@pytest.mark.parametrize("name", list(SERVICES))
def test_a_service_is_watched_bounded_and_started_again(name: str) -> None:
    """With a health check, a memory limit, a restart policy and time to end."""
    service = SERVICES[name]

    check = service["healthcheck"]
    assert seconds(check["timeout"]) <= seconds(check["interval"])
    assert check["retries"] >= 3
    assert seconds(check["start_period"]) >= seconds(check["timeout"])
    assert re.fullmatch(r"\d+[mg]", service["mem_limit"])
    if name == "migrate":
        assert service["restart"] == "on-failure:3"  # it ends when it has done it
    else:
        assert service["restart"] == "unless-stopped"
        assert seconds(service["stop_grace_period"]) >= 10


@pytest.mark.parametrize("name", list(SERVICES))
def test_an_image_is_pinned_to_a_major(name: str) -> None:
    """`latest`, or no tag, is another program next year."""
    name_and_tag = r"([a-z]+/)?[a-z-]+:v?[1-9]\d*(\.\d+)*(-[a-z]+)?"
    assert re.fullmatch(name_and_tag, SERVICES[name]["image"])


def test_ports_are_this_machines_own() -> None:
    """Nobody else reaches a server whose password is in a public file; none is twice."""
    published = [
        port for service in SERVICES.values() for port in service.get("ports", ())
    ]

    assert published
    for port in published:
        assert re.fullmatch(r"127\.0\.0\.1:(\d+):\1", port), port
    assert len(set(published)) == len(published)


def test_secrets_are_examples() -> None:
    """The file holds no other password than `shop`."""
    secrets = re.findall(r"PASS(?:WORD)?: (.*)", FILE.read_text())
    secrets += re.findall(r"://\w+:([^@]*)@", FILE.read_text())

    assert len(secrets) == 4
    assert set(secrets) == {"shop"}


def test_the_order_of_the_start_is_possible() -> None:
    """A service waits for what can become true, and nothing waits for itself."""

    def behind(name: str, seen: tuple[str, ...] = ()) -> None:
        assert name not in seen, f"{' → '.join(seen)} → {name}"
        for other in conditions(name):
            behind(other, (*seen, name))

    for name in SERVICES:
        behind(name)
        for other, how in conditions(name).items():
            assert how["condition"] in CONDITIONS
            is_one_shot = SERVICES[other]["restart"].startswith("on-failure")
            completed = how["condition"] == "service_completed_successfully"
            assert completed == is_one_shot, f"{name} waits for {other}"
            # A service of a profile that is off cannot be waited for.
            assert "profiles" not in SERVICES[other] or how["required"] is False


def test_whoever_uses_the_tables_starts_behind_them() -> None:
    """`--wait` takes a one-shot service for a failure unless somebody needs its end."""
    users = {
        name for name in SHOP if "SHOP_BROKER_URL" in SERVICES[name]["environment"]
    }

    for name in users - {"migrate"}:
        assert "migrate" in conditions(name)
        assert {"rabbitmq", "redis"} <= set(conditions(name))


def test_volumes_are_declared_and_used() -> None:
    """An undeclared one is refused; an unused one is somebody's lost data."""
    mounted = {
        volume.partition(":")[0]
        for service in SERVICES.values()
        for volume in service.get("volumes", ())
    }
    files = {path for path in mounted if path.startswith("./")}

    assert mounted - files == set(COMPOSE["volumes"])
    assert all((ROOT / path).is_file() for path in files)


def test_prometheus_scrapes_the_port_of_the_worker() -> None:
    """And loads the rules where they are mounted; Grafana asks that Prometheus."""
    folder = EXAMPLE / "monitoring"
    prometheus = yaml.safe_load((folder / "prometheus.yml").read_text())
    (source,) = yaml.safe_load((folder / "grafana.yml").read_text())["datasources"]

    (job,) = prometheus["scrape_configs"]
    port = re.search(r"--metrics-port (\d+)", SERVICES["worker"]["command"])
    assert port is not None
    assert job["static_configs"] == [{"targets": [f"worker:{port[1]}"]}]
    mounts = [it.split(":")[1] for it in SERVICES["prometheus"]["volumes"]]
    assert set(prometheus["rule_files"]) <= set(mounts)
    assert source["url"] == "http://prometheus:9090"


def read_by_the_shop() -> set[str]:
    """The variables that the shop's sources ask the environment for."""
    return {
        name
        for path in EXAMPLE.rglob("*.py")
        for name in re.findall(
            r'environ(?:\.get\(|\[|\.setdefault\()"(\w+)"', path.read_text()
        )
    }


def test_every_variable_is_known_to_the_shop() -> None:
    """A misspelt one would be no error, and the shop would run on files."""
    given = {variable for name in SHOP for variable in SERVICES[name]["environment"]}

    assert given <= read_by_the_shop()
    assert "SHOP_DATABASE_URL" in given


def test_what_can_be_given_from_outside_is_told() -> None:
    """Each has a default, and stands in the example's README."""
    variables = re.findall(r"\$\{(\w+)([^}]*)\}", FILE.read_text())
    readme = (EXAMPLE / "README.md").read_text()

    assert variables
    for name, rest in variables:
        assert rest.startswith(":-"), name
        assert name in readme


# --- the image --------------------------------------------------------------------------


def test_the_image_is_made_of_what_is_here() -> None:
    """From a pinned Python, from files that exist, not run by root."""
    assert {name: SERVICES[name]["build"]["context"] for name in SHOP} == dict.fromkeys(
        SHOP, "."
    )
    dockerfile = (ROOT / SERVICES["worker"]["build"]["dockerfile"]).read_text()
    copied = re.findall(r"^COPY (.*) \S+$", dockerfile, re.MULTILINE)
    allowed = (EXAMPLE / "Dockerfile.dockerignore").read_text().splitlines()

    assert all(
        re.fullmatch(r"python:3\.\d+-slim( AS \w+)?", image)
        for image in re.findall(r"^FROM (.*)$", dockerfile, re.MULTILINE)
    )
    assert copied
    for path in " ".join(copied).split():
        assert (ROOT / path).exists(), path
        assert f"!{path}" in allowed
    assert re.findall(r"^USER (.*)$", dockerfile, re.MULTILINE) == ["shop"]


def test_the_image_has_what_the_shop_needs() -> None:
    """The extras that it installs are ours, and hold each driver."""
    dockerfile = (EXAMPLE / "Dockerfile").read_text()
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    installed = re.search(r"\[([\w,]+)\]\"", dockerfile)

    assert installed is not None
    assert set(installed[1].split(",")) == {"redis", "postgres", "django"}
    assert set(installed[1].split(",")) <= set(setup["options.extras_require"])


# --- the processes ----------------------------------------------------------------------


class Up:
    """
    The shop's services as processes.

    Args:
        folder: Becomes the containers' file system: the image's folder and `/data`.
        addresses: What stands for a host and port of the file, by that.
        given: Variables from outside, as in `SHOP_BROKER_URL=… docker compose up`.
    """

    def __init__(
        self, folder: Path, addresses: Mapping[str, str], given: Mapping[str, str]
    ) -> None:
        self.folder = folder
        self.addresses = addresses
        self.given = given
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        for name in ("data", "image"):
            (folder / name).mkdir()
        shutil.copytree(
            EXAMPLE,
            folder / "image" / "example_project",
            ignore=shutil.ignore_patterns("__pycache__"),
        )

    def environment(self, name: str) -> dict[str, str]:
        """The file's for a service, and what the image has."""
        bin_folder = Path(sys.executable).parent
        values = {
            variable: self._here(str(value), name)
            for variable, value in SERVICES[name]["environment"].items()
        }
        if "SHOP_REPORT_EVERY_S" in values:
            values["SHOP_REPORT_EVERY_S"] = "1"
        return {
            "PATH": f"{bin_folder}:{os.environ['PATH']}",
            "PYTHONUNBUFFERED": "1",
            "C_FORCE_ROOT": "1",  # the image has a user of its own
            **values,
        }

    def _here(self, value: str, name: str) -> str:
        value = re.sub(
            r"\$\{(\w+):-([^}]*)\}",
            lambda found: self.given.get(found[1]) or found[2],
            value,
        )
        for there, here in self.addresses.items():
            value = value.replace(there, here)
        if value.startswith("/tmp/"):
            return str(self.folder / f"{name}-{value.removeprefix('/tmp/')}")
        return value.replace("/data", str(self.folder / "data"))

    def start(self, name: str) -> None:
        """Start a service with the command of the file."""
        with open(self.folder / f"{name}.log", "ab") as log:
            self.processes[name] = subprocess.Popen(
                shlex.split(SERVICES[name]["command"]),
                cwd=self.folder / "image",
                env=self.environment(name),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def execute(self, name: str, *words: str) -> subprocess.CompletedProcess[str]:
        """What `docker compose exec` does."""
        return subprocess.run(
            words,
            cwd=self.folder / "image",
            env=self.environment(name),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def check(self, name: str) -> subprocess.CompletedProcess[str]:
        """Run a service's health check once."""
        kind, *words = SERVICES[name]["healthcheck"]["test"]
        assert kind == "CMD"
        return self.execute(name, *words)

    def all(self) -> None:
        """Start every service of the shop, each when its conditions hold."""
        waiting = set(SHOP)
        while waiting:
            name = min(name for name in waiting if not waiting & set(conditions(name)))
            for other, how in conditions(name).items():
                if other in SHOP:
                    self._wait_for(other, how["condition"])
            self.start(name)
            waiting.remove(name)

    def _wait_for(self, name: str, condition: str) -> None:
        if condition == "service_completed_successfully":
            assert self.processes[name].wait(60) == 0, self.log(name)
            return
        self.healthy(name)

    def healthy(self, name: str) -> None:
        """Wait until a service's health check succeeds."""
        eventually(
            lambda: (
                self.check(name).returncode == 0
                or self.processes[name].poll() is not None
            ),
            what=f"{name} is well",
            every_s=0.3,
        )
        assert self.processes[name].poll() in (None, 0), self.log(name)

    def stop(self, name: str) -> int:
        """What `docker compose stop` does to a service, in the time that it has."""
        process = self.processes[name]
        process.send_signal(signal.SIGTERM)
        return process.wait(seconds(SERVICES[name]["stop_grace_period"]))

    def log(self, name: str) -> str:
        """What a service has said."""
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def call(self, task: str, *words: str) -> None:
        """Send a task as the README does."""
        done = self.execute(
            "worker",
            *("celery", "-A", "example_project.shop"),
            *("call", f"example_project.shop.tasks.{task}", *words),
        )
        assert done.returncode == 0, done.stderr

    def failed(self, *words: str) -> subprocess.CompletedProcess[str]:
        """An operator's command, as the README does it."""
        command = ("celery", "-A", "example_project.shop", "failed")
        return self.execute("worker", *command, *words)

    def address(self, words: str) -> None:
        """Make the address service ill or well, from outside."""
        (port,) = SERVICES["address"]["ports"]
        here = self.addresses[port.rpartition(":")[0].replace("127.0.0.1", "address")]
        urlopen(
            Request(f"http://{here}/state?{words}", method="POST"), timeout=5
        ).close()

    def shipped(self) -> set[int]:
        """The order lines whose parcel is under way, from the ledger."""
        ledger = self.folder / "data" / "ledger.jsonl"
        lines = ledger.read_text() if ledger.exists() else ""
        return {
            int(found[1])
            for found in re.finditer(r'"shipped", "line_no": (\d+)', lines)
        }

    def charged(self) -> list[int]:
        """The order line of each time that the bank took money, from the ledger."""
        ledger = (self.folder / "data" / "ledger.jsonl").read_text()
        return [
            int(line) for line in re.findall(r'"charged", "line_no": (\d+)', ledger)
        ]

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        """Ask the shop's database, past every command of the shop."""
        url = self.environment("worker")["SHOP_DATABASE_URL"]
        with psycopg.connect(url) as connection:
            return connection.execute(query).fetchall()

    def close(self) -> None:
        """End every process, by its pid."""
        for process in self.processes.values():
            kill_group(process)


@pytest.fixture(scope="module", params=["rabbitmq", "redis"])
def up(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    servers: Callable[[str], Service],
) -> Iterator[Up]:
    """The shop on one of its brokers, once for the tests below."""
    broker, postgres = servers(request.param), servers("postgresql")
    database = f"shop_{uuid4().hex[:12]}"
    url = postgres.url.replace("postgresql+psycopg", "postgresql")
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {database}")
    address = f"127.0.0.1:{free_port()}"
    addresses = {
        "shop:shop@rabbitmq:5672": f"guest:guest@127.0.0.1:{broker.port}",
        "redis:6379": f"127.0.0.1:{broker.port}",
        "postgres:5432/shop": f"127.0.0.1:{postgres.port}/{database}",
        **dict.fromkeys(("address:8080", "0.0.0.0:8080", "127.0.0.1:8080"), address),
    }
    given = {"SHOP_BROKER_URL": "redis://redis:6379/0"}
    shop = Up(
        tmp_path_factory.mktemp(request.param),
        addresses,
        given if request.param == "redis" else {},
    )
    try:
        shop.all()
        yield shop
    finally:
        shop.close()


#: What has nothing to do with the broker is seen on the file's own.
on_rabbitmq = pytest.mark.parametrize("up", ["rabbitmq"], indirect=True)


@on_rabbitmq
def test_every_service_becomes_healthy(up: Up) -> None:
    """By the check of the file, in the order of the file."""
    for name in SHOP:
        up.healthy(name)

    assert up.processes["migrate"].wait(10) == 0
    assert "ready." in up.log("worker")


def test_an_order_is_shipped(up: Up) -> None:
    """Enriched, charged and shipped by the worker, in PostgreSQL."""
    up.call("import_orders", "--args=[2, 2]")

    eventually(lambda: 2 in up.shipped(), what=lambda: up.log("worker"))
    assert up.rows("SELECT order_id FROM shop_shipment WHERE order_id = 2") == [(2,)]


def test_an_order_that_is_sent_twice_is_charged_once(up: Up) -> None:
    """By a bank in another container, whose ledger is the worker's too."""
    shipping = re.compile(r"tasks\.ship\[\S+\] succeeded in ")
    before = len(shipping.findall(up.log("worker")))
    for _ in range(2):
        up.call("import_orders", "--args=[5, 5]")
    up.call("import_orders", "--args=[6, 6]")

    eventually(
        lambda: len(shipping.findall(up.log("worker"))) >= before + 3,
        what=lambda: up.log("worker"),
    )
    assert up.charged().count(5) == up.charged().count(6) == 1
    rows = "SELECT order_id FROM shop_payment WHERE order_id IN (5, 6) ORDER BY 1"
    assert up.rows(rows) == [(5,), (6,)]


@on_rabbitmq
def test_beat_has_the_revenue_reported(up: Up) -> None:
    """Its schedule is a task that the worker knows."""
    up.call("import_orders", "--args=[4, 4]")

    eventually(
        lambda: (
            up.rows("SELECT 1 FROM pg_tables WHERE tablename = 'revenue'")
            and up.rows("SELECT cents FROM revenue")
        ),
        what=lambda: up.log("beat"),
    )


def test_a_failure_is_collected_and_replayed(up: Up) -> None:
    """The collector keeps it by itself; when the service is well, a replay ships it."""
    up.address("down=1")
    up.call("import_orders", "--args=[3, 3]")

    kept = (
        "SELECT state FROM resilience_failed"
        " WHERE task_id = 'line-3' AND exception LIKE '%ServiceDown'"
    )
    eventually(
        lambda: (
            up.rows("SELECT 1 FROM pg_tables WHERE tablename = 'resilience_failed'")
            and up.rows(kept) == [("unresolved",)]
        ),
        what=lambda: up.log("collector"),
        every_s=0.3,
    )
    up.address("down=0")
    done = up.failed("replay", "--exception", "ServiceDown", "--yes", "--wait")
    assert done.returncode == 0, done.stderr
    eventually(lambda: 3 in up.shipped(), what=lambda: up.log("worker"))
    assert up.rows(kept) == [("resolved",)]


@on_rabbitmq
def test_rabbitmq_has_quorum_queues(up: Up) -> None:
    """A message outlives a node."""
    url = up.environment("worker")["SHOP_BROKER_URL"]
    with Connection(url) as connection, connection.channel() as channel:
        quorum = {"durable": True, "auto_delete": False}
        channel.queue_declare("shop", arguments={"x-queue-type": "quorum"}, **quorum)
        # The broker refuses to declare a queue again as another kind.
        with pytest.raises(PreconditionFailed):
            channel.queue_declare("shop", **quorum)


@on_rabbitmq
def test_a_warm_stop_fits_the_time_limits(up: Up) -> None:
    """Compose kills what a worker still runs when the grace period is over."""
    done = up.execute(
        "worker",
        *("python", "-c"),
        "import django; django.setup(); from example_project.shop.tasks import app; "
        "print(max(t.time_limit or app.conf.task_time_limit for n, t in "
        "app.tasks.items() if not n.startswith('celery.')))",
    )

    assert done.returncode == 0, done.stderr
    assert seconds(SERVICES["worker"]["stop_grace_period"]) >= int(done.stdout) + 10


@on_rabbitmq
def test_a_health_check_sees_what_is_ill(up: Up) -> None:
    """And each service ends in time when it is told to."""
    for name in ("beat", "collector", "worker", "address"):
        code = up.stop(name)
        assert code == (0 if name in ("beat", "worker") else -signal.SIGTERM)

    for name in ("beat", "worker"):
        pulse = Path(up.environment(name)["SHOP_PULSE"])
        os.utime(pulse, (0, 0))
        assert "sign of life" in up.check(name).stderr
        pulse.unlink()
        assert up.check(name).returncode == 1
    assert up.check("address").returncode == 1
    up.addresses = {**up.addresses, "postgres:5432/shop": "127.0.0.1:1/nowhere"}
    assert up.check("collector").returncode == 4
    assert up.check("migrate").returncode != 0
