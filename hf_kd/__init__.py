"""Distillation of BERT-style encoders on the Hugging Face stack."""

from .objective import AttentionTerm, DistillationObjective, HiddenTerm, LogitTerm, TaskTerm
from .student import student_from_teacher
from .trainer import DistillationTrainer
from .training_args import DistillationTrainingArguments


__version__ = "0.1.0"

__all__ = [
    "AttentionTerm",
    "DistillationObjective",
    "DistillationTrainer",
    "DistillationTrainingArguments",
    "HiddenTerm",
    "LogitTerm",
    "TaskTerm",
    "student_from_teacher",
]
