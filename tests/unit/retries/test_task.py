"""A task's rules where a run begins and where it has failed, without a worker."""

from __future__ import annotations

import logging
import pickle
import signal
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery
from celery.app.task import Context
from celery.exceptions import Retry, SoftTimeLimitExceeded
from unit.specimens import fresh_name, replay_mark

from celery_resilience import (
    ConfigurationError,
    Never,
    On,
    ResilientTask,
    events,
)
from celery_resilience.circuits.task import TaskCircuit
from celery_resilience.errors import (
    HeldFromAutoretry,
    LeftBehind,
    RetryByRule,
    RetryNotPublished,
    RetrySnooze,
)
from celery_resilience.failed.record import tried_again
from celery_resilience.message import HEADER, KEY
from celery_resilience.retries.budgets import Budgets
from celery_resilience.retries.options import BudgetOptions
from celery_resilience.retries.task import TaskRules
from celery_resilience.run_view import PAID_FACT, RUN_FACTS
from celery_resilience.task import EXHAUSTED

MAX_WAIT_S = 30.0


class Away(OSError):
    """The bank is away."""


class Budget:
    """A budget that says what it is told to."""

    def __init__(self) -> None:
        self.firsts: list[str] = []
        self.says: Any = None

    def add_first(self, name: str) -> None:
        """A first attempt begins."""
        self.firsts.append(name)

    def withdraw(self, name: str, max_wait_s: float) -> Any:
        """A retry asks."""
        return SimpleNamespace(is_granted=self.says[0], wait_s=self.says[1])


class Runner:
    """Runs bodies as a worker's child does, and keeps what they send."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.app = Celery(fresh_name("unit"), set_as_current=False, broker="memory://")
        self.budget = Budget()
        self.now = 1_000.0
        self.chance = 0.0
        self.sent: list[dict[str, Any]] = []
        self.error: Exception | None = None
        self.rooms: Any = SimpleNamespace(around=(), give_way=None)
        self._monkeypatch = monkeypatch

    def task(self, body: Any, *rules: Any, **options: Any) -> Any:
        """A task with these rules."""
        name = fresh_name("shop.pay")
        body.__name__ = "pay"  # Celery writes a function of that name
        task = self.app.task(
            base=ResilientTask, name=name, shared=False, retry_rules=rules, **options
        )
        task(body)
        found: Any = self.app.tasks[name]
        made = TaskRules(
            rules,
            budgets=lambda: self.budget,  # type: ignore[arg-type,return-value]
            max_wait_s=lambda: MAX_WAIT_S,
            clock=lambda: self.now,
            chance=lambda: self.chance,
        )
        self._monkeypatch.setattr(type(found), "_rules", made if rules else None)
        self._monkeypatch.setattr(type(found), "apply_async", self._apply_async)
        return found

    def _apply_async(
        self, args: Any = None, kwargs: Any = None, **options: Any
    ) -> None:
        if self.error is not None:
            raise self.error
        self.sent.append(options)

    def run(self, task: Any, retries: int = 0, **marks: Any) -> Any:
        """One run of its body, of a message with these marks of ours."""
        headers = {HEADER: marks} if marks else {}
        request = Context(
            id="i",
            args=[],
            kwargs={},
            retries=retries,
            called_directly=False,
            delivery_info={"exchange": "", "routing_key": "shop"},
            headers=headers,
            **headers,
        )
        self.request = request
        task.request_stack.push(request)
        try:
            return task._run_body(self.rooms, request, (), {})
        finally:
            task.request_stack.pop()

    @property
    def marks(self) -> Any:
        """Ours on what was sent last."""
        return self.sent[-1]["headers"][HEADER]


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> Runner:
    """With an app of its own."""
    return Runner(monkeypatch)


def fails(exc: BaseException) -> Any:
    """A body that raises."""

    def body() -> None:
        raise exc

    return body


def test_a_failed_run_is_sent_again(runner: Runner) -> None:
    """With Celery's own number of retries, and ours; the limit of Celery's is not asked."""
    task = runner.task(fails(OSError()), On(OSError, backoff_s=(2, 9)), max_retries=1)

    with pytest.raises(RetryByRule) as raised:
        runner.run(task, retries=5)

    assert str(raised.value) == "Retry in 2.0s: OSError()"
    sent = runner.sent[0]
    assert (sent["task_id"], sent["retries"], sent["countdown"]) == ("i", 6, 2.0)
    assert set(runner.marks) == {"retry"}
    assert not hasattr(task, "override_max_retries")


def test_counts_go_on_from_message_to_message(runner: Runner) -> None:
    """Until the rule has had enough: then it is the body's own exception."""
    failure = Away()
    task = runner.task(fails(failure), On(OSError, attempts=3, backoff_s=1))
    for retries in range(2):
        with pytest.raises(RetryByRule):
            runner.run(task, retries, **(runner.marks if retries else {}))

    with pytest.raises(Away) as raised:
        runner.run(task, 2, **runner.marks)

    assert raised.value is failure
    assert vars(runner.request)[EXHAUSTED] == id(failure)
    assert len(runner.sent) == 2


