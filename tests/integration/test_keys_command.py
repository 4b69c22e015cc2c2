"""`celery -A shop resilience keys`, beside real workers."""

from __future__ import annotations

import json
import re

import pytest
from conftest import FleetMaker
from polling import eventually


@pytest.mark.parametrize("broker", ["redis", "filesystem"])
def test_an_operator_looks_at_keys_and_forgets_one(
    make_fleet: FleetMaker, broker: str
) -> None:
    """Then its effect happens again."""
    fleet = make_fleet(broker)
    fleet.worker()
    first = fleet.send("charge", 7, 500)
    assert first.get(timeout=60)

    # Without a verb it lists.
    listed = fleet.command("resilience", "keys")
    as_json = fleet.command(
        "resilience", "keys", "list", "--state", "done", "-o", "json"
    )
    shown = fleet.command("resilience", "keys", "show", "charge:7", "-o", "json")
    asked = fleet.command("resilience", "keys", "forget", "charge:7")
    done = fleet.command("resilience", "keys", "forget", "charge:7", "--yes")
    none = fleet.command("resilience", "keys", "show", "charge:7")

    assert listed.returncode == 0, listed.stderr
    assert "charge:7" in listed.stdout
    (document,) = json.loads(as_json.stdout)
    assert document == json.loads(shown.stdout)
    assert (document["task"], document["state"]) == ("charge", "done")
    assert document["task_id"] == first.id
    assert (asked.returncode, done.returncode, none.returncode) == (2, 0, 1)
    assert "without a terminal" in asked.stderr
    assert re.search(r"forgotten: [0-9a-f]{12} charge:7", done.stderr)
    again = fleet.send("charge", 7, 500)
    assert again.get(timeout=60)
    eventually(lambda: fleet.runs(again.id) == 1, what="the effect once more")


def test_words_that_are_wrong_are_usage(make_fleet: FleetMaker) -> None:
    """Exit code 2; a store that is away is 4."""
    fleet = make_fleet("filesystem")

    for words in (("list", "--limit", "0"), ("forget",), ("list", "--state", "x")):
        assert fleet.command("resilience", "keys", *words).returncode == 2
    fleet.conf["resilience_store_url"] = "redis://127.0.0.1:9/0"
    away = fleet.command("resilience", "keys", "list")

    assert away.returncode == 4
    assert "unreachable" in away.stderr
