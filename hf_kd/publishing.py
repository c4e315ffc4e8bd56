"""What a trainer publishes: the model card, and the student's own files on the Hub."""

from __future__ import annotations

import os
from typing import Any

import transformers
from transformers import Trainer
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress


class PublishingTrainer(Trainer):
    """A [`~transformers.Trainer`] that publishes a student where the Trainer sends all that it finds in its folder."""

    # Set by Trainer.__init__
    hub_model_id: Any
    push_in_progress: Any

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Write README.md into `args.output_dir`, from what this run did and measured, which goes to results.json.

        A card that a person has edited stays, see [`~hf_kd.deploy.model_card.write_model_card`]. A problem warns.
        """
        if not self.is_world_process_zero():
            return
        from .deploy.model_card import card_problems_warn, write_model_card
        from .record import record_distillation

        with card_problems_warn():
            record_distillation(self)
            write_model_card(
                self.args.output_dir,
                repo_id=self.hub_model_id,
                model_name=model_name,
                license=license,
                language=language,
                datasets=dataset_tags,
                dataset_name=dataset if dataset is None or isinstance(dataset, str) else ", ".join(dataset),
                dataset_config=dataset_args
                if dataset_args is None or isinstance(dataset_args, str)
                else dataset_args[0],
                base_model=finetuned_from,
                pipeline_tag=tasks if tasks is None or isinstance(tasks, str) else tasks[0],
                tags=tags,
            )

    # The Hub: the student's own files in one commit, where the Trainer sends all that it finds in the output folder

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Before training: a student that can be published, and a repository that can be written to, as private as
        was asked."""
        self._check_can_be_published()
        self.push_in_progress = None
        if not self.is_world_process_zero():
            return
        from .deploy.hub import open_repository

        self.hub_model_id = open_repository(
            self.args.hub_model_id or os.path.basename(os.path.abspath(self.args.output_dir)),
            private=self.args.hub_private_repo if private is None else private,
            token=token or self.args.hub_token,
        )

    def _check_can_be_published(self) -> None:
        if not hasattr(self.processing_class, "save_pretrained"):
            raise ValueError(
                "a student is published with its tokenizer, but processing_class is "
                f"{type(self.processing_class).__name__}; give the trainer processing_class=tokenizer."
            )
        model_class = type(self.model)
        if getattr(transformers, model_class.__name__, None) is not model_class:
            raise ValueError(
                f"a student is published as a model that transformers loads, but this is {model_class.__module__}."
                f"{model_class.__name__}; train a class of transformers (of PEFT: model.merge_and_unload()), or leave "
                "push_to_hub off and upload your files with huggingface_hub.upload_folder."
            )
        if getattr(self.args, "save_safetensors", True) is False:  # transformers 4.57
            raise ValueError("a student is published as safetensors; drop save_safetensors=False.")

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As `Trainer`, but of `args.output_dir` what [`~hf_kd.deploy.hub.push_student`] publishes, in one commit.

        Returns:
            [`~huggingface_hub.CommitInfo`], or a `Future` of it if not `blocking`; `None` on other processes.
        """
        self._announce_push()
        if self.hub_model_id is None:
            self.init_hf_repo(token, private)
        self.save_model(_internal_call=True)  # on all processes, as some hold a part of the weights
        if not self.is_world_process_zero():
            return None
        from .deploy.hub import check_student, push_in_background, push_student

        given = kwargs.pop("tags", None) or []
        tags = [*([given] if isinstance(given, str) else given), *(getattr(self.model, "model_tags", None) or [])]
        self.create_model_card(tags=tags, **kwargs)
        self._finish_current_push()
        options: dict[str, Any] = {
            "private": private,
            "token": token or self.args.hub_token,
            "revision": revision or self.args.hub_revision,
            "commit_message": commit_message,
        }
        if blocking:
            return push_student(self.args.output_dir, self.hub_model_id, **options)
        check_student(self.args.output_dir)
        return push_in_background(self.args.output_dir, self.hub_model_id, **options)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """With `hub_strategy="every_save"`, in the background: the student as it is, and nothing to resume from."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        is_busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if is_busy and not self.args.hub_always_push:
            return
        from .deploy.hub import push_in_background

        self._announce_push()
        job = push_in_background(
            checkpoint_folder,
            self.hub_model_id,
            token=self.args.hub_token,
            revision=self.args.hub_revision,
            commit_message=f"Training in progress, step {self.state.global_step}",
        )
        jobs = self.push_in_progress.jobs if is_busy else []
        self.push_in_progress = PushInProgress([*jobs, job])

    def _announce_push(self) -> None:
        if hasattr(self.callback_handler, "on_push_begin"):  # transformers 5
            self.callback_handler.on_push_begin(self.args, self.state, self.control)
