"""The export: a folder whose files answer as the model does, or an error and nothing."""

import csv
import errno
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_model
from deploy.conftest import (
    BACKEND,
    CLASSES,
    EXPORTS,
    FP32_FILE,
    INT8_FILE,
    REPORT_FILE,
    save_tokenizer,
    torch_logits,
)
from test_bad_input import assert_refused, files_in
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from hf_kd.glue import TextTask
from hf_kd.results import read_results


onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from onnx import numpy_helper  # noqa: E402

from hf_kd.deploy.classifier import OnnxTextClassifier  # noqa: E402
from hf_kd.deploy.onnx import export_onnx  # noqa: E402
from hf_kd.deploy.parity import ParityError, check_parity  # noqa: E402
from hf_kd.deploy.quantization import QuantizationError  # noqa: E402


TEXTS = ["w1", "w3 w40 w7 w9 w12 w55 w2", "w40 w41 w42", "w30 w5 " * 7]
PAIRS = [("w1", "w50 w2 w4"), ("w3 w40 w7 w9", "w2"), ("w30 w31 w33 w34 w35 w36 w37", "w1 w2 w3 w4 w5")]
# Operators that multiply integers, as ONNX Runtime names them after it has read the file.
INTEGER_PRODUCTS = {"MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QLinearMatMul", "QGemm"}
INTEGER_PRODUCTS |= {"QAttention", "DynamicQuantizeLSTM"}


def session_of(path):
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def load_torch(folder):
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def examples(export):
    return PAIRS if len(export.checkpoint.task.text_columns) == 2 else TEXTS


def classifier_of(export, file_name, **kwargs):
    """The file as it was measured: texts cut as in the export."""
    max_length = EXPORTS[export.folder.name][2].get("max_length")
    return OnnxTextClassifier.from_pretrained(export.folder, file_name, max_length=max_length, **kwargs)


def weight_matrices(path):
    """Names of the float32 initializers that are tables or matrices, and their number of values."""
    graph = onnx.load(str(path)).graph
    return {
        tensor.name: int(np.prod(tensor.dims))
        for tensor in graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) >= 2
    }


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory):
    """A model that is quick to export."""
    folder = tmp_path_factory.mktemp("one-layer")
    make_model(num_hidden_layers=1, **CLASSES).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


# What is in the folder


@pytest.mark.parametrize("name", EXPORTS)
def test_folder_holds_what_runtimes_look_for_and_no_more(exported, name):
    """transformers.js, Optimum and the Hub look for these names; anything else would be uploaded with them."""
    export = exported(name)
    tokenizer_files = set(files_in(export.checkpoint.folder)) - {"config.json", "model.safetensors"}
    assert tokenizer_files >= {"tokenizer.json", "tokenizer_config.json"}
    files = files_in(export.folder)
    assert set(files) == {"config.json", FP32_FILE, INT8_FILE, REPORT_FILE} | tokenizer_files
    assert json.loads(files["tokenizer.json"]) == json.loads((export.checkpoint.folder / "tokenizer.json").read_text())
    ours, theirs = (AutoConfig.from_pretrained(path) for path in (export.folder, export.checkpoint.folder))
    assert (ours.model_type, ours.id2label, ours.problem_type) == (
        theirs.model_type,
        theirs.id2label,
        theirs.problem_type,
    )
    assert list(export.folder.parent.glob(".*")) == []  # the staging folder


