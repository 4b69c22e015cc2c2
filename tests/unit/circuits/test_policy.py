"""When a circuit opens, who may try it, and when it closes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    rule,
)

from celery_resilience.circuits import policy
from celery_resilience.circuits.options import CircuitOptions
from celery_resilience.circuits.policy import Forced, Part, Position, Report, State

OPTIONS = CircuitOptions(
    failure_rate=0.5,
    window_s=10,
    min_calls=10,
    open_s=30,
    max_open_s=200,
    jitter=0.1,
    probe_lease_s=20,
)


NEW = State()


def report(
    calls: int,
    failures: int,
    *,
    at: float = 1_000,
    state: State = NEW,
    **more: float | bool,
) -> Report:
    """So many calls that end now."""
    part = Part(policy.part_number(at, OPTIONS), calls, failures)
    return Report(state.generation, (part,), **more)  # type: ignore[arg-type]


def counted(
    state: State,
    calls: int,
    failures: int,
    *,
    at: float = 1_000,
    options: CircuitOptions = OPTIONS,
) -> State:
    """The state after so many calls."""
    told = report(calls, failures, at=at, state=state)
    return policy.count(state, options, told, now=at, chance=0.0)


def open_at(now: float = 1_000) -> State:
    """A circuit that has opened."""
    state = counted(State(), 10, 10, at=now)
    assert state.position is Position.OPEN
    return state


def probing(now: float = 1_030) -> State:
    """A circuit with one probe, "a"."""
    state, entry = policy.enter(open_at(), OPTIONS, now=now, token="a")
    assert entry.is_allowed
    assert entry.token == "a"
    return state


def ended(
    state: State,
    is_success: bool | None,
    *,
    now: float = 1_031,
    token: str = "a",
    generation: int | None = None,
    options: CircuitOptions = OPTIONS,
    **more: float,
) -> State:
    """The state after a probe."""
    return policy.probed(
        state,
        options,
        token=token,
        generation=state.generation if generation is None else generation,
        is_success=is_success,
        now=now,
        chance=0.0,
        **more,
    )


# --- opening --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("calls", "failures", "position"),
    [
        (9, 9, Position.CLOSED),  # too few
        (10, 4, Position.CLOSED),
        (10, 5, Position.OPEN),
        (100, 49, Position.CLOSED),
        (100, 50, Position.OPEN),
    ],
)
def test_it_opens_at_the_rate_with_enough_calls(
    calls: int, failures: int, position: Position
) -> None:
    """Not below either."""
    assert counted(State(), calls, failures).position is position


def test_calls_before_the_window_are_forgotten() -> None:
    """A burst of failures, and the same number of calls much later."""
    state = counted(State(), 9, 9, at=1_000)

    assert counted(state, 1, 1, at=1_005).position is Position.OPEN
    assert counted(state, 1, 1, at=1_011).position is Position.CLOSED
    assert counted(state, 9, 0, at=1_011).calls == 9


def test_successes_count_too() -> None:
    """Of any process."""
    state = counted(State(), 100, 0, at=1_000)

    assert counted(state, 20, 20, at=1_001).position is Position.CLOSED


def test_failures_in_a_row_open_it_where_there_are_few_calls() -> None:
    """Also those of several processes, if no success is between."""
    options = replace(OPTIONS, consecutive=3)
    two = report(2, 2, streak=2, is_all_failed=True)
    state = policy.count(State(), options, two, now=1_000, chance=0)
    assert state.position is Position.CLOSED
    assert policy.count(state, options, two, now=1_000, chance=0).position is (
        Position.OPEN
    )
    after_success = report(3, 2, streak=2)
    state = policy.count(state, options, after_success, now=1_000, chance=0)
    assert state.position is Position.CLOSED
    assert state.streak == 2
    assert policy.count(State(), OPTIONS, two, now=1, chance=0).position is (
        Position.CLOSED
    )


def test_a_call_of_an_older_generation_counts_nothing() -> None:
    """One begun before the trip ends in failure after the recovery."""
    before = State()
    recovered = ended(probing(), True)
    assert recovered.position is Position.CLOSED

    late = report(50, 50, at=1_032, state=before)
    assert policy.count(recovered, OPTIONS, late, now=1_032, chance=0) is recovered


def test_a_probe_that_outlasts_its_lease_is_heard_of() -> None:
    """While nobody else has closed or opened the circuit: it says what it saw."""
    begun = probing()
    replaced, other = policy.enter(begun, OPTIONS, now=1_200, token="b")
    assert other.is_allowed
    late = {"now": 1_201, "generation": begun.generation}

    assert ended(replaced, True, **late).position is Position.CLOSED
    assert ended(replaced, False, **late).position is Position.OPEN
    assert ended(replaced, None, **late) == replaced
    closed = ended(replaced, True, token="b", now=1_201)
    assert ended(closed, False, **late) is closed
    opened = ended(replaced, False, token="b", now=1_201)
    assert ended(opened, True, **late) is opened


def test_calls_are_probes_where_nobody_calls_the_function() -> None:
    """Ten seconds after it could have been called, or given up."""
    state = open_at()
    assert not policy.is_probe_overdue(state, state.retry_at + 10)
    assert policy.is_probe_overdue(state, state.retry_at + 10.1)
    begun = probing()
    assert not policy.has_free_probe(begun, OPTIONS, 1_031)
    assert policy.has_free_probe(begun, OPTIONS, begun.leases[0].until)
    assert not policy.is_probe_overdue(begun, begun.leases[0].until + 10)
    assert policy.is_probe_overdue(begun, begun.leases[0].until + 11)


# --- the time that it is open -----------------------------------------------------------


def test_the_open_time_doubles_up_to_its_cap() -> None:
    """And begins anew once the circuit has closed."""
    state, times = open_at(), []
    for _ in range(5):
        times.append(state.retry_at - state.opened_at)
        now = state.retry_at
        state, _ = policy.enter(state, OPTIONS, now=now, token="a")
        state = ended(state, False, now=now)
    assert times == [30, 60, 120, 200, 200]

    now = state.retry_at
    state, _ = policy.enter(state, OPTIONS, now=now, token="a")
    closed = ended(state, True, now=now)
    opened = counted(closed, 10, 10, at=now + 1)
    assert opened.retry_at - opened.opened_at == 30


@given(st.floats(0, 1))
def test_jitter_only_adds(chance: float) -> None:
    """Up to its share."""
    told = report(10, 10)
    state = policy.count(State(), OPTIONS, told, now=1_000, chance=chance)

    assert 30 <= state.retry_at - 1_000 <= 33.001


@pytest.mark.parametrize(
    ("asked", "open_s"), [(5.0, 5.0), (100.0, 100.0), (1e9, 200.0), (0.001, 1.0)]
)
def test_the_dependency_may_say_how_long(asked: float, open_s: float) -> None:
    """Within the cap."""
    told = report(10, 10)._replace(retry_after_s=asked)
    state = policy.count(State(), OPTIONS, told, now=1_000, chance=0)
    again = ended(probing(), False, retry_after_s=asked)

    assert state.retry_at == 1_000 + open_s
    assert again.retry_at == 1_031 + open_s


# --- probes ---------------------------------------------------------------------------


def test_nobody_enters_an_open_circuit_before_its_time() -> None:
    """They are told when to ask again."""
    state, entry = policy.enter(open_at(), OPTIONS, now=1_029.5, token="a")

    assert state == open_at()
    assert entry == policy.Entry(False, retry_after_s=0.5)


def test_one_probe_runs_and_the_others_wait() -> None:
    """Until it ends, or its lease does."""
    state = probing()
    for now in (1_030, 1_049):
        after, entry = policy.enter(state, OPTIONS, now=now, token="b")
        assert not entry.is_allowed
        assert after is state
        assert 0 < entry.retry_after_s <= 20
    after, entry = policy.enter(state, OPTIONS, now=1_050, token="b")
    assert entry.token == "b"
    assert [lease.token for lease in after.leases] == ["b"]

    assert ended(after, True, token="b").position is Position.CLOSED


def test_as_many_probes_as_asked_for_must_succeed() -> None:
    """No more run; and one failure opens it."""
    options = replace(OPTIONS, probes=2)
    state = open_at()
    tokens = []
    for token in "abc":
        state, entry = policy.enter(state, options, now=1_030, token=token)
        tokens += [entry.token] if entry.is_allowed else []
    assert tokens == ["a", "b"]
    one = ended(state, True, token="a", options=options)
    assert one.position is Position.HALF_OPEN
    # One has succeeded and one runs: no third.
    assert not policy.enter(one, options, now=1_031, token="c")[1].is_allowed
    assert ended(one, True, token="b", options=options).position is Position.CLOSED
    assert ended(one, False, token="b", options=options).position is Position.OPEN


def test_a_permit_that_is_given_back_is_the_next_ones() -> None:
    """A duplicate, or a snooze, was no probe."""
    state = ended(probing(), None)

    assert state.position is Position.HALF_OPEN
    assert policy.enter(state, OPTIONS, now=1_031, token="b")[1].is_allowed


# --- after it has closed -----------------------------------------------------------------


def ramping(limit: float = 0.0) -> State:
    """A circuit that has just closed at 1031."""
    state = ended(probing(), True)
    return replace(state, limit=limit) if limit else state


def told(
    state: State,
    calls: int,
    failures: int = 0,
    *,
    at: float = 1_032,
    is_limited: bool = True,
) -> State:
    """The state after a report in a ramp."""
    it = report(calls, failures, at=at, state=state)._replace(is_limited=is_limited)
    return policy.count(state, OPTIONS, it, now=at, chance=0.0)


def test_after_closing_a_few_run_at_once_and_then_more() -> None:
    """One more each time so many have succeeded."""
    state = ramping()
    assert state.limit == 2
    assert told(state, 2).limit == 3
    assert told(told(state, 2), 3).limit == 4


def test_a_failure_cuts_the_limit_once_a_second() -> None:
    """Though several processes tell of it; one always may run."""
    state = told(ramping(40.0), 9, 1)
    assert state.limit == 28
    assert told(state, 1, 1).limit == 28
    assert told(state, 8, at=1_032.5).limit > 28
    assert told(state, 9, 1, at=1_034).limit == pytest.approx(19.6)
    assert told(ramping(1.0), 9, 1).limit == 1


def test_the_limit_goes_when_nobody_was_refused_for_it() -> None:
    """And stays while somebody is."""
    state = told(ramping(), 5, at=1_035)
    for at in (1_040.0, 1_049.0, 1_058.0):
        state = told(state, 5, at=at)
        assert state.limit
    assert told(state, 5, at=1_067, is_limited=False).limit
    assert not told(state, 5, at=1_069, is_limited=False).limit


def test_it_opens_within_a_ramp_too() -> None:
    """And has no limit then, nor where an operator has closed it."""
    state = told(ramping(), 10, 10)
    assert state.position is Position.OPEN
    assert not state.limit
    assert not policy.closed(state, now=1_040).limit
    no_ramp = replace(OPTIONS, ramp_from=None)
    assert not ended(probing(), True, options=no_ramp).limit


def openings_of_a_weak_dependency(options: CircuitOptions) -> tuple[int, int]:
    """
    How often it opens in two minutes, and how many calls succeed.

    64 processes have more to do than they can, and the dependency answers in 0.1 s as
    long as it has at most 40 calls at once; else it fails after 1 s.
    """
    state, now, tokens = open_at(900.0), 1_000.0, 0
    running: list[tuple[float, bool, str, int]] = []
    parts: dict[bool, int] = {True: 0, False: 0}
    openings = done = 0
    is_limited = False
    for step in range(2_400):
        now += 0.05
        ended_now = [it for it in running if it[0] <= now]
        running = [it for it in running if it[0] > now]
        for _, is_success, token, generation in ended_now:
            done += is_success
            if token:
                state = ended(state, is_success, now=now, token=token, options=options)
            elif generation == state.generation:
                parts[is_success] += 1
        if step % 5 == 0:
            part = Part(
                policy.part_number(now, options), sum(parts.values()), parts[False]
            )
            it = Report(state.generation, (part,), is_limited=is_limited)
            before = state
            state = policy.count(state, options, it, now=now, chance=0.0)
            openings += state.openings > before.openings
            parts, is_limited = {True: 0, False: 0}, False
        while len(running) < 64:
            if state.limit and len(running) >= int(state.limit):
                is_limited = True
                break
            tokens += 1
            state, entry = policy.enter(state, options, now=now, token=str(tokens))
            if not entry.is_allowed:
                break
            is_success = len(running) < 40
            end = now + (0.1 if is_success else 1.0)
            running.append((end, is_success, entry.token, state.generation))
            if not is_success:
                # It collapses: those that are in it fail too.
                running = [(end, False, t, g) for _, _, t, g in running]
    return openings, done


def test_a_dependency_that_collapses_above_n_is_not_collapsed_again() -> None:
    """Without the ramp it would be, each time that it closes."""
    options = replace(OPTIONS, window_s=10, min_calls=20, open_s=5, max_open_s=10)

    openings, done = openings_of_a_weak_dependency(options)
    without, less = openings_of_a_weak_dependency(replace(options, ramp_from=None))

    assert openings == 0
    assert without >= 5
    assert done > 10 * less


# --- an operator ------------------------------------------------------------------------


def test_forced_open_refuses_until_it_expires() -> None:
    """Whatever is counted."""
    state = policy.forced(State(), Forced.OPEN, now=1_000, for_s=60)

    entry = policy.entry_now(state, 1_050)
    assert entry == policy.Entry(False, retry_after_s=10)
    assert policy.entry_now(state, 1_060) == policy.Entry(True)
    state = policy.forced(state, None, now=1_010)
    assert policy.entry_now(state, 1_010) == policy.Entry(True)


def test_disabled_lets_all_through_and_counts_none() -> None:
    """Also where it is open."""
    state = policy.forced(open_at(), Forced.DISABLED, now=1_001, for_s=60)
    assert policy.entry_now(state, 1_002) == policy.Entry(True)
    shut = policy.forced(State(), Forced.DISABLED, now=1_000, for_s=60)
    assert counted(shut, 100, 100, at=1_010).position is Position.CLOSED
    assert counted(shut, 100, 100, at=1_061).position is Position.OPEN


def test_shadow_lets_all_through_and_says_what_would_have_been() -> None:
    """It opens, probes and closes as if it were obeyed."""
    state = policy.forced(State(), Forced.SHADOW, now=1_000, for_s=600)
    state = counted(state, 10, 10, at=1_000)
    assert state.position is Position.OPEN
    assert policy.entry_now(state, 1_010).is_allowed  # type: ignore[union-attr]
    state, first = policy.enter(state, OPTIONS, now=1_031, token="a")
    state, second = policy.enter(state, OPTIONS, now=1_031, token="b")
    assert first == policy.Entry(True, token="a")
    assert second == policy.Entry(True)
    assert ended(state, True).position is Position.CLOSED


# --- as a whole -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "state", [State(), open_at(), probing(), policy.forced(State(), Forced.OPEN, now=1)]
)
def test_a_state_survives_its_store(state: State) -> None:
    """As text; and one of a later release is read as far as it is known."""
    assert State.from_text(state.to_text()) == state
    text = state.to_text()[:-1] + ',"later":1}'
    assert State.from_text(text) == state
    assert State.from_text("") == State()


class Fleet(RuleBasedStateMachine):
    """Processes that call, die and are late, in any order."""

    permits = Bundle("permits")
    options = replace(OPTIONS, probes=2, jitter=0.0)

    def __init__(self) -> None:
        super().__init__()
        self.now = 1_000.0
        self.state = State()
        self.tokens = 0

    def change(self, state: State) -> None:
        """Generations only grow, by each change of position."""
        assert state.generation >= self.state.generation
        if state.position is not self.state.position:
            assert state.generation > self.state.generation
        self.state = state

    @rule(seconds=st.sampled_from([0.0, 0.1, 1.0, 5.0, 20.0, 31.0, 200.0]))
    def wait(self, seconds: float) -> None:
        """Time passes."""
        self.now += seconds

    @rule(target=permits)
    def call(self) -> tuple[int, str] | None:
        """Somebody wants to call."""
        self.tokens += 1
        before = self.state
        token = str(self.tokens)
        state, entry = policy.enter(before, self.options, now=self.now, token=token)
        self.change(state)
        if not entry.is_allowed:
            assert before.position is not Position.CLOSED
            assert entry.retry_after_s > 0
            return None
        if before.position is Position.OPEN:
            assert self.now >= before.retry_at
        assert (entry.token == token) is (state.position is Position.HALF_OPEN)
        return state.generation, entry.token

    @rule(permit=consumes(permits), is_success=st.sampled_from([True, False, None]))
    def end(self, permit: tuple[int, str] | None, is_success: bool | None) -> None:
        """A call ends; one that is stale changes nothing. A killed one never does."""
        if permit is None:
            return
        generation, token = permit
        if token:
            state = ended(
                self.state,
                is_success,
                now=self.now,
                token=token,
                generation=generation,
                options=self.options,
            )
        elif is_success is None:
            return
        else:
            number = policy.part_number(self.now, self.options)
            parts = (Part(number, 1, int(not is_success)),)
            told = Report(generation, parts, int(not is_success), not is_success)
            state = policy.count(
                self.state, self.options, told, now=self.now, chance=0.0
            )
        if generation != self.state.generation:
            assert state is self.state
        self.change(state)

    @invariant()
    def no_more_probes_than_allowed(self) -> None:
        """At once; one that has outlasted its lease may succeed besides."""
        live = [lease for lease in self.state.leases if self.now < lease.until]
        assert len(live) <= self.options.probes
        assert len({lease.token for lease in live}) == len(live)

    @invariant()
    def it_is_never_stuck(self) -> None:
        """Once every lease and the open time have passed, somebody may try."""
        later = self.now + self.options.max_open_s + self.options.probe_lease_s
        _, entry = policy.enter(self.state, self.options, now=later, token="x")
        assert entry.is_allowed

    @invariant()
    def it_can_be_stored(self) -> None:
        """And is bounded."""
        text = self.state.to_text()
        assert State.from_text(text) == self.state
        assert len(text) < 2_000


TestFleet = Fleet.TestCase
TestFleet.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
