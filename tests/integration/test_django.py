"""A Django project finds its commands, its settings and its transactions as it knows them."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from django_project import APP, SETTINGS, Done, Project, ended
from polling import eventually

import celery_resilience.command

VERBS = celery_resilience.command.failed.commands

#: A store that does not answer.
NO_STORE = {
    "CELERY_RESILIENCE_STORE_URL": "postgresql+psycopg://nobody@127.0.0.1:1/none"
}

Shop = tuple[Project, list[str]]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    """A project with three failed tasks, which these tests only look at; and their ids."""
    project = Project(tmp_path_factory.mktemp("looked-at") / "project")
    with project.worker():
        fail(project, 3)
    return project, listed(project)


def fail(project: Project, count: int) -> None:
    """Send tasks that fail for want of an address, and wait until they have."""
    sent = project.script(
        f"""
        from shop.tasks import ship
        for number in range({count}):
            ship.delay(number)
        """
    )
    assert sent.returncode == 0, sent.stderr
    eventually(lambda: project.failed_messages() == count, what="they have failed")


def listed(project: Project) -> list[str]:
    """The ids that `failed_tasks list` shows."""
    done = project.manage("failed_tasks", "list", "-o", "ids")
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


# --- the same as `celery failed` --------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "settings"),
    [
        ((), 2, {}),
        (("list",), 0, {}),
        (("list", "-o", "jsonl", "--arg", "number=1"), 0, {}),
        (("show", "ID", "unheard-of", "-v"), 1, {}),
        (("stats", "--check", "unresolved>2", "-o", "text"), 5, {}),
        (("replay", "--all"), 2, {}),
        (("list",), 4, NO_STORE),
    ],
)
def test_it_says_and_does_what_celery_failed_does(
    shop: Shop, words: tuple[str, ...], code: int, settings: dict[str, Any]
) -> None:
    """The same words, the same answer on the same stream, the same exit code."""
    project, ids = shop
    words = tuple(ids[0] if word == "ID" else word for word in words)
    both = [
        project.start(*start, *words, settings=settings)
        for start in (
            ("manage.py", "failed_tasks"),
            ("-m", "celery", "-A", "shop", "failed"),
        )
    ]
    django, celery = map(ended, both)

    assert django.returncode == celery.returncode == code, django.stderr
    assert without_age(django.stdout) == without_age(celery.stdout)
    if words:  # without any, each shows its own help
        assert talk(django) == talk(celery)
    assert django.stdout or django.stderr


def without_age(text: str) -> str:
    """What is printed, without the line that depends on the second."""
    return "".join(
        line for line in text.splitlines(True) if not line.startswith("oldest")
    )


def talk(done: Done) -> str:
    """What is said, without who is told to say it and whose help there is."""
    text = done.stderr.replace("manage.py failed_tasks", "python -m celery failed")
    return "".join(
        line for line in text.splitlines(True) if not line.startswith("Try ")
    )


def test_a_failed_task_is_discarded_reopened_and_replayed(tmp_path: Path) -> None:
    """From the first look to the parcel, with a real worker, by `manage.py` alone."""
    project = Project(tmp_path / "project")

    def failed_tasks(*words: str) -> Done:
        done = project.manage("failed_tasks", *words)
        assert done.returncode == 0, done.stderr
        return done

    with project.worker():
        fail(project, 1)
        failed_tasks("collect", "--once")
        assert project.failed_messages() == 0
        assert "1 discarded" in failed_tasks("discard", "--all", "--yes").stderr
        reopen = failed_tasks("reopen", "--task", "shop.*", "--yes")
        assert "1 reopened" in reopen.stderr

        (project.folder / "address").write_text("12 Canal Street")
        replay = failed_tasks("replay", "--all", "--yes", "--wait")
        assert "1 resolved" in replay.stderr

    assert (project.folder / "shipped").read_text() == "0 to 12 Canal Street\n"


def test_ctrl_c_ends_a_collector_with_130(shop: Shop) -> None:
    """As it ends `celery failed collect`."""
    project, _ = shop
    collecting = project.start("manage.py", "failed_tasks", "collect")
    assert collecting.stderr is not None
    said = collecting.stderr.readline()
    collecting.send_signal(signal.SIGINT)
    done = ended(collecting)

    assert said == "collecting; Ctrl-C ends it\n"
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


@pytest.mark.parametrize(
    "command",
    [("manage.py", "failed_tasks"), ("-m", "celery", "-A", "shop", "failed")],
)
def test_a_reader_that_has_gone_is_no_error(
    shop: Shop, command: tuple[str, ...]
) -> None:
    """`| head -1` is quiet, also where everything fits into one buffer."""
    project, _ = shop
    read_end, write_end = os.pipe()
    os.close(read_end)
    listing = project.start(*command, "list", stdout=write_end)
    os.close(write_end)
    done = ended(listing)

    assert done.stderr == ""
    assert done.returncode == 1


# --- as a Django user knows commands ----------------------------------------------------


def test_help_is_found_where_a_django_user_looks(shop: Shop) -> None:
    """The list of commands, the command's verbs, a verb's words and Django's options."""
    project, _ = shop
    running = [
        project.start("manage.py", *words)
        for words in (
            ("help",),
            ("help", "failed_tasks"),
            ("failed_tasks", "--help"),
            ("failed_tasks", "list", "-h"),
        )
    ]
    commands, *whole, verb = map(ended, running)

    assert "    failed_tasks\n" in commands.stdout
    for told in whole:
        assert told.returncode == 0
        assert "Usage: manage.py failed_tasks [OPTIONS] COMMAND" in told.stdout
        for name in VERBS:
            assert f"\n  {name} " in told.stdout
    assert verb.returncode == 0
    assert "Usage: manage.py failed_tasks list [OPTIONS]" in verb.stdout
    for option in (
        *("--since", "--output", "--app", "--settings", "--pythonpath"),
        *("--traceback", "--verbosity", "--no-color", "--help"),
    ):
        assert option in verb.stdout


