"""Which student layer is compared with which teacher layer.

Layers are numbered by block: block k is `hidden_states[k]` and `attentions[k-1]`; 0 means the embeddings and is valid
for hidden states only.
"""

from collections.abc import Iterable
from typing import NamedTuple


class LayerPair(NamedTuple):
    """A student layer and the teacher layer it learns from."""

    student: int
    teacher: int


LayerMapping = str | Iterable[tuple[int, int]]


def uniform_layers(num_selected: int, num_layers: int) -> list[int]:
    """Spread `num_selected` layers evenly over `num_layers`, the last one always included.

    TinyBERT's map (https://arxiv.org/abs/1909.10351, section 4.2): 3 of 6 are `[2, 4, 6]`. Where the division leaves a
    remainder the layer is rounded up: 4 of 6 are `[2, 3, 5, 6]`.
    """
    return [-(-k * num_layers // num_selected) for k in range(1, num_selected + 1)]


def layer_pairs(
    mapping: LayerMapping, num_student_layers: int, num_teacher_layers: int, *, first_layer: int = 0
) -> list[LayerPair]:
    """Read a layer map.

    Args:
        mapping (`str` or iterable of `(int, int)`):
            `"uniform"` (every student block, teacher blocks spread evenly), `"last"` (the two last blocks), `"first"`
            (student block k and teacher block k), or pairs of student and teacher layer: `"1:4,2:8"` or
            `[(1, 4), (2, 8)]`.
        num_student_layers (`int`): Number of the student's blocks.
        num_teacher_layers (`int`): Number of the teacher's blocks.
        first_layer (`int`, *optional*, defaults to 0): Lowest layer allowed: 0 for hidden states, 1 for attention.

    Returns:
        `list[LayerPair]`: The pairs in the given order.

    Raises:
        ValueError: If the map cannot be read, is empty, names a layer twice for the student, or a layer that is not
        there.
    """
    if mapping in ("uniform", "first") and num_student_layers > num_teacher_layers:
        raise ValueError(
            f"layer_mapping={mapping!r} needs a student with no more layers than its teacher, but they have "
            f"{num_student_layers} and {num_teacher_layers}; write the pairs out, e.g. "
            f"layer_mapping='{num_student_layers}:{num_teacher_layers}'."
        )
    if mapping == "uniform":
        teacher_layers = uniform_layers(num_student_layers, num_teacher_layers)
        return [LayerPair(k, layer) for k, layer in enumerate(teacher_layers, start=1)]
    if mapping == "first":
        return [LayerPair(k, k) for k in range(1, num_student_layers + 1)]
    if mapping == "last":
        return [LayerPair(num_student_layers, num_teacher_layers)]

    pairs = _read_pairs(mapping)
    for side, layers, num_layers in (
        ("student", [pair.student for pair in pairs], num_student_layers),
        ("teacher", [pair.teacher for pair in pairs], num_teacher_layers),
    ):
        for layer in layers:
            if not first_layer <= layer <= num_layers:
                embeddings = " (0, the embeddings, has hidden states but no attention)" if layer == 0 else ""
                raise ValueError(
                    f"layer_mapping={mapping!r} names {side} layer {layer}{embeddings}, but the {side} has layers "
                    f"{first_layer} to {num_layers}; use for example layer_mapping='uniform'."
                )
    if len({pair.student for pair in pairs}) < len(pairs):
        raise ValueError(
            f"layer_mapping={mapping!r} names a student layer twice; give each student layer one teacher layer."
        )
    return pairs


def _read_pairs(mapping: LayerMapping) -> list[LayerPair]:
    try:
        raw = [part.split(":") for part in mapping.split(",")] if isinstance(mapping, str) else list(mapping)
        pairs = [LayerPair(int(student), int(teacher)) for student, teacher in raw]
    except (TypeError, ValueError):
        pairs = []
    if not pairs:
        raise ValueError(
            f"layer_mapping={mapping!r} cannot be read; use 'uniform', 'last', 'first' or pairs of student and "
            "teacher layer such as '1:4,2:8'."
        )
    return pairs
