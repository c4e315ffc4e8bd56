"""Evaluation of a student whose rows carry a teacher's signals."""

import pytest
from conftest import make_dataset, make_model

from hf_kd import DistillationTrainer, cache_teacher_signals
from hf_kd.signals import Wanted


HIDDEN = Wanted(hidden=frozenset({2, 4}))


@pytest.fixture
def make_trainer(make_args, tokenizer):
    def make(train_dataset, eval_dataset, teacher=None, **changes):
        return DistillationTrainer(
            make_model(seed=2, num_hidden_layers=2),
            make_args(hidden_loss_weight=1.0, **changes),
            teacher_model=teacher,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
        )

    return make


def test_agreement_needs_the_logits_alone(tmp_path, make_trainer, teacher):
    """Evaluation rows without vectors of layers would fail after the first epoch, though nothing compares them."""
    rows, others = make_dataset(16), make_dataset(12, seed=5)
    cached = cache_teacher_signals(rows, teacher, HIDDEN, tmp_path / "train")
    cached_others = cache_teacher_signals(others, teacher, Wanted(), tmp_path / "evaluation")
    agreement = {"eval_teacher_agreement": True, "eval_strategy": "steps", "eval_steps": 2}
    expected = make_trainer(rows, others, teacher, **agreement)
    found = make_trainer(cached, cached_others, **agreement)
    for trainer in (expected, found):
        trainer.train()
    logs = [
        [log["eval_teacher_kl"] for log in trainer.state.log_history if "eval_teacher_kl" in log]
        for trainer in (expected, found)
    ]
    assert len(logs[0]) == 2 and logs[1] == pytest.approx(logs[0], rel=1e-3)
    assert found.teacher.columns >= {"teacher_hidden_2", "teacher_hidden_4"}  # the training goes on with them


def test_evaluation_rows_of_another_teacher(tmp_path, make_trainer, teacher):
    """Agreement with a teacher that taught nothing would be reported as that with the teacher."""
    other = make_model(seed=9)
    cached = cache_teacher_signals(make_dataset(16), teacher, HIDDEN, tmp_path / "train")
    cached_others = cache_teacher_signals(make_dataset(12, seed=5), other, Wanted(), tmp_path / "evaluation")
    for given in (None, teacher):
        with pytest.raises(ValueError, match="rows' teacher_signals is of another teacher than the training rows'"):
            make_trainer(cached, cached_others, given, eval_teacher_agreement=True)


@pytest.mark.parametrize("compares", [False, True])
def test_evaluation_reads_what_it_compares(tmp_path, make_trainer, teacher, compares):
    """Vectors of every token would be read from disk, padded, sent to the device, and dropped."""
    rows = cache_teacher_signals(make_dataset(16), teacher, HIDDEN, tmp_path / "cache")
    trainer = make_trainer(rows, rows, eval_teacher_agreement=compares)
    batch = next(iter(trainer.get_eval_dataloader()))
    found = {name for name in batch if name.startswith("teacher_")}
    assert found == ({"teacher_logits"} if compares else set())
    assert {"teacher_logits", "teacher_hidden_2"} <= set(next(iter(trainer.get_train_dataloader())))
