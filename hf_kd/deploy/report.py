"""Turns results.json into report.md and pareto.png.

python -m hf_kd.deploy.report runs/sst2/results.json [--output_dir DIR]
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..files import whole_file
from ..results import format_table, read_results
from .benchmark import MIN_CPU_SHARE, find_latency, speedup
from .card_text import code, plain, table, with_plain_names


Row = dict[str, Any]  # of [`~hf_kd.deploy.benchmark.benchmark`]

_COLORS = {("teacher", "torch"): "#7f7f7f", ("student", "torch"): "#1f77b4", ("student", "onnxruntime"): "#d95f02"}
# Where a label may stand: to the right of its point or left, above or below; and how far from its edge, in points.
_SIDES = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))
_GAPS = (3, 12, 21, 30, 45, 60, 80)


def write_report(results_path: str | os.PathLike, output_dir: str | os.PathLike | None = None) -> Path:
    """
    Write `report.md` with a section for each part of the results, and `pareto.png` if models were timed and scored.

    Args:
        results_path (`str`): The `results.json`: `run`, and any of `rows` (trained models), `benchmark` (what
            [`~hf_kd.deploy.benchmark.benchmark`] returned) and `export` (what `export_onnx` returned).
        output_dir (`str`, *optional*): Where to write, by default beside the results.

    Returns:
        `Path`: The report. A failure leaves the files of an earlier one.

    Raises:
        ValueError: If there are no results in the file.
        ImportError: If there is a picture to draw, and matplotlib is missing.
    """
    results_path = Path(results_path)
    if not results_path.is_file():
        raise ValueError(f"{results_path} does not exist; give the results.json of a run.")
    results = read_results(results_path)
    if not any(results.get(part) for part in ("rows", "benchmark", "export")):
        raise ValueError(f"{results_path} holds {sorted(results)}, but needs `rows`, `benchmark` or `export`.")
    output_dir = Path(output_dir) if output_dir is not None else results_path.parent
    output_dir.mkdir(parents=True, exist_ok=True)
    report, picture = output_dir / "report.md", output_dir / "pareto.png"
    benchmark = results.get("benchmark") or []
    has_picture = any(row["metrics"] for row in benchmark)
    with whole_file(report) as new_report:
        new_report.write_text(_format_report(results, picture.name if has_picture else None), encoding="utf-8")
        if has_picture:
            with whole_file(picture) as new_picture:
                plot_pareto(benchmark, new_picture)
    return report


def format_benchmark(rows: Sequence[Row], threads: int = 1) -> str:
    """
    Two Markdown tables with a line for each variant: latency, then throughput and text to label.

    Args:
        rows (sequence of `dict`): What one call of [`~hf_kd.deploy.benchmark.benchmark`] returned.
        threads (`int`, *optional*, defaults to 1): Which of the measured thread counts.
    """
    batch_sizes, lengths = _measured(rows, threads)
    smallest, longest = batch_sizes[0], lengths[-1]
    metric = next((row["main_metric"]["name"] for row in rows if row["main_metric"]), "metric")
    latency = [["variant", metric, "parameters (M)", "size (MB)"]]
    latency[0] += [f"p50 / p95 ms, {length} tokens" for length in lengths] + [f"speed-up, {longest} tokens"]
    throughput = [["variant", *(f"rows/s, {size} x {longest}" for size in batch_sizes[1:])]]
    throughput[0] += ["text to label p50 ms", "text to label rows/s", "memory (MB)"]
    for row in rows:
        cells = [find_latency(row, threads, smallest, length) for length in lengths]
        ratio = speedup(rows, row["variant"], threads=threads, batch_size=smallest, length=longest)
        latency.append(
            [
                *(row["variant"], _number(_score(row), 2), _number(row["parameters"], 1, 1e6)),
                _number(row["size_bytes"], 1, 1e6),
                *(f"{cell['p50_ms']:.2f} / {cell['p95_ms']:.2f}" if cell else "" for cell in cells),
                f"{ratio:.1f}x" if ratio is not None else "",
            ]
        )
        larger = [find_latency(row, threads, size, longest) for size in batch_sizes[1:]]
        ends = {cell["batch_size"]: cell for cell in row["end_to_end"] if cell["threads"] == threads}
        single, batched = ends.get(1, {}), ends.get(max(ends, default=1), {})
        throughput.append(
            [
                *(row["variant"], *(_number(cell["rows_per_second"] if cell else None, 0) for cell in larger)),
                *(_number(single.get("p50_ms"), 2), _number(batched.get("rows_per_second"), 0)),
                _number(row["memory_mb"], 0),
            ]
        )
    count = f"{threads} thread" + ("s" if threads > 1 else "")
    return "\n\n".join(
        [
            f"Latency of the model, batch size {smallest}, {count}:",
            table(latency),
            f"Throughput, {count}:",
            table(throughput),
        ]
    )


def require_matplotlib() -> None:
    """Raise the `ImportError` that says how to install it, before anything is measured for a picture."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("the picture needs matplotlib: pip install 'hf-kd[report]'") from error


