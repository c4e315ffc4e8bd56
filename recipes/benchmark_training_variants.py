"""What `benchmark_training.py` compares: ways to train a student, on rows of which lengths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from hf_kd.signals.layers import layer_pairs


TEMPERATURE = 2.0
# Tokens to rows of SST-2's training set, 67,349 in all: the tokenizer of bert-base-uncased, [CLS] and [SEP] included.
# fmt: off
SST2_LENGTHS = {
    3: 1978, 4: 5322, 5: 6065, 6: 5345, 7: 4749, 8: 4155, 9: 3713, 10: 3267, 11: 2947, 12: 2650, 13: 2413, 14: 2138,
    15: 1950, 16: 1777, 17: 1661, 18: 1515, 19: 1373, 20: 1285, 21: 1132, 22: 1106, 23: 1046, 24: 909, 25: 820,
    26: 806, 27: 733, 28: 692, 29: 628, 30: 538, 31: 491, 32: 442, 33: 448, 34: 400, 35: 337, 36: 304, 37: 286,
    38: 242, 39: 195, 40: 203, 41: 192, 42: 155, 43: 148, 44: 130, 45: 89, 46: 82, 47: 85, 48: 73, 49: 55, 50: 42,
    51: 50, 52: 40, 53: 36, 54: 19, 55: 21, 56: 22, 57: 15, 58: 8, 59: 6, 60: 3, 61: 2, 62: 5, 63: 5, 64: 1, 65: 2,
    66: 2,
}
# fmt: on
TASK = {"task_loss_weight": 1.0, "logit_loss_weight": 0.0}
LOGITS = {"task_loss_weight": 0.1, "logit_loss_weight": 0.9, "temperature": TEMPERATURE}
LAYERS = {**LOGITS, "hidden_loss_weight": 1.0, "attention_loss_weight": 1.0, "layer_mapping": "uniform"}
RELATION = {"relation_loss_weight": 1.0, "relation_loss_type": "minilm_v2", "relation_layer_mapping": "last"}


@dataclass(frozen=True)
class Variant:
    """
    One way to train the student.

    Args:
        base (`str`): Its name without modifiers.
        trainer (`str`): `"finetune"`, `"limit"` (fine-tuning, and a teacher whose result nobody uses), `"distil"` or
            `"naive"`.
        terms (`dict`): The terms, as [`DistillationTrainingArguments`] has them.
        cached (`bool`): Whether the terms read the teacher from disk.
        grouped (`bool`): Whether batches are grouped by length.
        frozen (`bool`): Whether the student's embeddings are frozen.
        padded (`bool`): Whether batches are padded to the maximum rather than to their longest row.
    """

    base: str
    trainer: Literal["finetune", "limit", "distil", "naive"]
    terms: dict[str, Any] = field(default_factory=lambda: TASK)
    cached: bool = False
    grouped: bool = False
    frozen: bool = False
    padded: bool = False

    @property
    def name(self) -> str:
        """The base and its modifiers, in one order."""
        return "+".join([self.base, *(modifier for modifier in MODIFIERS if getattr(self, modifier))])


MODIFIERS = ("padded", "grouped", "frozen")
VARIANTS = {
    variant.base: variant
    for variant in (
        Variant("finetune", "finetune"),
        Variant("limit", "limit"),
        Variant("online_logits", "distil", LOGITS),
        Variant("online_layers", "distil", LAYERS),
        Variant("online_layers_relations", "distil", {**LAYERS, **RELATION}),
        Variant("cached_logits", "distil", LOGITS, cached=True),
        # Hidden states, queries, keys and values of the teacher's last layer.
        Variant(
            "cached_layer", "distil", {**LOGITS, **RELATION, "hidden_loss_weight": 1.0, "layer_mapping": "last"}, True
        ),
        Variant("naive", "naive"),
    )
}
GROUPED = ("finetune", "online_layers", "cached_logits", "cached_layer")  # what is also measured grouped by length
# What others are compared with: each row has the ratios to those of them that are measured beside it.
REFERENCES = ("finetune", "limit", "online_layers", "naive", "naive+padded")


def read_variant(name: str) -> Variant:
    """The variant of a name such as `cached_logits+grouped+frozen`."""
    base, *modifiers = name.split("+")
    if base not in VARIANTS or not set(modifiers) <= set(MODIFIERS):
        raise ValueError(
            f"--variants {name} is not known; choose from {', '.join(VARIANTS)}, each with any of "
            f"+{', +'.join(MODIFIERS)}."
        )
    return replace(VARIANTS[base], **dict.fromkeys(modifiers, True))


def length_counts(length: str) -> dict[int, int]:
    """Tokens to number of rows, of which lengths are drawn."""
    if length == "sst2":
        return SST2_LENGTHS
    if not length.isdecimal() or int(length) < 3:
        raise ValueError(f"--lengths {length} must be 'sst2' or a number of tokens from 3.")
    return {int(length): 1}


class TeacherTrainer(Trainer):
    """A `Trainer` with a frozen teacher beside it, which runs in the same autocast.

    Args:
        teacher_model ([`~transformers.PreTrainedModel`]): The teacher; changed in place.
    """

    def __init__(self, *args: Any, teacher_model: PreTrainedModel, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.teacher = teacher_model.to(self.args.device).eval().requires_grad_(False)

    def run_teacher(self, inputs: Mapping[str, Any], **kwargs: Any) -> Any:
        with torch.no_grad(), self.accelerator.autocast():
            return self.teacher(**{name: value for name, value in inputs.items() if name != "labels"}, **kwargs)


class LimitTrainer(TeacherTrainer):
    """Fine-tuning beside a teacher whose result nobody uses: distilling online cannot cost less."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.args.bf16:
            cast_linear_layers(self.teacher)

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.run_teacher(inputs)
        return super().compute_loss(model, inputs, *args, **kwargs)


def cast_linear_layers(model: nn.Module) -> None:
    """Put linear layers in bfloat16 in place, which autocast would do anew in each forward of a frozen model."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.to(torch.bfloat16)


class NaiveTrainer(TeacherTrainer):
    """What tutorials show: both models return every hidden state and attention map, and all mapped ones are
    compared."""

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        everything = {"output_hidden_states": True, "output_attentions": True}
        student, teacher = model(**inputs, **everything), self.run_teacher(inputs, **everything)
        soft = F.kl_div(
            F.log_softmax(student.logits / TEMPERATURE, dim=-1),
            F.softmax(teacher.logits / TEMPERATURE, dim=-1),
            reduction="batchmean",
        )
        loss: Tensor = 0.1 * student.loss + 0.9 * TEMPERATURE**2 * soft
        for pair in layer_pairs("uniform", len(student.attentions), len(teacher.attentions)):
            loss = loss + F.mse_loss(student.hidden_states[pair.student], teacher.hidden_states[pair.teacher])
            loss = loss + F.mse_loss(student.attentions[pair.student - 1], teacher.attentions[pair.teacher - 1])
        return (loss, student) if return_outputs else loss
