"""Teachers and students that are names on the Hub, with revisions and tokens; the recipe that publishes its own."""

import json
import re
import shlex

import pytest
import torch
from conftest import make_model
from hub_client import ClientError, HubClient, export, load_layers, onnx_scores, run_main, torch_logits, train
from hub_server import HubServer, User
from test_distributed import ROOT
from test_recipes import NAMES, QUICK, write_rows

from hf_kd.results import read_results


TOKEN, OTHER = "hf_" + "m" * 34, "hf_" + "o" * 34
TEXTS = ["w1 w2 w3", "w40 w41 w42 w43"]


@pytest.fixture(scope="module")
def models(tmp_path_factory, tokenizer):
    """A teacher in two versions, and a pretrained student."""
    folder = tmp_path_factory.mktemp("models")
    shapes = {"teacher-v1": {"num_hidden_layers": 3}, "teacher": {"num_hidden_layers": 4}}
    shapes |= {"small-v1": {"num_hidden_layers": 1, "max_position_embeddings": 40}, "small": {"num_hidden_layers": 2}}
    for seed, (name, shape) in enumerate(shapes.items()):
        make_model(seed=seed, **shape, **NAMES).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def server(models):
    """All are private; the branch v1 holds the first version."""
    with HubServer({TOKEN: User("me", organizations=("team",)), OTHER: User("you")}) as server:
        for name in ("teacher", "small"):
            repo = server.create(f"team/{name}", private=True, files=read_files(models / f"{name}-v1"))
            repo.branches["v1"] = repo.branches["main"]
            newer = server.create("team/newer", files=read_files(models / name))
            repo.commit("main", "v2", newer.commits[newer.branches["main"]].files)
        del server.repos["team/newer"]
        for name in ("secret", "other"):  # which no other test brings into the cache
            server.create(f"team/{name}", private=True, files=read_files(models / "teacher"))
        yield server
    assert server.unknown == []
    assert server.tokens_on_cdn == []


@pytest.fixture(scope="module")
def client(server, tmp_path_factory):
    with HubClient(server.endpoint, tmp_path_factory.mktemp("home")) as client:
        yield client


@pytest.fixture
def data(tmp_path):
    for split, seed in (("train", 0), ("dev", 1)):
        write_rows(tmp_path / "glue" / "SST-2" / f"{split}.tsv", ["sentence", "label"], seed=seed)
    return ["--task_name", "sst2", "--glue_dir", str(tmp_path / "glue"), "--max_seq_length", "16"]


def read_files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_teacher_by_name_teaches_as_the_one_in_the_folder(client, models, tmp_path):
    """A teacher from the Hub would be another one, or read other tokens, without a word."""
    expected = train(str(models / "teacher"), str(models / "small"), str(tmp_path / "a"))
    found = client(train, "team/teacher", "team/small", str(tmp_path / "b"), login=TOKEN)
    assert found == expected
    assert found != client(train, str(models / "teacher-v1"), "team/small", str(tmp_path / "c"), login=TOKEN)


def test_teachers_have_revisions_and_tokens(client, server):
    """`revision` or `token` would be taken, and the main branch loaded, or nothing."""
    assert client(load_layers, "team/teacher", login=TOKEN) == 4
    assert client(load_layers, "team/teacher", revision="v1", login=TOKEN) == 3
    commit = server.repos["team/teacher"].branches["v1"]
    assert client(load_layers, "team/teacher", revision=commit, login=TOKEN) == 3
    assert client(load_layers, "team/other", token=TOKEN) == 4  # not logged in


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("team/secret", {}, "private repository.*hf auth login"),
        ("team/secret", {"login": OTHER}, "private repository.*hf auth login"),
        ("team/teachr", {"login": TOKEN}, "teacher_model='team/teachr' is not a model folder.*valid model identifier"),
        (
            "team/teacher",
            {"login": TOKEN, "revision": "v9"},
            "that can be reached at revision 'v9'.*v9 is not a valid",
        ),
    ],
)
def test_a_teacher_that_cannot_be_had_is_one_clear_error(client, name, kwargs, message):
    """A 401 or 404 of an HTTP library, after the data were prepared."""
    with pytest.raises(ClientError, match=f"(?s)ValueError: .*{message}"):
        client(load_layers, name, **kwargs)


def test_a_revision_of_a_folder_is_refused(models):
    """The files of the folder would be taken for those of the revision."""
    with pytest.raises(ValueError, match="is a folder here, and revision='v1' is of models on the Hub"):
        load_layers(models / "teacher", revision="v1")


def test_the_recipe_distils_names_and_publishes_one_student(client, server, tmp_path, data):
    """Baseline and each learning rate would be pushed over the student, or another revision be distilled."""
    output = tmp_path / "out"
    client(
        *(run_main, "glue_distill", *data, *QUICK, "--output_dir", str(output), "--run_baseline"),
        *("--teacher_model_name_or_path", "team/teacher", "--teacher_revision", "v1"),
        *("--student_model_name_or_path", "team/small", "--student_revision", "v1"),
        *("--learning_rates", "1e-3", "1e-4", "--push_to_hub", "--hub_model_id", "team/new"),
        *("--hub_private_repo", "true"),
        login=TOKEN,
    )
    rows = {row["role"]: row for row in read_results(output / "results.json")["rows"]}
    assert {role: row["layers"] for role, row in rows.items()} == {"teacher": 3, "student": 1, "baseline": 1}
    repo = server.repos["team/new"]
    assert repo.private and len(repo.history()) == 1
    published = set(repo.files()) - {"special_tokens_map.json", "vocab.txt"}
    expected = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert published == expected | {"README.md", "results.json"}
    assert json.loads(repo.files()["results.json"])["rows"] == read_results(output / "results.json")["rows"]
    assert client(torch_logits, "team/new", TEXTS, login=TOKEN) == torch_logits(str(output), TEXTS)


