"""Which problem a model is taken to solve, and which parts of a batch count for it."""

import pytest
import torch
from conftest import DISTILBERT, SHAPE, VOCAB, make_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForNextSentencePrediction,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertForTokenClassification,
)

from hf_kd.signals import count_items, labels_of, problem_of
from hf_kd.signals.batch import predicted_tokens
from hf_kd.signals.problem import PROBLEM_TYPES, sequence_problem


MODEL_CLASSES = {
    "single_label_classification": AutoModelForSequenceClassification,
    "token_classification": AutoModelForTokenClassification,
    "question_answering": AutoModelForQuestionAnswering,
    "masked_lm": AutoModelForMaskedLM,
}


def make(auto_class, family="bert", **changes):
    shape = DISTILBERT if family == "distilbert" else SHAPE
    return auto_class.from_config(AutoConfig.for_model(family, vocab_size=len(VOCAB), **{**shape, **changes}))


# Which problem


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta"])
@pytest.mark.parametrize("problem", MODEL_CLASSES)
def test_the_head_tells_the_problem(family, problem):
    """Taken for another problem, the logits are compared over the wrong axis."""
    assert problem_of(make(MODEL_CLASSES[problem], family)) == problem


@pytest.mark.parametrize("problem", PROBLEM_TYPES)
def test_the_config_of_another_head_tells_nothing(problem):
    """A config keeps its `problem_type` through every head: a tagger made of a regression model is a tagger."""
    model = make_model(problem=problem)
    if problem in MODEL_CLASSES and problem != "single_label_classification":
        model.config.problem_type = "regression"
    assert problem_of(model) == problem


def test_a_subclass_solves_what_its_parent_solves():
    """A model class of the user's own has any name."""

    class Tagger(BertForTokenClassification):
        pass

    assert problem_of(Tagger(AutoConfig.for_model("bert", vocab_size=len(VOCAB), **SHAPE))) == "token_classification"


def test_an_adapter_solves_what_its_model_solves():
    """PEFT's wrapper is of a class of its own, and calls the encoder of the model its base model."""

    class Wrapper(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.config = model, model.config

        def get_base_model(self):
            return self.model

    for problem in PROBLEM_TYPES:
        assert problem_of(Wrapper(make_model(problem=problem))) == problem


@pytest.mark.parametrize(
    "auto_class",
    [AutoModelForMultipleChoice, AutoModelForNextSentencePrediction, AutoModelForPreTraining, AutoModelForCausalLM],
)
def test_refuses_heads_that_it_does_not_know(auto_class):
    """Their logits mean something else: choices between rows, or the next token."""
    with pytest.raises(ValueError, match="cannot be distilled.*AutoModelForSequenceClassification"):
        problem_of(make(auto_class, is_decoder=auto_class is AutoModelForCausalLM))


@pytest.mark.parametrize(
    ("num_labels", "problem_type", "expected"),
    [
        (1, None, "regression"),
        (1, "regression", "regression"),
        (1, "multi_label_classification", "multi_label_classification"),
        (2, None, "single_label_classification"),
        (3, "single_label_classification", "single_label_classification"),
        (3, "multi_label_classification", "multi_label_classification"),
    ],
)
def test_a_sequence_problem_follows_from_the_config(num_labels, problem_type, expected):
    """One logit under a softmax is always 1."""
    config = AutoConfig.for_model("bert", num_labels=num_labels, problem_type=problem_type)
    assert sequence_problem(config) == expected


@pytest.mark.parametrize(("num_labels", "problem_type"), [(3, "regression"), (1, "single_label_classification")])
def test_refuses_a_config_that_contradicts_itself(num_labels, problem_type):
    """A class of one, or several values, would be trained by the loss of something else."""
    config = AutoConfig.for_model("bert", num_labels=num_labels)
    config.problem_type = problem_type  # transformers 5 refuses one of the two itself when it is made
    with pytest.raises(ValueError, match=f"problem_type='{problem_type}' with num_labels={num_labels} .*; use "):
        sequence_problem(config)


def test_a_model_without_a_head():
    """It has no logits, which would be said in the first step."""
    with pytest.raises(ValueError, match="BertModel cannot be distilled; load the model with AutoModelForSequence"):
        problem_of(make(AutoModel))


# What counts


MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])
INPUTS = {"input_ids": MASK, "attention_mask": MASK}
TOKEN_LABELS = torch.tensor([[-100, 2, 0, -100], [-100] * 4, [1, -100, -100, -100]])


