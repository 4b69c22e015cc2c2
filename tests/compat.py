"""`make compat`: the tests of others, on plain Celery and with every task resilient.

Their suites are fetched at the tag of the release that is installed: Celery's from its
source distribution, celery-batches' from its repository. Each runs twice at once, in an
environment of its own under `.compat/`, on a Redis of its own. The command fails where a test
fails with celery-resilience, also when it is run again, that passes without.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO
from urllib.request import urlopen
from xml.etree import ElementTree

from tests import services

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".compat"

#: Seconds of one file, and of one test that does not end.
FILE_TIMEOUT_S = 1_800
TEST_TIMEOUT_S = 120

#: Put beside a suite's folder `t`, where it beats every plugin. Celery's own marks run
#: a test six times, and wait five minutes for each. Where a test is run again at once,
#: nothing bounds it but the first time.
PLAIN = f"""pytest_plugins = ["celery.contrib.pytest"]

import pytest


def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.timeout({TEST_TIMEOUT_S}), append=False)
        item.add_marker(pytest.mark.flaky(reruns=0), append=False)
"""
RESILIENT = (
    PLAIN
    + '''

from pathlib import Path

from celery.contrib.testing.worker import test_worker_started

from celery_resilience import Resilience
from celery_resilience.delivery.consumer import ResilientConsumer


@pytest.fixture(scope="session")
def celery_parameters():
    """Every task without a base of its own is resilient."""
    return {"task_cls": "celery_resilience:ResilientTask"}


@pytest.fixture
def celery_app(celery_app):
    """Also where every task has a base of its own."""
    Resilience(celery_app)
    return celery_app


@test_worker_started.connect(weak=False)
def tell(consumer, **_):
    """Or Celery would be compared with itself."""
    if isinstance(consumer, ResilientConsumer):
        Path("a-worker-was-resilient").touch()
'''
)
PROOF = "a-worker-was-resilient"


class NotFetched(Exception):
    """A suite could not be had."""


def source_distribution(name: str, version: str) -> bytes:
    """The archive of a release, from the package index."""
    with TemporaryDirectory() as folder:
        done = _pip(
            sys.executable,
            "download",
            "--no-deps",
            "--no-binary=:all:",
            f"{name}=={version}",
            "--dest",
            folder,
        )
        if done.returncode != 0:
            raise NotFetched(done.stderr.strip().splitlines()[-1])
        (path,) = Path(folder).iterdir()
        return path.read_bytes()


def repository(url: str) -> Callable[[str, str], bytes]:
    """The archive of a release's tag, from its repository."""

    def fetch(name: str, version: str) -> bytes:
        try:
            with urlopen(f"{url}/archive/refs/tags/v{version}.tar.gz") as answer:
                return bytes(answer.read())
        except OSError as exc:
            raise NotFetched(f"{url}: {exc}") from exc

    return fetch


@dataclass(frozen=True, slots=True)
class Suite:
    """
    The tests of others.

    Attributes:
        name: Of the distribution.
        fetch: Gets the archive of a version, a tar file.
        tests: What pytest is given.
        needs: What the tests import, and the distribution itself.
        is_on_redis: Else on the broker in memory, where they are not flaky.
    """

    name: str
    fetch: Callable[[str, str], bytes]
    tests: str
    needs: Sequence[str]
    is_on_redis: bool = True

    @property
    def python(self) -> str:
        """Of its own environment: a suite may not allow the newest Celery."""
        return str(FOLDER / f"{self.name}-environment" / "bin" / "python")


NEEDS = ("pytest", "pytest-rerunfailures", "pytest-timeout")

SUITES = (
    Suite(
        "celery",
        source_distribution,
        "t/integration",
        (
            "celery[auth,django,pydantic,pymemcache,redis,sqlalchemy]",
            *("freezegun", "pytest-click", "pytest-order", "pytest-subtests"),
            "requests",
        ),
    ),
    Suite(
        "celery-batches",
        repository("https://github.com/clokep/celery-batches"),
        "t",
        ("celery[redis]", "celery-batches"),
        is_on_redis=False,
    ),
)


