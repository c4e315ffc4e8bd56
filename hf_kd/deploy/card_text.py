"""The sentences of a model card."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..cpu import needs_reduced_range
from ..results import main_values
from .benchmark import find_latency, speedup
from .references import AUGMENTATION_PAPERS, GLUE_TEXTS, PAPERS


Facts = Mapping[str, Any]

_PROBLEMS = {
    "single_label_classification": "text classification",
    "multi_label_classification": "multi-label text classification",
    "regression": "text regression",
    "token_classification": "token classification",
    "question_answering": "extractive question answering",
    "masked_lm": "masked language modelling",
}
_SIZES = {
    "hidden_size": "width",
    "intermediate_size": "feed-forward width",
    "hidden_dim": "feed-forward width",
    "num_attention_heads": "attention heads",
}
# Kind of a term -> what of the teacher it looks at.
_INNER = {
    "hidden": "hidden states",
    "attention": "attention",
    "relation": "relations between tokens or rows",
    "custom": "outputs",
}
MAX_LABELS = 40


# Words and numbers. Whatever a person named goes through one of the first two.


def plain(value: Any, limit: int = 200) -> str:
    """Text in which nothing is Markdown, HTML or an address that becomes a link."""
    text = _one_line(value, limit)
    # Within a word an underscore is one; at the start of a line a dash, or a number with a dot, begins a list.
    safe = re.compile(
        r"\w(?<!_)|(?<=[^\W_])_(?=[^\W_])|[ ,;()/'\"%]|:(?!/)|(?<=.)[+=-]"
        r"|(?<![0-9])(?<!www)[.]|(?<=.)(?<=\d)[.](?=\d)",
        re.IGNORECASE,
    )
    return "".join(char if safe.match(text, position) else f"&#{ord(char)};" for position, char in enumerate(text))


def code(value: Any, limit: int = 200) -> str:
    """A name as code; as plain text where its characters could end the code."""
    text = _one_line(value, limit)
    return f"`{text}`" if re.fullmatch(r"[\w ./:+=@,'()-]+", text) else plain(text, limit)


def _one_line(value: Any, limit: int) -> str:
    """Without characters that cannot be seen: some turn the text around them, or cannot be written."""
    return "".join(char for char in " ".join(str(value).split()) if char.isprintable())[:limit]


def is_hub_id(name: Any) -> bool:
    """Whether a name can stand in an address of the Hub; a data set with signals says any name of its teacher."""
    return isinstance(name, str) and re.fullmatch(r"[\w.-]{1,96}(/[\w.-]{1,96})?", name, re.ASCII) is not None


def count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def listed(items: Iterable[str], joint: str = "and") -> str:
    *first, last = items
    return f"{', '.join(first)} {joint} {last}" if first else last


def millions(parameters: int) -> str:
    return f"{parameters / 1e6:.2f}M" if parameters < 1e6 else f"{parameters / 1e6:.1f}M"


def with_plain_names(row: Facts) -> dict[str, Any]:
    """A row of results whose names can stand in a table."""
    names = {name: plain(row[name]) for name in ("task", "variant", "cpu") if row.get(name) is not None}
    found = {**row, **names}
    if row.get("main_metric"):
        found["main_metric"] = {name: plain(value) for name, value in row["main_metric"].items()}
    if row.get("metrics"):
        found["metrics"] = {
            plain(split): {plain(name): value for name, value in metrics.items()}
            for split, metrics in row["metrics"].items()
        }
    return found


def table(lines: Sequence[Sequence[str]]) -> str:
    ruler = ["---"] * len(lines[0])
    return "\n".join("| " + " | ".join(line) + " |" for line in (lines[0], ruler, *lines[1:]))


def bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


# What it is


def link(model: Facts) -> str:
    """A checkpoint by its name, with a link to the Hub if it is there."""
    if is_column(model):
        return f"the soft labels in the column {code(model['column'])} of the training data"
    if model.get("name") is None:
        return "a model without a name"
    if not model.get("is_hub_id") or not is_hub_id(model["name"]):
        return code(model["name"])
    return f"[{plain(model['name'])}](https://huggingface.co/{model['name']})"


def is_column(teacher: Facts) -> bool:
    """Whether a teacher is soft labels that the rows brought along, and no model that is known."""
    return "architecture" not in teacher and teacher.get("column") is not None


def are_columns(teachers: Sequence[Facts]) -> bool:
    """Whether there was no other teacher."""
    return bool(teachers) and all(map(is_column, teachers))


def describe_task(problem: str, data: Facts) -> str:
    task = data.get("task")
    if task in GLUE_TEXTS and data.get("dataset") == "nyu-mll/glue":
        return f"[GLUE {GLUE_TEXTS[task][0]}](https://huggingface.co/datasets/nyu-mll/glue)"
    return _PROBLEMS.get(problem, "its task")


def summary(distillation: Facts, student: Facts, data: Facts, problem: str) -> str:
    shape = [f"{count(student['layers'], 'layer')}" if student.get("layers") else ""]
    shape += [f"width {student['hidden_size']}" if student.get("hidden_size") else ""]
    shape += [f"{millions(student['parameters'])} parameters" if student.get("parameters") else ""]
    shape = [part for part in shape if part]
    what = code(student["architecture"]) + (f" ({', '.join(shape)})" if shape else "")
    task = describe_task(problem, data)
    teachers = distillation.get("teachers") or []
    if teachers:
        return f"{what} for {task}, distilled from {listed(link(teacher) for teacher in teachers)} with hf_kd."
    if distillation:
        return f"{what} for {task}, trained with hf_kd on labels alone: no teacher taught it."
    return f"{what} for {task}."


def describe_labels(problem: str, id2label: Mapping[Any, str]) -> str:
    if problem == "regression":
        return "It answers with one number."
    if problem in ("question_answering", "masked_lm") or not id2label:
        return ""
    names = [code(name) for _, name in sorted(id2label.items(), key=lambda item: int(item[0]))]
    more = f" and {len(names) - MAX_LABELS} more" if len(names) > MAX_LABELS else ""
    kind = "Labels, any number of them at once" if problem == "multi_label_classification" else "Labels"
    return f"{kind}: {', '.join(names[:MAX_LABELS])}{more}."


# Quality


def describe_own_metrics(row: Facts | None, num_seeds: int) -> str:
    """All metrics of the very student in the folder."""
    if row is None:
        return ""
    words = [
        f"{plain(split)}: " + ", ".join(f"{plain(name)} {_metric(value)}" for name, value in metrics.items())
        for split, metrics in row["metrics"].items()
    ]
    is_one_of_several = num_seeds > 1 and row.get("seed") is not None
    of_seed = f", which is the one of seed {plain(row['seed'])}" if is_one_of_several else ""
    return f"Metrics of this student{of_seed}: {'; '.join(words)}."


def _metric(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else plain(value)


def compare_with_baseline(rows: Sequence[Facts], comparisons: Sequence[Facts], task: str | None) -> str:
    """Whether the teacher helped, and whether the rows can tell."""
    sentences = []
    for found in comparisons:
        if task is not None and found.get("task") not in (None, task):
            continue
        points, low, high = (100 * found[name] for name in ("difference", "low", "high"))
        where = f" on {plain(found['task'])}" if found.get("task") else ""
        metric = f" of {plain(found['metric'])}" if found.get("metric") else ""
        verdict = (
            "more than the choice of these rows explains"
            if low > 0 or high < 0
            else "these rows do not tell the two apart"
        )
        sentences.append(
            f"Against the same student without distillation{where}: {points:+.2f} points{metric} "
            f"({100 * found['confidence']:g} % interval of a paired bootstrap over the "
            f"{count(found['rows'], 'row') if found.get('rows') else 'rows'}: {low:+.2f} to {high:+.2f}, "
            f"p = {found['p_value']:.2g}): {verdict}."
        )
    if not sentences and task is not None:
        ours, baseline = main_values(rows, task, "student"), main_values(rows, task, "baseline")  # type: ignore[arg-type]
        if ours and baseline:
            points = sum(ours) / len(ours) - sum(baseline) / len(baseline)
            sentences.append(
                f"Against the same student without distillation: {points:+.2f} points; no test was run of whether "
                "that is chance."
            )
    return " ".join(sentences)


# ONNX


def describe_onnx_files(sizes: Mapping[str, int], benchmark: Sequence[Facts]) -> str:
    """A line per file: size, quality, latency."""
    measured = {row["precision"]: row for row in benchmark if row["runtime"] == "onnxruntime"}
    threads = min((cell["threads"] for row in benchmark for cell in row["latency"]), default=1)
    lengths = sorted({c["length"] for row in measured.values() for c in row["latency"] if c["batch_size"] == 1})
    metric = next((row["main_metric"]["name"] for row in measured.values() if row["main_metric"]), None)
    has_teacher = bool(lengths) and any(row["role"] == "teacher" for row in benchmark)
    header = ["file", "precision", "size (MB)", *([plain(metric)] if metric else [])]
    header += [f"p50 / p95 ms, {length} tokens" for length in lengths]
    header += [f"speed-up over the teacher, {lengths[-1]} tokens"] if has_teacher else []
    lines = [header]
    for name, precision in (("onnx/model.onnx", "fp32"), ("onnx/model_quantized.onnx", "int8")):
        if name not in sizes:
            continue
        row = measured.get(precision)
        line = [f"`{name}`", "float32" if precision == "fp32" else "int8", f"{sizes[name] / 1e6:.1f}"]
        if metric:
            has_metric = row is not None and row["metrics"]
            line.append(f"{100 * row['metrics'][row['main_metric']['split']][metric]:.2f}" if has_metric else "")  # type: ignore[index]
        for length in lengths:
            cell = find_latency(row, threads, 1, length) if row is not None else None  # type: ignore[arg-type]
            line.append(f"{cell['p50_ms']:.2f} / {cell['p95_ms']:.2f}" if cell else "")
        if has_teacher:
            options = {"threads": threads, "batch_size": 1, "length": lengths[-1]}
            ratio = speedup(benchmark, row["variant"], **options) if row is not None else None  # type: ignore[arg-type]
            line.append(f"{ratio:.1f}x" if ratio is not None else "")
        lines.append(line)
    note = ""
    if lengths:
        cpu = plain(benchmark[0].get("cpu") or "a CPU that was not noted")
        over = f"; the teacher ran in torch{_teacher_precision(benchmark)}" if has_teacher else ""
        note = f"\n\nLatency of the model alone, one row at a time, {count(threads, 'thread')}, on {cpu}{over}."
    return table(lines) + note


def _teacher_precision(benchmark: Sequence[Facts]) -> str:
    return next((f" {row['precision']}" for row in benchmark if row["role"] == "teacher"), "")


def describe_export(export: Facts) -> str:
    """What was checked when the files were written."""
    sentences = [f"Exported with {plain(export['backend'])}, opset {export['opset']}"] if export.get("backend") else []
    if sentences and (parity := export.get("parity")):
        sentences[0] += (
            f"; the float32 file's logits are within {parity['max_difference']:.1e} of torch's on "
            f"{count(parity['rows'], 'row')}"
        )
    int8 = export.get("quantization") or {}
    if int8 and not int8.get("failed"):
        how = f"int8 weights of {7 if int8.get('reduce_range') else 8} bits, {plain(int8['method'])} ranges"
        if metric := int8.get("metric"):
            how += (
                f"; {plain(metric['name'])} on the validation rows {100 * metric['fp32']:.2f} in float32, "
                f"{100 * metric['int8']:.2f} in int8"
            )
        sentences.append(how[0].upper() + how[1:])
    return ". ".join(sentences) + "." if sentences else ""


# How it was made


def describe_teachers(teachers: Sequence[Facts]) -> str:
    lines = []
    for number, teacher in enumerate(teachers, start=1):
        name = f"Teacher {number}: " if len(teachers) > 1 else "Teacher: "
        if is_column(teacher):
            lines.append(f"{name}{link(teacher)}; who or what gave them is not recorded, nor their licence")
            continue
        facts = [f"{count(teacher['layers'], 'layer')}" if teacher.get("layers") else ""]
        facts += [f"width {teacher['hidden_size']}" if teacher.get("hidden_size") else ""]
        facts += [f"{millions(teacher['parameters'])} parameters"]
        facts += [f"commit {code(teacher['revision'])}" if teacher.get("revision") else ""]
        facts += [f"licence {plain(licence_of(teacher))}" if licence_of(teacher) else "licence not known"]
        if teacher.get("column"):
            facts.append(
                f"its predictions replaced by those in the column {code(teacher['column'])} of the training data"
            )
        kind = code(teacher["architecture"])
        lines.append(f"{name}{link(teacher)}, {kind}, " + ", ".join(fact for fact in facts if fact))
    return bullets(lines)


def licence_of(model: Facts) -> str | None:
    """The licence that a checkpoint's card names."""
    found = model.get("license")
    return found if isinstance(found, str) else None


