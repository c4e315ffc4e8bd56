"""Trains every run of test_equality under the launcher, eight rows to each process, and writes what it ended with."""

import sys
from pathlib import Path

from conftest import VOCAB
from safetensors.torch import save_file
from test_equality import BETWEEN_ROWS, RUNS, train
from transformers import BertTokenizerFast

from hf_kd.distributed import end_training


output = Path(sys.argv[1])
(output / "vocab.txt").write_text("\n".join(VOCAB), encoding="utf-8")
tokenizer = BertTokenizerFast.from_pretrained(output, model_max_length=80)
trainers = []
for name, run in {**RUNS, "between": BETWEEN_ROWS}.items():
    trainer, trained = train(run, tokenizer, output, 8)
    assert trainer.args.world_size == 2
    save_file(trained, output / f"{name}_{trainer.args.process_index}.safetensors")
    trainers.append(trainer)
end_training(*trainers)
