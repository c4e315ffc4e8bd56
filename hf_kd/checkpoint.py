"""Loads checkpoints that are whole and fit each other, or says what is wrong with them."""

import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from .compat import whole_weights


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
    of_hub: dict[str, Any] = {"revision": revision, "token": token}
    config = _load_config(path, argument, **of_hub)
    name = (config.architectures or [""])[0]
    model_class = getattr(transformers, name, None)
    if model_class is None or "For" not in name:
        raise ValueError(
            f"{argument}={path!r} is {name or 'a model without architectures in its config'}, which transformers "
            "has no task head for; fine-tune it first (recipes/glue_finetune.py), or load it yourself and pass the "
            "model."
        )
    model, info = _load_weights(model_class, path, argument, dtype=dtype, **of_hub)
    if info["missing_keys"]:
        raise ValueError(
            f"{argument}={path!r} lacks the weights {_first(info['missing_keys'])}, which would be random; "
            "fine-tune it first (recipes/glue_finetune.py)."
        )
    if exact and info["unexpected_keys"]:
        raise ValueError(
            f"{argument}={path!r} holds the weights {_first(info['unexpected_keys'])}, which {name} has no use "
            "for; save the model alone with save_pretrained(), without teacher or projections."
        )
    return model


def load_pretrained(
    path: str | os.PathLike, argument: str, *, revision: str | None = None, **config_changes: Any
) -> PreTrainedModel:
    """
    Load an encoder to train as a classifier, in float32 and from safetensors; its head may be new.

    Args:
        path (`str` or `Path`): Folder or Hub id.
        argument (`str`): What the caller calls it, for the errors.
        revision (`str`, *optional*): Branch, tag or commit of a Hub id.
        config_changes: What its config has to say, such as `num_labels`.

    Raises:
        `ValueError`: If there is no such model, or the checkpoint lacks weights of the encoder.
    """
    path = str(path)
    _load_config(path, argument, revision=revision)
    # transformers 5 trains in the dtype that a checkpoint was saved in: in float16 small updates are lost.
    model, info = _load_weights(
        AutoModelForSequenceClassification, path, argument, revision=revision, dtype=torch.float32, **config_changes
    )
    # The pooler is a head of its own: masked language models are saved without.
    of_encoder = f"{model.base_model_prefix}."
    missing = [key for key in info["missing_keys"] if key.startswith(of_encoder) and "pooler" not in key]
    if missing:
        raise ValueError(
            f"{argument}={path!r} lacks the weights {_first(missing)}, which would be random: its files are not those "
            f"of the {model.config.model_type} in its config.json; save model and config together with "
            "save_pretrained()."
        )
    return model


def load_tokenizer(path: str | os.PathLike, argument: str, *, revision: str | None = None) -> Any:
    """
    Load the tokenizer beside a model.

    Raises:
        `ValueError`: If there is none that can be read.
    """
    _load_config(str(path), argument, revision=revision)
    fix = "save it there with tokenizer.save_pretrained(folder)"
    if not has_tokenizer(path):
        raise ValueError(f"{argument}={str(path)!r} holds no tokenizer; {fix}.")
    try:
        return AutoTokenizer.from_pretrained(str(path), revision=revision or "main", trust_remote_code=False)
    except Exception as error:  # tokenizers raises plain exceptions
        raise ValueError(f"{argument}={str(path)!r} holds no tokenizer that can be read: {error}; {fix}.") from error


