"""Publishing: what leaves the machine, that it arrives whole or not at all, and that others can load it.

The client is the installed huggingface_hub, in a process of its own; the server is `hub_server`.
"""

import hashlib
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import make_dataset, make_model
from hub_client import ClientError, HubClient, download, look_around, onnx_scores, push, run_main, torch_logits, train
from hub_server import HubServer, User
from safetensors.torch import load_file, save_file

from hf_kd import DistillationTrainer, DistillationTrainingArguments
from hf_kd.deploy import OnnxTextClassifier, hub
from hf_kd.deploy.hub import check_student
from hf_kd.results import write_results


pytest.importorskip("onnxruntime")

MINE, READ_ONLY, OTHER = (f"hf_{letter * 34}" for letter in "mro")
USERS = {MINE: User("me"), READ_ONLY: User("me", can_write=False), OTHER: User("you")}
TEXTS = ["w1 w2 w3", "w40 w41 w42 w43", "w7 w50"]
# What a run leaves beside the student.
PRIVATE = [
    *("optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt", "projection.safetensors", "training_args.bin"),
    *("trainer_state.json", "predictions.json", "teacher.safetensors", "model.safetensors.tmp", ".env", ".git/config"),
    *("baseline/model.safetensors", "baseline/config.json", "checkpoint-4/optimizer.pt", "onnx/notes.txt"),
    *("checkpoint-4/model.safetensors", "learning_rate_0.1/model.safetensors", "cache/teacher_logits.arrow"),
    *("runs/events.out.tfevents", "onnx/old/model.onnx"),
]
MODEL = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
ONNX = {"onnx/model.onnx", "onnx/model_quantized.onnx", "onnx/export_report.json"}
RESULTS = {"README.md", "results.json", "report.md", "pareto.png"}


@pytest.fixture(scope="module")
def server():
    with HubServer(USERS) as server:
        yield server
    assert server.unknown == []  # the client asked for something that this Hub does not know
    assert server.tokens_on_cdn == []


@pytest.fixture(scope="module")
def client(server, tmp_path_factory):
    with HubClient(server.endpoint, tmp_path_factory.mktemp("home")) as client:
        yield client


@pytest.fixture
def hub_server(server):
    """The server without repositories."""
    for state in (server.repos, server.lfs, server.requests):
        state.clear()
    return server


@pytest.fixture
def folder(exported, tmp_path):
    """The output folder of a run, with all that it may hold."""
    export = exported("bert")
    folder = Path(shutil.copytree(export.folder, tmp_path / "student"))
    shutil.copy(export.checkpoint.folder / "model.safetensors", folder)
    write_results(
        folder / "results.json",
        [
            {
                **{"role": "student", "task": "invented", "seed": 42, "parameters": 30000, "layers": 2},
                **{"metrics": {"validation": {"accuracy": 0.9}}},
                **{"main_metric": {"split": "validation", "name": "accuracy"}},
            }
        ],
    )
    (folder / "report.md").write_text("# Results\n")
    (folder / "pareto.png").write_bytes(b"\x89PNG\0\0")
    for name in PRIVATE:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"not to be published")
    return folder


@pytest.fixture
def small_folder(tmp_path, tokenizer):
    """A student without anything around it."""
    make_model(num_hidden_layers=1).save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    return tmp_path / "small"


def own(files):
    """The names, but for tokenizer files that one version of transformers writes and the other does not."""
    return set(files) - {"special_tokens_map.json", "vocab.txt"}


def test_the_server_answers_as_the_hub_does(client, hub_server, small_folder):
    """Tests against a server that is unlike the Hub would prove nothing: the client reads back what it pushed."""
    oid = client(push, small_folder, "me/student", login=MINE)
    found = client(look_around, "me/student", login=MINE)
    names = sorted([*hub_server.repos["me/student"].files(), ".gitattributes"])
    assert found["name"] == "me" and found["branches"] == {"main": oid}
    assert found["files"] == found["tree"] == names
    weights = hub_server.repos["me/student"].files()["model.safetensors"]
    assert found["weights"] == {"size": len(weights), "sha256": hashlib.sha256(weights).hexdigest()}
    for kwargs, kind in (
        ({"revision": "v9"}, "RevisionNotFoundError"),
        ({"filename": "a.txt"}, "EntryNotFoundError"),
        ({"repo_id": "me/other"}, "RepositoryNotFoundError"),
    ):
        with pytest.raises(ClientError, match=kind):
            client(download, **{"repo_id": "me/student", "filename": "config.json", **kwargs})
    hub_server.repos["me/student"].gated = True
    with pytest.raises(ClientError, match="GatedRepoError"):
        client(download, "me/student", "vocab.txt", login=OTHER)


