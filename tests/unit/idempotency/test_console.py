"""What an operator sees of keys, and may do to them."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from unit.specimens import HOSTILE_TEXT

from celery_resilience import Resilience
from celery_resilience.idempotency import console
from celery_resilience.idempotency.record import Claim, KeyState
from celery_resilience.idempotency.store import KeyStore
from celery_resilience.install import installation_of


@pytest.fixture
def app(tmp_path: Path) -> Iterator[Celery]:
    """An app whose keys are in SQLite."""
    app = Celery("shop", set_as_current=False, broker="memory://")
    app.conf.resilience_store_url = f"sqlite:///{tmp_path}/keys.sqlite3"
    Resilience(app)
    yield app
    installation_of(app)._store("backend").close()


@pytest.fixture
def store(app: Celery) -> KeyStore:
    """Its keys."""
    found: KeyStore = installation_of(app).key_store()
    return found


def remember(
    store: KeyStore, key: str, state: KeyState | None = KeyState.DONE, **facts: Any
) -> Claim:
    """A key whose run came to *state*; None: it goes on."""
    claim = Claim(
        **{
            "key": key.ljust(64, "0"),
            "name": f"charge:{key}",
            "task": "shop.charge",
            "owner": f"task-{key}",
            "token": f"token-{key}",
            "holder": "host:boot:1",
            "lease_s": 3_600.0,
            **facts,
        }
    )
    store.begin(claim)
    if state is not None:
        store.finish(claim, state, result=b"secret")
    return claim


LIST = {"state": None, "task": None, "limit": 50, "output": "table"}


def run(app: Celery, verb: str, **words: Any) -> int:
    """One verb with its defaults."""
    defaults: dict[str, Any] = {
        "list": LIST,
        "show": {"output": "text"},
        "forget": {"yes": True, "running": False},
    }
    return console.run(app, verb, {**defaults[verb], **words})


# --- list -----------------------------------------------------------------------------


def test_keys_are_listed_without_what_they_came_to(
    app: Celery, store: KeyStore, capsys: Any
) -> None:
    """Only how large that is."""
    remember(store, "a1")
    remember(store, "b2", None)

    assert run(app, "list") == 0

    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split("\t") == list(console.COLUMNS)
    done, running = sorted(line.split("\t") for line in lines)
    assert done[:2] == ["a10000000000", "done"]
    assert done[3:] == ["1", "6 B", "shop.charge", "charge:a1", "task-a1"]
    assert running[1] == "running"
    assert running[4] == "-"


def test_a_list_as_json_says_all(app: Celery, store: KeyStore, capsys: Any) -> None:
    """With whole keys and times."""
    remember(store, "a1")
    remember(store, "b2", None)

    assert run(app, "list", output="json") == 0

    done, running = sorted(
        json.loads(capsys.readouterr().out), key=lambda document: document["key"]
    )
    assert done["key"] == "a1".ljust(64, "0")
    assert (done["state"], done["result_bytes"], done["lease_until"]) == (
        *("done", 6, None),
    )
    assert running["lease_until"].endswith("+00:00")
    assert {"schema", "name", "task", "task_id", "holder", "runs"} < set(done)
    assert "secret" not in json.dumps(done)


def test_the_newest_come_first(app: Celery, store: KeyStore, capsys: Any) -> None:
    """Whatever their digits; of more than are shown, the older are left out."""
    for digits in ("b2", "a1", "c3"):
        remember(store, digits)

    assert run(app, "list", limit=2) == 0

    captured = capsys.readouterr()
    names = [line.split("\t")[6] for line in captured.out.splitlines()[1:]]
    assert names == ["charge:c3", "charge:a1"]
    assert "the newest 2 of 3" in captured.err


def test_on_a_terminal_the_columns_are_aligned(
    app: Celery, store: KeyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long a name is."""
    remember(store, "a1", task="shop.mail.to.everybody")
    remember(store, "b2")
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)

    assert run(app, "list") == 0

    head, *lines = terminal.getvalue().splitlines()
    assert all(line.index("charge:") == head.index("NAME") for line in lines)
    assert all(line.index("task-") == head.index("TASK ID") for line in lines)


class Terminal(io.StringIO):
    """What is printed to it is read by a person."""

    def isatty(self) -> bool:
        return True


