"""Deployment files whose numbers add up."""

from __future__ import annotations

import configparser
import shlex
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from celery_resilience.errors import ConfigurationError
from celery_resilience.lifecycle.command import child_mib_of
from celery_resilience.lifecycle.drain import Grace
from celery_resilience.lifecycle.units import (
    GRACE_S,
    RENDER,
    Deployment,
    Plan,
    plan,
    render,
)
from celery_resilience.settings import Settings

SHOP = Deployment(
    name="shop-worker",
    celery="/srv/shop/.venv/bin/celery",
    app="shop",
    concurrency=4,
    drain_timeout_s=60,
    child_mib=300,
    health=("", 8081),
    user="shop",
    directory="/srv/shop",
    image="registry.example/shop:2026.48",
)

LIMITS = st.none() | st.floats(1, 5_000)
DEPLOYMENTS = st.builds(
    replace,
    st.just(SHOP),
    concurrency=st.none() | st.integers(1, 64),
    drain_timeout_s=LIMITS,
    limits_s=st.dictionaries(st.sampled_from(["t.xx", "t.yy", "t.zz"]), LIMITS),
    early=st.frozensets(st.sampled_from(["t.xx", "t.yy", "t.zz"])),
    child_mib=st.none() | st.floats(1, 2_000),
    memory_mib=st.none() | st.floats(1, 50_000),
    health=st.sampled_from([None, ("", 80), ("127.0.0.1", 80), ("10.0.0.1", 80)]),
)


def refusal(deployment: Deployment, kind: str = "systemd") -> str:
    """What is said of numbers that do not add up."""
    with pytest.raises(ConfigurationError) as raised:
        plan(deployment, kind)
    return str(raised.value)


def planned(deployment: Deployment, kind: str) -> Plan | None:
    """The numbers; None where they are refused."""
    try:
        return plan(deployment, kind)
    except ConfigurationError:
        return None


@given(DEPLOYMENTS, st.sampled_from(sorted(RENDER)))
def test_what_is_printed_adds_up(deployment: Deployment, kind: str) -> None:
    """Nobody is killed before the drain's end, and no child is refused its memory."""
    numbers = planned(deployment, kind)
    if numbers is None:
        return

    assert numbers.grace_s == numbers.drain_s + GRACE_S
    assert Grace().give_up_after_s < GRACE_S
    assert deployment.concurrency is not None
    if deployment.drain_timeout_s is not None:
        assert numbers.drain_s >= deployment.drain_timeout_s
    else:
        assert all(limit <= numbers.drain_s for limit in deployment.limits_s.values())  # type: ignore[operator]
    if deployment.child_mib is not None:
        assert numbers.memory_mib is not None
        assert numbers.memory_mib >= deployment.concurrency * deployment.child_mib
    if deployment.memory_mib is not None:
        assert numbers.memory_mib is not None
        assert numbers.memory_mib <= deployment.memory_mib
    told = " ".join(numbers.warnings)
    for name in deployment.early & set(deployment.limits_s):
        limit = deployment.limits_s[name]
        assert (limit is None or limit > numbers.drain_s) == (
            "cut these off for good" in told and f" {name}" in told
        )


@pytest.mark.parametrize(
    ("changes", "kind", "said"),
    [
        (
            {"drain_timeout_s": None, "limits_s": {"a": 60, "b": None}},
            "systemd",
            "these tasks have none: b. Set resilience_drain_timeout_s",
        ),
        ({"drain_timeout_s": None}, "systemd", "the app has no task"),
        ({"concurrency": None}, "supervisor", "set worker_concurrency"),
        ({"memory_mib": 1_000}, "systemd", "--memory-mib 1000 is less than 1456 MiB"),
        ({"health": ("127.0.0.1", 80)}, "kubernetes", "resilience_health_port listens"),
        ({"image": ""}, "kubernetes", "give --image"),
        ({"name": "Shop\n[Service]"}, "systemd", "is no name for a unit"),
    ],
)
def test_what_cannot_add_up_is_refused(
    changes: dict[str, Any], kind: str, said: str
) -> None:
    """With what to change."""
    assert said in refusal(replace(SHOP, **changes), kind)


def test_everything_that_is_wrong_is_told_at_once() -> None:
    """Nobody runs a command four times."""
    said = refusal(replace(SHOP, drain_timeout_s=None, concurrency=None, name=""))

    assert said.count("; ") == 2


def test_the_longest_hard_limit_is_the_drain() -> None:
    """Where nobody has set one: it is typed once."""
    limits = {"a": 20.0, "b": 90.5}
    deployment = replace(SHOP, drain_timeout_s=None, limits_s=limits)

    assert plan(deployment, "systemd").drain_s == 91


