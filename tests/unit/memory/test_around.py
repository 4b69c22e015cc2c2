"""What a child measures around a body, and tells through its slot."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from celery_resilience.errors import MemoryLimitExceeded
from celery_resilience.memory import slots as s
from celery_resilience.memory.policy import Sustained
from celery_resilience.memory.proc import ProcMemory, Usage, own_kib_of
from celery_resilience.memory.recycling import Recycler
from celery_resilience.memory.slots import OTHER_TASKS, Slots
from celery_resilience.memory.task import (
    GAP_S,
    SHORT_S,
    MemoryAround,
    RunLimits,
    lifts_data_limit,
)
from celery_resilience.soft_limit import MEMORY_SIGNAL

MIB = 1_024


@dataclass
class Eye:
    """A process's memory, as a test says it is."""

    own_kib: int = 50 * MIB
    peak: int | None = None
    is_blind: bool = False
    forgotten: int = 0
    looks: int = 0

    def read(self) -> Usage:
        """What it has."""
        self.looks += 1
        if self.is_blind:
            raise OSError("closed")
        return Usage(self.own_kib, self.own_kib + 10 * MIB, self.own_kib)

    def forget_peak(self) -> None:
        """Counted."""
        if self.is_blind:
            raise OSError("closed")
        self.forgotten += 1

    def peak_kib(self) -> int | None:
        """As it is said."""
        return self.peak

    def close(self) -> None:
        """Nothing."""


@dataclass
class Child:
    """A child whose memory is a test's."""

    slots: Slots
    limits: RunLimits = field(default_factory=lambda: RunLimits(None, 0, {}))
    eye: Eye = field(default_factory=Eye)
    place: int = 0

    def __post_init__(self) -> None:
        self.now = 0.0
        self.around = MemoryAround(
            self.slots, self.limits, lambda: self.eye, clock=lambda: self.now
        )
        self.around.enter_child(self.place)

    def run(
        self,
        task: str,
        grows_mib: int = 0,
        exc: BaseException | None = None,
        lasts_s: float = 1.0,
    ) -> None:
        """One run of a task."""
        self.around.before(Named(task), None)
        self.now += lasts_s
        self.eye.own_kib += grows_mib * MIB
        self.around.after(Named(task), None, exc)

    @property
    def slot(self) -> memoryview[int]:
        """Its slot."""
        slot = self.slots.slot(self.place)
        assert slot is not None
        return slot


@dataclass
class Named:
    """A task."""

    name: str


@pytest.fixture
def slots() -> Slots:
    """Of a worker with two tasks."""
    return Slots(["leak", "ship"])


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    """This process keeps its own limit and handler."""
    limit = resource.getrlimit(resource.RLIMIT_DATA)
    assert MEMORY_SIGNAL is not None
    handler = signal.getsignal(MEMORY_SIGNAL)
    yield
    resource.setrlimit(resource.RLIMIT_DATA, limit)
    signal.signal(MEMORY_SIGNAL, handler)


def soft_limit() -> int:
    """What this process may have."""
    return resource.getrlimit(resource.RLIMIT_DATA)[0]


# --- what is told -------------------------------------------------------------------------


def test_growth_and_peak_of_each_run_are_told(slots: Slots) -> None:
    """The peak is what was above the start of the run."""
    child = Child(slots)
    child.eye.peak = child.eye.own_kib + (10 + 7) * MIB
    child.run("leak", 5)

    assert child.slot[s.PID] == os.getpid()
    assert child.slot[s.LAST_GROWTH] == 5 * MIB
    assert child.slot[s.LAST_PEAK] == 7 * MIB
    assert slots.tasks[child.slot[s.LAST_TASK]] == "leak"
    assert child.slot[s.OWN] - child.slot[s.START] == 5 * MIB
    assert child.eye.forgotten == 1


def quick(child: Child, grows_mib: int = 0, *, gap_s: float = 0.0) -> int:
    """A run of a tenth of a millisecond; returns how often memory was looked at."""
    looks = child.eye.looks
    child.now += gap_s
    child.run("ship", grows_mib, lasts_s=0.000_1)
    return child.eye.looks - looks


def test_a_quick_run_without_a_new_peak_is_not_looked_at(slots: Slots) -> None:
    """It is counted, and costs no more than the question for the peak."""
    child = Child(slots, eye=Eye(peak=60 * MIB))
    assert quick(child) == 1

    assert [quick(child) for _ in range(3)] == [0, 0, 0]

    (ship,) = slots.by_task()
    assert (ship.runs, ship.growth_kib) == (4, 0)
    assert child.slot[s.RUNNING] == 0
    assert child.eye.forgotten == 1


