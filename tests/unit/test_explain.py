"""What `explain` says of a task: fates and risks from facts, and facts from an app."""

from __future__ import annotations

import json
from typing import Any

import pytest
from celery import Celery, Task
from hypothesis import given
from hypothesis import strategies as st

from celery_resilience import ConfigurationError, Resilience, ResilientTask
from celery_resilience.explain import (
    MEANINGS,
    RISKS,
    AppFacts,
    Fate,
    Fates,
    TaskExplained,
    TaskFacts,
    explain_task,
    summary_of,
)
from celery_resilience.explaining import explain_app, run, table

REDIS, AMQP, SQS = (AppFacts(driver=name) for name in ("redis", "amqp", "sqs"))
FILES = AppFacts(driver="filesystem")


def a_task(**changes: Any) -> TaskFacts:
    """A task of plain Celery with a time limit, of which nothing is risky."""
    facts: dict[str, Any] = {
        "name": "shop.ship",
        "base": "celery.app.task.Task",
        "is_resilient": False,
        "failed_queue": "shop.failed",
        "time_limit_s": 60.0,
    }
    return TaskFacts(**{**facts, **changes})


def explained(app: AppFacts = REDIS, **changes: Any) -> TaskExplained:
    """What is said of a task."""
    return explain_task(a_task(**changes), app)


def codes(found: TaskExplained, *, resilient: bool = True) -> set[str]:
    """The risks that hold with, or without, a resilient task."""
    return {
        risk.code
        for risk in found.risks
        if (risk.resilient if resilient else risk.plain)
    }


LATE: dict[str, Any] = {"acks_late": True}
GONE, KEPT, AGAIN = Fate.GONE, Fate.KEPT, Fate.RUNS_AGAIN
FOR_EVER, REJECTED = Fate.RUNS_FOR_EVER, Fate.REJECTED
BOTH = Fate.KEPT_AND_REJECTED
NEVER = Fates(Fate.CANNOT_HAPPEN, Fate.CANNOT_HAPPEN)


@pytest.mark.parametrize(
    ("case", "facts", "fates"),
    [
        ("on_failure", {}, Fates(GONE, KEPT)),
        ("on_failure", LATE, Fates(GONE, KEPT)),
        ("on_failure", {"acks_on_failure": False}, Fates(GONE, KEPT)),
        ("on_failure", {**LATE, "acks_on_failure": False}, Fates(REJECTED, BOTH)),
        ("on_dead_child", {}, Fates(GONE, KEPT)),
        ("on_dead_child", {"reject_on_worker_lost": True}, Fates(GONE, KEPT)),
        ("on_dead_child", LATE, Fates(GONE, AGAIN)),
        ("on_dead_child", {**LATE, "max_crashes": 1}, Fates(GONE, KEPT)),
        ("on_dead_child", {**LATE, "acks_on_failure": False}, Fates(REJECTED, AGAIN)),
        (
            "on_dead_child",
            {**LATE, "reject_on_worker_lost": True},
            Fates(FOR_EVER, AGAIN),
        ),
        ("on_dead_child", {**LATE, "reject_on_worker_lost": False}, Fates(GONE, KEPT)),
        (
            "on_dead_child",
            {**LATE, "retry_on_worker_lost": True},
            Fates(Fate.RETRIED, Fate.RETRIED),
        ),
        (
            "on_dead_child",
            {"retry_on_worker_lost": True, "max_retries": 0},
            Fates(GONE, KEPT),
        ),
        ("on_dead_worker", {}, Fates(Fate.LOST, Fate.LOST)),
        ("on_dead_worker", LATE, Fates(FOR_EVER, AGAIN)),
        ("on_hard_limit", {}, Fates(GONE, KEPT)),
        ("on_hard_limit", {"time_limit_s": None}, NEVER),
        ("on_hard_limit", LATE, Fates(GONE, KEPT)),
        ("on_hard_limit", {"acks_on_timeout": False}, Fates(GONE, KEPT)),
        ("on_hard_limit", {**LATE, "acks_on_timeout": False}, Fates(FOR_EVER, AGAIN)),
        (
            "on_hard_limit",
            {**LATE, "acks_on_timeout": False, "max_crashes": 1},
            Fates(FOR_EVER, KEPT),
        ),
    ],
)
def test_what_becomes_of_a_message(
    case: str, facts: dict[str, Any], fates: Fates
) -> None:
    """As Celery 5.7 does it, and as a resilient task does."""
    assert getattr(explained(**facts), case) == fates


