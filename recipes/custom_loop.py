"""Distillation in a plain accelerate loop: the objective and the signals without the `Trainer`.

accelerate launch recipes/custom_loop.py --teacher runs/sst2-teacher --task_name sst2 --output_dir runs/sst2-custom
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import DataCollatorWithPadding

from hf_kd import DistillationObjective, HiddenTerm, LogitTerm, TaskTerm, student_from_teacher
from hf_kd.glue import GLUE_TASKS, load_glue, tokenize
from hf_kd.signals import Capture, Teacher
from hf_kd.signals.teacher import load_teacher, load_teacher_tokenizer


def main() -> None:
    args = parse_args()
    accelerator = Accelerator()
    set_seed(args.seed)

    task = GLUE_TASKS[args.task_name]
    tokenizer = load_teacher_tokenizer(args.teacher)
    with accelerator.main_process_first():
        data = tokenize(load_glue(args.task_name, args.glue_dir), task, tokenizer, args.max_seq_length)
    collator = DataCollatorWithPadding(tokenizer)
    batches = DataLoader(data["train"], args.batch_size, shuffle=True, collate_fn=collator)

    model = load_teacher(args.teacher)
    student = student_from_teacher(model, num_layers=args.num_layers)
    objective = DistillationObjective([TaskTerm(0.5), LogitTerm(0.5, temperature=2.0), HiddenTerm(1.0)])
    objective.bind(student.config, model.config)
    teacher = Teacher(model, student.config, device=accelerator.device)
    teacher.watch(objective.teacher_wanted)
    capture = Capture(student, objective.student_wanted)

    # The objective's own parameters, projections between different widths, are trained with the student.
    optimizer = torch.optim.AdamW([*student.parameters(), *objective.parameters()], lr=args.learning_rate)
    wrapped, optimizer, batches = accelerator.prepare(student, optimizer, batches)
    num_steps = args.max_steps or len(batches)
    scheduler = LinearLR(optimizer, 1.0, 0.0, total_iters=num_steps)

    wrapped.train()
    progress = tqdm(total=num_steps, disable=not accelerator.is_main_process)
    step = 0
    while step < num_steps:
        for batch in batches:
            labels = batch.pop("labels")
            with capture:
                outputs = wrapped(**batch, **capture.forward_kwargs)
            student_signals = capture.signals(outputs, batch)
            teacher_signals = teacher(batch)
            done = step / num_steps  # what schedules follow
            terms = objective(student_signals, teacher_signals, labels, progress=done)
            accelerator.backward(objective.weighted_sum(terms, done))
            accelerator.clip_grad_norm_([*wrapped.parameters(), *objective.parameters()], 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            progress.update()
            step += 1
            if step >= num_steps:
                break

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        student.save_pretrained(args.output_dir)
        tokenizer.save_pretrained(args.output_dir)
    # DistributedDataParallel keeps gloo's threads alive, and one of them may abort the process as it exits.
    del wrapped
    accelerator.free_memory()
    accelerator.end_training()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="folder or Hub id of a fine-tuned teacher")
    parser.add_argument("--task_name", default="sst2", choices=GLUE_TASKS)
    parser.add_argument("--glue_dir", help="folder in the official glue_data layout in place of the Hub")
    parser.add_argument("--num_layers", type=int, default=3)
    parser.add_argument("--max_seq_length", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--max_steps", type=int, help="default: one epoch")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--output_dir", required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
