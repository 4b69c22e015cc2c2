"""`once` in a Django project: its table by `migrate`, its key in `atomic`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from django_project import Done, Project
from sqlalchemy.engine import make_url

MODELS = """
    from django.db import models

    class Charge(models.Model):
        name = models.CharField(max_length=100)
    """

KINDS = ("sqlite", "postgresql")


class Shop:
    """A project whose database has Django's tables and that of `once`."""

    def __init__(self, folder: Path, databases: dict[str, Any]) -> None:
        self.project = Project(folder, models=MODELS)
        self._settings: dict[str, Any]
        (folder / "shop" / "migrations").mkdir()
        (folder / "shop" / "migrations" / "__init__.py").touch()
        self._settings = {"DEFAULT_AUTO_FIELD": "django.db.models.BigAutoField"}
        if databases:
            self._settings["DATABASES"] = databases
        self.manage("makemigrations", "shop")

    def manage(self, *words: str, code: int = 0) -> Done:
        """Run `manage.py …`."""
        done = self.project.manage(*words, settings=self._settings)
        assert done.returncode == code, done.stdout + done.stderr
        return done

    def answers(self, source: str) -> list[Any]:
        """What a script with the project's settings has put into `answers`."""
        begin = (
            "import json, threading\n"
            "from django.db import connection, connections, transaction\n"
            "from celery_resilience import once, purge_once\n"
            "from celery_resilience.django.models import OnceKey\n"
            "from shop.models import Charge\n"
            "answers = []\n"
        )
        script = begin + _dedent(source) + "\nprint(json.dumps(answers))\n"
        done = self.project.script(script, settings=self._settings)
        assert done.returncode == 0, done.stderr
        found: list[Any] = json.loads(done.stdout)
        return found


def _dedent(source: str) -> str:
    lines = source.strip("\n").splitlines()
    width = len(lines[0]) - len(lines[0].lstrip())
    return "\n".join(line[width:] for line in lines)


def make_shop(kind: str, request: pytest.FixtureRequest, folder: Path) -> Shop:
    """A project on an empty database of its own."""
    databases: dict[str, Any] = {}
    if kind == "postgresql":
        url = make_url(request.getfixturevalue("postgresql_url")())
        databases["default"] = {
            "ENGINE": "django.db.backends.postgresql",
            "NAME": url.database,
            "USER": url.username,
            "HOST": url.host,
            "PORT": url.port,
        }
    return Shop(folder / "project", databases)


