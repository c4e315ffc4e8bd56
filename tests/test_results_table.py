"""The table of what every task keeps of its teacher, and that it stands in the README."""

import importlib
import json
import os
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
README, RESULTS = ROOT / "README.md", ROOT / "recipes" / "results" / "glue.json"
START, END = "<!-- results: begin -->\n", "\n<!-- results: end -->"


@pytest.fixture
def format_summary(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "recipes"), *sys.path])
    return importlib.import_module("results_table").format_summary


def test_readme_has_the_results(format_summary):
    """A figure typed by hand is one that nobody measured.

    `UPDATE_README=1 pytest tests/test_results_table.py` writes the table anew.
    """
    before, rest = README.read_text(encoding="utf-8").split(START)
    found, after = rest.split(END)
    expected = format_summary(json.loads(RESULTS.read_text(encoding="utf-8")))
    if os.environ.get("UPDATE_README"):
        README.write_text(f"{before}{START}{expected}{END}{after}", encoding="utf-8")
    else:
        assert found == expected


def measured(task, role, precision, size, latencies):
    """One variant of a benchmark; `latencies` maps threads, batch size and length to the p50."""
    cells = [
        {"threads": threads, "batch_size": batch_size, "length": length, "p50_ms": p50, "p95_ms": 3 * p50}
        for (threads, batch_size, length), p50 in latencies.items()
    ]
    facts = {"task": task, "role": role, "precision": precision, "size_bytes": size}
    return {**facts, "variant": f"{role} {precision}", "latency": cells}


def test_summary_by_hand(format_summary):
    """A share of another model's value, a mean over rows in place of tasks, or the size and latency of another file
    would look like any other number."""

    def row(task, role, seed, value):
        metrics = {"validation": {"accuracy": value}}
        return {
            "task": task,
            "role": role,
            "seed": seed,
            "metrics": metrics,
            "main_metric": {"split": "validation", "name": "accuracy"},
        }

    rows = []
    tasks = (("a", 0.8, (0.6, 0.72, 0.7)), ("b", 0.5, (0.5, 0.5, 0.4)), ("wnli", 0.2, (0.5, 0.4, 0.4)))
    for task, teacher, others in tasks:
        rows.append(row(task, "teacher", None, teacher))
        for role, value in zip(("baseline", "student", "int8"), others, strict=True):
            rows += [row(task, role, seed, value + change) for seed, change in ((1, -0.01), (2, 0.01))]
    compared = [
        {"task": task, "difference": 0.12, "low": 0.01, "high": 0.2, "confidence": 0.95} for task in ("a", "b", "wnli")
    ]
    others = {(1, 1, 16): 1.0, (1, 8, 128): 90.0, (2, 1, 128): 3.0}
    benchmark = [
        measured("a", "teacher", "fp32", 90.9e6, {**others, (1, 1, 128): 50.0}),
        measured("a", "student", "fp32", 69.6e6, {**others, (1, 1, 128): 20.0}),
        measured("a", "student", "int8", 17.53e6, {**others, (1, 1, 128): 5.26}),
        measured("b", "teacher", "fp32", 90.9e6, others),
        measured("b", "student", "int8", 17.6e6, others),
        measured("wnli", "teacher", "fp32", 90.9e6, {(1, 1, 128): 60.0}),
        measured("wnli", "student", "fp32", 69.6e6, {(1, 1, 128): 20.0}),
    ]
    results = {"rows": rows, "comparisons": compared, "benchmark": benchmark}
    header, _, first, second, wnli, mean = format_summary(results).splitlines()
    assert header.endswith(" | distilled + int8 | kept | int8 MB | int8 ms | speed-up |")
    values = ["80.00", "60.00 ± 1.41", "72.00 ± 1.41", "+12.00 [+1.00, +20.00]", "90.0%", "70.00 ± 1.41", "87.5%"]
    assert first == f"| a | accuracy | {' | '.join(values)} | 17.5 | 5.3 | 9.5x |"
    # Measured at other lengths alone, and not exported.
    assert second.split(" | ")[6] == "100.0%" and second.endswith(" | 17.6 |  |  |") and wnli.endswith(" |  |  |  |")
    # Below chance the teacher is no measure.
    assert wnli.split(" | ")[6:9] == ["", "40.00 ± 1.41", ""]
    assert mean == "| mean, without wnli | | | | | | 95.0% | | 83.8% | | | |"
    assert {line.count("|") for line in (header, first, second, wnli, mean)} == {13}
    without = format_summary({"rows": rows, "comparisons": compared}).splitlines()[2]
    assert without == f"| a | accuracy | {' | '.join(values)} |  |  |  |"
