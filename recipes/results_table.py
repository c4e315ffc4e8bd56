"""Make the tables and the plot of the README from results files: of training, `glue_results.py`,
`export_onnx.py --benchmark`, `glue_ablation.py`, `benchmark_training.py` and `benchmark_whole_runs.py`.

python recipes/results_table.py recipes/results/*.json --plot recipes/results/glue.png
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from hf_kd.deploy.benchmark import find_latency, speedup
from hf_kd.results import ROLES, format_table, is_below_chance, main_values, read_results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="results.json files, one or more seeds of each task")
    parser.add_argument("--plot", type=Path, help="also draw the table into this PNG file (needs matplotlib)")
    args = parser.parse_args()
    runs = [read_results(path) for path in args.files]
    compared = [run for run in runs if "step_cost" in run or any("setting" in row for row in run["rows"])]
    rows = [row for run in runs if run not in compared for row in run["rows"]]
    if rows:
        print(format_table(rows, [found for run in runs for found in run.get("comparisons", [])]))
    if compared:
        print(format_ablation(compared))
    measured = [run for run in runs if run.get("benchmark")]
    if measured:
        print(format_inference(measured))
    for run in runs:
        if "training_benchmark" in run:
            print(format_training(run))
        if "whole_runs" in run:
            print(format_whole_runs(run))
    for hardware in dict.fromkeys((run["run"]["hardware"], run["run"]["threads_per_process"]) for run in runs):
        print(f"\nHardware: {hardware[0]}, {hardware[1]} thread(s) per process.")
    if args.plot is not None:
        plot(rows, args.plot)


def format_summary(results: dict[str, Any]) -> str:
    """One Markdown line per task of `glue_results.py`: teacher, the student without and with distillation and in int8,
    what the difference is worth, what is kept of a teacher that is not below chance, and how small and fast int8 is.

    Latency is the p50 of one row of 128 tokens on one CPU thread; the speed-up is that over the teacher in torch.
    """
    rows, benchmark = results["rows"], results.get("benchmark", [])
    names = ["task", "metric", "teacher", "without distillation", "distilled", "difference [95 %]", "kept"]
    names += ["distilled + int8", "kept", "int8 MB", "int8 ms", "speed-up"]
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    all_kept: dict[str, list[float]] = {"student": [], "int8": []}
    for task in dict.fromkeys(row["task"] for row in rows):
        values = {role: main_values(rows, task, role) for role in ROLES}
        shown = {role: _with_spread(found) if found else "" for role, found in values.items()}
        metric = next(row["main_metric"]["name"] for row in rows if row["task"] == task).replace("_", " ")
        difference = next(found for found in results["comparisons"] if found["task"] == task)
        points, low, high = (f"{100 * difference[name]:+.2f}" for name in ("difference", "low", "high"))
        kept = dict.fromkeys(all_kept, "")
        for role in all_kept:  # int8 may have been refused
            if values[role] and not is_below_chance(rows, task):
                all_kept[role].append(statistics.mean(values[role]) / statistics.mean(values["teacher"]))
                kept[role] = f"{all_kept[role][-1]:.1%}"
        measured = [row for row in benchmark if row["task"] == task]
        int8 = next((row for row in measured if row["precision"] == "int8"), None)
        latency = find_latency(int8, threads=1, batch_size=1, length=128) if int8 is not None else None
        faster = speedup(measured, int8["variant"]) if int8 is not None else None
        cells = [task, metric, shown["teacher"], shown["baseline"], shown["student"], f"{points} [{low}, {high}]"]
        cells += [kept["student"], shown["int8"], kept["int8"]]
        cells += [f"{int8['size_bytes'] / 1e6:.1f}" if int8 is not None else ""]
        cells += [f"{latency['p50_ms']:.1f}" if latency is not None else ""]
        cells += [f"{faster:.1f}x" if faster is not None else ""]
        lines.append(f"| {' | '.join(cells)} |")
    mean = {role: f"{statistics.mean(found):.1%}" if found else "" for role, found in all_kept.items()}
    left_out = [task for task in dict.fromkeys(row["task"] for row in rows) if is_below_chance(rows, task)]
    name = f"mean, without {' and '.join(left_out)}" if left_out else "mean"
    lines.append(f"| {name} | | | | | | {mean['student']} | | {mean['int8']} | | | |")
    return "\n".join(lines)


def format_ablation(runs: list[dict[str, Any]]) -> str:
    """One Markdown line per task, student and setting of `glue_ablation.py`, with the cost of a step where a file
    measured it; then one per form of a term."""
    lines = [
        "| task | student | setting | labelled rows | other rows | steps | value | difference to task | step |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        cost_of = {cost["form"]: f"{cost['ratio']:.2f}" for cost in run.get("step_cost", [])}
        plain = [_main_value(row) for row in run["rows"] if row.get("setting") == "task"]
        by_setting: dict[tuple, list[dict[str, Any]]] = {}
        for row in run["rows"]:
            key = (
                ("teacher", 0, 0)
                if row["role"] == "teacher"
                else (row["setting"], row["unlabeled_rows"], row["steps"])
            )
            by_setting.setdefault(key, []).append(row)
        for (setting, _, steps), rows in by_setting.items():
            row, values = rows[0], [_main_value(row) for row in rows]
            value = _with_spread(values)
            if setting == "teacher":
                lines.append(f"| {row['task']} | teacher, {row['layers']} layers | | | | | {value} | | |")
                continue
            is_compared = plain and setting != "task"
            gain = f"{statistics.mean(values) - statistics.mean(plain):+.2f}" if is_compared else ""
            lines.append(
                f"| {row['task']} | {row['layers']} layers, width {row['hidden_size']} | {setting} | "
                f"{row['labeled_rows']} | {_describe_rows(row)} | {steps} | {value} | {gain} | "
                f"{cost_of.get(setting, '')} |"
            )
    for run in runs:
        settings = {row.get("setting") for row in run["rows"]}
        forms = [cost for cost in run.get("step_cost", []) if cost["form"] not in settings]
        if forms:
            width = next((row["hidden_size"] for row in run["rows"] if "hidden_size" in row), None)
            student = f" of a student of width {width}" if width else ""
            lines += ["", f"| form, on top of logits | step{student}, times that of logits |", "|---|---|"]
            lines += [f"| {cost['form']} | {cost['ratio']:.2f} |" for cost in forms]
    return "\n".join(lines)


def _main_value(row: dict[str, Any]) -> float:
    return 100 * row["metrics"][row["main_metric"]["split"]][row["main_metric"]["name"]]


def _with_spread(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def _describe_rows(row: dict[str, Any]) -> str:
    kind = "augmented" if row["augment"] else "unlabelled"
    return f"{row['unlabeled_rows']} {kind}" if row["unlabeled_rows"] else ""


def format_inference(runs: list[dict[str, Any]], threads: int = 1) -> str:
    """One Markdown line per task and variant: metric, size, latency at batch size 1, and from text to label."""
    lengths = sorted({cell["length"] for run in runs for row in run["benchmark"] for cell in row["latency"]})
    lines = [["task", "variant", "metric", "value", "size (MB)"]]
    lines[0] += [f"p50 / p95 ms, {length} tokens" for length in lengths] + [f"speed-up, {lengths[-1]} tokens"]
    lines[0] += ["text to label p50 ms", "text to label rows/s"]
    lines.append(["---"] * len(lines[0]))
    # One file may hold several tasks, whose variants have the same names.
    tasks = {(index, row["task"]): run for index, run in enumerate(runs) for row in run["benchmark"]}
    for (_, task), run in tasks.items():
        rows = [row for row in run["benchmark"] if row["task"] == task]
        for row in rows:
            metric = row["main_metric"] or {"split": None, "name": ""}
            value = f"{100 * row['metrics'][metric['split']][metric['name']]:.2f}" if row["metrics"] else ""
            line = [
                row["task"] or f"none, {run.get('weights')} weights",
                row["variant"],
                metric["name"],
                value,
                f"{row['size_bytes'] / 1e6:.1f}",
            ]
            for length in lengths:
                cell = find_latency(row, threads, 1, length)
                line.append(f"{cell['p50_ms']:.2f} / {cell['p95_ms']:.2f}" if cell else "")
            ratio = speedup(rows, row["variant"], threads=threads, length=lengths[-1])
            line.append(f"{ratio:.1f}x" if ratio is not None else "")
            ends = {cell["batch_size"]: cell for cell in row["end_to_end"] if cell["threads"] == threads}
            line += [f"{ends[1]['p50_ms']:.2f}", f"{ends[max(ends)]['rows_per_second']:.0f}"] if ends else ["", ""]
            lines.append(line)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# What `format_costs` compares: a variant, with another, and by which ratio.
COSTS = (
    ("online_logits", "limit", "step_ratio"),
    ("online_layers", "limit", "step_ratio"),
    ("online_layers_relations", "limit", "step_ratio"),
    ("online_layers", "naive", "step_ratio"),
    ("cached_logits", "finetune", "throughput_ratio"),
    ("cached_layer", "finetune", "throughput_ratio"),
)


def format_costs(results: dict[str, Any]) -> str:
    """One Markdown line per configuration: how long a step takes, or how many rows a second, times that of another.

    Args:
        results (`dict`): What `benchmark_training.py` wrote.
    """
    found = {
        (*configuration(row)[:3], row["variant"], other, kind): value
        for row in results["training_benchmark"]
        for kind in ("step_ratio", "throughput_ratio")
        for other, value in row[kind].items()
    }
    what = {"step_ratio": "step", "throughput_ratio": "rows/s"}
    lines = [["length", "batch", "dtype", *(f"{what[kind]}: {name} / {other}" for name, other, kind in COSTS)]]
    lines.append(["---"] * len(lines[0]))
    for cell in dict.fromkeys(key[:3] for key in found):
        lines.append([*cell, *(as_text(found.get((*cell, *cost)), ".2f") for cost in COSTS)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def format_training(results: dict[str, Any]) -> str:
    """One Markdown line per configuration and variant, then the building of caches, the memory for rows on disk, and
    the costs of each configuration.

    Args:
        results (`dict`): What `benchmark_training.py` wrote.
    """
    lines = [["length", "batch", "dtype", "variant", "rows/s", "step ms, p50 [p25, p75]", "step / limit"]]
    compared = ("finetune", "online_layers", "naive+padded")
    lines[0] += [f"rows/s / {name}" for name in compared]
    lines[0] += ["peak MiB", "tokens per row", "outside matrix products"]
    rows = results["training_benchmark"]
    for row in rows:
        lines.append(
            [
                *configuration(row),
                f"{row['rows_per_second']:.1f}",
                f"{row['p50_ms']:.1f} [{row['p25_ms']:.1f}, {row['p75_ms']:.1f}]",
                as_text(row["step_ratio"].get("limit"), ".3f"),
                *(as_text(row["throughput_ratio"].get(name), ".3f") for name in compared),
                as_text(row["peak_memory_mib"], ".0f"),
                f"{row['tokens_per_row']:.1f}",
                as_text(row.get("share_outside_matrix_products"), ".1%"),
            ]
        )
    tables = [lines]
    if results["caches"]:
        names = ["length", "batch", "dtype", "cache of", "built rows/s", "teacher's forward rows/s", "ratio"]
        tables.append([[*names, "bytes per token"]])
        for row in results["caches"]:
            speeds = row["rows_per_second"], row["teacher_forward_rows_per_second"]
            tables[-1].append(
                [
                    *configuration(row),
                    *(f"{speed:.1f}" for speed in speeds),
                    f"{speeds[0] / speeds[1]:.2f}",
                    f"{row['bytes_per_token']:.1f}",
                ]
            )
    if results["memory"]:
        tables.append([["length", "batch", "dtype", "variant", "rows on disk", "resident MiB", "its own", "of files"]])
        for row in results["memory"]:
            sizes = (as_text(row.get(f"{name}_mib"), ".0f") for name in ("resident", "anonymous", "file"))
            tables[-1].append([*configuration(row), str(row["rows"]), *sizes])
    for table in tables:
        table.insert(1, ["---"] * len(table[0]))
    formatted = ["\n".join("| " + " | ".join(line) + " |" for line in table) for table in tables]
    return "\n\n".join([*formatted, format_costs(results)])


def format_whole_runs(results: dict[str, Any]) -> str:
    """One Markdown line per variant: its metric, and the seconds of its training and of its whole process, as mean and
    spread over seeds. Compared with fine-tuning of the same seed is what the processor computed for the process:
    it leaves out the time in which others had the cores.

    Args:
        results (`dict`): What `benchmark_whole_runs.py` wrote.
    """
    rows = results["whole_runs"]
    plain = {row["seed"]: row["processor_seconds"] for row in rows if row["variant"] == "finetune"}
    lines = ["| variant | seeds | metric | value | steps | training s | process s | its processor s | / finetune |"]
    lines.append("|---" * 9 + "|")
    for variant in dict.fromkeys(row["variant"] for row in rows):
        found = [row for row in rows if row["variant"] == variant]
        is_run = found[0]["seed"] is not None
        value = _with_spread([_main_value(row) for row in found]) if is_run else ""
        ratios = [row["processor_seconds"] / plain[row["seed"]] for row in found if row["seed"] in plain]
        metric, steps = found[0]["main_metric"]["name"], found[0]["steps"]
        times = [
            _with_spread([row[name] for row in found]) for name in ("train_seconds", "seconds", "processor_seconds")
        ]
        cells = [variant, str(len(found)) if is_run else "", metric if is_run else "", value, str(steps), *times]
        cells.append(f"{statistics.median(ratios):.2f}" if ratios else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def configuration(row: dict[str, Any]) -> list[str]:
    return [str(row[name]) for name in ("length", "batch_size", "dtype", "variant")]


def as_text(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of the main metric by task and role, with the spread over seeds."""
    import matplotlib.pyplot as plt

    tasks = list(dict.fromkeys(row["task"] for row in rows))
    roles = {role: name for role, name in ROLES.items() if any(row["role"] == role for row in rows)}
    width = 0.85 / len(roles)
    figure, axes = plt.subplots(figsize=(max(9, 2 * len(tasks)), 3), layout="constrained")
    for offset, (role, name) in enumerate(roles.items()):
        values = [main_values(rows, task, role) for task in tasks]
        bars = axes.bar(
            [index + width * (offset - (len(roles) - 1) / 2) for index in range(len(tasks))],
            [statistics.mean(found) if found else 0.0 for found in values],
            width=0.93 * width,
            yerr=[statistics.stdev(found) if len(found) > 1 else 0.0 for found in values],
            capsize=3,
            label=name,
        )
        axes.bar_label(bars, fmt="%.1f", fontsize=8, padding=2)
    axes.set_xticks(range(len(tasks)), tasks)
    lowest = min(value for task in tasks for role in roles for value in main_values(rows, task, role))
    axes.set_ylim(max(0, min(40, lowest - 10)), 105)
    axes.set_ylabel("dev metric x 100")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(roles), frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
