"""Every script of examples/ runs, and does what it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = [pytest.mark.skipif(find_spec(name) is None, reason=f"needs {name}") for name in ("torch", "sklearn")]

EXAMPLES = Path(__file__).parents[1] / "examples"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def run(name: str, *arguments: str, by: tuple[str, ...] = ()) -> str:
    """What the example prints, run by Python or by a module of it."""
    command = [sys.executable, *by, str(EXAMPLES / name), *arguments]
    env = os.environ | {"OMP_NUM_THREADS": "1", "FASTGD_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_torch_loop():
    """Before and after, the averaged network knows the digits as well."""
    printed = run("torch_loop.py", "--epochs", "4")
    before, after = (
        float(right) for right in re.findall(r"^(?:before|after): ([\d.]+)% .* right", printed, re.MULTILINE)
    )
    # Rounding in bfloat16 parts the two: of 297 digits some go the other way.
    assert min(before, after) > 60 and abs(before - after) < 3, printed


@pytest.mark.slow
def test_fsdp2_alone():
    printed = run("fsdp2.py", "--steps", "20")
    first, last = (float(loss) for loss in re.findall(r"^step [12]0, loss ([\d.]+)", printed, re.MULTILINE))
    assert last < first < 2.3, printed  # log(10), where nothing is learnt


@pytest.mark.slow
def test_fsdp2_resumes_in_two_processes(tmp_path):
    """In processes of their own, to the bit: the lines after the resume are those of a run in one go."""
    at_once, first, second = (
        run("fsdp2.py", "--steps", steps, "--checkpoints", str(tmp_path / folder), by=TORCHRUN)
        for steps, folder in (("40", "at once"), ("20", "in two"), ("40", "in two"))
    )
    assert first.splitlines()[:2] + second.splitlines() == at_once.splitlines()


def test_every_example_is_run():
    tests = "".join(path.read_text("utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    assert not {path.name for path in EXAMPLES.glob("*.py") if f'"{path.name}"' not in tests}
