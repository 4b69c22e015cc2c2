"""A delivery is settled once, and acknowledged when that is stored.

In the worker's main process, as the lower half of its Request class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from threading import RLock
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from celery_resilience.delivery.deliveries import Deliveries
from celery_resilience.delivery.outbox import Outgoing
from celery_resilience.delivery.send_again import send_again
from celery_resilience.delivery.settlement import ended_of, settlement_of
from celery_resilience.events import emit, observed
from celery_resilience.failure import Failure
from celery_resilience.message import OriginalMessage, has_past, marks_of
from celery_resilience.outcome import ENDED, EVENTS, Outcome, Settlement

if TYPE_CHECKING:
    CeleryRequest: TypeAlias = Any
else:
    CeleryRequest = object  # the real one is given to `build_request_class`


#: One for all: an ack is withheld only while the broker takes nothing, or where a
#: pool's thread asks for it while the timer's thread stores what it waits for. A
#: signal handler may interrupt its holder.
_withholding = RLock()


class SettlingRequest(CeleryRequest):  # type: ignore[misc]
    """
    Holds the acknowledgement of a message back until what it stands for is stored.

    Attributes:
        deliveries: The table of the worker's deliveries.
        settled_as: How the delivery ended; the first answer counts.
        is_given_back: The connection is lost by which the message came, and the
            broker delivers it again unless it was acknowledged.
    """

    deliveries: ClassVar[Deliveries]
    settled_as: Outcome | None = None
    is_given_back = False

    #: The ack or reject that waits for the outbox.
    _is_held = False
    _withheld: tuple[str, bool] | None = None

    def acknowledge(self) -> None:
        """Acknowledge the message, once what must be stored is stored."""
        if self._is_held and self._withhold("acknowledge", False):
            return
        if not self.acknowledged:
            self.message.settled_as = "acknowledge"
            super().acknowledge()

    def reject(self, requeue: bool = False) -> None:
        """Reject the message, once what must be stored is stored."""
        if self._is_held and self._withhold("reject", requeue):
            return
        if not self.acknowledged:
            self.message.settled_as = "requeue" if requeue else "reject"
            super().reject(requeue)

    @property
    def marks(self) -> dict[str, Any]:
        """What we had written on the message."""
        return marks_of(self.message.headers)

    def _settle(
        self,
        outcome: Outcome,
        reason: str | None = None,
        failure: Failure | None = None,
        facts: Mapping[str, Any] | None = None,
        *,
        is_silent: bool = False,
    ) -> None:
        """Decide, once, how the delivery ended; store what that asks for."""
        if not self._claim(outcome):
            return
        deliveries = self.deliveries
        event = EVENTS[outcome]
        try:
            if failure is not None or self._has_past or observed(event):
                settlement = settlement_of(
                    self, outcome, reason, failure, facts, is_silent=is_silent
                )
                if is_silent:
                    settlement = _with_more_facts(settlement)
                if failure is not None or self._has_past:
                    original = deliveries.original(self.message)
                    self._store(deliveries.keeps.message_for(settlement, original))
                emit(event, settlement=settlement)
        finally:
            deliveries.gate.left(self)

    def _send_again(
        self,
        outcome: Outcome,
        reason: str | None,
        delay_s: float,
        marks: Mapping[str, Any],
        told: Mapping[str, Any] | None = None,
    ) -> None:
        if not self._claim(outcome):
            return
        try:
            # What the broker delivers again needs no copy, but would run beside it.
            if self.acknowledged or not self.is_given_back:
                original = self.deliveries.original(self.message)
                copy = send_again(original, delay_s=delay_s, marks=marks)
                self._store(copy, keep=False)
            if observed(EVENTS[outcome]):
                facts = {"delay_s": delay_s, **(told or {})}
                settlement = settlement_of(self, outcome, reason, facts=facts)
                emit(EVENTS[outcome], settlement=settlement)
        finally:
            self.deliveries.gate.left(self)

    def _claim(self, outcome: Outcome) -> bool:
        """Whether this is the first answer; two threads may have one each."""
        mine = (outcome,)
        if self.__dict__.setdefault("_answer", mine) is not mine:
            return False
        self.settled_as = outcome
        self.deliveries.closed(self, outcome)
        if observed(ENDED):
            emit(ENDED, ended=ended_of(self, outcome))
        return True

    @property
    def _has_past(self) -> bool:
        """The message was replayed, sent again or delivered before."""
        return bool(
            self._delivery_info["redelivered"] or has_past(self.message.headers)
        )

    def _store(self, message: OriginalMessage | None, *, keep: bool = True) -> None:
        if message is None:
            return
        outgoing = Outgoing(
            message=message,
            then=self._stored,
            keep=keep,
            acknowledged=self.acknowledged,
            remade=not keep,
            what=f"{self.name}[{self.id}]",
        )
        self._is_held = True
        self.deliveries.held.add(self.message)
        self.deliveries.outbox.put(outgoing)

    def _withhold(self, how: str, requeue: bool) -> bool:
        """Leave it to `_stored`; False when that has been, in another thread."""
        with _withholding:
            if self._is_held:
                self._withheld = (how, requeue)
            return self._is_held

    def _stored(self) -> None:
        with _withholding:
            self._is_held = False
            withheld, self._withheld = self._withheld, None
        self.deliveries.held.discard(self.message)
        if withheld is not None:
            if withheld[0] == "acknowledge":
                self.acknowledge()
            else:
                self.reject(withheld[1])


def _with_more_facts(settlement: Settlement) -> Settlement:
    """*settlement* with what those say who report the failure, before it is stored."""
    more: dict[str, Any] = {}
    emit("delivery.failing_silently", settlement=settlement, more=more)
    return (
        replace(settlement, facts={**settlement.facts, **more}) if more else settlement
    )
