"""The recipes, from the command line to what they leave behind, on tiny models and invented rows."""

import csv
import importlib
import json
import random
import sys
from pathlib import Path

import pytest
from conftest import make_model, weights
from test_distributed import ROOT, launch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from hf_kd.glue import GLUE_TASKS
from hf_kd.results import read_results


QUICK = ["--max_steps", "4", "--logging_steps", "1", "--per_device_train_batch_size", "4", "--report_to", "none"]
QUICK += ["--disable_tqdm", "true", "--save_strategy", "no", "--bf16", "false"]
QUICK += ["--use_cpu", "true", "--max_seq_length", "32"]
RUN = {"hardware": "a machine", "threads_per_process": 1}
NAMES = {"id2label": {0: "negative", 1: "positive"}, "label2id": {"negative": 0, "positive": 1}}


def sentence(rng):
    return " ".join(f"w{rng.randrange(59)}" for _ in range(rng.randint(2, 12)))


def write_rows(path, columns, num_rows=24, labels=(0, 1), seed=0, header=True):
    """A tab- or comma-separated file of invented sentences; the last column is the label."""
    rng = random.Random(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",", lineterminator="\n")
        if header:
            writer.writerow(columns)
        for index in range(num_rows):
            label = [labels[index % len(labels)]] if labels else []
            writer.writerow([*(sentence(rng) for _ in range(len(columns) - len(label))), *label])
    return path


@pytest.fixture
def glue_dir(tmp_path):
    """SST-2, STS-B and MNLI in the layout of the official archive."""
    for split, seed in (("train", 0), ("dev", 1)):
        write_rows(tmp_path / "glue" / "SST-2" / f"{split}.tsv", ["sentence", "label"], seed=seed)
        columns = ["index", "genre", "filename", "year", "old_index", "source1", "source2", "sentence1", "sentence2"]
        scores = ("0.5", "1.25", "4.0", "3.2")
        write_rows(tmp_path / "glue" / "STS-B" / f"{split}.tsv", [*columns, "score"], labels=scores, seed=seed)
    mnli = ("neutral", "entailment", "contradiction")
    for split in ("train", "dev_matched", "dev_mismatched"):
        path = tmp_path / "glue" / "MNLI" / f"{split}.tsv"
        write_rows(path, ["index", "sentence1", "sentence2", "gold_label"], labels=mnli)
    return tmp_path / "glue"


def save_model(folder, tokenizer, **kwargs):
    make_model(**kwargs).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def teacher_dir(tmp_path, tokenizer):
    return save_model(tmp_path / "teacher", tokenizer, seed=1, **NAMES)


def run(monkeypatch, recipe, *flags):
    """Run a recipe's main() in this process, as the command line would."""
    monkeypatch.setattr(sys, "argv", [f"recipes/{recipe}.py", *map(str, flags)])
    importlib.import_module(recipe).main()


def test_finetune_then_distil_under_the_launcher(tmp_path, tokenizer, glue_dir):
    """The main job: one process fine-tunes, two distil with unlabelled text, and both leave what they promise."""
    base = save_model(tmp_path / "base", tokenizer)
    data = ["--task_name", "sst2", "--glue_dir", glue_dir]
    recipes = ROOT / "recipes"
    finetuned = tmp_path / "finetuned"
    flags = ["--model_name_or_path", base, "--output_dir", finetuned]
    launch(recipes / "glue_finetune.py", *data, *flags, *QUICK, processes=1)
    assert read_results(finetuned / "results.json")["rows"][0]["role"] == "teacher"

    unlabeled = write_rows(tmp_path / "unlabeled.csv", ["text"], labels=())
    config = tmp_path / "distill.yaml"
    config.write_text(
        "task_name: sst2\nrun_baseline: true\nhidden_loss_weight: 1\ntemperature: 9\nlearning_rate: 5e-4\n"
    )
    output = tmp_path / "student"
    flags = ["--teacher_model_name_or_path", finetuned, "--student_layers", "2", "4", "--temperature", "3.0"]
    flags += ["--unlabeled_file", unlabeled, "--glue_dir", glue_dir, "--output_dir", output]
    result = launch(recipes / "glue_distill.py", config, *flags, *QUICK, processes=2)

    results = read_results(output / "results.json")
    teacher, baseline, student = results["rows"]
    assert [row["role"] for row in results["rows"]] == ["teacher", "baseline", "student"]
    assert results["run"]["processes"] == 2 and str(tmp_path) not in (output / "results.json").read_text()
    assert (student["labeled_rows"], student["unlabeled_rows"], student["steps"]) == (24, 24, 4)
    assert (baseline["labeled_rows"], baseline["unlabeled_rows"], baseline["steps"]) == (24, 0, 4)
    assert student["weights"] == {"task_loss": 0.5, "logit_loss": 0.5, "hidden_loss": 1.0}
    assert student["learning_rate"] == 5e-4 and baseline["weights"] == {"task_loss": 1.0}
    assert "| sst2 | student without distillation | accuracy |" in result.stdout
    loaded = AutoModelForSequenceClassification.from_pretrained(output)
    assert loaded.config.num_hidden_layers == 2 and loaded.config.id2label == NAMES["id2label"]
    assert AutoTokenizer.from_pretrained(output).get_vocab() == tokenizer.get_vocab()
    assert sum(p.numel() for p in loaded.parameters()) == student["parameters"] < teacher["parameters"]


