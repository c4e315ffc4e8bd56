"""The report: every number where it belongs, whatever part of the results there is, and a picture one can read."""

import itertools
import json
import subprocess
import sys

import pytest

from hf_kd.deploy import report
from hf_kd.deploy.report import format_benchmark, plot_pareto, write_report


pytestmark = pytest.mark.one_leg


pytest.importorskip("matplotlib")

EXPORT = {
    "backend": "optimum (optimum-onnx 0.1.0)",
    "opset": 18,
    "graph": "rewritten for CPUs",
    "inputs": ["input_ids", "attention_mask"],
    "parity": {"rows": 64, "max_difference": 1.2e-6, "tolerance": 1e-4},
    "quantization": {
        "method": "dynamic",
        "per_channel": True,
        "reduce_range": False,
        "nodes_in_fp32": ["/classifier/Gemm"],
        "metric": {"name": "accuracy", "fp32": 0.882, "int8": 0.88, "drop": 0.002, "max_drop": 0.005},
        "attempts": [
            {"settings": "dynamic, per-channel", "metric": 0.87, "drop": 0.012},
            {"settings": "dynamic, per-channel, 1 nodes in fp32", "metric": 0.88, "drop": 0.002},
        ],
    },
    "cpu": {"model": "AMD EPYC", "architecture": "x86_64", "flags": ["avx2", "avx512_vnni"], "cores": 2},
}
RUN = {
    "command": "python demo.py --seed 1",
    "versions": {"python": "3.11.7", "torch": "2.13.0", "evaluate": None},
    "hardware": "2 x AMD EPYC",
    "processes": 1,
    "threads_per_process": 2,
    "commit": "902d4f3",
}


def make_row(variant, role, runtime, p50, score, size, threads=(1,), lengths=(16, 128), **changes):
    """An invented row: latency grows with batch size and length, and falls with threads."""
    latency = [
        {
            **{"threads": count, "batch_size": batch_size, "length": length},
            **{
                "p50_ms": p50 * batch_size * length / 128 / count,
                "p95_ms": 2 * p50 * batch_size * length / 128 / count,
            },
            **{"rows_per_second": 1000 * 128 * count / p50 / length, "runs": 20, "p50_ms_rounds": [p50]},
        }
        for count, batch_size, length in itertools.product(threads, (1, 8), lengths)
    ]
    end_to_end = [
        {
            **{"threads": count, "batch_size": batch_size, "p50_ms": p50 / 4 if batch_size == 1 else None},
            **{"p95_ms": None, "rows_per_second": 4000 * count / p50 + batch_size, "mean_tokens": 25.25},
        }
        for count, batch_size in itertools.product(threads, (1, 32))
    ]
    row = {
        **{
            "variant": variant,
            "role": role,
            "runtime": runtime,
            "precision": "fp32",
            "task": "sst2",
            "cpu": "AMD EPYC",
        },
        **{"parameters": 22_713_986, "size_bytes": round(size * 1e6), "memory_mb": 503.4},
        "metrics": None if score is None else {"validation": {"accuracy": score}},
        "main_metric": None if score is None else {"split": "validation", "name": "accuracy"},
        **{"latency": latency, "end_to_end": end_to_end},
    }
    return {**row, **changes}


def make_rows(**changes):
    return [
        make_row("teacher torch fp32", "teacher", "torch", 16.0, 0.897, 91.0, **changes),
        make_row("student ONNX int8", "student", "onnxruntime", 3.0, 0.88, 17.6, parameters=None, **changes),
    ]


def write_results(folder, **parts):
    path = folder / "results.json"
    path.write_text(json.dumps(parts), encoding="utf-8")
    return path


def test_tables_of_a_benchmark():
    """A figure would stand under another heading, or a ratio be upside down, and nobody could tell."""
    assert format_benchmark(make_rows()).splitlines() == [
        "Latency of the model, batch size 1, 1 thread:",
        "",
        "| variant | accuracy | parameters (M) | size (MB) | p50 / p95 ms, 16 tokens | p50 / p95 ms, 128 tokens "
        "| speed-up, 128 tokens |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| teacher torch fp32 | 89.70 | 22.7 | 91.0 | 2.00 / 4.00 | 16.00 / 32.00 | 1.0x |",
        "| student ONNX int8 | 88.00 |  | 17.6 | 0.38 / 0.75 | 3.00 / 6.00 | 5.3x |",
        "",
        "Throughput, 1 thread:",
        "",
        "| variant | rows/s, 8 x 128 | text to label p50 ms | text to label rows/s | memory (MB) |",
        "| --- | --- | --- | --- | --- |",
        "| teacher torch fp32 | 62 | 4.00 | 282 | 503 |",
        "| student ONNX int8 | 333 | 0.75 | 1365 | 503 |",
    ]


