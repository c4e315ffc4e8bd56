"""The classifier without torch: the pipeline's answers, from a folder or the Hub."""

import json
import os
import re
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
from deploy.conftest import FP32_FILE, INT8_FILE
from hub_server import HubServer
from test_bad_input import assert_refused, files_in
from transformers import AutoTokenizer, pipeline


pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

from hf_kd.deploy.classifier import OnnxTextClassifier  # noqa: E402


TEXTS = ["w1 w2 w3", "w40 w41 w42 w43 w44 w2 w50", "", "w5", "w30 w1 unheard w2"]
PAIRS = [{"text": "w1", "text_pair": "w50 w2"}, {"text": "w40 w41 w42 w43", "text_pair": "w3"}]
LONG = ["w1 w2 " * 100, "w40 " * 200, "w1"]


@pytest.fixture(scope="module")
def classifier(exported):
    return OnnxTextClassifier.from_pretrained(exported("bert").folder, FP32_FILE)


def assert_same_answers(found, expected):
    """The same lists of the same labels, and scores that differ by rounding."""
    assert type(found) is type(expected)
    if isinstance(expected, list):
        assert len(found) == len(expected)
        for answer, expected_answer in zip(found, expected, strict=True):
            assert_same_answers(answer, expected_answer)
    else:
        assert list(found) == list(expected) == ["label", "score"] and found["label"] == expected["label"]
        assert type(found["score"]) is float and found["score"] == pytest.approx(expected["score"], abs=1e-4)


# The answers of the pipeline


@pytest.mark.parametrize(
    ("name", "inputs", "arguments"),
    [
        pytest.param("bert", TEXTS[0], {}, id="text"),
        pytest.param("bert", TEXTS[0], {"top_k": None}, id="text, all labels"),
        pytest.param("bert", TEXTS[0], {"top_k": 1}, id="text, top 1"),
        pytest.param("bert", TEXTS, {}, id="texts"),
        pytest.param("bert", TEXTS, {"batch_size": 2}, id="texts in batches"),
        pytest.param("bert", TEXTS, {"top_k": None}, id="texts, all labels"),
        pytest.param("bert", TEXTS, {"top_k": 1}, id="texts, top 1"),
        pytest.param("bert", TEXTS, {"top_k": 2}, id="texts, top 2"),
        pytest.param("bert", TEXTS, {"top_k": 9}, id="texts, more than there are"),
        pytest.param("bert", TEXTS, {"function_to_apply": "none"}, id="none"),
        pytest.param("bert", TEXTS, {"function_to_apply": "sigmoid", "top_k": None}, id="sigmoid"),
        pytest.param("bert", {"text": TEXTS[0]}, {}, id="dictionary"),
        pytest.param("bert", [{"text": text} for text in TEXTS], {}, id="dictionaries"),
        pytest.param("pair", PAIRS[0], {}, id="pair"),
        pytest.param("pair", PAIRS[0], {"top_k": None}, id="pair, all labels"),
        pytest.param("pair", PAIRS, {}, id="pairs"),
        pytest.param("pair", PAIRS, {"top_k": 2}, id="pairs, top 2"),
        pytest.param("pair", TEXTS, {}, id="texts to a model of pairs"),
        pytest.param("regression", TEXTS, {}, id="regression"),
        pytest.param("regression", TEXTS, {"top_k": None}, id="regression, all labels"),
        pytest.param("regression", TEXTS, {"function_to_apply": "sigmoid"}, id="regression, sigmoid"),
        pytest.param("distilbert", TEXTS, {"top_k": None}, id="distilbert"),
        pytest.param("roberta", TEXTS, {"top_k": None}, id="roberta"),
        pytest.param("electra", TEXTS, {"top_k": None}, id="electra"),
        pytest.param("modernbert", TEXTS, {"top_k": None}, id="modernbert"),
    ],
)
def test_answers_are_those_of_the_pipeline(exported, name, inputs, arguments):
    """Who replaces the pipeline by this class must not have to change a line after it."""
    export = exported(name)
    reference = pipeline("text-classification", str(export.checkpoint.folder), device="cpu")
    found = OnnxTextClassifier.from_pretrained(export.folder, FP32_FILE)(inputs, **arguments)
    assert_same_answers(found, reference(inputs, **arguments))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        pytest.param("regression", {"problem_type": None}, id="one label, of no kind"),
        pytest.param("bert", {"problem_type": "multi_label_classification"}, id="several labels at once"),
        pytest.param("bert", {"problem_type": "single_label_classification"}, id="one of several labels"),
        pytest.param("bert", {"id2label": None, "label2id": None}, id="labels without a name"),
        pytest.param("bert", {"id2label": {"0": "ja", "1": "nein"}}, id="other names"),
    ],
)
def test_config_decides_as_in_the_pipeline(exported, copy_of_export, name, changes):
    """A sigmoid for a softmax gives plausible scores that a threshold in production is wrong for."""
    export, folder = exported(name), copy_of_export(name)
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    # The pipeline reads the same config, beside the checkpoint's weights.
    (folder / "model.safetensors").write_bytes((export.checkpoint.folder / "model.safetensors").read_bytes())
    reference = pipeline("text-classification", str(folder), device="cpu")
    found = OnnxTextClassifier.from_pretrained(folder, FP32_FILE)(TEXTS, top_k=None)
    assert_same_answers(found, reference(TEXTS, top_k=None))


