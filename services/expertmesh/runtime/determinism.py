"""MKL's switch for results that do not depend on batch size, threads or layout: MKL_CBWR.

Its documentation calls it conditional numerical reproducibility. MKL reads the variable when torch
is loaded, so it must be in a process's environment from its start, and equal in every process whose
results must agree. Not every CPU honours it: `experts.invariance` tries before relying on it.
"""

from collections.abc import Mapping
from pathlib import Path

VARIABLE = "MKL_CBWR"


def deterministic_environment(
    environment: Mapping[str, str], cpuinfo: Path = Path("/proc/cpuinfo")
) -> dict[str, str]:
    """The variable to start a process with; one already set (a mixed fleet's choice) is kept.

    Without AVX-512 the AVX2 branch is taken: the same on all x86-64 servers, and slower.
    """
    chosen = environment.get(VARIABLE)
    if chosen is None:
        flags = cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else ""
        chosen = "AVX512,STRICT" if "avx512f" in flags else "AVX2,STRICT"
    return {VARIABLE: chosen}


def is_deterministic(environment: Mapping[str, str]) -> bool:
    """Whether a process started with this environment is in a strict CBWR mode."""
    return environment.get(VARIABLE, "").endswith("STRICT")