def test_custom_loop_runs_under_the_launcher(tmp_path, teacher_dir, glue_dir):
    """The example of the objective without the Trainer, which people copy, must run as it stands."""
    flags = ["--teacher", teacher_dir, "--task_name", "sst2", "--glue_dir", glue_dir, "--num_layers", 2]
    flags += ["--max_steps", 4, "--batch_size", 4, "--max_seq_length", 32, "--output_dir", tmp_path / "student"]
    launch(ROOT / "recipes" / "custom_loop.py", *flags, processes=2)
    student = AutoModelForSequenceClassification.from_pretrained(tmp_path / "student")
    assert student.config.num_hidden_layers == 2


def test_regression(tmp_path, monkeypatch, tokenizer, glue_dir):
    """STS-B has one logit: its student learns the value, and is measured by correlation."""
    teacher = save_model(tmp_path / "teacher", tokenizer, seed=1, num_labels=1)
    flags = ["--task_name", "stsb", "--glue_dir", glue_dir, "--teacher_model_name_or_path", teacher]
    run(monkeypatch, "glue_distill", *flags, "--output_dir", tmp_path / "out", *QUICK)
    student = read_results(tmp_path / "out" / "results.json")["rows"][1]
    assert set(student["metrics"]["validation"]) == {"loss", "pearson", "spearmanr", "combined_score"}


def test_two_dev_sets_and_labels_in_another_order(tmp_path, monkeypatch, tokenizer, glue_dir):
    """Many MNLI teachers count contradiction first: taken by index, the student would learn the wrong classes."""
    names = dict(enumerate(["contradiction", "neutral", "entailment"]))
    teacher = save_model(tmp_path / "teacher", tokenizer, seed=1, id2label=names)
    flags = ["--task_name", "mnli", "--glue_dir", glue_dir, "--teacher_model_name_or_path", teacher]
    flags += ["--student_num_layers", 4, "--learning_rate", "0.0", "--output_dir", tmp_path / "out"]
    run(monkeypatch, "glue_distill", *flags, *QUICK)
    teacher_row, student_row = read_results(tmp_path / "out" / "results.json")["rows"]
    assert set(student_row["metrics"]) == {"validation_matched", "validation_mismatched"}
    # A student of all layers that learns nothing is its teacher, class by class.
    for split, metrics in teacher_row["metrics"].items():
        assert student_row["metrics"][split] == pytest.approx(metrics, rel=1e-5)
    student = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert student.config.id2label == dict(enumerate(GLUE_TASKS["mnli"].label_names))


def test_own_files_with_any_label_strings(tmp_path, monkeypatch, tokenizer):
    """Own data has its own classes; the student must carry their names to whoever loads it."""
    labels = ("spam", "ham", "eggs")
    train = write_rows(tmp_path / "train.csv", ["text", "label"], labels=labels)
    dev = write_rows(tmp_path / "dev.csv", ["text", "label"], labels=labels, seed=1)
    data = ["--train_file", train, "--validation_file", dev]
    base = save_model(tmp_path / "base", tokenizer, num_labels=3)
    flags = ["--model_name_or_path", base, "--output_dir", tmp_path / "teacher"]
    run(monkeypatch, "glue_finetune", *data, *flags, *QUICK)
    flags = ["--teacher_model_name_or_path", tmp_path / "teacher", "--output_dir", tmp_path / "out"]
    run(monkeypatch, "glue_distill", *data, *flags, *QUICK)
    student = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert sorted(student.config.label2id) == sorted(labels)


