"""The table of loss terms, each beside its definition in the literature, written as loops over Python floats."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor

from hf_kd.objective import losses


LENGTHS = (5, 3, 1, 4)  # unequal, so that a mean over rows and a mean over tokens differ
BATCH, SEQ, CLASSES, HIDDEN, HEADS = len(LENGTHS), max(LENGTHS), 3, 4, 2
TARGETS = tuple(length // 2 for length in LENGTHS)  # a valid class of each row, and a valid position
# Tuples of tensors are stacked in the second axis here, so that rows of a batch stay rows.
SHAPES = {
    "logits": (BATCH, CLASSES),
    "positions": (BATCH, SEQ),  # logits of which each class is a position
    "hidden": (BATCH, SEQ, HIDDEN),
    "layers": (BATCH, 2, SEQ, HIDDEN),
    "attention": (BATCH, HEADS, SEQ, SEQ),
    "vectors": (BATCH, 3, HEADS, SEQ, HIDDEN),  # query, key, value
    "texts": (BATCH, HIDDEN),
}
STACKED = ("layers", "vectors")

Row = list[float]
Reference = Callable[[list, list], float]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def dot(x: Row, y: Row) -> float:
    return sum(a * b for a, b in zip(x, y, strict=True))


def cosine(x: Row, y: Row) -> float:
    return dot(x, y) / (math.hypot(*x) * math.hypot(*y))


def softmax(row: Row, tau: float = 1.0) -> Row:
    exponentials = [math.exp(x / tau) for x in row]
    return [x / sum(exponentials) for x in exponentials]


def divergence(p: Row, q: Row) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def subtract_mean(row: Row) -> Row:
    return [x - mean(row) for x in row]


def squared_error(s: Row, t: Row) -> float:
    return mean([(a - b) ** 2 for a, b in zip(s, t, strict=True)])


# Logits: one row each.
def row_kl(s: Row, t: Row, tau: float = 1.0) -> float:
    return tau**2 * divergence(softmax(t, tau), softmax(s, tau))


def row_soft_ce(s: Row, t: Row, tau: float) -> float:
    return -(tau**2) * dot(softmax(t, tau), [math.log(p) for p in softmax(s, tau)])


def row_reverse_kl(s: Row, t: Row, tau: float) -> float:
    return tau**2 * divergence(softmax(s, tau), softmax(t, tau))


def row_js(s: Row, t: Row, tau: float, beta: float = 0.5) -> float:
    p, q = softmax(t, tau), softmax(s, tau)
    mixture = [beta * a + (1 - beta) * b for a, b in zip(p, q, strict=True)]
    return tau**2 * (beta * divergence(p, mixture) + (1 - beta) * divergence(q, mixture))


def row_standardized_kl(s: Row, t: Row, tau: float) -> float:
    def standardize(row: Row) -> Row:
        deviation = math.sqrt(mean([x**2 for x in subtract_mean(row)]))
        return [x / deviation if deviation else 0.0 for x in subtract_mean(row)]

    return row_kl(standardize(s), standardize(t), tau)


def row_decoupled_kl(s: Row, t: Row, target: int, tau: float) -> float:
    if len(s) == 1:
        return 0.0
    binary = [[softmax(row, tau)[target]] for row in (s, t)]
    others = [[x for c, x in enumerate(row) if c != target] for row in (s, t)]
    for p in binary:
        p.append(1.0 - p[0])
    return tau**2 * divergence(binary[1], binary[0]) + 8.0 * row_kl(*others, tau)


def over_rows(row_loss: Callable[..., float], is_cut: bool = False, **kwargs) -> Reference:
    """Mean over rows, each cut to its length where classes are positions."""

    def reference(student: list, teacher: list) -> float:
        rows = zip(student, teacher, [*LENGTHS] if is_cut else [CLASSES] * BATCH, strict=True)
        return mean([row_loss(s[:length], t[:length], **kwargs) for s, t, length in rows])

    return reference


def over_labelled_rows(is_cut: bool = False, **kwargs) -> Reference:
    def reference(student: list, teacher: list) -> float:
        lengths = LENGTHS if is_cut else (CLASSES,) * BATCH
        rows = zip(student, teacher, lengths, TARGETS, strict=True)
        return mean([row_decoupled_kl(s[:n], t[:n], target, **kwargs) for s, t, n, target in rows])

    return reference


def dist(student: list, teacher: list, tau: float) -> float:
    p, q = ([softmax(row, tau) for row in rows] for rows in (student, teacher))

    def distance(rows: list, others: list) -> float:
        pairs = zip(rows, others, strict=True)
        return mean([1 - cosine(subtract_mean(list(s)), subtract_mean(list(t))) for s, t in pairs])

    return distance(p, q) + distance(list(zip(*p, strict=True)), list(zip(*q, strict=True)))


# Hidden states.
def tokens() -> Iterator[tuple[int, int]]:
    return ((b, i) for b, length in enumerate(LENGTHS) for i in range(length))


def hidden_mse(student: list, teacher: list) -> float:
    return mean([squared_error(student[b][i], teacher[b][i]) for b, i in tokens()])


def hidden_cosine(student: list, teacher: list) -> float:
    return mean([1 - cosine(student[b][i], teacher[b][i]) for b, i in tokens()])


def hidden_pkd(student: list, teacher: list) -> float:
    return mean([2 - 2 * cosine(s[0], t[0]) for s, t in zip(student, teacher, strict=True)])


def hidden_gram(student: list, teacher: list) -> float:
    def flow(layers: list, length: int) -> Row:
        pairs = list(zip(layers[0][:length], layers[1][:length], strict=True))
        return [sum(x[i] * y[j] for x, y in pairs) / length for i in range(HIDDEN) for j in range(HIDDEN)]

    rows = zip(student, teacher, LENGTHS, strict=True)
    return mean([squared_error(flow(s, length), flow(t, length)) for s, t, length in rows])


def hidden_nst(student: list, teacher: list) -> float:
    def similarity(layers: list, i: int, j: int) -> float:
        return dot(layers[0][i], layers[1][j]) / len(layers[0][i])

    pairs = [(b, i, j) for b, i in tokens() for j in range(LENGTHS[b])]
    return mean([(similarity(student[b], i, j) - similarity(teacher[b], i, j)) ** 2 for b, i, j in pairs])


# Attention: for each query the rows of its heads, of which only the keys that exist are left.
def queries(maps: list, reach: int | None = None) -> Iterator[list[Row]]:
    for b, i in tokens():
        keys = [j for j in range(LENGTHS[b]) if reach is None or abs(i - j) <= reach]
        yield [[head[i][j] for j in keys] for head in maps[b]]


def mean_head(rows: list[Row]) -> list[Row]:
    return [[mean(list(column)) for column in zip(*rows, strict=True)]]


def attention_mse(student: list, teacher: list, reach: int | None = None, is_reduced: bool = False) -> float:
    errors, counts = [], []
    for rows in zip(queries(student, reach), queries(teacher, reach), strict=True):
        s, t = (mean_head(x) for x in rows) if is_reduced else rows
        errors.append(mean([squared_error(x, y) for x, y in zip(s, t, strict=True)]))
        counts.append(len(s[0]) if reach is None else 1)  # pairs weigh alike, or else queries do
    return dot(errors, counts) / sum(counts)


def attention_after_softmax(
    student: list,
    teacher: list,
    distance: Callable[[Row, Row], float],
    reach: int | None = None,
    is_reduced: bool = False,
) -> float:
    values = []
    for rows in zip(queries(student, reach), queries(teacher, reach), strict=True):
        p, q = ([softmax(row) for row in x] for x in rows)
        p, q = (mean_head(x) for x in (p, q)) if is_reduced else (p, q)
        values.append(mean([distance(s, t) for s, t in zip(p, q, strict=True)]))
    return mean(values)


attention_kl = partial(attention_after_softmax, distance=lambda s, t: divergence(t, s))
attention_cosine = partial(attention_after_softmax, distance=lambda s, t: 1 - cosine(s, t))


# Relations of tokens: maps made from vectors, then compared as attention is.
def token_relations(x: list, y: list) -> list:
    """Scaled products of (batch, heads, seq, size) with (batch, heads, seq, size)."""
    return [
        [
            [[dot(a, c) / math.sqrt(len(a)) for c in y_head] for a in x_head]
            for x_head, y_head in zip(*heads, strict=True)
        ]
        for heads in zip(x, y, strict=True)
    ]


def resplit(vectors: list, relation_heads: int) -> list:
    """(batch, heads, seq, size) to (batch, relation_heads, seq, width / relation_heads)."""
    batch = []
    for heads in vectors:
        joined = [sum(parts, []) for parts in zip(*heads, strict=True)]  # one list of the whole width per token
        size = len(joined[0]) // relation_heads
        batch.append([[row[r * size : (r + 1) * size] for row in joined] for r in range(relation_heads)])
    return batch


def minilm_v2(student: list, teacher: list, relation_heads: int, weights: tuple = (1.0, 1.0, 1.0)) -> float:
    total = 0.0
    for n, weight in enumerate(weights):  # query, key, value
        x, y = (resplit([row[n] for row in rows], relation_heads) for rows in (student, teacher))
        total += weight * attention_kl(token_relations(x, x), token_relations(y, y))
    return total


def minilm_v1(student: list, teacher: list) -> float:
    def maps(rows: list, first: int, second: int) -> list:
        return token_relations([row[first] for row in rows], [row[second] for row in rows])

    return sum(attention_kl(maps(student, *names), maps(teacher, *names)) for names in ((0, 1), (2, 2)))


def vectors_mse(student: list, teacher: list) -> float:
    maps = [token_relations([row[0] for row in rows], [row[1] for row in rows]) for rows in (student, teacher)]
    return attention_mse(*maps)


# Relations of texts.
def similarity(student: list, teacher: list) -> float:
    def normalized(rows: list) -> Row:
        products = [[dot(x, y) for y in rows] for x in rows]
        return [value / math.hypot(*row) for row in products for value in row]

    return squared_error(normalized(student), normalized(teacher))


def huber(s: float, t: float) -> float:
    error = abs(s - t)
    return error**2 / 2 if error < 1 else error - 0.5


def rkd(student: list, teacher: list, distance_weight: float = 1.0, angle_weight: float = 2.0) -> float:
    pairs = [(i, j) for i in range(BATCH) for j in range(BATCH) if i != j]
    triplets = [(i, j, k) for i, j in pairs for k in range(BATCH) if k not in (i, j)]

    def subtract(x: Row, y: Row) -> Row:
        return [a - b for a, b in zip(x, y, strict=True)]

    def distances(rows: list) -> Row:
        values = [math.dist(rows[i], rows[j]) for i, j in pairs]
        return [value / mean(values) for value in values]

    def angles(rows: list) -> Row:
        return [cosine(subtract(rows[i], rows[j]), subtract(rows[k], rows[j])) for i, j, k in triplets]

    parts = [
        mean([huber(s, t) for s, t in zip(relation(student), relation(teacher), strict=True)])
        for relation in (distances, angles)
    ]
    return distance_weight * parts[0] + angle_weight * parts[1]


def pkt(student: list, teacher: list) -> float:
    def neighbourhood(rows: list, i: int) -> Row:
        kernels = [(1 + cosine(rows[i], row)) / 2 for j, row in enumerate(rows) if j != i]
        return [value / sum(kernels) for value in kernels]

    return mean([divergence(neighbourhood(teacher, i), neighbourhood(student, i)) for i in range(BATCH)])


def correlation(student: list, teacher: list) -> float:
    def kernel(x: Row, y: Row) -> float:
        return math.exp(-0.8) * sum((0.8 * cosine(x, y)) ** p / math.factorial(p) for p in range(3))

    return squared_error(*([kernel(x, y) for x in rows for y in rows] for rows in (student, teacher)))


def crd(student: list, teacher: list, tau: float = 0.07) -> float:
    def entropy(rows: list, others: list) -> float:
        return -mean([math.log(softmax([cosine(x, y) for y in others], tau)[i]) for i, x in enumerate(rows)])

    return (entropy(student, teacher) + entropy(teacher, student)) / 2


@dataclass(frozen=True)
class Term:
    """A loss with what the tests need to know about it."""

    name: str
    kind: str  # key of SHAPES
    loss: Callable[..., Tensor]
    reference: Reference
    count_items: Callable[[Tensor], Tensor]  # mask -> what the sum is divided by
    is_distance: bool = True  # 0 for equal inputs
    is_additive: bool = True  # parts of a batch add up to the whole
    has_target: bool = False
    teacher_shape: tuple[int, ...] | None = None  # where it may differ from the student's
    same_axes: tuple[int, ...] | None = None  # which have to be equal on both sides; by default all

    @property
    def shape(self) -> tuple[int, ...]:
        return SHAPES[self.kind]

    @property
    def is_stacked(self) -> bool:
        return self.kind in STACKED

    @property
    def has_padding(self) -> bool:
        return self.kind not in ("logits", "texts")

    def __call__(self, student: Tensor, teacher: Tensor, mask: Tensor, **kwargs) -> Tensor:
        args = [x.unbind(1) if self.is_stacked else x for x in (student, teacher)]
        if self.has_target:
            args.append((mask.sum(dim=-1) // 2).long())
        if self.kind == "positions":
            kwargs["class_mask"] = mask.bool()
        elif self.has_padding:
            args.append(mask)
        return self.loss(*args, **kwargs)

    def spread(self, mask: Tensor) -> Tensor:
        """The mask in a shape that broadcasts to the inputs: what of them is valid."""
        if self.kind == "attention":
            return (mask[:, :, None] & mask[:, None])[:, None]
        before = {"layers": 1, "vectors": 2}.get(self.kind, 0)
        after = 0 if self.kind == "positions" else 1
        return mask[(slice(None), *[None] * before, slice(None), *[None] * after)]

    @property
    def longer(self) -> tuple[int, ...]:
        """Padding to twice the length, as `F.pad` wants it."""
        return {"positions": (0, SEQ), "attention": (0, SEQ, 0, SEQ)}.get(self.kind, (0, 0, 0, SEQ))


def count_rows(mask: Tensor) -> Tensor:
    return torch.tensor(len(mask))


def count_tokens(mask: Tensor) -> Tensor:
    return mask.sum()


def count_pairs(mask: Tensor) -> Tensor:
    return mask.sum(-1).square().sum()


def of_logits(name: str, row_loss: Callable[..., float], tau: float | None = None, **kwargs) -> list[Term]:
    """The term on ordinary classes, and on positions of which some do not exist."""
    loss, label = getattr(losses, name), name
    if tau is not None:
        loss, row_loss, label = partial(loss, temperature=tau), partial(row_loss, tau=tau), f"{name}-tau{tau:g}"
    return [
        Term(f"{label}-{kind}", kind, loss, over_rows(row_loss, kind == "positions"), count_rows, **kwargs)
        for kind in ("logits", "positions")
    ]


def decoupled(tau: float, kind: str) -> Term:
    loss = partial(losses.logit_decoupled_kl, temperature=tau)
    reference = over_labelled_rows(kind == "positions", tau=tau)
    return Term(f"logit_decoupled_kl-tau{tau:g}-{kind}", kind, loss, reference, count_rows, has_target=True)


def of_attention(name: str, reference: Callable[..., float], count_items: Callable) -> list[Term]:
    """The term as it is, with local attention, and with the mean over differing numbers of heads."""
    loss = getattr(losses, name)
    more_heads = (BATCH, HEADS + 1, SEQ, SEQ)
    reduced = {"teacher_shape": more_heads, "same_axes": (0, -1)}
    local, one_head = partial(reference, reach=1), partial(reference, is_reduced=True)
    return [
        Term(name, "attention", loss, reference, count_items),
        Term(f"{name}-local", "attention", partial(loss, reach=1), local, count_tokens),
        Term(f"{name}-mean", "attention", partial(loss, head_reduction="mean"), one_head, count_items, **reduced),
        Term(
            f"{name}-local-mean",
            "attention",
            partial(loss, reach=1, head_reduction="mean"),
            partial(local, is_reduced=True),
            count_tokens,
            **reduced,
        ),
    ]


def of_texts(name: str, reference: Reference, **kwargs) -> Term:
    return Term(
        f"relation_{name}",
        "texts",
        getattr(losses, f"relation_{name}"),
        reference,
        count_rows,
        is_additive=False,
        **{"teacher_shape": (BATCH, HIDDEN + 2), "same_axes": (0,)} | kwargs,
    )


V2 = partial(losses.relation_minilm_v2, relation_heads=4)
V2_WEIGHTED = partial(V2, relation_weights=(0.5, 0.0, 2.0))
OTHER_HEADS = {"teacher_shape": (BATCH, 3, 3, SEQ, HIDDEN), "same_axes": (0, 3)}  # 3 heads of 4 for 2 heads of 4
OTHER_WIDTH = {"teacher_shape": (BATCH, 3, HEADS, SEQ, 6), "same_axes": (0, 2, 3)}


def of_vectors(student: tuple, teacher: tuple, mask: Tensor, **kwargs) -> Tensor:
    return losses.attention_vectors_mse(student[:2], teacher[:2], mask, **kwargs)


TERMS = [
    *of_logits("logit_kl", row_kl, 1.0),
    *of_logits("logit_kl", row_kl, 4.0),
    *of_logits("logit_soft_ce", row_soft_ce, 1.0, is_distance=False),
    *of_logits("logit_soft_ce", row_soft_ce, 4.0, is_distance=False),
    *of_logits("logit_reverse_kl", row_reverse_kl, 1.0),
    *of_logits("logit_reverse_kl", row_reverse_kl, 4.0),
    *of_logits("logit_js", row_js, 1.0),
    *of_logits("logit_js", row_js, 4.0),
    Term(
        "logit_js-beta0.2",
        "logits",
        partial(losses.logit_js, beta=0.2),
        over_rows(row_js, tau=1.0, beta=0.2),
        count_rows,
    ),
    *of_logits("logit_mse", squared_error),
    *of_logits("logit_standardized_kl", row_standardized_kl, 2.0),
    decoupled(1.0, "logits"),
    decoupled(4.0, "logits"),
    decoupled(1.0, "positions"),
    Term("logit_dist", "logits", losses.logit_dist, partial(dist, tau=1.0), count_rows, is_additive=False),
    Term(
        "logit_dist-tau4",
        "logits",
        partial(losses.logit_dist, temperature=4.0),
        partial(dist, tau=4.0),
        count_rows,
        is_additive=False,
    ),
    Term("hidden_mse", "hidden", losses.hidden_mse, hidden_mse, count_tokens),
    Term("hidden_cosine", "hidden", losses.hidden_cosine, hidden_cosine, count_tokens),
    Term("hidden_pkd", "hidden", losses.hidden_pkd, hidden_pkd, count_rows),
    Term("hidden_gram", "layers", losses.hidden_gram, hidden_gram, count_rows, same_axes=(0, 2, 3)),
    Term(
        "hidden_nst",
        "layers",
        losses.hidden_nst,
        hidden_nst,
        count_pairs,
        teacher_shape=(BATCH, 2, SEQ, HIDDEN + 2),
        same_axes=(0, 2),
    ),
    *of_attention("attention_mse", attention_mse, count_pairs),
    Term("attention_vectors_mse", "vectors", of_vectors, vectors_mse, count_pairs, **OTHER_WIDTH),
    *of_attention("attention_kl", attention_kl, count_tokens),
    *of_attention("attention_cosine", attention_cosine, count_tokens),
    Term("relation_minilm_v2", "vectors", V2, partial(minilm_v2, relation_heads=4), count_tokens, **OTHER_HEADS),
    Term(
        "relation_minilm_v2-weighted",
        "vectors",
        V2_WEIGHTED,
        partial(minilm_v2, relation_heads=4, weights=(0.5, 0.0, 2.0)),
        count_tokens,
        **OTHER_HEADS,
    ),
    Term("relation_minilm_v1", "vectors", losses.relation_minilm_v1, minilm_v1, count_tokens, **OTHER_WIDTH),
    of_texts("similarity", similarity),
    of_texts("rkd", rkd),
    of_texts("pkt", pkt),
    of_texts("correlation", correlation),
    of_texts("crd", crd, is_distance=False, teacher_shape=None, same_axes=None),
]
PADDED_TERMS = [term for term in TERMS if term.has_padding]
ADDITIVE_TERMS = [term for term in TERMS if term.is_additive]
BATCH_TERMS = [term for term in TERMS if not term.is_additive]


def each(terms: list[Term]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("term", terms, ids=lambda term: term.name)


def make_mask(lengths: tuple[int, ...] = LENGTHS, seq: int = SEQ) -> Tensor:
    return (torch.arange(seq)[None, :] < torch.tensor(lengths)[:, None]).long()


def make_pair(term: Term, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = term.shape, term.teacher_shape or term.shape
    student, teacher = (scale * torch.randn(shape, generator=generator) for shape in shapes)
    return student.requires_grad_(), teacher


def gradient(loss: Tensor, tensor: Tensor) -> Tensor:
    return torch.autograd.grad(loss, tensor)[0]
