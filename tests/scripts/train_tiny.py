"""Trains a tiny student under the launcher and writes what each process ended with."""

import json
import sys
from pathlib import Path

from conftest import VOCAB, make_dataset, make_model, weights
from transformers import BertTokenizerFast, DataCollatorWithPadding, TrainerCallback

from hf_kd import DistillationTrainer, DistillationTrainingArguments
from hf_kd.distributed import end_training


class Record(TrainerCallback):
    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.logs.append({name: value for name, value in logs.items() if name.endswith("loss")})


settings = json.loads(sys.argv[1])
arguments = {"hidden_loss_weight": 0.7, "attention_loss_weight": 0.3, **settings.get("arguments", {})}
output = Path(settings["output"])
output.mkdir(parents=True, exist_ok=True)
(output / "vocab.txt").write_text("\n".join(VOCAB), encoding="utf-8")
tokenizer = BertTokenizerFast.from_pretrained(output, model_max_length=80)
teacher = make_model(seed=1)
args = DistillationTrainingArguments(
    output_dir=str(output),
    use_cpu=True,
    per_device_train_batch_size=settings["batch_size"],
    max_steps=settings.get("max_steps", 6),
    optim="sgd",
    learning_rate=0.05,
    lr_scheduler_type="constant",
    max_grad_norm=0.0,
    logging_steps=2,
    save_strategy="no",
    report_to=[],
    **arguments,
)
record = Record()
trainer = DistillationTrainer(
    make_model(seed=2, num_hidden_layers=2, **settings.get("student", {})),
    args,
    teacher_model=teacher,
    train_dataset=make_dataset(48, unlabeled_share=settings.get("unlabeled_share", 0.0)),
    data_collator=DataCollatorWithPadding(tokenizer),
    callbacks=[record],
)
trainer.train()
result = {
    "world_size": args.world_size,
    "student": weights(trainer.model).tolist(),
    "projections": [x for p in trainer.distillation_objective.parameters() for x in p.detach().flatten().tolist()],
    "logs": record.logs,
    "teacher_class": type(trainer.teacher.model).__name__,
    "student_class": type(trainer.model_wrapped).__name__,
}
(output / f"rank_{args.process_index}.json").write_text(json.dumps(result))
end_training(trainer)
threads = [task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")]
(output / f"threads_{args.process_index}.json").write_text(json.dumps(threads))
