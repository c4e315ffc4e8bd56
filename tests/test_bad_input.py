"""What would train silently wrong is refused before the first step, with the values given and what to do instead."""

import json
from dataclasses import dataclass

import pytest
import torch
from conftest import VOCAB, make_dataset, make_model, make_rows, weights
from datasets import Dataset
from glue_setup import DataArguments
from safetensors.torch import load_file, save_file
from transformers import AutoModel, BertTokenizerFast

from hf_kd import (
    AttentionTerm,
    DistillationObjective,
    DistillationTrainer,
    HiddenTerm,
    LogitTerm,
    TaskTerm,
    student_from_teacher,
)
from hf_kd.command_line import parse_args
from hf_kd.signals import Signals
from hf_kd.signals.teacher import load_teacher, reorder_labels


NAN, INF = float("nan"), float("inf")
HIDDEN, ATTENTION = {"hidden_loss_weight": 1.0}, {"attention_loss_weight": 1.0}


def assert_refused(action, *fragments):
    """The action raises a ValueError whose message holds all fragments."""
    with pytest.raises(ValueError) as error:
        action()
    message = str(error.value)
    assert [fragment for fragment in fragments if fragment not in message] == [], message


def files_in(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def make_trainer(make_args, collator):
    """A trainer of a 2-layer student and a 4-layer teacher, both with changes."""

    def make(args=None, student=None, teacher=None, rows=None, **trainer_kwargs):
        student_model = make_model(**{"seed": 2, "num_hidden_layers": 2, **(student or {})})
        kwargs = {"teacher_model": make_model(**{"seed": 1, **(teacher or {})}), **trainer_kwargs}
        dataset = make_dataset(8) if rows is None else Dataset.from_list(rows)
        return DistillationTrainer(
            kwargs.pop("model", student_model),
            make_args(**(args or {})),
            train_dataset=dataset,
            data_collator=collator,
            **kwargs,
        )

    return make


# Values that no run can have


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"task_loss_weight": -0.5}, ["task_loss_weight=-0.5", "must be a finite number >= 0", "0 switches"]),
        ({"logit_loss_weight": NAN}, ["logit_loss_weight=nan", "must be a finite number >= 0", "0 switches"]),
        ({"hidden_loss_weight": INF}, ["hidden_loss_weight=inf", "must be a finite number >= 0", "0 switches"]),
        ({"attention_loss_weight": -1}, ["attention_loss_weight=-1", "must be a finite number >= 0", "0 switches"]),
        (
            {"task_loss_weight": 0, "logit_loss_weight": 0},
            ["every loss weight is 0", "set for example logit_loss_weight=0.5"],
        ),
        ({"temperature": 0}, ["logit_loss: temperature=0 must be a finite number > 0, usually 1 to 8"]),
        ({"temperature": -2.0}, ["logit_loss: temperature=-2.0 must be a finite number > 0"]),
        ({"temperature": NAN}, ["logit_loss: temperature=nan must be a finite number > 0"]),
        ({"logit_loss_type": "kld"}, ["logit_loss_type='kld' must be one of 'kl', 'soft_ce', 'reverse_kl', 'js'"]),
        ({"hidden_loss_type": "l1"}, ["hidden_loss_type='l1' must be one of 'mse', 'cosine'"]),
        ({"attention_loss_type": "cos"}, ["attention_loss_type='cos' must be one of 'mse', 'kl', 'cosine'"]),
        ({"teacher_dtype": "fp16"}, ["teacher_dtype='fp16' must be one of 'float32', 'bfloat16', 'float16'"]),
        ({"label_smoothing_factor": 1.5}, ["task_loss: label_smoothing=1.5 must be between 0 and 1"]),
    ],
    ids=str,
)
def test_argument_out_of_range(make_args, tmp_path, changes, fragments):
    """A weight of NaN makes every weight of the student NaN, a temperature of 0 every logit infinite: after hours."""
    assert_refused(lambda: make_args(**changes), *fragments)
    assert list(tmp_path.iterdir()) == []


# Models that do not fit each other


def labels_of(*names):
    id2label = dict(enumerate(names))
    return {"id2label": id2label, "label2id": {name: index for index, name in id2label.items()}}


SAME_HEADS = "use relation_loss_weight=1 with relation_loss_type='minilm_v2'"


