"""What went wrong, and what makes two failures one."""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.specimens import HOSTILE_TEXT

from celery_resilience.failure import (
    FINGERPRINT_FRAMES,
    MAX_CAUSES,
    MAX_MESSAGE_CHARS,
    MAX_TRACEBACK_CHARS,
    Failure,
    cut_traceback,
    describe,
    failure_of,
    fingerprint,
    fingerprint_of,
    type_name,
)

LIBRARY = f"{sysconfig.get_path('purelib')}/somelib/core.py"
STDLIB = f"{sysconfig.get_path('stdlib')}/json/decoder.py"

Module = dict[str, Any]


def module(
    source: str, name: str = "shop.tasks", file: str = "/srv/shop/tasks.py"
) -> Module:
    """A module made of *source*, as if it lay in *file*."""
    namespace: Module = {"__name__": name}
    exec(compile(source, file, "exec"), namespace)  # noqa: S102 - our own source
    return namespace


def raised(function: Callable[..., Any], *args: Any) -> BaseException:
    """The exception of a call, with its traceback."""
    try:
        function(*args)
    except Exception as exc:
        return exc
    raise AssertionError("nothing was raised")


SOURCE = """
def charge(text):
    check(text)

def check(text):
    raise ValueError(text)

def refund(text):
    check(text)

def lookup(text):
    raise LookupError(text)
"""


# --- the fingerprint ------------------------------------------------------------------


def test_a_fingerprint_is_16_hex_digits() -> None:
    """It fits its column, and can be typed."""
    found = fingerprint(raised(module(SOURCE)["charge"], "x"))

    assert len(found) == 16
    assert set(found) <= set("0123456789abcdef")
    assert len(fingerprint_of("a")) == 16


def test_another_line_number_is_the_same_cause() -> None:
    """A deployment that moves code does not split a group."""
    moved = module("# a new licence\n\n\n" + SOURCE.replace("\n\n", "\n\n\n\n"))

    assert fingerprint(raised(moved["charge"], "x")) == fingerprint(
        raised(module(SOURCE)["charge"], "x")
    )


@given(st.text(), st.text())
def test_another_message_is_the_same_cause(one: str, two: str) -> None:
    """Messages hold order numbers and names."""
    charge = module(SOURCE)["charge"]

    assert fingerprint(raised(charge, one)) == fingerprint(raised(charge, two))


