"""Which layer learns from which: the maps as exact lists (maps that are refused: test_bad_input.py)."""

import pytest

from hf_kd.signals import layer_pairs, uniform_layers


@pytest.mark.parametrize(
    ("mapping", "num_student_layers", "num_teacher_layers", "expected"),
    [
        ("uniform", 3, 6, [(1, 2), (2, 4), (3, 6)]),
        ("uniform", 4, 6, [(1, 2), (2, 3), (3, 5), (4, 6)]),
        ("uniform", 2, 12, [(1, 6), (2, 12)]),
        ("uniform", 1, 12, [(1, 12)]),
        ("uniform", 3, 3, [(1, 1), (2, 2), (3, 3)]),
        ("last", 3, 12, [(3, 12)]),
        ("last", 6, 4, [(6, 4)]),
        ("first", 3, 12, [(1, 1), (2, 2), (3, 3)]),
        ("1:4,2:8", 2, 12, [(1, 4), (2, 8)]),
        ("2:8, 1:4", 2, 12, [(2, 8), (1, 4)]),
        ("0:0,2:12", 2, 12, [(0, 0), (2, 12)]),
        ("1:6,2:6", 2, 6, [(1, 6), (2, 6)]),
        ([(1, 4), (2, 8)], 2, 12, [(1, 4), (2, 8)]),
        (iter([(1, 4), (2, 8)]), 2, 12, [(1, 4), (2, 8)]),
    ],
)
def test_layer_pairs_are_exactly_these(mapping, num_student_layers, num_teacher_layers, expected):
    """A student layer would learn from a neighbour of the layer that was meant, and the loss would look as usual."""
    assert layer_pairs(mapping, num_student_layers, num_teacher_layers) == expected


def test_attention_may_name_the_lowest_and_the_highest_block():
    """An off-by-one in the range would refuse the first or last block where the embeddings are not allowed."""
    assert layer_pairs("1:1,2:12", 2, 12, first_layer=1) == [(1, 1), (2, 12)]


@pytest.mark.parametrize("num_layers", [1, 2, 6, 12, 24])
def test_uniform_layers_ascend_to_the_last_one(num_layers):
    """A selection that repeats a layer or leaves out the last one would copy or compare the wrong blocks."""
    for num_selected in range(1, num_layers + 1):
        layers = uniform_layers(num_selected, num_layers)
        assert len(set(layers)) == num_selected
        assert layers == sorted(layers)
        assert layers[0] >= 1
        assert layers[-1] == num_layers