def test_a_quick_run_that_takes_memory_is_looked_at(slots: Slots) -> None:
    """Its growth and its peak are exact."""
    child = Child(slots, eye=Eye(peak=60 * MIB))
    quick(child)
    child.eye.peak = 64 * MIB

    assert quick(child, 3) == 1

    (ship,) = slots.by_task()
    assert (ship.growth_kib, ship.peak_kib) == (3 * MIB, 4 * MIB)
    assert child.slot[s.OWN] == 53 * MIB


def test_a_run_that_may_have_given_memory_back_is_looked_at(slots: Slots) -> None:
    """That takes longer than a quick run."""
    child = Child(slots, eye=Eye(peak=60 * MIB))
    quick(child)
    looks = child.eye.looks
    child.run("ship", -20, lasts_s=SHORT_S)

    assert child.eye.looks == looks + 1
    assert child.slot[s.OWN] == 30 * MIB


def test_a_peak_is_forgotten_when_another_runs_may_be_below_it(slots: Slots) -> None:
    """After a spike, and after a while in which something else had memory."""
    child = Child(slots, eye=Eye(peak=60 * MIB))
    quick(child)
    quick(child)
    assert child.eye.forgotten == 1

    quick(child, gap_s=GAP_S)
    assert child.eye.forgotten == 2
    child.eye.peak = 90 * MIB
    quick(child)
    assert child.eye.forgotten == 2
    child.eye.peak = 60 * MIB
    quick(child)
    assert child.eye.forgotten == 3
    quick(child)
    assert child.eye.forgotten == 3


def test_where_runs_have_limits_each_is_looked_at(slots: Slots) -> None:
    """What a run may take is reckoned from what there is."""
    child = Child(slots, LIMITS, Eye(peak=60 * MIB))

    assert [quick(child) for _ in range(3)] == [1, 1, 1]


def test_an_unknown_peak_is_not_guessed(slots: Slots) -> None:
    """As after `celery --uid`."""
    child = Child(slots)
    child.run("leak", 5)

    assert child.slot[s.LAST_PEAK] == -1
    assert slots.by_task()[0].peak_kib is None


def test_tasks_are_told_over_children_and_recycles(slots: Slots) -> None:
    """The one that grew most first; what is not known by name is together."""
    first = Child(slots)
    first.run("ship", 1)
    first.run("leak", 4)
    again = Child(slots)
    again.run("leak", 6)
    beside = Child(slots, place=5)
    beside.run("made later", 2)
    beside.run("made still later", 3)

    rows = {
        row.task: (row.runs, row.growth_kib, row.most_kib) for row in slots.by_task()
    }
    assert rows == {
        "leak": (2, 10 * MIB, 6 * MIB),
        OTHER_TASKS: (2, 5 * MIB, 3 * MIB),
        "ship": (1, 1 * MIB, 1 * MIB),
    }
    assert [*rows] == ["leak", OTHER_TASKS, "ship"]
    assert len([*slots.used()]) == 2


def test_another_process_reads_the_slots(slots: Slots) -> None:
    """One that has copied nothing, too."""
    Child(slots).run("leak", 4)

    assert slots.descriptor is not None
    opened = Slots.of_process(["leak", "ship"], os.getpid(), slots.descriptor)
    assert opened.by_task() == slots.by_task()


@pytest.mark.parametrize("place", [-1, s.MAX_CHILDREN])
def test_a_child_without_a_slot_measures_all_the_same(slots: Slots, place: int) -> None:
    """There are not endlessly many."""
    around = MemoryAround(slots, RunLimits(None, 0, {}), Eye)
    around.enter_child(place)
    around.before(Named("leak"), None)
    around.after(Named("leak"), None, None)

    assert around.runs == 1
    assert slots.by_task() == []


def test_an_eye_that_fails_is_closed(
    slots: Slots, caplog: pytest.LogCaptureFixture
) -> None:
    """Once, and the task goes on."""
    child = Child(slots)
    child.eye.is_blind = True
    child.run("leak")
    child.run("leak")

    assert caplog.text.count("not measured any more") == 1
    assert child.slot[s.RUNNING] == child.slot[s.LIMIT] == 0


def test_an_eye_that_fails_leaves_no_limit_behind(slots: Slots) -> None:
    """Nobody would lift it any more."""
    child, before = Child(slots, RunLimits(100, 0, {})), soft_limit()
    child.around.before(Named("leak"), None)
    child.eye.is_blind = True
    child.around.after(Named("leak"), None, None)
    assert soft_limit() == before

    child = Child(slots, RunLimits(100, 0, {}))
    child.around.cells = memoryview(bytearray())  # fails where it is written
    child.around.before(Named("leak"), None)
    child.around.after(Named("leak"), None, None)
    assert soft_limit() == before


