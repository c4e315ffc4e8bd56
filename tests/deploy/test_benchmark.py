"""The benchmark: every figure is there and says what it says, from processes that share nothing."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_model
from transformers import AutoModelForSequenceClassification

from hf_kd.deploy import benchmark as module
from hf_kd.deploy import benchmark_worker
from hf_kd.deploy.benchmark import Variant, benchmark, default_variants, find_latency, speedup
from hf_kd.glue import GLUE_TASKS, GlueMetric


pytestmark = pytest.mark.one_leg


pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

# Of different lengths and not sorted, so that padding and the way back to the order given matter.
TEXTS = [" ".join(f"w{(7 * row + word) % 59}" for word in range(1 + 5 * row % 17)) for row in range(40)]
QUICK = {"lengths": (8, 16), "batch_sizes": (1, 2), "max_length": 32, "seconds": 0.01}


def logits_of(model, tokenizer):
    """One text at a time, without padding."""
    with torch.inference_mode():
        return torch.cat([model.eval()(**tokenizer(text, return_tensors="pt")).logits.float() for text in TEXTS])


def answers_of(folder, tokenizer, dtype=torch.float32):
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype)
    return logits_of(model, tokenizer).argmax(dim=-1).tolist()


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    """A teacher, a smaller student, and the student's ONNX file."""
    from hf_kd.deploy.onnx import export_onnx

    folder = tmp_path_factory.mktemp("benchmark")
    teacher, student = make_model(seed=1), make_model(seed=2, num_hidden_layers=2)
    # The student gives both answers, and none so close to the boundary that rounding decides.
    margins = sorted((logits_of(student, tokenizer) @ torch.tensor([-1.0, 1.0])).tolist())
    lower, upper = max(zip(margins[10:30], margins[11:31], strict=True), key=lambda pair: pair[1] - pair[0])
    assert upper - lower > 1e-3
    with torch.no_grad():
        student.classifier.bias[0] += (lower + upper) / 2
    for name, model in (("teacher", teacher), ("student", student)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    export_onnx(folder / "student", folder / "export", quantization=None)
    return folder


@pytest.fixture(scope="module")
def variants(folders):
    return [
        Variant("teacher torch bf16", "teacher", "torch", "bf16", folders / "teacher"),
        Variant("student torch fp32", "student", "torch", "fp32", folders / "student"),
        Variant("student ONNX fp32", "student", "onnxruntime", "fp32", folders / "export"),
    ]


@pytest.fixture(scope="module")
def onnx_variant(variants):
    return variants[2]


@pytest.fixture(scope="module")
def labels(folders, tokenizer):
    """What the student answers, but for every fourth: a metric that a mixed-up order would change."""
    answers = answers_of(folders / "student", tokenizer)
    assert 10 <= sum(answers) <= 30
    return [answer if row % 4 else 1 - answer for row, answer in enumerate(answers)]


@pytest.fixture(scope="module")
def measured(variants, labels):
    """Rows of one run, and what each of its processes was told and said."""
    processes = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_run_worker", record_into(processes))
        rows = benchmark(variants, TEXTS, labels, GLUE_TASKS["sst2"], threads=(1,), rounds=1, **QUICK)
    return rows, processes


def record_into(processes):
    run_worker = module._run_worker

    def run_and_record(spec, folder):
        result = run_worker(spec, folder)
        processes.append((spec, result))
        return result

    return run_and_record


def test_rows_have_every_figure(measured, variants):
    """A cell that nobody measured would be missed only when the table is made."""
    rows, _ = measured
    assert [(row["variant"], row["role"], row["runtime"], row["precision"], row["task"]) for row in rows] == [
        (variant.name, variant.role, variant.runtime, variant.precision, "sst2") for variant in variants
    ]
    for row in rows:
        assert [(cell["threads"], cell["batch_size"], cell["length"]) for cell in row["latency"]] == [
            (1, 1, 8),
            (1, 1, 16),
            (1, 2, 8),
            (1, 2, 16),
        ]
        for cell in row["latency"]:
            assert 0 < cell["p50_ms"] <= cell["p95_ms"]
            assert cell["rows_per_second"] > 0
            assert cell["runs"] >= 10
            assert cell["p50_ms_rounds"] == [cell["p50_ms"]]
        assert 0 < row["cpu_share"] < 1.1
        single, batched = row["end_to_end"]
        assert (single["threads"], single["batch_size"], batched["threads"], batched["batch_size"]) == (1, 1, 1, 32)
        assert 0 < single["p50_ms"] <= single["p95_ms"]
        assert (batched["p50_ms"], batched["p95_ms"]) == (None, None)
        assert min(single["rows_per_second"], batched["rows_per_second"]) > 0
        mean_words = sum(len(text.split()) for text in TEXTS) / len(TEXTS)
        assert single["mean_tokens"] == batched["mean_tokens"] == pytest.approx(mean_words + 2)
    assert json.loads(json.dumps(rows)) == rows


def test_metric_is_that_of_the_model(measured, folders, labels, tokenizer):
    """Rows sorted by length and not put back, or a wrong file, would show another model's quality."""
    rows, _ = measured
    loaded = (("teacher", torch.bfloat16), ("student", torch.float32), ("student", torch.float32))
    for row, (name, dtype) in zip(rows, loaded, strict=True):
        answers = answers_of(folders / name, tokenizer, dtype)
        expected = GlueMetric(GLUE_TASKS["sst2"]).compute(predictions=answers, references=labels)
        assert row["metrics"] == {"validation": expected}
        assert row["main_metric"] == {"split": "validation", "name": "accuracy"}
    assert rows[1]["metrics"]["validation"]["accuracy"] == 0.75


def test_sizes_are_those_of_files_and_models(measured, folders):
    """The int8 file's size, or the number of its weights, would be that of the float32 checkpoint."""
    rows, _ = measured
    assert [row["size_bytes"] for row in rows] == [
        os.path.getsize(folders / "teacher" / "model.safetensors"),
        os.path.getsize(folders / "student" / "model.safetensors"),
        os.path.getsize(folders / "export" / "onnx" / "model.onnx"),
    ]
    student = make_model(num_hidden_layers=2).num_parameters()
    assert [row["parameters"] for row in rows] == [make_model().num_parameters(), student, student]


def test_each_variant_has_a_process_of_its_own(measured):
    """In one process a waiting ONNX Runtime session makes torch slower, and torch adds 400 MB to ONNX Runtime."""
    rows, processes = measured
    facts = [result["process"] for _, result in processes]
    assert len({os.getpid(), *(fact["pid"] for fact in facts)}) == 4
    assert [fact["imports_torch"] for fact in facts] == [True, True, False]
    assert [fact["threads"] for fact in facts] == [1, 1, 1]
    if Path("/proc/self/status").exists():
        # Less than this process, which imports torch: a child starts with its parent's `ru_maxrss`.
        assert 20 < rows[2]["memory_mb"] < benchmark_worker._peak_memory_mb() - 100


def test_threads_and_rounds(onnx_variant, monkeypatch):
    """All figures would be those of one thread count, or drift would hit the last variant alone."""
    processes = []
    monkeypatch.setattr(module, "_run_worker", record_into(processes))
    other = Variant("other", "student", "onnxruntime", "fp32", onnx_variant.path)
    pairs = [("w1 w2", "w3"), {"text": "w4", "text_pair": "w5 w6 w7"}, {"text": "w8"}]
    rows = benchmark([onnx_variant, other], pairs, threads=(1, 2, 1), rounds=2, **{**QUICK, "lengths": (8,)})
    order = [(spec["variant"]["name"], spec["threads"]) for spec, _ in processes]
    assert order == 2 * [(name, threads) for threads in (1, 2) for name in (onnx_variant.name, "other")]
    assert [result["process"]["threads"] for _, result in processes] == [spec["threads"] for spec, _ in processes]
    assert not any(result["process"]["imports_torch"] for _, result in processes)
    for row, results in ((rows[0], processes[0::2]), (rows[1], processes[1::2])):
        cells = [cell for _, result in results for cell in result["latency"]]
        for cell, first, second in zip(row["latency"], cells[:4], cells[4:], strict=True):
            assert cell["p50_ms_rounds"] == [first["p50_ms"], second["p50_ms"]]
            assert cell["p50_ms"] == (first["p50_ms"] + second["p50_ms"]) / 2
            assert cell["runs"] == first["runs"] + second["runs"]
        assert [cell["threads"] for cell in row["latency"]] == [1, 1, 2, 2]
        assert [(cell["threads"], cell["batch_size"]) for cell in row["end_to_end"]] == [
            (1, 1),
            (1, 32),
            (2, 1),
            (2, 32),
        ]
        assert row["end_to_end"][0]["mean_tokens"] == pytest.approx((6 + 7 + 3) / 3)
        assert (row["metrics"], row["main_metric"], row["parameters"]) == (None, None, None)


def test_without_texts_the_inputs_are_random(onnx_variant):
    """A model could not be timed before there is data."""
    (row,) = benchmark([onnx_variant], threads=(1,), rounds=1, **QUICK)
    assert [cell["length"] for cell in row["latency"]] == [8, 16, 8, 16]
    assert row["end_to_end"] == []


def test_a_process_that_fails_says_why(onnx_variant, tmp_path):
    """The run would end with "exit status 1", or with the figures of the other variants alone."""
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes(Path(onnx_variant.path, name).read_bytes())
    (tmp_path / "broken.onnx").write_bytes(b"not a model")
    broken = Variant("broken", "student", "onnxruntime", "int8", tmp_path, "broken.onnx")
    with pytest.raises(RuntimeError, match=r"(?s)measuring broken with threads=1 ended with code 1:.*broken\.onnx"):
        benchmark([broken], threads=(1,), rounds=1, **QUICK)


def test_labels_of_the_model_may_have_another_order(onnx_variant, tmp_path):
    """A teacher of the Hub whose class 0 is "positive" would score 100 minus its accuracy."""
    config = json.loads(Path(onnx_variant.path, "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "id2label": {"0": "Positive", "1": "Negative"}}), encoding="utf-8"
    )
    swapped = Variant("swapped", "teacher", "onnxruntime", "fp32", tmp_path)
    logits = np.array([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0]])
    assert module._score(swapped, GLUE_TASKS["sst2"], logits, [1, 0, 1]) == {"accuracy": 1.0}
    assert module._score(onnx_variant, GLUE_TASKS["sst2"], logits, [0, 1, 1]) == {"accuracy": 2 / 3}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"role": "assistant"}, "role='assistant', but 'teacher' or 'student' is needed"),
        ({"runtime": "jax"}, r"runtime='jax', but one of \['torch', 'onnxruntime'\] is needed"),
        ({"precision": "bf16"}, "precision='bf16', but onnxruntime is measured in fp32 or int8"),
        ({"precision": "int8"}, "onnx/model_quantized.onnx is missing; save model and tokenizer"),
        ({"file_name": "model.onnx"}, "export/model.onnx is missing"),
        ({"path": "nowhere"}, "nowhere/config.json is missing"),
        ({"runtime": "torch"}, "export/model.safetensors is missing"),
    ],
)
def test_a_variant_that_cannot_run(onnx_variant, changes, message, monkeypatch):
    """It would be found out after the other variants had run for minutes."""
    monkeypatch.setattr(subprocess, "run", None)
    values = {"name": "x", "role": "student", "runtime": "onnxruntime", "precision": "fp32", "path": onnx_variant.path}
    with pytest.raises(ValueError, match=message):
        benchmark([onnx_variant, Variant(**{**values, **changes})], **QUICK)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": ()}, r"lengths=\[\], but positive whole numbers are needed"),
        ({"batch_sizes": (1, 0)}, r"batch_sizes=\[1, 0\]"),
        ({"threads": ()}, r"threads=\[\]"),
        ({"rounds": 0}, r"rounds=\[0\]"),
        ({"max_length": 0.5}, r"max_length=\[0.5\]"),
        ({"seconds": math.nan}, "seconds=nan"),
        ({"lengths": (81,)}, "takes up to 80 tokens, but inputs of 81 are asked for"),
        ({"max_length": 128}, "takes up to 80 tokens, but inputs of 128 are asked for"),
        ({"texts": []}, r"texts=\[\] is empty"),
        ({"texts": [("a", "b", "c")]}, r"an input is \('a', 'b', 'c'\)"),
        ({"texts": [None]}, "an input is None"),
        ({"texts": ["a"], "task": GLUE_TASKS["sst2"]}, "metrics need texts, labels and the task, but labels are None"),
        ({"labels": [1]}, "texts and task are None"),
        ({"texts": ["a"], "labels": [1, 0], "task": GLUE_TASKS["sst2"]}, "1 texts have 2 labels"),
        ({"texts": ["a"], "labels": [-100], "task": GLUE_TASKS["sst2"]}, "a label is -100"),
        ({"texts": ["a"], "labels": [1], "task": GLUE_TASKS["mnli"]}, "those of task 'mnli' are .*'contradiction'"),
    ],
)
def test_arguments_that_cannot_be_measured(onnx_variant, changes, message, monkeypatch):
    """It would be found out in the first process, or after all of them."""
    monkeypatch.setattr(subprocess, "run", None)
    with pytest.raises(ValueError, match=message):
        benchmark([onnx_variant], **{**QUICK, **changes})


