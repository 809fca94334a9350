"""What holds of the rule of scaling whatever the load."""

from itertools import pairwise
from random import Random

from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.unit.experts.load_traces import STEP_S, Group, decision, history

from expertmesh.experts.load_history import GroupSample, LoadHistory
from expertmesh.experts.scaling import Override
from expertmesh.experts.scaling_options import ScalingOptions

numbers = st.floats(0, 50)
replicas = st.integers(0, 9)
samples = st.tuples(replicas, numbers, numbers, numbers, numbers, numbers, replicas)


@st.composite
def options(draw: st.DrawFn) -> ScalingOptions:
    """Windows short enough for short histories to fill them."""
    least = draw(st.integers(0, 5))
    return ScalingOptions(
        min_replicas=least,
        max_replicas=max(1, least + draw(st.integers(0, 5))),
        target_busy_frac=draw(st.floats(0.1, 0.95)),
        hysteresis_frac=draw(st.floats(0, 0.9)),
        up_window_s=1.0,
        down_window_s=draw(st.floats(1, 20)),
        trend_window_s=10.0,
        lead_s=draw(st.sampled_from([0.0, 3.0])),
        memory_s=draw(st.floats(1, 30)),
        zero_after_s=5.0,
    )


@st.composite
def histories(draw: st.DrawFn) -> LoadHistory:
    """Any numbers, sensible or not."""
    past = LoadHistory(1.0, 60.0)
    for step, values in enumerate(draw(st.lists(samples, min_size=1, max_size=40))):
        ready, busy, arrived, done, queued, delay_s, starting = values
        at_s = step * STEP_S
        past.add(GroupSample(at_s, ready, busy, arrived, done, queued, delay_s, 0.01, starting))
    return past


@given(histories(), options(), st.none() | replicas, st.booleans(), st.none() | replicas)
def test_bounds_are_kept(
    past: LoadHistory,
    asked: ScalingOptions,
    room: int | None,
    has_fallback: bool,
    by_hand: int | None,
) -> None:
    override = None if by_hand is None else Override(by_hand, until_s=1e9)
    made = decision(past, asked, room=room, has_fallback=has_fallback, override=override)
    least = asked.min_replicas or (0 if has_fallback else 1)
    assert least <= made.wanted <= asked.max_replicas
    if room is not None:
        assert made.wanted <= max(room, least)
    assert made.text


loads = st.lists(st.floats(0, 6), min_size=1, max_size=60)


@given(loads, st.floats(1, 4), st.integers(1, 6), options())
def test_more_load_never_means_fewer_replicas(
    values: list[float], times: float, ready: int, asked: ScalingOptions
) -> None:
    """The same history with every load multiplied."""
    less, more = history(values, ready, 1.0), history([v * times for v in values], ready, 1.0)
    assert decision(less, asked).wanted <= decision(more, asked).wanted


@given(
    st.floats(0, 6), st.integers(1, 60), st.floats(1, 4), st.integers(1, 6), options(),
    st.floats(0, 0.1),
)  # fmt: skip
def test_nor_does_longer_waiting(
    load: float, num: int, times: float, ready: int, asked: ScalingOptions, delay_s: float
) -> None:
    """Under a steady load: after an overload rows wait although there is little to do."""
    less = history([load] * num, ready, 1.0, queue_delay_s=delay_s)
    more = history([load * times] * num, ready, 1.0, queue_delay_s=delay_s * times)
    assert decision(less, asked).wanted <= decision(more, asked).wanted


@given(loads, st.floats(0, 6), st.integers(1, 6), options())
def test_a_higher_newest_load_never_means_fewer_replicas(
    values: list[float], by: float, ready: int, asked: ScalingOptions
) -> None:
    asked = asked.model_copy(update={"lead_s": 0.0})
    more = [*values[:-1], values[-1] + by]
    made = decision(history(values, ready, 1.0), asked)
    assert made.wanted <= decision(history(more, ready, 1.0), asked).wanted


@settings(max_examples=50, deadline=None)
@given(st.floats(0.05, 5), st.integers(), st.integers(1, 8), st.sampled_from([0.0, 3.0]))
@example(1.4, 1, 8, 0.0)  # two replicas, exactly at the target
def test_noise_turns_nothing_back(load: float, seed: int, ready: int, start_s: float) -> None:
    """Under a load that does not change but for noise of 5 %, the number of replicas moves in one
    direction only, then stays."""
    asked = ScalingOptions(max_replicas=10, down_window_s=20.0, lead_s=5.0, trend_window_s=20.0)
    random = Random(seed)
    group = Group(asked, ready, start_s)
    group.run(60, lambda _: load)  # whatever it starts with is brought in order
    settled = len(group.wanted)
    group.run(150, lambda _: load * random.uniform(0.95, 1.05))
    steps = [after - before for before, after in pairwise(group.wanted[settled - 1 :])]
    turned_back = any(s > 0 for s in steps) and any(s < 0 for s in steps)
    assert not turned_back, list(zip(group.wanted, group.reasons, strict=True))[settled:]
