"""DeepSpeed: its CPUAdam, which compiles itself at first use."""

from __future__ import annotations

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam

from fastgd.cli.bench.case import Case
from fastgd.cli.bench.measure import Contender


def contend(case: Case) -> Contender | None:
    if case.setting.name not in ("adam", "adamw"):
        return None
    params = [torch.nn.Parameter(torch.from_numpy(p)) for p in case.params]
    for p, g in zip(params, case.grads, strict=True):
        p.grad = torch.from_numpy(g)
    optimizer = DeepSpeedCPUAdam(params, adamw_mode=case.setting.name == "adamw", **case.setting.hyper)
    return Contender("deepspeed", optimizer.step, params=lambda: case.params)