def plot_pareto(rows: Sequence[Row], path: str | os.PathLike) -> Any:
    """
    Draw metric over latency (p50, smallest batch, longest input, fewest threads), with the size on disk as the area.

    Args:
        rows (sequence of `dict`): What one call of [`~hf_kd.deploy.benchmark.benchmark`] returned, with metrics.
        path (`str`): The PNG file to write.

    Returns:
        `matplotlib.figure.Figure`: The picture, closed.

    Raises:
        ValueError: If no row has a metric.
        ImportError: If matplotlib is missing.
    """
    require_matplotlib()
    from matplotlib import ticker
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    threads = min((cell["threads"] for row in rows for cell in row["latency"]), default=1)
    batch_sizes, lengths = _measured(rows, threads)
    points = [
        (row, cell["p50_ms"], score, row["size_bytes"] / 1e6)
        for row in rows
        if (cell := find_latency(row, threads, batch_sizes[0], lengths[-1])) and (score := _score(row)) is not None
    ]
    if not points:
        raise ValueError("no row has a metric to draw; give `benchmark` texts, labels and the task.")

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    rows, xs, ys, sizes = zip(*points, strict=True)
    centers = list(zip(xs, ys, strict=True))
    areas = [700 * size / max(sizes) for size in sizes]  # points^2
    colors = [_COLORS.get((row["role"], row["runtime"]), "0.5") for row in rows]
    front = sorted(center for center in centers if not _is_beaten(*center, centers))
    axes.plot(*zip(*front, strict=True), linestyle="--", color="0.6", linewidth=1, zorder=1)
    axes.scatter(xs, ys, s=areas, c=colors, alpha=0.75, edgecolors="white", zorder=2)
    axes.set_xscale("log")
    axes.set_xlim(min(xs) / 1.8, max(xs) * 1.8)
    margin = max(0.3 * (max(ys) - min(ys)), 0.2)
    axes.set_ylim(min(ys) - margin, max(ys) + margin)
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 3, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set_xlabel(f"latency: p50 at batch size {batch_sizes[0]}, {lengths[-1]} tokens (ms, log scale)")
    main_metric = rows[0]["main_metric"]
    axes.set_ylabel(f"{main_metric['split']} {main_metric['name']} (points of 100)", parse_math=False)
    place = f"{rows[0].get('task') or 'model'} on {rows[0].get('cpu') or 'this CPU'}"
    axes.set_title(f"{place}, {threads} thread{'s' if threads > 1 else ''}\n", loc="left", parse_math=False)
    note = "Area: size on disk. Dashed: the Pareto front; no variant beats those on it in both."
    axes.text(0, 1.02, note, fontsize=8, color="0.3", transform=axes.transAxes)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.92", zorder=0)
    names = [f"{row['variant']}\n{x:.1f} ms, {size:.1f} MB" for row, x, _, size in points]
    _place_labels(axes, names, centers, areas, front)
    figure.savefig(path, format="png")
    return figure


