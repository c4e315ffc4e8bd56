"""What is compared, and how."""

from .objective import AttentionTerm, DistillationObjective, HiddenTerm, LogitTerm, TaskTerm


__all__ = ["AttentionTerm", "DistillationObjective", "HiddenTerm", "LogitTerm", "TaskTerm"]
