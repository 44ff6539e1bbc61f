"""A model sharded by FSDP2 over processes on CPUs, saved by torch.distributed.checkpoint; run again, it goes on.

    torchrun --nproc-per-node 2 examples/fsdp2.py --steps 200 --checkpoints FOLDER

or, in one process, python examples/fsdp2.py.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fastgd.torch


class Transformer(nn.Module):
    """Reads the eight rows of a digit."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Linear(8, 64)
        self.places = nn.Parameter(torch.zeros(8, 64))
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(64, 4, 256, 0.0, batch_first=True) for _ in range(2))
        self.head = nn.Linear(64, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.rows(images) + self.places
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def main(steps: int, checkpoints: Path | None) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    torch.manual_seed(0)
    model = Transformer()
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)

    # Each process steps its own shards; max_norm and the check for NaN and inf are of the whole model.
    optimizer = fastgd.torch.AdamW(model.parameters(), lr=2e-3, max_norm=1.0, skip_nonfinite=True, stats=True)
    averages = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.track_ema(zip(model.parameters(), averages.values(), strict=True), lambda n: min(0.95, n / (n + 9)))

    def state() -> dict[str, Any]:
        of_model, of_optimizer = get_state_dict(model, optimizer)
        return {"model": of_model, "optimizer": of_optimizer, "averages": averages, "updates": optimizer.ema_updates}

    done = max((int(f.parent.name) for f in checkpoints.glob("*/.metadata")), default=0) if checkpoints else 0
    if done:
        saved = state()
        dcp.load(saved, checkpoint_id=checkpoints / str(done))
        set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
        optimizer.ema_updates = saved["updates"]

    images, digits = map(torch.from_numpy, load_digits(return_X_y=True))
    images = images.float().reshape(-1, 8, 8) / 16
    for step in range(done + 1, steps + 1):
        batch = torch.randint(1500, (128,), generator=torch.Generator().manual_seed(step))[rank::world]
        loss = nn.functional.cross_entropy(model(images[batch]), digits[batch])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            total = loss.detach() / world
            dist.all_reduce(total)
            if rank == 0:
                print(f"step {step}, loss {total.item():.9g}: {optimizer.last_stats}", flush=True)
    if checkpoints:
        dcp.save(state(), checkpoint_id=checkpoints / str(steps))

    with torch.no_grad():
        for p, average in zip(model.parameters(), averages.values(), strict=True):
            p.copy_(average)
        right = (model(images[1500:]).argmax(1) == digits[1500:]).float().mean()
    if rank == 0:
        print(f"the averages have {right:.1%} of the test digits right")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--checkpoints", type=Path)
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    main(arguments.steps, arguments.checkpoints)
    dist.destroy_process_group()