def test_a_process_that_is_no_child_tells_nothing(slots: Slots) -> None:
    """There, a run's growth may be another's; only what lasts is looked at."""
    eye, now = Eye(), [0.0]
    around = MemoryAround(slots, RunLimits(None, 0, {}), lambda: eye, lambda: now[0])
    sustained = Sustained(10 * MIB)
    around.enter_main(sustained)
    around.before(Named("leak"), None)
    eye.own_kib += 20 * MIB
    around.after(Named("leak"), None, None)
    now[0] = 60.0

    assert sustained.is_sustained(20 * MIB, 60.0)
    assert slots.by_task() == []


# --- the limit of a run -----------------------------------------------------------------------


LIMITS = RunLimits("10%", 1_000 * MIB, {"ship": 7, "free": "50%"})


def test_a_tasks_own_limit_wins() -> None:
    """Shares are of the whole."""
    assert (LIMITS.of("leak"), LIMITS.of("ship"), LIMITS.of("free")) == (
        100 * MIB,
        7 * MIB,
        500 * MIB,
    )
    assert RunLimits(None, 0, {}).of("leak") == 0
    assert not RunLimits(None, 0, {}).are_any
    assert RunLimits(None, 0, {"ship": 7}).are_any


def test_the_limit_holds_within_the_body_only(slots: Slots) -> None:
    """And above what the process has."""
    child, before = Child(slots, LIMITS), soft_limit()
    child.eye.own_kib = 900 * MIB
    child.around.usage = child.eye.read()
    child.around.before(Named("leak"), None)

    assert soft_limit() == (900 + 100) * MIB * 1024
    assert child.slot[s.LIMIT] == 100 * MIB
    child.around.after(Named("leak"), None, None)
    assert soft_limit() == before
    assert child.slot[s.LIMIT] == child.slot[s.RUNNING] == 0


def test_a_lower_limit_of_the_systems_stays(slots: Slots) -> None:
    """What a supervisor has set is not raised."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    low = 4_000 * MIB * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (low, hard))
    child = Child(slots, RunLimits(8_000, 0, {}))
    child.around.before(Named("leak"), None)

    assert soft_limit() == low
    child.around.after(Named("leak"), None, None)
    assert soft_limit() == low


def test_a_refused_allocation_is_the_limits(slots: Slots) -> None:
    """With the figures; the frames that hold too much are cleared."""
    child = Child(slots, LIMITS)
    child.eye.peak = child.eye.own_kib + (10 + 95) * MIB
    held: list[weakref.ref[Eye]] = []

    def body() -> None:
        too_much = Eye()
        held.append(weakref.ref(too_much))
        raise MemoryError

    with pytest.raises(MemoryError) as raised:
        body()
    with pytest.raises(MemoryLimitExceeded, match=r"95 MiB more .* of 100 MiB") as told:
        child.run("leak", 90, raised.value)
    assert (told.value.task, told.value.used_mib, told.value.limit_mib) == (
        "leak",
        95.0,
        100.0,
    )
    assert held[0]() is None


@pytest.mark.parametrize("exc", [MemoryError("the task's own"), ValueError("x"), None])
def test_without_a_limit_nothing_is_the_limits(
    slots: Slots, exc: BaseException | None
) -> None:
    """A MemoryError is then the task's own."""
    for limits, ended in (
        (None, exc),
        (LIMITS, None if exc is None else ValueError("x")),
    ):
        child = Child(slots, limits) if limits else Child(slots)
        child.run("leak", 5, ended)  # raises nothing of its own
        assert child.around.growth_kib >= 5 * 1024


def test_lifting_makes_no_object() -> None:
    """At exhaustion an exception's handler cannot make any."""
    lift, before = lifts_data_limit(), resource.getrlimit(resource.RLIMIT_DATA)
    assert lift is not None
    resource.setrlimit(resource.RLIMIT_DATA, (1 << 40, before[1]))

    assert lift() is None
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


# --- the signal ----------------------------------------------------------------------------------


def test_a_signal_fails_the_run_that_is_above_its_limit(slots: Slots) -> None:
    """Within its body."""
    child = Child(slots, LIMITS)
    child.around.before(Named("leak"), None)
    child.eye.own_kib += 120 * MIB
    assert child.slot[s.HEARS] == 1
    assert MEMORY_SIGNAL is not None

    with pytest.raises(MemoryLimitExceeded, match=r"120 MiB more .* it was signalled"):
        os.kill(os.getpid(), MEMORY_SIGNAL)
    child.around.after(Named("leak"), None, None)
    os.kill(os.getpid(), MEMORY_SIGNAL)  # it has just ended
    child.around.before(Named("leak"), None)
    child.around.after(Named("leak"), None, None)


# --- recycling --------------------------------------------------------------------------------------