@pytest.mark.parametrize(
    ("args", "student", "teacher", "fragments"),
    [
        pytest.param(
            {**HIDDEN, "layer_mapping": "1-4"},
            {},
            {},
            ["layer_mapping='1-4' cannot be read", "use 'uniform', 'last', 'first' or pairs", "'1:4,2:8'"],
            id="map unreadable",
        ),
        pytest.param({**HIDDEN, "layer_mapping": ""}, {}, {}, ["layer_mapping='' cannot be read"], id="map empty"),
        pytest.param(
            {**HIDDEN, "layer_mapping": "1:2:3"}, {}, {}, ["layer_mapping='1:2:3' cannot be read"], id="map of triples"
        ),
        pytest.param(
            {**HIDDEN, "layer_mapping": "1:5"},
            {},
            {},
            ["layer_mapping='1:5' names teacher layer 5, but the teacher has layers 0 to 4", "'uniform'"],
            id="teacher layer out of range",
        ),
        pytest.param(
            {**HIDDEN, "layer_mapping": "-1:4"},
            {},
            {},
            ["layer_mapping='-1:4' names student layer -1, but the student has layers 0 to 2"],
            id="student layer negative",
        ),
        pytest.param(
            {**ATTENTION, "layer_mapping": "0:0"},
            {},
            {},
            ["layer_mapping='0:0' names student layer 0", "hidden states but no attention", "layers 1 to 2"],
            id="attention of the embeddings",
        ),
        pytest.param(
            {**HIDDEN, "layer_mapping": "1:1,1:4"},
            {},
            {},
            ["layer_mapping='1:1,1:4' names a student layer twice", "give each student layer one teacher layer"],
            id="student layer twice",
        ),
        pytest.param(
            HIDDEN,
            {"num_hidden_layers": 4},
            {"num_hidden_layers": 2},
            ["layer_mapping='uniform' needs a student with no more layers than its teacher", "4 and 2", "'4:2'"],
            id="student deeper than teacher",
        ),
        pytest.param(
            ATTENTION,
            {"num_attention_heads": 2},
            {},
            ["attention_loss: the student has 2 attention heads and the teacher 4", SAME_HEADS],
            id="different heads",
        ),
        pytest.param(
            ATTENTION,
            {"family": "convbert"},
            {},
            ["model type 'convbert'", "albert, bert, camembert, distilbert, electra", "set attention_loss_weight=0"],
            id="attention of an unknown student family",
        ),
        pytest.param(
            ATTENTION,
            {},
            {"family": "deberta-v2"},
            ["model type 'deberta-v2'", "disentangled", "relation_loss_type='similarity'", "attention_loss_weight=0"],
            id="attention of a teacher that has none to compare",
        ),
        pytest.param(
            {},
            {"family": "distilbert", "vocab_size": 50},
            {},
            [
                "student (distilbert) has a vocabulary of 50 tokens, the teacher (bert) one of 64",
                "student_from_teacher",
            ],
            id="vocabulary sizes",
        ),
        pytest.param(
            {},
            labels_of("negative", "positive"),
            labels_of("no", "yes"),
            ["['negative', 'positive'] and ['no', 'yes']", "id2label=teacher.config.id2label"],
            id="label names",
        ),
        pytest.param(
            {},
            {"num_labels": 2},
            {"num_labels": 3},
            ["['LABEL_0', 'LABEL_1'] and ['LABEL_0', 'LABEL_1', 'LABEL_2']", "id2label=teacher.config.id2label"],
            id="number of labels",
        ),
        pytest.param(
            {"logit_loss_type": "kl"},
            {"num_labels": 1},
            {"num_labels": 1},
            ["logit_loss_type='kl'", "one logit, whose softmax is always 1", "Set logit_loss_type='mse'"],
            id="kl of one logit",
        ),
        pytest.param(
            {"logit_loss_type": "soft_ce"},
            {"num_labels": 1},
            {"num_labels": 1},
            ["logit_loss_type='soft_ce'", "one logit, whose softmax is always 1", "Set logit_loss_type='mse'"],
            id="soft_ce of one logit",
        ),
        pytest.param(
            {"logit_loss_type": "standardized_kl"},
            {},
            {},
            ["logit_loss_type='standardized_kl' with 2 labels", "would train nothing; use 'kl'"],
            id="standardised logits of two classes",
        ),
        pytest.param(
            {},
            {"problem_type": "multi_label_classification"},
            {},
            ["solves single_label_classification, the student", "multi_label_classification", "with the teacher's"],
            id="several labels per row",
        ),
        pytest.param(
            {},
            {"problem_type": "regression"},
            {},
            ["problem_type='regression' with num_labels=2 cannot be distilled", "(num_labels=1)"],
            id="regression to two values",
        ),
        pytest.param(
            {
                **ATTENTION,
                "gradient_checkpointing": True,
                "gradient_checkpointing_kwargs": {"use_reentrant": True},
            },
            {},
            {},
            [
                "{'use_reentrant': True}",
                "the attention and relation terms would train nothing",
                "{'use_reentrant': False}",
            ],
            id="reentrant checkpointing",
        ),
    ],
)
def test_models_do_not_fit(make_trainer, tmp_path, args, student, teacher, fragments):
    """The term would be 0, or compare layers, tokens or classes that mean different things, while the loss falls."""
    assert_refused(lambda: make_trainer(args, student, teacher), *fragments)
    assert files_in(tmp_path) == {}


