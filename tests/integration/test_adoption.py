"""Taking the base class up, and putting it down, changes nothing else of an app."""

from __future__ import annotations

import json
import re
import textwrap
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from conftest import FleetMaker
from fleet_runner import Fleet
from polling import eventually

QUICK_REDIS = {
    # A worker that is killed as it looks for messages of dead ones bars the others.
    "unacked_mutex_expire": 2,
    "visibility_timeout": 3,
    "unacked_restore_interval": 1,
    "unacked_restore_throttle": 1,
}


def with_app(fleet: Fleet, source: str) -> Fleet:
    """Give the fleet's workers another app, from the source of a module."""
    text = textwrap.dedent(source)
    (fleet.folder / "fleet_worker.py").write_text(
        "import json, os\nfrom celery import Celery\nfrom fleet import note\n"
        "conf = json.loads(os.environ['FLEET_CONF'])\n" + text
    )
    return fleet


ADOPTIONS = {
    "base": """
        from celery_resilience import ResilientTask
        app = Celery("fleet")
        app.conf.update(conf)
        @app.task(name="boom", base=ResilientTask)
        def boom(): raise ValueError("boom")
        """,
    "task_cls": """
        app = Celery("fleet", task_cls="celery_resilience:ResilientTask")
        app.conf.update(conf)
        @app.task(name="boom")
        def boom(): raise ValueError("boom")
        """,
    "app.Task": """
        from celery_resilience import ResilientTask
        app = Celery("fleet")
        app.conf.update(conf)
        app.Task = ResilientTask
        @app.task(name="boom")
        def boom(): raise ValueError("boom")
        """,
    "shared_task": """
        from celery import shared_task
        from celery_resilience import Resilience, ResilientTask
        @shared_task(name="boom", base=ResilientTask)
        def boom(): raise ValueError("boom")
        app = Celery("fleet")
        app.conf.update(conf)
        resilience = Resilience()
        resilience.init_app(app)
        resilience.init_app(app)
        """,
    "class": """
        from celery_resilience import ResilientTask
        app = Celery("fleet")
        app.conf.update(conf)
        class Boom(ResilientTask):
            name = "boom"
            def run(self): raise ValueError("boom")
        app.register_task(Boom())
        """,
    "own base, Request and Consumer": """
        from celery import Task
        from celery.worker.consumer import Consumer
        from celery.worker.request import Request
        from celery_resilience import ResilientTask
        class OwnRequest(Request):
            def on_failure(self, exc_info, send_failed_event=True, return_ok=False):
                note("own request", self.id)
                super().on_failure(exc_info, send_failed_event, return_ok)
        class OwnConsumer(Consumer):
            def on_message_received(self): ...
            def update_strategies(self):
                note("own consumer")
                super().update_strategies()
        class OwnTask(Task):
            abstract = True
            Request = OwnRequest
            def __call__(self, *args, **kwargs):
                note("own call", self.request.id)
                return super().__call__(*args, **kwargs)
            def on_failure(self, exc, task_id, args, kwargs, einfo):
                note("own on_failure", task_id)
        class Both(ResilientTask, OwnTask):
            abstract = True
        class OtherWay(OwnTask, ResilientTask):
            abstract = True
        app = Celery("fleet")
        app.conf.update(conf)
        app.conf.worker_consumer = "fleet_worker:OwnConsumer"
        @app.task(name="boom", base=Both)
        def boom(): raise ValueError("boom")
        @app.task(name="boom2", base=OtherWay)
        def boom2(): raise ValueError("boom")
        """,
}


@pytest.mark.parametrize("how", ADOPTIONS)
def test_every_way_to_take_it_up(make_fleet: FleetMaker, how: str) -> None:
    """A failure is kept, however the base class came to the task."""
    fleet = with_app(make_fleet("redis"), ADOPTIONS[how])
    worker = fleet.worker()
    sent = [fleet.app.send_task("boom")]
    if how.startswith("own"):
        sent.append(fleet.app.send_task("boom2"))

    for result in sent:
        assert fleet.record_of(result.id)["reason"] == "exception"
        if how.startswith("own"):
            told = {line[0] for line in fleet.notes() if line[1:] == [result.id]}
            assert told == {"own request", "own call", "own on_failure"}
            assert fleet.notes("own consumer") == [["own consumer"]]
    assert worker.stop() == 0
    assert worker.outcomes() == {"received": len(sent), "failed": len(sent)}


def test_a_traceback_is_as_without_us(make_fleet: FleetMaker) -> None:
    """Nothing of ours stands between Celery and the task."""
    functions = []
    for is_plain in (True, False):
        fleet = make_fleet("redis", is_plain=is_plain)
        fleet.worker()
        sent = fleet.send("boom")
        eventually(lambda sent=sent: sent.state == "FAILURE")
        functions.append(re.findall(r"line \d+, in (\w+)", sent.traceback))

    plain, resilient = functions
    assert plain == ["trace_task", "__protected_call__", "boom"]
    assert resilient == ["trace_task", "boom"]


