"""What an operator may see of a task's arguments and texts."""

from __future__ import annotations

import re
import time
import unicodedata
from collections import OrderedDict
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from unit.specimens import HOSTILE_TEXT

from celery_resilience.redaction import (
    HIDDEN_PARTS,
    HIDDEN_WORDS,
    MASK,
    MAX_DEPTH,
    MAX_ITEMS,
    MAX_TEXT_CHARS,
    MAX_VALUE_CHARS,
    MIN_SECRET_CHARS,
    cut,
    mask,
    printable,
    safe_text,
    show_arguments,
    storable,
)

#: Any text at all, lone surrogates and control characters included.
any_text = st.text(st.characters(exclude_categories=()), max_size=60)


class Hostile:
    """Raises when it is asked for its text."""

    def __str__(self) -> str:
        raise RuntimeError("no text for you")

    __repr__ = __str__


class Liar:
    """Its text is none."""

    def __str__(self) -> Any:
        return 5  # noqa: PLE0307 - that is the point

    __repr__ = __str__


class Endless:
    """Its text needs itself."""

    def __str__(self) -> str:
        return f"<{self}>"

    __repr__ = __str__


class Rude:
    """Its text is what a terminal would obey."""

    def __str__(self) -> str:
        return HOSTILE_TEXT

    __repr__ = __str__


any_scalar = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | any_text
    | st.binary(max_size=20)
    | st.builds(Hostile)
    | st.builds(Liar)
    | st.builds(Endless)
    | st.builds(Rude)
    | st.builds(object)
    | st.builds(lambda: 10**5_000)
)
any_object = st.recursive(
    any_scalar,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(any_text | st.integers(), inner, max_size=4)
        | st.frozensets(any_text, max_size=3)
    ),
    max_leaves=12,
)


def is_storable(text: str) -> bool:
    """No NUL and no lone surrogate."""
    return "\0" not in text and not any("\ud800" <= c <= "\udfff" for c in text)


def controls_of(text: str) -> set[str]:
    """What of a text a terminal would obey, or that reorders it."""
    return {
        c
        for c in text
        if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")
        or unicodedata.bidirectional(c) in ("LRE", "RLE", "PDF", "LRO", "RLO")
        or unicodedata.bidirectional(c) in ("LRI", "RLI", "FSI", "PDI")
    }


# --- texts ----------------------------------------------------------------------------


@given(any_object)
@example(HOSTILE_TEXT)
def test_safe_text_takes_every_object(value: Any) -> None:
    """It never raises, and what it gives is storable."""
    assert is_storable(safe_text(value))


def test_safe_text_of_a_hostile_object_names_it() -> None:
    """An operator sees whose text could not be had, and why."""
    assert safe_text(Hostile()) == "<Hostile whose text raised RuntimeError>"
    assert safe_text(Liar()) == "<Liar whose text raised TypeError>"
    assert safe_text(Endless()) == "<Endless whose text raised RecursionError>"


def test_safe_text_does_not_hide_the_end_of_the_process() -> None:
    """A KeyboardInterrupt while the text is made is not swallowed."""

    class Interrupted:
        def __str__(self) -> str:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        safe_text(Interrupted())


@given(any_text)
@example(HOSTILE_TEXT)
def test_storable_changes_only_what_no_database_takes(text: str) -> None:
    """The result encodes, has no NUL, and a harmless text is unchanged."""
    stored = storable(text)

    assert is_storable(stored)
    stored.encode()
    if is_storable(text):
        assert stored == text
    assert storable(stored) == stored


def test_storable_keeps_what_was_there_readable() -> None:
    """NUL and surrogates are written out, not dropped."""
    assert storable("a\0b\ud800c\udcffd") == "a\\x00b\\ud800c\\udcffd"


@given(any_text)
@example(HOSTILE_TEXT)
def test_printable_leaves_nothing_that_a_terminal_obeys(text: str) -> None:
    """No control character, no line of its own, nothing that reorders."""
    assert not controls_of(printable(text))


@given(any_text)
@example(HOSTILE_TEXT)
def test_printable_may_keep_newlines_and_nothing_else(text: str) -> None:
    """For texts of several lines, newline and tab stay."""
    shown = printable(text, keep_newlines=True)

    assert controls_of(shown) <= {"\n", "\t"}
    assert shown.count("\n") == text.count("\n")


