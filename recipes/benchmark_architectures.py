"""How much faster the shape of a student, ONNX Runtime and int8 make inference: random weights, no task.

python recipes/benchmark_architectures.py --output_dir runs/architectures

BERT-base in torch against two students, batch size 1, one thread. Speed does not depend on what the weights are, so
none are trained; for a model that does its task see `export_onnx.py --benchmark`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast, set_seed

from hf_kd.deploy.benchmark import Variant, benchmark
from hf_kd.deploy.onnx import export_onnx
from hf_kd.deploy.report import format_benchmark
from hf_kd.results import write_results


TEACHER = "12 layers, width 768 (BERT-base)"
SHAPES = {  # layers, width, width of the feed-forward; 12 heads each
    TEACHER: (12, 768, 3072),
    "4 layers, width 312": (4, 312, 1200),
    "3 layers, width 384": (3, 384, 1536),
}
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/architectures"))
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 128], help="tokens per row")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each variant, in turns")
    parser.add_argument("--seconds", type=float, default=2.0, help="shortest time for each figure and process")
    args = parser.parse_args()

    variants = []
    for number, (name, shape) in enumerate(SHAPES.items()):
        folder = make_model(args.output_dir / f"model-{number}", *shape)
        variants.append(Variant(f"{name}, torch fp32", "student" if number else "teacher", "torch", "fp32", folder))
        if name == TEACHER:
            continue
        export = args.output_dir / f"onnx-{number}"
        export_onnx(folder, export)
        for precision in ("fp32", "int8"):
            variants.append(Variant(f"{name}, ONNX {precision}", "student", "onnxruntime", precision, str(export)))
    rows = benchmark(
        variants,
        lengths=args.lengths,
        batch_sizes=[1],
        threads=[1],
        max_length=max(args.lengths),
        rounds=args.rounds,
        seconds=args.seconds,
    )
    write_results(args.output_dir / "results.json", [], weights="random", benchmark=rows)
    print("Random weights: the figures say nothing about quality.\n")
    print(format_benchmark(rows))


def make_model(folder: Path, num_hidden_layers: int, hidden_size: int, intermediate_size: int) -> str:
    """Save a BERT of this shape with random weights, and a tokenizer of as many invented words as BERT's."""
    config = BertConfig(
        num_hidden_layers=num_hidden_layers, hidden_size=hidden_size, intermediate_size=intermediate_size
    )
    set_seed(0)
    BertForSequenceClassification(config).save_pretrained(folder)
    words = (f"word{index}" for index in range(config.vocab_size - len(SPECIAL_TOKENS)))
    (folder / "vocab.txt").write_text("\n".join([*SPECIAL_TOKENS, *words]), encoding="utf-8")
    BertTokenizerFast.from_pretrained(folder).save_pretrained(folder)
    return str(folder)


if __name__ == "__main__":
    main()
