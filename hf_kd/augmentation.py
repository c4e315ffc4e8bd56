"""Makes variants of training texts, for a teacher to label."""

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .glue import UNLABELED
from .masked_lm import Candidates, MaskedLM


logger = logging.get_logger(__name__)

MAX_NGRAM = 5
# Part of the cache's key: raise it with every change that makes other rows of the same inputs.
_VERSION = 1
_ROWS_PER_BATCH = 1000


def augment(
    dataset: Dataset,
    text_columns: Sequence[str],
    num_variants: int,
    *,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    label_column: str = "label",
    masked_lm: str | Path | None = None,
    mask_probability: float = 0.1,
    ngram_probability: float = 0.25,
    replace_probability: float = 0.4,
    num_candidates: int = 15,
    cache_dir: str | Path | None = None,
    device: str | torch.device | None = None,
) -> Dataset:
    """
    Make up to `num_variants` variants of each row, without a label: a teacher labels them while it teaches.

    Words are what whitespace separates. Without a masked language model a variant is made as by Tang et al. (2019,
    https://huggingface.co/papers/1903.12136, section 3.2): each word becomes the mask token with `mask_probability`,
    then the text becomes a random n-gram of itself, n from 1 to 5, with `ngram_probability`. Their third rule,
    replacement by a word of the same part of speech, needs a tagger and is left out.

    With one it is made as by TinyBERT (https://huggingface.co/papers/1909.10351, algorithm 1), and nothing is masked
    or cut: each word is replaced with `replace_probability` by one of the `num_candidates` words that the model finds
    most probable in its place in the original text. Words of several pieces are left as they are, where the paper
    takes neighbours in GloVe. So is punctuation, and the text beyond the model's longest input.

    Of a pair, variants take turns at changing the first text, the second one, and both, as with Tang et al. What
    comes out as a row of `dataset` or as an earlier variant is dropped: short texts have fewer than `num_variants`.

    The rows are stored on disk, and read from there when all that they depend on is the same.

    Args:
        dataset (`Dataset`): Rows to vary.
        text_columns (`Sequence[str]`): One text column, or the two of a pair.
        num_variants (`int`): At most so many variants per row; 0 makes none.
        tokenizer (`PreTrainedTokenizerBase`): Of the teacher; its mask token is used without `masked_lm`.
        seed (`int`): The same seed makes the same rows.
        label_column (`str`, *optional*, defaults to `"label"`): Becomes -100; other columns are copied.
        masked_lm (`str` or `Path`, *optional*): Folder or Hub id of a masked language model with its tokenizer.
        mask_probability (`float`, *optional*, defaults to 0.1): From 0 to 1.
        ngram_probability (`float`, *optional*, defaults to 0.25): From 0 to 1.
        replace_probability (`float`, *optional*, defaults to 0.4): From 0 to 1; with `masked_lm`.
        num_candidates (`int`, *optional*, defaults to 15): At least 1; with `masked_lm`.
        cache_dir (`str` or `Path`, *optional*): Where the rows are stored. Defaults to the cache of `datasets`.
        device (`str` or `torch.device`, *optional*): Of the masked language model. Defaults to the accelerator, if
            there is one.

    Returns:
        `Dataset`: The variants alone, with the features of `dataset`, in the order of its rows.

    Raises:
        `ValueError`: For values out of range, columns that are missing or of another type, a tokenizer without a mask
            token, and a `masked_lm` that is none; before anything is computed.
    """
    text_columns = list(text_columns)
    _check_numbers(num_variants, num_candidates, mask_probability, ngram_probability, replace_probability)
    unlabeled = _check_columns(dataset, text_columns, label_column)
    if masked_lm is None and tokenizer.mask_token is None:
        raise ValueError(
            f"the {type(tokenizer).__name__} has no mask token, which stands for a word that is left out; set "
            "tokenizer.mask_token, or give the masked language model of another tokenizer as masked_lm."
        )
    if num_variants == 0 or len(dataset) == 0:
        return dataset.select(range(0))

    settings: list[Any] = [_VERSION, text_columns, label_column, num_variants, seed]
    model = None
    if masked_lm is None:
        settings += ["masking", tokenizer.mask_token, mask_probability, ngram_probability]
    else:
        model = MaskedLM(str(masked_lm), num_candidates, device)
        settings += ["replacement", model.fingerprint(), num_candidates, replace_probability]
    seen = {_same_when_equal(row[column] for column in text_columns) for row in dataset.with_format(None)}

    def make_variants(batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        if model is None:
            vary = partial(_mask_or_sample, tokenizer.mask_token, mask_probability, ngram_probability)
        else:
            candidates = model.candidates({text or "" for column in text_columns for text in batch[column]})
            vary = partial(_replace, candidates, replace_probability)
        variants: dict[str, list] = {column: [] for column in batch}
        for index, *values in zip(indices, *batch.values(), strict=True):
            row = dict(zip(batch, values, strict=True))
            # A generator per row: a row's variants depend on nothing that is computed beside it.
            rng = random.Random(f"{seed} {index}")
            for number in range(num_variants):
                variant = {**row, label_column: unlabeled}
                # From another turn in the next row, so that single variants are not all of the first text.
                for column in _columns_to_change(text_columns, turn=index + number):
                    variant[column] = vary(row[column] or "", rng)
                key = _same_when_equal(variant[column] for column in text_columns)
                if key not in seen:
                    seen.add(key)
                    for column, value in variant.items():
                        variants[column].append(value)
        return variants

    # `datasets` would hash the function with the rows that it has seen; and it caches no data that is in memory.
    key = _fingerprint(dataset, label_column, settings)
    folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "hf_kd_augmented"
    folder.mkdir(parents=True, exist_ok=True)
    variants = dataset.with_format(None).map(
        make_variants,
        batched=True,
        with_indices=True,
        batch_size=_ROWS_PER_BATCH,
        remove_columns=dataset.column_names,
        features=dataset.features,
        # Written beside it and renamed at the end: a run that is killed, or a second one, leaves and sees whole files.
        cache_file_name=str(folder / f"augmented-{key}.arrow"),
        new_fingerprint=key,
        desc="Augmenting",
    )
    report = logger.info if len(variants) else logger.warning
    report(f"{len(variants)} variants of {len(dataset)} rows, of {num_variants * len(dataset)} that were tried.")
    return variants


def _check_numbers(num_variants: int, num_candidates: int, *probabilities: float) -> None:
    if num_variants < 0:
        raise ValueError(f"num_variants={num_variants} must be at least 0; 0 makes none, 10 to 30 are usual.")
    if num_candidates < 1:
        raise ValueError(f"num_candidates={num_candidates} must be at least 1, usually 15.")
    names = ("mask_probability", "ngram_probability", "replace_probability")
    for name, probability in zip(names, probabilities, strict=True):
        if not 0 <= probability <= 1:
            raise ValueError(f"{name}={probability} must be between 0 and 1.")


def _check_columns(dataset: Dataset, text_columns: list[str], label_column: str) -> int | float:
    """The label of the variants, in the type of the column."""
    if len(text_columns) not in (1, 2):
        raise ValueError(f"text_columns={text_columns}, but one text or a pair is needed; name one or two columns.")
    for column in (*text_columns, label_column):
        if column not in dataset.column_names:
            raise ValueError(
                f"the dataset has the columns {dataset.column_names}, but {column!r} is needed; name the right one in "
                f"{'label_column' if column == label_column else 'text_columns'}, or augment before tokenizing."
            )
    for column in text_columns:
        feature = dataset.features[column]
        if not isinstance(feature, datasets.Value) or feature.dtype not in ("string", "large_string"):
            raise ValueError(f"column {column!r} is {feature}, but texts are needed; name another in text_columns.")
    feature = dataset.features[label_column]
    # Not a `ClassLabel`, which refuses it.
    if isinstance(feature, datasets.Value) and feature.dtype.startswith(("float", "int")):
        return float(UNLABELED) if feature.dtype.startswith("float") else UNLABELED
    raise ValueError(
        f"column {label_column!r} is {feature}, which has no room for {UNLABELED}, the label of a row without one; "
        f"use dataset.cast_column({label_column!r}, Value('int64'))."
    )


def _same_when_equal(texts: Iterator[str | None]) -> tuple[str, ...]:
    return tuple(" ".join((text or "").split()) for text in texts)


def _columns_to_change(text_columns: list[str], turn: int) -> list[str]:
    """The only text; or of a pair the first, the second, and both, in turn."""
    return text_columns if len(text_columns) == 1 or turn % 3 == 2 else [text_columns[turn % 3]]


def _mask_or_sample(
    mask_token: str, mask_probability: float, ngram_probability: float, text: str, rng: random.Random
) -> str:
    words = [mask_token if rng.random() < mask_probability else word for word in text.split()]
    if words and rng.random() < ngram_probability:
        size = min(rng.randint(1, MAX_NGRAM), len(words))
        start = rng.randint(0, len(words) - size)
        words = words[start : start + size]
    return " ".join(words)


def _replace(candidates: dict[str, Candidates], probability: float, text: str, rng: random.Random) -> str:
    words = text.split()
    for position, choices in candidates[text].items():
        if rng.random() < probability:
            words[position] = rng.choice(choices)
    return " ".join(words)


def _fingerprint(dataset: Dataset, label_column: str, settings: list[Any]) -> str:
    """A name for all that the variants depend on; of the labels that is the type."""
    digest = hashlib.sha256(json.dumps([*settings, repr(dataset.features)]).encode())
    # By value: the dataset's own fingerprint changes with the way that led to the same rows.
    for row in dataset.remove_columns(label_column).with_format(None):
        digest.update(repr(row).encode())
    return digest.hexdigest()[:32]
