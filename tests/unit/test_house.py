"""The rules of the house, enforced over the source and over a fresh interpreter."""

from __future__ import annotations

import ast
import configparser
import inspect
import re
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

import celery_resilience

PACKAGE = Path(celery_resilience.__path__[0])
ROOT = Path(__file__).parents[2]

FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {str(path.relative_to(PACKAGE)): ast.parse(path.read_text()) for path in FILES}

#: Every sub-package is a room. `stores/` holds engines, one for each kind of
#: store, and may be imported by the adapters of the other rooms.
ROOMS = {name.split("/")[0] for name in TREES if "/" in name}
ENGINES = "stores"
ADAPTERS = {"sql_store.py", "sql_table.py", "redis_store.py"}

#: Who knows rooms at all, besides themselves.
INSTALLERS = {"__init__.py", "command.py", "install.py", "worker.py"}

#: Where the package meets Celery.
MEETING = {
    *("request.py", "consumer.py", "settlement.py", "settling.py", "bootstep.py"),
    *("task.py", "signals.py", "command.py", "install.py", "worker.py", "flags.py"),
    *(
        "errors.py",
        "publisher.py",
        "serialization.py",
        "_celery.py",
        "_celery_run.py",
        "_celery_worker.py",
        "_pools.py",
        "_kombu.py",
        "_kombu_redis.py",
    ),
}
CELERY = {"celery", "kombu", "billiard", "amqp", "vine"}

#: Where undocumented names are wrapped.
WRAPPERS = {"_celery.py", "_celery_run.py", "_celery_worker.py"}
WRAPPERS |= {"_pools.py", "_kombu.py", "_kombu_redis.py"}

#: Optional libraries, and the words of a file's name that stand for each.
OPTIONAL = {
    "redis": ("redis",),
    "django": ("django",),
    "psycopg": ("psycopg", "postgresql"),
    "sentry_sdk": ("sentry",),
    "opentelemetry": ("opentelemetry",),
    "prometheus_client": ("prometheus",),
    "pymysql": ("pymysql", "mysql"),
    "gevent": ("gevent",),
    "psutil": ("psutil",),
    "eventlet": ("eventlet",),
    "structlog": ("structlog",),
    "pythonjsonlogger": ("pythonjsonlogger",),
    "ecs_logging": ("ecs_logging",),
}


def imports_of(tree: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """The modules that a file imports, wherever in it, relative ones spelt out."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide which room is meant"
            yield str(node.module), node
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node


def room_of(module: str) -> str | None:
    """The room that a module belongs to."""
    parts = module.split(".")
    if parts[0] == "celery_resilience" and len(parts) > 1 and parts[1] in ROOMS:
        return parts[1]
    return None


def run_python(source: str) -> str:
    """What a fresh interpreter prints; it does not look into the present folder."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(source)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# --- rooms ----------------------------------------------------------------------------


def test_there_are_rooms() -> None:
    """These tests look at something."""
    assert {"delivery", "failed", "crashes", "telemetry", "stores"} <= ROOMS
    assert len(TREES) > 40


@pytest.mark.parametrize("name", [name for name in TREES if "/" in name])
def test_rooms_never_import_rooms(name: str) -> None:
    """Except that an adapter, by its name, imports the engine of its store."""
    own = name.split("/")[0]
    for module, _ in imports_of(TREES[name]):
        other = room_of(module)
        if other is None or other == own:
            continue
        assert other == ENGINES, f"{name} imports {module}"
        assert Path(name).name in ADAPTERS, f"{name} is no adapter: {module}"


@pytest.mark.parametrize("name", [name for name in TREES if "/" not in name])
def test_only_the_installers_know_rooms(name: str) -> None:
    """What rooms share is beside them, and knows none of them."""
    typing_only = _typing_only(TREES[name])

    known = {
        room_of(module)
        for module, node in imports_of(TREES[name])
        if node not in typing_only
    } - {None}
    assert name in INSTALLERS or not known, f"{name} imports {known}"


def _typing_only(tree: ast.AST) -> set[ast.AST]:
    """What is imported for the type checker alone."""
    return {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If)
        and isinstance(node.test, ast.Name)
        and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }


# --- Celery ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(TREES))
def test_celery_is_met_in_the_meeting_files_only(name: str) -> None:
    """Everything else can be read and tested without it."""
    met = {m for m, _ in imports_of(TREES[name]) if m.split(".")[0] in CELERY}
    if Path(name).name not in MEETING:
        assert not met, f"{name} imports {met}"


