"""`make compat` fails because of us, and of nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests import compat

SUITE = compat.Suite("theirs", lambda name, version: b"", "t", ())


class Runs:
    """
    Stands for the runs of a suite.

    Args:
        plain: What becomes of each test without us.
        ours: With us, in each run.
    """

    def __init__(self, plain: Mapping[str, str], *ours: Mapping[str, str]) -> None:
        self.plain, self.ours = plain, list(ours)
        self.asked: list[Sequence[str]] = []

    def __call__(self, suite: Any, archive: bytes, *, is_resilient: bool) -> Any:
        runs = self

        class Run:
            folder = Path("nowhere")
            log = Path("nowhere.log")

            def outcomes(self, tests: Sequence[str]) -> Mapping[str, str]:
                if not is_resilient:
                    return runs.plain
                runs.asked.append(tests)
                return runs.ours.pop(0)

        return Run()


@pytest.mark.parametrize(
    ("plain", "ours", "is_good"),
    [
        ({"a": "passed"}, [{"a": "passed"}], True),
        ({"a": "failed"}, [{"a": "failed"}], True),
        ({"a": "failed"}, [{"a": "passed"}], True),
        ({"a": "passed"}, [{"a": "failed"}, {"a": "passed"}], True),
        ({"a": "passed"}, [{"a": "failed"}, {"a": "failed"}], False),
        ({"a": "passed"}, [{"a": "failed"}, {}], False),
        ({"a": "passed", "b": "passed"}, [{"a": "passed"}], False),
    ],
)
def test_only_what_fails_because_of_us_counts(
    plain: Mapping[str, str],
    ours: Sequence[Mapping[str, str]],
    is_good: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Once may be chance; a test that did not run at all is not a good one."""
    runs = Runs(plain, *ours)
    monkeypatch.setattr(compat, "Run", runs)
    monkeypatch.setattr(compat, "_node", lambda folder, name: name)

    assert compat.compare(SUITE, "1.0", b"", []) is is_good
    assert runs.asked[1:] == [["a"]] * (len(ours) - 1)


def test_a_suite_that_was_not_run_is_no_success(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is named with its reason."""

    def unpack(*_: Any) -> bytes:
        raise compat.NotFetched("no such host")

    monkeypatch.setattr(compat, "FOLDER", tmp_path / "compat")
    monkeypatch.setattr(compat, "SUITES", (SUITE,))
    monkeypatch.setattr(compat, "make_environment", lambda suite: None)
    monkeypatch.setattr(compat, "installed", lambda suite, name: "1.0")
    monkeypatch.setattr(compat, "unpack", unpack)
    monkeypatch.setattr("sys.argv", ["compat"])

    assert compat.main() == 1
    assert "theirs 1.0: not run" in capsys.readouterr().out


def test_a_test_of_a_report_can_be_run_again(tmp_path: Path) -> None:
    """JUnit names a module and a class alike."""
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "test_it.py").touch()

    assert compat._node(tmp_path, "t.test_it::test_a") == "t/test_it.py::test_a"
    assert (
        compat._node(tmp_path, "t.test_it.TestIt::test_a[x::y]")
        == "t/test_it.py::TestIt::test_a[x::y]"
    )


def test_a_failed_subtest_is_a_failed_test(tmp_path: Path) -> None:
    """JUnit has a case for each part of a test, in any order."""
    report = tmp_path / "report.xml"
    case = "<testcase classname='t.test_it' name='{}'>{}</testcase>"
    cases = [("a", ""), ("a", "<failure/>"), ("a", ""), ("b", "<skipped/>"), ("b", "")]
    lines = "".join(case.format(*words) for words in [*cases, ("c", "<skipped/>")])
    report.write_text(f"<testsuites><testsuite>{lines}</testsuite></testsuites>")

    assert compat.outcomes_of(report) == {
        "t.test_it::a": "failed",
        "t.test_it::b": "passed",
        "t.test_it::c": "skipped",
    }
