"""Distillation of BERT-style encoders on the Hugging Face stack."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .objective import (
        AttentionTerm,
        CustomTerm,
        DistillationObjective,
        HiddenTerm,
        LogitTerm,
        RelationTerm,
        Schedule,
        TaskTerm,
    )
    from .signals.cache import cache_teacher_signals
    from .signals.collator import DistillationCollator
    from .signals.teacher import load_teacher
    from .student import student_from_teacher
    from .trainer import DistillationTrainer
    from .training_args import DistillationTrainingArguments


__version__ = "0.1.0"

__all__ = [
    "AttentionTerm",
    "CustomTerm",
    "DistillationCollator",
    "DistillationObjective",
    "DistillationTrainer",
    "DistillationTrainingArguments",
    "HiddenTerm",
    "LogitTerm",
    "RelationTerm",
    "Schedule",
    "TaskTerm",
    "cache_teacher_signals",
    "load_teacher",
    "student_from_teacher",
]

_MODULES = {
    "cache_teacher_signals": "signals.cache",
    "DistillationCollator": "signals.collator",
    "DistillationTrainer": "trainer",
    "DistillationTrainingArguments": "training_args",
    "load_teacher": "signals.teacher",
    "student_from_teacher": "student",
}


# Names are imported when first used: the Trainer of transformers takes seconds and brings `datasets` and scikit-learn
# along.
def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES.get(name, 'objective')}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