def test_push_sends_a_student_in_one_commit_and_nothing_else(client, hub_server, folder):
    """Optimizer states, the teacher, predictions or checkpoints would be public, or a push be half a student."""
    oid = client(push, folder, "me/student", login=MINE)
    repo = hub_server.repos["me/student"]
    assert own(repo.files()) == MODEL | ONNX | RESULTS
    assert [commit.sha for commit in repo.history()] == [oid]
    for name, content in repo.files().items():
        assert content == (folder / name).read_bytes()


def test_what_was_pushed_loads_and_answers_as_the_folder_does(client, hub_server, folder):
    """A published student would answer differently from the one that was measured, or not load at all."""
    client(push, folder, "student", login=MINE)  # the owner is who the token is of
    assert b'"me/student"' in hub_server.repos["me/student"].files()["README.md"]
    np.testing.assert_array_equal(client(torch_logits, "me/student", TEXTS), torch_logits(str(folder), TEXTS))
    assert client(onnx_scores, "me/student", TEXTS) == OnnxTextClassifier.from_pretrained(folder)(TEXTS)
    fp32 = OnnxTextClassifier.from_pretrained(folder, "model.onnx")(TEXTS)
    assert client(onnx_scores, "me/student", TEXTS, file_name="model.onnx") == fp32


def test_push_again_removes_what_is_gone_and_keeps_what_is_not_ours(client, hub_server, folder):
    """An int8 file of the student before would stay and be what everybody loads; or notes of the user be deleted."""
    client(push, folder, "me/student", login=MINE)
    repo = hub_server.repos["me/student"]
    assert client(push, folder, "me/student", login=MINE) == repo.branches["main"]
    assert len(repo.history()) == 1
    files = repo.commits[repo.branches["main"]].files
    notes = {name: files["config.json"] for name in ("notes.json", "docs/README.md", "old/onnx/model.onnx")}
    repo.commit("main", "a person's", {**files, **notes})
    for name in ("onnx/model_quantized.onnx", "report.md"):
        (folder / name).unlink()
    client(push, folder, "me/student", token=MINE, commit_message="Without int8")
    assert own(repo.files()) == (MODEL | ONNX | RESULTS | set(notes)) - {"onnx/model_quantized.onnx", "report.md"}
    assert [commit.message for commit in repo.history()][:2] == ["Without int8", "a person's"]


