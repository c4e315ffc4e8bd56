"""Reads hidden states and attention vectors out of a running model: the one file that knows model families.

Hooks on the wanted blocks keep the fused attention kernels, which return no attention maps, and keep nothing that is
not compared.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from itertools import cycle
from operator import attrgetter
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from .batch import Signals, attention_mask_of


@dataclass(frozen=True)
class Family:
    """Where a model family keeps its blocks.

    Attributes:
        blocks (`str`): Path from the base model to the blocks.
        shares_blocks (`bool`): Whether one block runs as several layers, so that there is no list with one for each.
    """

    blocks: str
    shares_blocks: bool = field(default=False, kw_only=True)


@dataclass(frozen=True)
class SplitFamily(Family):
    """A family whose blocks have a linear layer each for queries, keys and values: the paths to it from a block."""

    query: str
    key: str
    value: str
    attention_output: str
    feed_forward_in: str
    feed_forward_out: str


@dataclass(frozen=True)
class FusedFamily(Family):
    """A family whose attention gets queries, keys and values from one linear layer, and rotates them by position.

    Attributes:
        attention (`str`): Path from a block to the attention, which is given the rotation.
        query_key_value (`str`): Path from a block to the linear layer.
        final_norm (`str`): Path from the base model to the norm after the last block.
    """

    attention: str
    query_key_value: str
    final_norm: str


_BERT = SplitFamily(
    blocks="encoder.layer",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    attention_output="attention.output.dense",
    feed_forward_in="intermediate.dense",
    feed_forward_out="output.dense",
)
_DEBERTA = Family(blocks="encoder.layer")
FAMILIES: dict[str, Family] = {
    "albert": SplitFamily(
        blocks="encoder.albert_layer_groups",
        shares_blocks=True,
        query="attention.query",
        key="attention.key",
        value="attention.value",
        attention_output="attention.dense",
        feed_forward_in="ffn",
        feed_forward_out="ffn_output",
    ),
    "bert": _BERT,
    "camembert": _BERT,
    "deberta": _DEBERTA,
    "deberta-v2": _DEBERTA,
    "distilbert": SplitFamily(
        blocks="transformer.layer",
        query="attention.q_lin",
        key="attention.k_lin",
        value="attention.v_lin",
        attention_output="attention.out_lin",
        feed_forward_in="ffn.lin1",
        feed_forward_out="ffn.lin2",
    ),
    "electra": _BERT,
    "modernbert": FusedFamily(blocks="layers", attention="attn", query_key_value="attn.Wqkv", final_norm="final_norm"),
    # Its attention adds a bias for the distance of two tokens, the same in every block, to the product of query and
    # key; what is compared is the product without it.
    "mpnet": SplitFamily(
        blocks="encoder.layer",
        query="attention.attn.q",
        key="attention.attn.k",
        value="attention.attn.v",
        attention_output="attention.attn.o",
        feed_forward_in="intermediate.dense",
        feed_forward_out="output.dense",
    ),
    "roberta": _BERT,
    "xlm-roberta": _BERT,
}


@dataclass(frozen=True)
class Wanted:
    """The layers to read: hidden states, queries with keys, and values (numbered as in `layers.py`)."""

    hidden: frozenset[int] = frozenset()
    attention: frozenset[int] = frozenset()
    values: frozenset[int] = frozenset()


def encoder_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The transformer blocks of a model of a known family, in the order they run: layer k is the k-th.

    The same block is in it several times where layers share their weights (ALBERT).

    Raises:
        ValueError: If the family is not known.
    """
    model = _without_peft(model)
    family = family_of(model.config)
    blocks = attrgetter(family.blocks)(model.base_model)
    if not family.shares_blocks:
        return blocks
    repeats = model.config.num_hidden_layers
    groups = [blocks[int(run / (repeats / len(blocks)))] for run in range(repeats)]
    return nn.ModuleList(block for group in groups for block in group.albert_layers)


def num_layers(config: Any) -> int:
    """Number of blocks that a forward runs: `num_hidden_layers`, of which each is a group of blocks in ALBERT."""
    return config.num_hidden_layers * getattr(config, "inner_group_num", 1)


def family_of(config: Any) -> Family:
    """The entry of `FAMILIES` for a config.

    Raises:
        ValueError: If the family is not known, with the families that are.
    """
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"the layers of model type {config.model_type!r} are not known; copying layers works for "
            f"{', '.join(sorted(FAMILIES))}. Any other teacher can be given a smaller model of its vocabulary as "
            "student: AutoModelForSequenceClassification.from_pretrained(...)."
        )
    return FAMILIES[config.model_type]


