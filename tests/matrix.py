"""`make matrix`: the suite on each release of Celery and Python, as a table.

Each pair has an environment of its own under `.matrix/`, with the wheel of `dist/`. The
unit tests and `SUBSET` run there, or what is given: `make matrix MATRIX_ARGS=.` runs all
tests. A Python that is not on this machine is named in the table.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".matrix"

PYTHONS = ("3.11", "3.12", "3.13")
CELERIES = ("5.5", "5.6", "5.7")

#: Real workers on each kind of broker, in a minute or two: what becomes of a
#: delivery, and what adopting the base class changes.
SUBSET = ("unit", "integration/test_outcomes.py", "integration/test_adoption.py")

#: What Celery before 5.7 asks of redis-py 8, in the test's own process.
OF_OLD_CELERIES = ("-W", "ignore:Call to deprecated setex:DeprecationWarning")


@dataclass(frozen=True, slots=True)
class Result:
    """
    What became of one pair.

    Attributes:
        text: For the table.
        is_good: Everything passed.
    """

    text: str
    is_good: bool


def find_python(version: str) -> str | None:
    """An interpreter of *version*, from PATH, pyenv or uv; None: there is none."""
    for path in _candidates(version):
        done = subprocess.run(
            [path, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"],
            capture_output=True,
            text=True,
            check=False,
        )
        # pyenv's own python3.11 answers only where that version is chosen.
        if done.stdout.strip() == version:
            return path
    return None


def _candidates(version: str) -> Iterator[str]:
    if path := shutil.which(f"python{version}"):
        yield path
    if root := _printed("pyenv", "root"):
        for path in Path(root, "versions").glob(f"{version}.*/bin/python"):
            yield str(path)
    if path := _printed("uv", "python", "find", version):
        yield path


def _printed(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def run_pair(python: str, version: str, celery: str, words: Sequence[str]) -> Result:
    """Make the environment of a pair, and run the tests in it."""
    folder = FOLDER / f"python{version}-celery{celery}"
    began = time.monotonic()
    with open(f"{folder}.log", "w") as log:
        own = str(folder / "bin" / "python")

        def run(*command: str, **options: Path) -> int:
            return subprocess.run(
                command, stdout=log, stderr=log, check=False, **options
            ).returncode

        if not folder.exists() and (
            run(python, "-m", "venv", str(folder))
            or run(own, "-m", "pip", "install", "--upgrade", "pip")
        ):
            shutil.rmtree(folder, ignore_errors=True)
            return Result(f"no environment: see {log.name}", False)
        (wheel,) = (ROOT / "dist").glob("*.whl")
        if run(
            *(own, "-m", "pip", "install", "--group", f"{ROOT}/pyproject.toml:test"),
            *(f"{wheel}[redis,postgres]", f"celery=={celery}.*"),
        ) or run(
            own, "-m", "pip", "install", "--force-reinstall", "--no-deps", str(wheel)
        ):
            return Result(f"not installed: see {log.name}", False)
        report = Path(f"{folder}.xml")
        report.unlink(missing_ok=True)
        code = run(
            *(own, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
            *("--numprocesses", "2", "--dist", "loadfile", *OF_OLD_CELERIES),
            *(f"--junitxml={report}", *words),
            cwd=ROOT / "tests",
        )
    if not report.exists():
        return Result(f"did not run: see {log.name}", False)
    took_s = time.monotonic() - began
    return Result(f"{counts(report)}, {took_s:.0f} s", code == 0)


def counts(report: Path) -> str:
    """How many tests of a JUnit report passed, failed and were skipped."""
    suite = ElementTree.parse(report).getroot()[0]
    failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
    skipped = int(suite.get("skipped", 0))
    text = f"{int(suite.get('tests', 0)) - failed - skipped} passed"
    for number, what in ((failed, "failed"), (skipped, "skipped")):
        text += f", {number} {what}" if number else ""
    return text


def table(cell: Callable[[str, str], str]) -> Iterator[str]:
    """The lines of the table: a row for each Python, a column for each Celery."""
    rows = [("", *(f"Celery {celery}" for celery in CELERIES))]
    for version in PYTHONS:
        cells = (cell(version, celery) for celery in CELERIES)
        rows.append((f"Python {version}", *cells))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        padded = (text.ljust(w) for text, w in zip(row, widths, strict=True))
        yield "  ".join(padded).rstrip()


def main() -> int:
    """Run every pair; returns 0 where all passed on all of them."""
    parser = argparse.ArgumentParser(prog="python -m tests.matrix")
    parser.add_argument("--python", action="append", choices=PYTHONS)
    parser.add_argument("--celery", action="append", choices=CELERIES)
    chosen, words = parser.parse_known_args()
    FOLDER.mkdir(exist_ok=True)
    results: dict[tuple[str, str], Result] = {}
    for version in chosen.python or PYTHONS:
        python = find_python(version)
        for celery in chosen.celery or CELERIES:
            if python is None:
                result = Result(f"no Python {version} here", False)
            else:
                result = run_pair(python, version, celery, words or SUBSET)
            results[version, celery] = result
            print(f"Python {version}, Celery {celery}: {result.text}", flush=True)

    def cell(version: str, celery: str) -> str:
        result = results.get((version, celery))
        return result.text if result else "-"

    print("", *table(cell), sep="\n")
    return 0 if all(result.is_good for result in results.values()) else 1


if __name__ == "__main__":
    os.environ.pop("PYTHONPATH", None)
    sys.exit(main())