def test_another_host_and_folder_are_the_same_cause(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where the code lies and runs is no part of it."""
    here = fingerprint(raised(module(SOURCE)["charge"], "x"))
    monkeypatch.setattr("socket.gethostname", lambda: "elsewhere")
    monkeypatch.setenv("HOSTNAME", "elsewhere")
    there = module(SOURCE, file="/home/deploy/releases/42/shop/tasks.py")

    assert fingerprint(raised(there["charge"], "x")) == here


def test_another_type_is_another_cause() -> None:
    """The exception's qualified type counts."""
    one = module("class Error(Exception): pass\ndef f():\n raise Error")["f"]
    two = module("class Other(Exception): pass\ndef f():\n raise Other")["f"]

    assert fingerprint(raised(one)) != fingerprint(raised(two))


def test_another_function_is_another_cause() -> None:
    """The same error from another caller is another group."""
    shop = module(SOURCE)

    assert fingerprint(raised(shop["charge"], "x")) != fingerprint(
        raised(shop["refund"], "x")
    )


def test_another_module_is_another_cause() -> None:
    """Functions of the same name in two modules are two."""
    assert fingerprint(raised(module(SOURCE)["charge"], "x")) != fingerprint(
        raised(module(SOURCE, name="shop.other")["charge"], "x")
    )


CHAINS = """
class A(Exception): pass
class B(Exception): pass
class C(Exception): pass

def plain():
    raise A

def caused():
    raise A from B()

def caused_otherwise():
    raise A from C()

def in_context():
    try:
        raise B
    except B:
        raise A

def suppressed():
    try:
        raise B
    except B:
        raise A from None
"""


def test_the_cause_chain_counts() -> None:
    """A wrapper around two causes is two groups."""
    shop = module(CHAINS)
    found = {
        name: fingerprint(raised(shop[name]))
        for name in ("caused", "caused_otherwise", "in_context", "plain")
    }

    assert len(set(found.values())) == 4


def test_a_suppressed_context_does_not_count() -> None:
    """`from None` says that what came before does not matter."""
    shop = module(CHAINS.replace("def suppressed", "def f"))
    bare = module("class A(Exception): pass\ndef f():\n    raise A")

    assert fingerprint(raised(shop["f"])) == fingerprint(raised(bare["f"]))


def test_an_explicit_cause_beats_the_context() -> None:
    """`raise A from C` while B is handled is caused by C."""
    source = """
class A(Exception): pass
class B(Exception): pass
class C(Exception): pass
def f():
    try:
        raise {}
    except Exception:
        raise A from C()
"""
    one, two = (module(source.format(kind))["f"] for kind in ("B", "C"))

    assert fingerprint(raised(one)) == fingerprint(raised(two))


@pytest.mark.parametrize("link", ["__cause__", "__context__"])
def test_a_cyclic_chain_ends(link: str) -> None:
    """A chain that comes back to itself is followed once."""
    one, two = ValueError("one"), KeyError("two")
    setattr(one, link, two)
    setattr(two, link, one)

    assert len(fingerprint(one)) == 16
    assert fingerprint(one) != fingerprint(two)


def test_only_the_first_causes_count() -> None:
    """A chain of thousands costs no more than one of eight."""

    def chain(length: int, last: BaseException) -> BaseException:
        exc = last
        for _ in range(length):
            outer = ValueError()
            outer.__cause__ = exc
            exc = outer
        return exc

    beyond, within = MAX_CAUSES, MAX_CAUSES - 1
    assert fingerprint(chain(beyond, KeyError())) == fingerprint(
        chain(beyond, OSError())
    )
    assert fingerprint(chain(within, KeyError())) != fingerprint(
        chain(within, OSError())
    )
    assert fingerprint(chain(5_000, KeyError())) == fingerprint(
        chain(6_000, KeyError())
    )


def through(file: str, name: str) -> Callable[[Callable[[], Any]], Any]:
    """A function of a library that calls back."""
    found: Any = module("def call(f):\n    return f()", name=name, file=file)["call"]
    return found


FAIL = "def fail():\n    raise ValueError"


@pytest.mark.parametrize(
    ("file", "name"),
    [
        (LIBRARY, "somelib.core"),
        (STDLIB, "json.decoder"),
        ("<frozen importlib._bootstrap>", "importlib._bootstrap"),
        ("/usr/lib/python3/dist-packages/yaml/loader.py", "yaml.loader"),
        ("/opt/other/site-packages/lib/a.py", "lib.a"),
    ],
)
def test_functions_of_libraries_do_not_count(file: str, name: str) -> None:
    """An upgrade of a library does not split a group."""
    fail = module(FAIL)["fail"]

    assert fingerprint(raised(through(file, name), fail)) == fingerprint(raised(fail))


def test_a_task_that_is_installed_beside_the_libraries_is_in_app() -> None:
    """The task's own package counts wherever it lies."""
    call = through(LIBRARY, "somelib.core")
    fail = module(FAIL)["fail"]

    assert fingerprint(raised(call, fail), "somelib") != fingerprint(
        raised(call, fail), "shop"
    )
    assert fingerprint(raised(call, fail), "some") == fingerprint(raised(fail), "some")


def test_recursion_counts_once() -> None:
    """How deep a recursion went does not split a group."""
    dive = module(
        "def dive(n):\n    if n == 0:\n        raise ValueError\n    dive(n - 1)"
    )["dive"]

    assert fingerprint(raised(dive, 0)) == fingerprint(raised(dive, 1))
    assert fingerprint(raised(dive, 1)) == fingerprint(raised(dive, 90))


def test_only_the_innermost_functions_count() -> None:
    """Five of them: who calls those does not split a group."""
    names = [f"f{i}" for i in range(FINGERPRINT_FRAMES + 2)]
    source = FAIL
    for inner, name in zip(["fail", *names], names, strict=False):
        source += f"\ndef {name}():\n    {inner}()"
    shop = module(source)

    found = [fingerprint(raised(shop[name])) for name in ["fail", *names]]

    assert found[FINGERPRINT_FRAMES - 1] == found[FINGERPRINT_FRAMES]
    assert len(set(found)) == FINGERPRINT_FRAMES


def test_an_exception_without_a_traceback_has_a_fingerprint() -> None:
    """One that was made and never raised."""
    assert fingerprint(ValueError("a")) == fingerprint(ValueError("b"))
    assert fingerprint(ValueError("a")) != fingerprint(KeyError("a"))


def test_a_fingerprint_of_parts_tells_them_apart() -> None:
    """For failures that have no traceback."""
    assert fingerprint_of("a", "b") == fingerprint_of("a", "b")
    assert len({fingerprint_of(*p) for p in [("a", "b"), ("ab",), ("b", "a")]}) == 3
    assert fingerprint_of(HOSTILE_TEXT) != ""


# --- what is told of an exception -----------------------------------------------------


def test_a_type_is_named_with_its_module() -> None:
    """Built-in ones and those of a script are named alone."""

    class Local(Exception):
        pass

    assert type_name(ValueError) == "ValueError"
    assert type_name(json.JSONDecodeError) == "json.decoder.JSONDecodeError"
    assert type_name(Local).endswith(
        "test_a_type_is_named_with_its_module.<locals>.Local"
    )
    assert type_name(type("Own", (Exception,), {"__module__": "__main__"})) == "Own"


def test_a_description_is_plain_text() -> None:
    """It goes to the main process as JSON."""
    described = describe(raised(module(SOURCE)["charge"], HOSTILE_TEXT), "shop")

    assert set(described) == {"exception", "message", "fingerprint"}
    assert described["exception"] == "ValueError"
    assert "\0" not in described["message"]
    described["message"].encode()


def test_a_hostile_exception_is_described() -> None:
    """One whose text raises changes nothing."""

    class Hostile(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    assert describe(Hostile())["message"] == "<Hostile whose text raised RuntimeError>"


def test_a_long_message_is_cut() -> None:
    """Its start is kept."""
    message = describe(ValueError("x" * 1_000_000))["message"]

    assert message.startswith("x" * MAX_MESSAGE_CHARS)
    assert message.endswith(f"[{1_000_000 - MAX_MESSAGE_CHARS} characters cut]")


def test_a_failure_is_made_of_the_childs_facts() -> None:
    """And of the traceback, which the pool hands over."""
    facts = {"exception": "E", "message": "m", "fingerprint": "f", "reason": "x"}

    assert failure_of(facts, "t") == Failure("E", "m", "f", "t")


def test_a_short_traceback_is_whole() -> None:
    """Up to the limit nothing is cut."""
    text = "x" * MAX_TRACEBACK_CHARS

    assert cut_traceback(text) == text
    assert cut_traceback("") == ""


@given(st.integers(min_value=1, max_value=100_000))
def test_a_long_traceback_keeps_its_ends(excess: int) -> None:
    """Its first lines name the task, its last one the error."""
    half = MAX_TRACEBACK_CHARS // 2
    text = "a" * half + "m" * excess + "z" * half

    shown = cut_traceback(text)

    assert shown == f"{'a' * half}\n... [{excess} characters cut] ...\n{'z' * half}"


def test_a_traceback_is_storable() -> None:
    """Source lines hold whatever a programmer wrote."""
    assert cut_traceback("a\0\ud800") == "a\\x00\\ud800"


def test_mutual_recursion_counts_once() -> None:
    """A parser of two functions that call each other has one group, however deep."""
    even = module(
        "def even(n):\n    if n == 0:\n        raise ValueError\n    odd(n)\n"
        "def odd(n):\n    even(n - 1)"
    )["even"]

    assert fingerprint(raised(even, 1)) == fingerprint(raised(even, 40))


def test_a_group_of_exceptions_is_told_by_its_members() -> None:
    """asyncio.TaskGroup wraps everything in the same type."""

    def group(inner: Exception) -> BaseException:
        return raised(
            module("def f(e):\n    raise ExceptionGroup('g', [e])")["f"], inner
        )

    assert fingerprint(group(ValueError())) != fingerprint(group(OSError()))