@pytest.mark.parametrize(
    "words",
    [
        ("--settings", "elsewhere.settings", "--pythonpath", "PATH", "list"),
        ("list", "--settings=elsewhere.settings", "--pythonpath=PATH"),
    ],
)
def test_settings_and_pythonpath_may_stand_on_both_sides_of_the_verb(
    shop: Shop, words: tuple[str, ...], tmp_path: Path
) -> None:
    """As Django takes them anywhere; the settings decide which tasks there are."""
    project, _ = shop
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "settings.py").write_text(
        "from shop.settings import *\n"
        f"CELERY_RESILIENCE_STORE_URL = 'sqlite:///{tmp_path}/empty.sqlite3'\n"
    )
    done = project.manage(
        "failed_tasks", *(word.replace("PATH", str(tmp_path)) for word in words)
    )

    assert (done.returncode, done.stderr) == (0, "nothing matches\n")


def test_traceback_shows_where_a_refusal_comes_from(shop: Shop) -> None:
    """With --traceback before or after the verb, and only with it."""
    project, _ = shop
    options = ("--traceback", "--no-color", "--verbosity", "2")
    running = [
        project.start("manage.py", "failed_tasks", *words, settings=NO_STORE)
        for words in (("list",), (*options, "list"), ("list", *options))
    ]
    not_asked, *asked = map(ended, running)

    assert not_asked.returncode == 4
    assert "Traceback" not in not_asked.stderr
    for done in asked:
        assert done.returncode == 4
        assert "Traceback (most recent call last)" in done.stderr
        assert "StoreUnavailable" in done.stderr
        assert done.stderr.endswith(not_asked.stderr)


def test_a_broken_urlconf_does_not_hide_failures(shop: Shop) -> None:
    """No system check is run before a verb, not by Celery either."""
    project, ids = shop
    done = project.manage(
        *("failed_tasks", "list", "-o", "ids"),
        settings={"ROOT_URLCONF": "shop.not_there"},
    )

    assert done.stdout.split() == ids, done.stderr


