"""`make matrix` says of each cell what it has seen."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import matrix

HERE = f"{sys.version_info[0]}.{sys.version_info[1]}"


def test_an_interpreter_is_one_of_that_version(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whatever its name says: a shim may stand for another, and none is none."""
    (tmp_path / "python3.99").symlink_to(sys.executable)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    python = matrix.find_python(HERE)

    assert python is not None
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    said = subprocess.run(
        [python, "-c", code], capture_output=True, text=True, check=True
    )
    assert said.stdout.strip() == HERE
    assert matrix.find_python("3.99") is None


def test_a_missing_python_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """In each of its cells, and the command fails."""
    monkeypatch.setattr(matrix, "FOLDER", tmp_path)
    monkeypatch.setattr(
        matrix, "find_python", lambda version: None if version == "3.12" else "python"
    )
    monkeypatch.setattr(
        matrix, "run_pair", lambda *_: matrix.Result("9 passed, 1 s", True)
    )
    monkeypatch.setattr(sys, "argv", ["matrix"])

    assert matrix.main() == 1

    table = capsys.readouterr().out.split("\n\n")[1]
    assert table.count("9 passed, 1 s") == 6
    assert table.count("no Python 3.12 here") == 3


def test_a_report_is_counted(tmp_path: Path) -> None:
    """Errors are failures; a test is counted once."""
    report = tmp_path / "report.xml"
    report.write_text(
        "<testsuites><testsuite tests='9' failures='2' errors='1' skipped='3'/>"
        "</testsuites>"
    )

    assert matrix.counts(report) == "3 passed, 3 failed, 3 skipped"