def test_tables_of_another_thread_count():
    """The figures of one thread would be read as those of two."""
    lines = format_benchmark(make_rows(threads=(1, 2)), threads=2).splitlines()
    assert lines[0] == "Latency of the model, batch size 1, 2 threads:"
    assert lines[5] == "| student ONNX int8 | 88.00 |  | 17.6 | 0.19 / 0.38 | 1.50 / 3.00 | 5.3x |"
    assert lines[12] == "| student ONNX int8 | 667 | 0.75 | 2699 | 503 |"
    with pytest.raises(ValueError, match=r"threads=3 was not measured; choose one of \[1, 2\]"):
        format_benchmark(make_rows(threads=(1, 2)), threads=3)


def test_tables_of_what_was_not_measured():
    """Without a teacher, texts and a metric the tables would fail, or show a 0 that nobody measured."""
    row = make_row("student", "student", "torch", 8.0, None, 70.0, end_to_end=[], memory_mb=None)
    lines = format_benchmark([row]).splitlines()
    assert lines[2].startswith("| variant | metric | parameters (M) |")
    assert lines[4] == "| student |  | 22.7 | 70.0 | 1.00 / 2.00 | 8.00 / 16.00 |  |"
    assert lines[10] == "| student | 125 |  |  |  |"


def test_a_report_of_everything(tmp_path):
    """A part of the results would be left out, although it was measured."""
    trained = {
        **{"role": "student", "task": "sst2", "seed": 1, "parameters": 17_390_594},
        "metrics": {"validation": {"accuracy": 0.882}},
        "main_metric": {"split": "validation", "name": "accuracy"},
    }
    benchmark = make_rows(threads=(1, 2))
    path = write_results(tmp_path, run=RUN, rows=[trained], benchmark=benchmark, export=EXPORT)
    assert write_report(path) == tmp_path / "report.md"
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        "# Results: sst2",
        "## Quality",
        "## Speed, size and quality on the CPU",
        "## ONNX export",
        "## The run",
    ]
    assert "| sst2 | student distilled | accuracy | 1 | 88.20 | 17.4M |" in text
    assert format_benchmark(benchmark, threads=1) in text
    assert format_benchmark(benchmark, threads=2) in text
    assert "](pareto.png)" in text
    assert "Measured on AMD EPYC, each variant in a process of its own" in text
    assert "on texts of the task, 25 tokens long on average" in text
    export = text[text.index("## ONNX export") : text.index("## The run")].splitlines()
    assert [line for line in export if line][1:] == [
        "- Backend: optimum (optimum-onnx 0.1.0), opset 18; graph rewritten for CPUs",
        "- Against torch: logits differ by at most 1.2e-06 over 64 rows, 0.0001 allowed",
        "- int8: dynamic, per channel, 8-bit weights, 1 nodes in fp32; `/classifier/Gemm`",
        "- accuracy 88.20 in fp32, 88.00 in int8: dropped by 0.20 points, 0.50 allowed",
        "- CPU: AMD EPYC (x86_64), cores: 2, avx2 avx512_vnni",
        "What was tried for int8, in this order:",
        "| settings | metric | drop |",
        "| --- | --- | --- |",
        "| dynamic, per-channel | 87.00 | 1.20 |",
        "| dynamic, per-channel, 1 nodes in fp32 | 88.00 | 0.20 |",
    ]
    assert text[text.index("## The run") :].splitlines()[2:] == [
        "- Command: `python demo.py --seed 1`",
        "- Versions: python 3.11.7, torch 2.13.0",
        "- Hardware: 2 x AMD EPYC",
        "- Commit: 902d4f3",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pareto.png", "report.md", "results.json"]


def test_a_busy_machine_is_named(tmp_path):
    """Long calls are interrupted and short ones are not: the ratio to the teacher would be too good, and published."""
    rows = make_rows(cpu_share=0.97)
    assert "busy" not in write_report(write_results(tmp_path, benchmark=rows)).read_text(encoding="utf-8")
    rows[0]["cpu_share"] = 0.625
    text = write_report(write_results(tmp_path, benchmark=rows)).read_text(encoding="utf-8")
    assert "**The machine was busy: a process had a core for only 62% of the time. Measure again.**" in text


@pytest.mark.parametrize(
    ("parts", "headings", "has_picture"),
    [
        ({"benchmark": make_rows()}, ["# Results: sst2", "## Speed, size and quality on the CPU"], True),
        (
            {"benchmark": [make_row("student", "student", "torch", 8.0, None, 70.0)], "rows": []},
            ["# Results: sst2", "## Speed, size and quality on the CPU"],
            False,
        ),
        ({"export": {**EXPORT, "quantization": None}}, ["# Results: model", "## ONNX export"], False),
    ],
)
def test_a_report_of_a_part(tmp_path, parts, headings, has_picture):
    """A run without export, metrics or training would have no report, or one with empty sections."""
    path = write_results(tmp_path, **parts)
    text = write_report(path, tmp_path / "new" / "folder").read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if line.startswith("#")] == headings
    assert ("pareto.png" in text) == (tmp_path / "new" / "folder" / "pareto.png").exists() == has_picture


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"metric": None, "failed": True}, "- no int8 file kept the metric: none was written"),
        ({"metric": None}, "- the metric of the int8 file was not measured during the export"),
    ],
)
def test_int8_without_a_metric(tmp_path, changes, line):
    """A failed or unmeasured int8 file would read like one that kept the metric."""
    path = write_results(tmp_path, export={**EXPORT, "quantization": {**EXPORT["quantization"], **changes}})
    text = write_report(path).read_text(encoding="utf-8")
    assert line in text.splitlines()
    assert "points" not in text


