"""The weighted sum of the terms that are on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..signals import ItemCounts, LayerPair, Signals, Wanted
from ..signals.problem import ProblemType
from .binding import Binding, bind_terms
from .predictions import check_logits_shape
from .projection import Projection
from .schedules import read_schedule, read_temperature_schedule
from .terms import AttentionTerm, HiddenTerm, LogitTerm, RelationTerm, TaskTerm, Term, weight_at
from .values import compute_term


# These compare vectors of equal width; all others compare what does not depend on it.
_PROJECTED = ("mse", "cosine", "pkd", "gram", "crd")


class DistillationObjective(nn.Module):
    """A weighted sum of loss terms between a student, its teachers and the labels.

    It knows neither trainer nor models, only their configs and the signals read from them. Terms of weight 0 are
    dropped: nothing is captured, projected or computed for them.

    ```python
    terms = [TaskTerm(0.5), LogitTerm(0.5, temperature=4.0), HiddenTerm(1.0, layers="1:4,2:8")]
    objective = DistillationObjective(terms).bind(student.config, teacher.config)
    values = objective(student_signals, teacher_signals, labels)  # {"task_loss": ..., "logit_loss": ..., ...}
    loss = objective.weighted_sum(values)
    ```

    Its parameters are the projections of hidden states between different widths, made by `bind`. They belong in the
    optimizer.

    Args:
        terms (sequence of [`TaskTerm`], [`LogitTerm`], [`HiddenTerm`], [`AttentionTerm`], [`RelationTerm`], \
[`CustomTerm`]):
            The terms; several of a kind need different names.

    Raises:
        ValueError: If no term has a weight above 0 at some time of the training, or two have one name.
    """

    def __init__(self, terms: Sequence[Term]):
        super().__init__()
        self.terms: list[Term] = [term for term in terms if term.weight > 0]
        if not self.terms:
            raise ValueError(
                "every loss weight is 0, so there is nothing to train on; set for example logit_loss_weight=0.5."
            )
        names = [term.name for term in self.terms]
        if len(set(names)) < len(names):
            raise ValueError(
                f"loss terms share a name: {names}; give each a name of its own, e.g. "
                "HiddenTerm(name='hidden_loss_top')."
            )
        self._check_schedules()
        self.projections = nn.ModuleDict()
        self.binding: Binding | None = None

    @property
    def needs_teacher(self) -> bool:
        """Whether any term compares with a teacher."""
        return any(not isinstance(term, TaskTerm) for term in self.terms)

    @property
    def needs_attention(self) -> bool:
        """Whether any term reads queries, keys or values."""
        return bool(self.student_wanted.attention)

    @property
    def has_projections(self) -> bool:
        """Whether there are parameters to train: vectors are compared between different widths."""
        return any(True for _ in self.parameters())

    @property
    def student_wanted(self) -> Wanted:
        """The intermediate signals to read from the student."""
        return self._wanted("student", [term.name for term in self.terms])

    @property
    def teacher_wanted(self) -> Wanted | list[Wanted]:
        """The intermediate signals to read from the teacher; one entry for each, if there are several."""
        teacher_of = self._require_binding().teacher_of
        wanted = [
            self._wanted("teacher", [name for name, index in teacher_of.items() if index == teacher])
            for teacher in range(self._require_binding().num_teachers)
        ]
        return wanted[0] if len(wanted) == 1 else wanted

    @property
    def has_schedules(self) -> bool:
        """Whether anything changes over the training."""
        schedules = [term.schedule for term in self.terms]
        schedules += [term.temperature_schedule for term in self.terms if isinstance(term, LogitTerm)]
        return any(read_schedule(schedule).kind != "constant" for schedule in schedules)

    def terms_on(self, progress: float | None = None) -> list[Term]:
        """The terms whose schedule does not give 0 at this share of the training."""
        progress = self._require_progress(progress)
        return [term for term in self.terms if weight_at(term, progress) > 0]

    def scheduled_values(self, progress: float) -> dict[str, float]:
        """What the schedules make of weights and temperatures at this share of the training: `<term>_weight`, and
        `temperature`, or `<term>_temperature` for a logit term with a name of its own; nothing for what is
        constant."""
        values = {}
        for term in self.terms:
            if read_schedule(term.schedule).kind != "constant":
                values[f"{term.name}_weight"] = weight_at(term, progress)
            if isinstance(term, LogitTerm):
                schedule = read_temperature_schedule(term.temperature_schedule)
                if schedule.kind != "constant":
                    name = "temperature" if term.name == "logit_loss" else f"{term.name}_temperature"
                    values[name] = term.temperature * schedule(progress)
        return values

    def compares_with_teacher(self, progress: float | None = None) -> bool:
        """Whether a teacher has to run at this share of the training."""
        return any(not isinstance(term, TaskTerm) for term in self.terms_on(progress))

    def uses_logits(self, progress: float | None = None) -> bool:
        """Whether a term depends on the student's logits, and so on all of its layers, at this share of the
        training."""
        return any(isinstance(term, TaskTerm | LogitTerm) for term in self.terms_on(progress))

    def bind(
        self,
        student_config: Any,
        teacher_config: Any = None,
        *,
        problem: ProblemType | None = None,
        shares_tokens: bool = True,
    ) -> DistillationObjective:
        """Settle what depends on the models: layer pairs, projections, the form of the logit loss.

        Args:
            student_config ([`~transformers.PretrainedConfig`]): The student's config.
            teacher_config ([`~transformers.PretrainedConfig`] or sequence of them, *optional*):
                The teacher's, or those of several; none is needed for the task term alone.
            problem (`str`, *optional*):
                What the models solve, see [`~hf_kd.signals.problem_of`]; by default, what a sequence classification
                model with the student's config solves.
            shares_tokens (`bool`, *optional*, defaults to `True`):
                Whether student and teachers read the same tokens. With tokenizers of their own, only what belongs to
                a whole row can be compared.

        Returns:
            [`DistillationObjective`]: Itself.

        Raises:
            ValueError: If the models cannot be compared by a term that is on.
        """
        if teacher_config is None:
            teacher_config = []
        configs = list(teacher_config) if isinstance(teacher_config, list | tuple) else [teacher_config]
        self.binding = bind_terms(self.terms, student_config, configs, problem, shares_tokens)
        for term in self.terms:
            if isinstance(term, HiddenTerm | RelationTerm) and term.type in _PROJECTED:
                widths = student_config.hidden_size, configs[self.binding.teacher_of[term.name] or 0].hidden_size
                self._project(term, *widths)
        return self

    def forward(
        self,
        student: Signals,
        teacher: Signals | Sequence[Signals] | None = None,
        labels: Tensor | None = None,
        num_items: ItemCounts | None = None,
        task_loss: Tensor | None = None,
        progress: float | None = None,
    ) -> dict[str, Tensor]:
        """Compute the terms that are on.

        Args:
            student ([`Signals`]): Read from the student.
            teacher ([`Signals`] or sequence of them, *optional*):
                Read from the teachers, logits in the student's label order.
            labels (`torch.Tensor`, *optional*):
                See [`~hf_kd.signals.labels_of`]; -100 marks a row, class or token without a label.
            num_items ([`ItemCounts`], *optional*): What to divide by, when the batch is a part of the optimisation
                step.
            task_loss (`torch.Tensor`, *optional*): The task term, where the caller has its own.
            progress (`float`, *optional*): Share of the optimisation steps that are done, which the schedules follow;
                needed if there are any.

        Returns:
            `dict[str, torch.Tensor]`: Name to unweighted scalar, in the order of the terms.

        Raises:
            ValueError: If a term lacks its signal.
        """
        binding = self._require_binding()
        check_logits_shape(binding.problem, student.logits)
        self._require_signals("student", student, self.student_wanted)
        teachers = [] if teacher is None else [teacher] if isinstance(teacher, Signals) else list(teacher)
        wanted = self.teacher_wanted
        for signals, of_teacher in zip(teachers, wanted if isinstance(wanted, list) else [wanted], strict=False):
            self._require_signals("teacher", signals, of_teacher)
        progress = self._require_progress(progress)
        terms_on = self.terms_on(progress)
        # Scores from q and k, and projections, would otherwise be rounded to bfloat16 by the training step's autocast.
        with torch.autocast(student.logits.device.type, enabled=False):
            values = {
                term.name: task_loss
                if isinstance(term, TaskTerm) and task_loss is not None
                else compute_term(term, binding, self.projections, student, teachers, labels, num_items, progress)
                for term in terms_on
            }
            # Projections of terms that are off get a gradient of 0: DDP waits for every parameter.
            idle = [p for term in self.terms if term not in terms_on for p in self._projection_parameters(term)]
            if idle:
                name = terms_on[0].name
                values[name] = values[name] + 0.0 * torch.stack([p.sum() for p in idle]).sum()
        return values

    def weighted_sum(self, values: dict[str, Tensor], progress: float | None = None) -> Tensor:
        """The loss to train on: each term times its weight, as given, and its schedule's factor."""
        progress = self._require_progress(progress)
        terms_on = self.terms_on(progress)
        return torch.stack([weight_at(term, progress) * values[term.name] for term in terms_on]).sum()

    def _require_progress(self, progress: float | None) -> float:
        if progress is None and self.has_schedules:
            raise ValueError(
                "the terms have schedules, which follow the training; pass progress=step / num_steps to the objective "
                "and to weighted_sum."
            )
        return progress or 0.0

    # Binding

    def _require_binding(self) -> Binding:
        if self.binding is None:
            raise ValueError(
                "the objective does not know its models yet; call objective.bind(student.config, teacher.config) "
                "first."
            )
        return self.binding

    def _project(self, term: HiddenTerm | RelationTerm, student_width: int, teacher_width: int) -> None:
        """Make the term's projection, unless it is there already: an optimizer may hold it."""
        layers = [pair.student for pair in self._require_binding().hidden_pairs[term.name]]
        projection = Projection(student_width, teacher_width, layers)
        there = self.projections[term.name] if term.name in self.projections else None
        if there is None or [p.shape for p in there.parameters()] != [p.shape for p in projection.parameters()]:
            self.projections[term.name] = projection

    def _projection_parameters(self, term: Term) -> list[nn.Parameter]:
        return list(self.projections[term.name].parameters()) if term.name in self.projections else []

    def _wanted(self, side: str, names: list[str]) -> Wanted:
        """What the terms of these names read."""
        binding = self._require_binding()
        only_scores = {term.name for term in self.terms if isinstance(term, AttentionTerm)}

        def layers(pairs: dict[str, list[LayerPair]]) -> frozenset[int]:
            return frozenset(getattr(pair, side) for name in names for pair in pairs.get(name, []))

        return Wanted(
            hidden=layers(binding.hidden_pairs),
            attention=layers(binding.attention_pairs),
            values=layers({name: p for name, p in binding.attention_pairs.items() if name not in only_scores}),
        )

    def check_every_term_has_a_step(self, num_steps: int) -> None:
        """Raise a `ValueError` if a term is on at none of so many steps: its window lies between two of them."""
        for term in self.terms:
            if not any(weight_at(term, step / num_steps) > 0 for step in range(num_steps)):
                raise ValueError(
                    f"{term.name}: schedule={term.schedule!r} is on at none of the {num_steps} steps; widen the "
                    "window."
                )

    @staticmethod
    def _require_signals(side: str, signals: Signals, wanted: Wanted) -> None:
        hidden, attention = wanted.hidden - signals.hidden.keys(), wanted.attention - signals.queries.keys()
        values = wanted.values - signals.values.keys()
        if hidden or attention or values:
            how = (
                "teacher.watch(objective.teacher_wanted)"
                if side == "teacher"
                else "Capture(student, objective.student_wanted)"
            )
            raise ValueError(
                f"the {side} signals lack hidden states of layers {sorted(hidden)}, attention of layers "
                f"{sorted(attention)} and values of layers {sorted(values)}, which the terms compare; read them with "
                f"{how}."
            )

    def _check_schedules(self) -> None:
        """A step at which every term is off would train nothing."""
        # Linear and cosine schedules can be 0 at the very start or end alone, and no step is at the end.
        schedules = [read_schedule(term.schedule) for term in self.terms]
        closings = [schedule.end for schedule in schedules if schedule.kind == "window" and schedule.end < 1.0]
        for progress in sorted({0.0, *closings}):
            if not self.terms_on(progress):
                raise ValueError(
                    f"every term is off at {progress:g} of the training, by their schedules; keep one on, e.g. "
                    "'linear:0.1:1', or 'window:0:0.5' followed by 'window:0.5:1'."
                )
