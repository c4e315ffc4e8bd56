"""What is compared, and how."""

from .objective import DistillationObjective
from .schedules import Schedule
from .terms import AttentionTerm, CustomTerm, HiddenTerm, LogitTerm, RelationTerm, TaskTerm


__all__ = [
    "AttentionTerm",
    "CustomTerm",
    "DistillationObjective",
    "HiddenTerm",
    "LogitTerm",
    "RelationTerm",
    "Schedule",
    "TaskTerm",
]
