"""Which problem a model solves, read from its class and config."""

from typing import Any, Literal, get_args


ProblemType = Literal[
    "single_label_classification",
    "multi_label_classification",
    "regression",
    "token_classification",
    "question_answering",
    "masked_lm",
]
PROBLEM_TYPES: tuple[ProblemType, ...] = get_args(ProblemType)
# One answer per row, whatever its tokens are.
SEQUENCE_PROBLEMS: tuple[ProblemType, ...] = PROBLEM_TYPES[:3]

_HEADS: dict[str, ProblemType] = {
    "ForTokenClassification": "token_classification",
    "ForQuestionAnswering": "question_answering",
    "ForMaskedLM": "masked_lm",
}
_OTHER_HEADS = ("ForMultipleChoice", "ForNextSentencePrediction", "ForPreTraining", "ForCausalLM", "LMHeadModel")


def has_classes(problem: ProblemType) -> bool:
    """Whether the logits are of the labels that the config names, and not of positions or tokens."""
    return problem in (*SEQUENCE_PROBLEMS, "token_classification")


def problem_of(model: Any) -> ProblemType:
    """The problem that a model solves.

    Token classification, question answering and masked language modelling are told by the name of the class
    (`BertForTokenClassification`); every other model is taken to classify sequences, see [`sequence_problem`].

    Raises:
        ValueError: If its head is of a kind that cannot be distilled.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT
    names = [cls.__name__ for cls in type(model).__mro__]  # a user's subclass has another name
    for suffix, problem in _HEADS.items():
        if any(name.endswith(suffix) for name in names):
            return problem
    has_no_head = type(model).__module__.startswith("transformers.") and "For" not in names[0]
    if has_no_head or any(name.endswith(_OTHER_HEADS) for name in names):
        raise ValueError(
            f"{names[0]} cannot be distilled; load the model with AutoModelForSequenceClassification, "
            "AutoModelForTokenClassification, AutoModelForQuestionAnswering or AutoModelForMaskedLM."
        )
    return sequence_problem(model.config)


def sequence_problem(config: Any) -> ProblemType:
    """The problem of a sequence classification model, by `problem_type` and, where that is not set, `num_labels`:
    one logit is a value, several are classes of which one is right.

    Raises:
        ValueError: If the two contradict each other.
    """
    default: ProblemType = "regression" if config.num_labels == 1 else "single_label_classification"
    problem = config.problem_type or default
    if problem not in (default, "multi_label_classification"):
        raise ValueError(
            f"problem_type={problem!r} with num_labels={config.num_labels} cannot be distilled; use "
            "'single_label_classification' (num_labels >= 2), 'multi_label_classification', or 'regression' of one "
            "value (num_labels=1)."
        )
    return problem
