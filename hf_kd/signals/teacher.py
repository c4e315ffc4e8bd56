"""The teachers: frozen, run now, read in the student's terms."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from ..checkpoint import has_tokenizer, load_finetuned
from .batch import LABEL_COLUMNS, Signals
from .capture import Capture, Wanted, columns_for, forward_columns
from .problem import has_classes, problem_of


logger = logging.get_logger(__name__)

# accelerate's names of what a run's autocast computes in.
AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Columns of a batch that are a teacher's alone, made by its own tokenizer.
OWN_PREFIX = "teacher_"


class Teacher:
    """A frozen model that gives the signals a student learns from.

    The model is put in eval mode and stops requiring gradients; its weights never change. It is not a
    `torch.nn.Module`, so it gets into no optimizer, wrapper or checkpoint.

    Args:
        model ([`~transformers.PreTrainedModel`]): The teacher.
        student_config ([`~transformers.PretrainedConfig`]): The student's config, in whose label order the logits are
            given.
        dtype (`str`, *optional*): `"float32"`, `"bfloat16"` or `"float16"`. By default the dtype it has, under the
            run's autocast.
        autocast_dtype (`torch.dtype`, *optional*): Run under autocast to this, if there is no `dtype`. What runs is a
            copy whose linear layers have weights in it: the numbers are the same, and autocast does not cast frozen
            weights anew in each forward.
        device (`torch.device`, *optional*): Where to put the teacher. By default it stays where it is.
        reads_own_tokens (`bool`, *optional*, defaults to `False`):
            Whether its inputs are the `teacher_` columns of the batch, see [`~hf_kd.DistillationCollator`].

        notes_weights (`bool`, *optional*, defaults to `True`):
            Whether to hash the weights before a copy in another dtype is made, which a cache is compared with.

    Raises:
        ValueError: If the vocabularies or labels of student and teacher do not fit.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        student_config: Any,
        dtype: str | None = None,
        device: torch.device | None = None,
        reads_own_tokens: bool = False,
        autocast_dtype: torch.dtype | None = None,
        notes_weights: bool = True,
    ):
        self.reads_own_tokens = reads_own_tokens
        if not reads_own_tokens:
            check_vocabulary(student_config, model.config)
        order = label_order(student_config, model.config) if has_classes(problem_of(model)) else None
        self._weights: str | None = None
        is_spread = getattr(model, "hf_device_map", None) is not None
        if dtype is not None:
            makes_copy = model.dtype != DTYPES[dtype]
        else:
            makes_copy = autocast_dtype is not None and not is_spread and not getattr(model, "is_quantized", False)
        if makes_copy:
            # The caller's model keeps its weights as they are.
            self._weights = weights_hash(model) if notes_weights else ""
            model = copy.deepcopy(model)
            if dtype is not None:
                model.to(DTYPES[dtype])
            else:
                _cast_linear_layers(model, autocast_dtype)
        self.model = model.eval().requires_grad_(False)
        if device is not None and not is_spread:
            self.model.to(device)
        self.label_order = None if order is None else torch.tensor(order, device=self.model.device)
        self._forward_columns = forward_columns(model)
        self._run: Any = self.model
        self.capture = Capture(model, Wanted())
        self._own_precision: dict[str, Any] | None = None
        if dtype is not None:
            self._own_precision = {"enabled": False}
        elif autocast_dtype is not None:
            self._own_precision = {"dtype": autocast_dtype}

    @property
    def config(self) -> Any:
        """The model's config, as [`DistillationObjective.bind`] takes it."""
        return self.model.config

    @property
    def columns(self) -> set[str]:
        """Names of the columns of a batch that it reads."""
        prefix = OWN_PREFIX if self.reads_own_tokens else ""
        return {f"{prefix}{name}" for name in self._forward_columns or ()}

    @property
    def weights(self) -> str:
        """The [`weights_hash`] of the model it was given."""
        if self._weights is None:
            self._weights = weights_hash(self.model)
        return self._weights

    def watch(self, wanted: Wanted) -> None:
        """Read these intermediate signals besides the logits from now on."""
        self.capture = Capture(self.model, wanted)

    def compile(self, **options: Any) -> None:
        """Run through `torch.compile` with these options from now on."""
        self._run = torch.compile(self.model, **options)

    def shard(self) -> None:
        """Spread the weights over all processes (FSDP2): each holds its share, and all of a block only while it runs.

        From then on the processes run the teacher together. The model it was given is changed in place.
        """
        from torch.distributed.fsdp import fully_shard

        self._weights = self.weights  # of the whole
        lists = [module for module in self.model.modules() if isinstance(module, nn.ModuleList)]
        blocks = [block for blocks in lists for block in blocks if not isinstance(block, nn.ModuleList)]
        for module in (*reversed(blocks), self.model):  # inner ones before those that hold them
            fully_shard(module, reshard_after_forward=True)

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Any]) -> Signals:
        """Run the teacher.

        Args:
            inputs (`Mapping[str, Any]`): A batch on the teacher's device; columns that its `forward` does not declare
                are left out.

        Returns:
            [`Signals`]: Without gradient, the logits in the student's label order.

        Raises:
            ValueError: If the teacher reads tokens of its own and the batch has none.
        """
        if self.reads_own_tokens:
            if f"{OWN_PREFIX}input_ids" not in inputs:
                raise ValueError(
                    f"the teacher reads the column {OWN_PREFIX}input_ids, but the batch has {sorted(inputs)}; use "
                    "data_collator=DistillationCollator(tokenizer, teacher_tokenizer, text_columns=[...]), and keep "
                    "the text columns in the dataset."
                )
            inputs = {
                name.removeprefix(OWN_PREFIX): value for name, value in inputs.items() if name.startswith(OWN_PREFIX)
            }
        inputs = columns_for(
            self._forward_columns, {name: value for name, value in inputs.items() if name not in LABEL_COLUMNS}
        )
        own_precision = (
            contextlib.nullcontext()
            if self._own_precision is None
            else torch.autocast(self.model.device.type, **self._own_precision)
        )
        with own_precision, self.capture:
            outputs = self._run(**inputs, **self.capture.forward_kwargs)
        signals = self.capture.signals(outputs, inputs)
        if self._run is not self.model:
            # What a CUDA graph returns is overwritten by the next compiled model that runs, the student.
            signals.logits = signals.logits.clone()
        if self.label_order is not None:
            signals.logits = signals.logits[..., self.label_order]
        return signals