def test_teacher_is_missing(make_trainer):
    """The run would train without distillation and report a student "distilled"."""
    assert_refused(
        lambda: make_trainer({**HIDDEN}, teacher_model=None),
        "the terms logit_loss, hidden_loss compare with a teacher, but there is none",
        "pass teacher_model=..., a model or a path",
    )


def test_teacher_shares_layers_with_the_student(make_trainer):
    """Layers handed over without a copy freeze with the teacher: the student would hardly train, without a word."""
    teacher, student = make_model(seed=1), make_model(seed=2, num_hidden_layers=2)
    student.bert.encoder.layer[0] = teacher.bert.encoder.layer[1]
    assert_refused(lambda: make_trainer(model=student, teacher_model=teacher), "model share parameters")
    assert all(p.requires_grad for p in student.parameters())


def test_one_process_on_several_gpus(make_args):
    """DataParallel would average the terms of its replicas, whatever each of them has to say."""
    args = make_args()
    assert args.n_gpu <= 1
    args._n_gpu = 4  # what TrainingArguments finds where a process sees four
    assert_refused(
        lambda: DistillationTrainer(make_model(seed=2), args, teacher_model=make_model(seed=1)),
        "one process sees 4 GPUs",
        "accelerate launch --num_processes 4",
    )


@pytest.mark.parametrize("argument", ["model", "teacher_model"])
@pytest.mark.parametrize("value", [NAN, INF])
def test_weights_of_a_run_that_diverged(make_trainer, argument, value):
    """An infinite weight may make a finite loss, whose student is trained towards nothing."""
    models = {"model": make_model(seed=2, num_hidden_layers=2), "teacher_model": make_model(seed=1)}
    with torch.no_grad():
        models[argument].bert.encoder.layer[0].output.dense.bias[:3] = value
    assert_refused(
        lambda: make_trainer(**models),
        f"{argument}: 3 of the 32 numbers of bert.encoder.layer.0.output.dense.bias are NaN or infinite",
        "before its training diverged",
    )


def test_arguments_that_an_objective_replaces(make_trainer):
    """A temperature beside an objective would be read by nothing, and stand in every table of the run."""
    args = {"temperature": 9.0, "hidden_loss_weight": 5.0}
    objective = DistillationObjective([TaskTerm(1.0), LogitTerm(1.0)])
    assert_refused(
        lambda: make_trainer(args=args, objective=objective), "temperature=9.0", "hidden_loss_weight=5.0", "objective"
    )


def test_multi_label_teacher_of_a_single_label_student(make_trainer):
    """Its logits are independent scores: a softmax over them would teach something that it never learned."""
    teacher = make_model(seed=1, problem_type="multi_label_classification")
    assert_refused(
        lambda: make_trainer(teacher_model=teacher),
        "solves multi_label_classification, the student",
        "num_labels and problem_type",
    )


def test_signals_that_were_not_read():
    """A custom loop that forgets teacher.watch() would end in a KeyError of a number."""
    student, teacher = make_model(seed=2, num_hidden_layers=2), make_model(seed=1)
    objective = DistillationObjective([HiddenTerm(1.0)]).bind(student.config, teacher.config)
    signals = Signals(torch.zeros(1, 2), torch.ones(1, 3), hidden=dict.fromkeys((1, 2), torch.zeros(1, 3, 32)))
    assert_refused(
        lambda: objective(signals, Signals(torch.zeros(1, 2), torch.ones(1, 3))),
        "teacher signals lack hidden states of layers [2, 4]",
        "teacher.watch(objective.teacher_wanted)",
    )


