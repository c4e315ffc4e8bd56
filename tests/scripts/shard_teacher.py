"""Each process runs its share of a teacher on rows of its own, and notes how far it is from the whole one."""

import json
import sys
from pathlib import Path

import torch
from conftest import make_model
from torch import distributed
from torch.distributed.tensor import DTensor

from hf_kd.signals import Teacher, Wanted


output = Path(sys.argv[1])
distributed.init_process_group("gloo")
rank = distributed.get_rank()
found = []
# ALBERT's blocks hold blocks.
for family, autocast_dtype in (("bert", None), ("bert", torch.bfloat16), ("albert", None)):
    models = [make_model(family=family, seed=1) for _ in range(2)]
    teachers = [Teacher(model, model.config, autocast_dtype=autocast_dtype) for model in models]
    sharded, whole = teachers
    sharded.shard()
    ids = torch.randint(5, 60, (2 + rank, 7), generator=torch.Generator().manual_seed(rank))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    signals = []
    for teacher in teachers:
        teacher.watch(Wanted(hidden=frozenset({2, 4}), attention=frozenset({4})))
        signals.append(teacher(batch))
    ours, theirs = signals
    compared = [(ours.logits, theirs.logits), (ours.queries[4], theirs.queries[4])]
    compared += [(ours.hidden[layer], theirs.hidden[layer]) for layer in (2, 4)]
    parameters = list(sharded.model.parameters())
    held = sum(p.to_local().numel() for p in parameters if isinstance(p, DTensor))
    found.append(
        {
            "is_equal": all(torch.equal(a, b) for a, b in compared),
            "share": held / sum(p.numel() for p in whole.model.parameters()),
            "hash": sharded.weights == whole.weights,
        }
    )
(output / f"shares_{rank}.json").write_text(json.dumps(found))
distributed.destroy_process_group()