def test_learning_rates_are_searched_for_both(tmp_path, monkeypatch, teacher_dir, glue_dir):
    """A search for the student alone would hand it an advantage over its baseline."""
    flags = ["--task_name", "sst2", "--glue_dir", glue_dir, "--teacher_model_name_or_path", teacher_dir]
    flags += ["--run_baseline", "--learning_rates", "1e-4", "1e-2", "--output_dir", tmp_path / "out"]
    run(monkeypatch, "glue_distill", *flags, *QUICK)
    _, baseline, student = read_results(tmp_path / "out" / "results.json")["rows"]
    for row, folder in ((student, tmp_path / "out"), (baseline, tmp_path / "out" / "baseline")):
        assert row["learning_rates"] == [1e-4, 1e-2]
        best = AutoModelForSequenceClassification.from_pretrained(folder / f"learning_rate_{row['learning_rate']:g}")
        assert weights(best).equal(weights(AutoModelForSequenceClassification.from_pretrained(folder)))


def test_resume_continues_the_run(tmp_path, monkeypatch, teacher_dir, glue_dir):
    """A resumed run must end where the uninterrupted one does, not start again or skip the rest."""
    flags = ["--task_name", "sst2", "--glue_dir", glue_dir, "--teacher_model_name_or_path", teacher_dir, *QUICK]
    flags += [
        "--save_strategy",
        "steps",
        "--save_steps",
        "2",
        "--save_total_limit",
        "9",
        "--lr_scheduler_type",
        "constant",
    ]
    run(monkeypatch, "glue_distill", *flags, "--output_dir", tmp_path / "out")
    whole = weights(AutoModelForSequenceClassification.from_pretrained(tmp_path / "out"))
    last = json.loads((tmp_path / "out" / "checkpoint-4" / "trainer_state.json").read_text())
    checkpoint = tmp_path / "out" / "checkpoint-2"
    run(monkeypatch, "glue_distill", *flags, "--output_dir", tmp_path / "out", "--resume_from_checkpoint", checkpoint)
    resumed = weights(AutoModelForSequenceClassification.from_pretrained(tmp_path / "out"))
    assert (resumed - whole).abs().max() < 1e-6
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == last["global_step"] == 4


def test_resuming_what_is_not_there(tmp_path, monkeypatch, teacher_dir, glue_dir):
    """A mistyped checkpoint would train from the start, over what was there."""
    flags = ["--task_name", "sst2", "--glue_dir", glue_dir, "--teacher_model_name_or_path", teacher_dir, *QUICK]
    flags += ["--output_dir", tmp_path / "out", "--resume_from_checkpoint", tmp_path / "out" / "checkpoint-9"]
    with pytest.raises(ValueError, match="checkpoint-9' is not a checkpoint below output_dir"):
        run(monkeypatch, "glue_distill", *flags)
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_student_from_a_path_with_its_own_shape(tmp_path, monkeypatch, tokenizer, teacher_dir, glue_dir):
    """Any pretrained student with the teacher's vocabulary will do, DistilBERT under BERT for one."""
    student = save_model(tmp_path / "base", tokenizer, family="distilbert", num_hidden_layers=2)
    flags = ["--task_name", "sst2", "--glue_dir", glue_dir, "--teacher_model_name_or_path", teacher_dir]
    flags += [
        "--student_model_name_or_path",
        student,
        "--attention_loss_weight",
        "1",
        "--output_dir",
        tmp_path / "out",
    ]
    run(monkeypatch, "glue_distill", *flags, *QUICK)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "distilbert" and config["id2label"] == {"0": "negative", "1": "positive"}