def test_teacher_is_the_student(make_trainer):
    """Freezing the teacher would freeze the student, and every term would be 0."""
    model = make_model(num_hidden_layers=2)
    before = weights(model)
    assert_refused(
        lambda: make_trainer(model=model, teacher_model=model),
        "teacher_model and model share parameters",
        "copy.deepcopy(teacher)",
    )
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == []
    assert torch.equal(weights(model), before)


def test_tokenizers_number_other_tokens(make_trainer, tmp_path, tokenizer):
    """Two vocabularies of one size: the teacher would read other words than the student, and answer for those."""
    folder = tmp_path / "teacher"
    make_model(seed=1).save_pretrained(folder)
    swapped = [*VOCAB[:5], "w1", "w0", *VOCAB[7:]]
    vocab_file = tmp_path / "vocab.txt"
    vocab_file.write_text("\n".join(swapped), encoding="utf-8")
    BertTokenizerFast.from_pretrained(tmp_path).save_pretrained(folder)
    before = files_in(tmp_path)
    assert_refused(
        lambda: make_trainer(teacher_model=str(folder), processing_class=tokenizer),
        "different ids to 2 tokens ('w0': 5 and 6, 'w1': 6 and 5)",
        "shares its tokenizer",
    )
    assert files_in(tmp_path) == before


# Folders that hold no teacher


def save_teacher(folder):
    make_model(seed=1).save_pretrained(folder)


def save_nothing(folder):
    folder.mkdir()


def save_without_head(folder):
    AutoModel.from_config(make_model(seed=1).config).save_pretrained(folder)