@pytest.mark.parametrize("pool", ["threads", "solo", "gevent"])
def test_a_pool_without_children_loses_none(pool: str) -> None:
    """And only gevent among them knows a hard limit."""
    found = explained(AppFacts("redis", pool=pool), **LATE)

    assert found.on_dead_child == NEVER
    assert (found.on_hard_limit == NEVER) is (pool != "gevent")
    assert ("limits_not_enforced" in codes(found)) is (pool != "gevent")


def test_a_broker_that_deletes_what_it_hands_over_loses_it_with_the_worker() -> None:
    """Also where the task is acknowledged late."""
    assert explained(FILES, **LATE).on_dead_worker == Fates(Fate.LOST, Fate.LOST)
    assert "lost_with_worker" in codes(explained(FILES, **LATE))
    assert "lost_with_worker" not in codes(explained(REDIS, **LATE))


def test_what_is_not_kept_is_gone_as_before() -> None:
    """And crashes are bounded all the same."""
    found = explained(failed_queue=None, acks_late=True, acks_on_failure=False)

    assert not found.is_kept
    assert found.on_failure == Fates(REJECTED, REJECTED)
    assert found.on_dead_child.resilient is AGAIN
    assert codes(found) >= {"not_kept"}


def test_what_is_turned_off_changes_nothing() -> None:
    """`resilience_enabled = False` is plain Celery."""
    off = AppFacts("redis", is_enabled=False)
    found = explained(off, acks_late=True, reject_on_worker_lost=True)

    assert not found.is_kept
    for case in ("on_failure", "on_dead_child", "on_dead_worker", "on_hard_limit"):
        fates = getattr(found, case)
        assert fates.plain is fates.resilient
    assert {"disabled", "runs_for_ever"} <= codes(found)
    assert "reruns_after_crash" not in codes(found)
    endless = explain_task(a_task(time_limit_s=None, **LATE), off)
    assert "outlives_redelivery" in codes(endless)


@pytest.mark.parametrize(
    ("code", "app", "facts", "plain", "resilient"),
    [
        ("reruns_after_crash", REDIS, LATE, False, True),
        ("reruns_after_crash", REDIS, {}, False, False),
        (
            "reruns_after_crash",
            REDIS,
            {**LATE, "reject_on_worker_lost": True},
            False,
            False,
        ),
        (
            "reruns_after_crash",
            REDIS,
            {**LATE, "reject_on_worker_lost": False},
            False,
            False,
        ),
        ("runs_for_ever", REDIS, LATE, True, False),
        ("lost_with_worker", AMQP, {}, True, True),
        ("lost_with_worker", AMQP, LATE, False, False),
        ("outlives_redelivery", REDIS, {**LATE, "time_limit_s": None}, True, False),
        ("outlives_redelivery", AMQP, {**LATE, "time_limit_s": None}, True, True),
        ("outlives_redelivery", AMQP, {"time_limit_s": None}, False, False),
        ("outlives_redelivery", AMQP, {**LATE, "time_limit_s": 1799}, False, False),
        ("outlives_redelivery", AMQP, {**LATE, "time_limit_s": 1800}, True, True),
        ("outlives_redelivery", SQS, {**LATE, "time_limit_s": 1801}, True, True),
        (
            "outlives_redelivery",
            AppFacts("sqs", redelivered_after_s=7200),
            {**LATE, "time_limit_s": 1801},
            False,
            False,
        ),
        ("outlives_redelivery", FILES, {**LATE, "time_limit_s": None}, False, False),
        ("limits_disagree", REDIS, {"soft_time_limit_s": 60}, True, True),
        ("limits_disagree", REDIS, {"soft_time_limit_s": 59}, False, False),
        ("no_hard_limit", REDIS, {"time_limit_s": None}, True, True),
        ("no_hard_limit", REDIS, {}, False, False),
        ("retries_for_ever", REDIS, {"max_retries": None}, True, True),
        ("retries_for_ever", REDIS, {"max_retries": 0}, False, False),
        ("own_strategy", REDIS, {"has_own_strategy": True}, False, True),
        ("own_strategy", REDIS, {}, False, False),
        ("no_store", AppFacts("amqp", has_store=False), {}, False, True),
        ("no_store", AMQP, {}, False, False),
        ("not_kept", AMQP, {}, False, False),
        ("limits_not_enforced", REDIS, {}, False, False),
        (
            "limits_not_enforced",
            AppFacts("redis", pool="solo"),
            {"time_limit_s": None},
            False,
            False,
        ),
        ("disabled", REDIS, {}, False, False),
    ],
)
def test_a_risk_is_told_where_it_is(
    code: str, app: AppFacts, facts: dict[str, Any], plain: bool, resilient: bool
) -> None:
    """In plain Celery, with a resilient task, in both or in neither."""
    found = explained(app, **facts)

    assert (code in codes(found, resilient=False)) is plain
    assert (code in codes(found)) is resilient