@pytest.mark.parametrize("name", EXPORTS)
def test_report_says_what_is_on_disk(exported, name):
    """A report that differs from the files would be believed, and copied into a model card."""
    export = exported(name)
    report, asked = export.report, EXPORTS[name][2]
    assert json.loads(json.dumps(report)) == json.loads((export.folder / REPORT_FILE).read_text())
    assert report["backend"].split()[0] == BACKEND
    opset = {item.domain: item.version for item in onnx.load(str(export.folder / FP32_FILE)).opset_import}[""]
    assert opset == report["opset"] == asked.get("opset", opset)
    parity = report["parity"]
    assert parity["rows"] == 128 and parity["max_difference"] <= parity["tolerance"] == 1e-4
    sizes, lengths = zip(*(map(int, shape.split(" x ")) for shape in parity["batches"]), strict=True)
    assert sum(sizes) == 128 and len(set(sizes)) > 3 and len(set(lengths)) > 1
    assert max(lengths) <= asked.get("max_length", 80)
    assert report["quantization"]["method"] == asked.get("quantization", "dynamic")
    default = "QDQ" if asked.get("quantization") == "static" else "QOperator"
    assert report["quantization"]["format"] == asked.get("quantization_format", default)
    assert report["max_length"] == asked.get("max_length", 79 if name == "roberta" else 80)
    assert report["graph"].startswith("as exported" if name in ("modernbert", "regression") else "rewritten")
    assert report["inputs"] == [node.name for node in session_of(export.folder / FP32_FILE).get_inputs()]


@pytest.mark.parametrize("file_name", [FP32_FILE, INT8_FILE])
@pytest.mark.parametrize("name", EXPORTS)
def test_graph_has_the_names_and_free_sizes_that_runtimes_need(exported, tmp_path, name, file_name):
    """A fixed length, another input name, or weights in a second file fail only on the machine that serves it."""
    export = exported(name)
    expected = {"input_ids", "attention_mask"}
    expected |= {"token_type_ids"} if EXPORTS[name][0] in ("bert", "electra") else set()
    alone = shutil.copy(export.folder / file_name, tmp_path / "alone.onnx")
    session = session_of(alone)
    assert {node.name: (node.type, node.shape) for node in session.get_inputs()} == {
        input_name: ("tensor(int64)", ["batch_size", "sequence_length"]) for input_name in expected
    }
    (output,) = session.get_outputs()
    assert (output.name, output.type) == ("logits", "tensor(float)")
    assert output.shape == ["batch_size", export.checkpoint.task.num_labels]
    model = onnx.load(alone, load_external_data=False)
    onnx.checker.check_model(model)
    assert {tensor.data_location for tensor in model.graph.initializer} == {onnx.TensorProto.DEFAULT}


# What the files answer


