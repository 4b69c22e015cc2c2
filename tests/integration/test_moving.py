"""Failed tasks leave a store and come into another one; a flood stays below its cap."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any

import redis
from conftest import FleetMaker
from fleet_runner import Fleet
from polling import eventually
from services import Service
from unit.specimens import a_failed_document

from celery_resilience.failed.archive import load_line, read_lines
from celery_resilience.failed.envelope import posted
from celery_resilience.failed.filters import Filter
from celery_resilience.publisher import Publisher

MIB = 2**20


def with_records(fleet: Fleet) -> dict[str, Any]:
    """Three failed tasks, one of them discarded; the records by task id."""
    worker = fleet.worker()
    ids = [fleet.send("boom").id for _ in range(3)]
    eventually(lambda: len(fleet.records()) == 3, every_s=0.3)
    assert worker.stop() == 0
    fleet.failed.discard([fleet.record_of(ids[0])["id"]])
    return fleet.records()


def test_an_export_is_imported_into_a_store_of_another_kind(
    make_fleet: FleetMaker, tmp_path: Path
) -> None:
    """Identical records, also when it is imported again; a redacted one is refused."""
    fleet = make_fleet("redis")
    records = with_records(fleet)
    raw, redacted = tmp_path / "raw.jsonl.gz", tmp_path / "redacted.jsonl"
    done = fleet.command("failed", "export", "--raw", "-f", str(raw))
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    done = fleet.command("failed", "export")
    redacted.write_text(done.stdout)
    assert {json.loads(line)["id"] for line in done.stdout.splitlines()} == {
        record["id"] for record in records.values()
    }

    fleet.conf["resilience_store_url"] = f"sqlite:///{tmp_path}/other.sqlite3"
    moved = Fleet(fleet.folder / "moved", fleet.conf)
    refused = moved.command("failed", "import", str(redacted))
    assert refused.returncode == 2
    assert "line 1 is redacted" in refused.stderr
    assert moved.records() == {}
    tried = moved.command("failed", "import", "--dry-run", str(raw))
    assert "3 would be imported, 0 are there already" in tried.stderr
    assert moved.records() == {}
    for said in ("3 imported, 0 are there", "0 imported, 3 are there"):
        done = moved.command("failed", "import", str(raw))
        assert done.returncode == 0, done.stderr
        assert said in done.stderr
        assert moved.records() == records
    moved.close()


def test_prune_forgets_what_is_done_with(
    make_fleet: FleetMaker, tmp_path: Path
) -> None:
    """Into an archive; what is unresolved stays unless it is named."""
    fleet = make_fleet("redis")
    records = with_records(fleet)
    archive = tmp_path / "pruned.jsonl.gz"
    for words, said in (
        ((), "say which: --older-than, --keep, or FILTERS"),
        (("--state", "replaying"), "a replay is under way there"),
        (("--keep", "0"), "nothing done: without a terminal"),
    ):
        refused = fleet.command("failed", "prune", *words)
        assert refused.returncode == 2
        assert said in refused.stderr
    assert fleet.records() == records

    done = fleet.command(
        *("failed", "prune", "--keep", "0", "--archive", str(archive), "--yes")
    )
    assert (done.returncode, done.stderr) == (0, "1 pruned\n")
    left = fleet.records()
    assert len(left) == 2
    assert all(record["state"] == "unresolved" for record in left.values())
    done = fleet.command("failed", "prune", "--state", "all", "--keep", "1", "--yes")
    assert done.stderr == "1 pruned\n"
    assert len(fleet.records()) == 1
    done = fleet.command("failed", "import", str(archive))
    assert "1 imported" in done.stderr
    assert sorted(r["state"] for r in fleet.records().values()) == [
        *("discarded", "unresolved"),
    ]


def test_a_flood_stays_below_its_cap(
    make_fleet: FleetMaker, own_server: Any, tmp_path: Path
) -> None:
    """In Redis: nothing is evicted, nothing is lost, the archive is complete."""
    server: Service = own_server("redis")
    client = redis.Redis(port=server.port)
    client.config_set("maxmemory", f"{32 * MIB}")
    fleet = make_fleet(
        "filesystem",
        resilience_store_url=server.url,
        resilience_failed_max_mib=4,
        resilience_failed_archive_dir=str(tmp_path / "archive"),
    )
    failed, publisher = fleet.failed, Publisher(fleet.app)
    queue = f"{fleet.conf['resilience_namespace']}.failed"
    ids, peak = set(), 0
    for round_number in range(24):
        for number in range(20):
            document = a_failed_document(
                task_id=f"{round_number}-{number}", failed_queue=queue, at=2_000_000_000
            )
            body = base64.b64encode(os.urandom(50_000)).decode()
            document["original"] = {**document["original"], "body": body}
            publisher.publish(posted(document))
            ids.add(document["id"])
        failed.collect()
        peak = max(peak, client.info("memory")["used_memory"])
    publisher.close()

    kept = {summary.id for summary in failed.store.list(Filter(state=None))}
    archived = set()
    for path in (tmp_path / "archive").iterdir():
        with open(path, "rb") as file:
            archived |= {load_line(line).record.id for line in read_lines(file)}
    assert kept | archived == ids
    assert not kept & archived
    (used,) = failed.store.usage().values()
    assert used.size <= 4 * MIB
    assert peak < 16 * MIB
    assert client.info("stats")["evicted_keys"] == 0
    client.close()