def test_a_student_without_segments_leaves_them_to_its_teacher(tmp_path, monkeypatch, tokenizer, glue_dir):
    """A BERT teacher would read pairs as one text, and the saved tokenizer would feed DistilBERT what it refuses."""
    student = save_model(tmp_path / "base", tokenizer, family="distilbert", num_hidden_layers=2, num_labels=1)
    own = AutoTokenizer.from_pretrained(student, model_input_names=["input_ids", "attention_mask"])
    own.save_pretrained(student)
    teacher = save_model(tmp_path / "pair-teacher", tokenizer, seed=1, num_labels=1)
    flags = ["--task_name", "stsb", "--glue_dir", glue_dir, "--teacher_model_name_or_path", teacher, *QUICK]
    losses = []
    for name, extra in (("bert", []), ("distilbert", ["--student_model_name_or_path", student])):
        run(monkeypatch, "glue_distill", *flags, *extra, "--output_dir", tmp_path / name)
        losses.append(read_results(tmp_path / name / "results.json")["rows"][0]["metrics"]["validation"]["loss"])
    assert losses[0] == losses[1]
    scores = pipeline("text-classification", str(tmp_path / "distilbert"))([{"text": "w1", "text_pair": "w2 w3"}])
    assert [set(score) for score in scores] == [{"label", "score"}]


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_is_read_by_its_recipe(path, tmp_path, monkeypatch):
    """A YAML that no longer parses is found by the first person who needs it."""
    from glue_setup import DataArguments, training_defaults
    from transformers import TrainingArguments

    from hf_kd import DistillationTrainingArguments
    from hf_kd.command_line import parse_args

    recipe = importlib.import_module("glue_finetune" if path.stem.endswith("_teacher") else "glue_distill")
    is_teacher = recipe.__name__ == "glue_finetune"
    model_flag = "--model_name_or_path" if is_teacher else "--teacher_model_name_or_path"
    _, data, _ = parse_args(
        (
            recipe.ModelArguments if is_teacher else recipe.DistillArguments,
            DataArguments,
            TrainingArguments if is_teacher else DistillationTrainingArguments,
        ),
        [str(path), model_flag, "some/model", "--output_dir", str(tmp_path), "--bf16", "false"],
        **training_defaults(),
    )
    assert (data.task_name or Path(data.train_file).parent.name) == path.stem.removesuffix("_teacher")
    assert path.read_text().startswith("# ")


def test_a_trainer_script_becomes_a_distillation_by_two_lines(tmp_path, teacher_dir, tokenizer):
    """The promise of the README's first screen, on a script in the style of the official example."""
    script = Path(__file__).parent / "scripts" / "text_classification.py"
    lines = script.read_text(encoding="utf-8").splitlines()
    lines[lines.index("from transformers import Trainer")] = "from hf_kd import DistillationTrainer as Trainer"
    lines[lines.index("    model=model,")] = f"    model=model, teacher_model={str(teacher_dir)!r},"
    distilled = tmp_path / "distilled.py"
    distilled.write_text("\n".join(lines), encoding="utf-8")

    train = write_rows(tmp_path / "train.csv", ["sentence", "label"])
    base = save_model(tmp_path / "base", tokenizer, seed=2, num_hidden_layers=2, **NAMES)
    students = []
    for path in (script, distilled):
        output = tmp_path / path.stem
        result = launch(path, base, train, output, processes=1)
        assert ("logit_loss" in result.stdout) == (path == distilled)
        students.append(weights(AutoModelForSequenceClassification.from_pretrained(output)))
    assert not students[0].equal(students[1])