@pytest.mark.parametrize("name", [n for n in TREES if Path(n).name not in WRAPPERS])
def test_undocumented_names_are_used_in_one_place(name: str) -> None:
    """No private name of Celery, kombu or billiard is imported elsewhere."""
    for module, _ in imports_of(TREES[name]):
        if module.split(".")[0] in CELERY:
            parts = [part for part in module.split(".") if part.startswith("_")]
            assert not parts, f"{name} imports {module}"


def patched_names(tree: ast.AST) -> list[str]:
    """Attributes of imported modules and classes of Celery's that a file sets."""
    bound: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            for alias in node.names:
                source = module or alias.name
                if str(source).split(".")[0] in CELERY:
                    bound.add(alias.asname or alias.name.split(".")[0])
    found = []
    for node in ast.walk(tree):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign):
            targets = list(node.targets)
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        elif isinstance(node, ast.Delete):
            targets = list(node.targets)
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("setattr", "delattr")
        ):
            first = node.args[0]
            targets = [ast.Attribute(value=first, attr="?", ctx=ast.Store())]
        for target in targets:
            base: ast.expr = target
            while isinstance(base, ast.Attribute | ast.Subscript):
                base = base.value
            if base is not target and isinstance(base, ast.Name) and base.id in bound:
                found.append(ast.unparse(target))
    return found


@pytest.mark.parametrize("name", list(TREES))
def test_nothing_patches_celery(name: str) -> None:
    """No attribute of an imported module or class of Celery's is set."""
    if Path(name).name not in WRAPPERS:
        assert patched_names(TREES[name]) == []


@pytest.mark.parametrize(
    ("source", "patched"),
    [
        ("import celery\ncelery.Task.retry = 1", ["celery.Task.retry"]),
        ("from celery import Task\nTask.retry = 1", ["Task.retry"]),
        ("from celery import Task as T\nsetattr(T, 'x', 1)", ["T.?"]),
        ("import kombu.utils as u\nu.x['a'] = 1", ["u.x['a']"]),
        ("from billiard import pool\ndef f():\n    del pool.x", ["pool.x"]),
        ("from celery import Task\nTask = 1", []),
        ("import os\nos.x = 1", []),
        ("def f(task):\n    task.Request = 1", []),
    ],
)
def test_a_patch_would_be_seen(source: str, patched: list[str]) -> None:
    """The rule above bites."""
    assert patched_names(ast.parse(source)) == patched


@pytest.mark.parametrize("name", list(TREES))
def test_no_wait_is_of_the_apps_own_numbers(name: str) -> None:
    """An app that seeds `random` would have all its workers wait alike."""
    found = {module.split(".")[0] for module, _ in imports_of(TREES[name])}
    assert "random" not in found or name == "chance.py"


# --- optional libraries ---------------------------------------------------------------


@pytest.mark.parametrize("name", list(TREES))
def test_an_optional_library_is_imported_in_a_file_named_after_it(name: str) -> None:
    """Nowhere else at the top of a module: it need not be installed."""
    for node in TREES[name].body:
        for module, _ in imports_of(node):
            words = OPTIONAL.get(module.split(".")[0])
            if words is not None:
                assert any(word in name for word in words), f"{name} imports {module}"


def test_django_is_imported_in_its_own_folder_only() -> None:
    """Or in a file named after it; Celery's own module is the only door besides it."""
    met = {
        name
        for name, tree in TREES.items()
        for module, _ in imports_of(tree)
        if module.split(".")[0] == "django"
    }

    assert met
    assert all(
        name.startswith("django/") or Path(name).name.startswith("django_")
        for name in met
    ), met


def test_the_package_works_with_every_optional_library_blocked() -> None:
    """Every module is imported, a store on SQLite opened, a failed task kept."""
    printed = run_python(
        f"""
        import importlib, pkgutil, sys

        class Blocked:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in {sorted(OPTIONAL)!r}:
                    raise ModuleNotFoundError(f"blocked: {{name}}", name=name)

        sys.meta_path.insert(0, Blocked())
        import celery_resilience
        names = [
            module.name
            for module in pkgutil.walk_packages(
                celery_resilience.__path__, "celery_resilience."
            )
            if not module.name.startswith("celery_resilience.django.")
        ]
        for name in names:
            importlib.import_module(name)
        from celery_resilience.failed.filters import Filter
        from celery_resilience.failed.sql_store import SqlFailedTaskStore
        from celery_resilience.stores.sql import SqlDatabase

        store = SqlFailedTaskStore(SqlDatabase("sqlite://"), "shop")
        print(len(names), store.count(Filter()))
        """
    )

    count, kept = printed.split()
    inside_django = [name for name in TREES if name.startswith("django/")]
    # The package is counted by nobody, and the folder of Django's by its name.
    assert int(count) == len(TREES) - 1 - (len(inside_django) - 1)
    assert kept == "0"


