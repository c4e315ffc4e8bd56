"""Says whether two models differ by more than the rows they were measured on would have it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.stats import bootstrap, rankdata

from .glue import UNLABELED, TextTask


def paired_bootstrap(
    task: TextTask,
    labels: Sequence[float] | np.ndarray,
    predictions: Sequence[Sequence[float]] | np.ndarray,
    baseline_predictions: Sequence[Sequence[float]] | np.ndarray,
    *,
    metric: str | None = None,
    confidence: float = 0.95,
    num_resamples: int = 10_000,
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
        num_resamples (`int`, *optional*, defaults to 10000): Number of draws.
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

    def difference(y_true: np.ndarray, *both: np.ndarray, axis: int = -1) -> np.ndarray:
        scores = [np.mean([_SCORES[name](y_true, y_pred) for name in names], axis=0) for y_pred in both]
        return np.mean(scores[: len(ours)], axis=0) - np.mean(scores[len(ours) :], axis=0)

    found = bootstrap(
        (y_true, *ours, *theirs),
        difference,
        n_resamples=num_resamples,
        batch=100,
        vectorized=True,
        paired=True,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    observed = float(difference(y_true, *ours, *theirs))
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


# The metrics of `glue.METRICS` for many draws at once, over the last axis: scikit-learn takes a minute where these
# take a second. A test holds them to the same values.


def _counts(labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """Confusion matrices of shape `(..., classes, classes)`: label, then prediction."""
    num_classes = int(max(labels.max(), predictions.max(), 1)) + 1
    cells = labels * num_classes + predictions  # (..., rows)
    flat = cells.reshape(-1, cells.shape[-1])
    offsets = np.arange(len(flat))[:, None] * num_classes**2
    counts = np.bincount((flat + offsets).ravel(), minlength=len(flat) * num_classes**2)
    return counts.reshape(*cells.shape[:-1], num_classes, num_classes).astype(float)


def _divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """0 where there is nothing to divide by, as `METRICS` has it."""
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator != 0)


def _accuracy(labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    return np.mean(labels == predictions, axis=-1)


def _f1_by_class(labels: np.ndarray, predictions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """F1 of each class, and whether the class is among labels or predictions."""
    counts = _counts(labels, predictions)
    seen = counts.sum(axis=-1) + counts.sum(axis=-2)
    return _divide(2 * np.diagonal(counts, axis1=-2, axis2=-1), seen), seen > 0


def _f1(labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    return _f1_by_class(labels, predictions)[0][..., 1]


def _f1_macro(labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    f1, is_there = _f1_by_class(labels, predictions)
    return f1.sum(axis=-1) / is_there.sum(axis=-1)


def _matthews(labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    counts = _counts(labels, predictions)
    total, right = counts.sum(axis=(-2, -1)), np.trace(counts, axis1=-2, axis2=-1)
    of_label, of_prediction = counts.sum(axis=-1), counts.sum(axis=-2)
    spread = [total**2 - (sums**2).sum(axis=-1) for sums in (of_label, of_prediction)]
    return _divide(right * total - (of_label * of_prediction).sum(axis=-1), np.sqrt(spread[0] * spread[1]))


def _pearson(labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    x, y = (values - values.mean(axis=-1, keepdims=True) for values in (labels, predictions))
    varies = (np.ptp(labels, axis=-1) > 0) & (np.ptp(predictions, axis=-1) > 0)
    return _divide((x * y).sum(axis=-1), varies * np.sqrt((x**2).sum(axis=-1) * (y**2).sum(axis=-1)))


def _spearman(labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    return _pearson(rankdata(labels, axis=-1), rankdata(predictions, axis=-1))


_SCORES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "f1_macro": _f1_macro,
    "matthews_correlation": _matthews,
    "pearson": _pearson,
    "spearmanr": _spearman,
}
