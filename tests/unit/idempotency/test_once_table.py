"""The table of `once`, by each of the ways to make it."""

from __future__ import annotations

import io
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import alembic.command
import pytest
from alembic.config import Config
from alembic.util.exc import CommandError
from celery import Celery
from click.testing import CliRunner
from sqlalchemy import Engine, MetaData, create_engine, inspect, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from celery_resilience import ConfigurationError, Resilience, once
from celery_resilience.command import resilience
from celery_resilience.idempotency.once import sql_table as once_table


@pytest.fixture
def app() -> Resilience:
    """celery-resilience in an app."""
    return Resilience(Celery("shop", set_as_current=False))


@pytest.fixture
def url(make_url_of_kind: Callable[[], str]) -> str:
    """An empty database."""
    return make_url_of_kind()


@pytest.fixture
def engine(url: str) -> Iterator[Engine]:
    """An engine on an empty database."""
    engine = create_engine(url, poolclass=NullPool)
    yield engine
    engine.dispose()


def assert_works(engine: Engine) -> None:
    """The table is whole: a result of any length, and the index for its purge."""
    with engine.begin() as connection:
        once(connection, "é" * 300, namespace="shop").save("x" * 100_000)
    with engine.begin() as connection:
        duplicate = once(connection, "é" * 300, namespace="shop")
        assert not duplicate
        assert len(duplicate.result) == 100_000
        assert once(connection, "É" * 300, namespace="shop")
    indexes = {
        index["name"]: index["column_names"]
        for index in inspect(engine).get_indexes("resilience_once")
    }
    assert indexes["resilience_once_age"] == ["namespace", "created_at"]


def test_an_engine_makes_it_once(engine: Engine, app: Resilience) -> None:
    """Doing so again changes nothing."""
    app.create_once_table(engine)
    assert_works(engine)
    app.create_once_table(engine)

    with engine.begin() as connection:
        assert not once(connection, "é" * 300, namespace="shop")


def test_eight_workers_make_it_together(engine: Engine, app: Resilience) -> None:
    """As they start, all at once."""
    meeting = threading.Barrier(8)
    errors: list[Exception] = []

    def make() -> None:
        meeting.wait(30)
        try:
            app.create_once_table(engine)
        except Exception as exc:
            errors.append(exc)

    for round_ in range(5):
        threads = [threading.Thread(target=make) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not errors
        assert_works(engine)
        if round_ < 4:
            with engine.begin() as connection:
                connection.execute(text("DROP TABLE resilience_once"))


def test_a_connection_makes_it_in_its_transaction(
    engine: Engine, app: Resilience
) -> None:
    """Where the database can: elsewhere a statement of that kind commits by itself."""
    with engine.connect() as connection:
        app.create_once_table(connection)
        connection.rollback()
    has_table = inspect(engine).has_table("resilience_once")
    assert has_table is (engine.dialect.name in ("mysql", "mariadb", "sqlite"))
    with engine.begin() as connection:
        app.create_once_table(connection)
    assert_works(engine)


def test_what_is_no_bind_is_refused(app: Resilience) -> None:
    """And an AsyncEngine is told its way."""
    bind: Any = create_async_engine("sqlite+aiosqlite://")
    with pytest.raises(ConfigurationError, match="await connection"):
        app.create_once_table(bind)


@pytest.mark.parametrize("kind", ["sqlite", "postgresql", "mysql"])
def test_a_command_prints_it(request: pytest.FixtureRequest, kind: str) -> None:
    """Complete, for who applies it by other means; no store is needed for that."""
    app = Celery("shop", broker="redis://127.0.0.1:9", set_as_current=False)
    words = ["schema", "--sql", "--once", kind]
    done = CliRunner().invoke(resilience, words, obj=Obj(app))
    assert done.exit_code == 0, done.output

    if kind == "sqlite":
        engine = create_engine("sqlite://")
    else:
        name = "mariadb" if kind == "mysql" else kind
        engine = create_engine(
            request.getfixturevalue(f"{name}_url")(), poolclass=NullPool
        )
    with engine.begin() as connection:
        for statement in done.output.split(";\n"):
            if statement.strip():
                connection.exec_driver_sql(statement.replace("%", "%%"))
    assert_works(engine)
    engine.dispose()


class Obj:
    """What `celery` gives its sub-commands."""

    def __init__(self, app: Celery) -> None:
        self.app = app


# --- Alembic --------------------------------------------------------------------------

ENV = """
    from alembic import context
    from sqlalchemy import MetaData, create_engine
    from celery_resilience.idempotency.once.sql_table import once_table

    url = context.config.get_main_option("sqlalchemy.url")
    metadata = MetaData()
    if context.config.attributes.get("is_in_metadata", True):
        once_table(metadata)
    options = {"target_metadata": metadata, "compare_type": True}
    if context.is_offline_mode():
        context.configure(url=url, literal_binds=True, **options)
        with context.begin_transaction():
            context.run_migrations()
    else:
        engine = create_engine(url)
        with engine.connect() as connection:
            context.configure(connection=connection, **options)
            with context.begin_transaction():
                context.run_migrations()
        engine.dispose()
    """

REVISION = """
    from alembic import op
    from celery_resilience.idempotency import alembic as resilience_once

    revision = "a1"
    down_revision = None

    def upgrade():
        resilience_once.upgrade(op)

    def downgrade():
        resilience_once.downgrade(op)
    """


@pytest.fixture
def config(url: str, tmp_path: Path) -> Config:
    """A user's folder of migrations, with one revision."""
    (tmp_path / "versions").mkdir()
    (tmp_path / "env.py").write_text(textwrap.dedent(ENV))
    (tmp_path / "versions" / "a1_once.py").write_text(textwrap.dedent(REVISION))
    config = Config(output_buffer=io.StringIO())
    config.set_main_option("script_location", str(tmp_path))
    config.set_main_option("path_separator", "os")
    config.set_main_option("sqlalchemy.url", url.replace("%", "%%"))
    return config


def test_alembic_makes_it_and_drops_it(config: Config, engine: Engine) -> None:
    """And finds nothing that differs from the table in the user's metadata."""
    alembic.command.upgrade(config, "head")
    assert_works(engine)
    alembic.command.check(config)
    alembic.command.downgrade(config, "base")
    assert not inspect(engine).has_table("resilience_once")
    alembic.command.upgrade(config, "head")
    assert_works(engine)


def test_alembic_would_drop_what_no_metadata_has(config: Config) -> None:
    """Which is why the docs put the table there; the test above would see it."""
    alembic.command.upgrade(config, "head")
    config.attributes["is_in_metadata"] = False

    with pytest.raises(CommandError, match="resilience_once"):
        alembic.command.check(config)


def test_alembic_prints_it(config: Config, engine: Engine) -> None:
    """Without a database: `alembic upgrade head --sql`."""
    alembic.command.upgrade(config, "head", sql=True)
    printed = config.output_buffer.getvalue()

    assert "CREATE TABLE resilience_once" in printed
    assert "CREATE INDEX resilience_once_age" in printed
    assert not inspect(engine).has_table("resilience_once")


def test_the_users_own_metadata_makes_it(engine: Engine) -> None:
    """By `create_all`, with the user's tables."""
    metadata = MetaData()
    once_table.once_table(metadata)
    metadata.create_all(engine)

    assert_works(engine)