@pytest.mark.parametrize("max_length", [None, 8])
@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "modernbert"])
def test_long_texts_are_cut_as_in_the_pipeline(exported, name, max_length):
    """Beyond the last position embedding ONNX Runtime fails, or reads what lies behind the table."""
    export = exported(name)
    reference = pipeline("text-classification", str(export.checkpoint.folder), device="cpu")
    # RoBERTa's 80 positions begin after the padding index; transformers has that only in each tokenizer's own limit.
    limit = max_length or (79 if name == "roberta" else 80)
    found = OnnxTextClassifier.from_pretrained(export.folder, FP32_FILE, max_length=max_length)
    assert found.max_length == limit
    assert_same_answers(found(LONG), reference(LONG, truncation=True, max_length=limit))


def test_int8_answers_are_close_to_those_of_float32(exported, classifier):
    """Without a file name the int8 file answers: read with the wrong scales it would guess."""
    checkpoint = exported("bert").checkpoint
    int8 = OnnxTextClassifier.from_pretrained(exported("bert").folder)
    texts = checkpoint.texts()
    difference = np.abs(int8.logits(texts) - classifier.logits(texts))
    assert 1e-4 < difference.max() < 0.5


@pytest.mark.parametrize("arguments", [{}, {"top_k": None}], ids=str)
def test_no_texts_no_answers(classifier, arguments):
    """An empty batch is what a queue has in the night; the pipeline of transformers 5 fails on it."""
    assert classifier([], **arguments) == []


def test_a_tuple_is_a_pair(exported):
    """Read as two texts, the answer would be two, and each wrong."""
    classifier = OnnxTextClassifier.from_pretrained(exported("pair").folder, FP32_FILE)
    tuples = [(pair["text"], pair["text_pair"]) for pair in PAIRS]
    assert classifier(tuples) == classifier(PAIRS)
    assert classifier(tuples[0]) == [classifier(PAIRS[0])]
    assert classifier(tuples[::-1]) == classifier(PAIRS)[::-1] != classifier(PAIRS)


# Batches


def test_answers_keep_their_order_whatever_the_batch(exported, classifier):
    """Sorted by length and not sorted back, every answer belongs to another text."""
    texts = exported("bert").checkpoint.texts()
    one_by_one = np.concatenate([classifier.logits([text]) for text in texts])
    assert len({len(text) for text in texts}) > 10 and np.ptp(one_by_one) > 1
    for batch_size in (1, 7, 32, 1000):
        np.testing.assert_allclose(classifier.logits(texts, batch_size=batch_size), one_by_one, atol=1e-5, rtol=0)


def test_no_padding_beyond_the_batch(classifier, monkeypatch):
    """Padded to the longest text of all, or to the model's 80, short texts would take several times as long."""
    batches, run = [], classifier.run
    monkeypatch.setattr(classifier, "run", lambda batch: batches.append(batch) or run(batch))
    classifier(["w1 " * length for length in (30, 1, 2, 29, 3, 28)], batch_size=2)
    assert [batch["input_ids"].shape for batch in batches] == [(2, 4), (2, 30), (2, 32)]
    assert [batch["attention_mask"].sum(axis=1).tolist() for batch in batches] == [[3, 4], [5, 30], [31, 32]]


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("truncation_side", ["right", "left"])
@pytest.mark.parametrize("name", ["bert", "roberta", "pair"])
def test_inputs_are_those_of_the_tokenizer(exported, copy_of_export, name, padding_side, truncation_side):
    """Padding with the wrong id, on the wrong side, or cutting the wrong end gives answers that are a little off."""
    folder = copy_of_export(name)
    path = folder / "tokenizer_config.json"
    sides = {"padding_side": padding_side, "truncation_side": truncation_side}
    path.write_text(json.dumps({**json.loads(path.read_text()), **sides}))
    classifier = OnnxTextClassifier.from_pretrained(folder, max_length=9)
    texts = [*exported(name).checkpoint.texts()[:6], *([] if name == "pair" else LONG)]
    columns = [list(column) for column in zip(*texts, strict=True)] if name == "pair" else [texts]
    expected = AutoTokenizer.from_pretrained(folder)(
        *columns, padding=True, truncation=True, max_length=9, return_tensors="np"
    )
    found = classifier.pad(classifier.encode(texts))
    assert set(found) == set(expected)
    for column in found:
        np.testing.assert_array_equal(found[column], expected[column])


