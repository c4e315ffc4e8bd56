"""Measures on an evaluation set how far a student says what its teachers say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .objective.binding import bind_terms
from .objective.predictions import combine_teachers, prediction_rows
from .objective.terms import LogitTerm
from .signals import Signals, labels_of
from .signals.batch import attention_mask_of, predicted_tokens
from .signals.problem import ProblemType


class TeacherAgreement:
    """Teacher agreement over the batches of an evaluation, of which sums alone are kept.

    A prediction is what a softmax chooses between: an example, a class of a multi-label example (yes or no), a valid
    token, the start or the end of an answer; see [`prediction_rows`]. Several teachers answer as one, as the logit
    term combines them.

    | metric | over the predictions |
    |---|---|
    | `teacher_agreement` | share in which the likeliest class of student and teacher is the same |
    | `teacher_kl` | mean Kullback-Leibler divergence from teacher to student, in nats, at temperature 1 |
    | `teacher_mse` | for regression, in place of both: mean squared difference of the values |

    "Does Knowledge Distillation Really Work?" (Stanton et al. 2021, https://arxiv.org/abs/2106.05945, section 3) calls
    the first two fidelity: a student can be as good as its teacher without agreeing with it.

    Args:
        term ([`LogitTerm`]): Says which teachers to compare with, and how to combine several.
        student_config ([`~transformers.PretrainedConfig`]): The student's config.
        teacher_config ([`~transformers.PretrainedConfig`] or list of them, *optional*):
            The teacher's, or those of several.
        problem (`str`): What the models solve.
        shares_tokens (`bool`, *optional*, defaults to `True`): Whether all read the same tokens.

    Raises:
        ValueError: If there is no teacher, or it cannot be compared with the student.
    """

    def __init__(
        self,
        term: LogitTerm,
        student_config: Any,
        teacher_config: Any,
        problem: ProblemType,
        shares_tokens: bool = True,
    ):
        # Of the term only the teachers are read, and the models have to fit as they must for any logit loss.
        self.term = replace(term, type=None, options={}, name="eval_teacher_agreement")
        configs = [] if teacher_config is None else teacher_config
        configs = configs if isinstance(configs, list) else [configs]
        bind_terms([self.term], student_config, configs, problem, shares_tokens)
        self.problem = problem
        self.start()

    def start(self) -> None:
        """Forget what was added before."""
        self._sums: list[float] | None = None

    @torch.no_grad()
    def compare(self, logits: Any, inputs: Mapping[str, Any], teachers: Signals | Sequence[Signals]) -> Tensor:
        """What one batch has to say, example by example, so that processes can gather it and drop repeated examples.

        Args:
            logits (`torch.Tensor`, or a tuple of them): The student's, as `Trainer.prediction_step` gives them: of
                several outputs the first, and for question answering those of start and end.
            inputs (`Mapping[str, Any]`): The student's columns of the batch; labels say which tokens are valid.
            teachers ([`Signals`] or sequence of them): Those of the teachers, logits in the student's label order.

        Returns:
            `torch.Tensor` of shape `(batch, 2 or 3)`, in float32: of each example the number of predictions, and the
            sums over them of the metrics in the order of [`metrics`].
        """
        teachers = [teachers] if isinstance(teachers, Signals) else teachers
        chosen = teachers if self.term.teacher is None else [teachers[self.term.teacher]]
        if self.problem == "question_answering":
            logits = torch.stack(tuple(logits[:2]), dim=1)  # (batch, 2, seq)
        student = Signals(logits[0] if isinstance(logits, tuple) else logits, attention_mask_of(inputs))
        labels = labels_of(inputs, self.problem)
        rows = prediction_rows(self.problem, student, chosen, labels)
        is_regression = self.problem == "regression"
        teacher = combine_teachers(
            rows.teachers,
            self.term.teacher_weights,
            temperature=1.0,
            reduction=self.term.teacher_reduction,
            loss_type="mse" if is_regression else "kl",
            class_mask=rows.class_mask,
        )
        own = combine_teachers(
            [rows.student], None, temperature=1.0, reduction="logits", loss_type="kl", class_mask=rows.class_mask
        )
        if is_regression:
            values = [(own - teacher).square().flatten()]
        else:
            log_student, log_teacher = own.log_softmax(dim=-1), teacher.log_softmax(dim=-1)
            # A class that does not exist has the probability 0 and a finite logarithm: it adds 0.
            divergence = (log_teacher.exp() * (log_teacher - log_student)).sum(dim=-1)
            values = [own.argmax(dim=-1) == teacher.argmax(dim=-1), divergence]
        of_items = torch.stack([torch.ones(len(own), device=own.device), *values], dim=1)  # (items, metrics + 1)
        sums = of_items.new_zeros(len(student.attention_mask), of_items.shape[1])
        return sums.index_add(0, self._example_of_items(student, labels), of_items)

    def add(self, compared: Tensor) -> None:
        """Add what [`compare`] gave, gathered from all processes."""
        sums = compared.cpu().double().sum(dim=0).tolist()
        self._sums = sums if self._sums is None else [a + b for a, b in zip(self._sums, sums, strict=True)]

    def metrics(self) -> dict[str, float]:
        """The means over all predictions since [`start`]; nothing if there were none."""
        count, *sums = self._sums or [0.0]
        names = ["teacher_mse"] if self.problem == "regression" else ["teacher_agreement", "teacher_kl"]
        return {name: value / count for name, value in zip(names, sums, strict=True)} if count else {}

    def _example_of_items(self, student: Signals, labels: Tensor | None) -> Tensor:
        """Index of the example that each row of [`prediction_rows`] belongs to."""
        examples = torch.arange(len(student.attention_mask), device=student.logits.device)
        if self.problem in ("token_classification", "masked_lm"):
            is_valid = predicted_tokens(self.problem, student.attention_mask, labels)
            return examples.repeat_interleave(is_valid.sum(dim=1))
        if self.problem == "multi_label_classification":
            return examples.repeat_interleave(student.logits.shape[-1])
        return examples.repeat_interleave(2) if self.problem == "question_answering" else examples