def test_call_command_writes_where_it_is_told_to(shop: Shop) -> None:
    """Data to *stdout*, talk to *stderr*, and a CommandError with the exit code."""
    project, ids = shop
    done = project.script(
        """
        import io, json
        from django.core.management import CommandError, call_command
        from shop.celery import app

        def call(*words, **options):
            out, err = io.StringIO(), io.StringIO()
            code = 0
            try:
                call_command("failed_tasks", *words, stdout=out, stderr=err, **options)
            except CommandError as exc:
                code = exc.returncode
            return out.getvalue(), err.getvalue(), code

        answers = [
            call("list", "-o", "json"),
            call("list", "--limit", 1, "-o", "ids", app="shop.celery"),
            call("list", "-o", "ids", app=app, no_color=True),
            call("show", "unheard-of"),
            call("lst"),
        ]
        call_command("failed_tasks", "list", "--limit", "1", "-o", "ids")
        print(json.dumps(answers))
        """
    )
    assert done.returncode == 0, done.stderr
    printed, answers = done.stdout.splitlines()
    documents, one, same, missing, misspelt = json.loads(answers)

    assert [found["id"] for found in json.loads(documents[0])] == ids
    assert documents[1:] == ["", 0]
    assert one == [f"{ids[0]}\n", "", 0]
    assert same[0].split() == ids
    assert missing[0] == ""
    assert "unheard-of" in missing[1]
    assert missing[2] == 1
    assert "No such command 'lst'" in misspelt[1]
    assert misspelt[2] == 2
    assert printed == ids[0]
    assert done.stderr == ""


# --- which app ----------------------------------------------------------------------


def test_a_project_that_imports_no_app_is_told_what_to_write(tmp_path: Path) -> None:
    """And `--app` names it meanwhile; a verb's help needs none."""
    project = Project(tmp_path / "project", __init__="")
    running = [
        project.start("manage.py", "failed_tasks", *words)
        for words in (
            ("list",),
            ("list", "--help"),
            ("--app", "shop.celery", "list"),
            ("list", "--app", "shop"),
            ("-A", "shop.selery", "list"),
        )
    ]
    refused, helped, before, after, misspelt = map(ended, running)

    assert refused.returncode == 2
    assert "no Celery app: shop.celery is there, but nothing" in refused.stderr
    assert "shop/__init__.py" in refused.stderr
    assert "    from .celery import app as celery_app\n" in refused.stderr
    assert "manage.py failed_tasks --app shop.celery VERB" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert helped.returncode == 0
    assert "Usage:" in helped.stdout
    for named in (before, after):
        assert (named.returncode, named.stderr) == (0, "nothing matches\n")
    assert misspelt.returncode == 2
    assert "--app shop.selery: " in misspelt.stderr
    assert "Traceback" not in misspelt.stderr

    (project.folder / "shop" / "celery.py").unlink()
    none_at_all = project.manage("failed_tasks", "list")
    assert none_at_all.returncode == 2
    assert "no Celery app: make one in shop/celery.py" in none_at_all.stderr


# --- settings -----------------------------------------------------------------------


@pytest.mark.parametrize("namespace", ["CELERY", "SHOP_QUEUE", None])
def test_settings_have_the_apps_namespace(
    tmp_path: Path, namespace: str | None
) -> None:
    """They are read, and a misspelt one is told as the user wrote it, with a guess."""
    prefix = f"{namespace}_" if namespace else ""
    project = Project(
        tmp_path / "project",
        celery=APP.replace('"CELERY"', repr(namespace)),
        settings=SETTINGS.replace("CELERY_", prefix),
    )
    wrong = f"{prefix}RESILIENCE_STOR_URL"
    running = [
        project.start("manage.py", "failed_tasks", "list", settings=settings)
        for settings in ({}, {wrong: "sqlite:///elsewhere"})
    ]
    read, refused = map(ended, running)

    assert (read.returncode, read.stderr) == (0, "nothing matches\n")
    assert (project.folder / "failed.sqlite3").exists()
    assert refused.returncode == 2
    assert refused.stderr == (
        f"unknown setting {wrong}, did you mean {prefix}RESILIENCE_STORE_URL?\n"
    )


# --- transactions -------------------------------------------------------------------

IMPORTS = """
    from celery import Task, shared_task
    from celery.contrib.django.task import DjangoTask
    from celery_resilience import ResilientTask
    from shop.celery import app
    """

FOR_ALL = {"app_task": "@app.task", "shared": "@shared_task"}