def save_with_a_random_head(folder):
    save_teacher(folder)
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("classifier.")}
    assert len(kept) == len(tensors) - 2
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def save_as_pickle(folder):
    save_teacher(folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def save_without_architecture(folder):
    save_teacher(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    del config["architectures"]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize(
    ("save", "fragments"),
    [
        (lambda folder: None, ["is not a model folder (with config.json) or a Hub id that can be reached"]),
        (save_nothing, ["is not a model folder (with config.json)"]),
        (save_without_head, ["is BertModel, which transformers has no task head for", "recipes/glue_finetune.py"]),
        (save_without_architecture, ["is a model without architectures in its config", "fine-tune it first"]),
        (
            save_with_a_random_head,
            ["lacks the weights ['classifier.bias', 'classifier.weight']", "fine-tune it first"],
        ),
        (save_as_pickle, ["cannot be loaded from safetensors", "save_pretrained(), which writes model.safetensors"]),
    ],
    ids=["nothing there", "empty", "no head", "no architecture", "head not trained", "pickle alone"],
)
def test_folder_holds_no_teacher(make_trainer, tmp_path, save, fragments):
    """A teacher with a random head teaches noise; a pickle runs whatever code is in it."""
    folder = tmp_path / "teacher"
    save(folder)
    before = files_in(tmp_path)
    assert_refused(lambda: load_teacher(folder), f"teacher_model={str(folder)!r}", *fragments)
    assert_refused(lambda: make_trainer(teacher_model=folder), f"teacher_model={str(folder)!r}", *fragments)
    assert files_in(tmp_path) == before


# What only shows when training starts


def refuse_to_train(trainer, *fragments, **train_kwargs):
    """train() refuses before its first step, and has changed nothing."""
    before = weights(trainer.model)
    assert_refused(lambda: trainer.train(**train_kwargs), *fragments)
    assert trainer.state.global_step == 0
    assert torch.equal(weights(trainer.model), before)


def test_batch_without_labels(make_trainer):
    """The task term would be left out, and the student learn from the teacher alone."""
    rows = [{name: value for name, value in row.items() if name != "labels"} for row in make_rows(8)]
    refuse_to_train(
        make_trainer(rows=rows),
        "task_loss has weight 0.5, but the batch has no labels",
        "add `labels`",
        "set task_loss_weight=0",
    )


def test_float_labels_of_classes(make_trainer):
    """0.0 and 1.0 would be cut to class indices, and a score of 0.9 to class 0."""
    rows = [{**row, "labels": float(row["labels"])} for row in make_rows(8)]
    refuse_to_train(
        make_trainer(rows=rows),
        "the labels are torch.float32 for single_label_classification with 2 classes",
        "give class indices as integers, or load both models with problem_type='multi_label_classification'",
    )


def test_reentrant_checkpointing_set_on_the_model(make_trainer):
    """Set on the model, where the arguments do not show it, it drops the gradient of queries and keys all the same."""
    trainer = make_trainer(ATTENTION)
    trainer.model.gradient_checkpointing_enable({"use_reentrant": True})
    refuse_to_train(
        trainer,
        "the queries of layer",
        "carry no gradient",
        "set gradient_checkpointing_kwargs={'use_reentrant': False}",
    )


def test_own_optimizer_without_the_projections(make_trainer):
    """The projections would stay random, and pull the student's states towards a random map of the teacher's."""
    student = make_model(seed=2, num_hidden_layers=2, hidden_size=16)
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3)
    trainer = make_trainer(HIDDEN, model=student, optimizers=(optimizer, None))
    refuse_to_train(
        trainer, "passed as `optimizers` does not hold the projections of hidden states", "objective.parameters()"
    )


def test_checkpoint_without_the_projections(make_trainer, tmp_path):
    """The student would go on from its checkpoint, and the projections from new random weights."""
    args, student = {**HIDDEN, "max_steps": 1, "save_strategy": "steps", "save_steps": 1}, {"hidden_size": 16}
    make_trainer(args, student).train()
    checkpoint = tmp_path / "out" / "checkpoint-1"
    (checkpoint / "projection.safetensors").unlink()
    before = files_in(tmp_path)
    trainer = make_trainer({**args, "max_steps": 2}, student)
    assert_refused(
        lambda: trainer.train(resume_from_checkpoint=str(checkpoint)),
        f"the checkpoint {checkpoint} has no projection.safetensors",
        "which the terms between layers need for the student's width 16",
        "resume with the terms it was trained with",
    )
    assert trainer.state.global_step == 0
    assert files_in(tmp_path) == before


# The objective on its own


def some_signals(**changes):
    return Signals(**{"logits": torch.zeros(2, 3), "attention_mask": torch.ones(2, 4), **changes})


def bound(*terms):
    config = make_model(num_labels=3).config
    return DistillationObjective(terms).bind(config, config)


@pytest.mark.parametrize(
    ("action", "fragments"),
    [
        pytest.param(lambda: DistillationObjective([]), ["every loss weight is 0"], id="no term"),
        pytest.param(
            lambda: DistillationObjective([HiddenTerm(), HiddenTerm(layers="last")]),
            ["loss terms share a name: ['hidden_loss', 'hidden_loss']", "HiddenTerm(name='hidden_loss_top')"],
            id="two terms with one name",
        ),
        pytest.param(
            lambda: DistillationObjective([TaskTerm()])(some_signals(), labels=torch.zeros(2)),
            ["does not know its models yet", "call objective.bind(student.config, teacher.config) first"],
            id="not bound",
        ),
        pytest.param(
            lambda: bound(LogitTerm())(some_signals()),
            ["logit_loss has weight 0.5, but there are no teacher signals"],
            id="no teacher signals",
        ),
        pytest.param(
            lambda: bound(LogitTerm())(some_signals(logits=torch.zeros(2, 4, 3)), some_signals()),
            ["logits of shape (2, 4, 3) do not fit single_label_classification", "problem=problem_of(student)"],
            id="logits of tokens",
        ),
        pytest.param(
            lambda: DistillationObjective([LogitTerm()]).bind(
                make_model(num_labels=2).config, make_model(num_labels=3).config
            ),
            ["logit_loss: the student has 2 labels and the teacher 3", "load the student with num_labels=3"],
            id="number of labels",
        ),
        pytest.param(
            lambda: HiddenTerm(type="kl"), ["hidden_loss_type='kl' must be one of 'mse', 'cosine'"], id="hidden type"
        ),
        pytest.param(
            lambda: AttentionTerm(weight=NAN, name="attention_top"),
            ["attention_top_weight=nan must be a finite number >= 0"],
            id="weight of a term",
        ),
    ],
)
def test_objective_cannot_compute(action, fragments):
    """A loop without the trainer would train on a term that is missing or compares nothing."""
    assert_refused(action, *fragments)


# Students that cannot be made


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"layers": [4, 2]}, ["layers=[4, 2] must be ascending", "counted from 1 to 4", "for example [2, 4]"]),
        ({"layers": [2, 2]}, ["layers=[2, 2] must be ascending", "for example [2, 4]"]),
        ({"layers": [0, 2]}, ["layers=[0, 2] must be ascending blocks of the teacher, counted from 1 to 4"]),
        ({"layers": [2, 5]}, ["layers=[2, 5] must be ascending blocks of the teacher, counted from 1 to 4"]),
        ({"layers": []}, ["layers=[] must be ascending blocks of the teacher, counted from 1 to 4"]),
        ({"layers": [1, 2], "num_layers": 3}, ["layers=[1, 2] and num_layers=3 contradict each other; give one"]),
        ({"num_layers": 0}, ["num_layers=0 must be between 1 and the teacher's 4"]),
        ({"num_layers": 6}, ["num_layers=6 must be between 1 and the teacher's 4"]),
        ({"hidden_size": 64}, ["hidden_size=64 must be between 1 and the teacher's 32"]),
        ({"intermediate_size": 0}, ["intermediate_size=0 must be between 1 and the teacher's 64"]),
        ({"num_attention_heads": 8}, ["num_attention_heads=8 must be between 1 and the teacher's 4"]),
        ({"hidden_size": 30}, ["num_attention_heads=4 does not divide hidden_size=30", "give a divisor"]),
        ({"num_attention_heads": 3}, ["num_attention_heads=3 does not divide hidden_size=32", "give a divisor"]),
    ],
    ids=str,
)
def test_student_cannot_be_made(teacher, changes, fragments):
    """The student would have other layers or another size than the run is named after."""
    assert_refused(lambda: student_from_teacher(teacher, **changes), *fragments)