def test_variants_need_different_names(onnx_variant):
    """Figures of two variants would be averaged into one row."""
    for variants in ([], [onnx_variant, onnx_variant]):
        with pytest.raises(ValueError, match="at least one is needed, and different names"):
            benchmark(variants, **QUICK)


@pytest.mark.parametrize("has_bf16", [True, False])
def test_default_variants(folders, tmp_path, monkeypatch, has_bf16):
    """bf16 would be timed where the CPU emulates it, or int8 left out where the file is there."""
    monkeypatch.setattr(module, "computes_in_bf16", lambda: has_bf16)
    bf16 = [("student torch bf16", None)] * has_bf16
    found = default_variants(folders / "teacher", folders / "student", folders / "export")
    assert [(variant.name, variant.file_name) for variant in found] == [
        ("teacher torch fp32", None),
        ("student torch fp32", None),
        *bf16,
        ("student ONNX fp32", "onnx/model.onnx"),
    ]
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "model_quantized.onnx").touch()
    found = default_variants(None, folders / "student", tmp_path)
    assert [(variant.name, variant.file_name) for variant in found] == [
        ("student torch fp32", None),
        *bf16,
        ("student ONNX fp32", "onnx/model.onnx"),
        ("student ONNX int8", "onnx/model_quantized.onnx"),
    ]