def test_a_list_is_filtered_and_cut(app: Celery, store: KeyStore, capsys: Any) -> None:
    """And says that it was cut, or that nothing matches."""
    remember(store, "a1", task="shop.mail")
    remember(store, "b2", KeyState.FAILED)
    remember(store, "c3", KeyState.FAILED)

    assert run(app, "list", state="failed", limit=1) == 0
    cut = capsys.readouterr()
    assert run(app, "list", state="failed", limit=2) == 0
    whole = capsys.readouterr()
    assert run(app, "list", task="*.mail") == 0
    mail = capsys.readouterr()
    assert run(app, "list", task="none", output="json") == 0
    none = capsys.readouterr()

    assert len(cut.out.splitlines()) == 2
    assert "--limit shows more" in cut.err
    assert whole.err == ""
    assert "shop.mail" in mail.out
    assert json.loads(none.out) == []
    assert "nothing matches" in none.err


def test_an_unknown_state_is_refused(app: Celery, capsys: Any) -> None:
    """With those that there are."""
    assert run(app, "list", state="finished") == 2

    assert "retrying, done, failed, interrupted" in capsys.readouterr().err


# --- show -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "word", ["charge:a1", "a1000000", "A1000000000", "a1".ljust(64, "0")]
)
def test_a_key_is_shown_by_its_name_or_its_digits(
    app: Celery, store: KeyStore, capsys: Any, word: str
) -> None:
    """Or by the start of them."""
    remember(store, "a1")
    remember(store, "b2")

    assert run(app, "show", key=word) == 0

    out = capsys.readouterr().out
    assert "task-a1" in out
    assert "task-b2" not in out
    assert "secret" not in out


def test_a_key_as_json_is_one_document(
    app: Celery, store: KeyStore, capsys: Any
) -> None:
    """The same as in a list."""
    remember(store, "a1")

    assert run(app, "show", key="a1000000", output="json") == 0

    shown = json.loads(capsys.readouterr().out)
    assert shown == console.to_dict(next(store.list()))


def test_a_name_beats_digits(app: Celery, store: KeyStore, capsys: Any) -> None:
    """A key may be named 71000000."""
    remember(store, "a1", name="71000000")
    remember(store, "71")

    assert run(app, "show", key="71000000") == 0

    assert "task-a1" in capsys.readouterr().out


def test_a_few_digits_are_nobodys(app: Celery, store: KeyStore, capsys: Any) -> None:
    """An order's number that is forgotten already is not the start of another key."""
    remember(store, "35")

    for word in ("3", "35", "3500000"):
        assert run(app, "forget", keys=(word,)) == 1

    assert len(list(store.list())) == 1
    assert "no key '3'" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["aaaaaaaa", "same"])
def test_an_ambiguous_word_is_refused(
    app: Celery, store: KeyStore, capsys: Any, word: str
) -> None:
    """Two tasks may have keys of one name; it says which there are."""
    remember(store, "aaaaaaaa1", name="same")
    remember(store, "aaaaaaaa2", name="same", task="shop.mail")

    assert run(app, "show", key=word) == 2

    told = capsys.readouterr().err
    assert "ambiguous" in told
    assert "aaaaaaaa1000 of shop.charge, aaaaaaaa2000 of shop.mail" in told


def test_very_ambiguous_words_are_cut_short(
    app: Celery, store: KeyStore, capsys: Any
) -> None:
    """A terminal is small."""
    for number in range(7):
        remember(store, f"aaaaaaaa{number}")

    assert run(app, "show", key="aaaaaaaa") == 2

    told = capsys.readouterr().err
    assert told.count(" of shop.charge") == 5
    assert "and others" in told


@pytest.mark.parametrize("word", ["charge:none", "dead", "deaddead", "d" * 64, ""])
def test_an_unknown_key_is_not_found(
    app: Celery, store: KeyStore, capsys: Any, word: str
) -> None:
    """Exit code 1."""
    remember(store, "a1")

    assert run(app, "show", key=word) == 1

    assert "no key" in capsys.readouterr().err


