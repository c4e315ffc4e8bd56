"""The evaluation of a student: on its own columns, and where that is asked for, beside its teacher."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import Trainer

from .agreement import TeacherAgreement
from .objective import LogitTerm
from .signals import TeacherEnsemble, Wanted
from .signals.capture import columns_for
from .signals.columns import (
    TokenLengths,
    has_signal_columns,
    is_signal_column,
    with_fast_format,
    without_signals,
)


class EvaluatingTrainer(Trainer):
    """The part of [`DistillationTrainer`] that evaluates, and hands rows to the data loaders of both.

    Of what a subclass sets up it reads `teacher`, `teacher_agreement`, `distillation_objective`, `student_columns` and
    `problem`.
    """

    # Set by the subclass
    teacher: Any
    teacher_agreement: TeacherAgreement | None
    distillation_objective: Any
    student_columns: set[str] | None
    problem: Any
    # Set by Trainer.__init__
    model: Any
    args: Any
    model_accepts_loss_kwargs: Any
    _student_accepts_loss_kwargs: Any

    # Rows, which may carry signals of a teacher

    def eval_datasets(self) -> list[Any]:
        """The evaluation sets, each of them where there are several."""
        if self.eval_dataset is None:
            return []
        return list(self.eval_dataset.values()) if isinstance(self.eval_dataset, dict) else [self.eval_dataset]

    def _get_dataloader(self, dataset: Any, *args: Any, is_training: bool = False, **kwargs: Any) -> Any:
        if not is_training:
            dataset = without_signals(dataset, keep_logits=self.teacher_agreement is not None)
        return super()._get_dataloader(with_fast_format(dataset), *args, is_training=is_training, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        has_lengths = has_signal_columns(dataset) and "input_ids" in dataset.column_names
        return super()._get_train_sampler(TokenLengths(dataset) if has_lengths else dataset)

    def check_agreement_rows(self, has_model: bool) -> None:
        """At the end of the first epoch it would be late to find that there is nothing to compare with.

        Args:
            has_model (`bool`): Whether the teacher can run on rows that carry no signals.

        Raises:
            ValueError: If evaluation rows carry no signals that are needed, or those of another teacher.
        """
        if self.teacher_agreement is None:
            return
        for dataset in self.eval_datasets():
            if not has_signal_columns(dataset):
                if not has_model:
                    raise ValueError(
                        "eval_teacher_agreement=True compares with the teacher on the evaluation rows, which carry no "
                        "signals of it; cache these too (cache_teacher_signals), or pass teacher_model=."
                    )
                continue
            known = getattr(self.train_dataset, "features", None) or {}
            for name, feature in (dataset.features or {}).items():
                is_description = is_signal_column(name) and name.endswith("signals")
                if is_description and known.get(name, feature) != feature:
                    raise ValueError(
                        f"the evaluation rows' {name} is of another teacher than the training rows'; cache both with "
                        "one teacher."
                    )

    # Evaluation

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> Any:
        """As `Trainer`, on the student's own columns, and with the logits alone: all its states would fill the
        memory."""
        if ignore_keys is None:
            ignore_keys = getattr(self.model.config, "keys_to_ignore_at_inference", [])
        ignore_keys = [*ignore_keys, "hidden_states", "attentions"]
        agreement = self.teacher_agreement
        accepts, self.model_accepts_loss_kwargs = self.model_accepts_loss_kwargs, self._student_accepts_loss_kwargs
        try:
            student_inputs = columns_for(self.student_columns, inputs)
            loss_only = prediction_loss_only and agreement is None
            loss, logits, labels = super().prediction_step(model, student_inputs, loss_only, ignore_keys)
        finally:
            self.model_accepts_loss_kwargs = accepts
        if agreement is not None:
            inputs = self._prepare_inputs(inputs)
            teachers = self.teacher(inputs)
            compared = agreement.compare(logits, columns_for(self.student_columns, inputs), teachers)
            agreement.add(self.accelerator.gather_for_metrics(compared))
        return (loss, None, None) if prediction_loss_only else (loss, logits, labels)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """As `Trainer`, with the teacher agreement among the metrics, if it is asked for."""
        if self.teacher_agreement is None:
            return super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        self.teacher_agreement.start()
        is_ensemble = isinstance(self.teacher, TeacherEnsemble)
        self.teacher.watch([Wanted()] * len(self.teacher.teachers) if is_ensemble else Wanted())  # logits are enough
        try:
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        finally:
            self.teacher.watch(self.distillation_objective.teacher_wanted)
        found = self.teacher_agreement.metrics()
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in found.items()})
        return output

    def make_teacher_agreement(self, shares_tokens: bool) -> TeacherAgreement | None:
        """What compares student and teacher in an evaluation, where `args.eval_teacher_agreement` asks for it."""
        if not self.args.eval_teacher_agreement:
            return None
        logit_terms = [term for term in self.distillation_objective.terms if isinstance(term, LogitTerm)]
        shares = {"teacher_weights": self.args.teacher_weights, "teacher_reduction": self.args.teacher_reduction}
        term = logit_terms[0] if logit_terms else LogitTerm(**shares)
        teacher_config = self.teacher and self.teacher.config
        return TeacherAgreement(term, self.model.config, teacher_config, self.problem, shares_tokens)
