"""Flags override the YAML file, which overrides the recipe's defaults; every value arrives with its type."""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from transformers import TrainingArguments

from hf_kd import DistillationTrainingArguments
from hf_kd.command_line import parse_args


RECIPES = Path(__file__).parents[1] / "recipes"


@dataclass
class Model:
    name: str = field(metadata={"help": "Needed."})
    layers: list[int] | None = None
    rates: list[float] | None = None
    label_names: list[str] | None = None
    size: int | None = 12


@dataclass
class Run:
    rate: float = 1e-3
    is_fast: bool = False
    is_shuffled: bool = True
    title: str | None = None


@pytest.fixture
def parse(tmp_path):
    """Parse a YAML text and flags into the two dataclasses above."""

    def parse(text, *flags, **defaults):
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return parse_args((Model, Run), [str(path), *flags], **defaults)

    return parse


def test_flags_win_over_yaml_and_yaml_over_defaults(parse):
    """The run would train with another value than the command line says, and record the command."""
    defaults = {"size": 1, "rate": 0.1, "title": "default"}
    model, run = parse("name: yaml\nsize: 2\nrate: 0.2\n", "--size", "3", **defaults)
    assert (model.name, model.size, run.rate, run.title) == ("yaml", 3, 0.2, "default")
    model, run = parse_args((Model, Run), ["--name", "flag"], **defaults)
    assert (model.name, model.size, run.rate, run.title) == ("flag", 1, 0.1, "default")
    model, run = parse_args((Model, Run), ["--name", "flag"])
    assert (model.name, model.size, run.rate, run.title) == ("flag", 12, 1e-3, None)


def test_null_is_the_arguments_own_default(parse):
    """`save_total_limit: null` keeps every checkpoint, where the recipe's default deletes them."""
    given = parse("name: x\nsize: null\ntitle: ~\nlayers:\n", size=1, title="default")
    assert given == (Model(name="x"), Run())


@dataclass
class Precision:
    fp16: bool = False
    bf16: bool = False
    fp16_full_eval: bool = False


@pytest.mark.parametrize(
    ("text", "flags", "expected"),
    [
        ("", [], Precision(bf16=True)),
        ("fp16: true", [], Precision(fp16=True)),
        ("", ["--fp16"], Precision(fp16=True)),
        ("", ["--fp16", "true"], Precision(fp16=True)),
        ("fp16: true", ["--fp16=false"], Precision(bf16=True)),
        ("", ["--fp16", "false"], Precision(bf16=True)),
        ("", ["--fp16_full_eval"], Precision(bf16=True, fp16_full_eval=True)),
    ],
)
def test_fp16_takes_the_place_of_bf16(tmp_path, text, flags, expected):
    """Both together are an error of the Trainer, which the user did not ask for."""
    path = tmp_path / "config.yaml"
    path.write_text(text or "fp16_full_eval: false", encoding="utf-8")
    assert parse_args((Precision,), [str(path), *flags], bf16=True) == (expected,)


def test_a_list_is_replaced_not_extended(parse):
    """`--layers 6` would add a layer to those of the file."""
    assert parse("name: x\nlayers: [2, 4]\n", "--layers", "6")[0].layers == [6]


@pytest.mark.parametrize("written", ["5e-5", "5.0e-5", "0.00005", "'5e-5'"])
def test_a_learning_rate_is_a_number_however_it_is_written(parse, written):
    """YAML reads 5e-5 as a string, which fails in the optimizer, or compares as text."""
    rate = parse(f"name: x\nrate: {written}\n")[1].rate
    assert isinstance(rate, float)
    assert rate == 5e-5


def test_values_arrive_with_their_types(parse):
    """`"False"` would be true, and `"[2, 4]"` a name."""
    model, run = parse(
        "name: 123\nlayers: [2, 4]\nrates: [1e-5, 2]\nlabel_names: [not it, '1']\nis_fast: true\nis_shuffled: false\n"
    )
    assert model == Model(name="123", layers=[2, 4], rates=[1e-5, 2.0], label_names=["not it", "1"], size=12)
    assert run == Run(is_fast=True, is_shuffled=False)
    assert isinstance(model.rates[1], float)
    assert parse("name: x\nis_fast: false\nis_shuffled: true\n")[1] == Run()
    assert parse("name: x\nis_shuffled: true\n", "--is_shuffled", "false", "--is_fast")[1] == Run(
        is_fast=True, is_shuffled=False
    )