@pytest.mark.parametrize(
    ("exc", "rules"),
    [
        (ValueError(), (On(OSError),)),
        (ValueError(), (Never(ValueError),)),
        (KeyboardInterrupt(), (On(Exception),)),
        (SoftTimeLimitExceeded(), (On(Exception),)),
    ],
)
def test_what_no_rule_is_for_stays_as_it_was(
    runner: Runner, exc: BaseException, rules: Any
) -> None:
    """And what is never tried again too."""
    task = runner.task(fails(exc), *rules)

    with pytest.raises(type(exc)) as raised:
        runner.run(task)

    assert raised.value is exc
    assert EXHAUSTED not in vars(runner.request)


def test_celerys_own_retry_that_has_given_up_is_not_tried_again(runner: Runner) -> None:
    """Its limit is the task's `max_retries`."""

    def body(self: Any) -> None:
        try:
            raise Away
        except Away as exc:
            raise self.retry(exc=exc, max_retries=0) from None

    task = runner.task(body, On(OSError), bind=True)
    with pytest.raises(Away):
        runner.run(task)

    assert runner.sent == []


def test_a_retry_has_the_marks_of_its_run(runner: Runner) -> None:
    """Its replay and key, but neither crashes nor what it has waited for."""
    task = runner.task(fails(OSError()), On(OSError, backoff_s=1))
    replay = replay_mark("r", "t")
    runner.budget.says = (True, 0.0)
    own = {"crashes": 1, "snoozes": 4, "retry_wait": {"budget": "old"}}
    with pytest.raises(RetryByRule):
        runner.run(task, 1, **replay, key=["k", ""], **own)

    assert set(runner.marks) == {"replay", KEY, "retry"}


def test_celerys_own_retry_keeps_the_counts(runner: Runner) -> None:
    """A body that retries by itself now and then is not tried again for ever."""

    def body(self: Any) -> None:
        raise self.retry(countdown=0)

    task = runner.task(body, On(OSError), bind=True)
    mark = {"since": 1.0, "spent": {"a": 2}, "failures": []}
    with pytest.raises(Retry):
        runner.run(task, 1, retry=mark, retry_wait={"due": 5.0})

    assert runner.marks == {"retry": mark}


def test_a_room_may_change_what_a_run_came_to(runner: Runner) -> None:
    """Which is then what the rules are asked for."""

    class Strict:
        def before(self, *_: Any) -> None:
            """Nothing."""

        def after(self, *_: Any) -> None:
            raise LeftBehind("a transaction")

    runner.rooms = SimpleNamespace(around=(Strict(),), give_way=None)
    with pytest.raises(LeftBehind):
        runner.run(runner.task(fails(OSError()), On(OSError)))
    with pytest.raises(RetryByRule):
        runner.run(runner.task(fails(OSError()), On(LeftBehind)))
    with pytest.raises(RetryByRule):
        runner.run(runner.task(lambda: None, On(LeftBehind)))