def test_a_task_with_a_limit_that_is_acknowledged_late_on_redis_has_one_risk() -> None:
    """The one that adopting brings."""
    assert codes(explained(**LATE)) == {"reruns_after_crash"}


@given(
    st.builds(
        TaskFacts,
        name=st.just("t"),
        base=st.just("b.B"),
        is_resilient=st.booleans(),
        failed_queue=st.none() | st.just("q"),
        acks_late=st.booleans(),
        reject_on_worker_lost=st.none() | st.booleans(),
        retry_on_worker_lost=st.booleans(),
        acks_on_failure=st.booleans(),
        acks_on_timeout=st.booleans(),
        soft_time_limit_s=st.none() | st.floats(1, 1e5),
        time_limit_s=st.none() | st.floats(1, 1e5),
        max_retries=st.none() | st.integers(0, 5),
        max_crashes=st.integers(1, 5),
        has_own_strategy=st.booleans(),
    ),
    st.builds(
        AppFacts,
        driver=st.sampled_from(["redis", "amqp", "sqs", "filesystem", "odd"]),
        redelivered_after_s=st.none() | st.floats(1, 1e5),
        pool=st.sampled_from(["prefork", "threads", "gevent", "solo"]),
        is_enabled=st.booleans(),
        has_store=st.booleans(),
    ),
)
def test_no_resilient_task_runs_for_ever(task: TaskFacts, app: AppFacts) -> None:
    """Unless it is turned off; and every answer is a document."""
    found = explain_task(task, app)
    document = json.loads(json.dumps(found.to_dict()))

    cases = [found.on_failure, found.on_dead_child, found.on_hard_limit]
    if app.is_enabled:
        assert all(f.resilient is not FOR_EVER for f in [*cases, found.on_dead_worker])
    assert found.is_kept or not any(f.resilient in (KEPT, BOTH) for f in cases)
    assert document["schema"] == 1
    assert {risk["code"] for risk in document["risks"]} <= set(RISKS)
    assert all(risk["plain"] or risk["resilient"] for risk in document["risks"])


def test_every_fate_has_a_meaning() -> None:
    """And the risks are summed up in their order, with the tasks they hold for."""
    assert set(MEANINGS) == set(Fate)
    found = [explained(name="a"), explained(name="b", **LATE)]
    assert [(code, tasks) for code, _, tasks in summary_of(found)] == [
        ("reruns_after_crash", ["b"]),
        ("lost_with_worker", ["a"]),
    ]


# --- from an app -----------------------------------------------------------------------


class Own(Task):  # type: ignore[type-arg]
    """A base class of the app's own."""


def body() -> None:
    """Does nothing."""


def an_app(**conf: Any) -> Celery:
    """An app that has adopted nothing."""
    app = Celery("shop", set_as_current=False, broker="redis://localhost/0")
    app.conf.update(conf)
    return app


def by_name(app: Celery) -> dict[str, TaskExplained]:
    """What is said of each task."""
    return {task.task: task for task in explain_app(app)}


def test_an_app_is_explained_without_being_changed() -> None:
    """Its tasks by name, without Celery's; nothing is installed."""
    app = an_app(task_acks_late=True, task_time_limit=7200)
    app.task(name="mail", shared=False)(body)
    app.task(name="charge", base=Own, shared=False, time_limit=5)(body)
    before = dict(vars(app))

    found = by_name(app)

    assert [*found] == ["charge", "mail"]
    assert not any("resilience" in name for name in set(vars(app)) - set(before))
    assert found["mail"].adopt == "base=ResilientTask"
    assert found["charge"].adopt == "class Base(ResilientTask, Own), and base=Base"
    assert found["mail"].acks_late is True
    assert (found["mail"].time_limit_s, found["charge"].time_limit_s) == (7200, 5)
    assert found["mail"].redelivered_after_s == 3600
    assert found["mail"].failed_queue == "shop.failed"
    assert found["mail"].is_resilient is False