#: How the base class comes to an app's tasks: arguments of the app, a line after
#: it, and tasks that Celery's DjangoTask would have given `delay_on_commit`.
ADOPTIONS: dict[str, tuple[str, str, dict[str, str]]] = {
    "base": (
        "",
        "",
        {
            "app_task": "@app.task(base=ResilientTask)",
            "shared": "@shared_task(base=ResilientTask)",
            "mixed": "@app.task(base=Mixed)",
            "mixed_behind": "@shared_task(base=MixedBehind)",
        },
    ),
    "task_cls": (', task_cls="celery_resilience:ResilientTask"', "", FOR_ALL),
    "app.Task": (
        "",
        "from celery_resilience import ResilientTask; app.Task = ResilientTask",
        FOR_ALL,
    ),
}

#: The user's own base class, before ours and behind it.
OWN = """
    told = []

    class Own(DjangoTask):
        abstract = True

        def delay(self, *args, **kwargs):
            told.append("delay")
            return super().delay(*args, **kwargs)

        def apply_async_on_commit(self, *args, **kwargs):
            told.append("apply_async_on_commit")
            return super().apply_async_on_commit(*args, **kwargs)

    class Mixed(ResilientTask, Own):
        abstract = True

    class MixedBehind(Own, ResilientTask):
        abstract = True
    """

#: What each task sends: before a commit, at it, at a rollback, without a transaction.
SEND = """
    import json
    from django.conf import settings
    from django.db import transaction
    from celery_resilience import ResilientTask
    from shop import tasks

    def sent():
        return sum(1 for _ in (settings.FOLDER / "queue").glob("*.msg"))

    def counts(send):
        seen = [sent()]
        with transaction.atomic():
            send()
            seen.append(sent())
        seen.append(sent())
        try:
            with transaction.atomic():
                send()
                raise RuntimeError
        except RuntimeError:
            seen.append(sent())
        send()
        seen.append(sent())
        return [after - before for before, after in zip(seen, seen[1:])]

    answers = {}
    for name in tasks.NAMES:
        task = getattr(tasks, name)
        assert isinstance(task, ResilientTask), type(task).__mro__
        tasks.told.clear()
        answers[name] = [
            counts(lambda: task.delay_on_commit(1)),
            counts(lambda: task.apply_async_on_commit((1,), countdown=60)),
            list(tasks.told),
        ]
    print(json.dumps(answers))
    """


@pytest.mark.parametrize("how", ADOPTIONS)
def test_a_task_is_sent_on_commit_and_not_after_a_rollback(
    tmp_path: Path, how: str
) -> None:
    """As Celery's DjangoTask does it, and through a base class of the user's own."""
    arguments, line, tasks = ADOPTIONS[how]
    bodies = "".join(
        f"{decorator}\ndef {name}(number): ...\n" for name, decorator in tasks.items()
    )
    project = Project(
        tmp_path / "project",
        celery=f"{dedent(APP)}\n{line}".replace(
            'Celery("shop"', f'Celery("shop"{arguments}'
        ),
        tasks=f"{dedent(IMPORTS + OWN)}\n{bodies}\nNAMES = {[*tasks]}",
    )
    done = project.script(SEND)
    assert done.returncode == 0, done.stderr

    for name, (delayed, applied, told) in json.loads(done.stdout).items():
        assert delayed == applied == [0, 1, 0, 1]
        is_own = name.startswith("mixed")
        assert told.count("delay") == (2 if is_own else 0)
        assert told.count("apply_async_on_commit") == (3 if is_own else 0)


def test_sending_on_commit_without_django_is_told_with_the_extra(
    tmp_path: Path,
) -> None:
    """Not as an ImportError of Celery's."""
    project = Project(tmp_path / "project")
    done = project.python(
        "-c",
        "import sys; sys.modules['django'] = None\n"
        "from celery import Celery\n"
        "from celery_resilience import ResilientTask\n"
        "app = Celery('shop', broker='memory://')\n"
        "@app.task(base=ResilientTask)\n"
        "def ship(): ...\n"
        "ship.delay_on_commit()\n",
    )

    assert "MissingExtra: delay_on_commit needs Django" in done.stderr
    assert "pip install 'celery-resilience[django]'" in done.stderr