def test_a_push_that_breaks_off_leaves_all_or_nothing_and_can_be_repeated(client, hub_server, small_folder):
    """Somebody who loads the student during a bad connection would get new weights with an old config, for ever."""
    (small_folder / "pareto.png").write_bytes(b"\x89PNG\0\0")
    (small_folder / "onnx").mkdir()
    old = {"README.md": b"---\ntags: []\n---\n", "model-00001-of-00001.safetensors": b"old", "notes.txt": b"mine"}
    hub_server.create("me/student", files=old)
    with hub_server.failing(lambda index, kind: None):
        client(push, small_folder, "me/student", login=MINE)
        kinds = list(hub_server.requests)
    expected = hub_server.repos["me/student"].files()
    assert "model-00001-of-00001.safetensors" not in expected and expected["notes.txt"] == b"mine"
    expected_kinds = {"create", "whoami", "validate", "info", "preupload", "batch", "upload", "verify", "commit"}
    assert set(kinds) == expected_kinds
    last = len(kinds) - 1
    ways = {
        "from then on": lambda stop: lambda index, kind: "reset" if index >= stop else None,
        "once, server error": lambda stop: lambda index, kind: "error" if index == stop else None,
        "once, answer lost": lambda stop: lambda index, kind: "lost" if index == stop else None,
        "once, half an answer": lambda stop: lambda index, kind: "truncated" if index == stop else None,
    }
    outcomes = {way: set() for way in ways}
    for (way, faults), stop in itertools.product(ways.items(), range(len(kinds))):
        if "half" in way and stop < last:
            continue
        hub_server.lfs.clear()
        hub_server.create("me/student", files=old)
        where = f"{way}, at {stop} ({kinds[stop]})"
        with hub_server.failing(faults(stop)):
            try:
                client(push, small_folder, "me/student", login=MINE)
                outcome = "done"
            except ClientError:
                outcome = "failed"
        outcomes[way].add(outcome)
        files = hub_server.repos["me/student"].files()
        assert files in (old, expected), where
        assert outcome == "failed" or files == expected, where
        uploaded = set(hub_server.lfs)
        with hub_server.failing(lambda index, kind: None):
            client(push, small_folder, "me/student", login=MINE)
            assert hub_server.requests.count("upload") == 2 - len(uploaded), where
        assert hub_server.repos["me/student"].files() == expected, where
        assert len(hub_server.repos["me/student"].history()) == 2, where
    assert outcomes["from then on"] == {"failed"}
    assert all("failed" in outcome for outcome in outcomes.values())


def test_a_commit_of_somebody_else_in_between_is_an_error(client, hub_server, small_folder):
    """Two pushes at once would mix into a repository that holds parts of both."""
    repo = hub_server.create("me/student", files={"config.json": b"{}"})

    def faults(index, kind):
        if kind == "preupload":
            repo.commit("main", "somebody else's", repo.commits[repo.branches["main"]].files)

    with hub_server.failing(faults), pytest.raises(ClientError, match="commit has happened since"):
        client(push, small_folder, "me/student", login=MINE)
    assert [commit.message for commit in repo.history()] == ["somebody else's", "files"]


def test_private_repositories_are_read_with_a_token_alone(client, hub_server, folder):
    """A private student would be public, or the one who may read it could not."""
    client(push, folder, "me/secret", private=True, login=MINE)
    assert hub_server.repos["me/secret"].private
    expected = torch_logits(str(folder), TEXTS)
    np.testing.assert_array_equal(client(torch_logits, "me/secret", TEXTS, login=READ_ONLY), expected)
    for token in (None, OTHER):
        with pytest.raises(ClientError, match="hf auth login"):
            client(onnx_scores, "me/secret", TEXTS, login=token)
    scores = OnnxTextClassifier.from_pretrained(folder)(TEXTS)
    assert client(onnx_scores, "me/secret", TEXTS, token=READ_ONLY) == scores
    hub_server.create("me/public")
    with pytest.raises(ClientError, match="me/public is there already and public"):
        client(push, folder, "me/public", private=True, login=MINE)
    assert hub_server.repos["me/public"].history() == []


@pytest.mark.parametrize("token", [None, READ_ONLY, OTHER])
def test_push_without_the_right_says_how_to_get_it(client, hub_server, small_folder, token):
    """A 401 of an HTTP library after hours of training."""
    with pytest.raises(
        ClientError, match="(?s)PermissionError: nothing can be written to 'me/student'.*hf auth login"
    ):
        client(push, small_folder, "me/student", login=token)
    assert hub_server.repos == {}


def test_push_to_a_repository_of_somebody_else_is_refused(client, hub_server, small_folder):
    """Public, so it can be read and `create_repo` says that it is there: the refusal would come after the training."""
    hub_server.create("me/student")
    with pytest.raises(ClientError, match="PermissionError: nothing can be written to 'me/student'"):
        client(push, small_folder, "me/student", login=OTHER)
    assert "preupload" not in hub_server.requests