@pytest.mark.parametrize("task_id", [uuid4(), 12345], ids=["uuid", "number"])
def test_a_task_id_need_not_be_a_text(make_fleet: FleetMaker, task_id: Any) -> None:
    """Celery takes what its serializer takes; we show it as text."""
    # Most result backends take no number.
    fleet = make_fleet("redis", result_backend=None)
    fleet.worker()
    cured = fleet.folder / "cured"
    fleet.app.tasks["boom_unless_untold"].apply_async(
        (str(cured),), task_id=task_id, root_id=task_id
    )

    record = fleet.record_of(str(task_id))
    assert (record["reason"], record["message"]) == ("exception", "not yet")
    cured.touch()
    fleet.failed.replay([record["id"]])
    eventually(
        lambda: fleet.records()[str(task_id)]["state"] == "resolved", every_s=0.3
    )


def is_given_up(fleet: Fleet) -> bool:
    """Whether every message that is held on Redis has outlived its visibility."""
    with fleet.app.connection_for_read() as connection:
        channel = connection.default_channel
        newer = time.time() - channel.visibility_timeout
        key = channel.unacked_index_key
        return not channel.client.zrevrangebyscore(key, "+inf", newer)


def test_a_task_id_that_is_no_text_survives_its_worker(make_fleet: FleetMaker) -> None:
    """Its message is delivered again, and its start is counted under it."""
    # Before 5.7, Celery's result backends of keys and values take no UUID.
    fleet = make_fleet("redis", task_acks_late=True, result_backend=None)
    fleet.conf["broker_transport_options"].update(QUICK_REDIS)
    worker = fleet.worker()
    run, end = fleet.folder / "run", fleet.folder / "end"
    fleet.app.tasks["busy_untold"].apply_async((str(run), str(end)), task_id=uuid4())
    eventually(run.exists)
    worker.kill()

    run.unlink()
    # At its start a worker looks for what is given up; kombu 5.5 looks again after
    # a hundred seconds.
    eventually(lambda: is_given_up(fleet), what="the killed worker counts as dead")
    worker = fleet.worker()
    eventually(run.exists, within_s=60)
    end.touch()
    skipped = fleet.send("skipped_untold", task_id=uuid4())
    eventually(lambda: f"[{skipped.id}] succeeded" in worker.text)
    assert worker.stop() == 0
    assert worker.outcomes() == {"received": 2, "succeeded": 1, "skipped": 1}


def test_spawned_children_have_the_rooms_too(make_fleet: FleetMaker) -> None:
    """All that needs no word to the main process; the worker says what is weaker."""
    fleet = with_app(
        make_fleet("redis", worker_pool_start_method="spawn"),
        """
        import pathlib, sys
        from celery_resilience import Resilience, ResilientTask, Skip
        app = Celery("fleet", set_as_current=False)
        app.conf.update(conf)
        Resilience(app)
        @app.task(name="system_exit", base=ResilientTask, shared=False)
        def system_exit(): sys.exit(3)
        @app.task(name="skipped", base=ResilientTask, shared=False)
        def skipped(): raise Skip("nothing to do")
        @app.task(name="boom_unless", base=ResilientTask, shared=False)
        def boom_unless(path):
            if not pathlib.Path(path).exists(): raise ValueError("not yet")
            note("effect")
        """,
    )
    worker = fleet.worker(concurrency=1)
    assert "children cannot tell this process" in worker.text
    cured = fleet.folder / "cured"
    exits, skipped = fleet.send("system_exit"), fleet.send("skipped")
    failing = fleet.send("boom_unless", str(cured))

    assert fleet.record_of(exits.id)["reason"] == "exception"
    eventually(lambda: skipped.state == "SUCCESS")
    record = fleet.record_of(failing.id)
    assert worker.stop() == 0
    cured.touch()
    fleet.failed.replay([record["id"]])
    assert fleet.failed.reopen([record["id"]]) == 1
    worker.start()
    last = fleet.send("skipped")
    eventually(lambda: last.state == "SUCCESS")
    assert fleet.notes("effect") == []


def test_celerys_own_tasks_stay_plain(make_fleet: FleetMaker) -> None:
    """With the base class for all, `celery.chunks` and its like are not kept."""
    fleet = with_app(make_fleet("redis"), ADOPTIONS["task_cls"])
    worker = fleet.worker()
    plain = fleet.app.send_task("celery.map", args=[{"task": "boom"}, [[]]])
    eventually(lambda: plain.state == "FAILURE")

    assert worker.stop() == 0
    assert worker.outcomes()["failed"] == 0
    assert fleet.records() == {}


