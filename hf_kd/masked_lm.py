"""Asks a masked language model which words could stand in the place of others."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForMaskedLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .checkpoint import has_tokenizer
from .compat import whole_weights


_LOGITS_PER_BATCH = 2**26  # 256 MiB in float32; the output is what takes the memory

Candidates = dict[int, list[str]]  # what may replace a word, by the word's position in its text


class _Place(NamedTuple):
    """A word that a masked language model can be asked about."""

    text: str
    position: int  # of the word in the text
    word: str
    token_index: int  # of its piece in `input_ids`
    piece: int
    input_ids: list[int]  # with the piece masked


class MaskedLM:
    """
    What a masked language model would say in the place of a word.

    Args:
        path (`str`): Folder or Hub id of the model and its tokenizer.
        num_candidates (`int`): So many words for each place.
        device (`str` or `torch.device`, *optional*): Where it runs. Defaults to the accelerator, if there is one.

    Raises:
        `ValueError`: See [`load_masked_lm`].
    """

    def __init__(self, path: str, num_candidates: int, device: str | torch.device | None):
        self.model, self.tokenizer = load_masked_lm(path)
        self.num_candidates = num_candidates
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        self.device = device or accelerator or "cpu"
        self.special_ids = set(self.tokenizer.all_special_ids)
        # Two less than there are positions: those of RoBERTa begin at 2.
        positions = getattr(self.model.config, "max_position_embeddings", 512) - 2
        self.max_length = min(self.tokenizer.model_max_length, positions)

    def fingerprint(self) -> str:
        """A name for the model by what it computes: not by its path, where another one may be next time."""
        config = self.model.config.to_dict()
        for name in ("_name_or_path", "transformers_version"):
            config.pop(name, None)
        digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
        digest.update(self.tokenizer.backend_tokenizer.to_str().encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    @torch.no_grad()
    def candidates(self, texts: set[str]) -> dict[str, Candidates]:
        """For each text the words that may replace those which are a single piece of the vocabulary."""
        found: dict[str, Candidates] = {text: {} for text in texts}
        places = [place for text in sorted(texts) for place in self._places(text)]
        places.sort(key=lambda place: -len(place.input_ids))  # like lengths in a batch, none above its first one's
        self.model.to(self.device)
        start = 0
        while start < len(places):
            logits_per_row = self.model.config.vocab_size * len(places[start].input_ids)
            batch = places[start : start + max(1, _LOGITS_PER_BATCH // logits_per_row)]
            start += len(batch)
            for place, words in zip(batch, self._best_words(batch), strict=True):
                if words:
                    found[place.text][place.position] = words
        return {text: dict(sorted(positions.items())) for text, positions in found.items()}

    def _places(self, text: str) -> Iterator[_Place]:
        words = text.split()
        encoded = self.tokenizer(
            " ".join(words), truncation=True, max_length=self.max_length, return_offsets_mapping=True
        )
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        end = -1
        for position, word in enumerate(words):
            start, end = end + 1, end + 1 + len(word)
            pieces = [index for index, (first, last) in enumerate(offsets) if first < end and last > start]
            # A word that the vocabulary lacks is one special piece; one that is cut off has none that reaches its end.
            if word.isalnum() and len(pieces) == 1 and offsets[pieces[0]][1] == end:
                index = pieces[0]
                if ids[index] not in self.special_ids:
                    masked = [*ids[:index], self.tokenizer.mask_token_id, *ids[index + 1 :]]
                    yield _Place(text, position, word, index, ids[index], masked)

    def _best_words(self, batch: list[_Place]) -> list[list[str]]:
        """The most probable other words in each place."""
        padding = self.tokenizer.pad_token_id or 0
        inputs = [torch.tensor(place.input_ids) for place in batch]
        input_ids = pad_sequence(inputs, batch_first=True, padding_value=padding)  # (batch, seq)
        attention_mask = pad_sequence([torch.ones_like(ids) for ids in inputs], batch_first=True)
        logits = self.model(
            input_ids=input_ids.to(self.device), attention_mask=attention_mask.to(self.device)
        ).logits  # (batch, seq, vocabulary)
        scores = logits[range(len(batch)), [place.token_index for place in batch]].float()  # (batch, vocabulary)
        is_word = torch.zeros(scores.shape[1], dtype=torch.bool, device=scores.device)
        is_word[list(self.words)] = True
        scores[:, ~is_word] = -torch.inf
        for row, place in enumerate(batch):
            scores[row, [place.piece, *self.spellings.get(place.word.casefold(), [])]] = -torch.inf
        best = scores.topk(min(self.num_candidates, len(self.words)))
        return [
            # In the order of the vocabulary: that of near ties depends on the batch.
            [self.words[index] for index, value in sorted(zip(indices, values, strict=True)) if value > -torch.inf]
            for indices, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]

    @cached_property
    def words(self) -> dict[int, str]:
        """The entries of the vocabulary that are whole words, by index."""
        decoded = {index: self.tokenizer.decode([index]).strip() for index in range(len(self.tokenizer))}
        words = {index: word for index, word in decoded.items() if word.isalnum() and index not in self.special_ids}
        # A piece from inside a word, "##ing" or in other vocabularies "ing", is written as another one when alone.
        pieces = self.tokenizer([f" {word}" for word in words.values()], add_special_tokens=False)["input_ids"]
        return {index: word for (index, word), ids in zip(words.items(), pieces, strict=True) if ids == [index]}

    @cached_property
    def spellings(self) -> dict[str, list[int]]:
        """The indices of a word in upper and lower case."""
        indices = defaultdict(list)
        for index, word in self.words.items():
            indices[word.casefold()].append(index)
        return indices


@whole_weights()
def load_masked_lm(path: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    Load a masked language model in float32 from safetensors, and its tokenizer.

    Raises:
        `ValueError`: If there is no such model, it has no head for the task, or it has no tokenizer with a mask token.
    """
    try:
        model, info = AutoModelForMaskedLM.from_pretrained(
            path, dtype=torch.float32, use_safetensors=True, output_loading_info=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(
            f"masked_lm={path!r} cannot be loaded as a masked language model from safetensors: {error} Give a folder "
            "or a Hub id such as google-bert/bert-base-uncased."
        ) from error
    if info["missing_keys"]:
        raise ValueError(
            f"masked_lm={path!r} lacks the weights {sorted(info['missing_keys'])}, which would be random; give a "
            "masked language model, such as the one that the teacher was fine-tuned from."
        )
    if not has_tokenizer(path):
        raise ValueError(
            f"masked_lm={path!r} holds no tokenizer; save it there with tokenizer.save_pretrained(folder)."
        )
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    if not tokenizer.is_fast or tokenizer.mask_token is None:
        raise ValueError(
            f"masked_lm={path!r} has a {type(tokenizer).__name__} "
            f"{'without a mask token' if tokenizer.is_fast else 'without offsets'}; give a model that has a fast "
            "tokenizer (tokenizer.json) with a mask token."
        )
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"masked_lm={path!r} has {model.config.vocab_size} embeddings and a tokenizer of {len(tokenizer)} tokens; "
            "save the tokenizer that it was trained with there."
        )
    return model.eval(), tokenizer