def describe_start(start: Facts, teachers: Sequence[Facts]) -> str:
    """Where the student's weights came from."""
    if start.get("kind") == "checkpoint":
        return f"It started from the checkpoint that its config names, {link(start)}."
    if start.get("kind") != "teacher":
        return "Where its weights came from before training was not recorded."
    index = start.get("teacher")
    if index is None:
        source = link(start) if start.get("name") else "another model"
    else:
        source = "the teacher" if len(teachers) == 1 else f"teacher {index + 1}"
    narrowed = ", ".join(
        f"{_SIZES[name]} {new} of {old}" for name, (old, new) in (start.get("narrowed") or {}).items()
    )
    if start["init"] == "random":
        return f"It has the family of {source} in a smaller shape ({narrowed}), and started from random weights."
    layers = start["layers"]
    is_all = len(layers) == start["of_layers"]
    which = "all" if is_all else f"{'layer' if len(layers) == 1 else 'layers'} {listed(map(str, layers))} of"
    copied = (
        f"{which} {count(start['of_layers'], 'layer')} of {source}"
        if is_all
        else f"{which} the {start['of_layers']} of {source}"
    )
    if start["init"] == "importance":
        return (
            f"It started from {copied}, with the embeddings and the head, narrowed to their most important parts "
            f"({narrowed})."
        )
    return f"It started as a copy of {copied}, with the embeddings and the head."