@pytest.fixture(scope="module", params=KINDS)
def shop(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Shop:
    """A migrated project on each kind of database."""
    shop = make_shop(request.param, request, tmp_path_factory.mktemp("django"))
    shop.manage("migrate")
    return shop


@pytest.fixture(params=KINDS)
def new_shop(request: pytest.FixtureRequest, tmp_path: Path) -> Shop:
    """A project that nobody has migrated."""
    return make_shop(request.param, request, tmp_path)


def test_the_first_the_duplicate_and_the_rollback(shop: Shop) -> None:
    """With the connection, one of `connections`, or an alias."""
    answers = shop.answers(
        """
        for given in (connection, connections["default"], "default"):
            key = f"charge:{type(given)}"
            try:
                with transaction.atomic():
                    answers.append(bool(once(given, key)))
                    Charge.objects.create(name=key)
                    raise KeyError
            except KeyError:
                pass
            for _ in range(2):
                with transaction.atomic():
                    claimed = once(given, key)
                    answers.append([bool(claimed), claimed.result])
                    if claimed:
                        Charge.objects.create(name=key)
                        claimed.save({"charge": 17})
            answers.append(Charge.objects.filter(name=key).count())
        """
    )

    assert answers == [True, [True, None], [False, {"charge": 17}], 1] * 3


def test_a_duplicate_does_not_break_the_transaction(shop: Shop) -> None:
    """Also asked again in its own, in a savepoint, and after one that is undone."""
    answers = shop.answers(
        """
        with transaction.atomic():
            answers.append(bool(once(connection, "outer")))
            answers.append(bool(once(connection, "outer")))
            try:
                with transaction.atomic():
                    answers.append(bool(once(connection, "undone")))
                    raise KeyError
            except KeyError:
                pass
            with transaction.atomic():
                answers.append(bool(once(connection, "outer")))
                answers.append(bool(once(connection, "undone")))
            Charge.objects.create(name="after")
        answers.append(Charge.objects.filter(name="after").count())
        answers.append(OnceKey.objects.filter(name__in=["outer", "undone"]).count())
        answers.append(OnceKey.objects.values_list("namespace").first())
        """
    )

    assert answers == [True, False, True, False, True, 1, 2, ["shop"]]


def test_without_a_transaction_it_is_refused(shop: Shop) -> None:
    """And so is a result that comes after it; `set_autocommit(False)` is one."""
    answers = shop.answers(
        """
        def refused(call):
            try:
                call()
            except Exception as exc:
                answers.append(f"{type(exc).__name__}: {exc}")

        refused(lambda: once(connection, "alone"))
        with transaction.atomic():
            claimed = once("default", "alone")
        refused(lambda: claimed.save(1))
        refused(lambda: once(connections, "alone"))
        refused(lambda: once(Charge, "alone"))
        refused(lambda: once("unheard-of", "alone"))
        transaction.set_autocommit(False)
        answers.append(bool(once(connection, "by hand")))
        transaction.rollback()
        transaction.set_autocommit(True)
        answers.append(OnceKey.objects.filter(name="by hand").count())
        """
    )

    alone, late, handler, model, alias, *by_hand = answers
    assert alone.startswith("ConfigurationError: once: the key would be committed")
    assert "transaction.atomic(using='default')" in alone
    assert "has ended" in late
    assert "ConfigurationError: once needs" in handler
    assert "ConfigurationError: once needs" in model
    assert alias.startswith("ConnectionDoesNotExist")
    assert by_hand == [True, 0]


def test_the_waiter_takes_over_or_is_a_duplicate(shop: Shop) -> None:
    """When the first rolls back, or commits."""
    answers = shop.answers(
        """
        def claim(key, heard):
            with transaction.atomic():
                heard.append(bool(once(connection, key)))
            connection.close()

        for key in ("rolled back", "committed"):
            heard = []
            waiter = threading.Thread(target=claim, args=(key, heard))
            try:
                with transaction.atomic():
                    once(connection, key)
                    waiter.start()
                    waiter.join(0.5)
                    answers.append([waiter.is_alive(), *heard])
                    if key == "rolled back":
                        raise KeyError
            except KeyError:
                pass
            waiter.join(30)
            answers.append(heard)
        """
    )

    assert answers == [[True], [True], [True], [False]]


def test_old_keys_are_forgotten(shop: Shop) -> None:
    """By the database's clock, in batches."""
    answers = shop.answers(
        """
        from django.db.models import F
        with transaction.atomic():
            for number in range(5):
                once(connection, str(number), namespace="old")
        keys = OnceKey.objects.filter(namespace="old")
        answers.append(purge_once(connection, older_than_s=60, namespace="old"))
        keys.exclude(name="4").update(created_at=F("created_at") - 61)
        for _ in range(3):
            answers.append(
                purge_once("default", older_than_s=60, limit=3, namespace="old")
            )
        answers.append([key.name for key in keys])
        answers.append(str(keys.get()))
        """
    )

    assert answers == [0, 3, 1, 0, ["4"], "4"]


def test_migrate_makes_the_table_and_makemigrations_finds_it_complete(
    new_shop: Shop,
) -> None:
    """Before, whoever asks is told the ways to make it; and zero drops it."""
    ask = """
        try:
            with transaction.atomic():
                once(connection, "key")
        except Exception as exc:
            answers.append(str(exc))
        """
    (told,) = new_shop.answers(ask)
    assert "there is no table resilience_once" in told
    assert "`manage.py migrate`" in told

    new_shop.manage("migrate")
    assert new_shop.answers(ask) == []
    new_shop.manage("makemigrations", "--check", "--dry-run")
    new_shop.manage("check", "--fail-level", "WARNING")
    new_shop.manage("migrate", "celery_resilience", "zero")
    (told,) = new_shop.answers(ask)
    assert "there is no table resilience_once" in told


def test_a_table_of_sqlalchemys_serves_django_and_the_other_way_round(
    shop: Shop,
) -> None:
    """One service may use both."""
    answers = shop.answers(
        """
        from django.conf import settings
        from sqlalchemy import URL, create_engine

        given = settings.DATABASES["default"]
        is_sqlite = given["ENGINE"].endswith("sqlite3")
        url = URL.create(
            "sqlite" if is_sqlite else "postgresql+psycopg",
            given["USER"] or None,
            host=given["HOST"] or None,
            port=given["PORT"] or None,
            database=str(given["NAME"]),
        )
        with transaction.atomic():
            once(connection, "both").save("by Django")
        with create_engine(url).begin() as other:
            answers.append(once(other, "both").result)
        """
    )

    assert answers == ["by Django"]
