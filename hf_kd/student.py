"""Makes a student from a teacher."""

from __future__ import annotations

import copy
import re
from typing import Any, Literal

from transformers import PreTrainedModel

from .shrink import set_hidden_size, shrink
from .signals.capture import Family, FusedFamily, family_of
from .signals.layers import uniform_layers


# What was done stays on the model object, for the model card; config.json is the model's alone.
START_ATTRIBUTE = "start_of_student"


def student_from_teacher(
    teacher: PreTrainedModel,
    layers: list[int] | None = None,
    num_layers: int | None = None,
    *,
    hidden_size: int | None = None,
    intermediate_size: int | None = None,
    num_attention_heads: int | None = None,
    init: Literal["importance", "random"] = "importance",
) -> PreTrainedModel:
    """Make a smaller model of the teacher's class.

    The student gets copies of the teacher's embeddings, the chosen blocks, pooler and head, which is where
    distillation on small data starts best. With any smaller width it gets the most important parts of them, as
    [`~hf_kd.shrink.shrink`] ranks them, or fresh weights.

    Args:
        teacher ([`~transformers.PreTrainedModel`]): The fine-tuned teacher. It is not changed.
        layers (`list[int]`, *optional*): The teacher blocks to copy, counted from 1, in ascending order.
        num_layers (`int`, *optional*): Number of blocks, spread evenly over the teacher's as `layer_mapping="uniform"`
            pairs them.
        hidden_size (`int`, *optional*): Width of the student; the teacher's by default.
        intermediate_size (`int`, *optional*): Width of its feed-forward layers; the teacher's by default.
        num_attention_heads (`int`, *optional*): Number of its heads, which have `hidden_size / num_attention_heads`
            dimensions each; the teacher's by default, so that a smaller `hidden_size` makes smaller heads.
        init (`str`, *optional*, defaults to `"importance"`): Where the weights of a narrower student come from:
            `"importance"` takes the teacher's most important ones, `"random"` fresh ones: seed them with
            [`~transformers.set_seed`]. Without a smaller width it changes nothing.

    Returns:
        [`~transformers.PreTrainedModel`]: The student in float32, in eval mode, sharing no memory with the teacher.

    Raises:
        ValueError: If the layers are not there, the shape is not smaller, or it is not known how to shrink the teacher
        to it.
    """
    if init not in ("importance", "random"):
        raise ValueError(f"init={init!r} is not known; use 'importance' or 'random'.")
    family, config = family_of(teacher.config), copy.deepcopy(teacher.config)
    layers = _choose_layers(layers, num_layers, config.num_hidden_layers)
    _reduce_layers(config, layers)
    narrow = _reduce_widths(config, hidden_size, intermediate_size, num_attention_heads)
    if narrow is not None and init == "random":
        student = type(teacher)(narrow).float().eval()
    else:
        student = _copy_blocks(teacher, family, config, layers)
        student = student if narrow is None else shrink(student, narrow)
    setattr(student, START_ATTRIBUTE, _describe_start(teacher, student, layers, "copied" if narrow is None else init))
    return student


def _describe_start(teacher: PreTrainedModel, student: PreTrainedModel, layers: list[int], init: str) -> dict:
    """Which of the teacher's weights the student has: `init` is `"copied"`, `"importance"` or `"random"`."""
    old, new = teacher.config, student.config
    names = ("hidden_size", "hidden_dim" if new.model_type == "distilbert" else "intermediate_size")
    shapes = {name: [getattr(old, name), getattr(new, name)] for name in (*names, "num_attention_heads")}
    return {
        "teacher": old._name_or_path,
        "init": init,
        "layers": None if init == "random" else list(layers),
        "of_layers": old.num_hidden_layers,
        "narrowed": {name: shape for name, shape in shapes.items() if shape[0] != shape[1]},
    }


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


def _reduce_layers(config: Any, layers: list[int]) -> None:
    if getattr(config, "layer_types", None):  # ModernBERT: attention to all tokens, or to near ones
        config.layer_types = [config.layer_types[layer - 1] for layer in layers]
    config.num_hidden_layers = len(layers)


