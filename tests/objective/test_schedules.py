"""Factors of weights and temperature over training, as exact numbers."""

import math

import pytest

from hf_kd.objective.schedules import Schedule, read_schedule, read_temperature_schedule


@pytest.mark.parametrize(
    ("text", "factors"),
    [
        ("constant", {0.0: 1.0, 0.3: 1.0, 1.0: 1.0}),
        ("linear:1:0", {0.0: 1.0, 0.25: 0.75, 0.5: 0.5, 1.0: 0.0}),
        ("linear:0:1", {0.0: 0.0, 0.25: 0.25, 1.0: 1.0}),
        ("linear:2:4", {0.0: 2.0, 0.5: 3.0, 1.0: 4.0}),
        ("linear:0.8:0.1", {0.0: 0.8, 1.0: 0.1}),
        ("cosine:1:0", {0.0: 1.0, 1.0: 0.0}),
        ("cosine:0:4", {0.0: 0.0, 1.0: 4.0}),
        ("cosine:0.8:0.1", {0.0: 0.8, 1.0: 0.1}),
        ("window:0:0.5", {0.0: 1.0, 0.25: 1.0, 0.5: 0.0, 1.0: 0.0}),
        ("window:0.5:1", {0.0: 0.0, 0.499: 0.0, 0.5: 1.0, 1.0: 1.0}),
        ("window:0.25:0.75", {0.0: 0.0, 0.25: 1.0, 0.75: 0.0, 1.0: 0.0}),
        ("window:0:1", {0.0: 1.0, 0.5: 1.0, 1.0: 1.0}),
    ],
)
def test_factors_are_exactly_these(text, factors):
    """A term would be on for a step too many, or end at another weight than the one that was written."""
    schedule = read_schedule(text)
    assert {progress: schedule(progress) for progress in factors} == factors


def test_cosine_is_slow_at_both_ends():
    """A quarter of a cosine, or a straight line, goes through the same ends."""
    schedule = Schedule("cosine", 1.0, 0.0)
    assert schedule(0.25) == pytest.approx((1 + math.sqrt(0.5)) / 2, abs=1e-12)
    assert schedule(0.5) == pytest.approx(0.5, abs=1e-12)
    assert schedule(0.75) == pytest.approx((1 - math.sqrt(0.5)) / 2, abs=1e-12)


@pytest.mark.parametrize("num_steps", [3, 7, 10, 1000])
def test_windows_that_meet_share_no_step_and_leave_none_out(num_steps):
    """Between TinyBERT's two stages a step would train on both, or on nothing."""
    first, second = read_schedule("window:0:0.3"), read_schedule("window:0.3:1")
    assert [first(step / num_steps) + second(step / num_steps) for step in range(num_steps)] == [1.0] * num_steps


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, Schedule()),
        ("constant", Schedule("constant")),
        ("linear:1:0", Schedule("linear", 1.0, 0.0)),
        (" cosine : 0.5 : 1e0 ", Schedule("cosine", 0.5, 1.0)),
        ("window:0:0.5", Schedule("window", 0.0, 0.5)),
        (Schedule("linear", 1.0, 0.5), Schedule("linear", 1.0, 0.5)),
    ],
)
def test_schedules_are_read_as_written(value, expected):
    """Numbers in another order would turn a schedule round."""
    assert read_schedule(value) == expected
    assert read_schedule(read_schedule(value)) == expected


@pytest.mark.parametrize(
    "value", ["", "linear", "linear:1", "linear:1:0:0", "constant:1", "step:1:0", "window:a:b", "1:0", 0.5, True]
)
def test_what_cannot_be_read_is_refused_with_examples(value):
    """A misspelt schedule would be a constant one."""
    with pytest.raises(ValueError, match="cannot be read; use 'constant', 'linear:1:0', 'cosine:0:1' or"):
        read_schedule(value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("linear:-1:1", "'linear' has start=-1.0 and end=1.0, but needs two finite factors >= 0"),
        ("linear:1:nan", "'linear' has start=1.0 and end=nan, but needs two finite factors >= 0"),
        ("cosine:inf:1", "'cosine' has start=inf and end=1.0, but needs two finite factors >= 0"),
        ("linear:1:1", "changes nothing over training; write 'constant'"),
        ("cosine:0:0", "changes nothing over training; write 'constant'"),
        ("window:0.5:0.5", "'window' has start=0.5 and end=0.5, but needs shares .* write for example 'window:0:0.5'"),
        ("window:0.6:0.4", "needs shares of the training with 0 <= start < end <= 1"),
        ("window:-0.1:0.5", "needs shares of the training with 0 <= start < end <= 1"),
        ("window:0:100", "needs shares of the training with 0 <= start < end <= 1"),
        ("window:nan:1", "needs shares of the training with 0 <= start < end <= 1"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(value, message):
    """A negative weight would drive the student away from its teacher, a window of steps would never close."""
    with pytest.raises(ValueError, match=message):
        read_schedule(value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("constant", 0.5, 0.5), "'constant' is the factor 1 and reads no numbers, but has start=0.5 and end=0.5"),
        (("linear",), "'linear' has start=1.0 and end=1.0, which changes nothing"),
        (("Linear", 1.0, 0.0), "kind='Linear' must be one of 'constant', 'linear', 'cosine', 'window'"),
    ],
)
def test_a_schedule_made_in_code_is_checked_too(arguments, message):
    """Only what comes from flags would be checked."""
    with pytest.raises(ValueError, match=message):
        Schedule(*arguments)


@pytest.mark.parametrize("progress", [-0.01, 1.01, 100, math.nan])
def test_progress_is_a_share_and_no_step(progress):
    """With a step number for the progress, a window would be shut from the second step on."""
    with pytest.raises(ValueError, match="pass step / total_steps"):
        Schedule()(progress)


@pytest.mark.parametrize("value", [None, "constant", "linear:1:0.25", "cosine:4:1"])
def test_a_temperature_may_follow_what_stays_above_zero(value):
    """A temperature that falls, as in annealing, would be refused."""
    assert read_temperature_schedule(value) == read_schedule(value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("window:0:0.5", "temperature 0 outside of the window; use 'linear:1:0.5', or logit_loss_schedule"),
        ("window:0:1", "temperature 0 outside of the window"),
        ("linear:1:0", "reaches 0, and logits are divided by the temperature; use factors > 0, e.g. 'linear:1:0.5'"),
        ("cosine:0:1", "reaches 0, .* e.g. 'cosine:1:0.5'"),
        ("linear", "cannot be read"),
    ],
)
def test_a_temperature_that_becomes_zero_is_refused(value, message):
    """The loss would be NaN in the middle of the training."""
    with pytest.raises(ValueError, match=message):
        read_temperature_schedule(value)
