"""Loads what somebody fine-tuned, or says why it cannot be that."""

import os
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedModel


def load_finetuned(path: str | os.PathLike, argument: str, dtype: Any = "auto") -> PreTrainedModel:
    """
    Load a model as the class that its config names, from safetensors.

    Args:
        path (`str` or `Path`): Folder or Hub id.
        argument (`str`): What the caller calls it, for the errors.
        dtype (`torch.dtype` or `str`, *optional*, defaults to `"auto"`): The dtype of the weights; `"auto"` is the one
            they were saved in.

    Raises:
        `ValueError`: If there is no such model, it has no head, or the checkpoint lacks weights of the head.
    """
    path = str(path)
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{argument}={path!r} is not a model folder (with config.json) or a Hub id that can be reached: {error}"
        ) from error
    name = (config.architectures or [""])[0]
    model_class = getattr(transformers, name, None)
    if model_class is None or "For" not in name:
        raise ValueError(
            f"{argument}={path!r} is {name or 'a model without architectures in its config'}, which transformers "
            "has no task head for; fine-tune it first (recipes/glue_finetune.py), or load it yourself and pass the "
            "model."
        )
    try:
        model, info = model_class.from_pretrained(path, dtype=dtype, use_safetensors=True, output_loading_info=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"{argument}={path!r} cannot be loaded from safetensors: {error} Save it with save_pretrained(), which "
            "writes model.safetensors."
        ) from error
    if info["missing_keys"]:
        raise ValueError(
            f"{argument}={path!r} lacks the weights {sorted(info['missing_keys'])}, which would be random; "
            "fine-tune it first (recipes/glue_finetune.py)."
        )
    return model


def has_tokenizer(path: str | os.PathLike) -> bool:
    """Whether a local folder holds a tokenizer; a Hub id may always have one."""
    names = ("tokenizer.json", "vocab.txt", "vocab.json")
    return not os.path.isdir(path) or any(os.path.isfile(os.path.join(path, name)) for name in names)
