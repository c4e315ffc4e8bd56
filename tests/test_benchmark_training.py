"""The benchmark of training, for real on tiny shapes: whether each variant is what its name says."""

import dataclasses
import json
import statistics
import subprocess
import sys

import pytest
import torch
from benchmark_training import (
    BenchmarkArguments,
    Worker,
    make_spec,
    ratios,
    steps_per_turn,
    summarize,
    variants_for,
)
from benchmark_training_variants import SST2_LENGTHS, VARIANTS, read_variant
from benchmark_training_worker import make_rows, make_trainer, matrix_product_share, measure_cache, repeat_on_disk
from results_table import format_costs, format_training
from test_distributed import ROOT
from transformers.trainer_pt_utils import LengthGroupedSampler

from hf_kd.results import read_results


pytestmark = pytest.mark.one_leg


TINY = {
    **{"teacher_layers": 4, "student_layers": 2, "hidden_size": 32, "intermediate_size": 64, "heads": 4},
    **{"vocab_size": 100, "max_length": 80, "num_rows": 32, "steps": 2, "warmup_steps": 1, "rounds": 2, "threads": 1},
}
EMBEDDINGS = (100 + 512 + 2 + 2) * 32  # words, positions, types, and the norm's two vectors
TERMS = {
    "online_logits": ["task_loss", "logit_loss"],
    "online_layers": ["task_loss", "logit_loss", "hidden_loss", "attention_loss"],
    "online_layers_relations": ["task_loss", "logit_loss", "hidden_loss", "attention_loss", "relation_loss"],
    "cached_logits": ["task_loss", "logit_loss"],
    "cached_layer": ["task_loss", "logit_loss", "hidden_loss", "relation_loss"],
}


class Commands:
    """In place of the pipes: one turn of these steps, then stop."""

    def __init__(self, **turn):
        self.commands = [{"command": "turn", **turn}, {"command": "stop"}]
        self.answers = []

    def receive(self):
        return self.commands.pop(0)

    def send(self, message):
        self.answers.append(json.loads(json.dumps(message)))


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    args = BenchmarkArguments(**TINY, batch_sizes=[4], lengths=["sst2"])
    return {**make_spec(args, "sst2", 4, "float32", str(tmp_path_factory.mktemp("caches"))), "use_cpu": True}


def train(spec, name, steps=2, **more):
    """The trainer, what it told about itself, the answer to its turn, and the loss of its steps."""
    commands = Commands(steps=steps, warmup_steps=1)
    trainer = make_trainer({**spec, "variant": dataclasses.asdict(read_variant(name)), **more}, commands)
    trainer.seen = {"student": [], "teacher": []}
    teacher = getattr(trainer, "teacher", None)  # a model, or what runs it, or what reads columns
    for role, model in (("student", trainer.model), ("teacher", getattr(teacher, "model", teacher))):
        if isinstance(model, torch.nn.Module):
            model.register_forward_hook(lambda module, inputs, outputs, role=role: trainer.seen[role].append(outputs))
    loss = trainer.train().training_loss * 10**6  # the Trainer divides by max_steps
    facts, turn = commands.answers
    return trainer, facts, turn, loss


@pytest.mark.parametrize("base", VARIANTS)
def test_a_variant_is_what_its_name_says(base, spec):
    """A teacher that does not run, or kernels that are not fused, would make one way look cheaper than it is."""
    trainer, facts, turn, _ = train(spec, base)
    runs_teacher = base not in ("finetune", "cached_logits", "cached_layer")
    assert facts["attention"] == ("eager" if base == "naive" else "sdpa")
    assert facts["terms"] == TERMS.get(base, [])
    assert facts["trained_parameters"] == facts["parameters"]
    assert facts["runs_teacher"] == runs_teacher
    assert len(trainer.seen["student"]) == trainer.state.global_step
    assert len(trainer.seen["teacher"]) == (trainer.state.global_step if runs_teacher else 0)
    for outputs in (*trainer.seen["student"], *trainer.seen["teacher"]):
        assert (outputs.attentions is not None) == (outputs.hidden_states is not None) == (base == "naive")
    names = {"finetune": "Trainer", "limit": "LimitTrainer", "naive": "NaiveTrainer"}
    assert type(trainer).__name__ == names.get(base, "DistillationTrainer")
    assert trainer.args.optim == "adamw_torch_fused"
    assert len(turn["seconds"]) == 2 and min(turn["seconds"]) > 0
    if sys.platform == "linux":
        assert turn["resident_mib"] == pytest.approx(turn["anonymous_mib"] + turn["file_mib"], abs=1)


def test_the_limit_does_not_cast_the_teacher_in_each_step(spec):
    """A limit that is slower than it has to be is easy to keep."""
    trainer, _, _, _ = train(spec, "limit", dtype="bfloat16")
    dtypes = {name: p.dtype for name, p in trainer.teacher.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if "query.weight" in name} == {torch.bfloat16}
    assert {dtype for name, dtype in dtypes.items() if "Norm" in name or "embeddings" in name} == {torch.float32}
    assert {outputs.logits.dtype for outputs in trainer.seen["teacher"]} == {torch.bfloat16}


