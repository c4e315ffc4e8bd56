"""Loads what somebody fine-tuned, or says why it cannot be that."""

import os
from typing import Any

import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedModel


def load_finetuned(
    path: str | os.PathLike,
    argument: str,
    dtype: Any = "auto",
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    exact: bool = False,
) -> PreTrainedModel:
    """
    Load a model as the class that its config names, from safetensors.

    Args:
        path (`str` or `Path`): Folder or Hub id.
        argument (`str`): What the caller calls it, for the errors.
        dtype (`torch.dtype` or `str`, *optional*, defaults to `"auto"`): The dtype of the weights; `"auto"` is the one
            they were saved in.
        revision (`str`, *optional*): Branch, tag or commit of a Hub id.
        token (`str`, *optional*): For a private Hub id; by default that of HF_TOKEN, or of `hf auth login`.
        exact (`bool`, *optional*, defaults to `False`): Whether weights that the model has no use for are an error.

    Raises:
        `ValueError`: If there is no such model, it has no head, or the checkpoint lacks weights of the head.
    """
    path = str(path)
    check_revision(path, argument, revision)
    of_hub: dict[str, Any] = {"revision": revision or "main", "token": token}
    try:
        config = AutoConfig.from_pretrained(path, **of_hub)
    except (OSError, ValueError, KeyError) as error:
        at = f" at revision {revision!r}" if revision is not None else ""
        raise ValueError(
            f"{argument}={path!r} is not a model folder (with config.json) or a Hub id that can be reached{at}: "
            f"{error}"
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
        model, info = model_class.from_pretrained(
            path, dtype=dtype, use_safetensors=True, output_loading_info=True, **of_hub
        )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"{argument}={path!r} cannot be loaded from safetensors: {error} Save it with save_pretrained(), which "
            "writes model.safetensors."
        ) from error
    if info["missing_keys"]:
        raise ValueError(
            f"{argument}={path!r} lacks the weights {sorted(info['missing_keys'])}, which would be random; "
            "fine-tune it first (recipes/glue_finetune.py)."
        )
    if exact and info["unexpected_keys"]:
        raise ValueError(
            f"{argument}={path!r} holds the weights {sorted(info['unexpected_keys'])[:5]}, which {name} has no use "
            "for; save the model alone with save_pretrained(), without teacher or projections."
        )
    return model


def check_revision(path: str | os.PathLike, argument: str, revision: str | None) -> None:
    """Raise a `ValueError` for a revision of a folder, which nothing would read."""
    if revision is not None and os.path.isdir(path):
        raise ValueError(
            f"{argument}={str(path)!r} is a folder here, and revision={revision!r} is of models on the Hub; give one "
            "of them alone."
        )


def has_tokenizer(path: str | os.PathLike) -> bool:
    """Whether a local folder holds a tokenizer; a Hub id may always have one."""
    names = ("tokenizer.json", "vocab.txt", "vocab.json")
    return not os.path.isdir(path) or any(os.path.isfile(os.path.join(path, name)) for name in names)