def test_a_missing_driver_is_told_with_its_extra() -> None:
    """Not as an ImportError of somebody else's."""
    printed = run_python(
        """
        import sys

        sys.modules["psycopg"] = None
        from celery_resilience.errors import MissingExtra
        from celery_resilience.stores.sql import SqlDatabase

        try:
            SqlDatabase("postgresql://h/db").ready("failed", 1, [])
        except MissingExtra as exc:
            print(exc)
        """
    )

    assert "pip install 'celery-resilience[postgres]'" in printed


# --- importing ------------------------------------------------------------------------


def test_importing_turns_nothing_on() -> None:
    """No receiver, no option, no step; of every module, and of an app made after."""
    printed = run_python(
        """
        import importlib, pkgutil
        from celery import Celery, signals
        from celery.utils.dispatch import Signal
        import celery.bin.celery

        def receivers():
            return {
                name: len(signal.receivers)
                for name, signal in vars(signals).items()
                if isinstance(signal, Signal)
            }

        def app_state(app):
            return (
                {key: len(value) for key, value in app.user_options.items()},
                {key: len(value) for key, value in app.steps.items()},
                app.Task.Request,
            )

        app = Celery("before", set_as_current=False)
        before = receivers(), app_state(app)
        import celery_resilience
        for name in celery_resilience.__all__:
            getattr(celery_resilience, name)
        for module in pkgutil.walk_packages(
            celery_resilience.__path__, "celery_resilience."
        ):
            if module.name != "celery_resilience.django.models":  # needs a project
                importlib.import_module(module.name)
        assert (receivers(), app_state(app)) == before, (receivers(), app_state(app))
        other = Celery("after", set_as_current=False)
        assert app_state(other) == before[1]
        assert not [n for n in vars(app) if "resilience" in n]
        print("nothing")
        """
    )

    assert printed == "nothing"


def test_installing_is_what_turns_it_on() -> None:
    """The test above would see it."""
    printed = run_python(
        """
        from celery import Celery, signals
        import celery.bin.celery
        from celery_resilience import Resilience

        app = Celery("shop", set_as_current=False)
        before = len(signals.worker_init.receivers)
        Resilience(app)
        Resilience(app)
        print(len(signals.worker_init.receivers) - before)
        print(len(app.user_options["worker"]))
        """
    )

    assert printed.split() == ["1", "10"]


HEAVY = ["sqlalchemy", "rich", "psutil", "celery_resilience.failed"]


def test_the_sub_commands_are_light() -> None:
    """Every `celery` call imports them, `celery worker` and `celery beat` too."""
    printed = run_python(
        f"""
        import sys
        import celery.bin.celery
        import celery_resilience.command

        heavy = {HEAVY!r}
        print([n for n in heavy if any(
            m == n or m.startswith(n + ".") for m in sys.modules
        )])
        """
    )

    assert printed == "[]"


def test_an_installed_app_is_light_until_it_is_used() -> None:
    """A web process that only sends tasks pays for no store and no worker."""
    printed = run_python(
        f"""
        import sys
        from celery import Celery
        from celery_resilience import Resilience, ResilientTask

        app = Celery("shop", set_as_current=False, broker="memory://")
        Resilience(app)

        @app.task(base=ResilientTask, name="t")
        def task(): ...

        app.finalize()
        assert isinstance(app.tasks["t"], ResilientTask)
        heavy = [*{HEAVY!r}, "celery_resilience.worker", "celery_resilience.delivery"]
        print([n for n in heavy if any(
            m == n or m.startswith(n + ".") for m in sys.modules
        )])
        """
    )

    assert printed == "[]"


def test_installing_leaves_celerys_consumer_to_be_imported_later() -> None:
    """It keeps a function that sentry-sdk's `init` replaces, perhaps after us."""
    printed = run_python(
        """
        import sys
        from celery import Celery
        from celery_resilience import Resilience, ResilientTask

        app = Celery("shop", set_as_current=False, broker="memory://")
        Resilience(app)

        @app.task(base=ResilientTask, name="t")
        def task(): ...

        app.finalize()
        print("celery.worker.consumer.consumer" in sys.modules)
        """
    )

    assert printed == "False"


# --- the door -------------------------------------------------------------------------


def test_every_public_name_is_there() -> None:
    """And nothing else is imported by a star."""
    assert sorted(celery_resilience.__all__) == celery_resilience.__all__
    for name in celery_resilience.__all__:
        assert getattr(celery_resilience, name) is not None
    assert celery_resilience.__version__ == version("celery-resilience")
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        celery_resilience.Nonsense  # noqa: B018 - it must raise