def test_branches_are_made_and_read(client, hub_server, folder):
    """A push to a branch would land on main, or a reader of a branch get main."""
    client(push, folder, "me/student", login=MINE)
    first = hub_server.repos["me/student"].branches["main"]
    (folder / "onnx/model_quantized.onnx").unlink()
    client(push, folder, "me/student", revision="fp32", login=MINE)
    repo = hub_server.repos["me/student"]
    assert repo.branches["main"] == first and "onnx/model_quantized.onnx" not in repo.files("fp32")
    fp32 = OnnxTextClassifier.from_pretrained(folder)(TEXTS)
    assert client(onnx_scores, "me/student", TEXTS, revision="fp32") == fp32
    assert client(onnx_scores, "me/student", TEXTS, revision=first) != fp32
    with pytest.raises(ClientError, match="(?s)revision v9.*Check name and revision"):
        client(onnx_scores, "me/student", TEXTS, revision="v9")


def test_all_files_of_a_classifier_are_of_one_commit(client, hub_server, folder):
    """A server that starts during a push would pair the new model with the old tokenizer, and answer nonsense."""
    client(push, folder, "me/student", login=MINE)
    repo = hub_server.repos["me/student"]
    files = repo.commits[repo.branches["main"]].files
    downloads = []

    def faults(index, kind):
        downloads.append(kind)
        if downloads.count("resolve") == 3:  # asked for the tokenizer's config, and for what comes next
            repo.commit("main", "new", {"config.json": files["config.json"]})

    with hub_server.failing(faults):
        scores = client(onnx_scores, "me/student", TEXTS, cache_dir=str(folder / "cache"))
    assert scores == OnnxTextClassifier.from_pretrained(folder)(TEXTS)


@pytest.mark.parametrize("name", ["results.json", "tokenizer_config.json", "onnx/export_report.json"])
def test_a_token_in_a_file_is_never_sent(client, hub_server, folder, name):
    """A command line with a token in it would hand out the account."""
    (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), "note": f"--token {MINE}"}))
    with pytest.raises(ClientError, match="holds an access token") as error:
        client(push, folder, "me/student", login=MINE)
    assert str(folder / name) in error.value.message and MINE not in error.value.message
    assert hub_server.requests == []


def test_the_command_line(client, hub_server, folder):
    """The line of the README would not do what push_student does."""
    printed = client(run_main, "hf_kd.deploy.hub", str(folder), "me/student", "--private", login=MINE)
    repo = hub_server.repos["me/student"]
    assert printed == f"{hub_server.endpoint}/me/student/commit/{repo.branches['main']}\n"
    assert repo.private and own(repo.files()) == MODEL | ONNX | RESULTS


# What is not complete is refused before anything is sent


def edit_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: shutil.rmtree(f), "holds no config.json; give the output folder"),
        (lambda f: (f / "config.json").unlink(), "holds no config.json; give the output folder"),
        (lambda f: (f / "tokenizer.json").unlink(), "holds no tokenizer.*tokenizer.save_pretrained"),
        (lambda f: (f / "model.safetensors").unlink(), "cannot be loaded from safetensors"),
        (lambda f: (f / "model.safetensors").write_bytes(b"half"), "was not written to its end"),
        (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "both as model.safetensors and in parts"),
        (
            lambda f: edit_weights(f, lambda w: w.pop("classifier.weight")),
            r"lacks the weights \['classifier.weight'\]",
        ),
        (
            lambda f: edit_weights(f, lambda w: w.update({"teacher.weight": w["classifier.bias"].clone()})),
            r"holds the weights \['teacher.weight'\], which BertForSequenceClassification has no use for",
        ),
    ],
)
def test_a_folder_that_is_no_complete_student_is_refused(small_folder, change, message):
    """The repository would hold something that nobody can load, or the teacher's weights."""
    check_student(small_folder)
    (small_folder / "vocab.txt").unlink(missing_ok=True)
    change(small_folder)
    with pytest.raises(ValueError, match=message):
        check_student(small_folder)


def test_onnx_files_of_another_student_are_refused(folder):
    """A student that was trained again would be published with the ONNX files of the one before."""
    check_student(folder)
    edit_weights(folder, lambda weights: weights["classifier.bias"].add_(1.0))
    with pytest.raises(ValueError, match="does not answer as the student does.*export it anew"):
        check_student(folder)