def check_reads(model: PreTrainedModel, argument: str, tokenizer: Any, max_length: int) -> None:
    """
    Whether a model can read what a tokenizer writes.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model.
        argument (`str`): What the caller calls it, for the errors.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The tokenizer.
        max_length (`int`): Tokens of the longest row.

    Raises:
        `ValueError`: If the tokenizer has ids beyond the model's embeddings, or cannot pad, or the model has fewer
            positions.
    """
    num_embeddings = model.get_input_embeddings().num_embeddings
    highest = max(tokenizer.get_vocab().values(), default=0)
    if highest >= num_embeddings:
        token = tokenizer.convert_ids_to_tokens(highest)
        raise ValueError(
            f"the tokenizer gives {token!r} the id {highest}, but {argument} has embeddings for {num_embeddings} "
            f"tokens (0 to {num_embeddings - 1}); take the tokenizer that was saved with the model, or make room with "
            "model.resize_token_embeddings(len(tokenizer)) and train it."
        )
    if tokenizer.pad_token is None:
        raise ValueError(
            "the tokenizer has no padding token, which rows of different lengths need; set one that the model was "
            "trained with, e.g. tokenizer.pad_token = '[PAD]', and save it beside the model."
        )
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa counts positions from behind the padding.
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            if max_length > module.num_embeddings - first:
                raise ValueError(
                    f"max_seq_length={max_length}, but {argument} has positions for "
                    f"{module.num_embeddings - first} tokens; set --max_seq_length "
                    f"{module.num_embeddings - first} or less."
                )


def _load_config(path: str, argument: str, *, revision: str | None, token: str | bool | None = None) -> Any:
    check_revision(path, argument, revision)
    try:
        return AutoConfig.from_pretrained(path, revision=revision or "main", token=token, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        at = f" at revision {revision!r}" if revision is not None else ""
        raise ValueError(
            f"{argument}={path!r} is not a model folder (with config.json) or a Hub id that can be reached{at}: "
            f"{error}"
        ) from error


@whole_weights()
def _load_weights(
    model_class: Any, path: str, argument: str, *, revision: str | None, **kwargs: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, and which weights were missing or of no use."""
    _check_stored_dtypes(path, argument)
    try:
        model, info = model_class.from_pretrained(
            path,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # it says which, where the error does not
            revision=revision or "main",
            **kwargs,
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"{argument}={path!r} cannot be loaded from safetensors: {error} Save it with save_pretrained(), which "
            "writes model.safetensors."
        ) from error
    # Names on transformers 4.57, names with both shapes on 5.x.
    mismatched = [entry if isinstance(entry, str) else entry[0] for entry in info["mismatched_keys"]]
    if mismatched:
        shapes = {name: tuple(model.get_parameter(name).shape) for name in sorted(mismatched)[:3]}
        raise ValueError(
            f"{argument}={path!r}: {len(mismatched)} weights have other shapes than its config and "
            f"{model.config.num_labels} labels need, which is {shapes}; give a model of this task, with its own "
            "config.json."
        )
    check_weights_are_finite(model, f"{argument}={path!r}")
    return model, info


def check_weights_are_finite(model: nn.Module, argument: str) -> None:
    """
    Raises:
        `ValueError`: If a weight is NaN or infinite.
    """
    for name, parameter in model.named_parameters():
        parameter = getattr(parameter, "ds_tensor", parameter)  # this process's share, under DeepSpeed ZeRO-3
        is_compared = parameter.is_floating_point() and not parameter.is_meta
        if is_compared and not torch.isfinite(parameter).all():
            wrong = (~torch.isfinite(parameter)).sum().item()
            raise ValueError(
                f"{argument}: {wrong} of the {parameter.numel()} numbers of {name} are NaN or infinite, and "
                "so would be all that is learned from it; take a checkpoint from before its training diverged."
            )


def _check_stored_dtypes(path: str, argument: str) -> None:
    """Integers would be loaded as if they were the weights, without the scales that they were quantised with."""
    config = Path(path, "config.json")
    if not config.is_file() or "quantization_config" in json.loads(config.read_text(encoding="utf-8")):
        return
    for file in sorted(Path(path).glob("model*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                dtypes = {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{argument}={path!r}: {file.name} is damaged or was not written to its end ({error}); copy it anew, "
                "or save it again with save_pretrained()."
            ) from error
        for name, dtype in dtypes.items():
            if name.endswith((".weight", ".bias")) and not dtype.startswith(("F", "BF")):
                raise ValueError(
                    f"{argument}={path!r}: {name} is stored as {dtype}, and the config says nothing of a "
                    "quantisation; save the model in float32, bfloat16 or float16."
                )


def _first(names: Collection[str]) -> str:
    shown = sorted(names)[:5]
    return f"{shown}" if len(names) <= len(shown) else f"{shown} and {len(names) - len(shown)} more"


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