def test_no_results_are_an_error(tmp_path):
    """An empty report would be published."""
    with pytest.raises(ValueError, match=r"results.json does not exist; give the results.json of a run"):
        write_report(tmp_path / "results.json")
    with pytest.raises(ValueError, match=r"holds \['rows', 'run'\], but needs `rows`, `benchmark` or `export`"):
        write_report(write_results(tmp_path, run=RUN, rows=[]))


def test_a_failed_write_leaves_the_old_files(tmp_path, monkeypatch):
    """Half a report, or a new picture beside an old table."""
    path = write_results(tmp_path, benchmark=make_rows())
    write_report(path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    write_results(tmp_path, benchmark=make_rows(lengths=(64,)))
    before["results.json"] = path.read_bytes()

    def draw_half(rows, path):
        path.write_bytes(b"\x89PNG")
        raise OSError("No space left on device")

    monkeypatch.setattr(report, "plot_pareto", draw_half)
    with pytest.raises(OSError, match="No space left"):
        write_report(path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_matplotlib_is_named_if_missing(tmp_path, monkeypatch):
    """The traceback would not say which extra brings it."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'hf-kd\[report\]'"):
        plot_pareto(make_rows(), tmp_path / "pareto.png")


def test_a_picture_needs_a_metric(tmp_path):
    """All points would stand at 0."""
    with pytest.raises(ValueError, match="no row has a metric to draw"):
        plot_pareto([make_row("student", "student", "torch", 8.0, None, 70.0)], tmp_path / "pareto.png")


CLOSE = [
    ("teacher torch fp32", "teacher", "torch", 16.0, 0.897, 91.0),
    ("student torch fp32", "student", "torch", 7.4, 0.882, 70.0),
    ("student torch bf16", "student", "torch", 6.8, 0.8815, 70.0),
    ("student ONNX fp32", "student", "onnxruntime", 7.0, 0.882, 70.0),
    ("student ONNX int8", "student", "onnxruntime", 6.5, 0.881, 17.6),
]
EQUAL = [(f"variant {number}", "student", "torch", 7.0, 0.882, 70.0) for number in range(5)]


@pytest.mark.parametrize("rows", [CLOSE, EQUAL], ids=["close", "equal"])
def test_labels_of_the_picture_do_not_overlap(tmp_path, rows):
    """The variants that one wants to compare are close to each other, and their names would cover each other."""
    from matplotlib.text import Text

    figure = plot_pareto([make_row(*row) for row in rows], tmp_path / "pareto.png")
    figure.canvas.draw()
    (axes,) = figure.axes
    labels = [text for text in axes.texts if text.get_text().endswith(" MB")]
    assert [label.get_text() for label in labels] == [
        f"{name}\n{p50:.1f} ms, {size:.1f} MB" for name, _, _, p50, _, size in rows
    ]
    boxes = [Text.get_window_extent(label) for label in labels]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    page = figure.bbox
    assert all(page.contains(*box.min) and page.contains(*box.max) for box in boxes)
    points = axes.transData.transform(axes.collections[0].get_offsets())
    assert not any(box.contains(*point) for box, point in itertools.product(boxes, points))


def test_the_picture_shows_what_was_measured(tmp_path):
    """Axes of another length or thread count, or areas by another size, would go unnoticed."""
    path = tmp_path / "pareto.png"
    figure = plot_pareto([make_row(*row, threads=(1, 2)) for row in CLOSE], path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert path.stat().st_size > 20_000
    (axes,) = figure.axes
    assert axes.get_title(loc="left").strip() == "sst2 on AMD EPYC, 1 thread"
    assert axes.get_xlabel() == "latency: p50 at batch size 1, 128 tokens (ms, log scale)"
    assert axes.get_ylabel() == "validation accuracy (points of 100)"
    assert axes.get_xscale() == "log"
    (points,) = axes.collections
    assert points.get_offsets().tolist() == [[row[3], 100 * row[4]] for row in CLOSE]
    areas = points.get_sizes()
    assert (areas / areas[0]).tolist() == pytest.approx([row[5] / 91 for row in CLOSE])
    (front,) = axes.lines
    # fp32 in torch is slower than ONNX and no better.
    assert front.get_xdata().tolist() == [6.5, 6.8, 7.0, 16.0]


def test_the_command_line(tmp_path):
    """The documented command would not write the report, or not say where it is."""
    path = write_results(tmp_path, export=EXPORT)
    command = [sys.executable, "-m", "hf_kd.deploy.report", str(path), "--output_dir", str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout == f"{tmp_path / 'out' / 'report.md'}\n"
    assert (tmp_path / "out" / "report.md").read_text(encoding="utf-8").startswith("# Results: model\n")