@dataclass
class Heap:
    """What is free, and could be given back."""

    eye: Eye
    free_kib: int = 0
    trims: int = 0

    def trim(self, _: int) -> int:
        """Give it back."""
        self.trims += 1
        self.eye.own_kib -= self.free_kib
        self.free_kib = 0
        return 1


def recycler_of(child: Child, limit_mib: int = 100) -> tuple[Recycler, Heap]:
    """What decides for a child, and its heap."""
    heap = Heap(child.eye)
    recycler = Recycler(
        child.around, limit_mib * MIB, clock=lambda: child.now, trim=heap.trim
    )
    return recycler, heap


def long_lived(slots: Slots) -> Child:
    """A child that is not fresh any more."""
    child = Child(slots)
    for _ in range(5):
        child.run("ship")
    return child


def test_a_child_below_its_limit_stays(slots: Slots) -> None:
    """And nothing is tidied for it."""
    child = long_lived(slots)
    recycler, heap = recycler_of(child)
    child.run("leak", 100)

    assert not recycler.should_end(child.around.runs)
    assert heap.trims == 0


def test_what_is_free_is_given_back_first(slots: Slots) -> None:
    """A child whose memory is only not returned yet stays."""
    child = long_lived(slots)
    recycler, heap = recycler_of(child)
    child.run("leak", 101)
    heap.free_kib = 50 * MIB

    assert not recycler.should_end(child.around.runs)
    assert heap.trims == 1
    child.run("ship")
    assert child.slot[s.OWN] - child.slot[s.START] == 51 * MIB


def test_a_child_that_stays_over_its_limit_ends(
    slots: Slots, caplog: pytest.LogCaptureFixture
) -> None:
    """Who made it grow is named."""
    child = long_lived(slots)
    recycler, _ = recycler_of(child)
    child.run("leak", 101)

    assert recycler.should_end(child.around.runs)
    assert child.slot[s.RECYCLED] == 1
    assert child.slot[s.RECYCLED_GREW] == 101 * MIB
    assert slots.tasks[child.slot[s.RECYCLED_TASK]] == "leak"
    assert "most by leak 101.0 MiB in 1 runs, ship 0.0 MiB in 5 runs" in caplog.text


def test_fresh_children_over_the_limit_end_the_recycling(
    slots: Slots, caplog: pytest.LogCaptureFixture
) -> None:
    """It would go on for ever; what they gain at once counts as their start."""
    first, second = Child(slots), Child(slots)
    for child, ends in ((first, True), (second, False)):
        recycler, _ = recycler_of(child)
        child.run("leak", 150)
        assert recycler.should_end(child.around.runs) is ends
    assert caplog.text.count("below what a child needs") == 1

    second.run("leak", 90)
    assert not recycler.should_end(child.around.runs)
    second.run("leak", 20)
    assert recycler.should_end(child.around.runs)


def test_what_other_tasks_leave_behind_counts_too(slots: Slots) -> None:
    """Those that are not resilient tell nothing, and are looked at before the next."""
    child = Child(slots)
    recycler, _ = recycler_of(child)
    child.eye.own_kib += 101 * MIB

    assert recycler.should_end(jobs=7)
    assert slots.tasks[child.slot[s.RECYCLED_TASK]] == OTHER_TASKS


# --- this process --------------------------------------------------------------------------------------


def test_this_processs_memory_is_read() -> None:
    """The peak is known after what made it has gone, and forgotten when it is told to."""
    eye = ProcMemory()
    try:
        before = eye.read()
        held = bytearray(b"x") * (64 << 20)
        with_it = eye.read()
        del held
        assert with_it.own_kib - before.own_kib > 60 * MIB
        assert with_it.data_kib - before.data_kib > 60 * MIB
        assert eye.read().own_kib - before.own_kib < 10 * MIB
        peak = eye.peak_kib()
        assert peak is None or peak - before.resident_kib > 60 * MIB
        eye.forget_peak()
        peak = eye.peak_kib()
        assert peak is None or peak - before.resident_kib < 20 * MIB
        own_kib = own_kib_of(os.getpid())
        assert own_kib is not None
        assert abs(own_kib - eye.read().own_kib) < 5 * MIB
        assert own_kib_of(0) is None
    finally:
        eye.close()


def test_a_peak_from_before_an_exec_is_no_ones() -> None:
    """The kernel keeps that of the program that a spawned child was."""
    look = (
        "from celery_resilience.memory.proc import ProcMemory\n"
        "print(ProcMemory().peak_kib())"
    )
    source = (
        "import os, sys\n"
        "held = bytearray(b'x') * (200 << 20)\n"
        f"os.execv(sys.executable, [sys.executable, '-c', {look!r}])"
    )
    said = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, check=True
    )
    assert said.stdout.strip() == "None"
