"""How a weight or the temperature changes over training: a factor of what the user set."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args


ScheduleKind = Literal["constant", "linear", "cosine", "window"]

_EXAMPLES = "'constant', 'linear:1:0', 'cosine:0:1' or 'window:0:0.5'"


@dataclass(frozen=True)
class Schedule:
    """A factor that depends on the progress of the training, and on nothing else: a resumed run goes on exactly where
    it stopped.

    ```python
    Schedule("linear", 1.0, 0.0)(0.25)  # 0.75
    ```

    TinyBERT's two stages (https://arxiv.org/abs/1909.10351, section 3.2), first the layers and then the predictions,
    are two windows:

    ```python
    HiddenTerm(schedule="window:0:0.5"), LogitTerm(schedule="window:0.5:1")
    ```

    Args:
        kind (`str`, *optional*, defaults to `"constant"`):
            `"constant"` is 1; `"linear"` goes from `start` to `end` in a straight line, `"cosine"` along half a
            cosine; `"window"` is 1 while `start <= progress < end`, and 0 at all other times.
        start (`float`, *optional*, defaults to 1.0):
            Of `"linear"` and `"cosine"` the first factor, finite and >= 0; of `"window"` the share of the training at
            which it opens.
        end (`float`, *optional*, defaults to 1.0):
            Of `"linear"` and `"cosine"` the last factor, finite and >= 0; of `"window"` the share at which it closes,
            where 1 means that it stays open to the end.

    Raises:
        ValueError: If the numbers do not fit the kind.
    """

    kind: ScheduleKind = "constant"
    start: float = 1.0
    end: float = 1.0

    def __post_init__(self) -> None:
        numbers = f"start={self.start} and end={self.end}"
        if self.kind not in get_args(ScheduleKind):
            raise ValueError(f"schedule kind={self.kind!r} must be one of {_names(get_args(ScheduleKind))}.")
        if self.kind == "constant":
            if (self.start, self.end) != (1.0, 1.0):
                raise ValueError(
                    f"schedule 'constant' is the factor 1 and reads no numbers, but has {numbers}; set the weight or "
                    "temperature itself to another value."
                )
        elif self.kind == "window":
            if not 0.0 <= self.start < self.end <= 1.0:
                raise ValueError(
                    f"schedule 'window' has {numbers}, but needs shares of the training with 0 <= start < end <= 1; "
                    "write for example 'window:0:0.5' for its first half."
                )
        elif not all(math.isfinite(factor) and factor >= 0.0 for factor in (self.start, self.end)):
            raise ValueError(
                f"schedule {self.kind!r} has {numbers}, but needs two finite factors >= 0; write for example "
                f"'{self.kind}:1:0'."
            )
        elif self.start == self.end:
            raise ValueError(
                f"schedule {self.kind!r} has {numbers}, which changes nothing over training; write 'constant', or for "
                f"example '{self.kind}:1:0'."
            )

    def __call__(self, progress: float) -> float:
        """The factor at a time of the training.

        Args:
            progress (`float`): Optimisation steps that are done, divided by all; from 0 to 1.

        Returns:
            `float`: At least 0; what is multiplied by 0 is off.

        Raises:
            ValueError: If it is not between 0 and 1.
        """
        if not 0.0 <= progress <= 1.0:
            raise ValueError(
                f"progress={progress} must be the share of the training that is done, from 0 to 1; pass step / "
                "total_steps."
            )
        if self.kind == "constant":
            return 1.0
        if self.kind == "window":
            return float(self.start <= progress and (progress < self.end or self.end == 1.0))
        share = progress if self.kind == "linear" else 0.5 * (1.0 - math.cos(math.pi * progress))
        # Not start + (end - start) * share, which rounds: 0.8 + (0.1 - 0.8) is not 0.1.
        return (1.0 - share) * self.start + share * self.end


def read_schedule(value: str | Schedule | None) -> Schedule:
    """Read a schedule as flags and YAML files write it.

    Args:
        value (`str` or [`Schedule`], *optional*):
            `"constant"`, or the kind with both numbers: `"linear:1:0"`, `"cosine:0:1"`, `"window:0:0.5"`. `None` is
            constant.

    Returns:
        [`Schedule`]: The schedule.

    Raises:
        ValueError: If it cannot be read, or its numbers do not fit the kind.
    """
    if value is None:
        return Schedule()
    if isinstance(value, Schedule):
        return value
    kind, numbers = _split(value)
    if kind not in get_args(ScheduleKind) or len(numbers) != (0 if kind == "constant" else 2):
        raise ValueError(
            f"schedule {value!r} cannot be read; use {_EXAMPLES}: from one factor to another, or on between two "
            "shares of the training."
        )
    return Schedule(kind, *numbers)  # type: ignore[arg-type]


def read_temperature_schedule(value: str | Schedule | None) -> Schedule:
    """Read a schedule of the temperature, which is divided by and so may not become 0.

    Args:
        value (`str` or [`Schedule`], *optional*): As [`read_schedule`] takes it.

    Returns:
        [`Schedule`]: The schedule.

    Raises:
        ValueError: If it cannot be read, is a window, or reaches 0.
    """
    schedule = read_schedule(value)
    if schedule.kind == "window":
        raise ValueError(
            f"temperature_schedule={value!r} would make the temperature 0 outside of the window; use 'linear:1:0.5', "
            "or logit_loss_schedule for the window."
        )
    if min(schedule.start, schedule.end) == 0.0:
        raise ValueError(
            f"temperature_schedule={value!r} reaches 0, and logits are divided by the temperature; use factors > 0, "
            f"e.g. '{schedule.kind}:1:0.5'."
        )
    return schedule


def _split(value: Any) -> tuple[str, list[float]]:
    try:
        kind, *numbers = value.split(":")
        return kind.strip(), [float(number) for number in numbers]
    except (AttributeError, ValueError):
        return "", []


def _names(values: tuple[str, ...]) -> str:
    return ", ".join(map(repr, values))