def make_environment(suite: Suite) -> None:
    """Install the wheel of `dist/`, and what the suite needs."""
    if not Path(suite.python).exists():
        subprocess.run(
            [sys.executable, "-m", "venv", suite.python.rpartition("/bin/")[0]],
            check=True,
        )
    (wheel,) = (ROOT / "dist").glob("*.whl")
    for words in (
        ("--upgrade", "pip"),
        (*NEEDS, *suite.needs, f"{wheel}[redis]"),
        ("--force-reinstall", "--no-deps", str(wheel)),
    ):
        done = _pip(suite.python, "install", *words)
        if done.returncode != 0:
            raise SystemExit(done.stderr)


def installed(suite: Suite, name: str) -> str:
    """The version of a distribution in a suite's environment."""
    code = f"from importlib.metadata import version; print(version({name!r}))"
    return subprocess.run(
        [suite.python, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def unpack(suite: Suite, version: str, archives: Path | None) -> bytes:
    """The suite's archive: from a folder of archives, or fetched."""
    path = archives and archives / f"{suite.name}-{version}.tar.gz"
    return (
        path.read_bytes()
        if path and path.exists()
        else suite.fetch(suite.name, version)
    )


class Run:
    """
    One run of a suite.

    Args:
        suite: The tests.
        archive: Of which its folder `t` is taken, and not the library beside it.
        is_resilient: False: on plain Celery.
    """

    def __init__(self, suite: Suite, archive: bytes, *, is_resilient: bool) -> None:
        self.suite = suite
        self.is_resilient = is_resilient
        kind = "resilient" if is_resilient else "plain"
        self.folder = FOLDER / f"{suite.name}-{kind}"
        self.log = Path(f"{self.folder}.log")
        shutil.rmtree(self.folder, ignore_errors=True)
        self.log.unlink(missing_ok=True)
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            for member in tar.getmembers():
                _, _, member.name = member.name.partition("/")
                if member.name.startswith(("t/", "pyproject.toml", "setup.cfg")):
                    tar.extract(member, self.folder, filter="data")
        conftest = RESILIENT if is_resilient else PLAIN
        (self.folder / "conftest.py").write_text(conftest)
        configured = [self.folder / name for name in ("pyproject.toml", "setup.cfg")]
        if not any(
            "pytest" in path.read_text() for path in configured if path.exists()
        ):
            # Or pytest would find the configuration of the folder above.
            (self.folder / "pytest.ini").write_text("[pytest]\n")

    def outcomes(self, tests: Sequence[str]) -> Mapping[str, str]:
        """
        Run *tests*; returns what became of each, "passed", "failed" or "skipped".

        Each file has a process of its own: one test that is cut off spoils the worker
        that the others of its process share.

        Raises:
            RuntimeError: They did not run on a resilient worker.
        """
        found: dict[str, str] = {}
        files: dict[str, list[str]] = {}
        for test in tests:
            for word in self._in_files(test):
                files.setdefault(word.partition("::")[0], []).append(word)
        with services.running("redis") as redis, self.log.open("ab") as log:
            for file, words in files.items():
                found |= self._run(file, words, redis, log)
        if self.is_resilient and not (self.folder / PROOF).exists():
            raise RuntimeError(f"{self.folder.name}: no worker was resilient")
        return found

    def _in_files(self, test: str) -> list[str]:
        if not (self.folder / test).is_dir():
            return [test]
        paths = sorted((self.folder / test).rglob("test_*.py"))
        return [str(path.relative_to(self.folder)) for path in paths]

    def _run(
        self, file: str, words: Sequence[str], redis: services.Service, log: IO[bytes]
    ) -> dict[str, str]:
        report = Path(f"{self.folder}.xml")
        report.unlink(missing_ok=True)
        programs = Path(self.suite.python).parent
        process = subprocess.Popen(
            [
                *(self.suite.python, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
                *(f"--timeout={TEST_TIMEOUT_S}", f"--junitxml={report}", *words),
            ],
            cwd=self.folder,
            env={
                **os.environ,
                **(redis_environment(redis) if self.suite.is_on_redis else {}),
                "C_FORCE_ROOT": "1",
                "PATH": f"{programs}:{os.environ['PATH']}",
            },
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            with contextlib.suppress(TimeoutError):
                services.wait_for(
                    lambda: services.exit_code(process) is not None,
                    FILE_TIMEOUT_S,
                    f"{file} ends",
                )
        finally:
            # With the workers that it has left behind.
            services.kill_group(process)
        if not report.exists():
            return {f"{file}::did not end": "failed"}
        return outcomes_of(report)


def redis_environment(redis: services.Service) -> dict[str, str]:
    """What tells a suite where its Redis is."""
    return {
        "TEST_BROKER": redis.url,
        "TEST_BACKEND": redis.url,
        "REDIS_PORT": str(redis.port),
    }


def outcomes_of(report: Path) -> dict[str, str]:
    """What became of each test of a JUnit report; one with a failed subtest failed."""
    found: dict[str, str] = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        name = f"{case.get('classname', '')}::{case.get('name', '')}"
        if case.find("failure") is not None or case.find("error") is not None:
            found[name] = "failed"
        elif case.find("skipped") is not None:
            found.setdefault(name, "skipped")
        elif found.get(name) != "failed":
            found[name] = "passed"
    return found


def _node(folder: Path, name: str) -> str:
    """pytest's word for a test of a JUnit report."""
    module, _, test = name.partition("::")
    parts, classes = module.split("."), []
    while not folder.joinpath(*parts).with_suffix(".py").exists():
        classes.insert(0, parts.pop())
    return "::".join((f"{'/'.join(parts)}.py", *classes, test))


def compare(suite: Suite, version: str, archive: bytes, words: Sequence[str]) -> bool:
    """Run a suite both ways and print what became of it; returns whether ours is good."""
    plain, ours = (
        Run(suite, archive, is_resilient=is_resilient) for is_resilient in (False, True)
    )
    tests = words or [suite.tests]
    with ThreadPoolExecutor(2) as pool:
        without, with_us = pool.map(lambda run: run.outcomes(tests), (plain, ours))
    worse = [
        name
        for name, outcome in with_us.items()
        if outcome == "failed" and without.get(name) == "passed"
    ]
    if worse:
        again = ours.outcomes([_node(ours.folder, name) for name in worse])
        print(f"{len(worse)} failed with us only, and were run again:")
        for name in worse:
            print(f"  {again.get(name, 'failed')}: {name}")
        with_us = {**with_us, **again}
    both = sorted(
        name
        for name, outcome in with_us.items()
        if outcome == without.get(name) == "failed"
    )
    if both:
        print(f"{len(both)} failed on plain Celery, too:")
        for name in both:
            print(f"  {name}")
    missing = len(without.keys() - with_us.keys())
    for what, outcomes in (("plain", without), ("resilient", with_us)):
        counts = Counter(outcomes.values())
        print(
            f"{suite.name} {version:8} {what:10} {counts['passed']:5} passed "
            f"{counts['failed']:5} failed {counts['skipped']:5} skipped"
        )
    if missing:
        print(f"{missing} tests did not run with us: see {ours.log}")
    return not missing and not any(with_us[name] == "failed" for name in worse)


def main() -> int:
    """Compare every suite; returns 0 where each ran, and nothing fails because of us."""
    parser = argparse.ArgumentParser(prog="python -m tests.compat")
    parser.add_argument(
        "--suite",
        action="append",
        choices=[suite.name for suite in SUITES],
        help="one of them; else all",
    )
    parser.add_argument(
        "--archives",
        type=Path,
        metavar="FOLDER",
        help="a folder with NAME-VERSION.tar.gz, for a host that cannot fetch them",
    )
    chosen, words = parser.parse_known_args()
    FOLDER.mkdir(exist_ok=True)
    is_good = True
    for suite in SUITES:
        if chosen.suite and suite.name not in chosen.suite:
            continue
        make_environment(suite)
        version = installed(suite, suite.name)
        print(f"{suite.name} {version} on Celery {installed(suite, 'celery')}")
        try:
            archive = unpack(suite, version, chosen.archives)
        except NotFetched as exc:
            print(f"{suite.name} {version}: not run, for it cannot be fetched: {exc}")
            is_good = False
            continue
        is_good &= compare(suite, version, archive, words)
    return 0 if is_good else 1


def _pip(python: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [python, "-m", "pip", "--quiet", *words],
        capture_output=True,
        text=True,
        check=False,
    )


if __name__ == "__main__":
    sys.exit(main())