def describe_terms(terms: Sequence[Facts], teachers: Sequence[Facts]) -> str:
    lines = [["term", "weight", "form", "compares", "settings"]]
    for term in terms:
        settings = "; ".join(_settings(term))
        form = code(term["type"]) if "type" in term else ""
        lines.append([code(term["name"]), f"{term['weight']:g}", form, _compares(term, teachers), settings])
    return table(lines)


def _compares(term: Facts, teachers: Sequence[Facts]) -> str:
    kind = term["kind"]
    if kind == "task":
        return "the predictions with the labels"
    of = f"teacher {term['teacher'] + 1}" if "teacher" in term else "teachers"
    if len(teachers) == 1:
        of = "the soft labels" if are_columns(teachers) else "the teacher"
    if kind == "logit":
        return f"the predictions with {of if of == 'the soft labels' else _of_teachers(term, of)}"
    if kind == "custom":
        layers = _pairs(term.get("hidden_layers"), "hidden states") + _pairs(term.get("attention_layers"), "attention")
        return "; ".join([f"a function of the run's own, of student, {of} and labels", *layers])
    names = {"hidden": "hidden states", "attention": "attention", "relation": "relations within"}
    what = names[kind]
    pairs = term.get("hidden_layers") or term.get("attention_layers") or []
    if kind == "relation":
        what = "relations between the rows of a batch" if term.get("hidden_layers") else "relations between tokens"
    return "; ".join([f"{what} with those of {of}", *_pairs(pairs, "layers")])