@given(st.text(st.characters(categories=["L", "N", "P", "S", "Zs"]), max_size=60))
def test_printable_leaves_readable_text_alone(text: str) -> None:
    """Letters of every language arrive as they are."""
    assert printable(text) == text


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("\x1b[2J", "\\x1b[2J"),
        ("a\r\nb", "a\\x0d\\nb"),
        ("a\tb", "a b"),
        ("\x9b31m", "\\x9b31m"),
        ("abc\u202ecba", "abc\\x202ecba"),
        ("a\u200bb\ufeff", "a\\x200bb\\xfeff"),
    ],
)
def test_what_is_not_printable_is_written_out(raw: str, shown: str) -> None:
    """An operator sees that something was there."""
    assert printable(raw) == shown


@given(any_text, st.integers(min_value=0, max_value=40))
def test_a_cut_text_says_how_much_is_missing(text: str, limit: int) -> None:
    """A text within the limit is whole; another one keeps its start."""
    shown = cut(text, limit)

    if len(text) <= limit:
        assert shown == text
    else:
        assert shown == f"{text[:limit]}... [{len(text) - limit} characters cut]"


def test_safe_text_is_cut() -> None:
    """A huge message costs no more than its limit."""
    shown = safe_text("x" * 10_000)

    assert shown == "x" * MAX_TEXT_CHARS + "... [7952 characters cut]"
    assert safe_text("x" * 100, 10) == "x" * 10 + "... [90 characters cut]"


# --- names that are hidden ------------------------------------------------------------


@pytest.mark.parametrize("word", [*HIDDEN_PARTS, *HIDDEN_WORDS])
@pytest.mark.parametrize("shape", ["{}", "user_{}", "{}_2", "X-{}"])
def test_names_that_hold_a_hidden_word_are_masked(word: str, shape: str) -> None:
    """Any case, with dashes or underscores, as a part of the name."""
    for name in (shape.format(word), shape.format(word).upper().replace("_", "-")):
        shown = show_arguments([{name: "hunter2"}], {name: "hunter2"})

        assert "hunter2" not in f"{shown}".replace(f"{shown.secrets}", "")
        assert shown.kwargs == f"{{{name!r}: '***'}}"
        assert shown.named[name] == "'***'"
        assert shown.secrets == ("hunter2",) * 3


def test_names_that_the_task_hides_are_masked_whole_and_in_any_case() -> None:
    """`redact` compares names, it does not look for parts of them."""
    shown = show_arguments(
        [], {"Patient": "Ann Lee", "patients": "nine"}, hidden=["pATIENT"]
    )

    assert shown.kwargs == "{'Patient': '***', 'patients': 'nine'}"


def test_a_positional_secret_is_known_by_its_parameters_name() -> None:
    """`charge(order, card)` hides the second argument; others are shown."""
    shown = show_arguments(
        [7, "4111-1111", "eur", "extra"],
        {},
        parameters=("order", "card_number", "currency"),
    )

    assert shown.args == "(7, '***', 'eur', 'extra')"
    assert shown.named == {
        "order": "7",
        "card_number": "'***'",
        "currency": "'eur'",
        "3": "'extra'",
    }
    assert shown.secrets == ("4111-1111",)


def test_the_same_masking_holds_for_the_tasks_own_names() -> None:
    """A positional argument that `redact` names is hidden."""
    shown = show_arguments(["Ann Lee"], {}, parameters=("patient",), hidden=["patient"])

    assert shown.args == "('***',)"


def wrapped(value: Any, shapes: list[str]) -> Any:
    """*value* inside lists, tuples and dicts."""
    for shape in shapes:
        value = {"list": [value], "tuple": (1, value), "dict": {"inner": value}}[shape]
    return value


@given(
    st.sampled_from(["password", "API-Key", "x_token_y", "patient"]),
    st.lists(st.sampled_from(["list", "tuple", "dict"]), max_size=7),
)
def test_hidden_names_are_masked_at_any_depth(name: str, shapes: list[str]) -> None:
    """Beyond the depth limit nothing is shown at all."""
    value = wrapped({name: "hunter2"}, shapes)

    shown = show_arguments([value], {"data": value}, hidden=["patient"])

    for text in (shown.args, shown.kwargs, *shown.named.values()):
        assert "hunter2" not in text