@pytest.mark.parametrize("name", EXPORTS)
def test_plain_onnxruntime_gives_the_logits_of_torch(exported, name):
    """Our own classifier could be wrong in the same way twice; this is the file, the tokenizer and nothing else."""
    export = exported(name)
    model, tokenizer = load_torch(export.checkpoint.folder)
    session = session_of(export.folder / FP32_FILE)
    texts = examples(export)
    columns = list(zip(*texts, strict=True)) if isinstance(texts[0], tuple) else [texts]
    expected = torch_logits(model, tokenizer, texts)
    for size in (1, 2, len(texts)):
        batch = tokenizer(*(list(column[:size]) for column in columns), padding=True, return_tensors="np")
        found = session.run(["logits"], {node.name: batch[node.name] for node in session.get_inputs()})[0]
        np.testing.assert_allclose(found, expected[:size], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", EXPORTS)
def test_int8_file_multiplies_integers(exported, tmp_path, name):
    """A file that quantises and computes in float all the same would be slower, and pass every other test."""
    export = exported(name)
    assert (export.folder / INT8_FILE).stat().st_size < (export.folder / FP32_FILE).stat().st_size
    assert sum(weight_matrices(export.folder / FP32_FILE).values()) > 15_000
    if not export.report["quantization"]["nodes_in_fp32"]:
        assert max(weight_matrices(export.folder / INT8_FILE).values(), default=0) <= 80 * 32  # positions at most
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "as_it_runs.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    onnxruntime.InferenceSession(str(export.folder / INT8_FILE), options, providers=["CPUExecutionProvider"])
    operators = [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]
    assert sum(operator in INTEGER_PRODUCTS for operator in operators) >= 8  # 2 layers with 4 or more products


@pytest.mark.parametrize("name", EXPORTS)
def test_recorded_metrics_are_those_of_the_files(exported, name):
    """The metric that decides whether int8 is good enough must be the one a user gets."""
    export = exported(name)
    recorded = export.report["quantization"]["metric"]
    assert recorded["name"] == export.checkpoint.task.main_metric
    assert recorded["fp32"] - recorded["int8"] == recorded["drop"] <= recorded["max_drop"] == 0.005
    assert recorded["fp32"] > 0.9
    assert export.report["quantization"]["attempts"][-1]["metric"] == recorded["int8"]
    if name == "electra":
        return  # its rows count the classes from the other end: see the next test
    for precision, file_name in (("fp32", FP32_FILE), ("int8", INT8_FILE)):
        logits = classifier_of(export, file_name).logits(export.checkpoint.texts())
        assert export.checkpoint.score(logits) == pytest.approx(recorded[precision], abs=1e-9)


def test_classes_are_matched_by_name(exported):
    """A data set that counts the classes from the other end would report an accuracy of 4 % for a model with 96 %."""
    export = exported("electra")
    checkpoint, classifier = export.checkpoint, classifier_of(export, FP32_FILE)
    assert checkpoint.task.label_names == ("positive", "negative")
    assert classifier.id2label == {0: "negative", 1: "positive"}
    answers = [answer["label"] for answer in classifier(checkpoint.texts())]
    right = [
        checkpoint.task.label_names[label] == answer
        for label, answer in zip(checkpoint.validation["label"], answers, strict=True)
    ]
    assert export.report["quantization"]["metric"]["fp32"] == np.mean(right)


@pytest.mark.skipif(BACKEND != "optimum", reason="ORTModelForSequenceClassification is part of Optimum")
@pytest.mark.parametrize("name", EXPORTS)
def test_loads_with_optimum(exported, name):
    """Who has Optimum code already should change the folder's name and nothing else."""
    from optimum.onnxruntime import ORTModelForSequenceClassification

    export = exported(name)
    model, tokenizer = load_torch(export.checkpoint.folder)
    expected = torch_logits(model, tokenizer, examples(export))
    texts = examples(export)
    columns = [list(column) for column in zip(*texts, strict=True)] if isinstance(texts[0], tuple) else [texts]
    inputs = tokenizer(*columns, padding=True, return_tensors="pt")
    loaded = ORTModelForSequenceClassification.from_pretrained(export.folder)
    np.testing.assert_allclose(loaded(**inputs).logits.numpy(), expected, atol=1e-4, rtol=0)
    int8 = ORTModelForSequenceClassification.from_pretrained(export.folder, file_name="model_quantized.onnx")
    classifier = OnnxTextClassifier.from_pretrained(export.folder, INT8_FILE)
    np.testing.assert_allclose(
        int8(**inputs).logits.numpy(),
        classifier.run(dict(tokenizer(*columns, padding=True, return_tensors="np"))),
        atol=1e-5,
        rtol=0,
    )


# Parity must be able to fail


@pytest.fixture
def changed_file(copy_of_export):
    """The float32 file of the shared export after `change(model)`, as a classifier."""

    def make(change):
        folder = copy_of_export("bert")
        model = onnx.load(str(folder / FP32_FILE))
        change(model)
        onnx.save_model(model, str(folder / FP32_FILE))
        return OnnxTextClassifier.from_pretrained(folder, FP32_FILE)

    return make


def assert_parity_fails(export, classifier, *fragments):
    with pytest.raises(ParityError) as error:
        check_parity(*load_torch(export.checkpoint.folder), classifier, export.checkpoint.texts())
    assert [fragment for fragment in fragments if fragment not in str(error.value)] == [], str(error.value)


def add_to_weights(amount):
    def change(model):
        rng = np.random.default_rng(0)
        for tensor in model.graph.initializer:
            values = numpy_helper.to_array(tensor)
            if values.dtype == np.float32 and values.ndim == 2:
                noise = (amount * rng.standard_normal(values.shape)).astype(np.float32)
                tensor.CopyFrom(numpy_helper.from_array(values + noise, tensor.name))

    return change


def freeze(axis, size):
    def change(model):
        for value in model.graph.input:
            value.type.tensor_type.shape.dim[axis].dim_value = size

    return change


@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        pytest.param(
            add_to_weights(1e-3),
            ["texts [", "as a batch of 1 x", "in torch and", "they differ by", "0.0001 is"],
            id="weights off by a thousandth",
        ),
        pytest.param(add_to_weights(np.nan), ["nan", "they differ by nan"], id="NaN"),
        pytest.param(freeze(0, 1), ["as a batch of 2 x", "does not run", "batch"], id="batch frozen"),
        pytest.param(freeze(1, 5), ["as a batch of 1 x 22 tokens", "does not run", "Expected: 5"], id="length frozen"),
    ],
)
def test_parity_sees_a_wrong_file(exported, changed_file, change, fragments):
    """A check that never fails is no check: each of these would be shipped."""
    assert_parity_fails(exported("bert"), changed_file(change), *fragments)