@pytest.mark.parametrize("num_threads", [1, 3, None])
def test_threads(exported, num_threads):
    """One process per core with all threads each is how servers come to a halt."""
    classifier = OnnxTextClassifier.from_pretrained(exported("bert").folder, num_threads=num_threads)
    options = classifier.session.get_session_options()
    assert options.intra_op_num_threads == (num_threads or len(os.sched_getaffinity(0)))
    assert options.inter_op_num_threads == 1
    assert classifier.session.get_providers() == ["CPUExecutionProvider"]


# Without torch

CLASSIFY = """
import json, sys
from pathlib import Path
from hf_kd.deploy.classifier import OnnxTextClassifier
answers = OnnxTextClassifier.from_pretrained(sys.argv[1])(sys.argv[2:])
status = Path("/proc/self/status").read_text()
print(json.dumps({"answers": answers, "modules": sorted(sys.modules), "status": status}))
"""
PIPELINE = """
import json, sys
from pathlib import Path
from transformers import pipeline
answers = pipeline("text-classification", sys.argv[1], device="cpu")(sys.argv[2:])
print(json.dumps({"answers": answers, "status": Path("/proc/self/status").read_text()}))
"""


def in_a_process(code, *arguments, **environment):
    """What the code prints as JSON on its last line, in a fresh process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


def peak_memory(found):
    """In kB. Not `ru_maxrss`, which starts with that of the parent process."""
    return int(re.search(r"^VmHWM:\s+(\d+) kB", found["status"], re.MULTILINE)[1])


@pytest.mark.one_leg
def test_never_imports_torch_nor_needs_its_memory(exported):
    """The small container is the reason for the class: one import of transformers and it holds torch again."""
    export = exported("bert")
    ours = in_a_process(CLASSIFY, export.folder, *TEXTS)
    theirs = in_a_process(PIPELINE, export.checkpoint.folder, *TEXTS)
    heavy = {"torch", "transformers", "datasets", "optimum", "evaluate", "sklearn", "scipy", "pandas", "onnx"}
    assert heavy & set(ours["modules"]) == set() and "onnxruntime" in ours["modules"]
    assert [answer["label"] for answer in ours["answers"]] == [answer["label"] for answer in theirs["answers"]]
    assert peak_memory(ours) < peak_memory(theirs) / 2


# From the Hub


@contextmanager
def hub_with(folder):
    """A server that has the folder as `someone/student`."""
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with HubServer({}) as server:
        server.create("someone/student", files=files)
        yield server


@pytest.fixture
def from_hub(tmp_path):
    """Classify with `repo_id` in a fresh process that has its own cache and can reach `endpoint` alone."""

    def run(endpoint, repo_id="someone/student", code=CLASSIFY):
        return in_a_process(
            code,
            repo_id,
            *TEXTS,
            HF_ENDPOINT=endpoint,
            HF_HOME=str(tmp_path / "cache"),
            HF_HUB_OFFLINE="0",
            HF_HUB_DISABLE_XET="1",
            HF_HUB_DISABLE_TELEMETRY="1",
            NO_PROXY="127.0.0.1,localhost",
        )

    return run


@pytest.mark.parametrize("has_int8", [True, False])
def test_from_the_hub(copy_of_export, from_hub, has_int8):
    """A repository is how a student is shared: all of its files must be found, and float32 where there is no int8."""
    folder = copy_of_export("bert")
    if not has_int8:
        (folder / INT8_FILE).unlink()
    with hub_with(folder) as server:
        found = from_hub(server.endpoint)
    assert found["answers"] == OnnxTextClassifier.from_pretrained(folder)(TEXTS)
    needed = {"config.json", "tokenizer.json", "tokenizer_config.json", INT8_FILE}
    assert server.files_asked_for == needed | (set() if has_int8 else {FP32_FILE})
    assert "torch" not in found["modules"]


REFUSED = """
import json, sys
from hf_kd.deploy.classifier import OnnxTextClassifier
try:
    OnnxTextClassifier.from_pretrained(sys.argv[1])
