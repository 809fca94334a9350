"""A short chaos: real processes die, freeze, lie and lose Redis, and no caller sees it.

The numbers are those of `make chaos`; here no bar is on time, as the machine may be busy.
"""

import re
import subprocess
import sys

import pytest
from tests.e2e.readme import ROOT
from tests.e2e.served import environment

SHORT = ("kill", "stop", "garbage", "redis_kill")
LEAST_CALLS = 100
_ROW = re.compile(r"^\| ([\w: ]+) \| (\d+) faults \| ([\d,]+) \| (.+?) \| (\d+) \| (\d+) \|", re.M)

pytestmark = pytest.mark.timeout(240)


def chaos(*args: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "chaos", *args],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(),
    )


def test_no_caller_sees_that_processes_fail() -> None:
    done = chaos("--quick", *SHORT)
    rows = {name: rest for name, *rest in _ROW.findall(done.stdout)}
    assert {name.partition(":")[0] for name in rows} == set(SHORT), done.stdout + done.stderr
    for name, (faults, calls, errors, inexact, not_numbers) in rows.items():
        assert int(faults) > 0, name
        assert int(calls.replace(",", "")) > LEAST_CALLS, name
        assert (errors, inexact, not_numbers) == ("0", "0", "0"), name
    assert done.returncode == 0, done.stdout


def test_make_chaos_runs_what_it_is_told() -> None:
    command = ["make", "-n", "chaos", "ONLY=kill --quick"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment())
    assert done.returncode == 0
    assert "-m chaos kill --quick" in done.stdout