def test_parity_sees_another_tokenizer(exported, copy_of_export):
    """With two words swapped in tokenizer.json the model is right, and every answer in production wrong."""
    folder = copy_of_export("bert")
    path = folder / "tokenizer.json"
    original = text = path.read_text()
    for word, other in (("w1", "@"), ("w40", "w1"), ("@", "w40")):
        text = text.replace(f'"{word}":', f'"{other}":')
    assert text != original
    path.write_text(text)
    classifier = OnnxTextClassifier.from_pretrained(folder, FP32_FILE)
    assert_parity_fails(exported("bert"), classifier, "tokenizer.json gives other token ids", "texts [")


# Folders that exist already


@pytest.fixture
def copy_of_checkpoint(trained, tmp_path):
    """A checkpoint with a config of the user's making, and an earlier export with a file that none writes today."""

    def make(name="model"):
        folder = Path(shutil.copytree(trained("bert", "single").folder, tmp_path / "work" / name))
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config, indent=4))
        (folder / "onnx").mkdir()
        for file in (FP32_FILE, INT8_FILE, REPORT_FILE, "onnx/model_fp16.onnx"):
            (folder / file).write_text("from an earlier export")
        return folder

    return make


def test_int8_that_cannot_hold_replaces_an_earlier_export(trained, copy_of_export):
    """The error must leave a float32 folder that works, and not the int8 file of another model beside it."""
    checkpoint = trained("bert", "regression")
    output_dir = copy_of_export("bert")
    (output_dir / "notes.txt").write_text("mine")
    # Against the model's own answers float32 is perfect, and any rounding a drop.
    own_answers = torch_logits(*load_torch(checkpoint.folder), checkpoint.texts())[:, 0].tolist()
    rows = checkpoint.validation.remove_columns("label").add_column("label", own_answers)
    with pytest.raises(QuantizationError) as error:
        export_onnx(checkpoint.folder, output_dir, task=checkpoint.task, validation=rows, max_metric_drop=0)
    files = files_in(output_dir)
    assert {FP32_FILE, REPORT_FILE, "config.json", "notes.txt"} <= set(files) and INT8_FILE not in files
    classifier = OnnxTextClassifier.from_pretrained(output_dir)
    np.testing.assert_allclose(classifier.logits(checkpoint.texts())[:, 0], own_answers, atol=1e-4)
    found = json.loads(files[REPORT_FILE])["quantization"]
    assert found["failed"] and found["metric"] is None and len(found["attempts"]) > 3
    message = str(error.value)
    for attempt in found["attempts"]:
        assert attempt["drop"] > 0 and f"{attempt['settings']}: {attempt['metric']:.4f}" in message
    assert "combined_score" in message and "float32 file is kept" in message and "`calibration` rows" in message


