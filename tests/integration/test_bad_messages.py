"""Messages that never become a run: kept with their bytes, and the worker lives."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from conftest import BROKERS, conf_for
from fleet_runner import Fleet, Worker
from kombu import Producer
from polling import eventually

JSON = "application/json"
GOOD_BODY: Any = [[], {}, {"callbacks": None, "chain": None, "chord": None}]


class Dangerous:
    """Tells on whoever unpickles it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("import pathlib; pathlib.Path('UNPICKLED').touch()",))


@dataclass
class Bad:
    """A message that somebody else, or a bug, has put on the queue."""

    name: str
    reason: str
    body: bytes
    headers: dict[str, Any] = field(default_factory=dict)
    content_type: str = JSON
    encoding: str = "utf-8"


def headers(task: Any = "ok", **more: Any) -> dict[str, Any]:
    """Those of a task message."""
    found = {"task": task, "id": "id-of-" + str(task), "lang": "py", **more}
    return {name: value for name, value in found.items() if value is not None}


def body(*parts: Any) -> bytes:
    """A body of protocol 2."""
    return json.dumps(parts if len(parts) != 1 else parts[0]).encode()


MESSAGES = [
    Bad("null body", "malformed", b"null", headers(id="null")),
    Bad("one item", "malformed", b"[1]", headers(id="one-item")),
    Bad("a number", "malformed", b"7", headers(id="number")),
    Bad("no id header", "malformed", body(*GOOD_BODY), {"task": "ok", "lang": "py"}),
    Bad(
        "kwargs no mapping",
        "malformed",
        body([], ["not", "a", "mapping"], {}),
        headers(id="kwargs"),
    ),
    Bad("args no list", "malformed", body(7, {}, {}), headers(id="args")),
    Bad("embed no mapping", "malformed", body([], {}, "embed"), headers(id="embed")),
    Bad("timelimit", "malformed", body(*GOOD_BODY), headers(id="tl", timelimit=5)),
    Bad("retries", "malformed", body(*GOOD_BODY), headers(id="rt", retries="many")),
    Bad("eta", "malformed", body(*GOOD_BODY), headers(id="eta", eta="tomorrow")),
    Bad("stamps", "malformed", body(*GOOD_BODY), headers(id="st", stamped_headers=5)),
    Bad("unknown task", "unknown_task", body(*GOOD_BODY), headers("nobody")),
    Bad("unknown, no id", "malformed", body(*GOOD_BODY), {"task": "nobody2"}),
    Bad("task no text", "malformed", body(*GOOD_BODY), headers(id="tt", task=["ok"])),
    Bad("another system", "malformed", b'{"hello": "world"}', {"x": "y"}),
    Bad("not json", "undecodable", b"{not json", headers(id="not-json")),
    Bad("not utf-8", "undecodable", b'["\xff\xfe"]', headers(id="not-utf8")),
    Bad(
        "pickle",
        "not_accepted",
        pickle.dumps(Dangerous()),
        headers(id="pickle"),
        "application/x-python-serialize",
        "binary",
    ),
    Bad("unknown type", "not_accepted", b"<a/>", headers(id="xml"), "text/xml"),
]


def publish(fleet: Fleet, bad: Bad) -> None:
    """Put a message on the fleet's queue as it is."""
    with fleet.app.connection_for_write() as connection:
        Producer(connection.default_channel).publish(
            bad.body,
            exchange="",
            routing_key=fleet.conf["task_default_queue"],
            headers={**bad.headers, "x-which": bad.name},
            content_type=bad.content_type,
            content_encoding=bad.encoding,
        )


def declare(fleet: Fleet) -> None:
    """Make the fleet's queue before a worker does."""
    with fleet.app.connection_for_write() as connection:
        for queue in fleet.app.amqp.queues.values():
            queue(connection.default_channel).declare()


@pytest.fixture(scope="module", params=list(BROKERS))
def fed(
    request: pytest.FixtureRequest, servers: Any, tmp_path_factory: Any
) -> Iterator[Fleet]:
    """A worker that was given every bad message, and a good one last."""
    name = BROKERS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    fleet = Fleet(
        folder, conf_for(request.param, folder, None if name is None else servers(name))
    )
    try:
        declare(fleet)
        for bad in MESSAGES:
            publish(fleet, bad)
        good = fleet.send("ok", "still alive")
        worker = fleet.worker()
        eventually(lambda: good.state == "SUCCESS", what=lambda: worker.text)
        eventually(
            lambda: len(documents(fleet)) == len(MESSAGES), every_s=0.5, what="records"
        )
        assert worker.is_alive
        assert worker.stop() == 0
        yield fleet
    finally:
        fleet.close()


