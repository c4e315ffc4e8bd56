"""Evaluates a tiny tagger beside its teacher under the launcher and writes what each process found."""

import json
import sys
from pathlib import Path

from conftest import VOCAB, make_model
from test_problem_types import make_problem_dataset
from transformers import BertTokenizerFast, DataCollatorForTokenClassification

from hf_kd import DistillationTrainer, DistillationTrainingArguments
from hf_kd.distributed import end_training


num_rows, batch_size, output = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
output.mkdir(parents=True, exist_ok=True)
(output / "vocab.txt").write_text("\n".join(VOCAB), encoding="utf-8")
tokenizer = BertTokenizerFast.from_pretrained(output, model_max_length=80)
args = DistillationTrainingArguments(
    output_dir=str(output),
    use_cpu=True,
    per_device_eval_batch_size=batch_size,
    eval_teacher_agreement=True,
    report_to=[],
)
trainer = DistillationTrainer(
    make_model(seed=2, problem="token_classification", num_hidden_layers=2),
    args,
    teacher_model=make_model(seed=1, problem="token_classification"),
    eval_dataset=make_problem_dataset("token_classification", num_rows=num_rows),
    data_collator=DataCollatorForTokenClassification(tokenizer),
)
metrics = {name: value for name, value in trainer.evaluate().items() if "teacher" in name}
found = {"world_size": args.world_size, "metrics": metrics}
(output / f"rank_{args.process_index}.json").write_text(json.dumps(found), encoding="utf-8")
end_training(trainer)