@pytest.mark.parametrize("is_link", [False, True], ids=["folder", "link to a folder"])
def test_empty_output_dir(one_layer, tmp_path, is_link):
    """`mkdir out`, or a link to the large disk, before the export is what people do; it must not fail at the end."""
    output_dir = tmp_path / "out"
    (tmp_path / "disk").mkdir()
    output_dir.symlink_to(tmp_path / "disk") if is_link else output_dir.mkdir()
    export_onnx(one_layer, output_dir, quantization=None)
    assert {FP32_FILE, REPORT_FILE, "config.json"} <= set(files_in(output_dir.resolve()))
    assert output_dir.is_symlink() == is_link
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "out"]


def scale_logits(folder):
    """Logits of millions, which float32 cannot hold to 1e-4: a model that no exporter gets right."""
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        model.classifier.weight.mul_(1e6)
    model.save_pretrained(folder)


def test_failed_parity_keeps_what_was_there(copy_of_checkpoint):
    """A failed re-export must not take the working one with it, nor touch the checkpoint."""
    folder = copy_of_checkpoint()
    scale_logits(folder)
    before = files_in(folder.parent)
    with pytest.raises(ParityError, match="they differ by"):
        export_onnx(folder, folder)
    assert files_in(folder.parent) == before and [path.name for path in folder.parent.iterdir()] == ["model"]


# In a process of its own, where nothing else writes to files. Python ignores SIGXFSZ, so that a write fails.
EXPORTS_ON_A_FULL_DISK = """
import json, resource, sys
from hf_kd.deploy.onnx import export_onnx
errors = []
for model_dir, output_dir, free_bytes in json.loads(sys.argv[1]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (free_bytes, resource.RLIM_INFINITY))
    try:
        export_onnx(model_dir, output_dir)
    except OSError as error:
        errors.append(error.errno)
print(json.dumps(errors))
"""


