"""The end of a run of several processes."""

from __future__ import annotations

from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer


def end_training(*trainers: Trainer) -> None:
    """
    Leave the process group for good, as the last thing that a script does with its trainers.

    `accelerator.end_training()` alone leaves gloo's threads running as long as a `DistributedDataParallel` refers to
    them; one that lets go of a tensor while the interpreter shuts down aborts the process ("terminate called without
    an active exception", https://github.com/pytorch/pytorch/pull/179291), after the last file was written.

    Args:
        trainers (`Trainer`): All that trained in this process. They can predict afterwards, and not train.
    """
    for trainer in trainers:
        for name, value in vars(trainer).items():
            if isinstance(value, DistributedDataParallel):
                setattr(trainer, name, value.module)
    for trainer in trainers:
        trainer.accelerator.free_memory()
    trainers[-1].accelerator.end_training()