def documents(fleet: Fleet) -> list[dict[str, Any]]:
    """Every record's whole document."""
    found = fleet.failed.list(state="all", limit=None)
    return [dict(record.document) | {"_original": record.original} for record in found]


def test_each_is_kept_with_its_reason_and_bytes(fed: Fleet) -> None:
    """The original bytes and headers are there, byte for byte."""
    kept = documents(fed)
    for bad in MESSAGES:
        same = [d for d in kept if d["_original"].headers["x-which"] == bad.name]
        assert len(same) == 1, bad.name
        assert same[0]["_original"].body == bad.body
        assert bad.headers.items() <= same[0]["_original"].headers.items()
        assert same[0]["reason"] == bad.reason, bad.name
        assert same[0]["content_type"] == bad.content_type
    assert len(kept) == len(MESSAGES)


def test_the_counts_add_up(fed: Fleet) -> None:
    """Each of them is one failed delivery."""
    assert fed.workers[0].outcomes() == {
        "received": len(MESSAGES) + 1,
        "failed": len(MESSAGES),
        "succeeded": 1,
    }


def test_nothing_is_unpickled_to_show_it(fed: Fleet) -> None:
    """A pickled body is listed and shown, raw too, without being loaded."""
    record = next(r for r in fed.records().values() if r["reason"] == "not_accepted")

    for words in (["list"], ["show", record["id"]], ["show", record["id"], "--raw"]):
        done = fed.command("failed", *words)
        assert done.returncode == 0, done.stderr
    assert not (fed.folder / "UNPICKLED").exists()


@pytest.mark.parametrize("broker", ["redis", "rabbitmq"])
@pytest.mark.parametrize("which", ["null body", "no id header"])
def test_plain_celery_dies_of_it(make_fleet: Any, broker: str, which: str) -> None:
    """The worker of plain Celery ends, or reconnects for ever: the cure is needed."""
    fleet = make_fleet(broker, is_plain=True)
    declare(fleet)
    publish(fleet, next(bad for bad in MESSAGES if bad.name == which))
    fleet.send("ok", "behind it")

    worker = Worker(fleet, name="plain")
    fleet.workers.append(worker)
    worker.start(ready=False)

    eventually(
        lambda: (
            not worker.is_alive or worker.text.count("Connection to broker lost") > 2
        ),
        what=lambda: worker.text,
    )


@pytest.mark.parametrize("raw", [b"no json at all", b'{"hello": "world"}', b"[1, 2]"])
def test_a_foreign_item_on_redis_is_kept(make_fleet: Any, raw: bytes) -> None:
    """What another program pushed onto the list neither ends the worker nor is lost."""
    fleet = make_fleet("redis")
    with fleet.app.connection_for_write() as connection:
        client = connection.default_channel.client
        client.lpush(fleet.conf["task_default_queue"], raw)
    good = fleet.send("ok", "behind it")

    worker = fleet.worker()

    eventually(lambda: good.state == "SUCCESS", what=lambda: worker.text)
    (kept,) = eventually(lambda: documents(fleet), every_s=0.3)
    body = kept["_original"].body
    assert body == raw or json.loads(body) == json.loads(raw)
    assert kept["reason"] == "malformed"
    assert kept["queue"] == fleet.conf["task_default_queue"]


def test_expired_and_revoked_are_kept_where_a_route_asks(make_fleet: Any) -> None:
    """Only then; and they are told apart by their reason."""
    fleet = make_fleet("redis", resilience_failed_routes={"expired": "late.failed"})
    expired = fleet.send("ok", expires=-1)
    revoked = fleet.send("ok")
    last = fleet.send("ok")
    worker = fleet.worker("--statedb", str(fleet.folder / "state"), concurrency=1)
    eventually(lambda: last.state == "SUCCESS")
    record = fleet.record_of(expired.id)

    assert record["reason"] == "expired"
    assert record["failed_queue"] == "late.failed"
    assert fleet.runs(expired.id) == 0
    assert list(fleet.records()) == [expired.id]
    assert worker.stop() == 0
    assert worker.outcomes()["revoked"] == 1
    assert revoked.state == "SUCCESS"