def test_full_disk_leaves_everything_as_it_was(one_layer, copy_of_checkpoint, tmp_path):
    """Half a folder would be loaded, or refused by the next export; the checkpoint beside it is worth hours."""
    folder = copy_of_checkpoint()
    before = files_in(tmp_path)
    cases = [(one_layer, tmp_path / "new", 60_000), (one_layer, tmp_path / "new", 100), (folder, folder, 100)]
    arguments = json.dumps([(str(model_dir), str(output_dir), size) for model_dir, output_dir, size in cases])
    command = [sys.executable, "-c", EXPORTS_ON_A_FULL_DISK, arguments]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout.splitlines()[-1]) == [errno.EFBIG] * len(cases)
    assert files_in(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["work"] and [
        path.name for path in folder.parent.iterdir()
    ] == ["model"]


# The recipes


def write_csv(path, rows, label_names):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows([row["text"], label_names[row["label"]]] for row in rows)
    return path


@pytest.fixture
def run_recipe(trained, tmp_path, monkeypatch):
    """Run a recipe's main() on the invented rows, as the command line would."""

    def run(recipe, *flags):
        checkpoint = trained("bert", "single")
        for flag, rows in (("train", checkpoint.calibration), ("validation", checkpoint.validation)):
            flags += (f"--{flag}_file", write_csv(tmp_path / f"{flag}.csv", rows, checkpoint.task.label_names))
        monkeypatch.setattr(sys, "argv", [f"recipes/{recipe}.py", *map(str, flags), "--max_seq_length", "32"])
        importlib.import_module(recipe).main()

    return run


def test_recipe_exports_into_the_models_own_folder_again(copy_of_checkpoint, run_recipe):
    """The checkpoint has to stay as it was, and of the earlier export nothing may stay: its int8 file is the one that
    would be loaded."""
    folder = copy_of_checkpoint()
    before = {name: content for name, content in files_in(folder).items() if not name.startswith("onnx/")}
    run_recipe("export_onnx", "--model_dir", folder, "--output_dir", folder, "--quantization", "none")
    after = files_in(folder)
    assert set(after) - set(before) == {FP32_FILE, REPORT_FILE, "results.json"}
    assert {name: after[name] for name in before} == before
    results = read_results(folder / "results.json")
    assert results["rows"] == [] and results["export"] == json.loads(after[REPORT_FILE])
    assert results["export"]["quantization"] is None and results["export"]["parity"]["rows"] == 128
    assert OnnxTextClassifier.from_pretrained(folder)("w1 w2 w3")[0]["label"] == "positive"


def test_recipe_measures_and_reports(copy_of_checkpoint, trained, run_recipe):
    """What `make demo` ends with: a table, a report and a picture, of the rows and the models that were asked for."""
    folder = copy_of_checkpoint()
    flags = [
        "--benchmark",
        "--teacher_model_name_or_path",
        trained("bert", "single").folder,
        "--benchmark_rounds",
        "1",
    ]
    flags += ["--benchmark_lengths", "8", "16", "--benchmark_threads", "1", "--benchmark_seconds", "0.01"]
    run_recipe("export_onnx", "--model_dir", folder, "--output_dir", folder, *flags)
    rows = {row["variant"]: row for row in read_results(folder / "results.json")["benchmark"]}
    assert {"teacher torch fp32", "student torch fp32", "student ONNX fp32", "student ONNX int8"} <= set(rows)
    accuracy = {name: row["metrics"]["validation"]["accuracy"] for name, row in rows.items()}
    assert accuracy["teacher torch fp32"] == accuracy["student ONNX fp32"] > 0.9
    report = (folder / "report.md").read_text(encoding="utf-8")
    assert "| student ONNX int8 |" in report and "rewritten for CPUs" in report
    assert (folder / "pareto.png").read_bytes().startswith(b"\x89PNG")


def test_export_leaves_other_models_alone(trained, copy_of_checkpoint):
    """A student that was exported in place looks like an earlier export; its weights would get another's config."""
    other, folder = trained("bert", "single").folder, copy_of_checkpoint()
    (folder / "onnx").mkdir(exist_ok=True)
    (folder / REPORT_FILE).write_text("{}")
    before = files_in(folder)
    assert_refused(lambda: export_onnx(other, folder), "holds other files", str(folder))
    assert files_in(folder) == before


def test_onnx_files_of_others_are_not_replaced(copy_of_checkpoint):
    """A repository for transformers.js has more in `onnx/` than we write: all of it would be gone."""
    folder = copy_of_checkpoint()
    shutil.rmtree(folder / "onnx", ignore_errors=True)
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model_q4.onnx").write_bytes(b"mine")
    before = files_in(folder)
    assert_refused(lambda: export_onnx(folder, folder), "holds files of another export")
    assert files_in(folder) == before


def test_parity_is_that_of_the_tokenizer_that_stays(copy_of_checkpoint):
    """Compared with a copy that was saved anew, the files in the folder would not be those that were compared."""
    folder = copy_of_checkpoint()
    shutil.rmtree(folder / "onnx", ignore_errors=True)
    settings = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = settings["model"]["vocab"]
    vocab["w1"], vocab["w2"] = vocab["w2"], vocab["w1"]
    (folder / "tokenizer.json").write_text(json.dumps(settings), encoding="utf-8")
    before = files_in(folder)
    export_onnx(folder, folder, quantization=None)
    after = files_in(folder)
    assert {name: after[name] for name in before} == before


def test_distillation_ends_with_files_that_load(trained, tmp_path, run_recipe):
    """`--export_onnx` comes after hours of training: it must not lose their results, nor export another model."""
    output_dir = tmp_path / "student"
    flags = ["--teacher_model_name_or_path", trained("bert", "single").folder, "--output_dir", output_dir]
    flags += ["--student_num_layers", "1", "--max_steps", "4", "--per_device_train_batch_size", "4", "--seed", "2"]
    flags += ["--report_to", "none", "--disable_tqdm", "true", "--save_strategy", "no", "--bf16", "false"]
    run_recipe("glue_distill", *flags, "--use_cpu", "true", "--export_onnx")
    results = read_results(output_dir / "results.json")
    assert [row["role"] for row in results["rows"]] == ["teacher", "student"]
    assert results["export"] == json.loads((output_dir / REPORT_FILE).read_text())
    assert (output_dir / INT8_FILE).is_file()
    expected = torch_logits(*load_torch(output_dir), TEXTS)
    found = OnnxTextClassifier.from_pretrained(output_dir, FP32_FILE).logits(TEXTS)
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)
    accuracy = results["rows"][1]["metrics"]["validation"]["accuracy"]
    assert results["export"]["quantization"]["metric"]["fp32"] == pytest.approx(accuracy, abs=1e-9)


