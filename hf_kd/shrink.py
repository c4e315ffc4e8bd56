"""Shrinks the widths of a model to its most important hidden dimensions, heads and neurons."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .signals.capture import SplitFamily, encoder_blocks, family_of


State = dict[str, Tensor]


def shrink(model: PreTrainedModel, config: Any) -> PreTrainedModel:
    """Make a narrower model out of the most important parts of another, judged by its weights alone.

    - Hidden dimensions, one set for the whole model: those with the largest squared weights in the blocks' linear
      layers that read them, times the squared gains of the blocks' LayerNorms (Network Slimming ranks by such gains,
      https://arxiv.org/abs/1708.06519). Weights that read hidden states grow by `sqrt(old / new)`, since their sums
      have fewer terms.
    - Heads, in each block: those that can write most, by the norm of the product of their output and value weights.
    - Dimensions of a head: attention depends on the weights only through the products of query with key and of output
      with value. Each product gets its nearest one of the smaller rank (a singular value decomposition), which is
      nearer than any choice of dimensions. Attention scores keep their size although `sqrt(head size)` divides them.
    - Feed-forward neurons, in each block: those with the largest squared outgoing weights (`onorm` in
      https://doi.org/10.1109/ICASSP.2014.6853595).

    With the same `hidden_size`, only the feed-forward layers change.

    Args:
        model ([`~transformers.PreTrainedModel`]): The wide model, in float32. It is not changed.
        config ([`~transformers.PretrainedConfig`]): Its config with smaller widths.

    Returns:
        [`~transformers.PreTrainedModel`]: The narrow model, in float32 and eval mode.

    Raises:
        ValueError: If heads would get larger, or it is not known how to shrink a part of the model.
    """
    family, old = family_of(config), model.config
    if not isinstance(family, SplitFamily):
        raise ValueError(
            f"how to shrink the layers of model type {config.model_type!r} is not known; keep the teacher's widths, "
            "or start from fresh weights with init='random'."
        )
    head_size = old.hidden_size // old.num_attention_heads
    new_head_size = config.hidden_size // config.num_attention_heads
    if new_head_size > head_size:
        raise ValueError(
            f"hidden_size={config.hidden_size} with num_attention_heads={config.num_attention_heads} makes heads of "
            f"{new_head_size}, and the teacher's have {head_size}, so that nothing could fill the rest; use "
            f"num_attention_heads={-(-config.hidden_size // head_size)} or more, "
            f"hidden_size={head_size * config.num_attention_heads} or less, or init='random'."
        )
    student = type(model)(config).float().eval()
    state, blocks = model.state_dict(), _block_names(model)
    if config.hidden_size < old.hidden_size:
        _shrink_hidden(state, _residual_axes(model, family, blocks), blocks, config.hidden_size)
        heads = _choose_heads(state, model, family, blocks, config.num_attention_heads)
        for block in blocks:
            _shrink_attention(state, family, block, heads[block], head_size, new_head_size)
    for block in blocks:
        width = student.get_submodule(f"{block}.{family.feed_forward_in}").out_features
        _shrink_feed_forward(state, family, block, width)
    shapes = {name: tensor.shape for name, tensor in student.state_dict().items()}
    unknown = sorted(name for name in {*state, *shapes} if name not in state or state[name].shape != shapes.get(name))
    if unknown:
        names = ", ".join(unknown[:3]) + (", ..." if len(unknown) > 3 else "")
        raise ValueError(
            f"how to shrink {names} of {type(model).__name__} to hidden_size={config.hidden_size} is not known; use "
            "another hidden_size or init='random'."
        )
    student.load_state_dict(state)
    return student


def set_hidden_size(config: Any, hidden_size: int) -> None:
    """Set the width of a config, and what has to be as wide."""
    # ELECTRA projects embeddings of another width, but has nothing between embeddings and blocks of the same one.
    # DeBERTa's pooler reads hidden states without a projection.
    for name in ("embedding_size",) if config.model_type == "electra" else ("pooler_hidden_size",):
        if getattr(config, name, None) == config.hidden_size:
            setattr(config, name, hidden_size)
    config.hidden_size = hidden_size


def _block_names(model: PreTrainedModel) -> list[str]:
    blocks = set(encoder_blocks(model))  # a block that runs several times (ALBERT) once
    return [name for name, module in model.named_modules() if module in blocks]


def _axes_that_follow(model: PreTrainedModel, config: Any) -> dict[tuple[str, int], int]:
    """The axes of the weights that have another size under another config, with that size.

    Building the model tells them apart from axes of the same size, such as a vocabulary as large as the hidden states.
    """
    with torch.device("meta"):
        other = type(model)(config).state_dict()
    return {
        (name, axis): other[name].shape[axis]
        for name, tensor in model.state_dict().items()
        for axis, size in enumerate(tensor.shape)
        if other[name].shape[axis] != size
    }


def _residual_axes(model: PreTrainedModel, family: SplitFamily, blocks: list[str]) -> list[tuple[str, int]]:
    """The axes along the hidden states, without those inside the attention, which are as wide."""
    wide = copy.deepcopy(model.config)
    set_hidden_size(wide, 5 * wide.hidden_size)
    inside = {(f"{block}.{family.attention_output}.weight", 1) for block in blocks}
    for projection in (family.query, family.key, family.value):
        inside |= {(f"{block}.{projection}.{kind}", 0) for block in blocks for kind in ("weight", "bias")}
    return [place for place in _axes_that_follow(model, wide) if place not in inside]


def _shrink_hidden(state: State, axes: list[tuple[str, int]], blocks: list[str], hidden_size: int) -> None:
    gains: Any = 0.0
    reads: Any = 0.0
    for name, axis in axes:
        if name.endswith(".weight") and name.startswith(tuple(f"{block}." for block in blocks)):
            if state[name].dim() == 1:
                gains = gains + state[name].square()
            elif axis == 1:
                reads = reads + state[name].square().sum(0)
    kept = _largest(gains * reads, hidden_size)
    for name, axis in axes:
        old_size = state[name].shape[axis]
        state[name] = state[name].index_select(axis, kept)
        # Embeddings are scaled with a decoder that is tied to them; the LayerNorm after them takes it back.
        if axis == 1:
            state[name] = state[name] * (old_size / hidden_size) ** 0.5


def _choose_heads(
    state: State, model: PreTrainedModel, family: SplitFamily, blocks: list[str], num_heads: int
) -> dict[str, Tensor]:
    """Block to the heads that it keeps; what the blocks share for each head is reduced with them."""
    scores = {}
    for block in blocks:
        value, output = state[f"{block}.{family.value}.weight"], state[f"{block}.{family.attention_output}.weight"].T
        v, o = (x.unflatten(0, (model.config.num_attention_heads, -1)) for x in (value, output))
        scores[block] = ((v @ v.mT) * (o @ o.mT)).sum((1, 2)).sqrt()  # the norm of output @ value, head by head
    one_head = copy.deepcopy(model.config)
    one_head.num_attention_heads = 1
    shared = [place for place, size in _axes_that_follow(model, one_head).items() if size == 1]
    if shared:  # MPNet's bias for the distance of two tokens
        total = torch.stack([score / score.sum() for score in scores.values()]).sum(0)
        scores = dict.fromkeys(blocks, total)
    heads = {block: _largest(score, num_heads) for block, score in scores.items()}
    for name, axis in shared:
        state[name] = state[name].index_select(axis, heads[blocks[0]])
    return heads


def _shrink_attention(
    state: State, family: SplitFamily, block: str, heads: Tensor, head_size: int, new_head_size: int
) -> None:
    names = [f"{block}.{path}" for path in (family.query, family.key, family.value, family.attention_output)]
    query, key, value, output = names
    # A token's attention weights sum to 1: the biases of the values add the same to every output, dropped heads' too.
    state[f"{output}.bias"] = state[f"{output}.bias"] + state[f"{output}.weight"] @ state[f"{value}.bias"]
    state[f"{value}.bias"] = torch.zeros_like(state[f"{value}.bias"])
    # (heads, head_size, hidden + 1): the bias is the weight of one more input, which is always 1.
    q, k, v = (
        torch.cat([state[f"{name}.weight"], state[f"{name}.bias"][:, None]], 1).unflatten(0, (-1, head_size))[heads]
        for name in (query, key, value)
    )
    o = state[f"{output}.weight"].T.unflatten(0, (-1, head_size))[heads]  # (heads, head_size, hidden)
    if new_head_size < head_size:
        q, k = _low_rank(q, k, new_head_size)
        v, o = _low_rank(v, o, new_head_size)
        scale = (new_head_size / head_size) ** 0.25
        q, k = q * scale, k * scale
    for name, x in ((query, q), (key, k), (value, v)):
        state[f"{name}.weight"], state[f"{name}.bias"] = x.flatten(0, 1)[:, :-1], x.flatten(0, 1)[:, -1]
    state[f"{output}.weight"] = o.flatten(0, 1).T


def _low_rank(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The factors of that many rows whose product `a.T @ b` is nearest to that of the given ones."""
    (q_a, r_a), (q_b, r_b) = torch.linalg.qr(a.mT), torch.linalg.qr(b.mT)
    u, s, vh = torch.linalg.svd(r_a @ r_b.mT)
    root = s[..., :rank, None].sqrt()
    return root * (q_a @ u[..., :rank]).mT, root * (vh[..., :rank, :] @ q_b.mT)


def _shrink_feed_forward(state: State, family: SplitFamily, block: str, width: int) -> None:
    into, out = f"{block}.{family.feed_forward_in}", f"{block}.{family.feed_forward_out}"
    if width == state[f"{out}.weight"].shape[1]:
        return
    kept = _largest(state[f"{out}.weight"].square().sum(0), width)
    for name in (f"{into}.weight", f"{into}.bias"):
        state[name] = state[name][kept]
    state[f"{out}.weight"] = state[f"{out}.weight"][:, kept]


def _largest(score: Tensor, number: int) -> Tensor:
    return score.argsort(descending=True, stable=True)[:number].sort().values