def test_no_file_is_needed(monkeypatch):
    """The first flag would be read as a file, or the process's own arguments be ignored."""
    monkeypatch.setattr(sys, "argv", ["recipe.py", "--name", "x", "--rate", "5e-5"])
    assert parse_args((Model, Run)) == (Model(name="x"), Run(rate=5e-5))


def test_training_arguments_from_yaml(tmp_path):
    """A field of the Trainer that takes a dict or a number would get a string."""
    path = tmp_path / "config.yml"
    path.write_text(
        "output_dir: out\nlearning_rate: 5e-5\nlogit_loss_weight: 1\ntask_loss_weight: 0\ntemperature: 4\n"
        "logit_loss_type: soft_ce\nlayer_mapping: '1:2,2:4'\ngradient_checkpointing: true\n"
        "gradient_checkpointing_kwargs: {use_reentrant: false}\nlr_scheduler_type: cosine_with_restarts\n"
        "lr_scheduler_kwargs: {num_cycles: 2}\nuse_cpu: true\nreport_to: none\n",
        encoding="utf-8",
    )
    (args,) = parse_args((DistillationTrainingArguments,), [str(path), "--temperature", "3"], seed=7)
    assert args.learning_rate == 5e-5
    assert (args.task_loss_weight, args.logit_loss_weight, args.temperature) == (0.0, 1.0, 3.0)
    assert (args.logit_loss_type, args.layer_mapping, args.seed) == ("soft_ce", "1:2,2:4", 7)
    assert args.gradient_checkpointing_kwargs == {"use_reentrant": False}
    assert args.lr_scheduler_kwargs == {"num_cycles": 2}
    assert args.report_to == []


def test_a_number_in_a_mapping_is_a_number(tmp_path):
    """min_lr would be the text "1e-6", which fails in the scheduler, or compares as text."""
    path = tmp_path / "config.yaml"
    path.write_text("output_dir: out\nuse_cpu: true\nlr_scheduler_kwargs: {min_lr: 1e-6}\n", encoding="utf-8")
    (args,) = parse_args((TrainingArguments,), [str(path)])
    assert args.lr_scheduler_kwargs == {"min_lr": 1e-6}


def test_a_value_may_start_with_a_dash(parse):
    """The YAML file would fail with "expected one argument", which names neither the file nor the value."""
    assert parse("name: -x\nrate: -1e-3\n") == (Model(name="-x"), Run(rate=-1e-3))


def test_every_accelerate_configuration_is_read():
    """`accelerate launch --config_file` would end in an error, or start another number of processes."""
    paths = sorted((RECIPES / "accelerate_configs").glob("*.yaml"))
    assert paths != []
    for path in paths:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        loaded = load_config_from_file(str(path)).to_dict()
        assert {name: loaded[name] for name in config} == config, path


def test_a_key_written_twice_is_an_error(parse):
    """Of two learning rates in a long file the last would win, whichever was meant."""
    with pytest.raises(ValueError, match="rate is set twice"):
        parse("name: x\nrate: 1e-4\nsize: 3\nrate: 1e-5\n")


def test_flags_are_not_abbreviated(parse):
    """A misspelt flag that is the start of another would set that one."""
    with pytest.raises(ValueError, match="--rat"):
        parse("name: x\n", "--rat", "3")


def test_a_layer_map_is_no_number_and_no_is_a_word(tmp_path):
    """YAML 1.1 reads 1:4 as 64, to base 60, and `no` as False: errors would name values that nobody wrote."""
    path = tmp_path / "config.yaml"
    path.write_text(
        "layer_mapping: 1:4\nseed: 0010\nlearning_rate: 5e-5\nwarmup_steps: 3\ntemperature: .5\n"
        "save_strategy: no\nuse_cpu: true\n"
    )
    (args,) = parse_args((DistillationTrainingArguments,), [str(path)], output_dir=str(tmp_path))
    assert (args.layer_mapping, args.seed, args.learning_rate) == ("1:4", 10, 5e-5)
    assert (args.warmup_steps, args.temperature, args.use_cpu) == (3, 0.5, True)
    assert args.save_strategy == "no"
