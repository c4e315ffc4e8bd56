"""Classifies texts with an exported ONNX model, without torch."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from tokenizers import Encoding, Tokenizer

from ..cpu import available_cores
from . import FP32_FILE, INSTALL, INT8_FILE


if TYPE_CHECKING:
    from typing_extensions import Self

# A text, a pair of texts, or the pipeline's way to write either.
TextInput = str | tuple[str, str] | dict[str, str]
# What export_onnx writes first, then the flat layout of other exporters; int8 before float32.
_FILE_NAMES = (INT8_FILE, FP32_FILE, "model_quantized.onnx", "model.onnx")
# What transformers leaves out of config.json, because it is the default.
TWO_LABELS = {"0": "LABEL_0", "1": "LABEL_1"}
_Find = Callable[[str], Path | None]  # a file's name in a folder or repository -> where it is, if it is there


class OnnxTextClassifier:
    """
    Text classification on the CPU with ONNX Runtime and `tokenizers` alone: the answers of
    `transformers.pipeline("text-classification")`, in a process that never imports torch.

    Texts longer than `max_length` are cut, as the pipeline does with `truncation=True`.

    Args:
        model_file (`str` or `Path`): An ONNX file with the inputs `input_ids`, `attention_mask` and maybe
            `token_type_ids`, each `(batch, sequence)`, and the output `logits` `(batch, labels)`.
        tokenizer (`tokenizers.Tokenizer`): The model's tokenizer; its padding and truncation are replaced.
        config (`dict`): The model's `config.json`.
        tokenizer_config (`dict`, *optional*): The model's `tokenizer_config.json`.
        num_threads (`int`, *optional*): Threads of ONNX Runtime; defaults to the cores that this process may use.
        max_length (`int`, *optional*): Longest input in tokens, special tokens included; defaults to what the
            tokenizer and the position embeddings allow.
    """

    def __init__(
        self,
        model_file: str | os.PathLike,
        tokenizer: Tokenizer,
        config: dict[str, Any],
        tokenizer_config: dict[str, Any] | None = None,
        num_threads: int | None = None,
        max_length: int | None = None,
    ):
        if num_threads is not None and num_threads < 1:
            raise ValueError(f"num_threads={num_threads} must be at least 1, or None for all cores.")
        tokenizer_config = tokenizer_config or {}
        self.config = config
        lowest, limit = tokenizer.num_special_tokens_to_add(is_pair=False) + 1, length_limit(config, tokenizer_config)
        if max_length is not None and not lowest <= max_length <= limit:
            raise ValueError(f"max_length={max_length}; this model takes {lowest} to {limit} tokens.")
        self.max_length = max_length or limit
        self.tokenizer = tokenizer
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(self.max_length, direction=tokenizer_config.get("truncation_side", "right"))
        self._pads_left = tokenizer_config.get("padding_side", "right") == "left"
        self._pad_token_id = _pad_token_id(tokenizer, tokenizer_config, config)
        self.id2label = {int(index): name for index, name in config.get("id2label", TWO_LABELS).items()}

        self.input_names = self._load(Path(model_file), num_threads or available_cores())

    @classmethod
    def from_pretrained(
        cls,
        model_name_or_path: str | os.PathLike,
        file_name: str | None = None,
        *,
        num_threads: int | None = None,
        max_length: int | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """
        Load an exported folder, or a repository of the Hub that holds one.

        Args:
            model_name_or_path (`str` or `Path`): The folder that [`export_onnx`] wrote, or a Hub id.
            file_name (`str`, *optional*): The model file, relative to the folder. Defaults to
                `onnx/model_quantized.onnx`, or `onnx/model.onnx` where there is no int8 file.
            num_threads (`int`, *optional*): Threads of ONNX Runtime; defaults to all cores.
            max_length (`int`, *optional*): Longest input in tokens; defaults to what the model allows.
            revision (`str`, *optional*): Branch, tag or commit on the Hub.
            token (`str` or `bool`, *optional*): Access token of the Hub, for a private repository; by default that of
                HF_TOKEN, or of `hf auth login`.
            cache_dir (`str` or `Path`, *optional*): Where the Hub's files are kept.
            local_files_only (`bool`, *optional*, defaults to `False`): Use the Hub's files from the cache alone.

        Raises:
            `ValueError`: If a file is missing, naming what writes it, or there is no such repository or revision.
            `ConnectionError`: If the Hub cannot be reached, and the files are not in the cache.
        """
        source = str(model_name_or_path)
        if Path(source).is_dir():
            find: _Find = _find_in_folder(Path(source))
        elif _is_path(source):
            raise ValueError(f"{source} is not a folder; give the output folder of export_onnx, or a Hub id.")
        else:
            find = _HubFiles(
                source, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
            )

        def find_any(*names: str) -> Path:
            found = next((found for name in names if (found := find(name))), None)
            if found is None and isinstance(find, _HubFiles) and find.error is not None:
                raise ConnectionError(
                    f"{source} is no folder here, and the Hub could not be asked for it: {find.error}"
                ) from find.error
            if found is None:
                raise ValueError(
                    f"{source} holds no {' or '.join(names)}; export the model with "
                    "`python recipes/export_onnx.py --model_dir MODEL --output_dir FOLDER`, and give that folder."
                )
            return found

        tokenizer_config = find("tokenizer_config.json")
        return cls(
            # As in Optimum, the bare name is enough.
            find_any(*([file_name, f"onnx/{file_name}"] if file_name is not None else _FILE_NAMES)),
            Tokenizer.from_file(str(find_any("tokenizer.json"))),
            _read_json(find_any("config.json")),
            _read_json(tokenizer_config) if tokenizer_config else None,
            num_threads=num_threads,
            max_length=max_length,
        )

    def __call__(
        self,
        inputs: TextInput | Sequence[TextInput],
        *,
        batch_size: int = 32,
        top_k: int | None | Literal[""] = "",
        function_to_apply: Literal["softmax", "sigmoid", "none"] | None = None,
    ) -> list[Any]:
        """
        Classify one input or a list of them.

        Args:
            inputs (`str`, `tuple[str, str]`, `dict` or a list of these): Texts, pairs of texts, or dictionaries with
                `text` and `text_pair`.
            batch_size (`int`, *optional*, defaults to 32): Inputs per run of the model, sorted by length.
            top_k (`int`, *optional*): The best so many labels of each input; `None` for all of them. Without it the
                best label alone, not in a list of its own.
            function_to_apply (`str`, *optional*): `softmax`, `sigmoid` or `none`; defaults to what the config says,
                as in the pipeline.

        Returns:
            `list`: For each input `{"label": str, "score": float}`, or a list of these with `top_k`. For a single
            input, as in the pipeline: a text or a tuple comes back as a list of one, a `dict` as the answer itself.
        """
        is_single = isinstance(inputs, str | tuple | dict)
        items = cast(Sequence[TextInput], [inputs] if is_single else inputs)
        scores = self._apply(self.logits(items, batch_size=batch_size), function_to_apply)
        results: list[Any] = []
        for row in scores:
            answers = [
                {"label": self.id2label[int(i)], "score": float(row[i])} for i in np.argsort(-row, kind="stable")
            ]
            results.append(answers[0] if top_k == "" else answers[:top_k])
        return results[0] if isinstance(inputs, dict) or (is_single and top_k != "") else results

    def logits(self, inputs: Sequence[TextInput], batch_size: int = 32) -> np.ndarray:
        """
        The model's raw outputs, in the order of the inputs.

        Args:
            inputs (`list` of `str`, `tuple[str, str]` or `dict`): Texts or pairs of texts.
            batch_size (`int`, *optional*, defaults to 32): Inputs per run; each batch is padded to its longest row.

        Returns:
            `np.ndarray`: float32 of shape `(inputs, labels)`.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1.")
        encodings = self.encode(inputs)
        # Alike lengths side by side: next to no padding.
        order = sorted(range(len(encodings)), key=lambda i: len(encodings[i].ids))
        logits = np.empty((len(encodings), len(self.id2label)), dtype=np.float32)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            logits[rows] = self.run(self.pad([encodings[i] for i in rows]))
        return logits

    def encode(self, inputs: Sequence[TextInput]) -> list[Encoding]:
        """Tokens of each input, truncated and not padded."""
        return self.tokenizer.encode_batch([text_or_pair(item) for item in inputs])

    def pad(self, encodings: Sequence[Encoding]) -> dict[str, np.ndarray]:
        """The model's inputs, int64 of shape `(batch, longest row)`."""
        width = max(len(encoding.ids) for encoding in encodings)
        fills = {"input_ids": self._pad_token_id, "attention_mask": 0, "token_type_ids": 0}
        batch = {name: np.full((len(encodings), width), fills[name], dtype=np.int64) for name in self.input_names}
        for row, encoding in enumerate(encodings):
            length = len(encoding.ids)
            filled = slice(width - length, width) if self._pads_left else slice(0, length)
            values = {
                "input_ids": encoding.ids,
                "attention_mask": encoding.attention_mask,
                "token_type_ids": encoding.type_ids,
            }
            for name, array in batch.items():
                array[row, filled] = values[name]
        return batch

    def run(self, batch: dict[str, np.ndarray]) -> np.ndarray:
        """Logits `(batch, labels)` of model inputs `(batch, sequence)`."""
        return self.session.run(["logits"], batch)[0]

    def _load(self, model_file: Path, num_threads: int) -> list[str]:
        """Make the model ready to run; the names of its inputs."""
        try:
            import onnxruntime
        except ImportError as error:
            raise ImportError(f"{error}. OnnxTextClassifier needs onnxruntime: {INSTALL}.") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.inter_op_num_threads = 1
        # Threads that spin between two calls take the cores away from whatever else runs in this process.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self.session = onnxruntime.InferenceSession(str(model_file), options, providers=["CPUExecutionProvider"])
        return [node.name for node in self.session.get_inputs()]

    def _apply(self, logits: np.ndarray, function: str | None) -> np.ndarray:
        problem_type = self.config.get("problem_type")
        if function is None:
            if problem_type == "regression":
                function = "none"
            elif problem_type == "multi_label_classification" or len(self.id2label) == 1:
                function = "sigmoid"
            else:
                function = "softmax"
        if function == "none":
            return logits
        if function == "sigmoid":
            return 0.5 * (1.0 + np.tanh(0.5 * logits))  # the same, without overflow
        if function == "softmax":
            exponents = np.exp(logits - logits.max(axis=-1, keepdims=True))
            return exponents / exponents.sum(axis=-1, keepdims=True)
        raise ValueError(f"function_to_apply={function!r} must be softmax, sigmoid or none.")


