"""What the recipes choose by themselves on the stack and hardware at hand."""

import pytest
from transformers import TrainingArguments

from hf_kd import compat


def test_length_grouping_is_an_argument_of_this_version(tmp_path):
    """transformers 5 renamed the flag: the recipes would stop, or train on batches padded to their longest row."""
    args = TrainingArguments(str(tmp_path), use_cpu=True, **compat.length_grouping())
    assert (getattr(args, "train_sampling_strategy", None) or args.group_by_length) in ("group_by_length", True)


@pytest.mark.parametrize(
    ("has_bf16", "launcher", "expected"),
    [(True, None, True), (True, "no", True), (True, "bf16", False), (True, "fp16", False), (False, None, False)],
)
def test_bf16_where_nobody_said_otherwise(monkeypatch, has_bf16, launcher, expected):
    """A choice of the launcher must win: fp16 beside our bf16 is an error of the Trainer."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(compat, "_computes_in_bf16", lambda use_cpu: has_bf16)
    if launcher is None:
        monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    else:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher)
    assert compat.hardware_defaults() == {"use_cpu": True, "bf16": expected}