def ini(text: str) -> configparser.ConfigParser:
    """A unit or a program."""
    parser = configparser.ConfigParser(strict=True, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(text)
    return parser


def test_a_service_of_systemd() -> None:
    """TERM for the main process only, a delay between starts and its maximum."""
    text, _ = render(SHOP, "systemd", is_collector=False)
    service = ini(text)["Service"]

    assert service["KillMode"] == "mixed"
    assert service["TimeoutStopSec"] == "75"
    assert service["MemoryMax"] == "1456M"
    assert service["Restart"] == "always"
    assert (service["RestartSec"], service["RestartMaxDelaySec"]) == ("1", "60")
    assert service["SuccessExitStatus"] == "12 75 76"
    assert "--drain-timeout-s 60 --health-port 8081" in service["ExecStart"]
    assert ini(text)["Unit"]["StartLimitIntervalSec"] == "0"


def test_systemd_reads_it(tmp_path: Path) -> None:
    """Where there is one; the restart steps came with its release 254."""
    analyze = shutil.which("systemd-analyze")
    unit = tmp_path / "shop-worker.service"
    here = replace(SHOP, celery="/bin/true", directory="/tmp", user="root")
    unit.write_text(render(here, "systemd", is_collector=False)[0])
    if analyze is not None:
        done = subprocess.run(
            [analyze, "verify", str(unit)], capture_output=True, text=True, check=False
        )
        unknown = [line for line in done.stderr.splitlines() if "Unknown" in line]
        assert all("'Restart" in line for line in unknown), done.stderr


def test_a_deployment_of_kubernetes() -> None:
    """No shell, probes that need no broker for their liveness, a limit of memory."""
    text, _ = render(SHOP, "kubernetes", is_collector=False)
    document = yaml.safe_load(text)
    pod = document["spec"]["template"]["spec"]
    (container,) = pod["containers"]

    assert pod["terminationGracePeriodSeconds"] == 75
    assert container["command"][:4] == [SHOP.celery, "-A", "shop", "worker"]
    assert all(isinstance(word, str) for word in container["command"])
    assert container["image"] == SHOP.image
    assert container["resources"]["limits"] == {"memory": "1456Mi"}
    paths = {
        name: container[name]["httpGet"]
        for name in ("startupProbe", "livenessProbe", "readinessProbe")
    }
    assert paths["livenessProbe"] == {"path": "/live", "port": 8081}
    assert paths["readinessProbe"] == {"path": "/ready", "port": 8081}


def test_a_program_of_supervisord() -> None:
    """TERM for the process, KILL for its group."""
    text, _ = render(SHOP, "supervisor", is_collector=False)
    program = ini(text)["program:shop-worker"]

    assert program["stopsignal"] == "TERM"
    assert program["stopasgroup"] == "false"
    assert program["killasgroup"] == "true"
    assert program["stopwaitsecs"] == "75"


@pytest.mark.parametrize("kind", sorted(RENDER))
def test_a_collector_has_a_unit_of_its_own(kind: str) -> None:
    """Without the worker's port, drain and memory."""
    text, _ = render(SHOP, kind, is_collector=True)

    assert "failed" in text
    assert "--health-port" not in text
    assert "livenessProbe" not in text
    assert "1456" not in text


HARD = 'a b"%h$x\\;'


def test_words_that_a_file_would_read_otherwise_are_quoted() -> None:
    """Spaces, quotes, percent and dollar signs."""
    odd = replace(SHOP, queues=HARD, app="no", image="x:1")
    command = yaml.safe_load(render(odd, "kubernetes", is_collector=False)[0])
    words = command["spec"]["template"]["spec"]["containers"][0]["command"]
    assert words[2] == "no"
    assert HARD in words

    program = ini(render(odd, "supervisor", is_collector=False)[0])
    line = program["program:shop-worker"]["command"]
    assert HARD in shlex.split(line.replace("%%", "%"))

    service = ini(render(odd, "systemd", is_collector=False)[0])["Service"]
    assert '--queues "a b\\"%%h$$x\\\\;"' in service["ExecStart"]


@pytest.mark.parametrize(
    ("limit", "recycle", "child"),
    [
        (None, None, None),
        (None, 100.0, None),
        (300.0, None, 300.0),
        (300.0, 100.0, 400.0),
        ("25%", 100.0, None),
        (300.0, "25%", None),
    ],
)
def test_a_childs_memory_follows_from_the_apps_settings(
    limit: Any, recycle: Any, child: float | None
) -> None:
    """What it may gain, and one run on top; a share is of what is asked for here."""
    settings = Settings(memory_limit_mib=limit, memory_recycle_mib=recycle)

    assert child_mib_of(settings) == child
