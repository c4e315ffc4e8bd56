"""What `glue_search.py` makes of its points: the choice, the table, the picture and the YAML."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from hf_kd.deploy.benchmark import ONNX_FILES
from hf_kd.deploy.report import plot_pareto
from hf_kd.files import write_whole


# A student in a precision: `student` (its number), `precision`, `arguments`, `metric`, `latency_ms`, `size_bytes`.
Point = dict[str, Any]


def choose(
    points: Sequence[Point],
    teacher_metric: float,
    target_retention: float | None = None,
    max_latency_ms: float | None = None,
    metric_name: str = "metric",
) -> tuple[Point, str]:
    """
    The smallest point on disk that keeps the share of the teacher's metric within the latency; without a share to
    keep, the best one within the latency; where none is, the one that misses least.

    Args:
        points (sequence of `dict`): At least one.
        teacher_metric (`float`): The teacher's on the same rows, above 0 if there is a share of it to keep.
        target_retention (`float`, *optional*): The share.
        max_latency_ms (`float`, *optional*): The latency.
        metric_name (`str`, *optional*, defaults to `"metric"`): What the message calls it.

    Returns:
        `tuple[dict, str]`: The point, always one of [`front`], and why it is.
    """

    def misses(point: Point) -> dict[str, float]:
        """By how much of what is asked for, where it is not kept."""
        found = {}
        if target_retention is not None and point["metric"] < (asked := target_retention * teacher_metric):
            kept = point["metric"] / teacher_metric
            text = f"it keeps {kept:.1%}, {100 * (target_retention - kept):.2f} % of the teacher too little"
            found[text] = 1 - point["metric"] / asked
        if max_latency_ms is not None and point["latency_ms"] > max_latency_ms:
            over = point["latency_ms"] - max_latency_ms
            text = f"it takes {point['latency_ms']:.2f} ms, {over:.2f} ms more than {max_latency_ms:g}"
            found[text] = over / max_latency_ms
        return found

    def size_first(point: Point) -> tuple[float, ...]:
        return point["size_bytes"], point["latency_ms"], -point["metric"]

    def metric_first(point: Point) -> tuple[float, ...]:
        return -point["metric"], point["latency_ms"], point["size_bytes"]

    asked = [f"keeps {target_retention:.1%} of the teacher"] if target_retention is not None else []
    asked += [f"answers within {max_latency_ms:g} ms"] if max_latency_ms is not None else []
    within = [point for point in points if not misses(point)]
    if not within:
        closest = min(points, key=lambda point: (max(misses(point).values()), *size_first(point)))
        return closest, (
            f"NO STUDENT {' and '.join(asked)}. {name_of(closest)} comes closest: {', and '.join(misses(closest))}."
        )
    best = min(within, key=metric_first if target_retention is None else size_first)
    kept = f", {best['metric'] / teacher_metric:.1%} of the teacher's" if teacher_metric > 0 else ""
    return best, (
        f"{name_of(best)} is the {'best' if target_retention is None else 'smallest'} of {len(points)} points"
        f"{' that ' + ' and '.join(asked) if asked else ''}: {metric_name} {100 * best['metric']:.2f}{kept}, "
        f"{best['latency_ms']:.2f} ms, {best['size_bytes'] / 1e6:.1f} MB."
    )


def front(points: Sequence[Point]) -> list[Point]:
    """The points that no other is at least as good as in metric, latency and size, and better in one."""

    def costs(point: Point) -> tuple[float, ...]:
        return -point["metric"], point["latency_ms"], point["size_bytes"]

    def is_beaten(point: Point) -> bool:
        mine = costs(point)
        others = (costs(other) for other in points)
        return any(other != mine and all(a <= b for a, b in zip(other, mine, strict=True)) for other in others)

    return [point for point in points if not is_beaten(point)]


def name_of(point: Point) -> str:
    """What table and picture call it."""
    layers = point["arguments"]["student_num_layers"]
    width = point["arguments"].get("student_hidden_size")
    shape = f"{layers} layer{'s' if layers > 1 else ''}" + (f" of width {width}" if width is not None else "")
    return f"student {point['student']} ({shape}, {point['precision']})"


def format_points(points: Sequence[Point], found: dict[str, Any]) -> str:
    """A Markdown table of the teacher and the points that no other beats, the chosen one in bold.

    Args:
        points (sequence of `dict`): All that were measured.
        found (`dict`): The section `search` of the results.
    """
    teacher, chosen = found["teacher"], found["chosen"]
    lines = [
        f"| model | {found['metric']} | retained | p50 ms | MB | learning rate | temperature | weights |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for point in [teacher, *sorted(front(points), key=lambda point: (point["latency_ms"], -point["metric"]))]:
        kept = f"{point['metric'] / teacher['metric']:.1%}" if teacher["metric"] > 0 else ""
        name, arguments = "teacher (fp32)", point.get("arguments", {})
        if point is not teacher:
            is_chosen = (point["student"], point["precision"]) == (chosen["student"], chosen["precision"])
            name = f"**{name_of(point)}**" if is_chosen else name_of(point)
        weights = {key.removesuffix("_loss_weight"): value for key, value in arguments.items() if "_weight" in key}
        lines.append(
            f"| {name} | {100 * point['metric']:.2f} | {kept} | {point['latency_ms']:.2f} "
            f"| {point['size_bytes'] / 1e6:.1f} | {arguments.get('learning_rate', '')} "
            f"| {arguments.get('temperature', '')} | {', '.join(f'{k} {v:g}' for k, v in weights.items() if v)} |"
        )
    return "\n".join(lines)


def draw_search(path: Path, points: Sequence[Point], found: dict[str, Any]) -> None:
    """The picture of [`~hf_kd.deploy.report.plot_pareto`] with the points that no other beats and the teacher, the
    other points as dots, what was asked for as lines, and a ring around the chosen point."""
    teacher, chosen, flags = found["teacher"], found["chosen"], found["flags"]

    def row(point: Point, name: str, role: str) -> dict[str, Any]:
        where = {"threads": 1, "batch_size": 1, "length": flags["latency_length"]}
        return {
            **{"variant": name, "role": role, "runtime": "onnxruntime", "task": found["task"], "cpu": found["cpu"]},
            "size_bytes": point["size_bytes"],
            "metrics": {"search": {found["metric"]: point["metric"]}},
            "main_metric": {"split": "search", "name": found["metric"]},
            "latency": [{**where, "p50_ms": point["latency_ms"]}],
        }

    best = front(points)
    rows = [row(point, name_of(point).replace(" (", "\n").rstrip(")"), "student") for point in best]
    unfinished = path.with_name(f"{path.name}.tmp")
    figure = plot_pareto([row(teacher, "teacher, fp32", "teacher"), *rows], unfinished)
    (axes,) = figure.axes
    axes.set_ylabel(f"{found['metric']} (points of 100)\non {found['rows']['chosen_on']}")
    others = [(point["latency_ms"], 100 * point["metric"]) for point in points if point not in best]
    if others:
        axes.scatter(*zip(*others, strict=True), s=8, color="0.6", zorder=1)
    largest = max(point["size_bytes"] for point in (teacher, *best))
    width = 2 * math.sqrt(700 * chosen["size_bytes"] / largest / math.pi) + 5  # around the area of plot_pareto
    axes.plot(chosen["latency_ms"], 100 * chosen["metric"], "o", ms=width, mfc="none", mec="black", mew=1, zorder=3)
    budget = {"color": "#2ca02c", "linestyle": ":", "linewidth": 1.2, "zorder": 0}
    if flags["max_latency_ms"] is not None:
        axes.axvline(flags["max_latency_ms"], **budget)
    if flags["target_retention"] is not None:
        axes.axhline(100 * flags["target_retention"] * teacher["metric"], **budget)
    low = sum(metric < axes.get_ylim()[0] for _, metric in others)
    note = "Dots: students that another beats" + (f", {low} of them below the picture" if low else "")
    note += ". Dotted: what was asked for. Ring: chosen, or closest to it."
    axes.text(0, -0.17, note, fontsize=8, color="0.3", transform=axes.transAxes)
    figure.savefig(unfinished, format="png", bbox_inches="tight")
    unfinished.replace(path)


def write_config(path: Path, config: dict[str, Any], found: dict[str, Any]) -> None:
    """The YAML for `glue_distill.py` that trains the chosen student again."""
    file = ONNX_FILES[found["chosen"]["precision"]]
    lines = [f"glue_distill.py on {found['task']}, chosen by glue_search.py on {found['cpu']}."]
    lines += [found["message"], f"Its file is {file}, which export_onnx writes."]
    if "max_train_samples" in config:
        lines.append("It was trained on max_train_samples rows; without that line it is trained on all.")
    config = {name: value for name, value in config.items() if value is not None}
    text = "".join(f"# {part}\n" for line in lines for part in textwrap.wrap(line, 117))
    write_whole(path, text + yaml.safe_dump(config, sort_keys=False))