# Bad input


def no_folder(folder):
    return folder / "missing"


def no_config(folder):
    (folder / "config.json").unlink()


def no_head(folder):
    AutoModel.from_pretrained(folder).save_pretrained(folder)


def no_tokenizer(folder):
    for path in folder.glob("*"):
        if path.name not in ("config.json", "model.safetensors"):
            path.unlink()


def no_weights_of_the_head(folder):
    config = AutoConfig.from_pretrained(folder)
    AutoModel.from_pretrained(folder).save_pretrained(folder)
    config.save_pretrained(folder)


def another_task(folder):
    from transformers import BertForTokenClassification

    BertForTokenClassification(AutoConfig.from_pretrained(folder)).save_pretrained(folder)


@pytest.mark.parametrize(
    ("spoil", "fragments"),
    [
        (no_folder, ["model_dir=", "missing", "is not a model folder (with config.json) or a Hub id"]),
        (no_config, ["is not a model folder (with config.json)"]),
        (no_head, ["is BertModel, which transformers has no task head for", "fine-tune it first"]),
        (no_weights_of_the_head, ["lacks the weights", "classifier.weight", "fine-tune it first"]),
        (another_task, ["is a BertForTokenClassification; give a model for sequence classification"]),
        (no_tokenizer, ["holds no tokenizer that can be saved as tokenizer.json", "save_pretrained(model_dir)"]),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_what_is_no_classifier(trained, tmp_path, spoil, fragments):
    """Half of these would export: an encoder with a random head, or a file that nobody can feed."""
    folder = Path(shutil.copytree(trained("bert", "single").folder, tmp_path / "model"))
    model_dir = spoil(folder) or folder
    assert_refused(lambda: export_onnx(model_dir, tmp_path / "out"), *fragments)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


LOWEST, HIGHEST = {"optimum": (14, 23), "transformers": (17, 25)}[BACKEND]


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        ({"opset": 9}, ["opset=9", f"the backend `{BACKEND}` writes {LOWEST} to {HIGHEST}"]),
        ({"opset": 99}, ["opset=99", f"the backend `{BACKEND}` writes {LOWEST} to {HIGHEST}"]),
        ({"backend": "onnx"}, ["backend='onnx' must be auto, optimum or transformers"]),
        ({"quantization": "int8"}, ["quantization='int8' must be 'dynamic', 'static' or None"]),
        (
            {"quantization": "static", "calibration": None},
            ["quantization='static' takes the range of each activation from data", "`calibration`"],
        ),
        ({"max_metric_drop": -0.1}, ["max_metric_drop=-0.1 must be 0 or more"]),
        ({"max_metric_drop": float("nan")}, ["max_metric_drop=nan must be 0 or more"]),
        ({"task": None}, ["`validation` rows need their `task`"]),
        ({"task": None, "validation": None}, ["`calibration` rows need their `task`"]),
        ({"validation": []}, ["`validation` has no rows"]),
    ],
    ids=str,
)
def test_arguments_that_cannot_work(trained, tmp_path, arguments, fragments):
    """Found after the export these cost minutes, and found by the user a wrong file."""
    checkpoint = trained("bert", "single")
    arguments = {**checkpoint.arguments(), **arguments}
    assert_refused(lambda: export_onnx(checkpoint.folder, tmp_path / "out", **arguments), *fragments)
    assert list(tmp_path.iterdir()) == []