#: Since Celery 5.7 there is an option each for failures and time limits.
FOR_FAILURES = (
    "acks_on_failure"
    if hasattr(Task, "acks_on_failure")
    else "acks_on_failure_or_timeout"
)


def test_options_of_task_and_app_are_read() -> None:
    """Where a task says something, it beats the app."""
    acks = {f"task_{FOR_FAILURES}": False}
    if FOR_FAILURES == "acks_on_failure":
        acks["task_acks_on_timeout"] = True
    app = an_app(
        broker_transport_options={"visibility_timeout": 600},
        resilience_failed_routes={"mail*": None, "pay.*": "pay.failed"},
        resilience_max_crashes=7,
        worker_pool="solo",
        **acks,
    )
    resilience = Resilience(app)
    options: dict[str, Any] = {"base": ResilientTask, "shared": False}
    app.task(name="mail", **options)(body)
    own: dict[str, Any] = {FOR_FAILURES: True, "max_crashes": 2}
    app.task(name="pay.card", **own, **options)(body)
    app.task(name="note", failed_queue=False, Strategy="shop:batches", **options)(body)

    found = {task.task: task for task in resilience.explain()}

    assert {name: task.failed_queue for name, task in found.items()} == {
        "mail": None,
        "note": None,
        "pay.card": "pay.failed",
    }
    assert {name: task.max_crashes for name, task in found.items()} == {
        "mail": 7,
        "note": 7,
        "pay.card": 2,
    }
    assert found["mail"].redelivered_after_s == 600
    assert (found["mail"].acks_on_failure, found["pay.card"].acks_on_failure) == (
        False,
        True,
    )
    assert found["mail"].acks_on_timeout is ("task_acks_on_timeout" in acks)
    assert found["mail"].on_dead_child == NEVER
    assert "own_strategy" in codes(found["note"])
    assert "own_strategy" not in codes(found["mail"])
    assert all(task.is_resilient and task.adopt is None for task in found.values())


def test_an_option_of_a_later_celery_changes_nothing() -> None:
    """Celery does not read it, and neither do we."""
    app = an_app()
    app.task(name="mail", acks_on_failure=False, shared=False)(body)

    assert by_name(app)["mail"].acks_on_failure is (FOR_FAILURES != "acks_on_failure")


def test_the_kind_of_broker_is_known_without_its_url() -> None:
    """A transport may be a class of the app's own."""
    app = an_app(broker_transport="kombu.transport.filesystem:Transport")
    app.task(name="mail", acks_late=True, shared=False)(body)

    assert by_name(app)["mail"].on_dead_worker == Fates(Fate.LOST, Fate.LOST)


def test_a_broker_whose_library_is_missing_is_known_by_its_url() -> None:
    """An operator's host may have no driver for it."""
    app = an_app(broker_transport="sqs+nothing:Here")
    app.conf.broker_transport = None
    app.conf.broker_url = "qpid://localhost"
    app.task(name="mail", acks_late=True, shared=False)(body)

    assert by_name(app)["mail"].on_dead_worker.plain is Fate.LOST


def test_without_an_app_there_is_nothing_to_explain() -> None:
    """It says what to call."""
    with pytest.raises(ConfigurationError, match="init_app"):
        Resilience().explain()


@pytest.mark.parametrize(
    ("setting", "options", "said"),
    [
        (
            "resilience_circuits",
            {"probs": 3},
            "resilience_circuits: p: unknown option probs, did you mean probes?",
        ),
        (
            "resilience_retry_budgets",
            {"share": 2},
            "resilience_retry_budgets: p: share must be a number from 0 to 1, got 2",
        ),
    ],
)
def test_what_a_worker_refuses_at_its_start_is_refused(
    capsys: pytest.CaptureFixture[str], setting: str, options: Any, said: str
) -> None:
    """Options in a setting are read late elsewhere, and no task need name them."""
    app = an_app(**{setting: {"p": options}})
    app.task(name="mail", shared=False)(body)

    assert run(app, "table") == 2
    assert capsys.readouterr().err == f"{said}\n"


def test_a_wrong_setting_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """With the exit code of the other commands, and its name."""
    app = an_app(resilience_max_crashes=0)
    app.task(name="mail", shared=False)(body)

    assert run(app, "json") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "resilience_max_crashes" in captured.err


