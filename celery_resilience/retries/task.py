"""A task's retry rules, where a run of it begins and where it has failed."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from typing import Any

from celery.exceptions import Ignore, Retry

from celery_resilience import _celery
from celery_resilience.chance import chance
from celery_resilience.errors import (
    ConfigurationError,
    RetryByRule,
    RetryNotPublished,
    RetrySnooze,
)
from celery_resilience.events import emit
from celery_resilience.failure import type_name
from celery_resilience.message import HEADER, RETRY, RETRY_WAIT, id_text, marks_of
from celery_resilience.retries.budgets import Budgets
from celery_resilience.retries.policy import Again, History, decide
from celery_resilience.retries.rules import (
    On,
    Rule,
    members_of,
    reaches,
    rule_for,
    wrong_rules,
)
from celery_resilience.retry_after import retry_after_of
from celery_resilience.run_view import PAID_FACT, RUN_FACTS
from celery_resilience.soft_limit import soft_limit_deferred

#: Why a message with a retry is snoozed.
NOT_YET = "retry_not_due"
NO_BUDGET = "retry_budget"

#: Seconds before its time at which a retry is due: the clocks of two hosts differ more.
SOON_S = 0.05


class TaskRules:
    """
    The retry rules of one task. Nothing of a run is kept here.

    Args:
        rules: In their order.
        budgets: Those of the process.
        max_wait_s: Seconds that a message may be held for its time: longer, and the
            broker might deliver it again.
        clock: Wall time in seconds.
        chance: At random, from 0 to 1.
    """

    def __init__(
        self,
        rules: Sequence[Rule],
        *,
        budgets: Callable[[], Budgets],
        max_wait_s: Callable[[], float],
        clock: Callable[[], float] = time.time,
        chance: Callable[[], float] = chance,
    ) -> None:
        self.rules = tuple(rules)
        named = [rule.budget for rule in rules if isinstance(rule, On) and rule.budget]
        self._budget_names = tuple(dict.fromkeys(named))
        self._budgets = budgets
        self._max_wait_s = max_wait_s
        self._clock = clock
        self._chance = chance

    def before(self, task: Any, request: Any) -> None:
        """
        A run is about to start.

        Raises:
            RetrySnooze: It is a retry, and is to wait.
        """
        _celery.let_decide_before_autoretry(task, self.is_for)
        said = vars(request).get(HEADER)
        if isinstance(said, dict) and RETRY_WAIT in said:
            marks = marks_of(vars(request))
            if RETRY_WAIT in marks:
                self._wait(marks, request)
                return
        has_come_back = isinstance(said, dict) and "sent" in said
        if self._budget_names and not request.retries and not has_come_back:
            budgets = self._budgets()
            for name in self._budget_names:
                budgets.add_first(name)

    def is_for(self, exc: BaseException) -> bool:
        """Whether a rule says what becomes of a run that raised *exc*."""
        return rule_for(exc, self.rules) is not None

    def idle_autoretries(self, task: type[Any]) -> list[str]:
        """The exceptions in a task's `autoretry_for` that these rules decide first."""
        listed = getattr(task, "autoretry_for", None)
        return [
            kind.__name__
            for kind in (listed if isinstance(listed, list | tuple) else ())
            if isinstance(kind, type)
            and any(reaches(rule, kind) for rule in self.rules)
        ]

    def after(self, task: Any, request: Any, exc: Exception) -> bool:
        """
        A run has failed: send the task again if its rules say so.

        Returns:
            Whether a rule gives up on it; else there is no rule, or it is `Never`.

        Raises:
            RetryByRule: It is sent again.
            RetryNotPublished: It should have been.
        """
        rule = rule_for(exc, self.rules)
        if not isinstance(rule, On):
            return False
        now = self._clock()
        mark = marks_of(vars(request)).get(RETRY)
        hints = [retry_after_of(it, now) or 0.0 for it in members_of(exc)]
        attempt, name = request.retries + 1, type_name(type(exc))
        verdict = decide(
            rule,
            History.from_mark(mark) if mark else None,
            attempt=attempt,
            exception=name,
            hint_s=max(hints),
            now=now,
            chance=self._chance(),
        )
        facts = {
            "task": task.name,
            "task_id": id_text(request.id),
            "rule": rule.label,
            "attempt": attempt,
            "exception": name,
        }
        if not isinstance(verdict, Again):
            emit("retries.exhausted", **facts, why=verdict.why)
            return True
        self._publish(task, request, exc, verdict, now=now, budget=rule.budget)
        emit("retries.scheduled", **facts, delay_s=verdict.delay_s)
        when: Any = round(verdict.delay_s, 1)
        retry = RetryByRule(exc=exc, when=when)
        retry.raised = exc
        raise retry

    def _publish(
        self,
        task: Any,
        request: Any,
        exc: BaseException,
        verdict: Again,
        *,
        now: float,
        budget: str | None,
    ) -> None:
        """
        As Celery's own retry does (``app/task.py:932``, Celery 5.7).

        That one leaves the limit of one call on the task itself, for the next.
        """
        wait: dict[str, Any] = {}
        held_s = min(verdict.delay_s, self._max_wait_s())
        if held_s < verdict.delay_s:
            wait["due"] = now + verdict.delay_s
        if budget is not None:
            wait["budget"] = budget
        signature = task.signature_from_request(
            request, countdown=held_s, retries=request.retries + 1
        )
        headers = signature.options.get("headers") or {}
        marks = {**marks_of(headers), RETRY: verdict.history.to_mark()}
        if wait:
            marks[RETRY_WAIT] = wait
        signature.options["headers"] = {**headers, HEADER: marks}
        try:
            signature.apply_async()
        except (Ignore, Retry):
            # Not the broker's: another run has the key.
            raise
        except Exception as error:
            raise RetryNotPublished.of(error, exc) from error

    def _wait(self, marks: dict[str, Any], request: Any) -> None:
        """Let a retry wait that is not due, or for which its budget has nothing."""
        wait, snoozes = marks[RETRY_WAIT], marks.get("snoozes")
        max_wait_s = self._max_wait_s()
        left_s = wait.get("due", 0.0) - self._clock()
        if left_s > SOON_S:
            held_s = min(left_s, max_wait_s)
            raise RetrySnooze(held_s, NOT_YET, {"snoozes": snoozes})
        if "budget" not in wait:
            return
        with soft_limit_deferred():
            found = self._budgets().withdraw(wait["budget"], max_wait_s)
        if found.is_granted and not found.wait_s:
            # A snooze of the body's is not to pay once more.
            vars(request).setdefault(RUN_FACTS, {})[PAID_FACT] = True
            return
        # What it was promised is its own; else not all ask again at once.
        kept = None if found.is_granted else wait
        spread = 1.0 if found.is_granted else (1 + self._chance()) / 2
        said = {RETRY_WAIT: kept, "snoozes": snoozes}
        raise RetrySnooze(found.wait_s * spread, NO_BUDGET, said)


def task_rules(
    task: type[Any],
    *,
    budgets: Callable[[], Budgets],
    max_wait_s: Callable[[], float],
) -> TaskRules | None:
    """
    The retry rules of *task*; None where it has none.

    Raises:
        ConfigurationError: They are wrong.
    """
    rules = inspect.getattr_static(task, "retry_rules")
    wrong = wrong_rules(rules)
    if wrong is not None:
        raise ConfigurationError(wrong)
    if not rules:
        return None
    return TaskRules(rules, budgets=budgets, max_wait_s=max_wait_s)
