"""Terms between relations: of the tokens of a text to each other, and of the texts of a batch to each other.

What is compared is a map from tokens to tokens, or from texts to texts. So the widths of the two models may differ
without a projection ([`relation_crd`] excepted).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ._common import LOWEST, denominator, padding_of, require, require_mask, shape, unit, zeros_in_padding
from .attention import attention_kl, attention_scores
from .slices import sum_of_divergences


Vectors = tuple[Tensor, Tensor, Tensor]


def relation_minilm_v2(
    student: Vectors,
    teacher: Vectors,
    mask: Tensor,
    *,
    relation_heads: int,
    relation_weights: tuple[float, float, float] = (1.0, 1.0, 1.0),
    reach: int | None = None,
    num_items: Tensor | None = None,
) -> Tensor:
    r"""Divergence of the relations among queries, among keys and among values.

    The heads of $q$ are joined and split again into $R$ relation heads $x_r$ of width $d / R$, with
    $P = \mathrm{softmax}(x_r x_r^\top / \sqrt{d / R})$ over valid keys; the mean over valid queries and relation heads
    of $KL(P^T \| P^S)$; the same for $k$ and $v$; and the weighted sum of the three (MiniLMv2, Wang et al. 2021,
    https://arxiv.org/abs/2012.15828, section 3).

    Args:
        student (tuple of three `torch.Tensor` of shape `(batch, heads, seq, head_size)`):
            The student's query, key and value vectors in one layer.
        teacher (tuple of three `torch.Tensor` of shape `(batch, heads, seq, head_size)`):
            The teacher's, with heads of any number and width.
        mask (`torch.Tensor` of shape `(batch, seq)`): 1 for tokens, 0 for padding.
        relation_heads (`int`): $R$; more heads carry finer relations and cost more memory. Divides both widths.
        relation_weights (`tuple[float, float, float]`, *optional*, defaults to `(1.0, 1.0, 1.0)`):
            Factors of the query, key and value relations; 0 leaves one out.
        reach (`int`, *optional*): Number of tokens to either side that are related, see [`attention_mse`].
        num_items (`torch.Tensor`, *optional*): Number of tokens to divide by.

    Returns:
        `torch.Tensor`: Scalar, in nats.

    Raises:
        ValueError: If `relation_heads` does not divide both widths, no weight is above 0 or one is below, the batches
            or lengths differ, or the mask does not fit.
    """
    require(
        min(relation_weights) >= 0.0 and max(relation_weights) > 0.0,
        f"relation_weights={relation_weights} must be >= 0 with one above 0; they weigh the relations among queries, "
        "keys and values, for example (1.0, 1.0, 1.0).",
    )
    values = []
    for x_student, x_teacher, weight in zip(student, teacher, relation_weights, strict=True):
        _require_same_tokens(x_student, x_teacher, mask)
        _require_divisor(relation_heads, x_student, x_teacher)
        if weight > 0.0:
            of_student, of_teacher = (_relation_heads(x, relation_heads) for x in (x_student, x_teacher))
            if reach is None:
                divergences = sum_of_divergences(of_student, of_teacher, mask)
                value = divergences / relation_heads / denominator(mask.sum(), num_items)
            else:
                valid = (zeros_in_padding(x, padding_of(mask)) for x in (of_student, of_teacher))
                scores, teacher_scores = (attention_scores(x, x) for x in valid)
                value = attention_kl(scores, teacher_scores, mask, reach=reach, num_items=num_items)
            values.append(weight * value)
    return torch.stack(values).sum()


def relation_minilm_v1(
    student: Vectors,
    teacher: Vectors,
    mask: Tensor,
    *,
    reach: int | None = None,
    num_items: Tensor | None = None,
) -> Tensor:
    r"""Divergence of attention plus divergence of the relations among values, head by head.

    Mean over valid queries and heads of $KL(P^T \| P^S)$ for $P = \mathrm{softmax}(q k^\top / \sqrt{d_{head}})$, plus
    the same for $\mathrm{softmax}(v v^\top / \sqrt{d_{head}})$; the paper takes both from the last layer (MiniLM, Wang
    et al. 2020, https://arxiv.org/abs/2002.10957, section 3).

    Args:
        student (tuple of three `torch.Tensor` of shape `(batch, heads, seq, head_size)`):
            The student's query, key and value vectors in one layer.
        teacher (tuple of three `torch.Tensor` of shape `(batch, heads, seq, head_size)`):
            The teacher's, with as many heads, of any width.
        mask (`torch.Tensor` of shape `(batch, seq)`): 1 for tokens, 0 for padding.
        reach (`int`, *optional*): Number of tokens to either side that are related, see [`attention_mse`].
        num_items (`torch.Tensor`, *optional*): Number of tokens to divide by.

    Returns:
        `torch.Tensor`: Scalar, in nats.

    Raises:
        ValueError: If the head counts, batches or lengths differ, or the mask does not fit.
    """
    for x_student, x_teacher in zip(student, teacher, strict=True):
        _require_same_tokens(x_student, x_teacher, mask)
        heads = x_student.shape[1], x_teacher.shape[1]
        require(
            heads[0] == heads[1],
            f"the student has {heads[0]} attention heads and the teacher {heads[1]}, which minilm_v1 cannot compare; "
            "use minilm_v2, which splits both into `relation_heads`.",
        )

    def scores(vectors: Vectors) -> tuple[Tensor, Tensor]:
        query, key, value = (zeros_in_padding(x, padding_of(mask)) for x in vectors)
        return attention_scores(query, key), attention_scores(value, value)

    pairs = zip(scores(student), scores(teacher), strict=True)
    return torch.stack([attention_kl(s, t, mask, reach=reach, num_items=num_items) for s, t in pairs]).sum()


def relation_similarity(student: Tensor, teacher: Tensor, *, num_items: Tensor | None = None) -> Tensor:
    r"""Squared error between similarities of texts: $\frac{1}{B^2} \|\tilde G^S - \tilde G^T\|^2$, where $\tilde G$ is
    $X X^\top$ with rows of length 1.

    Similarity-preserving distillation (Tung & Mori 2019, https://arxiv.org/abs/1907.09682, section 3).

    A training compares the rows that one process has in one micro-batch, and none of other processes or accumulation
    steps: 2 processes with 8 rows each are 2 steps of accumulation with 8 rows, and not one batch of 16. The value of
    the step is the mean of the parts, weighed by their rows.

    Args:
        student (`torch.Tensor` of shape `(batch, student_hidden)`): One vector of the student per text, see
            [`first_token`].
        teacher (`torch.Tensor` of shape `(batch, teacher_hidden)`): One vector of the teacher per text.
        num_items (`torch.Tensor`, *optional*):
            Number of texts to divide by. Relations are those within the batch given, so parts of a batch do not add up
            to the value of the whole; each counts by its share of the texts.

    Returns:
        `torch.Tensor`: Scalar between 0 and 4 / `batch`.

    Raises:
        ValueError: If the vectors are not one per text on both sides.
    """
    student, teacher = _comparable_texts(student, teacher)
    error = unit(student @ student.T) - unit(teacher @ teacher.T)
    return _share_of_batch(error.square().sum() / max(len(student), 1) ** 2, len(student), num_items)


def relation_rkd(
    student: Tensor,
    teacher: Tensor,
    *,
    distance_weight: float = 1.0,
    angle_weight: float = 2.0,
    num_items: Tensor | None = None,
) -> Tensor:
    r"""Huber loss between the distances of two texts and between the angles at one text towards two others.

    $\psi_D(i, j) = \|x_i - x_j\| / \mu$ with $\mu$ its mean over the pairs $i \ne j$, and $\psi_A(i, j, k) = \cos
    \angle x_i x_j x_k$; $w_D$ times the mean of $l_\delta(\psi_D^S, \psi_D^T)$ over the pairs plus $w_A$ times the
    mean of $l_\delta(\psi_A^S, \psi_A^T)$ over the triplets of different texts, $l_\delta$ being the Huber loss of
    width 1 (relational knowledge distillation, Park et al. 2019, https://arxiv.org/abs/1904.05068, section 3.2).

    Compares the rows that one process has in one micro-batch, see [`relation_similarity`].

    Needs memory for `batch ** 2 * hidden` and `batch ** 3` numbers: little up to a batch of 128. A batch without two
    texts, for angles three, adds 0.

    Args:
        distance_weight (`float`, *optional*, defaults to 1.0): $w_D$; 0 leaves distances out.
        angle_weight (`float`, *optional*, defaults to 2.0): $w_A$, in the proportion of the paper's 25 to 50; 0 leaves
            angles out.

    The other arguments and errors are those of [`relation_similarity`].

    Returns:
        `torch.Tensor`: Scalar.
    """
    student, teacher = _comparable_texts(student, teacher)
    batch = len(student)
    differences = [x[None] - x[:, None] for x in (student, teacher)]  # (batch, batch, hidden)
    value = student.sum() * 0.0  # with a gradient, also where nothing can be compared
    if distance_weight != 0.0:
        distance_student, distance_teacher = (_relative_distances(x) for x in differences)
        distances = F.huber_loss(distance_student, distance_teacher, reduction="sum")
        value = value + distance_weight * distances / max(batch * (batch - 1), 1)
    if angle_weight != 0.0:
        # (batch, batch, batch): the vertex first. Where the vertex is one of the ends, both angles are 0.
        angle_student, angle_teacher = (x @ x.transpose(1, 2) for x in map(unit, differences))
        angles = F.huber_loss(angle_student, angle_teacher, reduction="none")
        is_same = torch.eye(batch, dtype=torch.bool, device=student.device)
        angles = angles.masked_fill(is_same, 0.0).sum()
        value = value + angle_weight * angles / max(batch * (batch - 1) * (batch - 2), 1)
    return _share_of_batch(value, batch, num_items)


def relation_pkt(student: Tensor, teacher: Tensor, *, num_items: Tensor | None = None) -> Tensor:
    r"""Divergence between the neighbourhoods of texts: mean over texts of $KL(p^T_{\cdot|i} \| p^S_{\cdot|i})$.

    $p_{j|i} = K_{ij} / \sum_{k \ne i} K_{ik}$ for $j \ne i$ with $K_{ij} = (1 + \cos(x_i, x_j)) / 2$ (probabilistic
    knowledge transfer, Passalis & Tefas 2018, https://arxiv.org/abs/1803.10837, section 3). The paper sums
    over texts; the mean does not grow with them. Up to two texts there is one neighbour at most: 0.

    Compares the rows that one process has in one micro-batch, see [`relation_similarity`].

    Arguments and errors are those of [`relation_similarity`].

    Returns:
        `torch.Tensor`: Scalar, in nats.
    """
    student, teacher = _comparable_texts(student, teacher)
    is_self = torch.eye(len(student), dtype=torch.bool, device=student.device)
    # 1e-6: opposite vectors have a kernel of 0, and its logarithm no gradient.
    kernels = ((1.0 + unit(x) @ unit(x).T).clamp_min(1e-6) for x in (student, teacher))
    log_student, log_teacher = (k.log().masked_fill(is_self, LOWEST).log_softmax(dim=-1) for k in kernels)
    divergence = F.kl_div(log_student, log_teacher, reduction="none", log_target=True)
    return divergence.masked_fill(is_self, 0.0).sum() / denominator(len(student), num_items)


def relation_correlation(student: Tensor, teacher: Tensor, *, num_items: Tensor | None = None) -> Tensor:
    r"""Squared error between kernels of texts: $\frac{1}{B^2} \sum_{ij} (k(x^S_i, x^S_j) - k(x^T_i, x^T_j))^2$.

    Correlation congruence (Peng et al. 2019, https://arxiv.org/abs/1904.01802, section 3) with its Gaussian
    kernel $\exp(-\gamma \|x_i - x_j\|^2)$ of normalised vectors, as its Taylor series
    $\exp(-2 \gamma) \sum_{p=0}^{2} \frac{(2 \gamma)^p}{p!} (x_i \cdot x_j)^p$ with $\gamma = 0.4$.

    Compares the rows that one process has in one micro-batch, see [`relation_similarity`].

    Arguments and errors are those of [`relation_similarity`].

    Returns:
        `torch.Tensor`: Scalar between 0 and 1.
    """
    student, teacher = _comparable_texts(student, teacher)
    error = _gaussian_kernel(student) - _gaussian_kernel(teacher)
    return _share_of_batch(error.square().sum() / max(len(student), 1) ** 2, len(student), num_items)


def relation_crd(
    student: Tensor, teacher: Tensor, *, temperature: float = 0.07, num_items: Tensor | None = None
) -> Tensor:
    r"""Contrast: each text's student vector should be told by its teacher vector among the batch, and the other way
    round.

    $\frac{1}{2} (CE(S T^\top / \tau) + CE(T S^\top / \tau))$ for normalised vectors, the right answer being the text
    itself. The loss of contrastive representation distillation (Tian et al. 2020, https://arxiv.org/abs/1910.10699)
    with the batch in place of its memory of negatives, as in CLIP (Radford et al. 2021,
    https://arxiv.org/abs/2103.00020). So it is not 0 for equal inputs, and larger batches teach more; one text alone
    gives 0.

    The batch is the rows that one process has in one micro-batch, see [`relation_similarity`]: the other processes and
    accumulation steps add no negatives.

    Args:
        student (`torch.Tensor` of shape `(batch, hidden)`): One vector of the student per text, projected to the
            teacher's width.
        teacher (`torch.Tensor` of shape `(batch, hidden)`): One vector of the teacher per text.
        temperature (`float`, *optional*, defaults to 0.07): Divides the cosines, > 0.
        num_items (`torch.Tensor`, *optional*): Number of texts to divide by, see [`relation_similarity`].

    Returns:
        `torch.Tensor`: Scalar, in nats.

    Raises:
        ValueError: If the shapes differ or the temperature is not positive.
    """
    require(temperature > 0, f"temperature={temperature} must be > 0.")
    student, teacher = _comparable_texts(student, teacher)
    require(
        student.shape == teacher.shape,
        f"student and teacher cannot be contrasted: shapes {shape(student)} and {shape(teacher)} differ; project the "
        "student to the teacher's width.",
    )
    scores = unit(student) @ unit(teacher).T / temperature
    itself = torch.arange(len(student), device=student.device)
    by_student, by_teacher = (F.cross_entropy(x, itself, reduction="sum") for x in (scores, scores.T))
    return (by_student + by_teacher) / 2 / denominator(len(student), num_items)


def _require_same_tokens(student: Tensor, teacher: Tensor, mask: Tensor) -> None:
    require(
        student.dim() == teacher.dim() == 4
        and student.shape[0] == teacher.shape[0]
        and student.shape[2] == teacher.shape[2],
        f"student and teacher cannot be compared: shapes {shape(student)} and {shape(teacher)} differ in batch or "
        "length; give both as (batch, heads, seq, head_size).",
    )
    require_mask(mask, student)


def _require_divisor(relation_heads: int, student: Tensor, teacher: Tensor) -> None:
    widths = {"student": student.shape[1] * student.shape[3], "teacher": teacher.shape[1] * teacher.shape[3]}
    for side, width in widths.items():
        if relation_heads < 1 or width % relation_heads != 0:
            common = math.gcd(*widths.values())
            fitting = [str(r) for r in range(1, common + 1) if common % r == 0]
            near = [r for r in fitting if int(r) < relation_heads][-2:] or fitting[:2]
            raise ValueError(
                f"`relation_heads={relation_heads}` does not divide the {side}'s width {width}; use a common divisor "
                f"of {widths['teacher']} and {widths['student']} such as {' or '.join(near)}."
            )


def _relation_heads(vectors: Tensor, relation_heads: int) -> Tensor:
    """The vectors split anew, of shape `(batch, relation_heads, seq, width / relation_heads)`."""
    joined = vectors.transpose(1, 2).flatten(2)  # (batch, seq, heads * head_size)
    return joined.unflatten(-1, (relation_heads, -1)).transpose(1, 2)


def _comparable_texts(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    require(
        student.dim() == teacher.dim() == 2 and len(student) == len(teacher),
        f"student and teacher cannot be compared: shapes {shape(student)} and {shape(teacher)} differ in their number "
        "of texts; give one vector per text, (batch, hidden), on both sides.",
    )
    return student.float(), teacher.detach().float()


def _share_of_batch(value: Tensor, batch: int, num_items: Tensor | None) -> Tensor:
    """The value of a batch, weighed by its share of the texts of the optimisation step."""
    return value * batch / denominator(batch, num_items)


def _relative_distances(differences: Tensor) -> Tensor:
    """Distances of texts over their mean, of shape `(batch, batch)`; equal texts have distance 0 and no gradient."""
    distances = torch.linalg.vector_norm(differences, dim=-1)
    mean = distances.sum() / max(len(distances) * (len(distances) - 1), 1)
    return distances / mean.masked_fill(mean == 0, 1.0)


def _gaussian_kernel(vectors: Tensor, gamma: float = 0.4) -> Tensor:
    exponent = 2 * gamma * unit(vectors) @ unit(vectors).T
    return math.exp(-2 * gamma) * (1.0 + exponent + exponent.square() / 2)
