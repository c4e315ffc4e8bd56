"""What this CPU can compute in, which decides how a model is quantised and what a measurement means."""

import os
import platform
import re
from pathlib import Path
from typing import Any


# Instructions that multiply int8 or bfloat16, as Linux names them.
_INT8_DOT = ("amx_int8", "avx512_vnni", "avx_vnni", "asimddp", "i8mm")
_BF16_DOT = ("amx_bf16", "avx512_bf16", "bf16")
_VECTORS = ("avx2", "avx512f", "asimd", "sve")


def cpu_facts() -> dict[str, Any]:
    """
    The CPU that this process runs on.

    Returns:
        `dict`: `model` (`str`); `architecture` (`str`), such as `x86_64`; `flags` (`list[str]`), those that matter to
        int8 and bfloat16, empty where the system does not tell; `cores` (`int`), the logical ones that this process
        may use.
    """
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    known = set(flags[1].split()) if flags else set()
    return {
        "model": model[1].strip() if model else platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "flags": [flag for flag in (*_VECTORS, *_INT8_DOT, *_BF16_DOT) if flag in known],
        "cores": available_cores(),
    }


def available_cores() -> int:
    """The logical cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def needs_reduced_range(facts: dict[str, Any] | None = None) -> bool:
    """
    Whether int8 weights have to keep to 7 bits: x86 without VNNI adds pairs of products in 16 bits, which saturate.

    See https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html, "When and why do I need to try
    U8U8?". ARM multiplies into 32 bits, so nothing saturates there. An x86 CPU whose flags are not known counts as
    one without VNNI.
    """
    facts = cpu_facts() if facts is None else facts
    return facts["architecture"].lower() in ("x86_64", "amd64", "i686") and not set(facts["flags"]) & set(_INT8_DOT)


def computes_in_bf16(facts: dict[str, Any] | None = None) -> bool:
    """Whether bfloat16 products are instructions of the CPU; without them bfloat16 is slower than float32."""
    facts = cpu_facts() if facts is None else facts
    return bool(set(facts["flags"]) & set(_BF16_DOT))