def test_an_app_without_tasks_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    """On stderr, because it is no data."""
    assert run(an_app(), "table") == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "no tasks" in captured.err


def test_a_table_has_a_line_for_each_task_and_its_words() -> None:
    """Many tasks of one risk are counted."""
    many = [explained(name=f"t{n}") for n in range(5)] + [explained(name="z", **LATE)]

    lines = [*table(many)]

    assert [line.split()[0] for line in lines[1:7]] == [
        *(f"t{n}" for n in range(5)),
        "z",
    ]
    assert "gone > runs_again" in lines[6]
    text = "\n".join(lines)
    assert "lost_with_worker (t0, t1, t2 and 2 more)" in text
    assert MEANINGS[Fate.RUNS_AGAIN] in text
    assert MEANINGS[Fate.RETRIED] not in text


# --- keys --------------------------------------------------------------------------------


def charge(order: int) -> None:
    """Has an argument."""


def keyed(app: Celery | None = None, **options: Any) -> TaskExplained:
    """What is said of a task with a key."""
    app = app or an_app(task_time_limit=60)
    app.task(
        **{
            "name": "charge",
            "base": ResilientTask,
            "shared": False,
            "idempotency_key": "charge:{order}",
            **options,
        }
    )(charge)
    return by_name(app)["charge"]


def test_a_key_is_told_with_what_it_asks_for() -> None:
    """Beside what plain Celery does with the same task, which has no key."""
    found = keyed(unique_enqueue=True)

    assert found.acks_late is True
    assert found.keys is not None
    assert found.keys.key == "charge:{order}"
    assert found.keys.asks_for == ("acks_late", "reject_on_worker_lost")
    assert (found.keys.if_running, found.keys.if_done) == ("snooze", "return_saved")
    assert found.on_dead_child == Fates(GONE, AGAIN)
    assert found.on_dead_worker == Fates(Fate.LOST, AGAIN)
    assert codes(found) == {"reruns_after_crash"}
    assert codes(found, resilient=False) == {"lost_with_worker"}
    endless = keyed(an_app())
    assert "outlives_redelivery" not in codes(endless, resilient=False)
    endless = keyed(an_app(task_acks_late=True))
    assert "outlives_redelivery" in codes(endless, resilient=False)
    document = json.loads(json.dumps(found.to_dict()))
    assert document["keys"]["unique_enqueue"] is True
    text = "\n".join(table([found]))
    assert "charge: charge:{order}" in text
    assert "acks_late, reject_on_worker_lost" in text
    assert "it ends with the saved result" in text


def test_what_the_task_and_the_app_say_is_no_wish_of_the_key() -> None:
    """Plain Celery does it too."""
    app = an_app(task_acks_late=True, task_time_limit=60)

    found = keyed(app, reject_on_worker_lost=False)

    assert found.keys is not None
    assert found.keys.asks_for == ("acks_late",)
    assert found.on_dead_child == Fates(GONE, KEPT)
    assert found.on_dead_worker == Fates(FOR_EVER, AGAIN)


@pytest.mark.parametrize(
    ("policy", "fate", "word"),
    [
        ("rerun", AGAIN, "it runs"),
        ("fail", Fate.INTERRUPTED, "it fails as interrupted"),
        (lambda order: True, Fate.LOOKED_AT, "a callable looks"),
    ],
)
def test_an_interrupted_run_becomes_what_the_task_says(
    policy: Any, fate: Fate, word: str
) -> None:
    """Not a second run, where it says fail."""
    found = keyed(if_interrupted=policy)

    assert found.on_dead_child.resilient is fate
    assert found.on_dead_worker.resilient is fate
    assert ("reruns_after_crash" in codes(found)) is (policy == "rerun")
    assert word in "\n".join(table([found]))


@pytest.mark.parametrize(
    ("key", "told"), [(True, "all arguments"), (str, "a callable")]
)
def test_a_key_that_is_no_template_is_told_by_its_kind(key: Any, told: str) -> None:
    """Its code is not shown."""
    keys = keyed(idempotency_key=key).keys

    assert keys is not None
    assert keys.key == told


def test_keys_without_a_store_wait() -> None:
    """Only where there is a task that has one."""
    app = AppFacts("amqp", has_store=False)
    found = keyed()

    assert "keys_wait" not in codes(explained(app))
    assert "keys_wait" not in codes(found)
    assert "keys_wait" in codes(explained(app, keys=found.keys))