def test_speedup_is_the_slow_time_over_the_fast():
    """A ratio upside down, or of another length, would be the number that everyone quotes."""

    def row(name, role, p50):
        cells = [{"threads": 1, "batch_size": 1, "length": length, "p50_ms": p50 * length} for length in (64, 128)]
        cells.append({"threads": 2, "batch_size": 1, "length": 128, "p50_ms": 1.0})
        return {"variant": name, "role": role, "latency": cells}

    rows = [row("student", "student", 2.0), row("teacher", "teacher", 9.0), row("other teacher", "teacher", 1.0)]
    assert speedup(rows, "student") == 4.5
    assert speedup(rows, "teacher", base="student", length=64) == 1 / 4.5
    assert speedup(rows, "student", threads=2) == 1.0
    assert speedup(rows, "student", batch_size=8) is None
    assert speedup(rows[:1], "student") is None
    assert find_latency(rows[0], 1, 1, 64)["p50_ms"] == 128.0
    with pytest.raises(ValueError, match=r"'x' was not measured; choose one of \['student', "):
        speedup(rows, "x")


def test_the_worker_imports_no_torch():
    """The process that serves ONNX Runtime would hold 400 MB more, and start ten seconds later."""
    code = (
        "import sys, hf_kd.deploy.benchmark_worker; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