def _place_labels(axes: Any, names: Sequence[str], centers: Any, areas: Sequence[float], front: Any) -> None:
    """Write each label where it covers nothing and is nearest to its own point, with a line if not right beside it.

    Args:
        axes (`matplotlib.axes.Axes`): Where the points are drawn already.
        names (sequence of `str`): The labels.
        centers (sequence of pairs): The points, in the units of the axes.
        areas (sequence of `float`): The points' areas, in points^2.
        front (sequence of pairs): The corners of the dashed line.
    """
    from matplotlib.path import Path as Line
    from matplotlib.transforms import Bbox

    axes.figure.draw_without_rendering()  # positions on the page are known only after the layout
    axes.figure.set_layout_engine("none")
    pixels = axes.figure.dpi / 72  # of a point
    page, line = axes.get_window_extent(), Line(axes.transData.transform(front))
    places = axes.transData.transform(centers)
    radii = [pixels * (area / math.pi) ** 0.5 for area in areas]
    taken = [Bbox([[x - r, y - r], [x + r, y + r]]) for (x, y), r in zip(places, radii, strict=True)]
    for name, center, (x, y), radius in zip(names, centers, places, radii, strict=True):
        style = {"fontsize": 8, "linespacing": 1.2, "ha": "center", "va": "center", "parse_math": False}
        text = axes.text(*center, name, **style)
        width, height = text.get_window_extent().size
        text.remove()
        candidates = []
        for gap, (right, up) in itertools.product(_GAPS, _SIDES):
            reach = radius + gap * pixels
            dx, dy = right * (reach + width / 2), up * (reach + height / 2)
            box = Bbox.from_bounds(x + dx - width / 2, y + dy - height / 2, width, height)
            is_outside = not (page.contains(*box.min) and page.contains(*box.max))
            distances = np.hypot(*(places - np.clip(places, box.min, box.max)).T)  # from each point to the label
            is_ambiguous = distances.min() < np.hypot(*(np.array([x, y]) - np.clip([x, y], box.min, box.max)))
            is_crossed = line.intersects_bbox(box, filled=False)
            cost = (box.count_overlaps(taken) + is_outside, is_ambiguous, is_crossed, gap)
            candidates.append((cost, dx, dy, box))
        cost, dx, dy, box = min(candidates, key=lambda candidate: candidate[0])
        taken.append(box)
        leader = {"arrowstyle": "-", "color": "0.5", "linewidth": 0.6, "shrinkA": 0, "shrinkB": radius / pixels}
        axes.annotate(
            name,
            center,
            (dx / pixels, dy / pixels),
            textcoords="offset points",
            arrowprops=leader if (dx and dy) or cost[-1] > _GAPS[0] else None,
            **style,
        )


def _is_beaten(x: float, y: float, points: Sequence[tuple[float, float]]) -> bool:
    """Whether another point is at least as fast and as good, and not the same."""
    return any(other_x <= x and other_y >= y and (other_x, other_y) != (x, y) for other_x, other_y in points)


def _measured(rows: Sequence[Row], threads: int) -> tuple[list[int], list[int]]:
    """Batch sizes and lengths, in ascending order."""
    cells = [cell for row in rows for cell in row["latency"]]
    if threads not in (known := sorted({cell["threads"] for cell in cells})):
        raise ValueError(f"threads={threads} was not measured; choose one of {known}.")
    cells = [cell for cell in cells if cell["threads"] == threads]
    return sorted({cell["batch_size"] for cell in cells}), sorted({cell["length"] for cell in cells})


def _score(row: Row) -> float | None:
    """Main metric in points of 100."""
    if not row["metrics"]:
        return None
    return 100 * row["metrics"][row["main_metric"]["split"]][row["main_metric"]["name"]]


def _number(value: float | None, digits: int, unit: float = 1) -> str:
    return "" if value is None else f"{value / unit:.{digits}f}"


# The report, section by section


def _format_report(results: dict[str, Any], picture: str | None) -> str:
    rows, benchmark = ([with_plain_names(row) for row in results.get(part) or []] for part in ("rows", "benchmark"))
    export = results.get("export")
    tasks = dict.fromkeys(row["task"] for row in (*rows, *benchmark) if row.get("task"))
    sections = [f"# Results: {', '.join(tasks) or 'model'}"]
    if rows:
        sections += ["## Quality", format_table(rows)]
    if benchmark:
        sections += ["## Speed, size and quality on the CPU"]
        if results.get("weights"):
            sections.append(f"The weights are {plain(results['weights'])}: the figures say nothing about quality.")
        if picture is not None:
            sections.append(f"![Main metric over latency, with the size on disk as the area]({picture})")
        counts = sorted({cell["threads"] for row in benchmark for cell in row["latency"]})
        sections += [format_benchmark(benchmark, count) for count in counts]
        sections.append(_describe_benchmark(benchmark))
    if export:
        sections += ["## ONNX export", *_describe_export(export)]
    if results.get("run"):
        sections += ["## The run", _describe_run(results["run"])]
    if results.get("training_run"):
        sections += ["## The training", _describe_run(results["training_run"])]
    return "\n\n".join(sections) + "\n"


