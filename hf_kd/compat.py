"""What differs between the supported versions of the stack, found by feature."""

import os
from dataclasses import fields
from typing import Any

import torch
from transformers import TrainingArguments


def length_grouping() -> dict[str, Any]:
    """The training argument that groups batches by length."""
    names = {f.name for f in fields(TrainingArguments)}
    # transformers 5 turned the flag of 4.57 into one value of a strategy.
    return {"group_by_length": True} if "group_by_length" in names else {"train_sampling_strategy": "group_by_length"}


def use_bf16() -> bool:
    """Whether to train in bf16 where nobody said otherwise: the hardware has bf16 arithmetic and the launcher chose no precision.

    `accelerate launch --mixed_precision bf16` (or `fp16`) rules; it writes "no" both by default and when asked to, so that full
    precision on such hardware is asked for with `--bf16 false`.
    """
    if os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "no":
        return False
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # torch has no public name for these yet: https://github.com/pytorch/pytorch/blob/main/torch/cpu/__init__.py
    checks = (getattr(torch.cpu, name, bool) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return any(check() for check in checks)