@pytest.mark.parametrize(
    ("problem", "labels", "predictions", "num_labels"),
    [
        ("single_label_classification", {"labels": torch.tensor([1, -100, 0])}, 3, 2),
        ("regression", {"labels": torch.tensor([1.5, -100.0, -100.0])}, 3, 1),
        ("multi_label_classification", {"labels": torch.tensor([[1.0, 0], [-100, 1], [-100, -100]])}, 3, 3),
        ("token_classification", {"labels": TOKEN_LABELS}, 2 + 2 + 1, 3),
        ("token_classification", {}, 9, 0),
        ("masked_lm", {"labels": TOKEN_LABELS}, 3, 3),
        (
            "question_answering",
            {"start_positions": torch.tensor([0, 4, -100]), "end_positions": torch.tensor([3, 9, 1])},
            6,
            3,
        ),
        ("question_answering", {}, 6, 0),
    ],
)
def test_counts_what_each_term_is_averaged_over(problem, labels, predictions, num_labels):
    """Counts that differ from what a loss sums over scale the term by batch size, length or labels."""
    counts = count_items({**INPUTS, **labels}, problem)
    assert tuple(map(int, counts)) == (3, predictions, num_labels, 9, 16 + 4 + 9)


def test_without_a_mask_all_positions_count():
    """As they do for the model, whether it is given tokens or their embeddings."""
    for inputs in ({"input_ids": MASK}, {"inputs_embeds": torch.zeros(3, 4, 8)}):
        assert tuple(map(int, count_items(inputs, "token_classification"))) == (3, 12, 0, 12, 48)


def test_labels_of_answers():
    """An answer that truncation cut off has a position outside the sequence, which is no class of the softmax."""
    starts, ends = torch.tensor([0, 4, -100]), torch.tensor([3, 9, 1])
    expected = [[0, 3], [-100, -100], [-100, 1]]
    for shape in ((3,), (3, 1)):  # a column of lists of one is what some preprocessing makes
        inputs = {**INPUTS, "start_positions": starts.view(shape), "end_positions": ends.view(shape)}
        assert labels_of(inputs, "question_answering").tolist() == expected
    assert labels_of({**INPUTS, "start_positions": starts}, "question_answering") is None
    assert labels_of(INPUTS, "question_answering") is None


@pytest.mark.parametrize("problem", [problem for problem in PROBLEM_TYPES if problem != "question_answering"])
def test_labels_of_all_other_problems(problem):
    """The column as it is, or nothing."""
    assert labels_of({**INPUTS, "labels": TOKEN_LABELS}, problem) is TOKEN_LABELS
    assert labels_of(INPUTS, problem) is None


def test_predicted_tokens():
    """[CLS], padding and second parts of a word would be learned as if they were words."""
    row_by_row = predicted_tokens("token_classification", MASK, TOKEN_LABELS)
    assert row_by_row.tolist() == [[False, True, True, False], [True, True, False, False], [True, *[False] * 3]]
    assert torch.equal(predicted_tokens("token_classification", MASK, None), MASK.bool())
    assert torch.equal(predicted_tokens("masked_lm", MASK, TOKEN_LABELS), TOKEN_LABELS != -100)


def test_masked_lm_needs_to_know_what_is_masked():
    """Without it the terms would be averaged over tokens that the model can read; text alone is for the layers."""
    with pytest.raises(ValueError, match=r"at the masked tokens.*DataCollatorForLanguageModeling\(tokenizer\)"):
        predicted_tokens("masked_lm", MASK, None)
    assert count_items(INPUTS, "masked_lm").predictions == 0
    with pytest.raises(ValueError, match=r"\(3,\) do not fit tokens of shape \(3, 4\)"):
        count_items({**INPUTS, "labels": torch.tensor([1, 0, 1])}, "token_classification")