def test_type_checkers_see_every_public_name() -> None:
    """`tests/typing/api.py` is checked by `make lint`; a name that it lacks is not."""
    checked = ast.parse((ROOT / "tests" / "typing" / "api.py").read_text())
    used = {node.id for node in ast.walk(checked) if isinstance(node, ast.Name)}
    used |= {node.attr for node in ast.walk(checked) if isinstance(node, ast.Attribute)}

    assert used >= set(celery_resilience.__all__)


def test_type_checkers_know_every_option() -> None:
    """As the class attribute that it is at run time."""
    options = celery_resilience.TaskOptions.__annotations__
    documented = re.findall(
        r"^ {4}(\w+): ",
        str(inspect.getdoc(celery_resilience.ResilientTask)),
        re.MULTILINE,
    )

    assert list(options) == documented
    for name in options:
        assert hasattr(celery_resilience.ResilientTask, name)


def test_the_door_is_small() -> None:
    """Imports and names only."""
    assert len((PACKAGE / "__init__.py").read_text().splitlines()) < 50


@pytest.mark.parametrize("name", list(TREES))
def test_every_module_says_what_it_is_for(name: str) -> None:
    """In a docstring."""
    assert ast.get_docstring(TREES[name])


def is_stub(function: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> bool:
    """Whether a body is three dots: a method of a Protocol."""
    return all(
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and node.value.value is Ellipsis
        for node in function.body
    )


def undocumented(tree: ast.AST, prefix: str = "") -> Iterator[str]:
    """Public functions, classes and methods without a docstring."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if node.name.startswith("_"):
            continue
        if not ast.get_docstring(node) and not is_stub(node):
            yield f"{prefix}{node.name}"
        if isinstance(node, ast.ClassDef):
            yield from undocumented(node, f"{prefix}{node.name}.")


@pytest.mark.parametrize("name", list(TREES))
def test_every_public_name_says_what_it_promises(name: str) -> None:
    """Functions, classes and methods; an override says it too."""
    private = [part for part in name.split("/") if re.match(r"_[^_]", part)]
    found = [
        name
        for name in undocumented(TREES[name])
        if not any(part.startswith("_") for part in name.split("."))
    ]
    if not private:
        assert found == []


# --- packaging ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def setup() -> configparser.ConfigParser:
    """What we ship."""
    parser = configparser.ConfigParser()
    assert parser.read(ROOT / "setup.cfg")
    return parser


@pytest.fixture(scope="module")
def project() -> dict:  # type: ignore[type-arg]
    """How we build and check it."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_tools_check_for_the_oldest_python(
    setup: configparser.ConfigParser,
    project: dict,  # type: ignore[type-arg]
) -> None:
    """ruff cannot read setup.cfg, and mypy is told by hand."""
    floor = setup["options"]["python_requires"].removeprefix(">=")

    assert project["tool"]["ruff"]["target-version"] == f"py{floor.replace('.', '')}"
    assert project["tool"]["mypy"]["python_version"] == floor


def requirements(setup: configparser.ConfigParser) -> list[str]:
    """All of them, those of extras too."""
    listed = [setup["options"]["python_requires"]]
    listed += setup["options"]["install_requires"].split("\n")
    for extra in setup["options.extras_require"].values():
        listed += extra.split("\n")
    return [line for line in listed if line.strip()]


def test_nothing_has_an_upper_bound(setup: configparser.ConfigParser) -> None:
    """A cap locks users out of the next Celery."""
    for requirement in requirements(setup):
        assert not re.search(r"<|==|~=|!=", requirement), requirement


def test_there_is_no_project_table(project: dict) -> None:  # type: ignore[type-arg]
    """setup.cfg says what we ship; a [project] table would hide it from setuptools."""
    assert "project" not in project


def test_all_optional_libraries_have_an_extra(setup: configparser.ConfigParser) -> None:
    """And `all` brings them all."""
    extras = setup["options.extras_require"]
    everything = re.search(r"\[(.*)\]", extras["all"])

    assert everything is not None
    assert set(everything[1].split(",")) == set(extras) - {"all"}


def test_the_commands_are_entry_points(setup: configparser.ConfigParser) -> None:
    """`celery failed` and `celery resilience` are found without a setting."""
    entries = setup["options.entry_points"]["celery.commands"]

    for line in entries.strip().split("\n"):
        name, _, target = (part.strip() for part in line.partition("="))
        module, _, attribute = target.partition(":")
        assert (module, attribute) == ("celery_resilience.command", name)
        assert hasattr(__import__(module, fromlist=[attribute]), attribute)
