"""What differs between the supported versions of the stack, found by feature."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from transformers import Trainer, TrainingArguments, trainer_utils
from transformers.integrations import deepspeed


def length_grouping(is_on: bool = True) -> dict[str, Any]:
    """The training argument that groups batches by length, in evaluation too, or does not."""
    names = {f.name for f in fields(TrainingArguments)}
    # transformers 5 turned the flag of 4.57 into one value of a strategy.
    if "group_by_length" in names:
        return {"group_by_length": is_on}
    return {"train_sampling_strategy": "group_by_length" if is_on else "random"}


def rotate_checkpoints(trainer: Trainer, run_dir: str) -> None:
    """Delete the checkpoints of a run that `save_total_limit` leaves no room for."""
    if hasattr(trainer, "_rotate_checkpoints"):  # transformers 4.57
        trainer._rotate_checkpoints(use_mtime=True, output_dir=run_dir)
        return
    trainer_utils.rotate_checkpoints(
        output_dir=run_dir,
        save_total_limit=trainer.args.save_total_limit,
        best_model_checkpoint=trainer.state.best_model_checkpoint,
        use_mtime=True,
    )


@contextmanager
def whole_weights() -> Iterator[None]:
    """Models that are loaded within this block, or the function it decorates, are whole in each process.

    Under DeepSpeed ZeRO-3 transformers loads each process a share, of which nothing can be copied or hashed: students
    take layers and rows of their teacher's weights. The `Trainer` shards the student when it prepares it.
    """
    # Neither transformers nor accelerate has a public way: accelerate's zero3_init_context_manager leaves this set.
    config, deepspeed._hf_deepspeed_config_weak_ref = deepspeed._hf_deepspeed_config_weak_ref, None
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = config


def hardware_defaults() -> dict[str, bool]:
    """The training arguments `use_cpu` and `bf16` where nobody said otherwise: bf16 where the hardware computes in it.

    `accelerate launch --mixed_precision bf16` (or `fp16`) rules; it writes "no" both by default and when asked to, so
    that full precision on such hardware is asked for with `--bf16 false`.
    """
    use_cpu = (
        os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true") or not torch.accelerator.is_available()
    )
    is_chosen = os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "no"
    return {"use_cpu": use_cpu, "bf16": not is_chosen and _computes_in_bf16(use_cpu)}


def _computes_in_bf16(use_cpu: bool) -> bool:
    if not use_cpu:
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    # torch has no public name for these yet: https://github.com/pytorch/pytorch/blob/main/torch/cpu/__init__.py
    checks = (getattr(torch.cpu, name, bool) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return any(check() for check in checks)