class TeacherEnsemble:
    """Several teachers of one student.

    Args:
        teachers (sequence of [`Teacher`], or of what reads cached signals): At least one.
    """

    def __init__(self, teachers: Sequence[Any]):
        self.teachers = list(teachers)

    @property
    def config(self) -> list[Any]:
        """Their configs, as [`DistillationObjective.bind`] takes them."""
        return [teacher.config for teacher in self.teachers]

    @property
    def columns(self) -> set[str]:
        """Names of the columns of a batch that any of them reads."""
        return set().union(*(teacher.columns for teacher in self.teachers))

    def watch(self, wanted: Wanted | Sequence[Wanted]) -> None:
        """Read these intermediate signals besides the logits from now on, of each teacher its own."""
        wanted = [wanted] if isinstance(wanted, Wanted) else wanted
        for teacher, of_teacher in zip(self.teachers, wanted, strict=True):
            teacher.watch(of_teacher)

    def __call__(self, inputs: Mapping[str, Any]) -> list[Signals]:
        """Run each teacher on a batch."""
        return [teacher(inputs) for teacher in self.teachers]


def _cast_linear_layers(model: PreTrainedModel, dtype: torch.dtype | None) -> None:
    # A decoder may share its weights with the embeddings, which autocast leaves as they are.
    shared = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for module in model.modules():
        if type(module) is nn.Linear and id(module.weight) not in shared:
            module.to(dtype)


