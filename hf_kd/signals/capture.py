"""Reads hidden states and attention vectors out of a running model: the one file that knows model families.

Hooks on the wanted blocks keep the fused attention kernels, which return no attention maps, and keep nothing that is
not compared.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .batch import Signals, attention_mask_of


@dataclass(frozen=True)
class Family:
    """Where a model family keeps its blocks (from the base model) and its projections (from a block)."""

    blocks: str
    query: str
    key: str


_BERT = Family(blocks="encoder.layer", query="attention.self.query", key="attention.self.key")
FAMILIES: dict[str, Family] = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "electra": _BERT,
    "distilbert": Family(blocks="transformer.layer", query="attention.q_lin", key="attention.k_lin"),
}


@dataclass(frozen=True)
class Wanted:
    """The layers to read: hidden states of some, queries and keys of others (numbered as in `layers.py`)."""

    hidden: frozenset[int] = frozenset()
    attention: frozenset[int] = frozenset()


def encoder_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The transformer blocks of a model of a known family.

    Raises:
        ValueError: If the family is not known.
    """
    return attrgetter(family_of(model.config).blocks)(_without_peft(model).base_model)


def family_of(config: Any) -> Family:
    """The entry of `FAMILIES` for a config.

    Raises:
        ValueError: If the family is not known, with the families that are.
    """
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"the layers of model type {config.model_type!r} are not known; attention distillation and copying layers "
            f"work for {', '.join(sorted(FAMILIES))}. Logits and hidden states can be distilled from any encoder: set "
            "attention_loss_weight=0."
        )
    return FAMILIES[config.model_type]


def forward_columns(model: nn.Module) -> set[str] | None:
    """Names of the arguments that a model's `forward` declares; `None` if it takes anything."""
    parameters = inspect.signature(_without_peft(model).forward).parameters
    names = {name for name, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    return names or None


def _without_peft(model: Any) -> Any:
    """A PEFT wrapper declares no columns, and calls something else its base model."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def columns_for(columns: set[str] | None, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a batch that a model with these `forward_columns` is given."""
    return {name: value for name, value in inputs.items() if columns is None or name in columns}


class Capture:
    """Reads the wanted signals of the forward that runs inside its `with` block.

    Outside the block nothing is recorded: gradient checkpointing runs the forward, hooks included, a second time in
    the backward.

    ```python
    capture = Capture(model, Wanted(hidden=frozenset({6})))
    with capture:
        outputs = model(**inputs, **capture.forward_kwargs)
    signals = capture.signals(outputs, inputs)
    ```

    Args:
        model ([`~transformers.PreTrainedModel`]): The model itself, not a wrapper; what runs may be a wrapper around
            it.
        wanted ([`Wanted`]): The layers to read.

    Raises:
        ValueError: If queries and keys are wanted of a family that is not known.
    """

    def __init__(self, model: PreTrainedModel, wanted: Wanted):
        self.wanted = wanted
        # A config may say that outputs are plain tuples, which have no names.
        self.forward_kwargs: dict[str, Any] = (
            {} if getattr(model.config, "return_dict", True) else {"return_dict": True}
        )
        self._config = model.config
        self._blocks: Any = None
        self._handles: list[Any] = []
        self._hidden: dict[int, Tensor] = {}
        self._queries: dict[int, Tensor] = {}
        self._keys: dict[int, Tensor] = {}
        if wanted.attention or (wanted.hidden and model.config.model_type in FAMILIES):
            self._blocks = encoder_blocks(model)
        elif wanted.hidden:
            self.forward_kwargs["output_hidden_states"] = True

    def __enter__(self) -> Capture:
        if self._blocks is None:
            return self
        for layer in self.wanted.hidden:
            if layer == 0:
                hook = self._blocks[0].register_forward_pre_hook(self._record_embeddings, with_kwargs=True)
            else:
                hook = self._blocks[layer - 1].register_forward_hook(_recorder(self._hidden, layer))
            self._handles.append(hook)
        family = family_of(self._config)
        for layer in self.wanted.attention:
            for path, store in ((family.query, self._queries), (family.key, self._keys)):
                projection = attrgetter(path)(self._blocks[layer - 1])
                self._handles.append(projection.register_forward_hook(_recorder(store, layer)))
        return self

    def __exit__(self, *exc_info: object) -> None:
        while self._handles:
            self._handles.pop().remove()
        if exc_info[0] is not None:
            self._hidden, self._queries, self._keys = {}, {}, {}

    def signals(self, outputs: Any, inputs: Mapping[str, Any]) -> Signals:
        """Hand over what was recorded, and keep nothing.

        Args:
            outputs ([`~transformers.utils.ModelOutput`]): What the forward returned, with `logits`.
            inputs (`Mapping[str, Any]`): The batch it was given.

        Raises:
            ValueError: If the forward did not produce a wanted signal, or cut it off from the gradient.
        """
        hidden, queries, keys = self._hidden, self._queries, self._keys
        self._hidden, self._queries, self._keys = {}, {}, {}
        if "output_hidden_states" in self.forward_kwargs:
            hidden = {layer: outputs.hidden_states[layer] for layer in self.wanted.hidden}
        if set(hidden) != self.wanted.hidden or set(queries) != self.wanted.attention:
            raise ValueError(
                f"the forward of {self._config.model_type!r} recorded hidden states of layers {sorted(hidden)} and "
                f"attention of {sorted(queries)}, but {sorted(self.wanted.hidden)} and "
                f"{sorted(self.wanted.attention)} are wanted; do not drop layers (LayerDrop) or replace blocks while "
                "distilling."
            )
        self._require_gradient(queries)
        heads = self._config.num_attention_heads
        return Signals(
            logits=outputs.logits,
            attention_mask=attention_mask_of(inputs),
            hidden=hidden,
            queries={layer: _split_heads(x, heads) for layer, x in queries.items()},
            keys={layer: _split_heads(x, heads) for layer, x in keys.items()},
        )

    def _record_embeddings(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._hidden[0] = args[0] if args else kwargs["hidden_states"]

    def _require_gradient(self, queries: dict[int, Tensor]) -> None:
        """Reentrant gradient checkpointing runs the blocks without a graph: the attention term would train nothing."""
        for layer, query in queries.items():
            projection = attrgetter(family_of(self._config).query)(self._blocks[layer - 1])
            if torch.is_grad_enabled() and projection.weight.requires_grad and not query.requires_grad:
                raise ValueError(
                    f"the queries of layer {layer} carry no gradient because gradient checkpointing runs with "
                    "use_reentrant=True, so the attention loss would train nothing; set "
                    "gradient_checkpointing_kwargs={'use_reentrant': False}."
                )


def _recorder(store: dict[int, Tensor], layer: int) -> Any:
    def record(module: nn.Module, args: tuple, output: Any) -> None:
        # Blocks return a tensor on transformers 5 and a tuple on 4.57.
        store[layer] = output[0] if isinstance(output, tuple) else output

    return record


def _split_heads(x: Tensor, heads: int) -> Tensor:
    batch, seq, width = x.shape
    return x.view(batch, seq, heads, width // heads).transpose(1, 2)  # (batch, heads, seq, head_size)