def _of_teachers(term: Facts, of: str) -> str:
    if of != "teachers":
        return f"those of {of}"
    mean = "softened probabilities" if term.get("teacher_reduction") != "logits" else "logits"
    shares = f", weighted {' : '.join(f'{w:g}' for w in term['teacher_weights'])}" if "teacher_weights" in term else ""
    return f"the mean of the teachers' {mean}{shares}"


def _pairs(pairs: Sequence[Sequence[int]] | None, what: str) -> list[str]:
    if not pairs:
        return []
    return [f"{what} (student:teacher) " + ", ".join(f"{student}:{teacher}" for student, teacher in pairs)]


def _settings(term: Facts) -> list[str]:
    words = []
    if "temperature" in term:
        words.append(f"temperature {term['temperature']:g}{_over_time(term.get('temperature_schedule'))}")
    if "schedule" in term:
        is_window = term["schedule"].startswith("window")
        words.append(("" if is_window else "weight") + _over_time(term["schedule"]).removeprefix(" " * is_window))
    if "label_smoothing" in term:
        words.append(f"label smoothing {term['label_smoothing']:g}")
    if "head_reduction" in term:
        words.append(f"{plain(term['head_reduction'])} over heads")
    if "relation_heads" in term:
        words.append(count(term["relation_heads"], "relation head"))
    if term.get("is_projected"):
        words.append("through a learned projection that is not part of the student")
    words += [f"{plain(name)} {plain(value)}" for name, value in (term.get("options") or {}).items()]
    return words


