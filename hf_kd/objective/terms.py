"""The terms of an objective: what is compared, in which form, between which layers, with which weight."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from torch import Tensor, nn

from ..signals import Signals
from ..signals.layers import LayerMapping
from . import losses
from .losses.attention import HeadReduction
from .schedules import Schedule, read_schedule, read_temperature_schedule


LogitLossType = Literal["kl", "soft_ce", "reverse_kl", "js", "mse", "dist", "standardized_kl", "decoupled_kl"]
HiddenLossType = Literal["mse", "cosine", "pkd", "gram", "nst"]
AttentionLossType = Literal["mse", "kl", "cosine"]
RelationLossType = Literal["minilm_v2", "minilm_v1", "similarity", "rkd", "pkt", "correlation", "crd"]
TeacherReduction = Literal["probabilities", "logits"]

# What the Trainer logs under names of its own.
_LOGGED = {"loss", "grad_norm", "learning_rate", "epoch", "num_input_tokens_seen"}
# Set by the objective, not by the user of a term.
_OWN_ARGUMENTS = {"num_items", "class_mask", "reach", "head_reduction", "relation_heads"}


@dataclass(frozen=True)
class TaskTerm:
    """The loss against the labels, as the models of transformers compute it; what has no label (-100) is left out.

    For question answering it depends on the width of the batch: the models choose among padding, too.

    Args:
        weight (`float`, *optional*, defaults to 0.5): Factor of the term in the sum.
        label_smoothing (`float`, *optional*, defaults to 0.0): Share of probability spread over all classes.
        schedule (`str` or [`Schedule`], *optional*): Factor of the weight over training.
        name (`str`, *optional*, defaults to `"task_loss"`): Key of the term in the result and the logs.
    """

    weight: float = 0.5
    label_smoothing: float = 0.0
    schedule: str | Schedule | None = None
    name: str = "task_loss"

    def __post_init__(self) -> None:
        _check_term(self)
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(f"{self.name}: label_smoothing={self.label_smoothing} must be between 0 and 1.")


@dataclass(frozen=True)
class LogitTerm:
    """The loss against the teacher's logits, in the form that the problem has, see [`prediction_rows`].

    Args:
        weight (`float`, *optional*, defaults to 0.5): Factor of the term in the sum.
        type (`str`, *optional*):
            `"kl"`, `"soft_ce"`, `"reverse_kl"`, `"js"`, `"mse"`, `"dist"`, `"standardized_kl"` or `"decoupled_kl"`,
            see `losses`. By default `"kl"` for classes and `"mse"` for regression. `"dist"` compares the rows that one
            process has in one micro-batch with each other, so its value changes with their number.
        temperature (`float`, *optional*, defaults to 2.0): Softening of every type but `"mse"`, > 0.
        options (`dict`, *optional*):
            Further arguments of the type: `beta` of `"js"`, `target_weight` and `non_target_weight` of
            `"decoupled_kl"`, whose target is the label, or for rows without one the teacher's most likely class.
        teacher (`int`, *optional*): Index of the one teacher to learn from; by default all of them, averaged.
        teacher_weights (sequence of `float`, *optional*): Shares of several teachers; all alike by default.
        teacher_reduction (`str`, *optional*, defaults to `"probabilities"`):
            Mean of several teachers over their softened `"probabilities"`, or over their `"logits"`.
        schedule (`str` or [`Schedule`], *optional*): Factor of the weight over training.
        temperature_schedule (`str` or [`Schedule`], *optional*): Factor of the temperature over training.
        name (`str`, *optional*, defaults to `"logit_loss"`): Key of the term in the result and the logs.
    """

    weight: float = 0.5
    type: LogitLossType | None = None
    temperature: float = 2.0
    options: Mapping[str, Any] = field(default_factory=dict)
    teacher: int | None = None
    teacher_weights: Sequence[float] | None = None
    teacher_reduction: TeacherReduction = "probabilities"
    schedule: str | Schedule | None = None
    temperature_schedule: str | Schedule | None = None
    name: str = "logit_loss"

    def __post_init__(self) -> None:
        _check_term(self, LogitLossType)
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(
                f"{self.name}: temperature={self.temperature} must be a finite number > 0, usually 1 to 8."
            )
        if self.type == "mse" and read_temperature_schedule(self.temperature_schedule).kind != "constant":
            raise ValueError(
                f"{self.name}: type='mse' has no temperature, so nothing would read temperature_schedule="
                f"{self.temperature_schedule!r}; drop it."
            )
        read_temperature_schedule(self.temperature_schedule)
        _check_options(self, f"logit_{self.type or 'kl'}", reserved=frozenset({"temperature"}))
        if self.teacher_reduction not in get_args(TeacherReduction):
            raise ValueError(
                f"{self.name}: teacher_reduction={self.teacher_reduction!r} must be 'probabilities' or 'logits'."
            )
        if self.teacher_weights is not None:
            if not all(math.isfinite(weight) and weight > 0 for weight in self.teacher_weights):
                raise ValueError(
                    f"{self.name}: teacher_weights={list(self.teacher_weights)} must be finite numbers > 0, one per "
                    "teacher; leave a teacher out that has no weight."
                )
            if self.teacher is not None:
                raise ValueError(
                    f"{self.name}: teacher={self.teacher} is one teacher, so nothing would read teacher_weights="
                    f"{list(self.teacher_weights)}; drop one of them."
                )


@dataclass(frozen=True)
class HiddenTerm:
    """The loss against the teacher's hidden states, mean over the layer pairs.

    Args:
        weight (`float`, *optional*, defaults to 1.0): Factor of the term in the sum.
        type (`str`, *optional*, defaults to `"mse"`):
            `"mse"`, `"cosine"`, `"pkd"`, `"gram"` or `"nst"`, see `losses`. `"gram"` and `"nst"` relate each pair of
            layers to the next one of the map, and a single pair to itself.
        layers (`str` or list of pairs, *optional*, defaults to `"uniform"`): The layer map, see [`layer_pairs`].
        teacher (`int`, *optional*): Index of the teacher; needed if there are several.
        schedule (`str` or [`Schedule`], *optional*): Factor of the weight over training.
        name (`str`, *optional*, defaults to `"hidden_loss"`): Key of the term in the result and the logs.
    """

    weight: float = 1.0
    type: HiddenLossType = "mse"
    layers: LayerMapping = "uniform"
    teacher: int | None = None
    schedule: str | Schedule | None = None
    name: str = "hidden_loss"

    def __post_init__(self) -> None:
        _check_term(self, HiddenLossType)


@dataclass(frozen=True)
class AttentionTerm:
    """The loss against the teacher's attention, mean over the layer pairs.

    Args:
        weight (`float`, *optional*, defaults to 1.0): Factor of the term in the sum.
        type (`str`, *optional*, defaults to `"mse"`):
            `"mse"` between the scores before the softmax, `"kl"` or `"cosine"` between the distributions after it, see
            `losses`.
        layers (`str` or list of pairs, *optional*, defaults to `"uniform"`): The layer map, see [`layer_pairs`].
        head_reduction (`str`, *optional*): `"mean"` compares the mean over heads, whose numbers may then differ.
        teacher (`int`, *optional*): Index of the teacher; needed if there are several.
        schedule (`str` or [`Schedule`], *optional*): Factor of the weight over training.
        name (`str`, *optional*, defaults to `"attention_loss"`): Key of the term in the result and the logs.
    """

    weight: float = 1.0
    type: AttentionLossType = "mse"
    layers: LayerMapping = "uniform"
    head_reduction: HeadReduction | None = None
    teacher: int | None = None
    schedule: str | Schedule | None = None
    name: str = "attention_loss"

    def __post_init__(self) -> None:
        _check_term(self, AttentionLossType)
        if self.head_reduction not in (None, "mean"):
            raise ValueError(f"{self.name}: head_reduction={self.head_reduction!r} must be 'mean' or None.")


@dataclass(frozen=True)
class RelationTerm:
    """The loss against relations within the teacher, mean over the layer pairs: between the tokens of a row
    (`"minilm_v2"`, `"minilm_v1"`), or between the rows of a batch, by their [CLS] states (the other types).

    Relations between rows are those among the rows that one process has in one micro-batch, and with none of other
    processes or accumulation steps: the value changes with `per_device_train_batch_size`.

    Args:
        weight (`float`, *optional*, defaults to 1.0): Factor of the term in the sum.
        type (`str`, *optional*, defaults to `"minilm_v2"`):
            `"minilm_v2"`, `"minilm_v1"`, `"similarity"`, `"rkd"`, `"pkt"`, `"correlation"` or `"crd"`, see `losses`.
        layers (`str` or list of pairs, *optional*, defaults to `"last"`): The layer map, see [`layer_pairs`].
        relation_heads (`int`, *optional*):
            Number of relation heads of `"minilm_v2"`; by default as many as divide both widths and
            have 16 dimensions of the teacher or more.
        options (`dict`, *optional*): Further arguments of the type, such as `temperature` of `"crd"`.
        teacher (`int`, *optional*): Index of the teacher; needed if there are several.
        schedule (`str` or [`Schedule`], *optional*): Factor of the weight over training.
        name (`str`, *optional*, defaults to `"relation_loss"`): Key of the term in the result and the logs.
    """

    weight: float = 1.0
    type: RelationLossType = "minilm_v2"
    layers: LayerMapping = "last"
    relation_heads: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    teacher: int | None = None
    schedule: str | Schedule | None = None
    name: str = "relation_loss"

    def __post_init__(self) -> None:
        _check_term(self, RelationLossType)
        _check_options(self, f"relation_{self.type}")
        if self.relation_heads is not None and self.type != "minilm_v2":
            raise ValueError(
                f"{self.name}: relation_heads={self.relation_heads} is read by type='minilm_v2' alone, but the type "
                f"is {self.type!r}; drop it."
            )
        if self.relation_heads is not None and self.relation_heads < 1:
            raise ValueError(
                f"{self.name}: relation_heads={self.relation_heads} must be at least 1, usually 12 to 48."
            )

    @property
    def compares_tokens(self) -> bool:
        """Whether the relations are between tokens, by queries, keys and values, and not between rows."""
        return self.type in ("minilm_v2", "minilm_v1")


@dataclass(frozen=True)
class CustomTerm:
    """A loss of your own.

    ```python
    def confidence_gap(student, teacher, labels):
        return (student.logits.softmax(-1).amax(-1) - teacher.logits.softmax(-1).amax(-1)).square().mean()

    CustomTerm(confidence_gap, weight=0.1)
    ```

    Args:
        function (`Callable`):
            Takes the [`Signals`] of the student, those of the teacher and the labels (or `None`); returns a scalar,
            averaged over the rows. These are the rows that one process has in one micro-batch; the step's value is
            the mean over all of them, weighed by their rows.
        weight (`float`, *optional*, defaults to 1.0): Factor of the term in the sum.
        hidden_layers (`str` or list of pairs, *optional*): Layers whose hidden states the function reads.
        attention_layers (`str` or list of pairs, *optional*): Layers whose queries, keys and values it reads.
        teacher (`int`, *optional*): Index of the teacher; needed if there are several.
        schedule (`str` or [`Schedule`], *optional*): Factor of the weight over training.
        name (`str`, *optional*): Key of the term in the result and the logs; by default the function's name.
    """

    function: Callable[[Signals, Signals, Tensor | None], Tensor]
    weight: float = 1.0
    hidden_layers: LayerMapping | None = None
    attention_layers: LayerMapping | None = None
    teacher: int | None = None
    schedule: str | Schedule | None = None
    name: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or getattr(self.function, "__name__", "custom_loss"))
        _check_term(self)


Term = TaskTerm | LogitTerm | HiddenTerm | AttentionTerm | RelationTerm | CustomTerm


def weight_at(term: Term, progress: float) -> float:
    """The weight of a term after this share of the training."""
    return term.weight * read_schedule(term.schedule)(progress)


def _check_term(term: Any, loss_types: Any = None) -> None:
    # torch names the projections by their terms, and has names of its own.
    if term.name in _LOGGED or not term.name.isidentifier() or hasattr(nn.ModuleDict, term.name):
        raise ValueError(
            f"the term's name={term.name!r} cannot be its key in the logs and checkpoints, or is taken there; give it "
            "another of letters, digits and underscores, e.g. name='my_loss'."
        )
    if not (math.isfinite(term.weight) and term.weight >= 0):
        raise ValueError(f"{term.name}_weight={term.weight} must be a finite number >= 0; 0 switches the term off.")
    if loss_types is not None and term.type is not None and term.type not in get_args(loss_types):
        raise ValueError(
            f"{term.name}_type={term.type!r} must be one of {', '.join(map(repr, get_args(loss_types)))}."
        )
    read_schedule(term.schedule)


def _check_options(term: Any, loss: str, reserved: frozenset[str] = frozenset()) -> None:
    parameters = inspect.signature(getattr(losses, loss)).parameters.values()
    known = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} - _OWN_ARGUMENTS - reserved
    if unknown := sorted(set(term.options) - known):
        raise ValueError(
            f"{term.name}: options={dict(term.options)} name {unknown}, which type={term.type!r} does not read; "
            + (f"it reads {sorted(known)}." if known else "it reads none.")
        )