def test_everything_below_a_hidden_name_is_secret() -> None:
    """A dict of credentials is masked as a whole, and its values are known."""
    shown = show_arguments(
        [], {"credentials": {"user": "alice", "pins": [12345, "67890"], "ok": True}}
    )

    assert shown.kwargs == "{'credentials': '***'}"
    assert shown.secrets[:3] == ("alice", "12345", "67890")
    assert "True" not in shown.secrets


def test_short_values_are_hidden_but_not_blanked_out_of_texts() -> None:
    """A secret "a" would blank out half of every message."""
    shown = show_arguments([], {"password": "a" * (MIN_SECRET_CHARS - 1)})

    assert shown.kwargs == "{'password': '***'}"
    assert shown.secrets == ()
    assert show_arguments([], {"password": "a" * MIN_SECRET_CHARS}).secrets != ()


def test_secrets_are_masked_out_of_a_message() -> None:
    """Every occurrence of every secret goes."""
    shown = show_arguments([], {"password": "hunter2", "token": "t0ken"})

    text = mask("login hunter2 failed: 'hunter2' with t0ken", shown.secrets)

    assert text == "login *** failed: '***' with ***"


@given(any_object, any_object)
def test_showing_a_call_never_raises_and_is_storable(args: Any, kwargs: Any) -> None:
    """Whatever a decoder made of a body."""
    shown = show_arguments(args, kwargs, parameters=("a", "b"))

    for text in (shown.args, shown.kwargs, *shown.named.values(), *shown.secrets):
        assert is_storable(text)


@given(st.dictionaries(any_text, any_object, max_size=4))
@example({HOSTILE_TEXT: HOSTILE_TEXT})
def test_keyword_arguments_never_bring_a_control_character(
    kwargs: dict[str, Any],
) -> None:
    """Texts among them are shown as Python writes them."""
    texts = {key: value for key, value in kwargs.items() if isinstance(value, str)}

    assert not controls_of(show_arguments([], texts).kwargs)


def test_args_look_as_they_are_called() -> None:
    """As in Python, with its comma for a single one."""
    assert show_arguments([1], {}).args == "(1,)"
    assert show_arguments((1, "a", None, 2.5, True), {}).args == (
        "(1, 'a', None, 2.5, True)"
    )
    assert show_arguments([], {}).args == "()"
    assert show_arguments([], {}).kwargs == "{}"
    assert show_arguments("oops", 7).args == "'oops'"
    assert show_arguments("oops", 7).kwargs == "7"


# --- limits ---------------------------------------------------------------------------


def test_long_values_and_texts_are_cut() -> None:
    """Each value on its own, then the whole."""
    one = show_arguments(["x" * 1_000], {}).args
    many = show_arguments(["x" * 1_000] * 15, {"a": ["y" * 250] * 15})

    assert one == f"('{'x' * MAX_VALUE_CHARS}... [744 characters cut]',)"
    assert len(many.args) < MAX_TEXT_CHARS + 40
    assert many.args.endswith("characters cut]")
    assert many.kwargs.endswith("characters cut]")


@pytest.mark.parametrize("kind", [list, tuple])
def test_only_the_first_items_are_shown(kind: type) -> None:
    """And how many more there are, at every level."""
    items = kind(range(MAX_ITEMS + 5))

    shown = show_arguments(items, {"a": items, **{f"k{i}": i for i in range(25)}})

    assert shown.args.endswith("19, ... 5 more)")
    assert "19, ... 5 more" in shown.named["a"]
    assert shown.kwargs.endswith("... 6 more}")
    assert len(shown.named) == 2 * MAX_ITEMS


def test_only_some_levels_are_shown() -> None:
    """What lies deeper is three dots."""
    deep: Any = "bottom"
    for _ in range(MAX_DEPTH + 2):
        deep = [deep]

    shown = show_arguments([deep], {}).args

    assert "bottom" not in shown
    assert shown == f"({'[' * MAX_DEPTH}...{']' * MAX_DEPTH},)"


def test_a_list_that_holds_itself_is_shown() -> None:
    """A pickled body may hold a cycle."""
    cycle: list[Any] = [1]
    cycle.append(cycle)

    assert show_arguments([cycle], {"a": cycle}).args.startswith("([1, [1, ")


