"""Says whether two models differ by more than the rows they were measured on would have it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import DegenerateDataWarning, bootstrap

from .glue import METRICS, UNLABELED, TextTask


def paired_bootstrap(
    task: TextTask,
    labels: Sequence[float] | np.ndarray,
    predictions: Sequence[Sequence[float]] | np.ndarray,
    baseline_predictions: Sequence[Sequence[float]] | np.ndarray,
    *,
    metric: str | None = None,
    confidence: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    r"""The difference of a metric between two models on the same rows, and what it would be on other rows.

    The rows are drawn again with replacement, the same ones for both models and all seeds, and the difference
    $\frac{1}{S} \sum_s m(y, \hat y_s) - m(y, \hat y^{\text{baseline}}_s)$ is computed on each draw: the interval is
    that of the percentiles (Efron & Tibshirani 1993, An Introduction to the Bootstrap, chapter 13), paired by row as
    Berg-Kirkpatrick et al. 2012 (https://aclanthology.org/D12-1091) do for two systems. It tells of the choice of the
    rows, for these very models; how much a seed changes is what the spread over seeds tells.

    Args:
        task ([`~hf_kd.glue.TextTask`]): Names the metrics.
        labels (sequence of shape `(rows,)`): Class indices, or scores for regression.
        predictions (sequence of shape `(seeds, rows)`): What the model of each seed says: class indices, or scores.
        baseline_predictions (sequence of shape `(seeds, rows)`): What the other model says, seed by seed.
        metric (`str`, *optional*): One of the task's metrics or `"combined_score"`, their mean; by default the one
            that ranks models.
        confidence (`float`, *optional*, defaults to 0.95): Share of the draws within the interval, between 0 and 1.
        num_resamples (`int`, *optional*, defaults to 1000): Number of draws.
        seed (`int`, *optional*, defaults to 0): Of the draws.

    Returns:
        `dict`: `metric`; `rows`, their number; `difference`, with the interval from `low` to `high` at `confidence`,
        where 1 is 100 points; `p_value`, twice the share of draws on whose rows the other model is at least as good
        (or, where that is less, as bad), which is small for a difference that hardly depends on the choice of the
        rows; `num_resamples`.

    Raises:
        ValueError: If the shapes do not fit, a row has no label, or the task has no such metric.
    """
    y_true, ours, theirs = np.asarray(labels), np.asarray(predictions), np.asarray(baseline_predictions)
    _check(y_true, ours, theirs)
    metric = metric or task.main_metric
    names = task.metric_names if metric == "combined_score" else (metric,)
    if not set(names) <= set(task.metric_names):
        raise ValueError(f"metric={metric!r}, but {task.name} has {', '.join(task.metric_names)}, combined_score.")

    def difference(y_true: np.ndarray, *both: np.ndarray) -> float:
        scores = [np.mean([METRICS[name](y_true, y_pred) for name in names]) for y_pred in both]
        return float(np.mean(scores[: len(ours)]) - np.mean(scores[len(ours) :]))

    with warnings.catch_warnings():
        # A draw with one class, or nearly one score, is part of the spread.
        warnings.simplefilter("ignore", DegenerateDataWarning)
        warnings.filterwarnings("ignore", message="A single label was found")
        observed = difference(y_true, *ours, *theirs)
        found = bootstrap(
            (y_true, *ours, *theirs),
            difference,
            n_resamples=num_resamples,
            vectorized=False,
            paired=True,
            confidence_level=confidence,
            method="percentile",
            rng=np.random.default_rng(seed),
        )
    draws = found.bootstrap_distribution
    # One is added to both: no number of draws shows that something never happens.
    tail = (min(np.sum(draws <= 0), np.sum(draws >= 0)) + 1) / (num_resamples + 1)
    return {
        "metric": metric,
        "rows": len(y_true),
        "difference": observed,
        "low": float(found.confidence_interval.low),
        "high": float(found.confidence_interval.high),
        "confidence": confidence,
        "p_value": float(min(1.0, 2 * tail)),
        "num_resamples": num_resamples,
    }


def _check(labels: np.ndarray, predictions: np.ndarray, baseline_predictions: np.ndarray) -> None:
    shapes = predictions.shape, baseline_predictions.shape
    if labels.ndim != 1 or len(labels) < 2 or any(len(s) != 2 or s[1] != len(labels) or s[0] < 1 for s in shapes):
        raise ValueError(
            f"labels of shape {labels.shape} and predictions of shapes {shapes[0]} and {shapes[1]} do not fit; give "
            "two rows or more, and for each seed one prediction per row: (rows,), (seeds, rows) and (seeds, rows)."
        )
    if unlabeled := int(np.sum(labels == UNLABELED)):
        raise ValueError(f"{unlabeled} of {len(labels)} labels are {UNLABELED}; compare on labelled rows.")