def test_ablation_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys, teacher_dir, glue_dir):
    """Hours of runs would start over, or two settings share a row, or a table show the gain over another student."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    output = tmp_path / "ablation"
    flags = ["--task_name", "sst2", "--glue_dir", glue_dir, "--teacher_model_name_or_path", teacher_dir, *QUICK]
    flags += ["--student_num_layers", 2, "--student_hidden_size", 16, "--output_dir", output, "--seeds", 1, 2]
    run(monkeypatch, "glue_ablation", *flags, "--settings", "task", "minilm_v2")
    first = read_results(output / "results.json")["rows"]
    assert [(row["role"], row.get("setting"), row["seed"]) for row in first] == [
        ("teacher", None, None),
        *[
            (role, setting, seed)
            for seed in (1, 2)
            for role, setting in (("baseline", "task"), ("student", "minilm_v2"))
        ],
    ]
    assert first[1]["weights"] == {"task_loss": 1.0} and first[1]["hidden_size"] == 16
    assert first[2]["weights"] == {"task_loss": 0.1, "logit_loss": 0.9, "relation_loss": 1.0}

    run(monkeypatch, "glue_ablation", *flags, "--settings", "task", "two_stages", "--augment", 1)
    rows = read_results(output / "results.json")["rows"]
    assert rows[: len(first)] == first
    added = [(row["setting"], row["seed"], row["augment"], row["unlabeled_rows"] > 0) for row in rows[len(first) :]]
    assert added == [("two_stages", 1, 1, True), ("two_stages", 2, 1, True)]

    run(monkeypatch, "glue_ablation", *flags[:-3], "--step_cost", "true", "--step_cost_rounds", 4)
    costs = read_results(output / "results.json")["step_cost"]
    assert all(cost["ratio"] > 0 for cost in costs)
    assert read_results(output / "results.json")["rows"] == rows
    assert {"logits", "hidden", "relation crd", "attention cosine"} <= {cost["form"] for cost in costs}


def test_table_of_an_ablation(tmp_path, monkeypatch, capsys):
    """The gain of a setting would be told from other rows than its own task's baseline."""

    def row(setting, seed, accuracy, **more):
        metric = {"metrics": {"validation": {"accuracy": accuracy}}}
        described = {
            "setting": setting,
            "seed": seed,
            "steps": 9,
            "labeled_rows": 5,
            "unlabeled_rows": 0,
            "augment": 0,
        }
        shape = {"task": "sst2", "layers": 2, "hidden_size": 16, "role": "student"}
        return {**shape, **described, **metric, "main_metric": {"split": "validation", "name": "accuracy"}, **more}

    rows = [row(None, None, 0.9, role="teacher"), row("task", 1, 0.5, role="baseline"), row("task", 2, 0.6)]
    rows += [row("hidden", 1, 0.7), row("hidden", 2, 0.8), row("hidden", 1, 0.9, unlabeled_rows=7, steps=12)]
    cost, form = {"form": "hidden", "ratio": 1.25}, {"form": "hidden nst", "ratio": 1.75}
    (tmp_path / "one.json").write_text(json.dumps({"run": RUN, "rows": rows, "step_cost": [cost, form]}))
    other = {"run": RUN, "rows": [{**rows[3], "hidden_size": 8}], "step_cost": [{**cost, "ratio": 1.5}]}
    (tmp_path / "other.json").write_text(json.dumps(other))
    run(monkeypatch, "results_table", tmp_path / "one.json", tmp_path / "other.json")
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert [line[2:] for line in lines[3:6]] == [
        ["task", "5", "", "9", "55.00 ± 7.07", "", " |"],
        ["hidden", "5", "", "9", "75.00 ± 7.07", "+20.00", "1.25 |"],
        ["hidden", "5", "7 unlabelled", "12", "90.00", "+35.00", "1.25 |"],
    ]
    # Another student has costs of its own, and no baseline in its file to be compared with.
    assert lines[6][1:] == ["2 layers, width 8", "hidden", "5", "", "9", "70.00", "", "1.50 |"]
    assert [line for line in lines if len(line) == 2][1:] == [["| hidden nst", "1.75 |"]]


def test_ablation_of_another_student_in_the_same_file(tmp_path, monkeypatch, teacher_dir, glue_dir):
    """Two students would share rows of one name, and the second be skipped as done."""
    flags = ["--task_name", "sst2", "--glue_dir", glue_dir, "--teacher_model_name_or_path", teacher_dir, *QUICK]
    flags += ["--settings", "task", "--seeds", 1, "--output_dir", tmp_path / "out"]
    run(monkeypatch, "glue_ablation", *flags, "--student_num_layers", 2)
    before = (tmp_path / "out" / "results.json").read_text()
    with pytest.raises(ValueError, match="holds runs of .*give another --output_dir"):
        run(monkeypatch, "glue_ablation", *flags, "--student_num_layers", 3)
    assert (tmp_path / "out" / "results.json").read_text() == before


def test_teacher_of_another_task(tmp_path, monkeypatch, teacher_dir, glue_dir):
    """Its classes would be taken for those of the task."""
    flags = ["--task_name", "mnli", "--glue_dir", glue_dir, "--teacher_model_name_or_path", teacher_dir]
    with pytest.raises(
        ValueError, match=r"those of teacher .*\['negative', 'positive'\]; take a teacher of this task"
    ):
        run(monkeypatch, "glue_distill", *flags, "--output_dir", tmp_path / "out", *QUICK)


def test_masks_of_one_tokenizer_in_texts_of_two(tmp_path, monkeypatch, teacher_dir, glue_dir):
    """The student's tokenizer would cut the teacher's mask token into pieces, and train on them."""
    flags = ["--task_name", "sst2", "--glue_dir", glue_dir, "--teacher_model_name_or_path", teacher_dir]
    flags += ["--student_model_name_or_path", teacher_dir, "--separate_tokenizers", "true", "--augment", 1]
    with pytest.raises(ValueError, match="mask token of one tokenizer .*--augment_masked_lm"):
        run(monkeypatch, "glue_distill", *flags, "--output_dir", tmp_path / "out", *QUICK)
