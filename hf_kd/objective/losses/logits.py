"""Terms between the student's and the teacher's logits.

Logits come as rows, one for each prediction: an example, a token, the start of an answer. Where the classes of a row
are the positions of a text, as in question answering, `class_mask` says which of them exist.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ._common import LOWEST, comparable, denominator, require, shape


def logit_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    class_mask: Tensor | None = None,
    num_items: Tensor | None = None,
) -> Tensor:
    r"""Kullback-Leibler divergence from the teacher's softened distribution to the student's.

    $\tau^2 \sum_c p^T_c (\log p^T_c - \log p^S_c)$ with $p = \mathrm{softmax}(z / \tau)$, mean over rows; $\tau^2$
    keeps the size of the gradient independent of the temperature (Hinton et al. 2015,
    https://arxiv.org/abs/1503.02531, section 2).

    Args:
        student (`torch.Tensor` of shape `(items, classes)`): The student's logits.
        teacher (`torch.Tensor` of shape `(items, classes)`): The teacher's logits, labels in the student's order.
        temperature (`float`, *optional*, defaults to 1.0): Softening of both distributions, > 0.
        class_mask (`torch.Tensor` of shape `(items, classes)`, *optional*):
            True for classes that exist in the row; the softmax is over these. A row with fewer than two adds 0.
        num_items (`torch.Tensor`, *optional*): Number of rows to divide by.

    Returns:
        `torch.Tensor`: Scalar, in nats times `temperature ** 2`.

    Raises:
        ValueError: If the shapes differ, the temperature is not positive, or there is a single class, of which a
            softmax is always 1.
    """
    log_student, log_teacher = _log_softmax_pair(student, teacher, temperature, class_mask)
    total = _divergence(log_teacher, log_student, class_mask).sum() * temperature**2
    return total / denominator(len(student), num_items)


def logit_soft_ce(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    class_mask: Tensor | None = None,
    num_items: Tensor | None = None,
) -> Tensor:
    r"""Cross-entropy of the student under the teacher's softened distribution.

    $-\tau^2 \sum_c p^T_c \log p^S_c$, mean over rows: the gradient of [`logit_kl`], the value larger by the teacher's
    entropy (Hinton et al. 2015, https://arxiv.org/abs/1503.02531). So it is not 0 for equal inputs.

    Arguments, result and errors are those of [`logit_kl`].
    """
    log_student, log_teacher = _log_softmax_pair(student, teacher, temperature, class_mask)
    total = -_existing(log_teacher.exp() * log_student, class_mask).sum() * temperature**2
    return total / denominator(len(student), num_items)


def logit_reverse_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    class_mask: Tensor | None = None,
    num_items: Tensor | None = None,
) -> Tensor:
    r"""Kullback-Leibler divergence from the student's softened distribution to the teacher's.

    $\tau^2 \sum_c p^S_c (\log p^S_c - \log p^T_c)$, mean over rows. The student is drawn to the teacher's main classes
    instead of covering all of them (MiniLLM, Gu et al. 2024, https://arxiv.org/abs/2306.08543, section 2).

    Arguments, result and errors are those of [`logit_kl`].
    """
    log_student, log_teacher = _log_softmax_pair(student, teacher, temperature, class_mask)
    total = _divergence(log_student, log_teacher, class_mask).sum() * temperature**2
    return total / denominator(len(student), num_items)


def logit_js(
    student: Tensor,
    teacher: Tensor,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    class_mask: Tensor | None = None,
    num_items: Tensor | None = None,
) -> Tensor:
    r"""Generalized Jensen-Shannon divergence between the softened distributions.

    $\tau^2 (\beta\, KL(p^T \| p^M) + (1 - \beta)\, KL(p^S \| p^M))$ with $p^M = \beta p^T + (1 - \beta) p^S$, mean
    over rows (GKD, Agarwal et al. 2024, https://arxiv.org/abs/2306.13649, section 2). Divided by $\beta$ it tends to
    [`logit_kl`] as $\beta$ tends to 0; divided by $1 - \beta$, to [`logit_reverse_kl`] as $\beta$ tends to 1.

    Args:
        beta (`float`, *optional*, defaults to 0.5): Share of the teacher in the mixture, between 0 and 1. It scales
            the gradient too, by about $\beta (1 - \beta)$.

    The other arguments, result and errors are those of [`logit_kl`].

    Raises:
        ValueError: Also if `beta` is not between 0 and 1; at both ends the divergence is 0 for any student.
    """
    require(
        0.0 < beta < 1.0,
        f"beta={beta} must be between 0 and 1. At both ends the divergence is always 0; use logit_kl for 0 and "
        "logit_reverse_kl for 1.",
    )
    log_student, log_teacher = _log_softmax_pair(student, teacher, temperature, class_mask)
    log_mixture = torch.logaddexp(log_teacher + math.log(beta), log_student + math.log1p(-beta))
    divergence = beta * _divergence(log_teacher, log_mixture, class_mask)
    divergence = divergence + (1.0 - beta) * _divergence(log_student, log_mixture, class_mask)
    return divergence.sum() * temperature**2 / denominator(len(student), num_items)


def logit_mse(
    student: Tensor, teacher: Tensor, *, class_mask: Tensor | None = None, num_items: Tensor | None = None
) -> Tensor:
    r"""Squared error between logits: $\frac{1}{C} \sum_c (z^S_c - z^T_c)^2$, mean over rows.

    Ba & Caruana 2014 (https://arxiv.org/abs/1312.6184, equation 1); Kim et al. 2021
    (https://arxiv.org/abs/2105.08919). The one form for regression, where the single logit is the predicted value.

    Args:
        student (`torch.Tensor` of shape `(items, classes)`): The student's logits.
        teacher (`torch.Tensor` of shape `(items, classes)`): The teacher's logits, labels in the student's order.
        class_mask (`torch.Tensor` of shape `(items, classes)`, *optional*):
            True for classes that exist in the row; $C$ counts these.
        num_items (`torch.Tensor`, *optional*): Number of rows to divide by.

    Returns:
        `torch.Tensor`: Scalar, in squared logit units.

    Raises:
        ValueError: If the shapes differ.
    """
    student, teacher = comparable(student, teacher)
    _require_class_mask(class_mask, student)
    error = _existing(student - teacher, class_mask)
    return _mean_of_classes(error.square(), class_mask).sum() / denominator(len(student), num_items)


def logit_dist(
    student: Tensor, teacher: Tensor, *, temperature: float = 1.0, num_items: Tensor | None = None
) -> Tensor:
    r"""One minus Pearson's correlation, between the classes of a row and between the rows of the batch.

    $\frac{1}{B} \sum_b (1 - \rho(p^S_{b:}, p^T_{b:})) + \frac{1}{C} \sum_c (1 - \rho(p^S_{:c}, p^T_{:c}))$ with
    $p = \mathrm{softmax}(z / \tau)$ (DIST, Huang et al. 2022, https://arxiv.org/abs/2205.10536, section 4, both parts
    with weight 1). A correlation does not change with the scale of what is correlated, and so neither value
    nor gradient shrinks by $\tau^2$: there is no such factor.

    A row or class in which the teacher's probabilities are all equal has no correlation and adds 0. So does the
    second part for a batch of one row. Of two classes the first part sees only which one is likelier.

    The second part compares the rows that one process has in one micro-batch, and none of other processes or
    accumulation steps; see [`relation_similarity`].

    Args:
        student (`torch.Tensor` of shape `(items, classes)`): The student's logits.
        teacher (`torch.Tensor` of shape `(items, classes)`): The teacher's logits, labels in the student's order.
        temperature (`float`, *optional*, defaults to 1.0): Softening of both distributions, > 0.
        num_items (`torch.Tensor`, *optional*):
            Number of rows to divide by. The second part relates the rows given to each other, so parts of a batch do
            not add up to the value of the whole; each counts by its share of the rows.

    Returns:
        `torch.Tensor`: Scalar between 0 and 4.

    Raises:
        ValueError: If the shapes differ, the temperature is not positive, or there is a single class, of which a
            softmax is always 1.
    """
    log_student, log_teacher = _log_softmax_pair(student, teacher, temperature)
    p_student, p_teacher = log_student.exp(), log_teacher.exp()
    between_classes = _pearson_distance(p_student, p_teacher, dim=1).sum()
    between_rows = _pearson_distance(p_student, p_teacher, dim=0).mean() * len(student)
    return (between_classes + between_rows) / denominator(len(student), num_items)


def logit_standardized_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    class_mask: Tensor | None = None,
    num_items: Tensor | None = None,
) -> Tensor:
    r"""[`logit_kl`] between logits that are first brought to mean 0 and variance 1 in each row.

    $z \leftarrow (z - \bar z) / \sigma(z)$ over the classes: the student learns the teacher's order and proportions
    and not its confidence (logit standardization, Sun et al. 2024, https://arxiv.org/abs/2403.01427, algorithm 1,
    where $\sigma^2$ is divided by $C$). A row of equal logits becomes zeros.

    Arguments, result and errors are those of [`logit_kl`]. The temperature acts on standardized logits and so
    means more than elsewhere (the paper uses 2): of two classes, no one is ever surer than 0.88 even at 1.
    """
    student, teacher = comparable(student, teacher)
    _require_class_mask(class_mask, student)
    student, teacher = (_standardize(x, class_mask) for x in (student, teacher))
    return logit_kl(student, teacher, temperature=temperature, class_mask=class_mask, num_items=num_items)


def logit_decoupled_kl(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    *,
    target_weight: float = 1.0,
    non_target_weight: float = 8.0,
    temperature: float = 1.0,
    class_mask: Tensor | None = None,
    num_items: Tensor | None = None,
) -> Tensor:
    r"""Divergence in two parts: how likely the labelled class is, and how the others share the rest.

    $\tau^2 (\alpha\, KL(b^T \| b^S) + \beta\, KL(\hat p^T \| \hat p^S))$, mean over rows, with $b = (p_t, 1 - p_t)$
    for the labelled class $t$ and $\hat p$ the softmax over the other classes (DKD, Zhao et al. 2022,
    https://arxiv.org/abs/2203.08679, section 3). [`logit_kl`] is $\alpha = 1$ and $\beta = 1 - p^T_t$, which silences
    the second part where the teacher is sure. With two classes the second part is 0.

    Args:
        student (`torch.Tensor` of shape `(items, classes)`): The student's logits.
        teacher (`torch.Tensor` of shape `(items, classes)`): The teacher's logits, labels in the student's order.
        target (`torch.Tensor` of shape `(items,)`): The labelled classes; a row with `-100` takes no part.
        target_weight (`float`, *optional*, defaults to 1.0): $\alpha$.
        non_target_weight (`float`, *optional*, defaults to 8.0): $\beta$, the paper's usual one for CIFAR-100.
        temperature (`float`, *optional*, defaults to 1.0): Softening of all distributions, > 0.
        class_mask (`torch.Tensor` of shape `(items, classes)`, *optional*): True for classes that exist in the row.
        num_items (`torch.Tensor`, *optional*): Number of labelled rows to divide by.

    Returns:
        `torch.Tensor`: Scalar, in nats times `temperature ** 2`.

    Raises:
        ValueError: If the shapes differ, the targets are not one per row, the temperature is not positive, or there is
            a single class, of which a softmax is always 1.
    """
    log_student, log_teacher = _log_softmax_pair(student, teacher, temperature, class_mask)
    require(
        target.shape == student.shape[:1],
        f"targets of shape {shape(target)} do not fit logits of shape {shape(student)}; give one class per row.",
    )
    is_labeled = target != -100
    classes = torch.arange(student.shape[-1], device=student.device)
    is_target = classes == target[:, None]  # (items, classes)
    is_other = ~is_target if class_mask is None else ~is_target & class_mask.bool()

    def parts(log_p: Tensor) -> tuple[Tensor, Tensor]:
        log_others = log_p.masked_fill(~is_other, LOWEST)
        log_target = log_p.masked_fill(~is_target, 0.0).sum(dim=-1)
        # From the other classes and not as 1 - p: that is exactly 0, and its logarithm infinite, for a sure teacher.
        return torch.stack([log_target, log_others.logsumexp(dim=-1)], dim=-1), log_others.log_softmax(dim=-1)

    (binary_student, others_student), (binary_teacher, others_teacher) = parts(log_student), parts(log_teacher)
    divergence = target_weight * _divergence(binary_teacher, binary_student).sum(dim=-1)
    divergence = divergence + non_target_weight * _divergence(others_teacher, others_student, is_other).sum(dim=-1)
    total = divergence.masked_fill(~is_labeled, 0.0).sum() * temperature**2
    return total / denominator(is_labeled.sum(), num_items)


def _log_softmax_pair(
    student: Tensor, teacher: Tensor, temperature: float, class_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    student, teacher = comparable(student, teacher)
    require(
        student.shape[-1] > 1,
        f"logits of shape {shape(student)} have one class, whose softmax is always 1: the loss would be 0 and teach "
        "nothing. Use `logit_loss_type='mse'` for regression.",
    )
    _require_temperature(temperature)
    _require_class_mask(class_mask, student)
    student, teacher = (_existing(x / temperature, class_mask, LOWEST) for x in (student, teacher))
    return student.log_softmax(dim=-1), teacher.log_softmax(dim=-1)


def _require_temperature(temperature: float) -> None:
    require(temperature > 0, f"temperature={temperature} must be > 0.")


def _require_class_mask(class_mask: Tensor | None, logits: Tensor) -> None:
    if class_mask is not None:
        require(
            class_mask.shape == logits.shape,
            f"the class mask has shape {shape(class_mask)}, but the logits have {shape(logits)}; give one entry per "
            "row and class.",
        )


def _existing(values: Tensor, class_mask: Tensor | None, other: float = 0.0) -> Tensor:
    """The values, and `other` where there is no class; what stood there may be inf and has no gradient."""
    return values if class_mask is None else values.masked_fill(~class_mask.bool(), other)


def _divergence(log_p: Tensor, log_q: Tensor, class_mask: Tensor | None = None) -> Tensor:
    """The summands of $KL(p \\| q)$, of the shape given."""
    return _existing(F.kl_div(log_q, log_p, reduction="none", log_target=True), class_mask)


def _mean_of_classes(values: Tensor, class_mask: Tensor | None) -> Tensor:
    """Mean over the classes that exist, the others being 0 in `values`; shape `(items,)`."""
    if class_mask is None:
        return values.mean(dim=-1)
    return values.sum(dim=-1) / class_mask.bool().sum(dim=-1).clamp_min(1)


def _standardize(logits: Tensor, class_mask: Tensor | None) -> Tensor:
    logits = _existing(logits, class_mask)
    centered = _existing(logits - _mean_of_classes(logits, class_mask)[:, None], class_mask)
    variance = _mean_of_classes(centered.square(), class_mask)[:, None]
    return centered * (variance + 1e-8).rsqrt()  # 1e-8: equal logits have a variance of 0, and a finite gradient


def _pearson_distance(student: Tensor, teacher: Tensor, dim: int) -> Tensor:
    student, teacher = (p - p.mean(dim=dim, keepdim=True) for p in (student, teacher))
    # Probabilities are known to about 1e-7: what varies by less does not vary, and its direction is noise.
    is_constant = torch.linalg.vector_norm(teacher, dim=dim) < 1e-6
    distance = 1.0 - F.cosine_similarity(student, teacher, dim=dim, eps=1e-6)
    return distance.masked_fill(is_constant, 0.0)