def test_every_way_trains_on_the_same_batches(spec):
    """Other rows, or a teacher that disturbs the dropout, and the ratios would compare different work."""
    finetune, limit = train(spec, "finetune"), train(spec, "limit")
    assert limit[3] == finetune[3]
    online, cached = train(spec, "online_logits"), train(spec, "cached_logits")
    assert cached[3] == pytest.approx(online[3], rel=1e-4)
    assert len({run[2]["tokens_per_row"] for run in (finetune, limit, online, cached)}) == 1


def test_a_cache_holds_what_the_terms_compare(spec, tmp_path):
    """Its process is measured alone, and the process that trains finds it."""
    spec = {**spec, "folder": str(tmp_path), "variant": dataclasses.asdict(VARIANTS["cached_layer"])}
    built = measure_cache(spec)
    vectors = {f"teacher_{kind}_4" for kind in ("hidden", "keys", "queries", "values")}
    assert set(built["signals"]) == {*vectors, "teacher_logits", "teacher_signals", "length"}
    assert built["bytes_per_token"] > 4 * 32 * 2
    assert min(built["rows_per_second"], built["teacher_forward_rows_per_second"]) > 0
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.arrow")}
    trainer, _, _, _ = train(spec, "cached_layer+frozen")
    assert written == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.arrow")}
    assert vectors <= set(trainer.train_dataset.column_names)


def test_modifiers_change_what_they_say(spec):
    """Frozen embeddings train nothing of the table, with and without distilling; padding reaches the maximum."""
    for name in ("finetune+frozen", "cached_logits+grouped+frozen"):
        _, facts, _, _ = train(spec, name)
        assert facts["trained_parameters"] == facts["parameters"] - EMBEDDINGS
    assert train(spec, "naive+padded")[2]["tokens_per_row"] == 80
    shuffled, grouped = (train(spec, f"finetune{how}", steps=15, num_rows=64)[2] for how in ("", "+grouped"))
    assert grouped["tokens_per_row"] < shuffled["tokens_per_row"]


def test_rows_are_repeated_on_disk_with_their_columns(spec, tmp_path):
    rows = make_rows(spec)
    repeated = repeat_on_disk(rows, 70, tmp_path / "rows.arrow")
    assert len(repeated) == 70 and repeated.features == rows.features and repeated.cache_files
    assert repeated[69] == rows[69 % 32]
    trainer, facts, turn, _ = train(spec, "cached_layer", rows_on_disk=70)
    assert len(trainer.train_dataset) == 70 and facts["terms"] == TERMS["cached_layer"]


def test_lengths_are_those_of_sst2(spec):
    assert sum(SST2_LENGTHS.values()) == 67349
    lengths = [len(row) for row in make_rows({**spec, "num_rows": 4000})["input_ids"]]
    mean = sum(length * count for length, count in SST2_LENGTHS.items()) / 67349
    assert statistics.fmean(lengths) == pytest.approx(mean, rel=0.05)


def test_a_turn_of_different_lengths_is_whole_groups():
    """A part of a group of sorted batches is long rows alone, or short ones."""
    for num_rows in (960, 3840):
        args = BenchmarkArguments(num_rows=num_rows, steps=10, batch_sizes=[16])
        assert steps_per_turn(args, "16", 16) == 10
        group = steps_per_turn(args, "sst2", 16)
        generator = torch.Generator().manual_seed(0)
        lengths = torch.randint(3, 100_000, (num_rows,), generator=generator).tolist()
        order = [lengths[index] for index in LengthGroupedSampler(16, lengths=lengths, generator=generator)]
        rises = [index for index in range(2, num_rows) if order[index] > order[index - 1]]
        assert group * 16 in {later - earlier for earlier, later in zip(rises, rises[1:], strict=False)}


def test_only_what_differs_is_measured():
    args = BenchmarkArguments(lengths=["128", "sst2"], variants=["finetune", "naive", "naive+padded", "cached_logits"])
    assert [variant.name for variant in variants_for(args, "128")] == ["finetune", "naive", "cached_logits"]
    assert [variant.name for variant in variants_for(args, "sst2")] == [
        *("finetune", "naive", "naive+padded", "cached_logits"),
        *("finetune+grouped", "cached_logits+grouped", "cached_logits+grouped+frozen"),
    ]
    frozen = variants_for(dataclasses.replace(args, frozen_embeddings=True, grouped=False), "128")
    assert [variant.name for variant in frozen][3:] == ["finetune+frozen", "cached_logits+frozen"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": ["cached"]}, "cached is not known; choose from finetune, limit"),
        ({"variants": ["naive+fast"]}, r"each with any of \+padded"),
        ({"lengths": ["mnli"]}, "must be 'sst2' or a number of tokens"),
        ({"lengths": ["512"]}, "--lengths 512 needs --max_length 512"),
        ({"dtypes": ["float16"]}, "must be float32 or bfloat16"),
        ({"num_rows": 100}, "at least 128, four batches of --batch_sizes 32"),
    ],
)
def test_wrong_arguments_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        BenchmarkArguments(**changes)


