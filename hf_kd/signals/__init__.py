"""Where the compared tensors come from."""

from .batch import ItemCounts, Signals, count_items, labels_of
from .capture import Capture, Wanted
from .layers import LayerPair, layer_pairs, uniform_layers
from .problem import ProblemType, problem_of
from .teacher import Teacher, TeacherEnsemble


__all__ = [
    "Capture",
    "ItemCounts",
    "LayerPair",
    "ProblemType",
    "Signals",
    "Teacher",
    "TeacherEnsemble",
    "Wanted",
    "count_items",
    "labels_of",
    "layer_pairs",
    "problem_of",
    "uniform_layers",
]