def test_parts_of_large_weights_are_published(small_folder, tokenizer):
    """A student above the size of one file would arrive without most of its weights."""
    (small_folder / "model.safetensors").unlink()
    make_model(num_hidden_layers=1).save_pretrained(small_folder, max_shard_size="30KB")
    parts = {path.name for path in small_folder.glob("model-*-of-*.safetensors")}
    assert len(parts) > 1
    check_student(small_folder)
    published = set(hub.published_files(small_folder))
    assert published >= {*parts, "model.safetensors.index.json", "config.json", "tokenizer.json"}


# The trainer


def test_trainer_publishes_the_student_at_each_save_and_at_the_end(client, hub_server, small_folder, tmp_path):
    """The Trainer's own push sends the whole output folder: training_args.bin, logs, the baseline, the cache."""
    make_model(seed=1).save_pretrained(tmp_path / "teacher")
    output = tmp_path / "out"
    for name in PRIVATE:
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_bytes(b"not to be published")
    weights = client(
        *(train, str(tmp_path / "teacher"), str(small_folder), str(output)),
        **{"push_to_hub": True, "hub_model_id": "me/student", "hub_private_repo": True, "hidden_loss_weight": 1.0},
        **{"save_strategy": "steps", "save_steps": 2, "hub_always_push": True, "hub_token": MINE},
    )
    repo = hub_server.repos["me/student"]
    messages = [commit.message for commit in reversed(repo.history())]
    assert messages == ["Training in progress, step 2", "Training in progress, step 4", "End of training"]
    assert repo.private
    for commit in repo.history():
        assert own(commit.files) - {".gitattributes"} <= MODEL | RESULTS
        assert own(commit.files) >= MODEL
    first = [x for p in make_model(num_hidden_layers=1).parameters() for x in p.flatten().tolist()][:1000]
    published = tmp_path / "published"
    published.mkdir()
    for name, content in repo.files().items():
        (published / name).write_bytes(content)
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(published)
    assert [x for p in model.parameters() for x in p.flatten().tolist()][:1000] == weights != first


def test_what_would_publish_checkpoints_is_refused_before_training(tmp_path):
    """hub_strategy="checkpoint" uploads the optimizer's state, after the first save."""
    for strategy in ("checkpoint", "all_checkpoints"):
        with pytest.raises(ValueError, match=f"hub_strategy='{strategy}' would publish optimizer states"):
            DistillationTrainingArguments(str(tmp_path), push_to_hub=True, hub_strategy=strategy, use_cpu=True)
    DistillationTrainingArguments(str(tmp_path), hub_strategy="checkpoint", use_cpu=True)  # nothing is pushed


def test_processes_that_do_not_push_save_on(student, make_args, tokenizer, monkeypatch):
    """Only the first process opens the repository; at the first save the others must not ask for what it keeps."""
    monkeypatch.setattr(DistillationTrainer, "is_world_process_zero", lambda trainer: False)
    args = make_args(push_to_hub=True, max_steps=2, save_strategy="steps", save_steps=1)
    trainer = DistillationTrainer(
        student, args, teacher_model=make_model(), train_dataset=make_dataset(8), processing_class=tokenizer
    )
    trainer.train()
    assert trainer.push_to_hub() is None
    assert trainer.state.global_step == 2


def test_a_trainer_that_cannot_publish_says_so_before_training(
    client, hub_server, small_folder, student, make_args, tokenizer
):
    """Hours later the student could not be pushed: no tokenizer to go with it, no token that may write."""
    with pytest.raises(ValueError, match="published with its tokenizer, but processing_class is NoneType"):
        DistillationTrainer(student, make_args(push_to_hub=True), teacher_model=make_model())
    own = type("OwnModel", (type(student),), {})(student.config)
    with pytest.raises(ValueError, match="a model that transformers loads, but this is .*OwnModel"):
        DistillationTrainer(own, make_args(push_to_hub=True), teacher_model=make_model(), processing_class=tokenizer)
    with pytest.raises(ClientError, match="PermissionError: nothing can be written to 'me/student'"):
        client(
            *(train, str(small_folder), str(small_folder), str(small_folder.parent / "out")),
            **{"push_to_hub": True, "hub_model_id": "me/student", "login": READ_ONLY},
        )
    assert set(hub_server.requests) == {"create", "info"}  # whether it is there already
