"""The loss terms as pure tensor functions `(student, teacher, ...) -> scalar`.

Conventions that hold for every function here:

- student first, teacher second; both are converted to float32, and probabilities stay in log space;
- the teacher is a constant: no gradient flows into it;
- a term is a sum over what is valid divided by `num_items`, the number of valid items. By default that is the number
  in the tensors given, so the result is their mean. A trainer that accumulates gradients, or runs on several
  processes, passes the number in the whole optimisation step, and the parts then add up to the loss of the one large
  batch;
- nothing valid gives 0 with a zero gradient, never NaN.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def task_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    is_regression: bool = False,
    label_smoothing: float = 0.0,
    num_items: Tensor | None = None,
) -> Tensor:
    """Cross-entropy (classification) or squared error (regression) on the rows that have a label.

    Args:
        logits (`torch.Tensor` of shape `(batch, num_labels)`): The student's logits; `num_labels` is 1 for regression.
        labels (`torch.Tensor` of shape `(batch,)`): Class indices or values; `-100` marks a row without a label.
        is_regression (`bool`, *optional*, defaults to `False`): Whether the single logit is a value.
        label_smoothing (`float`, *optional*, defaults to 0.0): Share of probability spread over all classes.
        num_items (`torch.Tensor`, *optional*): Number of labelled rows to divide by.

    Returns:
        `torch.Tensor`: Scalar, in nats (classification) or squared label units (regression).

    Raises:
        ValueError: If the labels are not one per row, or a regression has several logits.
    """
    _require(
        labels.shape == logits.shape[:1],
        f"labels of shape {_shape(labels)} do not fit logits of shape {_shape(logits)}; give one label per row.",
    )
    is_labeled = labels != -100
    if is_regression:
        _require(logits.shape[-1] == 1, f"a regression needs one logit, but the logits have shape {_shape(logits)}.")
        error = logits.float().squeeze(-1) - labels.float()
        total = error.square().masked_fill(~is_labeled, 0.0).sum()
    else:
        total = F.cross_entropy(logits.float(), labels.long(), reduction="sum", label_smoothing=label_smoothing)
    return total / _denominator(is_labeled.sum(), num_items)


def logit_kl(student: Tensor, teacher: Tensor, *, temperature: float = 1.0, num_items: Tensor | None = None) -> Tensor:
    r"""Kullback-Leibler divergence from the teacher's softened distribution to the student's.

    $\tau^2 \sum_c p^T_c (\log p^T_c - \log p^S_c)$ with $p = \mathrm{softmax}(z / \tau)$, mean over examples; $\tau^2$
    keeps the size of the gradient independent of the temperature (Hinton et al. 2015,
    https://arxiv.org/abs/1503.02531, section 2).

    Args:
        student (`torch.Tensor` of shape `(batch, num_labels)`): The student's logits.
        teacher (`torch.Tensor` of shape `(batch, num_labels)`): The teacher's logits, labels in the student's order.
        temperature (`float`, *optional*, defaults to 1.0): Softening of both distributions, > 0.
        num_items (`torch.Tensor`, *optional*): Number of examples to divide by.

    Returns:
        `torch.Tensor`: Scalar, in nats times `temperature ** 2`.

    Raises:
        ValueError: If the shapes differ or there is a single logit, of which a softmax is always 1.
    """
    log_student, log_teacher = _log_softmax_pair(student, teacher, temperature)
    total = F.kl_div(log_student, log_teacher, reduction="sum", log_target=True) * temperature**2
    return total / _denominator(len(student), num_items)


def logit_soft_ce(
    student: Tensor, teacher: Tensor, *, temperature: float = 1.0, num_items: Tensor | None = None
) -> Tensor:
    r"""Cross-entropy of the student under the teacher's softened distribution.

    $-\tau^2 \sum_c p^T_c \log p^S_c$, mean over examples: the gradient of [`logit_kl`], the value larger by the
    teacher's entropy (Hinton et al. 2015, https://arxiv.org/abs/1503.02531). So it is not 0 for equal inputs.

    Arguments, result and errors are those of [`logit_kl`].
    """
    log_student, log_teacher = _log_softmax_pair(student, teacher, temperature)
    total = -(log_teacher.exp() * log_student).sum() * temperature**2
    return total / _denominator(len(student), num_items)


def logit_mse(student: Tensor, teacher: Tensor, *, num_items: Tensor | None = None) -> Tensor:
    r"""Squared error between logits: $\frac{1}{C} \sum_c (z^S_c - z^T_c)^2$, mean over examples.

    Ba & Caruana 2014 (https://arxiv.org/abs/1312.6184, equation 1); Kim et al. 2021
    (https://arxiv.org/abs/2105.08919). The one form for regression, where the single logit is the predicted value.

    Args:
        student (`torch.Tensor` of shape `(batch, num_labels)`): The student's logits.
        teacher (`torch.Tensor` of shape `(batch, num_labels)`): The teacher's logits, labels in the student's order.
        num_items (`torch.Tensor`, *optional*): Number of examples to divide by.

    Returns:
        `torch.Tensor`: Scalar, in squared logit units.

    Raises:
        ValueError: If the shapes differ.
    """
    student, teacher = _comparable(student, teacher)
    total = (student - teacher).square().mean(dim=-1).sum()
    return total / _denominator(len(student), num_items)


def hidden_mse(student: Tensor, teacher: Tensor, mask: Tensor, *, num_items: Tensor | None = None) -> Tensor:
    r"""Squared error between hidden states: $\sum_{bl} m_{bl} \|h^S_{bl} - h^T_{bl}\|^2 / (d \sum_{bl} m_{bl})$.

    TinyBERT (Jiao et al. 2020, https://arxiv.org/abs/1909.10351, equation 8), on valid positions only.

    Args:
        student (`torch.Tensor` of shape `(batch, seq, hidden)`): The student's states, projected to the teacher's
            width.
        teacher (`torch.Tensor` of shape `(batch, seq, hidden)`): The teacher's states.
        mask (`torch.Tensor` of shape `(batch, seq)`): 1 for tokens, 0 for padding.
        num_items (`torch.Tensor`, *optional*): Number of tokens to divide by.

    Returns:
        `torch.Tensor`: Scalar, in squared activation units.

    Raises:
        ValueError: If the shapes differ or the mask does not fit.
    """
    student, teacher = _comparable(student, teacher, mask)
    # Padding may hold anything, also inf: replaced, not multiplied by 0.
    error = (student - teacher).masked_fill(~mask.bool()[..., None], 0.0)
    return error.square().mean(dim=-1).sum() / _denominator(mask.sum(), num_items)


def hidden_cosine(student: Tensor, teacher: Tensor, mask: Tensor, *, num_items: Tensor | None = None) -> Tensor:
    r"""Mean over valid tokens of $1 - \cos(h^S, h^T)$.

    DistilBERT (Sanh et al. 2019, https://arxiv.org/abs/1910.01108, section 2). Arguments and errors are those of
    [`hidden_mse`].

    Returns:
        `torch.Tensor`: Scalar between 0 and 2.
    """
    student, teacher = _comparable(student, teacher, mask)
    is_pad = ~mask.bool()
    # Ones and not zeros: the cosine of a zero vector has no gradient.
    student, teacher = (x.masked_fill(is_pad[..., None], 1.0) for x in (student, teacher))
    distance = 1.0 - F.cosine_similarity(student, teacher, dim=-1)  # (batch, seq)
    return distance.masked_fill(is_pad, 0.0).sum() / _denominator(mask.sum(), num_items)


def attention_scores(query: Tensor, key: Tensor) -> Tensor:
    r"""Pre-softmax attention scores $A = q k^T / \sqrt{d_{head}}$ of shape `(batch, heads, seq, seq)`, in float32.

    Args:
        query (`torch.Tensor` of shape `(batch, heads, seq, head_size)`): Query vectors.
        key (`torch.Tensor` of shape `(batch, heads, seq, head_size)`): Key vectors.
    """
    return query.float() @ key.float().transpose(-1, -2) / query.shape[-1] ** 0.5


def attention_mse(student: Tensor, teacher: Tensor, mask: Tensor, *, num_items: Tensor | None = None) -> Tensor:
    r"""Squared error between pre-softmax attention scores, mean over heads and over valid (query, key) pairs.

    TinyBERT (Jiao et al. 2020, https://arxiv.org/abs/1909.10351, equation 7), whose code counted the padding in the
    mean; here $\sum_b m_{bi} m_{bj} (A^S - A^T)^2 / (H \sum_b n_b^2)$.

    Args:
        student (`torch.Tensor` of shape `(batch, heads, seq, seq)`): The student's scores, see [`attention_scores`].
        teacher (`torch.Tensor` of shape `(batch, heads, seq, seq)`): The teacher's scores.
        mask (`torch.Tensor` of shape `(batch, seq)`): 1 for tokens, 0 for padding.
        num_items (`torch.Tensor`, *optional*): Number of (query, key) pairs to divide by.

    Returns:
        `torch.Tensor`: Scalar, in squared score units.

    Raises:
        ValueError: If the shapes differ, which includes different head counts, or the mask does not fit.
    """
    student, teacher = _comparable(student, teacher, mask)
    mask = mask.bool()
    is_pair = mask[:, None, :, None] & mask[:, None, None, :]  # (batch, 1, seq, seq)
    error = (student - teacher).masked_fill(~is_pair, 0.0)
    return error.square().mean(dim=1).sum() / _denominator(is_pair.sum(), num_items)


def attention_kl(student: Tensor, teacher: Tensor, mask: Tensor, *, num_items: Tensor | None = None) -> Tensor:
    r"""Divergence of attention: mean over valid queries and heads of $KL(P^T \| P^S)$, $P$ the softmax over valid
    keys.

    MiniLM (Wang et al. 2020, https://arxiv.org/abs/2002.10957, equation 5). Arguments and errors are those of
    [`attention_mse`], but `num_items` counts queries, that is tokens.

    Returns:
        `torch.Tensor`: Scalar, in nats.
    """
    student, teacher = _comparable(student, teacher, mask)
    mask = mask.bool()
    is_pair = mask[:, None, :, None] & mask[:, None, None, :]  # (batch, 1, seq, seq)
    # The lowest finite number, not -inf: rows of padded queries become finite, whatever they hold, and drop out below.
    lowest = torch.finfo(torch.float32).min
    log_student, log_teacher = (x.masked_fill(~is_pair, lowest).log_softmax(dim=-1) for x in (student, teacher))
    divergence = log_teacher.exp() * (log_teacher - log_student)
    return divergence.masked_fill(~is_pair, 0.0).mean(dim=1).sum() / _denominator(mask.sum(), num_items)


def _comparable(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    _require(
        student.shape == teacher.shape,
        f"student and teacher cannot be compared: shapes {_shape(student)} and {_shape(teacher)} differ.",
    )
    if mask is not None:
        batch, seq = student.shape[0], student.shape[-1 if student.dim() == 4 else 1]
        _require(
            mask.shape == (batch, seq),
            f"the mask has shape {_shape(mask)}, but tensors of shape {_shape(student)} need {(batch, seq)}.",
        )
    return student.float(), teacher.detach().float()


def _log_softmax_pair(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    student, teacher = _comparable(student, teacher)
    _require(
        student.shape[-1] > 1,
        f"logits of shape {_shape(student)} have one class, whose softmax is always 1: the loss would be 0 and teach "
        "nothing. Use `logit_loss_type='mse'` for regression.",
    )
    _require(temperature > 0, f"temperature={temperature} must be > 0.")
    return (student / temperature).log_softmax(dim=-1), (teacher / temperature).log_softmax(dim=-1)


def _denominator(count: Tensor | int, num_items: Tensor | None) -> Tensor:
    # A count divided by the number of processes may lie between 0 and 1: only 0 itself is replaced.
    count = torch.as_tensor(count if num_items is None else num_items)
    return count.masked_fill(count == 0, 1)


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
