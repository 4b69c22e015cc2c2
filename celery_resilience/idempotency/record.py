"""What is known of a key. Plain data: no Celery, no I/O, no clock."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple


class KeyState(StrEnum):
    """
    What became of a key.

    Attributes:
        QUEUED: A sender has reserved it; no run waits for that.
        RUNNING: A run has it, as long as its lease is renewed.
        RETRYING: Its run has ended, and its task will come again.
        DONE: The effect happened; what it came to is remembered.
        FAILED: A run ended in an error; another may begin.
        INTERRUPTED: Nobody knows whether the effect happened, and it must not be
            tried again unasked.
    """

    QUEUED = "queued"
    RUNNING = "running"
    RETRYING = "retrying"
    DONE = "done"
    FAILED = "failed"
    INTERRUPTED = "interrupted"


#: States in which a key waits for its own task, and for no other.
WAITING = (KeyState.QUEUED, KeyState.RETRYING)


class Claim(NamedTuple):
    """
    What a run takes on a key before its body starts.

    Attributes:
        key: 64 hexadecimal digits, of namespace, task and key.
        name: The key as people read it, at most 255 characters.
        task: The task's name.
        owner: The task's id: the same for its retries and redeliveries.
        token: Names this run, or this send; at most 32 characters.
        holder: The process of the run: host, boot and pid; at most 255 characters.
        fingerprint: Of the arguments, 32 hexadecimal digits; "" compares with any.
        lease_s: Seconds the claim holds without a heartbeat.
        keep_s: Seconds a finished key is remembered.
        dead_holder: The process whose lease is taken over at once.
        is_forced: Run whatever the key came to, unless it is running.
    """

    key: str
    name: str
    task: str
    owner: str
    token: str
    holder: str = ""
    fingerprint: str = ""
    lease_s: float = 60.0
    keep_s: float = 86_400.0
    dead_holder: str | None = None
    is_forced: bool = False


class Verdict(StrEnum):
    """
    What a run hears that asks for a key.

    Attributes:
        RUN: It has the key.
        BUSY: Another run has it, or its own task will come again.
        DONE: The effect has happened.
        MISMATCH: The key belongs to other arguments.
    """

    RUN = "run"
    BUSY = "busy"
    DONE = "done"
    MISMATCH = "mismatch"


class Begun(NamedTuple):
    """
    The store's answer to a claim.

    Attributes:
        verdict: What the run may do.
        epoch: RUN: the fencing number, larger than any before it for this key, as long
            as the key is remembered.
        found: The state before; None where the key was unknown. RUN after RUNNING
            or INTERRUPTED means that nobody knows whether the effect happened.
        owner: BUSY or DONE: the task id that has the key.
        remaining_s: BUSY: seconds until it is free unless it is renewed.
        result: DONE: what `finish` was given.
    """

    verdict: Verdict
    epoch: int = 0
    found: KeyState | None = None
    owner: str = ""
    remaining_s: float = 0.0
    result: bytes | None = None


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """
    One key, for those who look after it.

    Attributes:
        key, name, task, owner, holder: As in its last claim.
        state: What became of it.
        epoch: How many runs have begun.
        begun_at: When the last claim was made, in seconds of the store's wall time.
        lease_until: RUNNING, RETRYING or QUEUED: when it is free.
        expires_at: When it is forgotten.
        result_bytes: The size of what is remembered.
    """

    key: str
    name: str
    task: str
    state: KeyState
    owner: str
    holder: str
    epoch: int
    begun_at: float
    lease_until: float
    expires_at: float
    result_bytes: int