def test_a_retry_that_cannot_be_published_fails_with_both_reasons(
    runner: Runner,
) -> None:
    """It is kept, as any other failure is."""
    task = runner.task(fails(OSError("the bank")), On(OSError))
    runner.error = ConnectionError("the broker")

    with pytest.raises(
        RetryNotPublished, match="the broker; the task had raised OSErr"
    ):
        runner.run(task)


def test_a_soft_limit_that_comes_while_it_is_sent_is_too_late(runner: Runner) -> None:
    """The retry runs in any case: a failure beside it would be replayed to no good."""

    class Slow(OSError):
        pass

    def limit(*_: object) -> None:
        raise SoftTimeLimitExceeded

    task = runner.task(fails(Slow()), On(OSError))
    publish = type(task).apply_async

    def interrupted(*args: Any, **options: Any) -> None:
        signal.raise_signal(signal.SIGUSR1)
        publish(*args, **options)

    type(task).apply_async = staticmethod(interrupted)  # type: ignore[method-assign]
    before = signal.signal(signal.SIGUSR1, limit)
    try:
        with pytest.raises(RetryByRule):
            runner.run(task)
    finally:
        signal.signal(signal.SIGUSR1, before)

    assert len(runner.sent) == 1


# --- waiting ---------------------------------------------------------------------------


def test_a_long_wait_is_held_in_parts(runner: Runner) -> None:
    """The broker might deliver again what is held for longer."""
    ran: list[int] = []
    task = runner.task(lambda: ran.append(1), On(OSError))
    due = {"retry_wait": {"due": runner.now + 70}}

    with pytest.raises(RetrySnooze) as raised:
        runner.run(task, 1, **due, snoozes=2)

    assert (raised.value.countdown_s, raised.value.reason) == (30, "retry_not_due")
    assert raised.value.marks == {"snoozes": 2}
    runner.now += 60
    with pytest.raises(RetrySnooze) as raised:
        runner.run(task, 1, **due)
    assert raised.value.countdown_s == pytest.approx(10)
    assert ran == []
    runner.now += 10
    runner.run(task, 1, **due)
    assert ran == [1]


def test_a_message_says_until_when_it_waits(runner: Runner) -> None:
    """Where it may not be held until then."""
    task = runner.task(fails(OSError()), On(OSError, backoff_s=70))
    with pytest.raises(RetryByRule):
        runner.run(task)

    assert runner.sent[0]["countdown"] == MAX_WAIT_S
    assert runner.marks["retry_wait"] == {"due": runner.now + 70}


def test_a_retry_takes_from_its_budget_before_it_runs(runner: Runner) -> None:
    """Or waits; what it was promised it does not ask for again."""
    ran: list[int] = []
    rule = On(OSError, backoff_s=1, budget="bank")
    task = runner.task(lambda: ran.append(1), rule)
    mark = {"retry_wait": {"budget": "bank"}}

    runner.budget.says = (False, 20.0)
    with pytest.raises(RetrySnooze) as refused:
        runner.run(task, 1, **mark)
    runner.budget.says = (True, 7.0)
    with pytest.raises(RetrySnooze) as promised:
        runner.run(task, 1, **mark)

    assert refused.value.marks == {**mark, "snoozes": None}
    assert refused.value.countdown_s == pytest.approx(10)  # of the lowest chance
    assert promised.value.marks == {"retry_wait": None, "snoozes": None}
    assert promised.value.countdown_s == 7
    assert ran == []
    runner.budget.says = (True, 0.0)
    runner.run(task, 1, **mark)
    assert ran == [1]
    assert vars(runner.request)[RUN_FACTS] == {PAID_FACT: True}
    assert runner.budget.firsts == []


