"""The Optuna study of `glue_search.py`: on disk, gone on with after a kill, two points for each student."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from filelock import FileLock, Timeout
from optuna.trial import TrialState
from search_choice import Point, front
from search_space import SearchArguments, Space


# How many students and which of them: another call may change these.
FREE_FLAGS = ("num_trials", "timeout_minutes", "target_retention", "max_latency_ms")


@contextlib.contextmanager
def open_study(output_dir: Path, described: dict[str, Any]) -> Iterator[optuna.Study]:
    """The folder's study, new or gone on with, for this process alone."""
    output_dir.mkdir(parents=True, exist_ok=True)
    file = output_dir / "study.db"
    if not file.is_file() and (output_dir / "results.json").is_file():
        raise ValueError(f"output_dir={str(output_dir)!r} holds results of another run; give a folder of its own.")
    try:
        lock = FileLock(output_dir / "search.lock").acquire(timeout=0)  # the system lets go of it after a kill
    except Timeout as error:
        raise ValueError(
            f"another process is searching in {output_dir}; wait for it, or give another folder."
        ) from error
    with lock:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(
            storage=f"sqlite:///{file.resolve()}",
            study_name="glue_search",
            directions=["maximize", "minimize"],
            load_if_exists=True,
        )
        described = json.loads(json.dumps(described))
        known = study.user_attrs.get("search", described)
        names = [name for name in {**known, **described} if known.get(name) != described.get(name)]
        if names:
            changes = "; ".join(f"{name} was {known.get(name)}, and is {described.get(name)}" for name in names)
            raise ValueError(
                f"{file} holds a search whose students do not compare with these: {changes}. Give another "
                f"--output_dir, or the flags of before; only {', '.join(FREE_FLAGS)} may change."
            )
        study.set_user_attr("search", described)
        yield study


def run_trials(
    study: optuna.Study,
    space: Space,
    search: SearchArguments,
    seed: int,
    folder: Path,
    train_student: Callable[[dict[str, Any], Path], dict[str, Point] | None],
) -> None:
    """Train students until there are enough, and keep those on disk that no other beats.

    A draw follows from the seed and the students before it, so that one that a kill interrupted is drawn again.
    """
    end = time.monotonic() + 60 * (search.timeout_minutes or math.inf)
    for trial in study.get_trials(states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
    if done := num_students(study):
        print(f"{done} of {search.num_trials} students are there already.", flush=True)
    first = [space.center(depth, width) for depth, width in itertools.product(space.depths, space.widths)]
    while True:
        add_other_precisions(study)
        kept = {str(point["student"]) for point in front(points_of(study, space))}
        for path in folder.glob("*"):
            if path.name not in kept:
                shutil.rmtree(path)
        number = num_students(study)
        if number >= search.num_trials or time.monotonic() > end:
            return
        seeds = np.random.SeedSequence([seed, number])
        study.sampler = optuna.samplers.TPESampler(seed=int(seeds.generate_state(1)[0]))
        if number < len(first) and not study.get_trials(states=(TrialState.WAITING,)):
            study.enqueue_trial(first[number])
        trial = study.ask()
        arguments = space.arguments(space.draw(trial))
        trial.set_user_attr("student", number)
        start = time.monotonic()
        try:
            measured = train_student(arguments, folder / str(number))
        except Exception as error:
            trial.set_user_attr("error", type(error).__name__)
            study.tell(trial, state=TrialState.FAIL)
            goes_on = "goes on with another" if num_students(study) > number else "tries it once more"
            print(f"student {number} failed; the same command {goes_on}.", flush=True)
            raise
        trial.set_user_attr("seconds", round(time.monotonic() - start, 1))
        if measured is None:
            trial.set_user_attr("error", "diverged")
            study.tell(trial, state=TrialState.FAIL)
            values = "diverged"
        else:
            trial.set_user_attr("measured", measured)
            study.tell(trial, values_of(measured[trial.params["precision"]]))
            parts = [f"{name} {100 * p['metric']:.2f} in {p['latency_ms']:.2f} ms" for name, p in measured.items()]
            values = ", ".join(parts)
        print(f"student {number}, {number + 1} of {search.num_trials}: {values}; {arguments}", flush=True)


def num_students(study: optuna.Study) -> int:
    """Those that came to an end: measured, diverged, or failed twice. Once may be a full disk, or another program."""
    failures = Counter(trial.user_attrs["student"] for trial in study.trials if "error" in trial.user_attrs)
    ended = {student for student, count in failures.items() if count > 1}
    for trial in study.trials:
        if trial.state == TrialState.COMPLETE or trial.user_attrs.get("error") == "diverged":
            ended.add(trial.user_attrs["student"])
    return len(ended)


def values_of(point: Point) -> list[float]:
    """The two objectives."""
    return [point["metric"], point["latency_ms"]]


def add_other_precisions(study: optuna.Study) -> None:
    """A trained student gives a point in each precision; Optuna drew one of them."""
    trials = study.get_trials(states=(TrialState.COMPLETE,))
    there = {(trial.user_attrs["student"], trial.params["precision"]) for trial in trials}
    for trial in trials:
        for precision, point in trial.user_attrs["measured"].items():
            if (trial.user_attrs["student"], precision) not in there:
                attrs = {name: trial.user_attrs[name] for name in ("student", "measured", "seconds")}
                study.add_trial(
                    optuna.trial.create_trial(
                        params={**trial.params, "precision": precision},
                        distributions=trial.distributions,
                        values=values_of(point),
                        user_attrs=attrs,
                    )
                )


def points_of(study: optuna.Study, space: Space) -> list[Point]:
    """What was measured, a point for each student and precision."""
    return [
        {
            "student": trial.user_attrs["student"],
            "precision": trial.params["precision"],
            "arguments": space.arguments(trial.params),
            **trial.user_attrs["measured"][trial.params["precision"]],
        }
        for trial in study.get_trials(states=(TrialState.COMPLETE,))
    ]


def describe_trials(study: optuna.Study) -> list[dict[str, Any]]:
    """Every trial of Optuna's, those that failed or were interrupted too."""
    return [
        {
            **{"number": trial.number, "state": trial.state.name, "params": trial.params},
            **(trial.user_attrs["measured"][trial.params["precision"]] if trial.state == TrialState.COMPLETE else {}),
            **{name: trial.user_attrs[name] for name in ("student", "seconds", "error") if name in trial.user_attrs},
        }
        for trial in study.trials
    ]
