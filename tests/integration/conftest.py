"""Databases and fleets for the tests of sessions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from conftest import FleetMaker, conf_for
from services import Service
from session_fleets import Both, BothMaker, Databases, Shelves, statement
from sqlalchemy import create_engine


def databases(servers: Callable[[str], Service], folder: Path) -> Databases:
    """Makes empty databases, on shared servers or in *folder*, and returns their URLs."""

    def get(kind: str, driver: str = "psycopg") -> str:
        if kind == "sqlite":
            url = f"sqlite:///{folder}/rows{uuid4().hex[:8]}.sqlite3"
        else:
            server = servers(kind).url
            name = f"s{uuid4().hex[:12]}"
            statement(server, f"CREATE DATABASE {name}")
            url = server.rpartition("/")[0] + f"/{name}"
            url = url.replace("+psycopg:", f"+{driver}:")
        from session_tasks import Base

        engine = create_engine(url.replace("+asyncpg", "+psycopg"))
        Base.metadata.create_all(engine)
        engine.dispose()
        return url

    return get


@pytest.fixture
def database(servers: Callable[[str], Service], tmp_path: Path) -> Databases:
    """URLs of empty databases of a test's own, on shared servers."""
    return databases(servers, tmp_path)


@pytest.fixture
def both_of(make_fleet: FleetMaker) -> Iterator[BothMaker]:
    """Makes them; at the end it looks at what their workers have logged."""
    made: list[Both] = []

    def make(url: Callable[[], str], **conf: object) -> Both:
        made.append(Both(make_fleet, url, **conf))
        return made[-1]

    yield make
    for both in made:
        both.check()


@pytest.fixture(scope="module")
def shelf(
    request: pytest.FixtureRequest,
    servers: Callable[[str], Service],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Shelves]:
    """The databases that a module names in `SHELVES`, each with tasks of its own."""
    folder = tmp_path_factory.mktemp("shelves")
    shelves = Shelves(
        folder,
        lambda folder: conf_for("redis", folder, servers("redis")),
        request.module.SHELVES,
        databases(servers, folder),
    )
    yield shelves
    shelves.close()