def test_first_attempts_add_to_the_budgets_of_their_rules(runner: Runner) -> None:
    """Each to each once; those of a task without one to none."""
    rules = (On(OSError, budget="bank"), On(KeyError, budget="mail"))
    again = On(IndexError, budget="bank")
    task = runner.task(lambda: 1, *rules, again)
    runner.run(task)
    runner.run(task, 1)
    runner.run(task, sent="snoozed once", snoozes=1)
    runner.run(runner.task(lambda: 1, On(OSError)))

    assert runner.budget.firsts == ["bank", "mail"]


def test_a_retry_names_the_budget_of_its_rule(runner: Runner) -> None:
    """On its message, for whichever worker runs it."""
    task = runner.task(fails(OSError()), On(OSError, budget="bank"))
    with pytest.raises(RetryByRule):
        runner.run(task)

    assert runner.marks["retry_wait"] == {"budget": "bank"}


@pytest.mark.parametrize(
    "exc",
    [
        RetrySnooze(2.5, "retry_budget", {"snoozes": None}),
        HeldFromAutoretry(OSError("x")),
        RetryByRule(exc=OSError("x")),
    ],
)
def test_what_a_child_raises_reaches_the_main_process(exc: Any) -> None:
    """It is pickled on its way."""
    again = pickle.loads(pickle.dumps(exc))

    assert type(again) is type(exc)
    assert getattr(again, "marks", None) == getattr(exc, "marks", None)
    assert getattr(again, "countdown_s", None) == getattr(exc, "countdown_s", None)


# --- beside Celery's own ----------------------------------------------------------------


class Sends(ResilientTask):
    """A class of the app's own, which Celery prepares in another order."""

    name = "shop.by_class"
    autoretry_for = (Exception,)
    retry_rules = (Never(ValueError), On(OSError, backoff_s=1))
    exc: Exception = ValueError("never")

    def run(self) -> None:
        """Fail."""
        raise self.exc


@pytest.mark.parametrize("kind", ["function", "class"])
def test_rules_decide_before_autoretry(runner: Runner, kind: str) -> None:
    """What no rule is for is left to it."""
    raised: list[Exception] = [ValueError("never")]

    def body() -> None:
        raise raised[0]

    rules = Sends.retry_rules
    if kind == "class":
        task: Any = runner.app.register_task(Sends())
        runner._monkeypatch.setattr(Sends, "apply_async", runner._apply_async)
    else:
        task = runner.task(body, *rules, autoretry_for=(Exception,))

    def run_with(exc: Exception) -> BaseException:
        raised[0] = exc
        runner._monkeypatch.setattr(Sends, "exc", exc)
        with pytest.raises(Exception) as found:  # noqa: PT011 -- it is looked at
            runner.run(task)
        return found.value

    never = ValueError("never")
    assert run_with(never) is never
    assert never.__context__ is None
    assert runner.sent == []
    assert isinstance(run_with(OSError()), RetryByRule)
    other = run_with(KeyError())
    assert (type(other).__name__, len(runner.sent)) == ("Retry", 2)
    assert "retry" not in (runner.sent[1].get("headers") or {}).get(HEADER, {})


def test_autoretry_is_as_ever_in_a_direct_call(runner: Runner) -> None:
    """Whoever calls the body has what it raised."""
    rules = (Never(ValueError),)
    task = runner.task(fails(ValueError()), *rules, autoretry_for=(Exception,))
    with pytest.raises(ValueError):  # noqa: PT011 -- its type is all that it says
        runner.run(task)

    with pytest.raises(ValueError):  # noqa: PT011
        task()
    with pytest.raises(ValueError):  # noqa: PT011
        task.run()
    assert task.apply(retries=3).state == "FAILURE"