def test_ratios_are_medians_within_rounds():
    """A machine that slows down from round to round must not show in the ratios."""

    def row(name, *seconds):
        turns = [{"seconds": [time], "tokens_per_row": 16.0} for time in seconds]
        return {"variant": name, **summarize(turns, 4)}

    rows = [row("limit", 1.0, 2.0, 9.0), row("online_logits", 1.5, 2.2, 18.0), row("finetune+grouped", 1.0, 1.0, 3.0)]
    step, throughput = ratios(rows[1], rows)
    assert step == {"limit": 1.5} and throughput == {"limit": pytest.approx(1 / 1.5)}
    step, throughput = ratios(rows[2], rows)
    assert step == {} and throughput == {"limit": 2.0}


def test_costs_of_a_configuration():
    """A ratio would stand in the column of another, or in the line of another batch size."""

    def row(variant, batch_size, **step_ratio):
        name = {"variant": variant, "length": "sst2", "batch_size": batch_size, "dtype": "float32"}
        return {**name, "step_ratio": step_ratio, "throughput_ratio": {"finetune": batch_size / 10}}

    rows = [
        row("online_layers", 4, limit=1.05, naive=0.8),
        row("cached_logits", 4),
        row("online_logits", 8, limit=1.01),
    ]
    head, _, *lines = format_costs({"training_benchmark": rows}).splitlines()
    names = [cell.strip() for cell in head.strip("|").split("|")]
    found = [dict(zip(names, (cell.strip() for cell in line.strip("|").split("|")), strict=True)) for line in lines]
    columns = ["step: online_layers / limit", "step: online_layers / naive", "rows/s: cached_logits / finetune"]
    assert [found[0][name] for name in columns] == ["1.05", "0.80", "0.40"]
    assert [found[1][name] for name in ("batch", "step: online_logits / limit", columns[0])] == ["8", "1.01", ""]


def test_share_of_matrix_products():
    x = torch.randn(256, 256)
    shares = []
    for run in (lambda: x @ x, lambda: x.exp().sum()):
        with torch.profiler.profile() as profiler:
            run()
        shares.append(matrix_product_share(profiler))
    assert shares[0] > 0.9 and shares[1] == 0


def test_one_run_writes_one_file_and_one_table(tmp_path):
    flags = [word for name, value in TINY.items() for word in (f"--{name}", str(value))]
    flags += ["--lengths", "8", "--batch_sizes", "4", "--dtypes", "float32", "--profile_steps", "1"]
    flags += ["--variants", "limit", "cached_logits+padded", "--output_dir", str(tmp_path)]
    command = [sys.executable, str(ROOT / "recipes" / "benchmark_training.py")]
    run = subprocess.run([*command, *flags], capture_output=True, text=True, check=True)
    results = read_results(tmp_path / "results.json")
    rows = {row["variant"]: row for row in results["training_benchmark"]}
    assert list(rows) == ["limit", "cached_logits+padded"]
    assert [cache["variant"] for cache in results["caches"]] == ["cached_logits"]
    assert {path.name for path in tmp_path.iterdir()} == {"results.json"}  # no caches stay
    for row in rows.values():
        assert row["length"] == "8" and row["threads"] == 1 and row["steps"] == 4
        assert row["p25_ms"] <= row["p50_ms"] <= row["p75_ms"]
        assert 0 < row["share_outside_matrix_products"] < 1
        pairs = list(zip(row["rounds"], rows["limit"]["rounds"], strict=True))
        expected = statistics.median(own["p50_ms"] / limit["p50_ms"] for own, limit in pairs)
        assert row["step_ratio"]["limit"] == expected
        expected = statistics.median(own["rows_per_second"] / limit["rows_per_second"] for own, limit in pairs)
        assert row["throughput_ratio"]["limit"] == expected
    assert rows["limit"]["step_ratio"]["limit"] == 1.0
    assert [row["tokens_per_row"] for row in rows.values()] == [8, 80]
    assert run.stdout.endswith(format_training(results) + "\n")
    assert "| 8 | 4 | float32 | cached_logits+padded |" in run.stdout


def test_a_process_that_fails_says_why(spec, tmp_path, monkeypatch):
    """Who waits for the answer of a dead process waits for ever."""
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho out of memory >&2\nexit 3\n", encoding="utf-8")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with (
        pytest.raises(RuntimeError, match="limit ended with code 3:\nout of memory"),
        Worker(spec, VARIANTS["limit"]),
    ):
        pass
