"""DistillationTrainer: the wiring between the `Trainer`, a teacher and an objective."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import torch
from accelerate.utils import DistributedType, DynamoBackend
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import has_length

from .checkpoint import check_weights_are_finite
from .evaluating import EvaluatingTrainer
from .numerics import NumericsWatch
from .objective import DistillationObjective, TaskTerm
from .publishing import PublishingTrainer
from .resumption import ResumableTrainer
from .signals import (
    Capture,
    ItemCounts,
    Signals,
    Teacher,
    TeacherEnsemble,
    Wanted,
    count_items,
    labels_of,
    problem_of,
)
from .signals.batch import LABEL_COLUMNS, NO_OWN_ROWS, attention_mask_of, has_own_rows
from .signals.cached_teacher import AnyTeacher, join_teachers, teachers_of_columns
from .signals.capture import columns_for, forward_columns
from .signals.columns import SignalsCollator, has_signal_columns
from .signals.problem import SEQUENCE_PROBLEMS
from .signals.teacher import AUTOCAST_DTYPES, check_tokenizers, load_teacher, load_teacher_tokenizer
from .training_args import DistillationTrainingArguments


PROJECTION_NAME = "projection.safetensors"
TeacherModel: TypeAlias = PreTrainedModel | str | os.PathLike


class DistillationTrainer(PublishingTrainer, ResumableTrainer, EvaluatingTrainer):
    """A [`~transformers.Trainer`] whose student also learns from a teacher.

    Training adds the terms of the objective; evaluation, prediction and saving are those of `Trainer`: no teacher
    runs, unless `eval_teacher_agreement` asks for it, and the saved model is the plain student. The value of each term
    is logged beside the loss, and each weight and temperature that a schedule changes.

    Differs from `Trainer` with gradient accumulation: every term is averaged over the valid items of the whole
    optimisation step, on all processes, so that ragged batches weigh what they hold.

    Args:
        model ([`~transformers.PreTrainedModel`]): The student.
        args ([`DistillationTrainingArguments`] or [`~transformers.TrainingArguments`], *optional*):
            Plain training arguments get the distillation's defaults.
        teacher_model ([`~transformers.PreTrainedModel`] or `str`, or a list of them, *optional*):
            The teacher, or the folder or Hub id of one; a list for several. Needed unless the task term alone is on,
            or `train_dataset` carries the teacher's signals, see [`cache_teacher_signals`]; with both, columns are
            read and the teacher runs for what they lack.
            Another revision, or a token that is not the one you are logged in with, is
            `teacher_model=load_teacher("org/name", revision="v2", token=...)`, see [`load_teacher`].
        objective ([`DistillationObjective`], *optional*): The terms; by default those that `args` describes.
        kwargs: Everything else that `Trainer` takes.

    Raises:
        ValueError: Before training, if student, teacher, objective and arguments do not fit.
    """

    # Set by Trainer.__init__
    model: Any
    data_collator: Any
    _signature_columns: Any
    compute_loss_func: Any
    model_accepts_loss_kwargs: Any

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        args: TrainingArguments | None = None,
        *trainer_args: Any,
        teacher_model: TeacherModel | Sequence[TeacherModel] | None = None,
        objective: DistillationObjective | None = None,
        **kwargs: Any,
    ):
        args = DistillationTrainingArguments.from_training_arguments(args)
        if args.n_gpu > 1:
            raise ValueError(
                f"one process sees {args.n_gpu} GPUs and would use DataParallel, which does not average terms over "
                f"what is valid; start one process per GPU: accelerate launch --num_processes {args.n_gpu} script.py."
            )
        super().__init__(model, args, *trainer_args, **kwargs)
        self._given_objective = objective
        given = teacher_model if isinstance(teacher_model, list | tuple) else [teacher_model]
        self._given_teachers = [teacher for teacher in given if teacher is not None]
        self.teacher: AnyTeacher | TeacherEnsemble | None = None
        if any(map(has_signal_columns, [self.train_dataset, *self.eval_datasets()])):
            has_token_logits = problem_of(self.model) not in SEQUENCE_PROBLEMS
            self.data_collator = SignalsCollator(self.data_collator, has_token_logits=has_token_logits)
        self._set_up_distillation()
        self.numerics = NumericsWatch(self)
        self.add_callback(self.numerics)
        self.add_callback(_ProjectionCallback(self))
        # compute_loss divides by the items of the whole optimisation step, so the Trainer must not divide by the
        # accumulation steps. The first line tells transformers 4.57, the second 5.x.
        self._student_accepts_loss_kwargs, self.model_accepts_loss_kwargs = self.model_accepts_loss_kwargs, True
        self.loss_is_scaled_for_ga = True

    def _set_up_distillation(self) -> None:
        """Fit objective, teacher and student together; again for each student that model_init makes."""
        if self._given_objective is not None:
            self.args.check_objective_alone_describes_the_terms()  # a search may have set them
        objective = self.args.objective() if self._given_objective is None else self._given_objective
        self.distillation_objective: DistillationObjective = objective
        # A collator that writes the texts in the teacher's tokens too; its rows have no tokens in common.
        reads_own_tokens = getattr(self.data_collator, "teacher_tokenizer", None) is not None
        self.problem = problem_of(self.model)
        check_weights_are_finite(self.model, "model")
        needs_teacher = objective.needs_teacher or self.args.eval_teacher_agreement
        if self.teacher is None and needs_teacher:
            labels = self.args.teacher_labels
            cached = teachers_of_columns(self.train_dataset, self.model.config, self.problem, labels)
            run = [
                self._load_teacher(teacher, reads_own_tokens, notes_weights=bool(cached))
                for teacher in self._given_teachers
            ]
            self.teacher = join_teachers(cached, run)
        objective.bind(
            self.model.config,
            self.teacher and self.teacher.config,
            problem=self.problem,
            shares_tokens=not reads_own_tokens,
        )
        objective.to(self.args.device)
        self.teacher_agreement = self.make_teacher_agreement(not reads_own_tokens)
        if self.teacher is not None:
            self.teacher.watch(objective.teacher_wanted)  # type: ignore[arg-type]
            self.check_agreement_rows(has_model=bool(self._given_teachers))
        self._freeze_embeddings()
        self.student_columns = forward_columns(self.model)
        self.capture = Capture(self.model, objective.student_wanted)
        self._check_gradient_checkpointing()
        self._check_on_nonfinite()
        self._compile_teachers()
        self._prepare_projections()

    def create_accelerator_and_postprocess(self) -> None:
        """Also note each norm of the gradient that is computed to clip it: another look at it would take time."""
        super().create_accelerator_and_postprocess()
        clip = self.accelerator.clip_grad_norm_

        def clip_and_note(*args: Any, **kwargs: Any) -> Any:
            self.numerics.gradient_norm = norm = clip(*args, **kwargs)
            return norm

        self.accelerator.clip_grad_norm_ = clip_and_note

    def _hp_search_setup(self, trial: Any) -> None:
        if trial is None or getattr(self, "_trial", None) is not trial:  # once for each
            super()._hp_search_setup(trial)

    def call_model_init(self, trial: Any = None) -> Any:
        """A new student, and with it a new objective: a search over weights or temperature changed the arguments."""
        if trial is not None:  # transformers 5 would after this: the terms would be those of the trial before
            self._hp_search_setup(trial)
        model = super().call_model_init(trial)
        if hasattr(self, "capture"):  # not the call within Trainer.__init__
            self.model = model
            self.distillation_objective.projections.clear()  # those of the student before
            self._set_up_distillation()
        return model

    # Data

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the columns of both: a DistilBERT student declares no token_type_ids, its BERT teacher reads them."""
        super()._set_signature_columns_if_needed()
        if self.teacher is not None:
            texts = getattr(self.data_collator, "text_columns", ())
            self._signature_columns = sorted({*self._signature_columns, *self.teacher.columns, *texts})

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, ItemCounts | None]:
        """Also count the valid items of the whole optimisation step, over its batches and all processes."""
        own_rows = map(self._own_rows, epoch_iterator)
        batches, num_labels = super().get_batch_samples(own_rows, num_batches, device)
        if not batches:
            return batches, None
        of_batches = [torch.stack(count_items(batch, self.problem)) * has_own_rows(batch) for batch in batches]
        counts = torch.stack(of_batches).sum(dim=0).to(device)
        counts = self.accelerator.reduce(counts, reduction="sum").clamp(min=1)
        self._num_labels_in_step = num_labels
        # DDP averages gradients over the processes: dividing by the mean count makes that the sum over all of them.
        return batches, ItemCounts(*(counts / self.accelerator.num_processes))

    def _own_rows(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Without the rows from the start of the epoch with which accelerate fills its last step, so that every
        process has a full batch: they would count twice, and the result depend on the number of processes."""
        if self.accelerator.num_processes == 1 or not self.accelerator.gradient_state.end_of_dataloader:
            return batch
        # Of a loader that skips what is done, in a resumed epoch, accelerate does not know the rest.
        loader: Any = self.callback_handler.train_dataloader
        is_filled = has_length(loader) and not self.args.dataloader_drop_last
        remainder = loader.total_dataset_length % loader.total_batch_size if is_filled else 0
        if remainder == 0:
            return batch
        num_rows = len(attention_mask_of(batch))
        num_own = min(max(remainder - self.accelerator.process_index * num_rows, 0), num_rows)
        # A process without a row keeps one that counts for nothing: models do not take empty batches.
        of_rows = {name: x for name, x in batch.items() if isinstance(x, Tensor) and x.dim() and len(x) == num_rows}
        batch = {**batch, **{name: column[: max(num_own, 1)] for name, column in of_rows.items()}}
        if num_own == 0:
            batch |= {name: torch.full_like(batch[name], -100) for name in LABEL_COLUMNS if name in batch}
            batch[NO_OWN_ROWS] = True
        return batch

    # Loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if not model.training:
            student_inputs = columns_for(self.student_columns, inputs)
            return super().compute_loss(model, student_inputs, return_outputs, num_items_in_batch)
        terms, student, outputs = self._forward(model, inputs, num_items_in_batch)
        self.numerics.add(terms, inputs, num_items_in_batch)
        loss = self.distillation_objective.weighted_sum(terms, self._progress)
        if not self.distillation_objective.uses_logits(self._progress):
            # Every parameter gets a gradient, as DDP needs, and as it then must be on one process too.
            loss = loss + 0.0 * student.logits.float().sum()
        return (loss, outputs) if return_outputs else loss

    def terms_of(self, model: nn.Module, inputs: dict[str, Any], num_items: ItemCounts | None) -> dict[str, Tensor]:
        """The unweighted terms of a part of an optimisation step, with their graph.

        Args:
            model (`nn.Module`): The student, in training mode.
            inputs (`dict[str, Any]`): A batch, on the device.
            num_items ([`ItemCounts`], *optional*): What the terms are averaged over.
        """
        return self._forward(model, inputs, num_items)[0]

    def _forward(
        self, model: nn.Module, inputs: dict[str, Any], num_items: Any
    ) -> tuple[dict[str, Tensor], Signals, Any]:
        """Terms, the student's signals and its outputs."""
        student_inputs = columns_for(self.student_columns, inputs)
        labels = labels_of(student_inputs, self.problem)
        for name in LABEL_COLUMNS:
            student_inputs.pop(name, None)  # the task term is the objective's
        progress = self._progress
        # Before the student runs, which keeps what its backward needs: that stays in the cache, and the peak is lower.
        teacher = self._teacher_signals(inputs, progress)
        with self.capture:
            outputs = model(**student_inputs, **self.capture.forward_kwargs)
        student = self.capture.signals(outputs, student_inputs)
        task_loss = None
        has_task_term = any(isinstance(term, TaskTerm) for term in self.distillation_objective.terms_on(progress))
        if self.compute_loss_func is not None and has_task_term and has_own_rows(inputs):
            task_loss = self.compute_loss_func(outputs, labels, num_items_in_batch=self._num_labels_in_step)
            if self.args.average_tokens_across_devices and self._num_labels_in_step is not None:
                task_loss = task_loss * self.accelerator.num_processes
        terms = self._objective(student, teacher, labels, num_items, task_loss, progress)
        if not has_own_rows(inputs):
            terms = {name: 0.0 * value for name, value in terms.items()}
        return terms, student, outputs

    @property
    def _progress(self) -> float:
        """Share of the optimisation steps that are done."""
        return self.state.global_step / max(self.state.max_steps, 1)

    def _teacher_signals(self, inputs: dict[str, Any], progress: float) -> Signals | list[Signals] | None:
        if self.teacher is None or not self.distillation_objective.compares_with_teacher(progress):
            return None
        return self.teacher(inputs)

    # Logs

    def record(self, terms: dict[str, Tensor]) -> None:
        """Add the terms of a part of a step to what the next log is the mean of."""
        for name, value in terms.items():
            self._term_sums[name] = self._term_sums.get(name, 0.0) + value.detach()
            self._steps_in_sums.setdefault(name, set()).add(self.state.global_step)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the unweighted value of each term, averaged like the loss over processes and the steps it was on, and
        what schedules made of weights and temperature at the last of these steps."""
        if "loss" in logs and self.numerics.skipped_steps:
            logs["skipped_steps"] = self.numerics.skipped_steps
        if "loss" in logs and self._term_sums:
            num_steps = [len(steps) for steps in self._steps_in_sums.values()]
            values = torch.stack(list(self._term_sums.values()))
            values = self.accelerator.reduce(values, reduction="mean").tolist()
            logs.update(
                {name: value / steps for name, value, steps in zip(self._term_sums, values, num_steps, strict=True)}
            )
            self._term_sums, self._steps_in_sums = {}, {}
            last_step = max(self.state.global_step - 1, 0)
            logs.update(self.distillation_objective.scheduled_values(last_step / max(self.state.max_steps, 1)))
        super().log(logs, *args, **kwargs)

    def running_state(self) -> dict[str, Any]:
        counts = {"skipped_steps": self.numerics.skipped_steps, "zero_steps": self.numerics.zero_steps}
        return {**super().running_state(), **counts}

    def load_running_state(self, found: dict[str, Any]) -> None:
        super().load_running_state(found)
        self.numerics.skipped_steps, self.numerics.zero_steps = found["skipped_steps"], found["zero_steps"]

    # Projections: trained, clipped, synchronised, saved and restored with the student, and no part of it

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Also train the projections, with the run's learning rate and weight decay."""
        is_own = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        missing = [p for p in self.distillation_objective.parameters() if id(p) not in known]
        if missing and not is_own:
            raise ValueError(
                "the optimizer passed as `optimizers` does not hold the projections of hidden states; pass "
                "objective=objective after objective.bind(student.config, teacher.config), with "
                "objective.parameters() in the optimizer."
            )
        if missing:
            optimizer.add_param_group({"params": missing, "weight_decay": self.args.weight_decay})
        return optimizer

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.distillation_objective.has_projections:
            path = os.path.join(resume_from_checkpoint, PROJECTION_NAME)
            if not os.path.isfile(path):
                raise ValueError(
                    f"the checkpoint {resume_from_checkpoint} has no {PROJECTION_NAME}, which the terms between "
                    f"layers need for the student's width {self.model.config.hidden_size}; resume with the terms it "
                    "was trained with."
                )
            self.distillation_objective.load_state_dict(load_file(path))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save and self.distillation_objective.has_projections:
            save_file(self.distillation_objective.state_dict(), os.path.join(output_dir, PROJECTION_NAME))

    def _prepare_projections(self) -> None:
        self._objective: nn.Module = self.distillation_objective
        if not self.distillation_objective.has_projections:
            return
        if self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise ValueError(
                f"the terms between layers need projections from the student's width {self.model.config.hidden_size}, "
                f"which are not trained under {self.accelerator.distributed_type}; use "
                "recipes/accelerate_configs/ddp.yaml."
            )
        self._objective = self.accelerator.prepare_model(self.distillation_objective)

    # Checks before training

    def _load_teacher(self, teacher_model: TeacherModel, reads_own_tokens: bool, notes_weights: bool) -> Teacher:
        if isinstance(teacher_model, str | os.PathLike):
            reader = self.data_collator.teacher_tokenizer if reads_own_tokens else self.processing_class
            if hasattr(reader, "get_vocab"):
                check_tokenizers(reader, load_teacher_tokenizer(teacher_model), reads_own_tokens)
            teacher_model = load_teacher(teacher_model)
        else:
            check_weights_are_finite(teacher_model, "teacher_model")
        if {id(p) for p in teacher_model.parameters()} & {id(p) for p in self.model.parameters()}:
            raise ValueError(
                "teacher_model and model share parameters, which the teacher would freeze; make the student with "
                "student_from_teacher(teacher, num_layers=3) or from copy.deepcopy(teacher)."
            )
        if any(hasattr(parameter, "ds_id") for parameter in teacher_model.parameters()):
            raise ValueError(
                "teacher_model was loaded under DeepSpeed ZeRO-3, so that each process holds a share of its weights; "
                "give its folder or Hub id in its place, or load it with hf_kd.load_teacher(...)."
            )
        if problem_of(teacher_model) != self.problem:
            raise ValueError(
                f"the teacher {type(teacher_model).__name__} solves {problem_of(teacher_model)}, the student "
                f"{type(self.model).__name__} {self.problem}; load both with the same Auto class, and the student "
                "with the teacher's num_labels and problem_type."
            )
        teacher = Teacher(
            teacher_model,
            self.model.config,
            dtype=self.args.teacher_dtype,
            device=self.args.device,
            reads_own_tokens=reads_own_tokens,
            # accelerate gives its autocast to prepared models alone, and the teacher is not prepared.
            autocast_dtype=AUTOCAST_DTYPES.get(self.accelerator.mixed_precision),
            notes_weights=notes_weights,
        )
        if getattr(self.accelerator, "is_fsdp2", False) or is_deepspeed_zero3_enabled():
            teacher.shard()
        return teacher

    def _freeze_embeddings(self) -> None:
        if self.args.freeze_embeddings:
            model = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model  # PEFT
            embeddings = getattr(model.base_model, "embeddings", None) or model.get_input_embeddings()
            embeddings.requires_grad_(False)

    def _compile_teachers(self) -> None:
        """As `Trainer` does with the student."""
        plugin = self.accelerator.state.dynamo_plugin  # also of `accelerate launch --dynamo_backend`
        if plugin.backend == DynamoBackend.NO:
            return
        if self.distillation_objective.student_wanted != Wanted():
            raise ValueError(
                "torch_compile runs the forward without the hooks that read what is between the layers, so "
                "hidden, attention and relation terms would compare nothing; leave it off, or set the weights "
                "of these terms to 0."
            )
        options = {"backend": plugin.backend.value.lower(), "mode": plugin.mode}
        for teacher in getattr(self.teacher, "teachers", [self.teacher]):
            running = getattr(teacher, "teacher", teacher)  # of one that is partly cached
            if isinstance(running, Teacher):
                running.compile(**options)

    def _check_on_nonfinite(self) -> None:
        if self.args.on_nonfinite == "skip" and self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            raise ValueError(
                "DeepSpeed makes the step before anybody can look at its gradient, so on_nonfinite='skip' would leave "
                "none out; drop it, or use recipes/accelerate_configs/ddp.yaml."
            )

    def _check_gradient_checkpointing(self) -> None:
        wants_attention = self.distillation_objective.needs_attention
        if wants_attention and (self.args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ValueError(
                "gradient_checkpointing_kwargs={'use_reentrant': True} drops the gradient of queries, keys and "
                "values, so the attention and relation terms would train nothing; set "
                "gradient_checkpointing_kwargs={'use_reentrant': False}."
            )


class _ProjectionCallback(TrainerCallback):
    """Does for the projections what the `Trainer` does for the model alone: clip, and reset the gradient."""

    def __init__(self, trainer: DistillationTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.distillation_objective.check_every_term_has_a_step(state.max_steps)
        self.trainer.distillation_objective.zero_grad()  # an earlier attempt may have ended between backward and step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.max_grad_norm and self.trainer.distillation_objective.has_projections:
            nn.utils.clip_grad_norm_(self.trainer.distillation_objective.parameters(), args.max_grad_norm)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The Trainer calls model.zero_grad(), and the projections are not in the model.
        self.trainer.distillation_objective.zero_grad()
