"""The CPU's facts, and what follows from them."""

import os
import platform

import pytest

from hf_kd.cpu import available_cores, computes_in_bf16, cpu_facts, needs_reduced_range


@pytest.mark.parametrize(
    ("architecture", "flags", "expected"),
    [
        pytest.param("x86_64", ["avx2"], True, id="x86 before VNNI"),
        pytest.param("x86_64", ["avx2", "avx512f"], True, id="AVX512 without VNNI"),
        pytest.param("x86_64", ["avx2", "avx512f", "avx512_bf16"], True, id="bfloat16 is not int8"),
        pytest.param("x86_64", ["avx2", "avx512f", "avx512_vnni"], False, id="AVX512 VNNI"),
        pytest.param("x86_64", ["avx2", "avx_vnni"], False, id="VNNI of small cores"),
        pytest.param("x86_64", ["avx2", "amx_int8"], False, id="AMX"),
        pytest.param("x86_64", [], True, id="flags not known"),
        pytest.param("AMD64", [], True, id="Windows"),
        pytest.param("AMD64", ["avx512_vnni"], False, id="Windows with VNNI"),
        pytest.param("aarch64", ["asimd"], False, id="ARM"),
        pytest.param("aarch64", ["asimd", "asimddp"], False, id="ARM with dot products"),
        pytest.param("arm64", [], False, id="macOS"),
    ],
)
def test_reduced_range_where_sums_saturate(architecture, flags, expected):
    """Where it is needed and missing, int8 answers are wrong on that CPU alone; where it is not, a bit is lost."""
    assert needs_reduced_range({"architecture": architecture, "flags": flags}) is expected


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["avx2", "avx512f", "avx512_vnni"], False),
        (["avx512f", "avx512_bf16"], True),
        (["amx_bf16"], True),
        (["asimd", "bf16"], True),
        ([], False),
    ],
    ids=str,
)
def test_bf16_where_the_cpu_multiplies_it(flags, expected):
    """Emulated bfloat16 is slower than float32: a benchmark of it would be of nothing that anybody runs."""
    assert computes_in_bf16({"flags": flags}) is expected


def test_facts_are_those_of_this_machine():
    """Recorded with every measurement: a wrong model or flag would make it a claim about another CPU."""
    facts = cpu_facts()
    assert set(facts) == {"model", "architecture", "flags", "cores"}
    assert facts["model"] and facts["architecture"] == platform.machine()
    assert facts["cores"] == available_cores() == len(os.sched_getaffinity(0))
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        text = file.read()
    assert facts["model"] in text or facts["model"] in (platform.processor(), platform.machine())
    assert [flag for flag in facts["flags"] if flag not in text.split()] == []
    for flag in ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "amx_bf16", "asimddp"):
        assert (flag in facts["flags"]) == (flag in text.split())
    assert needs_reduced_range() == needs_reduced_range(facts) and computes_in_bf16() == computes_in_bf16(facts)


def test_cores_are_those_that_the_process_may_use():
    """In a container with two of 64 cores, 64 threads would be slower than one."""
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert available_cores() == cpu_facts()["cores"] == 1
    finally:
        os.sched_setaffinity(0, allowed)
