"""Tiny models made from configs, and generated batches; nothing is downloaded."""

import copy
import os
import random


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertTokenizerFast,
    DataCollatorWithPadding,
    set_seed,
)

from hf_kd import DistillationTrainingArguments


VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(59))]

# Sizes of one tiny model in the words of each family; no dropout, so that runs can be compared.
SHAPE = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
DISTILBERT = {"dim": 32, "n_layers": 4, "n_heads": 4, "hidden_dim": 64, "dropout": 0.0, "attention_dropout": 0.0}
# What a family needs besides: special tokens of VOCAB, windows shorter than the rows, the parts its checkpoints have.
FAMILY_CHANGES = {
    "albert": {"embedding_size": 16, "classifier_dropout_prob": 0.0},
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "deberta-v2": {
        "relative_attention": True,
        "position_buckets": 4,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "pos_att_type": ["p2c", "c2p"],
    },
    "modernbert": {"local_attention": 4, "bos_token_id": 2, "cls_token_id": 2, "eos_token_id": 3, "sep_token_id": 3},
}
MODEL_CLASSES = {
    "single_label_classification": AutoModelForSequenceClassification,
    "multi_label_classification": AutoModelForSequenceClassification,
    "regression": AutoModelForSequenceClassification,
    "token_classification": AutoModelForTokenClassification,
    "question_answering": AutoModelForQuestionAnswering,
    "masked_lm": AutoModelForMaskedLM,
}
PROBLEM_CHANGES = {
    "multi_label_classification": {"problem_type": "multi_label_classification", "num_labels": 3},
    "regression": {"problem_type": "regression", "num_labels": 1},
    "token_classification": {"num_labels": 3},
}


def make_model(family="bert", seed=0, problem="single_label_classification", **changes):
    """A tiny model for a problem with random weights, the same ones for the same seed."""
    shape = dict(DISTILBERT if family == "distilbert" else {**SHAPE, **NO_DROPOUT})
    names = {"num_hidden_layers": "n_layers", "hidden_size": "dim", "num_attention_heads": "n_heads"}
    for name, value in {**FAMILY_CHANGES.get(family, {}), **PROBLEM_CHANGES.get(problem, {}), **changes}.items():
        shape[names.get(name, name) if family == "distilbert" else name] = value
    common = {"vocab_size": len(VOCAB), "max_position_embeddings": 80, "pad_token_id": 0}
    set_seed(seed)
    model = MODEL_CLASSES[problem].from_config(AutoConfig.for_model(family, **{**common, **shape}))
    # The usual initialisation leaves a tiny model's logits near 0: make them differ between rows.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8.0)
    return model.eval()


def make_rows(num_rows=24, seed=0, num_labels=2, unlabeled_share=0.0, pairs=False, lengths=(3, 14)):
    """Rows of input_ids, attention_mask, token_type_ids and labels, of ragged lengths."""
    rng = random.Random(seed)
    rows = []
    for _ in range(num_rows):
        length = rng.randint(*lengths)
        label = rng.uniform(0, 5) if num_labels == 1 else rng.randrange(num_labels)
        rows.append(
            {
                "input_ids": [2, *(rng.randrange(5, len(VOCAB)) for _ in range(length)), 3],
                "token_type_ids": [int(pairs and i > length // 2) for i in range(length + 2)],
                "attention_mask": [1] * (length + 2),
                "labels": (-100.0 if num_labels == 1 else -100) if rng.random() < unlabeled_share else label,
            }
        )
    return rows


def make_dataset(*args, **kwargs):
    return Dataset.from_list(make_rows(*args, **kwargs))


@pytest.fixture(autouse=True)
def own_environment():
    """TrainingArguments hand precision and compilation to accelerate through the environment, for good."""
    before = {name: value for name, value in os.environ.items() if name.startswith("ACCELERATE_")}
    yield
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """A WordPiece tokenizer of words w0 to w58."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "vocab.txt").write_text("\n".join(VOCAB), encoding="utf-8")
    tokenizer = BertTokenizerFast.from_pretrained(folder, model_max_length=80)
    assert tokenizer.convert_tokens_to_ids("w0") == 5
    return tokenizer


@pytest.fixture
def collator(tokenizer):
    return DataCollatorWithPadding(tokenizer)


@pytest.fixture
def make_args(tmp_path):
    """Training arguments for a short run on the CPU that writes into tmp_path."""

    def make(cls=DistillationTrainingArguments, **changes):
        defaults = {
            "output_dir": str(tmp_path / "out"),
            "use_cpu": True,
            "per_device_train_batch_size": 8,
            "max_steps": 4,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
        }
        return cls(**{**defaults, **changes})

    return make


@pytest.fixture
def teacher():
    return make_model(seed=1)


@pytest.fixture
def student():
    return make_model(seed=2, num_hidden_layers=2)


def weights(model):
    """All weights as one vector."""
    return torch.cat([p.detach().float().flatten() for p in model.parameters()])


def copy_of(model):
    return copy.deepcopy(model)