def _over_time(schedule: str | None) -> str:
    """A schedule as flags write it, in words."""
    if schedule is None:
        return ""
    kind, start, end = schedule.split(":")
    if kind == "window":
        return f" on from {100 * float(start):g} % to {100 * float(end):g} % of the steps"
    return f" times {float(start):g} at the start to {float(end):g} at the end ({kind})"


def describe_data(data: Facts, terms: Sequence[Facts], teachers: Sequence[Facts]) -> str:
    lines = []
    task, files = data.get("task"), data.get("files") or {}
    if task in GLUE_TEXTS and data.get("dataset") == "nyu-mll/glue":
        lines.append(f"GLUE {GLUE_TEXTS[task][0]} (`nyu-mll/glue`, `{task}`): {GLUE_TEXTS[task][1]}")
    elif files.get("train"):
        lines.append(f"The files {code(files['train'])} (training) and {code(files['validation'])} (validation)")
    elif data.get("is_generated"):
        lines.append("Sentences generated from a seed (hf_kd's demo task)")
    elif data.get("dataset_name") or data.get("dataset"):
        lines.append(plain(data.get("dataset_name") or data["dataset"]))
    taught = ("", ", on which the teacher teaches", ", on which the teachers teach")[min(len(teachers), 2)]
    taught = ", taught by the soft labels" if are_columns(teachers) else taught
    augmented, unlabeled = data.get("augmented_rows") or 0, data.get("unlabeled_rows")
    if data.get("labeled_rows") is not None:
        reads_labels = any(t["kind"] in ("task", "custom") or t.get("type") == "decoupled_kl" for t in terms)
        unread = "" if reads_labels or not data["labeled_rows"] else ", whose labels no term reads"
        lines.append(f"{count(data['labeled_rows'], 'labelled training row')}{unread}")
    elif data.get("rows") is not None:
        lines.append(count(data["rows"], "training row"))
    limit = data.get("max_train_rows")
    if limit and data.get("labeled_rows", data.get("rows") or 0) >= limit:  # else there were not as many
        lines[-1] += ", drawn at random from a larger set"
    if unlabeled is not None and unlabeled > augmented:
        source = f" from {code(files['unlabeled'])}" if files.get("unlabeled") else ""
        lines.append(f"{count(unlabeled - augmented, 'row')} without a label{source}{taught}")
    if augmented:
        augment = data.get("augment") or {}
        how = (
            f"words replaced by those of {link(augment['masked_lm'])}"
            if augment.get("masked_lm")
            else "words masked, and n-grams sampled"
        )
        most = f", up to {augment['variants']} of each labelled row" if augment.get("variants") else ""
        lines.append(f"{count(augmented, 'augmented row')}{most} ({how}){taught}")
    if data.get("max_length"):
        lines.append(f"Inputs of up to {data['max_length']} tokens; longer ones were cut")
    return bullets(lines)