@pytest.mark.parametrize(
    "value",
    [
        "x" * 50_000_000,
        list(range(2_000_000)),
        {str(i): i for i in range(300_000)},
        [[list(range(1000)) for _ in range(100)] for _ in range(100)],
        10**4_000,
        10**100_000,
    ],
    ids=["text", "list", "dict", "nested", "number", "huge number"],
)
def test_a_huge_argument_is_shown_at_once(value: Any) -> None:
    """The main process settles hundreds of deliveries a second."""
    started = time.process_time()

    shown = show_arguments([value], {"value": value})

    assert time.process_time() - started < 0.3
    assert len(shown.args) < MAX_TEXT_CHARS + 40


@given(st.text(min_size=MIN_SECRET_CHARS, max_size=30), any_text, any_text)
def test_a_masked_text_holds_no_secret(secret: str, before: str, after: str) -> None:
    """What is left of it does not hold the secret, unless the mask makes it."""
    text = mask(f"{before}{secret}{after}", [secret])

    assert MASK in text
    assert secret not in re.sub(re.escape(MASK), "\n" * 50, text) or "\n" in secret


@pytest.mark.parametrize("where", ["args", "kwargs"])
def test_hidden_names_are_masked_in_subclasses_of_dict(where: str) -> None:
    """YAML and pickle bring an OrderedDict or a defaultdict."""
    value = OrderedDict(password="hunter2")

    shown = show_arguments(*(([value], {}) if where == "args" else ([], value)))

    assert "hunter2" not in getattr(shown, where)


def test_a_secret_that_begins_with_another_is_masked_whole() -> None:
    """The longest must go first."""
    assert mask("it was pass-1234-end", ["pass", "pass-1234-end"]) == "it was ***"


def test_a_long_secret_is_masked_out_of_a_message() -> None:
    """A private key has more than 2 048 characters."""
    key = "k" * (MAX_TEXT_CHARS + 1_000)
    shown = show_arguments([], {"private_key": key})

    assert mask(f"bad key {key}", shown.secrets) == "bad key ***"


@pytest.mark.parametrize("secret", [b"hunter2", 1234.5678])
def test_secrets_that_are_no_text_are_masked_too(secret: Any) -> None:
    """Bytes and floats are quoted in messages as well."""
    shown = show_arguments([], {"password": secret})

    assert mask(f"wrong: {secret!r}", shown.secrets) != f"wrong: {secret!r}"


def test_a_secret_beyond_the_shown_items_is_masked_out_of_a_message() -> None:
    """A form of 25 fields has its password last."""
    form = {**{f"field{i}": i for i in range(MAX_ITEMS + 4)}, "password": "hunter2"}
    shown = show_arguments([form], {})

    assert mask("no such user: hunter2", shown.secrets) == "no such user: ***"


def test_a_hostile_key_is_shown() -> None:
    """A pickled mapping may have any key."""
    shown = show_arguments([], {Hostile(): 1})

    assert "Hostile" in shown.kwargs


class Counted:
    """Counts how often its text was made."""

    asked = 0

    def __repr__(self) -> str:
        Counted.asked += 1
        return "c"


def test_only_the_first_items_of_a_set_are_looked_at() -> None:
    """A set of three million costs a second otherwise; so does long bytes."""
    Counted.asked = 0

    show_arguments([{Counted() for _ in range(5_000)}], {})

    assert 0 < Counted.asked <= MAX_ITEMS


def test_a_wide_and_deep_argument_is_shown_at_once() -> None:
    """Five levels of twenty are 3 200 000 values, for a text of 2 048 characters."""
    value: Any = [Counted()] * MAX_ITEMS
    for _ in range(MAX_DEPTH - 2):
        value = [value] * MAX_ITEMS
    Counted.asked = 0

    show_arguments([value], {})

    assert 0 < Counted.asked <= 2 * MAX_TEXT_CHARS


@pytest.mark.parametrize("name", ["classname", "processname", "caliban"])
def test_an_ordinary_name_is_not_taken_for_a_secret(name: str) -> None:
    """'ssn' is in classname, and 'iban' in caliban."""
    assert show_arguments([], {name: "Order"}).kwargs == f"{{{name!r}: 'Order'}}"