def text_or_pair(item: TextInput) -> str | tuple[str, str]:
    if isinstance(item, dict):
        if not {"text"} <= item.keys() <= {"text", "text_pair"}:
            raise ValueError(f"an input has the keys {sorted(item)}; give `text`, and `text_pair` for a pair.")
        item = (item["text"], item["text_pair"]) if item.get("text_pair") is not None else item["text"]
    texts = item if isinstance(item, tuple) and len(item) == 2 else (item,)
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(
            f"an input is {item!r:.80}; give a text, a tuple of two texts, or {{'text': ..., 'text_pair': ...}}."
        )
    return item


def length_limit(config: dict[str, Any], tokenizer_config: dict[str, Any]) -> int:
    """Longest input in tokens that position embeddings and tokenizer allow; 512 where neither says."""
    positions = config.get("max_position_embeddings")
    if positions is not None and "roberta" in config.get("model_type", ""):
        positions -= config.get("pad_token_id", 1) + 1  # RoBERTa counts positions from the one after the padding index
    limits = [limit for limit in (positions, tokenizer_config.get("model_max_length")) if limit is not None]
    return min((int(limit) for limit in limits if limit < 1e6), default=512)  # 1e30 is how "no limit" is written


def _pad_token_id(tokenizer: Tokenizer, tokenizer_config: dict[str, Any], config: dict[str, Any]) -> int:
    token = tokenizer_config.get("pad_token")
    token = token["content"] if isinstance(token, dict) else token
    index = tokenizer.token_to_id(token) if token is not None else None
    return index if index is not None else config.get("pad_token_id") or 0