def weights_hash(model: nn.Module) -> str:
    """A hash of all weights, their names and dtypes, wherever they are: 32 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def load_teacher(
    path: str | os.PathLike, revision: str | None = None, token: str | bool | None = None
) -> PreTrainedModel:
    """Load a fine-tuned model as the class that its config names, from safetensors, in the dtype it was saved in.

    Args:
        path (`str` or `Path`): Folder or Hub id.
        revision (`str`, *optional*): Branch, tag or commit of a Hub id.
        token (`str`, *optional*): For a private Hub id; by default that of HF_TOKEN, or of `hf auth login`.

    Returns:
        [`~transformers.PreTrainedModel`]: The teacher, as `teacher_model` of a [`DistillationTrainer`].

    Raises:
        ValueError: If there is no such model, it has no head, or the checkpoint lacks weights of the head.
    """
    return load_finetuned(path, argument="teacher_model", revision=revision, token=token)


def check_vocabulary(student_config: Any, teacher_config: Any) -> None:
    """Both models read the same `input_ids`, so they must number the same tokens.

    Raises:
        ValueError: If the vocabulary sizes differ.
    """
    if student_config.vocab_size != teacher_config.vocab_size:
        raise ValueError(
            f"the student ({student_config.model_type}) has a vocabulary of {student_config.vocab_size} tokens, the "
            f"teacher ({teacher_config.model_type}) one of {teacher_config.vocab_size}, but both read the same "
            "input_ids; take a student with the teacher's tokenizer, for example student_from_teacher(teacher, "
            "num_layers=3), or give each its own tokens with data_collator=DistillationCollator(tokenizer, "
            "teacher_tokenizer, text_columns=[...])."
        )


def load_teacher_tokenizer(
    path: str | os.PathLike, revision: str | None = None, token: str | bool | None = None
) -> Any | None:
    """The tokenizer saved with a teacher; `None` for a local folder without one."""
    if not has_tokenizer(path):
        return None
    try:
        return AutoTokenizer.from_pretrained(path, revision=revision or "main", token=token, trust_remote_code=False)
    except OSError as error:
        logger.warning(
            f"teacher_model={str(path)!r} has no tokenizer that its student's could be checked against: {error}"
        )
        return None


def check_tokenizers(student_tokenizer: Any, teacher_tokenizer: Any, reads_own_tokens: bool = False) -> None:
    """The same number of tokens is not yet the same tokens. Nothing is checked against `None`.

    Args:
        student_tokenizer ([`~transformers.PreTrainedTokenizerBase`]): What makes the teacher's inputs.
        teacher_tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): The one saved with the teacher.
        reads_own_tokens (`bool`, *optional*, defaults to `False`):
            Whether the first is not the student's tokenizer, but the one of a collator that is the teacher's alone.

    Raises:
        ValueError: If a token has different ids in the two tokenizers, with examples.
    """
    if teacher_tokenizer is None:
        return
    student_vocab, teacher_vocab = student_tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    if student_vocab != teacher_vocab:
        different = sorted(
            t for t in student_vocab.keys() | teacher_vocab.keys() if student_vocab.get(t) != teacher_vocab.get(t)
        )
        examples = ", ".join(f"{t!r}: {student_vocab.get(t)} and {teacher_vocab.get(t)}" for t in different[:3])
        if reads_own_tokens:
            raise ValueError(
                "the collator's teacher_tokenizer and the tokenizer saved with the teacher give different ids to "
                f"{len(different)} tokens ({examples}); use DistillationCollator(tokenizer, "
                "AutoTokenizer.from_pretrained(teacher))."
            )
        raise ValueError(
            f"student and teacher give different ids to {len(different)} tokens ({examples}), but both read the same "
            "input_ids; take a student that was made from the teacher or shares its tokenizer."
        )


def label_order(student_config: Any, teacher_config: Any) -> list[int] | None:
    """Index that puts the teacher's classes in the student's order, by label name; `None` if they are in order.

    Raises:
        ValueError: If the label names are not the same set.
    """
    student_labels, teacher_labels = _label_names(student_config), _label_names(teacher_config)
    if len(student_labels) == len(teacher_labels) == 1 or student_labels == teacher_labels:
        return None
    # Names that differ in case alone ("entailment", "ENTAILMENT") are the same label.
    folded = {name.casefold(): index for index, name in enumerate(teacher_labels)}
    if sorted(folded) != sorted(name.casefold() for name in student_labels) or len(folded) != len(teacher_labels):
        raise ValueError(
            f"the labels of student and teacher do not fit: {student_labels} and {teacher_labels}; load the student "
            "with the teacher's labels: from_pretrained(..., id2label=teacher.config.id2label, "
            "label2id=teacher.config.label2id)."
        )
    order = [folded[name.casefold()] for name in student_labels]
    return None if order == list(range(len(order))) else order


def _label_names(config: Any) -> list[str]:
    return [str(config.id2label[index]) for index in range(config.num_labels)]


def reorder_labels(model: PreTrainedModel, label_names: Sequence[str]) -> None:
    """Put the classes of a model in another order, in place: the rows of its last linear layer, and its label names.

    Args:
        model ([`~transformers.PreTrainedModel`]): A sequence classification model.
        label_names (sequence of `str`): The names in the wanted order.

    Raises:
        ValueError: If these are not the model's label names.
    """
    wanted = copy.copy(model.config)
    wanted.id2label = dict(enumerate(label_names))
    order = label_order(wanted, model.config)
    model.config.id2label = dict(enumerate(label_names))
    model.config.label2id = {name: index for index, name in enumerate(label_names)}
    if order is not None:
        head = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == len(label_names)][-1]
        with torch.no_grad():
            head.weight.copy_(head.weight[order])
            head.bias.copy_(head.bias[order])