def _describe_benchmark(rows: Sequence[Row]) -> str:
    tokens = next(
        (f", {cell['mean_tokens']:.0f} tokens long on average" for row in rows for cell in row["end_to_end"]), ""
    )
    share = min((row["cpu_share"] for row in rows if row.get("cpu_share") is not None), default=1.0)
    busy = (
        f" **The machine was busy: a process had a core for only {share:.0%} of the time. Measure again.**"
        if share < MIN_CPU_SHARE
        else ""
    )
    return (
        f"Measured on {rows[0].get('cpu') or 'a CPU that was not noted'}, each variant in a process of its own, whose "
        "peak of memory is given (median over thread counts). Latency and throughput are those of the model alone, on "
        "rows without padding. From "
        f"text to label includes the tokenizer, on texts of the task{tokens}: p50 one by one, rows/s in batches "
        "sorted by length. Speed-up is over the teacher. MB are 10^6 bytes." + busy
    )


def _describe_export(export: dict[str, Any]) -> list[str]:
    backend, opset, graph = (plain(export.get(name)) for name in ("backend", "opset", "graph"))
    lines = [f"- Backend: {backend}, opset {opset}; graph {graph}"]
    if parity := export.get("parity"):
        lines.append(
            f"- Against torch: logits differ by at most {parity['max_difference']:.1e} over {parity['rows']} rows"
            + (f", {parity['tolerance']:g} allowed" if "tolerance" in parity else "")
        )
    int8 = export.get("quantization") or {}
    if int8:
        lines += _describe_int8(int8)
    if cpu := export.get("cpu"):
        model, architecture, flags = plain(cpu["model"]), plain(cpu["architecture"]), plain(" ".join(cpu["flags"]))
        lines.append(f"- CPU: {model} ({architecture}), cores: {plain(cpu['cores'])}, {flags}")
    tried = [
        [plain(attempt["settings"]), f"{100 * attempt['metric']:.2f}", f"{100 * attempt['drop']:.2f}"]
        for attempt in int8.get("attempts") or []
    ]
    attempts = ["What was tried for int8, in this order:", table([["settings", "metric", "drop"], *tried])]
    return ["\n".join(lines), *(attempts if tried else [])]


def _describe_int8(int8: dict[str, Any]) -> list[str]:
    kept = int8.get("nodes_in_fp32") or []
    settings = (
        f"- int8: {plain(int8['method'])}, {'per channel' if int8.get('per_channel') else 'per tensor'}, "
        f"{'7-bit' if int8.get('reduce_range') else '8-bit'} weights, {len(kept)} nodes in fp32"
    )
    if metric := int8.get("metric"):
        outcome = (
            f"- {plain(metric['name'])} {100 * metric['fp32']:.2f} in fp32, {100 * metric['int8']:.2f} in int8: "
            f"dropped by {100 * metric['drop']:.2f} points, {100 * metric['max_drop']:.2f} allowed"
        )
    elif int8.get("failed"):
        outcome = "- no int8 file kept the metric: none was written"
    else:
        outcome = "- the metric of the int8 file was not measured during the export"
    return [settings + "".join(f"; {code(name)}" for name in kept), outcome]


def _describe_run(run: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in run.get("versions", {}).items() if version)
    facts = {"Command": code(run.get("command"), limit=2000), "Versions": plain(versions, limit=2000)}
    facts["Hardware"] = plain(run.get("hardware"))
    facts["Commit"] = plain(run.get("commit") or "none: an installed package")
    return "\n".join(f"- {name}: {fact}" for name, fact in facts.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="the results.json of a run")
    parser.add_argument("--output_dir", type=Path, help="where to write; by default beside the results")
    args = parser.parse_args()
    sys.stdout.write(f"{write_report(args.results, args.output_dir)}\n")


if __name__ == "__main__":
    main()
