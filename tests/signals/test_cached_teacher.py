"""Rows that do not carry what the teacher said about them are found before they teach anything."""

import pytest
from conftest import make_dataset, make_model
from datasets import concatenate_datasets

from hf_kd import DistillationTrainer, cache_teacher_signals
from hf_kd.signals import Wanted


def make_trainer(rows, make_args, tokenizer, teacher=None, eval_dataset=None, **changes):
    return DistillationTrainer(
        make_model(seed=2, num_hidden_layers=2, **changes.pop("model", {})),
        make_args(**changes),
        teacher_model=teacher,
        train_dataset=rows,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
    )


@pytest.mark.parametrize("num_labels", [1, 2])
@pytest.mark.parametrize("wanted", [Wanted(), Wanted(hidden=frozenset({4}))], ids=["logits", "hidden"])
def test_rows_without_columns_among_others(tmp_path, make_args, tokenizer, num_labels, wanted):
    """Concatenated rows have nulls, which are NaN as numbers: a regression would train to NaN, with a loss of 0 in
    the log."""
    teacher = make_model(seed=1, num_labels=num_labels)
    rows = make_dataset(8, num_labels=num_labels)
    cached = cache_teacher_signals(rows, teacher, wanted, tmp_path / "cache")
    both = concatenate_datasets([cached, make_dataset(8, seed=3, num_labels=num_labels)])
    weights = {"hidden_loss_weight": 1.0, "layer_mapping": "last"} if wanted.hidden else {}
    trainer = make_trainer(both, make_args, tokenizer, model={"num_labels": num_labels}, **weights)
    with pytest.raises(ValueError, match="is empty in a row of this batch; cache the signals of all rows"):
        trainer.train()


@pytest.mark.parametrize("term", ["hidden", "attention", "relation"])
def test_rows_cut_to_one_half(tmp_path, make_args, tokenizer, term):
    """All rows cut alike have vectors enough for tokens twice as wide: plausible losses between the wrong tokens."""
    rows = make_dataset(16, lengths=(14, 14))
    wanted = Wanted(hidden=frozenset({4}), attention=frozenset({4}), values=frozenset({4}))
    teacher = make_model(seed=1)
    cached = cache_teacher_signals(rows, teacher, wanted, tmp_path / "cache")
    cut = cached.map(lambda row: {k: row[k][:8] for k in ("input_ids", "attention_mask", "token_type_ids")})
    changes = {f"{term}_loss_weight": 1.0, "layer_mapping": "last"}
    make_trainer(cached, make_args, tokenizer, **changes).train()
    with pytest.raises(ValueError, match="has 64 numbers per token, and the teacher's are 32"):
        make_trainer(cut, make_args, tokenizer, **changes).train()