def describe_training(training: Facts, row: Facts | None) -> str:
    if not training:
        return ""
    steps, planned = training["steps"], training.get("planned_steps") or training["steps"]
    done = count(steps, "step") if steps >= planned else f"{steps:,} of {planned:,} planned steps"
    epochs = training.get("epochs")
    epochs = f" ({epochs:g} epoch{'' if epochs == 1 else 's'})" if epochs is not None else ""
    batches, processes = training.get("gradient_accumulation_steps", 1), training["processes"]
    together = f", on {processes} processes" if processes > 1 else ""
    together += f", accumulated over {batches} batches" if batches > 1 else ""
    lines = [f"{done} of {count(training['batch_size'], 'row')}{together}{epochs}"]
    if resumed := training.get("resumed_at_steps"):
        which = f"steps {listed(map(str, resumed))}" if len(resumed) > 1 else f"step {resumed[0]}"
        checkpoint = "checkpoints" if len(resumed) > 1 else "the checkpoint"
        lines.append(f"Resumed from {checkpoint} of {which}")
    if training.get("best_step") is not None:
        lines.append(f"The weights are those of step {training['best_step']:,}, the best on the validation rows")
    rates = training["learning_rate"]
    rates = rates if isinstance(rates, list) else [rates]
    tried = (row or {}).get("learning_rates") or []
    chosen = f", chosen on the validation rows from {listed(f'{rate:g}' for rate in tried)}" if len(tried) > 1 else ""
    optimizer = f"{plain(training['optimizer'])}, l" if training.get("optimizer") else "L"
    lines.append(f"{optimizer}earning rate {listed(f'{rate:g}' for rate in rates)}{chosen}")
    if arguments := training.get("arguments"):
        lines.append(", ".join(f"{code(name)} {_argument(value)}" for name, value in sorted(arguments.items())))
    precision = training["precision"]
    precise = "float32" if precision == "float32" else f"Weights and computation in {plain(precision)}"
    precise = f"Mixed precision, {plain(precision)}" if precision in ("bf16", "fp16", "fp8") else precise
    distributed = f", {plain(training['distributed'])}" if training.get("distributed") else ""
    lines.append(f"{precise}, seed {training['seed']}{distributed}")
    return bullets(lines)