def attention_family_of(config: Any) -> SplitFamily | FusedFamily:
    """The entry of `FAMILIES` for a config whose queries, keys and values can be read.

    Raises:
        ValueError: If they cannot, with the reason and the families where they can.
    """
    family = _readable_family(config)
    if family is not None:
        return family
    if config.model_type in ("deberta", "deberta-v2"):
        reason = "its scores are more than queries times keys: it attends to relative positions besides (disentangled)"
    elif config.model_type in FAMILIES:
        reason = (
            f"on transformers {transformers.__version__} it makes them inside its attention function; install "
            "'transformers>=5'"
        )
    else:
        reason = "this family is not known"
    families = [name for name, known in sorted(FAMILIES.items()) if isinstance(known, SplitFamily)]
    raise ValueError(
        f"the queries, keys and values of model type {config.model_type!r} cannot be read: {reason}. "
        f"Attention distillation and relations of attention vectors work for {', '.join(families)}, and modernbert on "
        "transformers 5. Logits, hidden states and relations of [CLS] states (similarity, rkd, pkt, correlation, crd) "
        "can be distilled from any encoder: set attention_loss_weight=0, and relation_loss_type='similarity' for a "
        "relation loss."
    )


def _readable_family(config: Any) -> SplitFamily | FusedFamily | None:
    family = FAMILIES.get(config.model_type)
    if isinstance(family, FusedFamily):
        from transformers.models.modernbert.modeling_modernbert import ModernBertAttention

        # transformers 4.57 rotates inside the attention functions, and unpads for flash attention before the blocks.
        return family if "position_embeddings" in inspect.signature(ModernBertAttention.forward).parameters else None
    return family if isinstance(family, SplitFamily) else None


def attention_reach(config: Any, wanted: Wanted) -> dict[int, int]:
    """How many tokens to either side the wanted layers look, of those that do not look everywhere."""
    if not isinstance(FAMILIES.get(config.model_type), FusedFamily):
        return {}
    return {
        layer: config.sliding_window
        for layer in wanted.attention | wanted.values
        if config.layer_types[layer - 1] == "sliding_attention"
    }


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