@pytest.mark.one_leg
def test_the_readmes_commands_end_in_a_published_student(client, server, models, tmp_path, data):
    """Each takes what the one before it left; who follows the README would be the first to run all three."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("matplotlib")
    data = data[2:]  # the task is the README's
    # Weights at random may lose any number of rows in int8.
    export_flags = ["--max_metric_drop", "1", "--benchmark_lengths", "16", "--benchmark_threads", "1"]
    export_flags += ["--benchmark_rounds", "1", "--benchmark_seconds", "0.001"]
    expected = [
        ("accelerate launch recipes/glue_distill.py", "glue_distill", [*QUICK, *data]),
        ("python recipes/export_onnx.py", "export_onnx", [*data, *export_flags]),
        ("python -m hf_kd.deploy.hub", "hf_kd.deploy.hub", []),
    ]
    section = (ROOT / "README.md").read_text().partition("\n## Cards and the Hub\n")[2].partition("\n## ")[0]
    block = re.search(r"```bash\n(.*?)```", section, re.DOTALL)[1].replace("\\\n", " ")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "sst2-teacher").symlink_to(models / "teacher")
    here = {" runs/": f" {tmp_path}/runs/", " recipes/configs/": f" {ROOT}/recipes/configs/", " my-name/": " me/"}
    for command, (program, module, quick_flags) in zip(block.splitlines(), expected, strict=True):
        assert command.startswith(f"{program} ")
        flags = command.removeprefix(program)
        for name, place in here.items():
            flags = flags.replace(name, place)
        printed = client(run_main, module, *shlex.split(flags), *quick_flags, login=TOKEN)
    repo = server.repos["me/sst2-student"]
    assert printed == f"{server.endpoint}/me/sst2-student/commit/{repo.branches['main']}\n"

    files = repo.files()
    onnx_files = {"onnx/model.onnx", "onnx/model_quantized.onnx"}
    assert set(files) - {"special_tokens_map.json", "vocab.txt"} == {
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        *(*onnx_files, "onnx/export_report.json"),
        *("README.md", "results.json", "report.md", "pareto.png"),
    }
    card = files["README.md"].decode()
    assert "](pareto.png)\n" in card and files["pareto.png"].startswith(b"\x89PNG\r\n\x1a\n")
    table = card.partition("\n## ONNX files\n")[2].partition("\n## ")[0]
    measured = re.findall(r"\| `(.*?)` \|.*\| \d+\.\d\d / \d+\.\d\d \| \d+\.\dx \|\n", table)  # p50 / p95, speed-up
    assert set(measured) == onnx_files

    scores, indices = torch.tensor(client(torch_logits, "me/sst2-student", TEXTS)).softmax(dim=-1).max(dim=-1)
    answers = client(onnx_scores, "me/sst2-student", TEXTS)
    assert [answer["label"] for answer in answers] == [NAMES["id2label"][index] for index in indices.tolist()]
    # Int8 is off by 0.003 at most, the two texts are 0.06 apart.
    assert [answer["score"] for answer in answers] == pytest.approx(scores.tolist(), abs=0.02)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--teacher_model_name_or_path", "team/teacher", "--teacher_revision", "v9"], "'v9'.*v9 is not a valid"),
        (
            ["--teacher_model_name_or_path", "team/teacher", "--student_model_name_or_path", "team/smal"],
            r"student_model_name_or_path='team/smal' is not a model folder \(with config.json\) or a Hub id that",
        ),
        (
            ["--teacher_model_name_or_path", "team/teacher", "--teacher_revision", "v1", "v2"],
            r"teacher_revision=\['v1', 'v2'\] needs one for each teacher",
        ),
        (
            ["--teacher_model_name_or_path", "team/teacher", "--student_revision", "v1"],
            "student_revision='v1' is of a model on the Hub, and the student is made from the teacher",
        ),
        (
            ["--teacher_model_name_or_path", "team/teacher", "--push_to_hub", "--hub_model_id", "you/new"],
            "PermissionError: nothing can be written to 'you/new'",
        ),
    ],
)
def test_names_that_are_wrong_end_the_recipe_before_training(client, tmp_path, data, flags, message):
    """Hours of training would come before a typo is found."""
    with pytest.raises(ClientError, match=f"(?s){message}"):
        client(run_main, "glue_distill", *data, *QUICK, "--output_dir", str(tmp_path / "out"), *flags, login=TOKEN)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("revision", "limit"), [("v1", 40), (None, 80)])
def test_a_model_on_the_hub_is_exported_at_its_revision(client, tmp_path, revision, limit):
    """The ONNX files would be those of the main branch."""
    with pytest.raises(ClientError, match=f"max_length=90; this model takes up to {limit} tokens"):
        client(export, "team/small", str(tmp_path / "onnx"), revision=revision, max_length=90, login=TOKEN)


def test_a_private_model_is_exported_with_a_token(client, tmp_path):
    """The token would be for the model alone, and its tokenizer not be found."""
    with pytest.raises(ClientError, match="max_length=90; this model takes up to 80 tokens"):
        client(export, "team/other", str(tmp_path / "onnx"), max_length=90, token=TOKEN)
