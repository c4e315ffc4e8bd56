"""The paired bootstrap: known answers, a loop written out, and what must not change it."""

import math
import random

import numpy as np
import pytest
from test_bad_input import assert_refused

from hf_kd.glue import GLUE_TASKS, METRICS, TextTask
from hf_kd.significance import paired_bootstrap


SST2, EMOTION = GLUE_TASKS["sst2"], TextTask("emotion", ("text",), tuple("abc"), ("accuracy", "f1_macro"), "accuracy")


def invent(task, rows=60, seeds=2, seed=0):
    """Labels, and predictions of two models of each seed, the first a little better."""
    rng = np.random.default_rng(seed)
    if task.is_regression:
        labels = rng.uniform(0, 5, rows)
        return labels, *(labels + rng.normal(0, noise, (seeds, rows)) for noise in (1.0, 1.5))
    labels = rng.integers(0, task.num_labels, rows)
    right = [rng.random((seeds, rows)) < share for share in (0.85, 0.75)]
    return labels, *(np.where(r, labels, rng.integers(0, task.num_labels, r.shape)) for r in right)


def test_accuracy_has_the_interval_of_a_mean():
    """The difference in accuracy is a mean of +1, 0 and -1 per row, whose spread is known without any draw."""
    labels = np.ones(2000, dtype=int)
    ours, theirs = np.ones(2000, dtype=int), np.ones(2000, dtype=int)
    ours[:100], theirs[100:360] = 0, 0  # 260 rows won, 100 lost
    found = paired_bootstrap(SST2, labels, [ours], [theirs], num_resamples=1000)
    mean = 160 / 2000
    error = math.sqrt((360 / 2000 - mean**2) / 2000)
    assert found["difference"] == pytest.approx(mean)
    assert (found["low"], found["high"]) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.3 * error)
    assert found["p_value"] == 2 / 1001  # 8 standard errors: no draw of all
    narrow = paired_bootstrap(SST2, labels, [ours], [theirs], num_resamples=1000, confidence=0.68)
    expected = mean - 0.994 * error, mean + 0.994 * error
    assert (narrow["low"], narrow["high"]) == pytest.approx(expected, abs=0.3 * error)


@pytest.mark.parametrize("margin", [0, 12, 24])
def test_the_share_is_that_of_a_sign_test(margin):
    """A share of one side alone, or of the draws that agree, would call every second result significant."""
    ours, theirs = np.ones(1000, dtype=int), np.ones(1000, dtype=int)
    ours[:100], theirs[100 : 200 + margin] = 0, 0
    found = paired_bootstrap(SST2, np.ones(1000, dtype=int), [ours], [theirs], num_resamples=1000)
    error = math.sqrt(((200 + margin) / 1000 - (margin / 1000) ** 2) / 1000)
    # The normal approximation, with half a row for the draws in which both are equal, which count on both sides.
    expected = min(1.0, math.erfc((margin - 0.5) / 1000 / error / math.sqrt(2)))
    assert found["p_value"] == pytest.approx(expected, abs=0.1)
    swapped = paired_bootstrap(SST2, np.ones(1000, dtype=int), [theirs], [ours], num_resamples=1000)
    assert swapped["p_value"] == pytest.approx(found["p_value"])
    assert (swapped["low"], swapped["high"]) == pytest.approx((-found["high"], -found["low"]))


@pytest.mark.parametrize(
    ("task", "metric"),
    [
        (SST2, None),
        (GLUE_TASKS["mrpc"], None),
        (GLUE_TASKS["mrpc"], "f1"),
        (GLUE_TASKS["stsb"], None),
        (GLUE_TASKS["stsb"], "spearmanr"),
        (GLUE_TASKS["cola"], None),
        (EMOTION, "f1_macro"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_every_metric_agrees_with_a_loop(task, metric):
    """Rows drawn anew for each seed or model, or a mean of rows where the metric is none, give narrower intervals."""
    labels, ours, theirs = invent(task)
    found = paired_bootstrap(task, labels, ours, theirs, metric=metric, num_resamples=100, seed=3)
    names = {None: task.metric_names if len(task.metric_names) > 1 else [task.main_metric]}.get(metric, [metric])

    def score(y_true, all_predictions):
        scores = [METRICS[name](y_true, y_pred) for y_pred in all_predictions for name in names]
        return sum(scores) / len(scores)

    rng, draws = np.random.default_rng(3), []
    for _ in range(100):
        rows = rng.integers(0, len(labels), len(labels))
        draws.append(score(labels[rows], ours[:, rows]) - score(labels[rows], theirs[:, rows]))
    assert found["metric"] == (metric or task.main_metric)
    assert found["difference"] == pytest.approx(score(labels, ours) - score(labels, theirs))
    # The library draws the same rows from the same generator; should it change how, this shows only chance.
    spread = np.std(draws)
    low, high = np.percentile(draws, [2.5, 97.5])
    assert (found["low"], found["high"]) == pytest.approx((low, high), abs=0.35 * spread)
    assert (found["rows"], found["confidence"], found["num_resamples"]) == (60, 0.95, 100)


def test_seeds_share_their_rows():
    """Models of three seeds that are wrong on the same rows are no three times as much evidence."""
    labels, ours, theirs = invent(SST2, seeds=1)
    one = paired_bootstrap(SST2, labels, ours, theirs, num_resamples=500)
    three = paired_bootstrap(SST2, labels, np.repeat(ours, 3, 0), np.repeat(theirs, 3, 0), num_resamples=500)
    assert three == pytest.approx(one)


def test_the_same_call_gives_the_same_numbers():
    """A table made twice from the same files would differ, and numpy's own random numbers would be used up."""
    labels, ours, theirs = invent(EMOTION)
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    random.seed(1)
    first = paired_bootstrap(EMOTION, labels, ours, theirs, num_resamples=200)
    np.random.seed(7)
    assert paired_bootstrap(EMOTION, labels.tolist(), ours.tolist(), theirs.tolist(), num_resamples=200) == first
    np.random.seed(0)
    assert (np.random.get_state()[1] == before).all()
    assert paired_bootstrap(EMOTION, labels, ours, theirs, num_resamples=200, seed=1) != first


@pytest.mark.filterwarnings("error")
def test_models_that_agree_do_not_differ():
    """No spread at all would divide by 0, or look like certainty."""
    for task in (SST2, GLUE_TASKS["mrpc"], GLUE_TASKS["cola"], GLUE_TASKS["stsb"]):
        labels, ours, _ = invent(task, rows=6)
        found = paired_bootstrap(task, labels, ours, ours, num_resamples=50)
        assert (found["difference"], found["low"], found["high"], found["p_value"]) == (0.0, 0.0, 0.0, 1.0)


def test_what_cannot_be_compared():
    """Rows paired with others, or unlabelled, would give a number all the same."""
    labels, ours, theirs = invent(SST2)
    assert_refused(lambda: paired_bootstrap(SST2, labels, ours[:, 1:], theirs), "(60,)", "(2, 59)", "(seeds, rows)")
    assert_refused(lambda: paired_bootstrap(SST2, labels, ours[0], theirs), "(60,)", "one prediction per row")
    assert_refused(lambda: paired_bootstrap(SST2, labels[:1], ours[:, :1], theirs[:, :1]), "two rows or more")
    unlabeled = np.where(np.arange(60) < 3, -100, labels)
    assert_refused(lambda: paired_bootstrap(SST2, unlabeled, ours, theirs), "3 of 60 labels are -100", "labelled rows")
    assert_refused(lambda: paired_bootstrap(SST2, labels, ours, theirs, metric="f1"), "metric='f1'", "accuracy")