def test_an_autoretry_that_is_never_asked_for_is_told_of(
    runner: Runner, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the task is registered."""
    caplog.set_level(logging.WARNING, "celery_resilience.task")
    kinds = (ConnectionError, KeyError)
    runner.task(lambda: 1, On(OSError), Never(ValueError), autoretry_for=kinds)

    (said,) = [record.getMessage() for record in caplog.records]
    assert "has autoretry_for = ConnectionError, which its retry_rules decide" in said


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        (On(OSError), "retry_rules must be a tuple of On(...) and Never(...), got On("),
        ([On(OSError), On(ConnectionError)], "On(ConnectionError) is never asked for"),
    ],
)
def test_wrong_rules_are_refused_where_the_task_is_registered(
    runner: Runner, rules: Any, said: str
) -> None:
    """With its name."""

    def wrong() -> None:
        """Never bound."""

    options = {"name": "shop.wrong", "shared": False, "retry_rules": rules}
    runner.app.task(base=ResilientTask, **options)(wrong)
    with pytest.raises(ConfigurationError) as refused:
        runner.app.finalize()

    assert str(refused.value).startswith("task shop.wrong: retry_rules")
    assert said in str(refused.value)


def test_a_circuit_hears_what_a_retry_was_for() -> None:
    """A dependency fails also where each task is tried again."""
    left: list[Any] = []
    breaker: Any = SimpleNamespace(leave=lambda permit, exc: left.append(exc))
    circuit = TaskCircuit("bank", lambda: None, can_wait=True)  # type: ignore[arg-type,return-value]
    circuit._breaker = breaker
    retry, failure = RetryByRule(), OSError()
    retry.raised = failure

    circuit.leave("permit", retry, SimpleNamespace())

    assert left == [failure]


def test_events_tell_of_retries_and_of_those_that_were_the_last(runner: Runner) -> None:
    """With all that a log line needs."""
    seen: list[tuple[str, dict[str, Any]]] = []
    ends = [
        events.observe(
            f"retries.{name}", lambda name=name, **it: seen.append((name, it))
        )
        for name in ("scheduled", "exhausted")
    ]
    task = runner.task(fails(Away()), On(OSError, attempts=2, backoff_s=3))
    with pytest.raises(RetryByRule):
        runner.run(task)
    with pytest.raises(Away):
        runner.run(task, 1, **runner.marks)

    for end in ends:
        end()
    facts = {"task": task.name, "task_id": "i", "rule": "OSError"}
    facts["exception"] = f"{__name__}.Away"
    assert seen == [
        ("scheduled", {**facts, "attempt": 1, "delay_s": 3.0}),
        ("exhausted", {**facts, "attempt": 2, "why": "attempts"}),
    ]


def test_a_failed_task_shows_the_attempts_that_were_tried_again(runner: Runner) -> None:
    """As far as its message remembers them."""
    task = runner.task(fails(OSError()), On(OSError, backoff_s=3))
    with pytest.raises(RetryByRule):
        runner.run(task)
    packed = {
        "body": "",
        "headers": runner.sent[0]["headers"],
        "properties": {},
        **dict.fromkeys(("content_type", "content_encoding")),
        **dict.fromkeys(("exchange", "routing_key", "queue"), ""),
    }

    (found,) = tried_again({"original": packed})

    assert found["at"] == "1970-01-01T00:16:40+00:00"
    assert (found["exception"], found["retried_in_s"]) == ("OSError", 3.0)
    assert tried_again({"original": {**packed, "headers": {}}}) == []


def test_a_budget_is_of_the_app(runner: Runner) -> None:
    """With what its settings say."""
    from celery_resilience.install import install

    runner.app.conf.resilience_retry_budgets = {"bank": {"per_s": 2}}
    installation = install(runner.app)

    assert installation.budget_options() == {"bank": BudgetOptions(per_s=2)}
    assert isinstance(installation.retry_budgets, Budgets)
