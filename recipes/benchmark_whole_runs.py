"""What whole runs of `glue_distill.py` cost and reach: fine-tuning, distilling online and from a cache.

python recipes/benchmark_whole_runs.py recipes/configs/sst2.yaml --teacher_model_name_or_path sst2/teacher \
    --output_dir runs/whole-runs [--seeds 1 2 3] [--variants finetune online] [other flags of glue_distill.py]
python recipes/benchmark_whole_runs.py --output_dir runs/whole-runs --only_table

Every run is a process of its own, as a user would start it. The cache is built once, before the first run that reads
it, in a run of one step: its time is a row of its own. What is complete in `--output_dir` is not run again, so that a
call that was stopped goes on with another; once the cache is built, calls with other seeds can share the folder.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from results_table import format_whole_runs

from hf_kd.files import write_whole
from hf_kd.results import read_results, write_results


RECIPE = Path(__file__).with_name("glue_distill.py")
TERMS = ("logit", "hidden", "attention", "relation")
ONLY_TASK = ["--task_loss_weight", "1", *(word for term in TERMS for word in (f"--{term}_loss_weight", "0"))]
# Name to the flags on top of the configuration's; those that start with "cached" read the cache.
VARIANTS: dict[str, list[str]] = {
    "finetune": ONLY_TASK,
    "online": [],
    "cached": [],
    "cached+frozen": ["--freeze_embeddings", "true"],
}
BUILD = "build"


def main() -> None:
    args, flags = parse_flags()
    if not args.only_table:
        for seed, variant in itertools.product(args.seeds, args.variants):
            more = ["--cache_teacher", str(args.output_dir / "cache")] if variant.startswith("cached") else []
            if more and not noted_in(args.output_dir / BUILD).is_file():
                shutil.rmtree(args.output_dir / "cache", ignore_errors=True)  # a part would take time off the rest
                run(args, BUILD, None, [*flags, "--max_steps", "1", *more])
            run(args, variant, seed, [*flags, *VARIANTS[variant], *more, "--seed", str(seed)])
    results = {"whole_runs": collect(args.output_dir)}
    if not results["whole_runs"]:
        raise SystemExit(f"{args.output_dir} holds no complete run; run this without --only_table.")
    path = args.output_dir / "results.json"
    write_results(path, [], **results)
    print(format_whole_runs(results))
    print(f"The results are {path}.")


def parse_flags() -> tuple[argparse.Namespace, list[str]]:
    """Our own arguments, and those of `glue_distill.py`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the runs and of results.json")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--only_table", action="store_true", help="run nothing; take what is complete")
    args, flags = parser.parse_known_args()
    drawn = [flag for flag in flags if flag.split("=")[0] in ("--max_train_samples", "--augment")]
    if drawn and any(variant.startswith("cached") for variant in args.variants):
        parser.error(f"{drawn[0]} draws other rows for each seed, and the cache is of one; drop it or them.")
    return args, flags


def run(args: argparse.Namespace, variant: str, seed: int | None, flags: list[str]) -> None:
    """Run `glue_distill.py` and note how long its process took and computed, unless that is noted."""
    folder = args.output_dir / (variant if seed is None else f"{variant}-seed{seed}")
    noted = noted_in(folder)
    if noted.is_file():
        print(f"{folder} is complete.")
        return
    words = [str(RECIPE), *flags, "--output_dir", str(folder), "--save_strategy", "no"]
    print(shlex.join(["python", *words]), flush=True)
    start, computed = time.perf_counter(), processor_seconds()
    subprocess.run([sys.executable, *words], check=True)
    times = {"seconds": time.perf_counter() - start, "processor_seconds": processor_seconds() - computed}
    write_whole(noted, json.dumps({"variant": variant, "seed": seed, **times}) + "\n")


def noted_in(folder: Path) -> Path:
    """Where it says what a run took, once it is complete."""
    return folder / "wall_time.json"


def processor_seconds() -> float:
    """Of all processes started here that have ended; it does not count the time in which others had the cores."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def collect(output_dir: Path) -> list[dict[str, Any]]:
    """A row for each complete run: times, steps and metrics, in the order of the variants."""
    rows = []
    for path in output_dir.glob("*/wall_time.json"):
        noted, results = json.loads(path.read_text(encoding="utf-8")), read_results(path.with_name("results.json"))
        student = next(row for row in results["rows"] if row["role"] == "student")
        history = json.loads(path.with_name("trainer_state.json").read_text(encoding="utf-8"))["log_history"]
        noted["train_seconds"] = next(entry["train_runtime"] for entry in history if "train_runtime" in entry)
        noted |= {name: student[name] for name in ("task", "metrics", "main_metric", "steps")}
        rows.append({**noted, "run": results["run"]})
    order = [BUILD, *VARIANTS]
    return sorted(rows, key=lambda row: (order.index(row["variant"]), row["seed"] or 0))


if __name__ == "__main__":
    main()
