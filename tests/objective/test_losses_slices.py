"""Losses over pairs of tokens that are computed a few examples at a time."""

import pytest
import torch

from hf_kd.objective import losses
from hf_kd.objective.losses import slices


pytestmark = pytest.mark.one_leg


def vectors(seed, heads=4, size=8, batch=5, seq=7):
    torch.manual_seed(seed)
    return tuple(torch.randn(batch, heads, seq, size) for _ in range(3))


@pytest.fixture
def mask():
    lengths = torch.tensor([7, 3, 5, 0, 1])
    return (torch.arange(7) < lengths[:, None]).long()


LOSSES = {
    "relation_minilm_v2": lambda s, t, mask: losses.relation_minilm_v2(s, t, mask, relation_heads=2),
    "attention_vectors_mse": lambda s, t, mask: losses.attention_vectors_mse(s[:2], t[:2], mask),
}


def plain(name, student, teacher, mask):
    """The same by the functions that keep every map."""
    if name == "attention_vectors_mse":
        return losses.attention_mse(*(losses.attention_scores(q, k) for q, k, _ in (student, teacher)), mask)

    def relation(x):
        x = x.transpose(1, 2).flatten(2).unflatten(-1, (2, -1)).transpose(1, 2)
        return losses.attention_scores(x, x)

    return sum(losses.attention_kl(relation(s), relation(t), mask) for s, t in zip(student, teacher, strict=True))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("numbers", [1, 2 * 4 * 7**2, 10**9])
def test_slices_add_up(name, numbers, mask, monkeypatch):
    """An example at the border of two slices would be left out, or its gradient written over another's."""
    monkeypatch.setattr(slices, "_CPU_NUMBERS", numbers)
    results = []
    for function in (LOSSES[name], lambda s, t, m: plain(name, s, t, m)):
        student, teacher = vectors(0), vectors(1)
        for x in student:
            x.requires_grad_()
        value = function(student, teacher, mask)
        (3 * value).backward()  # a weight multiplies the gradient
        read = student[:2] if name == "attention_vectors_mse" else student
        results.append((value.detach(), [x.grad for x in read]))
    (value, gradients), (expected, expected_gradients) = results
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradients, expected_gradients, atol=1e-6, rtol=1e-4)
    assert all((x[3] == 0).all() and (x[1, :, 3:] == 0).all() for x in gradients)  # padding teaches nothing


@pytest.mark.parametrize("name", LOSSES)
def test_no_map_is_kept(name, mask):
    """Maps kept for the backward would take the memory that these functions are there to save."""
    kept = []
    student = tuple(x.requires_grad_() for x in vectors(0))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        LOSSES[name](student, vectors(1), mask)
    assert kept and not [shape for shape in kept if len(shape) == 4 and shape[-1] == shape[-2] == 7]


@pytest.mark.parametrize("name", LOSSES)
def test_evaluation_makes_no_gradient(name, mask, monkeypatch):
    """A value that nobody trains on would cost what training on it costs."""
    asked = []
    for part in ("_divergence", "_squared_error"):
        function = getattr(slices, part)

        def spy(student, constants, is_padding, needs_gradient, function=function):
            asked.append(needs_gradient)
            return function(student, constants, is_padding, needs_gradient)

        monkeypatch.setattr(slices, part, spy)
    with torch.no_grad():
        LOSSES[name](vectors(0), vectors(1), mask)
    assert asked and not any(asked)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LOSSES)
def test_half_precision(name, dtype, mask):
    """Sums over pairs, and their gradients before the division by the number of pairs, overflow float16."""
    student, teacher = (tuple((x * 60).to(dtype) for x in vectors(seed)) for seed in (0, 1))
    of_half = [x.requires_grad_() for x in student]
    of_float = [x.detach().float().requires_grad_() for x in student]
    values = []
    for leaves in (of_half, of_float):
        value = LOSSES[name](leaves, [x.float() if leaves is of_float else x for x in teacher], mask)
        value.backward()
        values.append(value.detach())
    torch.testing.assert_close(*values)
    for half, full in zip(of_half, of_float, strict=True):
        if full.grad is not None:
            torch.testing.assert_close(half.grad, full.grad.to(dtype))


@pytest.mark.parametrize("name", LOSSES)
def test_infinite_padding(name, mask):
    """0 times inf is NaN, in the value and in every gradient."""
    student, teacher = vectors(0), vectors(1)
    values = []
    for filler in (0.0, float("inf")):
        filled = [
            [x.masked_fill(~mask.bool()[:, None, :, None], filler).requires_grad_() for x in side]
            for side in (student, teacher)
        ]
        value = LOSSES[name](*filled, mask)
        value.backward()
        values.append((value.detach(), [x.grad for x in filled[0] if x.grad is not None]))
    torch.testing.assert_close(*values, atol=0, rtol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_under_autocast(name, mask):
    """Scores would be rounded to bfloat16, and its infinite minimum make NaN of padding."""
    student, teacher = vectors(0), vectors(1)
    with torch.autocast("cpu", torch.bfloat16):
        value = LOSSES[name](student, teacher, mask)
    torch.testing.assert_close(value, LOSSES[name](student, teacher, mask), atol=0, rtol=0)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("shape", [{"seq": 0}, {"batch": 0}])
def test_nothing_to_compare(name, shape):
    student, teacher = vectors(0, **shape), vectors(1, **shape)
    student = tuple(x.requires_grad_() for x in student)
    value = LOSSES[name](student, teacher, torch.ones(student[0].shape[0], student[0].shape[2]))
    value.backward()
    assert value.item() == 0
