"""Deployment files whose numbers add up; policy only, and text.

Each number is typed once: the grace period follows from the drain, the drain from the
time limits, the memory of the whole from that of a child.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from celery_resilience.errors import ConfigurationError

#: Seconds beyond the drain's deadline: ten for what is cut off (`drain.py`), and as
#: many as a slow host takes to end processes.
GRACE_S = 15

#: Seconds that a collector has for its batch.
COLLECTOR_GRACE_S = 30

#: MiB of a main process and a margin, if nobody knows better.
MAIN_MIB = 256.0

#: Seconds between two starts of a worker that does not stay up: the first, the
#: longest, and how many steps lie between.
RESTART_S, RESTART_MAX_S, RESTART_STEPS = 1, 60, 6

#: What a worker that was told to end may end with; see `policy.ExitCode`.
WELL = (12, 75, 76)

#: Tasks that are named in a refusal.
NAMED = 5

LOCAL_HOSTS = frozenset({"127.0.0.1", "::1", "localhost"})


@dataclass(frozen=True, slots=True)
class Deployment:
    """
    What is known of a worker before it is deployed.

    Attributes:
        name: Of the unit.
        celery: The command `celery`, as the host knows it.
        app: After `-A`.
        concurrency: Children; None: nobody has said.
        queues: After `-Q`; "" for the app's own.
        flags: Others for the worker, in their order.
        drain_timeout_s: As it is set; None: until idle.
        limits_s: Each task's hard time limit; None where a task has none, or its pool
            enforces none.
        early: Names of the tasks that are acknowledged before they run.
        child_mib: What a child may have; None: anything.
        main_mib: What the main process has.
        memory_mib: What the whole may have; None: as much as it needs.
        health: Host, "" for every address, and port.
        user, directory: Of the process, on a host.
        image, replicas: Of the container.
    """

    name: str
    celery: str
    app: str
    concurrency: int | None = None
    queues: str = ""
    flags: tuple[str, ...] = ()
    drain_timeout_s: float | None = None
    limits_s: Mapping[str, float | None] = field(default_factory=dict)
    early: frozenset[str] = frozenset()
    child_mib: float | None = None
    main_mib: float = MAIN_MIB
    memory_mib: float | None = None
    health: tuple[str, int] | None = None
    user: str = ""
    directory: str = ""
    image: str = ""
    replicas: int = 1


@dataclass(frozen=True, slots=True)
class Plan:
    """
    The numbers of a deployment.

    Attributes:
        drain_s: The drain's deadline.
        grace_s: When the supervisor may kill.
        memory_mib: Of the whole; None: no limit.
        warnings: What adds up and may still surprise.
    """

    drain_s: int
    grace_s: int
    memory_mib: int | None
    warnings: tuple[str, ...] = ()


def plan(deployment: Deployment, kind: str) -> Plan:
    """
    The numbers of a deployment of one kind.

    Args:
        deployment: What is known.
        kind: "systemd", "kubernetes" or "supervisor".

    Raises:
        ConfigurationError: They do not add up; the message names each setting or
            option to change.
    """
    wrong: list[str] = []
    drain_s = _drain_s(deployment, wrong)
    memory_mib = _memory_mib(deployment, wrong)
    if not re.fullmatch(r"[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?", deployment.name):
        wrong.append(
            f"--name {deployment.name!r} is no name for a unit: lower case letters, "
            "digits, dots and hyphens"
        )
    if deployment.concurrency is None:
        wrong.append(
            "nobody says how many children the worker has, and Celery would take the "
            "number of cores: give --concurrency, or set worker_concurrency"
        )
    if kind == "kubernetes":
        if deployment.health is not None and deployment.health[0] in LOCAL_HOSTS:
            wrong.append(
                f"resilience_health_port listens on {deployment.health[0]}, and "
                "Kubernetes asks the pod's address: set a port alone"
            )
        if not deployment.image:
            wrong.append("a container has an image: give --image")
    if wrong:
        raise ConfigurationError("; ".join(wrong))
    cut_off = sorted(
        f"{name} ({limit:g} s)" if limit else name
        for name, limit in deployment.limits_s.items()
        if name in deployment.early and (limit is None or limit > drain_s)
    )
    warnings = []
    if cut_off:
        warnings.append(
            f"the drain of {drain_s} s may cut these off for good, since they are "
            f"acknowledged before they run: {_names(cut_off)}"
        )
    if memory_mib is None:
        warnings.append(
            "no memory limit: nobody says what a child may have (--child-memory-mib)"
        )
    return Plan(drain_s, drain_s + GRACE_S, memory_mib, tuple(warnings))


def _drain_s(deployment: Deployment, wrong: list[str]) -> int:
    if deployment.drain_timeout_s is not None:
        return math.ceil(deployment.drain_timeout_s)
    unlimited = sorted(n for n, limit in deployment.limits_s.items() if not limit)
    if unlimited or not deployment.limits_s:
        whose = f"these tasks have none: {_names(unlimited)}" if unlimited else (
            "the app has no task"
        )  # fmt: skip
        wrong.append(
            "there is no drain timeout, and no grace period follows from the hard time "
            f"limits, as {whose}. Set resilience_drain_timeout_s, or task_time_limit"
        )
        return 0
    return math.ceil(max(limit or 0 for limit in deployment.limits_s.values()))


def _memory_mib(deployment: Deployment, wrong: list[str]) -> int | None:
    whole, child = deployment.memory_mib, deployment.child_mib
    if child is None:
        return None if whole is None else math.floor(whole)
    if deployment.concurrency is None:
        return None
    needed = math.ceil(deployment.main_mib + deployment.concurrency * child)
    if whole is None:
        return needed
    if whole < needed:
        wrong.append(
            f"--memory-mib {whole:g} is less than {needed} MiB: {deployment.main_mib:g} "
            f"for the main process and {deployment.concurrency} children of {child:g}. "
            "Lower --concurrency or the children's limit"
        )
    return math.floor(whole)


def _names(names: Sequence[str]) -> str:
    shown = ", ".join(names[:NAMED])
    return f"{shown} and {len(names) - NAMED} more" if len(names) > NAMED else shown


def worker_command(deployment: Deployment, numbers: Plan) -> list[str]:
    """The words that start the worker."""
    words = [deployment.celery, "-A", deployment.app, "worker", "--loglevel", "INFO"]
    words += ["--concurrency", str(deployment.concurrency)]
    if deployment.queues:
        words += ["--queues", deployment.queues]
    words += ["--drain-timeout-s", str(numbers.drain_s)]
    if deployment.health is not None:
        host, port = deployment.health
        shown = f"[{host}]" if ":" in host else host
        words += ["--health-port", f"{shown}:{port}" if host else str(port)]
    return [*words, *deployment.flags]


def collector_command(deployment: Deployment) -> list[str]:
    """The words that start the collector."""
    return [deployment.celery, "-A", deployment.app, "failed", "collect"]


# --- the files ---------------------------------------------------------------------------


def systemd(
    deployment: Deployment, words: Sequence[str], grace_s: int, memory_mib: int | None
) -> str:
    """
    A service of systemd.

    `KillMode=mixed`: TERM for the main process, KILL for what is left at the end.

    Source: systemd.service(5), systemd.kill(5), systemd.resource-control(5); the
    restart steps since 254, which earlier ones ignore with a warning.
    """
    lines = [
        "[Unit]",
        f"Description={deployment.name}",
        "Wants=network-online.target",
        "After=network-online.target",
        "StartLimitIntervalSec=0",
        "",
        "[Service]",
        "Type=exec",
    ]
    if deployment.user:
        lines.append(f"User={deployment.user}")
    lines += [
        f"WorkingDirectory={deployment.directory}",
        f"ExecStart={' '.join(map(_systemd_word, words))}",
        "KillMode=mixed",
        "KillSignal=SIGTERM",
        f"TimeoutStopSec={grace_s}",
        "Restart=always",
        f"RestartSec={RESTART_S}",
        f"RestartSteps={RESTART_STEPS}",
        f"RestartMaxDelaySec={RESTART_MAX_S}",
        f"SuccessExitStatus={' '.join(map(str, WELL))}",
        "OOMPolicy=continue",
    ]
    if memory_mib is not None:
        lines.append(f"MemoryMax={memory_mib}M")
    lines += ["UMask=0077", "", "[Install]", "WantedBy=multi-user.target", ""]
    return "\n".join(lines)


def _systemd_word(word: str) -> str:
    escaped = word.replace("\\", "\\\\").replace("%", "%%").replace("$", "$$")
    if re.fullmatch(r"[^\s\"'\\;]+", escaped):
        return escaped
    return '"' + escaped.replace('"', '\\"') + '"'


def supervisor(
    deployment: Deployment, words: Sequence[str], grace_s: int, memory_mib: int | None
) -> str:
    """
    A program of supervisord, which knows no memory limit.

    Source: supervisord's configuration, section `[program:x]`: a start that fails is
    tried again after one second more each time.
    """
    lines = [
        f"[program:{deployment.name}]",
        f"command={shlex.join(words).replace('%', '%%')}",
        f"directory={deployment.directory.replace('%', '%%')}",
    ]
    if deployment.user:
        lines.append(f"user={deployment.user}")
    lines += [
        "stopsignal=TERM",
        "stopasgroup=false",
        "killasgroup=true",
        f"stopwaitsecs={grace_s}",
        "autorestart=true",
        "startsecs=5",
        f"startretries={RESTART_MAX_S}",
        f"exitcodes=0,{','.join(map(str, WELL))}",
        "umask=077",
        "",
    ]
    return "\n".join(lines)


def kubernetes(
    deployment: Deployment, words: Sequence[str], grace_s: int, memory_mib: int | None
) -> str:
    """
    A Deployment of Kubernetes.

    The command has no shell, which as process 1 would swallow TERM. The kubelet delays
    restarts by itself, by 10 s up to five minutes.

    Source: the API reference, `apps/v1` Deployment, `core/v1` Probe.
    """
    name = deployment.name.replace(".", "-")
    lines = [
        "apiVersion: apps/v1",
        "kind: Deployment",
        "metadata:",
        f"  name: {_yaml(name)}",
        "spec:",
        f"  replicas: {deployment.replicas}",
        "  selector:",
        f"    matchLabels: {{app: {_yaml(name)}}}",
        "  template:",
        "    metadata:",
        f"      labels: {{app: {_yaml(name)}}}",
        "    spec:",
        f"      terminationGracePeriodSeconds: {grace_s}",
        "      containers:",
        f"        - name: {_yaml(name)}",
        f"          image: {_yaml(deployment.image)}",
        f"          command: [{', '.join(map(_yaml, words))}]",
    ]
    if memory_mib is not None:
        lines += [
            "          resources:",
            f"            requests: {{memory: {memory_mib}Mi}}",
            f"            limits: {{memory: {memory_mib}Mi}}",
        ]
    if deployment.health is not None and "--health-port" in words:
        port = deployment.health[1]
        for probe, path, period_s, failures in (
            ("startupProbe", "/live", 2, 60),
            ("livenessProbe", "/live", 10, 3),
            ("readinessProbe", "/ready", 10, 1),
        ):
            lines += [
                f"          {probe}:",
                f"            httpGet: {{path: {path}, port: {port}}}",
                f"            periodSeconds: {period_s}",
                f"            failureThreshold: {failures}",
                "            timeoutSeconds: 5",
            ]
    return "\n".join([*lines, ""])


def _yaml(text: str) -> str:
    """A scalar; what is JSON is YAML too, but a bare word is read more easily."""
    if re.fullmatch(r"[A-Za-z/][A-Za-z0-9/._-]*", text) and text.lower() not in (
        *("y", "n", "yes", "no", "true", "false", "on", "off", "null"),
    ):
        return text
    return json.dumps(text, ensure_ascii=False)


RENDER = {"systemd": systemd, "supervisor": supervisor, "kubernetes": kubernetes}


def render(
    deployment: Deployment, kind: str, *, is_collector: bool
) -> tuple[str, Plan]:
    """
    The file of one kind, and the numbers in it.

    Raises:
        ConfigurationError: See `plan`.
    """
    numbers = plan(deployment, kind)
    if is_collector:
        words = collector_command(deployment)
        return RENDER[kind](deployment, words, COLLECTOR_GRACE_S, None), numbers
    words = worker_command(deployment, numbers)
    text = RENDER[kind](deployment, words, numbers.grace_s, numbers.memory_mib)
    return text, numbers