def _argument(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else plain(value)


# Limits


def limits(
    distillation: Facts,
    data: Facts,
    row: Facts | None,
    rows: Sequence[Facts],
    problem: str,
    *,
    export: Facts,
    sizes: Mapping[str, int],
) -> str:
    """What this run knows about where the student should not be trusted."""
    teachers, training = distillation.get("teachers") or [], distillation.get("training") or {}
    lines = [_domain(data), *_evaluation(row, rows, data, training, problem)]
    if teachers:
        lines.append(_inheritance(data, teachers, distillation.get("terms") or []))
    lines.append(_agreement(row, teachers, distillation.get("agreement_teachers") or []))
    if training and training["steps"] < (training.get("planned_steps") or 0):
        lines.append("The training did not run to its planned end")
    if data.get("max_length"):
        lines.append(f"Texts of more than {data['max_length']} tokens were not part of training or evaluation in full")
    if export.get("max_length"):
        lines.append(f"The ONNX files were checked on texts of up to {export['max_length']} tokens")
    lines += _int8(export, sizes)
    return bullets(line for line in lines if line)


def _domain(data: Facts) -> str:
    task = data.get("task")
    language = f". Language: {plain(data['language'])}" if data.get("language") else ""
    if task in GLUE_TEXTS and data.get("dataset") == "nyu-mll/glue":
        return f"Trained and measured on {GLUE_TEXTS[task][1]}; not measured on texts of any other kind{language}"
    if data.get("is_generated"):
        return "Trained and measured on generated sentences: a demonstration, not a model for use"
    return f"Not measured on texts of any other kind than its training data's{language}" if data else ""


def _evaluation(row: Facts | None, rows: Sequence[Facts], data: Facts, training: Facts, problem: str) -> list[str]:
    if row is None:
        return ["Its quality was not measured"] if data else []
    lines = []
    split, metric = row["main_metric"]["split"], row["main_metric"]["name"]
    number = (data.get("evaluation_rows") or {}).get(split)
    if number:
        line = f"Measured on {count(number, 'row')} of `{plain(split)}`"
        value = row["metrics"][split][metric]
        # Of token labels or answers there are not as many as rows.
        if problem == "single_label_classification" and metric == "accuracy" and 0 <= value <= 1:
            error = 100 * math.sqrt(value * (1 - value) / number)
            line += f": one standard error of its accuracy is {error:.1f} points"
        lines.append(line)
    chosen = ["learning rate"] if len(row.get("learning_rates") or []) > 1 else []
    chosen += ["step"] if training.get("best_step") is not None else []
    if chosen and split != "test":
        were = "were" if len(chosen) > 1 else "was"
        lines.append(f"The {listed(chosen)} {were} chosen on the rows that it is measured on, which flatters it")
    seeds = {other.get("seed") for other in rows if (other["role"], other["task"]) == ("student", row["task"])}
    if len(seeds) == 1:
        lines.append("Trained with one seed: how much its quality changes with the seed is not known")
    return lines


def _inheritance(data: Facts, teachers: Sequence[Facts], terms: Sequence[Facts]) -> str:
    whose = "the teacher's" if len(teachers) == 1 else "the teachers'"
    total, own = data.get("rows"), data.get("labeled_rows")
    unlabeled = f"{(total - own) / total:.0%}" if total and own is not None and own < total else ""
    if are_columns(teachers):
        if unlabeled:
            return (
                f"Soft labels are the only ones of {unlabeled} of the training rows: errors and biases there were "
                "learned as truth. Neither they nor the student were measured by groups of people"
            )
        return (
            "It learned from soft labels, errors and biases included; neither they nor the student were measured by "
            "groups of people"
        )
    kinds = {term["kind"] for term in terms}
    if "logit" not in kinds:
        what = listed([name for kind, name in _INNER.items() if kind in kinds] or ["outputs"])
        return f"It learned from {whose} {what}, errors and biases included; neither was measured by groups of people"
    if unlabeled:
        return (
            f"{whose[0].upper() + whose[1:]} answers are the only labels of {unlabeled} of the training rows: errors "
            "and biases there were learned as truth. Neither was measured by groups of people"
        )
    return f"It learned from {whose} answers, errors and biases included; neither was measured by groups of people"


def _agreement(row: Facts | None, teachers: Sequence[Facts], others: Sequence[Facts]) -> str:
    if teachers:
        whom = "the teacher" if len(teachers) == 1 else "the teachers"
        whom = "the soft labels" if are_columns(teachers) else whom
    else:
        whom = f"{listed(link(model) for model in others)}, which did not teach it," if others else "the teacher"
    for split, metrics in (row or {}).get("metrics", {}).items():
        if "teacher_agreement" in metrics:
            share = f"{100 * metrics['teacher_agreement']:.1f} %"
            return f"Agrees with {whom} in {share} of predictions on `{plain(split)}`"
    return ""


def _int8(export: Facts, sizes: Mapping[str, int]) -> list[str]:
    int8 = export.get("quantization") or {}
    if "onnx/model_quantized.onnx" not in sizes or not int8:
        return []
    lines = []
    metric = int8.get("metric")
    if metric is None:
        lines.append("The quality of the int8 file was not measured")
    if int8.get("reduce_range"):
        lines.append("int8: weights of 7 bits, so that x86 CPUs without VNNI compute the same")
    else:
        measured = ""
        if export.get("cpu"):
            measured = (
                "; it was made and measured on a CPU "
                + ("without" if needs_reduced_range(export["cpu"]) else "with")
                + " such instructions"
            )
        lines.append(
            "int8: weights of 8 bits need a CPU with VNNI or ARM's dot products. On older x86 CPUs sums saturate, and "
            f"answers can change: use the float32 file there, or export again{measured}"
        )
    return lines


# Citation


def papers(distillation: Facts, data: Facts) -> str:
    """The papers of the forms that were on."""
    found = [PAPERS.get(f"{term['kind']}:{term.get('type')}") for term in distillation.get("terms") or []]
    if data.get("augmented_rows"):
        kind = "masked_lm" if (data.get("augment") or {}).get("masked_lm") else "masking"
        found.append(AUGMENTATION_PAPERS[kind])
    unique = dict.fromkeys(paper for paper in found if paper is not None)
    return bullets(f"{authors}: [{title}]({url})" for authors, title, url in unique)


def describe_run(run: Facts) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in (run.get("versions") or {}).items() if version)
    parts = [plain(versions), f"on {plain(run['hardware'])}" if run.get("hardware") else ""]
    return " ".join(part for part in parts if part) + "." if any(parts) else ""