def test_switched_off_it_is_plain_celery(make_fleet: FleetMaker) -> None:
    """Nothing is kept, nothing is said, and the flags still parse."""
    fleet = make_fleet("redis", resilience_enabled=False)
    worker = fleet.worker("--max-crashes", "2")
    sent = fleet.send("boom")
    eventually(lambda: sent.state == "FAILURE")

    assert worker.stop() == 0
    assert "celery-resilience" not in worker.text
    assert "task failed:" not in worker.text
    fleet.conf["resilience_enabled"] = True
    assert fleet.records() == {}


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (
            {"resilience_max_crash": 3, "resilience_failed_queue": ""},
            [
                "resilience_max_crash, did you mean resilience_max_crashes?",
                "resilience_failed_queue must be a text that is not empty, got ''",
            ],
        ),
        (
            {"resilience_store_url": "mongodb://somewhere"},
            ["resilience_store_url must be one of redis://"],
        ),
    ],
)
def test_a_worker_with_wrong_settings_does_not_start(
    make_fleet: FleetMaker, wrong: dict[str, Any], words: list[str]
) -> None:
    """It says all that is wrong, without a traceback; commands exit with 2."""
    fleet = make_fleet("redis")
    fleet.conf.update(wrong)

    refused = fleet.command("worker", "--pool", "solo", timeout=60)
    assert refused.returncode == 1
    listed = fleet.command("failed", "list", timeout=60)
    assert listed.returncode == 2
    for said in (refused.stderr, listed.stderr):
        assert "Traceback" not in said
        for part in words:
            assert part in said


def test_a_wrong_option_is_refused_where_the_task_is_made(
    make_fleet: FleetMaker,
) -> None:
    """The worker does not start, and names the task, the option and its value."""
    source = ADOPTIONS["base"].replace(
        "base=ResilientTask)", "base=ResilientTask, max_crashes=0)"
    )
    fleet = with_app(make_fleet("redis"), source)

    refused = fleet.command("worker", "--pool", "solo", timeout=60)
    assert refused.returncode != 0
    assert "task boom: max_crashes must be a whole number from 1" in refused.stderr


def test_the_workers_help_has_our_flags(make_fleet: FleetMaker) -> None:
    """Under a heading of their own, each with its relation to Celery's own."""
    fleet = make_fleet("redis")

    told = fleet.command("worker", "--help").stdout
    ours = told.partition("Resilience options")[2].partition("\n\n")[0]
    assert "--max-crashes" in ours
    assert "reject_on_worker_lost" in " ".join(ours.split())
    assert "--collect-failed" in ours
    for wrong in ("0", "many"):
        refused = fleet.command("worker", "--max-crashes", wrong)
        assert refused.returncode == 2
        assert "--max-crashes" in refused.stderr


def test_django(make_fleet: FleetMaker, tmp_path: Path) -> None:
    """`CELERY_RESILIENCE_…` in Django's settings, and `delay_on_commit`, work."""
    fleet = make_fleet("redis")
    conf = {f"CELERY_{key.upper()}": value for key, value in fleet.conf.items()}
    (fleet.folder / "django_settings.py").write_text(
        "import json\n"
        f"globals().update(json.loads({json.dumps(conf)!r}))\n"
        "DATABASES = {'default': {'ENGINE': 'django.db.backends.sqlite3', "
        f"'NAME': {str(tmp_path / 'django.sqlite3')!r}}}}}\n"
        "SECRET_KEY = 'none'\n"
    )
    with_app(
        fleet,
        """
        import os
        os.environ["DJANGO_SETTINGS_MODULE"] = "django_settings"
        from celery_resilience import Resilience, ResilientTask
        app = Celery("fleet")
        app.config_from_object("django.conf:settings", namespace="CELERY")
        Resilience(app)
        @app.task(name="boom", base=ResilientTask)
        def boom(): raise ValueError("boom")
        @app.task(name="in_transaction", base=ResilientTask)
        def in_transaction():
            from django.db import transaction
            with transaction.atomic():
                boom.apply_async_on_commit(task_id="committed")
                note("before commit")
            try:
                with transaction.atomic():
                    boom.delay_on_commit()
                    raise RuntimeError
            except RuntimeError:
                pass
        """,
    )
    worker = fleet.worker()
    done = fleet.app.send_task("in_transaction")

    assert fleet.record_of("committed")["app"] == fleet.conf["resilience_namespace"]
    eventually(lambda: done.state == "SUCCESS")
    assert worker.stop() == 0
    assert worker.outcomes() == {"received": 2, "succeeded": 1, "failed": 1}
