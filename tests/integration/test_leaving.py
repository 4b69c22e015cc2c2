"""With half of a fleet, and after uninstalling: what waits runs on plain Celery."""

from __future__ import annotations

import pytest
from conftest import FleetMaker
from polling import eventually

#: Where the package is not installed: the same tasks, by Celery alone.
UNINSTALLED = """
import json, os, sys
sys.modules["celery_resilience"] = None  # an import of it fails
from celery import Celery

app = Celery("fleet")
conf = json.loads(os.environ["FLEET_CONF"])
app.conf.update({
    name: value for name, value in conf.items() if not name.startswith("resilience_")
})

def note(*words):
    with open(os.environ["FLEET_LEDGER"], "a") as ledger:
        ledger.write(json.dumps(words) + "\\\\n")

@app.task(name="boom_unless", bind=True)
def boom_unless(self, path):
    note("effect", self.request.id)

@app.task(name="snoozed_for", bind=True)
def snoozed_for(self, countdown_s):
    note("effect", self.request.id)

@app.task(name="charge", bind=True)
def charge(self, order_id):
    note("effect", self.request.id)
""".replace("\\\\n", "\\n")


@pytest.mark.parametrize("broker", ["redis", "rabbitmq", "filesystem"])
def test_what_waits_runs_without_the_package(
    make_fleet: FleetMaker, broker: str
) -> None:
    """Snoozed, replayed and keyed messages are Celery's own, with one header more."""
    fleet = make_fleet(broker)
    worker = fleet.worker()
    failed = fleet.send("boom_unless", str(fleet.folder / "never"))
    record = fleet.record_of(failed.id)
    snoozed = fleet.send("snoozed_for", 3)
    eventually(lambda: fleet.runs(snoozed.id) == 1)
    assert worker.stop() == 0
    assert fleet.failed.replay([record["id"]]).sent == [record["id"]]
    keyed = fleet.send("charge", 1)
    (fleet.folder / "fleet_worker.py").write_text(UNINSTALLED)

    plain = fleet.worker()

    eventually(
        lambda: (
            sorted(line[1] for line in fleet.notes("effect"))
            == sorted([failed.id, snoozed.id, keyed.id])
        ),
        what=lambda: plain.text,
    )
    assert plain.stop() == 0
    assert "celery-resilience" not in plain.text


def test_half_a_fleet_keeps_what_it_runs(make_fleet: FleetMaker) -> None:
    """Beside plain workers: their failures are lost as ever, and nothing else is."""
    fleet = make_fleet("redis")
    ours = fleet.worker(concurrency=1)
    fleet.is_plain = True
    plain = fleet.worker(concurrency=1)
    fleet.is_plain = False
    fine = {fleet.send("sleep", 0.02).id for _ in range(30)}
    failing = {fleet.send("boom").id for _ in range(30)}
    eventually(lambda: {line[1] for line in fleet.notes("slept")} == fine)
    eventually(lambda: sum(map(fleet.runs, failing)) == 30)

    eventually(
        lambda: len(fleet.records()) + plain.text.count("raised unexpected") == 30,
        every_s=1,
        what=lambda: ours.text[-2000:],
    )
    kept = set(fleet.records())
    assert 0 < len(kept) < 30
    assert kept <= failing
    assert all(fleet.runs(id) == 1 for id in fine | failing)


def test_half_a_fleet_knows_the_keys_that_it_runs_itself(
    make_fleet: FleetMaker,
) -> None:
    """Plain workers run what they get; among the others an effect is had once."""
    fleet = make_fleet("redis")
    ours = fleet.worker(concurrency=1)
    fleet.is_plain = True
    plain = fleet.worker(concurrency=1)
    fleet.is_plain = False

    results = [fleet.send("charge", 1) for _ in range(40)]

    for result in results:
        assert result.get(timeout=60) == {"order": 1, "amount": 10}
    by_plain = plain.text.count("received")
    assert 0 < by_plain < 40
    assert ours.stop() == 0
    assert ours.outcomes()["failed"] == 0
    # The key of a run is told by the task to the ledger; a plain one has none.
    runs = [line[3] for line in fleet.notes("charge")]
    assert runs.count("charge:1") == 1
    assert runs.count(None) == len(fleet.notes("charged")) - 1 == by_plain


def test_a_replay_that_a_plain_worker_runs_is_given_up_by_hand(
    make_fleet: FleetMaker,
) -> None:
    """It runs once there; nobody reports, so that its record says replaying."""
    fleet = make_fleet("redis")
    worker = fleet.worker()
    cured = fleet.folder / "cured"
    sent = fleet.send("boom_unless", str(cured))
    record = fleet.record_of(sent.id)
    assert worker.stop() == 0
    cured.touch()
    fleet.failed.replay([record["id"]])
    fleet.is_plain = True
    plain = fleet.worker()
    eventually(lambda: fleet.notes("effect"), what=lambda: plain.text)
    assert plain.stop() == 0

    fleet.is_plain = False
    assert fleet.record_of(sent.id)["state"] == "replaying"
    assert len(fleet.notes("effect")) == 1
    done = fleet.command("failed", "reopen", record["id"])
    assert done.returncode == 0, done.stderr
    done = fleet.command("failed", "discard", record["id"])
    assert done.returncode == 0, done.stderr
    assert fleet.record_of(sent.id)["state"] == "discarded"


def test_a_snooze_is_sent_again_where_the_rest_is_off(make_fleet: FleetMaker) -> None:
    """As a retry, of which there are as many as it takes; a stream has no places."""
    fleet = make_fleet("redis", resilience_enabled=False)
    fleet.worker()
    snoozed = fleet.send("snoozed_by_retries")
    streamed = fleet.send("stream_numbers", 100)

    assert snoozed.get(timeout=30) == "awake"
    assert streamed.get(timeout=30) == 100
    assert fleet.runs(snoozed.id) == 6