def _is_path(source: str) -> bool:
    """A Hub id is `name` or `owner/name`; anything else can only be a path."""
    return os.path.isabs(source) or source.startswith((".", "~")) or source.count("/") > 1 or "\\" in source


def _find_in_folder(folder: Path) -> _Find:
    def find(name: str) -> Path | None:
        return folder / name if (folder / name).is_file() else None

    return find


class _HubFiles:
    """Finds files of a repository, and those in the cache alone once the Hub could not be reached."""

    def __init__(self, repo_id: str, **options: Any):
        self.repo_id = repo_id
        self.options = options
        self.error: Exception | None = None  # why the Hub could not be reached

    def __call__(self, name: str) -> Path | None:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import (
            EntryNotFoundError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        try:
            path = Path(hf_hub_download(self.repo_id, name, **self.options))
            # The other files from the same commit: somebody may push between two downloads.
            self.options["revision"] = path.parents[name.count("/")].name
            return path
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:
            raise ValueError(
                f"{self.repo_id} (revision {self.options['revision'] or 'main'}) is no folder here, and cannot be "
                f"read from the Hub: {error} Check name and revision; for a private model log in with "
                "`hf auth login`, set HF_TOKEN, or give `token`."
            ) from error
        except LocalEntryNotFoundError as error:
            self.error = self.error or error
            self.options["local_files_only"] = True
        except EntryNotFoundError:
            pass
        return None


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