except Exception as error:
    print(json.dumps({"kind": type(error).__name__, "message": str(error)}))
"""


def test_from_a_repository_without_onnx_files(trained, from_hub):
    """Most repositories hold a checkpoint alone; the error has to say what makes a file of it."""
    with hub_with(trained("bert", "single").folder) as server:
        found = from_hub(server.endpoint, code=REFUSED)
    assert found["kind"] == "ValueError"
    assert "someone/student holds no onnx/model_quantized.onnx or onnx/model.onnx" in found["message"]
    assert "recipes/export_onnx.py --model_dir" in found["message"]


def test_hub_that_cannot_be_reached():
    """On a machine without network, that a repository holds no such file would be a wrong and costly answer."""
    with pytest.raises(Exception) as error:  # noqa: B017  (huggingface_hub's own kind, which differs between versions)
        OnnxTextClassifier.from_pretrained("someone/student")  # HF_HUB_OFFLINE is set for all tests
    assert "holds no" not in str(error.value)


# Bad input


@pytest.mark.parametrize(
    ("inputs", "arguments", "fragments"),
    [
        ([None], {}, ["an input is None", "give a text, a tuple of two texts, or {'text'"]),
        ([3], {}, ["an input is 3"]),
        ([["w1", "w2"]], {}, ["an input is ['w1', 'w2']", "a tuple of two texts"]),
        ([("w1", "w2", "w3")], {}, ["an input is ('w1', 'w2', 'w3')"]),
        ([("w1", None)], {}, ["an input is ('w1', None)"]),
        ({"sentence": "w1"}, {}, ["an input has the keys ['sentence']; give `text`, and `text_pair` for a pair"]),
        ({"text": "w1", "label": 0}, {}, ["an input has the keys ['label', 'text']"]),
        (["w1"], {"batch_size": 0}, ["batch_size=0 must be at least 1"]),
        (["w1"], {"function_to_apply": "tanh"}, ["function_to_apply='tanh' must be softmax, sigmoid or none"]),
    ],
    ids=str,
)
def test_inputs_that_are_no_texts(classifier, inputs, arguments, fragments):
    """A row number or a list of words would be classified as something."""
    assert_refused(lambda: classifier(inputs, **arguments), *fragments)


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        ({"num_threads": 0}, ["num_threads=0 must be at least 1, or None for all cores"]),
        ({"max_length": 0}, ["max_length=0; this model takes 3 to 80 tokens"]),
        ({"max_length": 81}, ["max_length=81; this model takes 3 to 80 tokens"]),
        ({"file_name": "onnx/model_fp16.onnx"}, ["holds no onnx/model_fp16.onnx", "export_onnx.py --model_dir"]),
    ],
    ids=str,
)
def test_arguments_that_cannot_work(exported, arguments, fragments):
    """ONNX Runtime takes 0 threads for all of them, and a length beyond the positions until a text is that long."""
    assert_refused(lambda: OnnxTextClassifier.from_pretrained(exported("bert").folder, **arguments), *fragments)


@pytest.mark.parametrize("missing", ["tokenizer.json", "config.json"])
def test_folder_that_is_not_complete(copy_of_export, missing):
    """A file copied alone has no labels and no words."""
    folder = copy_of_export("bert")
    (folder / missing).unlink()
    assert_refused(lambda: OnnxTextClassifier.from_pretrained(folder), f"{folder} holds no {missing};")


def test_folder_without_tokenizer_config_or_subfolder(copy_of_export, classifier):
    """Folders of other exporters keep the model at the top, and older ones have no tokenizer_config.json."""
    folder = copy_of_export("bert")
    (folder / "tokenizer_config.json").unlink()
    (folder / FP32_FILE).rename(folder / "model.onnx")
    (folder / INT8_FILE).unlink()
    assert "onnx/model.onnx" not in files_in(folder)
    assert OnnxTextClassifier.from_pretrained(folder)(TEXTS) == classifier(TEXTS)


@pytest.mark.parametrize("path", ["/missing/folder", "./missing", "a/b/c"])
def test_path_that_is_no_folder(path):
    """Taken for a Hub id, a mistyped path would end in an error about the network."""
    assert_refused(
        lambda: OnnxTextClassifier.from_pretrained(path), f"{path} is not a folder", "output folder of export_onnx"
    )
