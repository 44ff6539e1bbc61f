"""Training by torch's own distributed engine, over gloo: what tests/distributed.py does, in two processes and four."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.skipif(find_spec("torch") is None, reason="needs torch"),
    pytest.mark.skipif(sys.platform != "linux", reason="torch's distributed engine is complete on Linux only"),
]

# hybrid: shards along one dimension of a mesh of processes, copies along the other; tensor: shards along both.
KINDS = ("ddp", "zero", "fsdp", "offload", "hybrid", "tensor")
CHECKS = [f"{check} {kind}" for check in ("trains", "resumes", "skips", "scales") for kind in KINDS]
CHECKS += [f"trains_plainly {kind}" for kind in ("ddp", "zero", "fsdp")]
CHECKS += ["trains views"]  # ZeRO and DDP, with parameters and gradients that are parts of buckets
CHECKS += ["resumes_otherwise ddp", "resumes_otherwise fsdp"]
CHECKS += ["placements", "gradients_otherwise", "stale_graph", "without_parameters"]


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def outcomes(request, tmp_path_factory):
    """Of every check in each process; all are made in one go, for it is importing torch that takes the time."""
    folder = tmp_path_factory.mktemp("distributed")
    script = str(Path(__file__).with_name("distributed.py"))
    command = [sys.executable, script, str(folder), str(request.param), *CHECKS]
    env = os.environ | {"OMP_NUM_THREADS": "1", "FASTGD_NUM_THREADS": "1"}
    log = folder / "log"
    with log.open("w") as file:
        process = subprocess.Popen(command, env=env, stdout=file, stderr=file, start_new_session=True)
        try:
            process.wait(300)
        except subprocess.TimeoutExpired:  # what hangs has no outcome, and so fails
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def of(check: str) -> list[str]:
        found = [folder / f"{check}.{rank}" for rank in range(request.param)]
        return [f.read_text() if f.exists() else f"not finished: {log.read_text()}" for f in found]

    return of


@pytest.mark.parametrize("check", CHECKS)
def test_distributed(outcomes, check):
    found = outcomes(check)
    assert found == ["passed"] * len(found), "\n".join(found)