class _Recorded(NamedTuple):
    tensor: Tensor
    module: nn.Module


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
        ValueError: If queries, keys or values are wanted of a family that they cannot be read of.
    """

    def __init__(self, model: PreTrainedModel, wanted: Wanted):
        self.wanted = wanted
        # A config may say that outputs are plain tuples, which have no names.
        self.forward_kwargs: dict[str, Any] = (
            {} if getattr(model.config, "return_dict", True) else {"return_dict": True}
        )
        self._config = model.config
        self._handles: list[Any] = []
        self._recorded: dict[str, dict[int, Any]] = defaultdict(dict)  # kind of signal -> layer -> what a hook read
        needs_attention = bool(wanted.attention or wanted.values)
        self._family = attention_family_of(model.config) if needs_attention else _readable_family(model.config)
        self._blocks: Sequence[nn.Module] = []
        self._final_norm: nn.Module | None = None
        if self._family is None:
            if wanted.hidden:
                self.forward_kwargs["output_hidden_states"] = True
        elif wanted.hidden or needs_attention:
            self._blocks = list(encoder_blocks(model))
            if isinstance(self._family, FusedFamily):
                self._final_norm = attrgetter(self._family.final_norm)(_without_peft(model).base_model)

    def __enter__(self) -> Capture:
        runs: dict[nn.Module, list[int]] = defaultdict(list)
        for layer, block in enumerate(self._blocks, start=1):
            runs[block].append(layer)
        wanted, family = self.wanted, self._family
        for block, layers in runs.items():
            if 0 in wanted.hidden:
                self._read_input("embeddings", block, "hidden_states", layers, {1})
            if self._final_norm is None or len(self._blocks) not in layers:
                self._read_output("hidden", block, layers, wanted.hidden)
            else:
                # The last hidden states that the model reports are those after its norm.
                self._read_output("hidden", self._final_norm, layers, wanted.hidden)
            if isinstance(family, SplitFamily):
                self._read_output("queries", block.get_submodule(family.query), layers, wanted.attention)
                self._read_output("keys", block.get_submodule(family.key), layers, wanted.attention)
                self._read_output("values", block.get_submodule(family.value), layers, wanted.values)
            elif isinstance(family, FusedFamily):
                inside = wanted.attention | wanted.values
                self._read_output("fused", block.get_submodule(family.query_key_value), layers, inside)
                attention = block.get_submodule(family.attention)
                self._read_input("rotations", attention, "position_embeddings", layers, inside)
        return self

    def __exit__(self, *exc_info: object) -> None:
        while self._handles:
            self._handles.pop().remove()
        if exc_info[0] is not None:
            self._recorded.clear()

    def signals(self, outputs: Any, inputs: Mapping[str, Any]) -> Signals:
        """Hand over what was recorded, and keep nothing.

        Args:
            outputs ([`~transformers.utils.ModelOutput`]): What the forward returned, with `logits`, or `start_logits`
                and `end_logits`.
            inputs (`Mapping[str, Any]`): The batch it was given.

        Raises:
            ValueError: If the forward did not produce a wanted signal, or cut it off from the gradient.
        """
        recorded, self._recorded = self._recorded, defaultdict(dict)
        hidden = {layer: states.tensor for layer, states in recorded["hidden"].items()}
        if recorded["embeddings"]:
            hidden[0] = recorded["embeddings"][1]
        if "output_hidden_states" in self.forward_kwargs:
            hidden = {layer: outputs.hidden_states[layer] for layer in self.wanted.hidden}
        queries, keys, values = self._attention_vectors(recorded)
        if (set(hidden), set(queries), set(values)) != (self.wanted.hidden, self.wanted.attention, self.wanted.values):
            raise ValueError(
                f"the forward of {self._config.model_type!r} recorded hidden states of layers {sorted(hidden)}, "
                f"attention of {sorted(queries)} and values of {sorted(values)}, but {sorted(self.wanted.hidden)}, "
                f"{sorted(self.wanted.attention)} and {sorted(self.wanted.values)} are wanted; do not drop layers "
                "(LayerDrop) or replace blocks while distilling."
            )
        logits = _logits_of(outputs)
        if logits.requires_grad:
            self._require_gradient(recorded)
        return Signals(
            logits=logits,
            attention_mask=attention_mask_of(inputs),
            hidden=hidden,
            queries=queries,
            keys=keys,
            values=values,
            attention_reach=attention_reach(self._config, self.wanted),
        )

    def _read_output(self, kind: str, module: nn.Module, layers: list[int], wanted: AbstractSet[int]) -> None:
        """Record what a module returns in those of its runs, which are the layers in this order, that are wanted."""
        if wanted.isdisjoint(layers):
            return
        store, runs = self._recorded[kind], cycle(layers)

        def record(module: nn.Module, args: tuple, output: Any) -> None:
            layer = next(runs)
            if layer in wanted:
                # Blocks return a tensor on transformers 5 and a tuple on 4.57.
                store[layer] = _Recorded(output[0] if isinstance(output, tuple) else output, module)

        self._handles.append(module.register_forward_hook(record))

    def _read_input(
        self, kind: str, module: nn.Module, name: str, layers: list[int], wanted: AbstractSet[int]
    ) -> None:
        """Record an argument of a module, the first if it comes without its name, in the runs that are wanted."""
        if wanted.isdisjoint(layers):
            return
        store, runs = self._recorded[kind], cycle(layers)

        def record(module: nn.Module, args: tuple, kwargs: dict) -> None:
            layer = next(runs)
            if layer in wanted:
                store[layer] = kwargs[name] if name in kwargs else args[0]

        self._handles.append(module.register_forward_pre_hook(record, with_kwargs=True))

    def _attention_vectors(self, recorded: dict[str, dict[int, Any]]) -> list[dict[int, Tensor]]:
        """Queries, keys and values by layer, each of shape `(batch, heads, seq, head_size)`."""
        heads = self._config.num_attention_heads
        if not isinstance(self._family, FusedFamily):
            return [
                {layer: _split_heads(vectors.tensor, heads) for layer, vectors in recorded[kind].items()}
                for kind in ("queries", "keys", "values")
            ]
        queries, keys, values = {}, {}, {}
        # Here and not in the hook: what a hook adds to a checkpointed block is missing when the block runs again.
        for layer, fused in recorded["fused"].items():
            query, key, value = (_split_heads(x, heads) for x in fused.tensor.chunk(3, dim=-1))
            if layer in self.wanted.attention:
                queries[layer], keys[layer] = _rotate(query, key, *recorded["rotations"][layer])
            if layer in self.wanted.values:
                values[layer] = value
        return [queries, keys, values]

    def _require_gradient(self, recorded: dict[str, dict[int, Any]]) -> None:
        """Reentrant gradient checkpointing runs the blocks without a graph: the loss would train nothing of them."""
        for kind in ("hidden", "queries", "keys", "values", "fused"):
            for layer, (tensor, module) in recorded[kind].items():
                if not tensor.requires_grad and any(p.requires_grad for p in module.parameters()):
                    what = {"hidden": "hidden states", "fused": "queries, keys and values"}.get(kind, kind)
                    raise ValueError(
                        f"the {what} of layer {layer} carry no gradient because gradient checkpointing runs with "
                        "use_reentrant=True, so their loss would train nothing; set "
                        "gradient_checkpointing_kwargs={'use_reentrant': False}."
                    )


def _logits_of(outputs: Any) -> Tensor:
    if getattr(outputs, "logits", None) is not None:
        return outputs.logits
    start, end = getattr(outputs, "start_logits", None), getattr(outputs, "end_logits", None)
    if start is not None and end is not None:
        return torch.stack([start, end], dim=1)  # (batch, 2, seq)
    names = sorted(outputs) if isinstance(outputs, Mapping) else type(outputs).__name__
    raise ValueError(
        f"the model returned {names} but no logits, nor start_logits and end_logits; load it with the head of its "
        "task, for example with AutoModelForSequenceClassification.from_pretrained(...)."
    )


def _split_heads(x: Tensor, heads: int) -> Tensor:
    batch, seq, width = x.shape
    return x.view(batch, seq, heads, width // heads).transpose(1, 2)  # (batch, heads, seq, head_size)


def _rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    from transformers.models.modernbert.modeling_modernbert import apply_rotary_pos_emb

    return apply_rotary_pos_emb(query, key, cos, sin)