@pytest.mark.parametrize("output", ["text", "json"])
def test_nothing_hostile_reaches_a_terminal(
    app: Celery, store: KeyStore, capsys: Any, output: str
) -> None:
    """A key is made of arguments, which anybody may have sent."""
    remember(store, "a1", name=HOSTILE_TEXT, task=HOSTILE_TEXT, owner=HOSTILE_TEXT)

    assert run(app, "show", key="a1000000", output=output) == 0
    assert run(app, "list", output="table" if output == "text" else output) == 0

    out = capsys.readouterr().out
    assert not set(out) & set("\x1b\0\x9b\u202e\r\u2028\x7f")


# --- forget ---------------------------------------------------------------------------


def test_keys_are_forgotten(app: Celery, store: KeyStore, capsys: Any) -> None:
    """By any word; what is not found stops nothing."""
    remember(store, "a1")
    remember(store, "b2")
    remember(store, "c3")

    assert run(app, "forget", keys=("charge:a1", "none", "b2000000", "a1000000")) == 1

    told = capsys.readouterr()
    assert "no key 'none'" in told.err
    assert "forgotten: a10000000000 charge:a1" in told.err
    assert "forgotten: b20000000000 charge:b2" in told.err
    assert [record.name for record in store.list()] == ["charge:c3"]


def test_an_ambiguous_word_forgets_nothing(
    app: Celery, store: KeyStore, capsys: Any
) -> None:
    """And the others all the same."""
    names = ["charge:aaaaaaaa1", "charge:aaaaaaaa2"]
    for key in ("aaaaaaaa1", "aaaaaaaa2", "b3"):
        remember(store, key)

    assert run(app, "forget", keys=("aaaaaaaa", "b3000000")) == 2

    assert sorted(record.name for record in store.list()) == names
    assert "ambiguous" in capsys.readouterr().err


def test_a_running_key_is_forgotten_only_if_that_is_said(
    app: Celery, store: KeyStore, capsys: Any
) -> None:
    """Its effect would happen twice."""
    claim = remember(store, "a1", None)

    assert run(app, "forget", keys=("a1000000",)) == 2
    assert "is running" in capsys.readouterr().err
    assert store.get(claim.key) is not None

    assert run(app, "forget", keys=("a1000000",), running=True) == 0
    assert store.get(claim.key) is None


class Typed(io.StringIO):
    """A terminal at which something is typed."""

    def isatty(self) -> bool:
        """It is one."""
        return True


@pytest.mark.parametrize(
    ("stdin", "is_forgotten"),
    [(Typed("2\n"), True), (Typed("1\n"), False), (io.StringIO("2\n"), False)],
    ids=["agreed", "otherwise", "no terminal"],
)
def test_who_forgets_is_asked(
    app: Celery,
    store: KeyStore,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
    stdin: io.StringIO,
    is_forgotten: bool,
) -> None:
    """And is shown what it is; without a terminal nothing is done."""
    for key in ("a1", "b2"):
        remember(store, key)
    monkeypatch.setattr(sys, "stdin", stdin)

    code = run(app, "forget", keys=("a1000000", "b2000000"), yes=False)

    assert code == (0 if is_forgotten else 2)
    assert len(list(store.list())) == (0 if is_forgotten else 2)
    told = capsys.readouterr()
    assert "charge:a1" in told.err
    assert "may happen again" in told.err
    assert ("nothing done" in told.err) is not is_forgotten


# --- the store ------------------------------------------------------------------------


def test_an_app_without_a_store_is_told(capsys: Any) -> None:
    """With the setting that gives it one."""
    app = Celery("shop", set_as_current=False, broker="amqp://")
    Resilience(app)

    assert run(app, "list") == 2

    assert "resilience_store_url" in capsys.readouterr().err


def test_a_store_that_is_away_is_told(capsys: Any) -> None:
    """Exit code 4."""
    app = Celery("shop", set_as_current=False, broker="memory://")
    app.conf.resilience_store_url = "redis://127.0.0.1:9/0"
    Resilience(app)

    assert console.run(app, "list", LIST, with_traceback=True) == 4

    told = capsys.readouterr().err
    assert "unreachable" in told
    assert "StoreUnavailable" in told


def test_ctrl_c_is_said(
    app: Celery, store: KeyStore, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its own exit code."""
    remember(store, "a1")

    class Interrupting(Typed):
        def readline(self, size: int | None = -1, /) -> str:
            raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdin", Interrupting())

    assert run(app, "forget", keys=("charge:a1",), yes=False) == 130
    assert "interrupted" in capsys.readouterr().err
