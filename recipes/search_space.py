"""What `glue_search.py` can draw, and what a draw means as arguments of `glue_distill.py`."""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import MISSING, dataclass, field, fields
from enum import Enum
from typing import Any, Literal

from glue_distill import ModelArguments, make_student
from glue_setup import DataArguments
from transformers import PreTrainedModel

from hf_kd import DistillationTrainingArguments
from hf_kd.glue import TextTask


try:
    import optuna
except ImportError as error:
    raise ImportError("the search needs optuna and matplotlib: pip install 'hf-kd[search]'") from error

TERMS = {"logits": "logit", "hidden": "hidden", "attention": "attention", "relation": "relation"}
PRECISIONS = ("fp32", "int8")
# Arguments of one run and its machine, which no YAML holds.
RUN_FLAGS = ("teacher_model_name_or_path", "output_dir", "logging_dir", "run_name", "resume_from_checkpoint")
RUN_FLAGS += ("eval_strategy", "save_strategy", "do_eval", "report_to", "disable_tqdm", "push_to_hub")
RUN_FLAGS += ("accelerator_config", "fsdp", "fsdp_config", "local_rank", "debug", "dataloader_pin_memory")
RUN_FLAGS += ("include_num_input_tokens_seen",)


@dataclass
class SearchArguments:
    """What to search, for how long, and which student to choose."""

    target_retention: float | None = field(
        default=None,
        metadata={
            "help": "Choose the smallest student that keeps this share of the teacher's metric, such as 0.97. "
            "Default: the best one."
        },
    )
    max_latency_ms: float | None = field(
        default=None, metadata={"help": "Choose among students that answer within so many milliseconds (p50)."}
    )
    num_trials: int = field(default=20, metadata={"help": "Students to train, those of earlier calls included."})
    timeout_minutes: float | None = field(
        default=None, metadata={"help": "Begin no further student after so many minutes of this call."}
    )
    search_num_layers: list[int] | None = field(
        default=None,
        metadata={"help": "Depths. Default: a sixth, a third, a half and two thirds of the teacher's layers."},
    )
    search_hidden_sizes: list[int] | None = field(
        default=None,
        metadata={"help": "Widths; the feed-forward layers shrink in proportion. Default: the teacher's alone."},
    )
    search_terms: list[str] = field(
        default_factory=lambda: ["logits", "hidden", "attention"],
        metadata={"help": f"Terms to switch on and off, of {', '.join(TERMS)}. Others keep the weight of their flag."},
    )
    search_weights: list[float] = field(
        default_factory=lambda: [0.1, 10.0],
        metadata={"help": "Lowest and highest weight of a term that is on; --task_loss_weight (0.1) stays."},
    )
    search_learning_rate: list[float] = field(
        default_factory=lambda: [3e-5, 3e-4], metadata={"help": "Lowest and highest learning rate."}
    )
    search_temperature: list[float] = field(
        default_factory=lambda: [1.0, 8.0], metadata={"help": "Lowest and highest temperature of the logits."}
    )
    search_split: Literal["half", "validation", "holdout"] | None = field(
        default=None,
        metadata={
            "help": "Rows that choose: `half` of the validation split (the other half reports), `holdout` of the "
            "training rows (the validation split reports; for a teacher that was not trained on them), or the whole "
            "`validation` split (which then reports too, unless there is a test split). Default: half, and "
            "validation where there is a test split."
        },
    )
    search_holdout: float = field(default=0.1, metadata={"help": "Share of the training rows that `holdout` takes."})
    latency_length: int | None = field(
        default=None, metadata={"help": "Tokens of the input whose latency counts. Default: max_seq_length."}
    )
    benchmark_rounds: int = field(default=3, metadata={"help": "Processes that measure each latency, at least 1."})
    benchmark_seconds: float = field(default=1.0, metadata={"help": "Seconds per measured latency and process, > 0."})

    def __post_init__(self) -> None:
        for name in ("target_retention", "max_latency_ms", "timeout_minutes", "benchmark_seconds"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name}={value} must be above 0.")
        if self.target_retention is not None and self.target_retention > 2:
            raise ValueError(f"target_retention={self.target_retention} is a share: 97 % is --target_retention 0.97.")
        for name in ("num_trials", "benchmark_rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        for name in ("search_weights", "search_learning_rate", "search_temperature"):
            value = getattr(self, name)
            if len(value) != 2 or not 0 < value[0] <= value[1] < float("inf"):
                raise ValueError(
                    f"{name}={value} must be the lowest and the highest value, above 0, such as --{name} 1 8; the "
                    "same one twice keeps it fixed."
                )
        for name in ("search_num_layers", "search_hidden_sizes"):
            value = getattr(self, name)
            if value is not None and (not value or len(set(value)) < len(value) or min(value) < 1):
                raise ValueError(f"{name}={value} must be different whole numbers above 0, such as --{name} 2 4.")
        if not set(self.search_terms) <= set(TERMS) or len(set(self.search_terms)) < len(self.search_terms):
            raise ValueError(f"search_terms={self.search_terms}: choose from {', '.join(TERMS)}, each once.")
        if not 0 < self.search_holdout < 1:
            raise ValueError(f"search_holdout={self.search_holdout} must be a share between 0 and 1, such as 0.1.")


class Space:
    """What can be drawn, and what a draw means for the arguments; every shape is tried with every term at once.

    Raises:
        ValueError: If a student cannot be made or compared, naming the flag.
    """

    def __init__(
        self,
        search: SearchArguments,
        model_args: ModelArguments,
        args: DistillationTrainingArguments,
        teacher: PreTrainedModel,
        task: TextTask,
    ):
        self.search, self.model_args, self.args, self.config = search, model_args, args, teacher.config
        depth = self.config.num_hidden_layers
        self.depths = search.search_num_layers or sorted({max(1, depth * part // 12) for part in (2, 4, 6, 8)})
        self.widths = search.search_hidden_sizes or [self.config.hidden_size]
        for depth, width in itertools.product(self.depths, self.widths):
            run_args, student_args = self.apply(self.arguments(self.center(depth, width)))
            try:
                student = make_student(student_args, teacher, task)
                run_args.objective().bind(student.config, self.config)
            except ValueError as error:
                raise ValueError(
                    f"a student of search_num_layers={depth} and width {width} with search_terms="
                    f"{search.search_terms}: {error}"
                ) from error

    def draw(self, trial: optuna.Trial) -> dict[str, Any]:
        """Parameters of one point."""
        search = self.search
        trial.suggest_categorical("student_num_layers", self.depths)
        trial.suggest_categorical("student_hidden_size", self.widths)
        trial.suggest_float("learning_rate", *search.search_learning_rate, log=True)
        for term in search.search_terms:
            if trial.suggest_categorical(term, [True, False]):
                trial.suggest_float(f"{TERMS[term]}_loss_weight", *search.search_weights, log=True)
        if trial.params.get("logits", self.args.logit_loss_weight > 0):
            trial.suggest_float("temperature", *search.search_temperature, log=True)
        trial.suggest_categorical("precision", PRECISIONS)
        return trial.params

    def center(self, depth: int, width: int) -> dict[str, Any]:
        """All terms on, in the middle of each range: what each shape begins with."""

        def middle(low: float, high: float) -> float:
            return min(max(math.sqrt(low * high), low), high)

        search = self.search
        weights = {f"{TERMS[term]}_loss_weight": middle(*search.search_weights) for term in search.search_terms}
        return {
            "student_num_layers": depth,
            "student_hidden_size": width,
            "learning_rate": middle(*search.search_learning_rate),
            **dict.fromkeys(search.search_terms, True),
            **weights,
            "temperature": middle(*search.search_temperature),
            "precision": "fp32",
        }

    def arguments(self, params: dict[str, Any]) -> dict[str, Any]:
        """The arguments of `glue_distill.py` that a draw stands for, numbers in three digits."""
        found: dict[str, Any] = {"student_num_layers": params["student_num_layers"]}
        width, teacher_width = params["student_hidden_size"], self.config.hidden_size
        if width != teacher_width:
            found["student_hidden_size"] = width
            if self.model_args.student_intermediate_size is None:
                name = "hidden_dim" if self.config.model_type == "distilbert" else "intermediate_size"
                found["student_intermediate_size"] = getattr(self.config, name) * width // teacher_width
        found |= {name: three_digits(params[name]) for name in ("learning_rate", "temperature") if name in params}
        for term in self.search.search_terms:
            name = f"{TERMS[term]}_loss"
            found[f"{name}_weight"] = three_digits(params[f"{name}_weight"]) if params[term] else 0.0
            if not params[term] and getattr(self.args, f"{name}_schedule") is not None:
                found[f"{name}_schedule"] = None  # of a term that is off
        return found

    def apply(self, arguments: dict[str, Any]) -> tuple[DistillationTrainingArguments, ModelArguments]:
        """The flags with these arguments in place."""
        shape = {name: value for name, value in arguments.items() if name.startswith("student_")}
        others = {name: value for name, value in arguments.items() if name not in shape}
        return dataclasses.replace(self.args, **others), dataclasses.replace(self.model_args, **shape)


def three_digits(value: float) -> float:
    return float(f"{value:.3g}")


def changed_arguments(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: DistillationTrainingArguments,
    defaults: dict[str, Any],
) -> dict[str, Any]:
    """What differs from the defaults of `glue_distill.py`, as its YAML has it; no token, and nothing of one run.

    Args:
        model_args, data_args, args: The flags.
        defaults (`dict`): The recipes' own defaults, from before `args` were made: those may change the environment.
    """
    changed = {}
    for part in (model_args, data_args, args):
        for f in fields(part):
            default = defaults.get(f.name, None if f.default is MISSING else f.default)
            value = getattr(part, f.name)
            is_private = f.name.startswith("hub_") or f.name.endswith("token")
            # What nobody set may be None before, and 0, False or empty after.
            if f.init and (value or None) != (default or None) and f.name not in RUN_FLAGS and not is_private:
                changed[f.name] = value.value if isinstance(value, Enum) else value
    return changed
