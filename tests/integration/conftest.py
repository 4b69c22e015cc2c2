"""Databases and fleets for the tests of sessions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from uuid import uuid4

import pytest
from conftest import FleetMaker
from services import Service
from session_fleets import Both, BothMaker, Databases, statement
from sqlalchemy import create_engine


@pytest.fixture
def database(servers: Callable[[str], Service], tmp_path: Any) -> Databases:
    """URLs of empty databases of a test's own, on shared servers."""

    def get(kind: str, driver: str = "psycopg") -> str:
        if kind == "sqlite":
            url = f"sqlite:///{tmp_path}/rows{uuid4().hex[:8]}.sqlite3"
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
def both_of(make_fleet: FleetMaker) -> Iterator[BothMaker]:
    """Makes them; at the end it looks at what their workers have logged."""
    made: list[Both] = []

    def make(url: Callable[[], str], **conf: Any) -> Both:
        made.append(Both(make_fleet, url, **conf))
        return made[-1]

    yield make
    for both in made:
        both.check()