def test_output_dir_with_other_files(trained, tmp_path):
    """A mistyped folder would have files of another project replaced."""
    (tmp_path / "config.json").write_text("mine")
    assert_refused(lambda: export_onnx(trained("bert", "single").folder, tmp_path), "holds other files", str(tmp_path))
    assert files_in(tmp_path) == {"config.json": b"mine"}


def test_output_dir_that_cannot_be_a_folder(trained, tmp_path):
    """The message has to name the folder, not the hidden one that we write first."""
    folder, file = trained("bert", "single").folder, tmp_path / "file"
    file.write_text("mine")
    assert_refused(lambda: export_onnx(folder, file), "is a file; give a folder", str(file))
    with pytest.raises(OSError, match="nothing new is there.*give a folder that can be written") as error:
        export_onnx(folder, file / "out")
    assert error.value.filename == str(file / "out")
    assert files_in(tmp_path) == {"file": b"mine"}


def test_backend_that_is_not_installed(trained, tmp_path):
    """An ImportError from the depths of another package does not say which extra it belongs to."""
    backend, extra = {"optimum": ("transformers", "onnx"), "transformers": ("optimum", "optimum")}[BACKEND]
    with pytest.raises(ImportError) as error:
        export_onnx(trained("bert", "single").folder, tmp_path / "out", backend=backend)
    assert f"the backend `{backend}` needs pip install 'hf-kd[{extra}]'" in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("missing", "code"),
    [
        ("onnxruntime", "import hf_kd.deploy.classifier as c; c.OnnxTextClassifier.from_pretrained(sys.argv[1])"),
        ("onnxruntime", "import hf_kd.deploy.onnx as o; o.export_onnx(sys.argv[1], sys.argv[1])"),
        ("onnx", "import hf_kd.deploy.onnx as o; o.export_onnx(sys.argv[1], sys.argv[1])"),
    ],
    ids=["classifier, onnxruntime", "export, onnxruntime", "export, onnx"],
)
def test_packages_that_are_not_installed(copy_of_export, missing, code):
    """Who installed hf-kd alone has neither; the first error must be the line that brings both."""
    code = f"import sys; sys.modules[{missing!r}] = None; {code}"
    command = [sys.executable, "-c", code, str(copy_of_export("bert"))]
    process = subprocess.run(command, capture_output=True, text=True)
    last_line = process.stderr.strip().splitlines()[-1]
    assert last_line.startswith("ImportError: ") and missing in last_line
    assert "pip install 'hf-kd[optimum]' (with transformers 4.57)" in last_line
    assert "pip install 'hf-kd[onnx]' (with transformers 5)" in last_line


def task_of(*columns, label_names=("negative", "positive")):
    return TextTask("mine", columns, label_names, ("accuracy",), "accuracy")


@pytest.mark.parametrize(
    ("task", "row", "fragments"),
    [
        pytest.param(
            task_of("premise", "hypothesis"),
            {"premise": "w1", "text": "w2", "label": 0},
            ["the rows have the columns ['premise', 'text', 'label']", "['hypothesis'] of task 'mine' are needed"],
            id="columns",
        ),
        pytest.param(
            task_of("text", label_names=("no", "yes")),
            {"text": "w2", "label": 0},
            ["the model's classes are ['negative', 'positive']", "those of task 'mine'", "['no', 'yes']"],
            id="classes",
        ),
        pytest.param(task_of("text"), {"text": "w2"}, ["`label`"], id="no label"),
        pytest.param(task_of("text"), {"text": "w2", "label": -100}, ["`validation`", "label"], id="none labelled"),
        pytest.param(task_of("text"), {"text": "w2", "label": 2}, ["label"], id="label out of range"),
    ],
)
def test_rows_of_another_task(one_layer, tmp_path, task, row, fragments):
    """Measured on the wrong columns or classes, int8 would be judged by noise."""
    assert_refused(lambda: export_onnx(one_layer, tmp_path / "out", task=task, validation=[row]), *fragments)
    assert list(tmp_path.iterdir()) == []
