"""Makes a student from a teacher."""

from __future__ import annotations

import copy
import re

from transformers import PreTrainedModel

from .signals.capture import family_of
from .signals.layers import uniform_layers


def student_from_teacher(
    teacher: PreTrainedModel,
    layers: list[int] | None = None,
    num_layers: int | None = None,
    *,
    hidden_size: int | None = None,
    intermediate_size: int | None = None,
    num_attention_heads: int | None = None,
) -> PreTrainedModel:
    """Make a smaller model of the teacher's class.

    With the teacher's widths, the student gets copies of its embeddings, the chosen blocks, pooler and head, which is
    where distillation on small data starts best. Any smaller width gives a freshly initialised student of that shape:
    seed it with [`~transformers.set_seed`].

    Args:
        teacher ([`~transformers.PreTrainedModel`]): The fine-tuned teacher. It is not changed.
        layers (`list[int]`, *optional*): The teacher blocks to copy, counted from 1, in ascending order.
        num_layers (`int`, *optional*): Number of blocks, spread evenly over the teacher's as `layer_mapping="uniform"`
            pairs them.
        hidden_size (`int`, *optional*): Width of the student; the teacher's by default.
        intermediate_size (`int`, *optional*): Width of its feed-forward layers; the teacher's by default.
        num_attention_heads (`int`, *optional*): Number of its heads; the teacher's by default.

    Returns:
        [`~transformers.PreTrainedModel`]: The student in float32, in eval mode, sharing no memory with the teacher.

    Raises:
        ValueError: If the layers are not there or the shape is not smaller.
    """
    family, config = family_of(teacher.config), copy.deepcopy(teacher.config)
    layers = _choose_layers(layers, num_layers, config.num_hidden_layers)
    # DistilBERT has another name for it, and no alias as for the other fields.
    intermediate_name = "hidden_dim" if config.model_type == "distilbert" else "intermediate_size"
    shape = {
        "hidden_size": hidden_size,
        intermediate_name: intermediate_size,
        "num_attention_heads": num_attention_heads,
    }
    is_copy = True
    for name, value in shape.items():
        teacher_value = getattr(config, name)
        if value is None or value == teacher_value:
            continue
        if not 0 < value < teacher_value:
            raise ValueError(f"{name}={value} must be between 1 and the teacher's {teacher_value}.")
        setattr(config, name, value)
        is_copy = False
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"num_attention_heads={config.num_attention_heads} does not divide hidden_size={config.hidden_size}; give "
            "a divisor as num_attention_heads."
        )
    config.num_hidden_layers = len(layers)
    student = type(teacher)(config).float().eval()
    if is_copy:
        prefix = f"{teacher.base_model_prefix}.{family.blocks}" if teacher.base_model is not teacher else family.blocks
        student.load_state_dict(_select_blocks(teacher.state_dict(), prefix, layers))
    return student


def _choose_layers(layers: list[int] | None, num_layers: int | None, num_teacher_layers: int) -> list[int]:
    if layers is not None and num_layers not in (None, len(layers)):
        raise ValueError(f"layers={layers} and num_layers={num_layers} contradict each other; give one of them.")
    if layers is None:
        num_layers = num_teacher_layers if num_layers is None else num_layers
        if not 1 <= num_layers <= num_teacher_layers:
            raise ValueError(f"num_layers={num_layers} must be between 1 and the teacher's {num_teacher_layers}.")
        return uniform_layers(num_layers, num_teacher_layers)
    if not layers or sorted(set(layers)) != list(layers) or layers[0] < 1 or layers[-1] > num_teacher_layers:
        example = uniform_layers(max(1, num_teacher_layers // 2), num_teacher_layers)
        raise ValueError(
            f"layers={layers} must be ascending blocks of the teacher, counted from 1 to {num_teacher_layers}, for "
            f"example {example}."
        )
    return list(layers)


def _select_blocks(state_dict: dict, prefix: str, layers: list[int]) -> dict:
    """The state dict with the blocks under `prefix` reduced to `layers` (counted from 1) and renumbered."""
    block = re.compile(rf"{re.escape(prefix)}\.(\d+)\.(.+)")
    new_index = {layer - 1: index for index, layer in enumerate(layers)}
    selected = {}
    for name, tensor in state_dict.items():
        match = block.fullmatch(name)
        if match is None:
            selected[name] = tensor
        elif int(match[1]) in new_index:
            selected[f"{prefix}.{new_index[int(match[1])]}.{match[2]}"] = tensor
    return selected
