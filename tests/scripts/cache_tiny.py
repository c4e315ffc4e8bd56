"""Caches a tiny teacher's signals, and trains on them if there is an output; alone, or under the launcher."""

import json
import sys
import time
from pathlib import Path

from conftest import VOCAB, make_dataset, make_model, weights
from transformers import BertTokenizerFast, DataCollatorWithPadding

from hf_kd import DistillationTrainer, DistillationTrainingArguments
from hf_kd.distributed import end_training
from hf_kd.signals import Wanted, cache


def run(settings):
    """The trainer, if there is an output; what it ended with is in files then."""
    cache._MIN_SHARD_ROWS = settings["shard_rows"]
    teacher, made = make_model(seed=1), []

    def slow(*args):
        made.append(1)
        time.sleep(settings.get("seconds_per_forward", 0))

    teacher.register_forward_pre_hook(slow)
    wanted = Wanted(hidden=frozenset({0, 2, 4}), attention=frozenset({2, 4}), values=frozenset({4}))
    rows = make_dataset(settings["num_rows"])
    rows = cache.cache_teacher_signals(rows, teacher, wanted, settings["folder"], batch_size=8, device="cpu")
    if "output" not in settings:
        return None
    output = Path(settings["output"])
    output.mkdir(parents=True, exist_ok=True)
    (output / "vocab.txt").write_text("\n".join(VOCAB), encoding="utf-8")
    args = DistillationTrainingArguments(
        output_dir=str(output),
        use_cpu=True,
        per_device_train_batch_size=settings["batch_size"],
        max_steps=4,
        optim="sgd",
        learning_rate=0.05,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_steps=2,
        save_strategy="no",
        report_to=[],
        hidden_loss_weight=0.7,
        attention_loss_weight=0.3,
    )
    trainer = DistillationTrainer(
        make_model(seed=2, num_hidden_layers=2),
        args,
        train_dataset=rows,
        data_collator=DataCollatorWithPadding(BertTokenizerFast.from_pretrained(output, model_max_length=80)),
    )
    trainer.train()
    logs = [
        {name: x for name, x in log.items() if name.endswith("loss") and name != "train_loss"}
        for log in trainer.state.log_history
        if "loss" in log
    ]
    result = {"student": weights(trainer.model).tolist(), "logs": logs}
    (output / f"rank_{args.process_index}.json").write_text(json.dumps(result))
    (output / f"made_{args.process_index}.json").write_text(json.dumps(len(made)))
    return trainer


if __name__ == "__main__":
    trainer = run(json.loads(sys.argv[1]))
    if trainer is not None:
        end_training(trainer)