def _reduce_widths(
    config: Any, hidden_size: int | None, intermediate_size: int | None, num_attention_heads: int | None
) -> Any:
    """A copy of the config with the smaller widths; `None` if none is smaller."""
    narrow = copy.deepcopy(config)
    # DistilBERT has another name for it, and no alias as for the other fields.
    intermediate_name = "hidden_dim" if config.model_type == "distilbert" else "intermediate_size"
    asked = {
        "hidden_size": hidden_size,
        intermediate_name: intermediate_size,
        "num_attention_heads": num_attention_heads,
    }
    shape = {name: value for name, value in asked.items() if value is not None and value != getattr(config, name)}
    for name, value in shape.items():
        if not 0 < value < getattr(config, name):
            raise ValueError(f"{name}={value} must be between 1 and the teacher's {getattr(config, name)}.")
        if name == "hidden_size":
            set_hidden_size(narrow, value)
        else:
            setattr(narrow, name, value)
    if narrow.hidden_size % narrow.num_attention_heads:
        raise ValueError(
            f"num_attention_heads={narrow.num_attention_heads} does not divide hidden_size={narrow.hidden_size}; give "
            "a divisor as num_attention_heads."
        )
    return narrow if shape else None


def _copy_blocks(teacher: PreTrainedModel, family: Family, config: Any, layers: list[int]) -> PreTrainedModel:
    """The teacher with these of its blocks."""
    state = teacher.state_dict()
    if family.shares_blocks:
        num_blocks = config.num_hidden_groups * config.inner_group_num
        if num_blocks > 1 and len(layers) < teacher.config.num_hidden_layers:
            raise ValueError(
                f"layers={layers} cannot be taken from an ALBERT of num_hidden_groups={config.num_hidden_groups} and "
                f"inner_group_num={config.inner_group_num}, where a layer is not one block of its own nor the same "
                "everywhere; keep all of its layers."
            )
    else:
        prefix = f"{teacher.base_model_prefix}.{family.blocks}" if teacher.base_model is not teacher else family.blocks
        state = _select_blocks(state, prefix, layers)
        if isinstance(family, FusedFamily):
            _match_attention_reach(config, layers)
            _fold_first_norm(state, prefix, family)
    student = type(teacher)(config).float().eval()
    student.load_state_dict(state)
    return student


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


def _match_attention_reach(config: Any, layers: list[int]) -> None:
    """On transformers 4.57 every n-th layer of ModernBERT attends to all tokens, the first one included."""
    if hasattr(type(config), "layer_types"):
        return
    every = config.global_attn_every_n_layers
    is_global = [(layer - 1) % every == 0 for layer in layers]
    for candidate in (every, *range(1, len(layers) + 1)):
        if is_global == [index % candidate == 0 for index in range(len(layers))]:
            config.global_attn_every_n_layers = candidate
            return
    raise ValueError(
        f"layers={layers} attend to {', '.join('all' if one else 'near' for one in is_global)} tokens, which this "
        "version of transformers cannot express: every n-th layer of a ModernBERT attends to all, from the first on; "
        f"use layers={list(range(1, len(layers) + 1))} or install 'transformers>=5'."
    )


def _fold_first_norm(state: dict, prefix: str, family: FusedFamily) -> None:
    """ModernBERT's first block takes the embeddings as their norm leaves them: any other has a norm of its own.

    That would divide the normalised embeddings by the gains' root mean square and apply its own gains; both fit into
    the projection after it.
    """
    gain = state.pop(f"{prefix}.0.attn_norm.weight", None)
    if gain is None:
        return
    if f"{prefix}.0.attn_norm.bias" in state:
        raise ValueError(
            "only layer 1 of a ModernBERT with norm_bias=True can be the student's first, as the others begin with a "
            "norm; give layers that begin with 1."
        )
    embeddings_gain = state[f"{prefix.removesuffix(family.blocks)}embeddings.norm.weight"]
    name = f"{prefix}.0.{family.query_key_value}.weight"
    state[name] = state[name] * gain / embeddings_gain.square().mean().sqrt()