def test_student_of_an_unknown_family():
    """Its blocks would not be found, and the student keep random ones."""
    teacher = make_model("convbert")
    assert_refused(lambda: student_from_teacher(teacher, num_layers=2), "model type 'convbert'", "albert, bert")


def test_labels_that_the_model_does_not_have():
    """The classes would get other names than they were trained with."""
    model = make_model(num_labels=2, **labels_of("no", "yes"))
    before = weights(model)
    assert_refused(lambda: reorder_labels(model, ["yes", "maybe"]), "['yes', 'maybe'] and ['no', 'yes']")
    assert torch.equal(weights(model), before)
    assert model.config.id2label == {0: "no", 1: "yes"}


# What a recipe is given


@dataclass
class Arguments:
    output_dir: str = "out"
    learning_rate: float = 1e-3


@pytest.mark.parametrize(
    ("content", "fragments"),
    [
        (b"learning_rat: 5e-5\n", ["sets 'learning_rat', which is no argument; did you mean 'learning_rate'?"]),
        (b"xyzzy: 1\n", ["sets 'xyzzy', which is no argument; `--help` lists the arguments."]),
        (b"learning_rate: 1e-4\nweight_decay: 0.1\n", ["sets 'weight_decay', which is no argument"]),
        (b"- learning_rate\n", ["must hold lines `argument: value`, but holds list"]),
        (b"", ["must hold lines `argument: value`, but holds NoneType"]),
        (b"1: 2\n", ["must hold lines `argument: value`"]),
        (b"learning_rate: [1\noutput_dir: x\n", ["cannot be read", "line 2"]),
        (b"output_dir: \xff\n", ["cannot be read", "utf-8"]),
        (b"output_dir: !!python/object/apply:os.getcwd []\n", ["cannot be read", "python/object/apply:os.getcwd"]),
        (None, ["cannot be read", "No such file or directory"]),
    ],
    ids=[
        "misspelt",
        "unknown",
        "of others",
        "list",
        "empty",
        "number as key",
        "broken",
        "not text",
        "code",
        "missing",
    ],
)
def test_recipe_configuration_cannot_be_read(tmp_path, content, fragments):
    """A misspelt line would leave the default in place, and the results file would name a setting that nobody used."""
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_bytes(content)
    assert_refused(lambda: parse_args((Arguments,), [str(path)]), f"the configuration {path}", *fragments)


def test_unknown_flag():
    """A misspelt flag would leave the default in place."""
    assert_refused(lambda: parse_args((Arguments,), ["--weight_decay", "0.1"]), "--weight_decay")


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({}, ["task_name=None, train_file=None, validation_file=None", "give --task_name"]),
        ({"task_name": "sst-2"}, ["task_name='sst-2' must be one of", "sst2"]),
        ({"task_name": "sst2", "train_file": "a.csv"}, ["task_name='sst2', train_file='a.csv'", "give --task_name"]),
        ({"train_file": "a.csv"}, ["needs both files", "--validation_file"]),
        ({"task_name": "sst2", "max_seq_length": 2}, ["max_seq_length=2 must be at least 3"]),
        ({"task_name": "sst2", "max_train_samples": 0}, ["max_train_samples=0 must be at least 1"]),
    ],
    ids=str,
)
def test_recipe_data_arguments(changes, fragments):
    """The recipe would train on other data than was meant, or fail after the models are loaded."""
    assert_refused(lambda: DataArguments(**changes), *fragments)
