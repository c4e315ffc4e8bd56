"""What `import hf_kd` gives, and what it does not bring along."""

import dataclasses
import inspect
import json
import subprocess
import sys

import pytest

import hf_kd


# Notes which packages modules of hf_kd import themselves, while every public name is used. `sys.modules` cannot tell:
# the Trainer of transformers brings `datasets` and scikit-learn along where they are installed.
PROBE = """
import builtins, json, sys
import_module, asked = builtins.__import__, set()

def record(name, globals=None, locals=None, fromlist=(), level=0):
    if level == 0 and (globals or {}).get("__name__", "").split(".")[0] == "hf_kd":
        asked.add(name.split(".")[0])
    return import_module(name, globals, locals, fromlist, level)

builtins.__import__ = record
import hf_kd
for name in hf_kd.__all__:
    getattr(hf_kd, name)
own = [name for name in sys.modules if name.startswith("hf_kd.")]
print(json.dumps({"asked": sorted(asked - sys.stdlib_module_names), "own": own, "all": sorted(sys.modules)}))
"""


def test_import_alone_brings_nothing_along():
    """`import hf_kd` in a module that needs one term would take as long as the whole stack."""
    code = "import sys, hf_kd; print(*sys.modules)"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "transformers", "datasets", "evaluate", "optimum", "onnxruntime", "sklearn", "scipy"}
    assert "hf_kd" in process.stdout.split() and not heavy & set(process.stdout.split())


@pytest.fixture(scope="module")
def imported():
    """What a fresh process has imported for hf_kd."""
    process = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    return json.loads(process.stdout)


def test_import_asks_for_no_more_than_the_trainer_needs(imported):
    """A project that only adds the trainer would pay for `datasets`, `evaluate` and an ONNX stack."""
    assert imported["asked"] == ["accelerate", "huggingface_hub", "numpy", "safetensors", "torch", "transformers"]


def test_import_brings_no_evaluation_and_no_export(imported):
    """The modules for GLUE data and deployment, with all that they need, would be part of every training script."""
    heavy = {"evaluate", "optimum", "onnx", "onnxruntime", "onnxscript", "matplotlib"}
    assert heavy & set(imported["all"]) == set()
    beside = ("hf_kd.glue", "hf_kd.demo_task", "hf_kd.results", "hf_kd.command_line", "hf_kd.deploy")
    assert [name for name in imported["own"] if name.startswith(beside)] == []


def test_all_names_exist_once_and_in_order():
    """`from hf_kd import *` would fail, or a public name be left out of the documentation."""
    assert len(set(hf_kd.__all__)) == len(hf_kd.__all__)
    assert hf_kd.__all__ == sorted(hf_kd.__all__)
    assert [name for name in hf_kd.__all__ if not hasattr(hf_kd, name)] == []


@pytest.mark.parametrize("name", hf_kd.__all__)
def test_every_public_name_explains_itself(name):
    """A new argument would be there without a word on its meaning."""
    thing = getattr(hf_kd, name)
    doc = inspect.getdoc(thing)
    assert doc
    assert not doc.startswith(f"{name}(")  # what a dataclass writes where there is no docstring
    if dataclasses.is_dataclass(thing):
        parameters = [field for field in thing.__annotations__ if not field.startswith("_")]
    else:
        kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        parameters = [p.name for p in inspect.signature(thing).parameters.values() if p.kind not in kinds]
    assert parameters
    assert [parameter for parameter in parameters if f"\n    {parameter} (" not in doc] == []


def test_student_comes_before_teacher():
    """Swapped in one place, the large model would be trained to imitate the small one."""
    parameters = list(inspect.signature(hf_kd.DistillationTrainer.__init__).parameters)
    assert parameters[:3] == ["self", "model", "args"]
    assert "teacher_model" in parameters
    for function in (hf_kd.DistillationObjective.forward, hf_kd.DistillationObjective.bind):
        names = [name for name in inspect.signature(function).parameters if name.startswith(("student", "teacher"))]
        assert [name.split("_")[0] for name in names] == ["student", "teacher"]
