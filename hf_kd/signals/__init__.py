"""Where the compared tensors come from."""

from .batch import ItemCounts, Signals, count_items
from .capture import Capture, Wanted
from .layers import LayerPair, layer_pairs, uniform_layers
from .teacher import Teacher


__all__ = [
    "Capture",
    "ItemCounts",
    "LayerPair",
    "Signals",
    "Teacher",
    "Wanted",
    "count_items",
    "layer_pairs",
    "uniform_layers",
]
