"""What the processes of test_distributed.py do: `distributed.py FOLDER HOW_MANY CHECK...`."""

from __future__ import annotations

import sys
import traceback
from copy import deepcopy
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # which the first step would import in each process
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel

import fastgd.torch

RULES: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True},
    "Adam": {"lr": 0.01, "amsgrad": True},
    "AdamW": {"lr": 0.01, "weight_decay": 0.1},
    "Adagrad": {"lr": 0.1},
    "RMSprop": {"lr": 0.01, "momentum": 0.9, "centered": True},
    "Lion": {"lr": 0.01, "weight_decay": 0.1},
}
MAX_NORM = 0.7
DECAY = 0.9


class Net(nn.Module):
    """Of odd sizes: two processes have shards of different sizes, four have empty ones, and `scale` is on one alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("age", torch.zeros(()))

    def forward(self, x: Any) -> Any:
        return self.last(torch.tanh(self.first(x))) * self.scale


class Run:
    """A model in training: in one process with torch's optimizer, or in all of them with ours."""

    def __init__(self, kind: str, rule: str, dtype: Any = torch.float64, seed: int = 0, **extras: Any) -> None:
        torch.manual_seed(seed)
        self.kind, self.dtype, self.max_norm = kind, dtype, extras.get("max_norm")
        self.net: Any = Net().to(dtype)
        self.model: Any = self.net
        if kind in ("ddp", "zero", "views"):
            self.model = DistributedDataParallel(self.net, gradient_as_bucket_view=kind == "views")
        elif kind in ("fsdp", "offload", "hybrid", "tensor"):
            mesh = grid() if kind == "hybrid" else line()
            if kind == "tensor":  # which shards within layers first, along the other dimension
                both = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("shards", "layers"))
                plan = {"first": ColwiseParallel(), "last": RowwiseParallel()}
                parallelize_module(self.net, both["layers"], plan)
                mesh = both["shards"]
            policy = {"offload_policy": CPUOffloadPolicy(pin_memory=False)} if kind == "offload" else {}
            for part in (self.net.first, self.net):
                fully_shard(part, mesh=mesh, **policy)
        self.zero_grads = extras.get("zero_grads", False)
        ours = getattr(fastgd.torch, rule)
        self.opt: Any
        if kind == "solo":
            self.opt = getattr(torch.optim, rule, ours)(self.model.parameters(), **RULES[rule])
        elif kind in ("zero", "views"):
            extras |= RULES[rule] | {"parameters_as_bucket_view": kind == "views"}
            self.opt = ZeroRedundancyOptimizer(self.model.parameters(), ours, **extras)
            # Here and not as a keyword: ZeRO keeps those in its groups and saves them, and a ProcessGroup is not saved.
            self.opt.optim.one_pass["norm_group"] = dist.group.WORLD
        else:
            self.opt = ours(self.model.parameters(), **RULES[rule], **extras)
        # What steps in this process: with ZeRO, the optimizer of the parameters that are its own.
        self.local = getattr(self.opt, "optim", self.opt)
        self.params = [p for group in self.local.param_groups for p in group["params"]]
        self.averages = {t: t.detach().clone() for t in [*self.params, self.net.age]}
        if kind != "solo":
            self.local.track_ema(self.averages, DECAY)

    def backward(self, step: int, scale: float = 1.0) -> None:
        """The gradient of a batch, of which each process takes its part."""
        g = torch.Generator().manual_seed(step)
        x, y = (torch.randn(8, n, generator=g, dtype=torch.float64).to(self.dtype) for n in (6, 3))
        rank, world = (0, 1) if self.kind == "solo" else (dist.get_rank(), dist.get_world_size())
        if self.kind == "tensor":  # those of a layer see the same
            rank, world = rank // 2, world // 2
        part = slice(rank, None, world)
        self.net.age.fill_(step)
        (scale * 3 / step * (self.model(x[part]) - y[part]).square().mean()).backward()

    def step(self, **arguments: Any) -> tuple[float, float]:
        """One step; the norm of the gradient, and the factor by which that was clipped."""
        if self.kind != "solo":
            self.opt.step(**arguments)
            stats = self.local.last_stats
            return (stats.grad_norm or 0.0, stats.clip_factor) if stats else (0.0, 0.0)
        max_norm = self.max_norm or torch.inf
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), max_norm).item()
        self.opt.step()
        for t, average in self.averages.items():
            average.lerp_(t.detach(), 1 - DECAY)
        return norm, min(1.0, max_norm / (norm + 1e-6))  # torch's own 1e-6

    def train(self, first: int, last: int) -> Any:
        measured = []
        for step in range(first, last + 1):
            self.backward(step)
            measured.append(self.step())
            if not self.zero_grads or self.opt is not self.local:  # ZeRO's step zeroes those of its own parameters only
                self.opt.zero_grad()
        return torch.tensor(measured, dtype=torch.float64)

    def tensors(self) -> dict[str, Any]:
        """The model and its averages, whole."""
        names = {t: name for name, t in [*self.net.named_parameters(), *self.net.named_buffers()]}
        found = {name: whole(t) for t, name in names.items()}
        return found | {f"average of {names[t]}": whole(average) for t, average in self.averages.items()}

    def everything(self) -> dict[str, Any]:
        """A copy of all that a step may change."""
        found = self.tensors() | {"updates": torch.tensor(self.local.ema_updates)}
        for i, p in enumerate(self.params):
            found |= {f"{name} of {i}": whole(torch.as_tensor(t)) for name, t in self.local.state[p].items()}
        return {name: t.clone() for name, t in found.items()}


def line() -> Any:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def grid() -> Any:
    return init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("copies", "shards"))


def whole(t: Any) -> Any:
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach()


def assert_same_bits(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert actual.keys() == expected.keys(), (list(actual), list(expected))
    for name, e in expected.items():
        torch.testing.assert_close(actual[name], e, rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}")


def assert_close(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    """In float64: sums over processes are in another order, off by 1e-16, which the roots of small averages amplify."""
    for name, a in actual.items():
        torch.testing.assert_close(a, expected[name], rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def assert_same_everywhere(value: Any) -> None:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    assert all(v == value for v in values), values


# The checks ----------------------------------------------------------------------------------------------------------


def rules(kind: str) -> list[str]:
    """All where the time is allowed and there is most to see."""
    return [*RULES] if dist.get_world_size() > 2 and kind in ("ddp", "zero", "fsdp") else ["SGD", "AdamW"]


def trains(kind: str, folder: Path) -> None:
    """As one process with the whole batch, torch's optimizer of that name and torch's clipping."""
    for rule in rules(kind):
        solo = Run("solo", rule, max_norm=MAX_NORM)
        run = Run(kind, rule, max_norm=MAX_NORM, stats=True, zero_grads=True)
        expected, found = solo.train(1, 5), run.train(1, 5)
        if run.local is not run.opt:  # ZeRO, whose statistics are of the parameters that are this process's own
            expected, found = expected[:, 1:], found[:, 1:]
        assert expected[:, -1].min() < 0.8 and expected[:, -1].max() == 1  # some are clipped, some are not
        assert_same_everywhere(found.tolist())
        assert_close({"norms, factors": found}, {"norms, factors": expected})
        assert_close(run.tensors(), solo.tensors())


def trains_plainly(kind: str, folder: Path) -> None:
    """The same with nothing asked for beside the step and the averages."""
    for rule in ("SGD", "AdamW"):
        solo, run = Run("solo", rule), Run(kind, rule)
        for r in (solo, run):
            r.train(1, 5)
        assert run.local.last_stats is None
        assert_close(run.tensors(), solo.tensors())


def save(run: Run, place: Path) -> None:
    averages = {str(i): average for i, average in enumerate(run.averages.values())}
    rest = {"averages": averages, "updates": run.local.ema_updates}
    if run.kind == "zero":
        run.opt.consolidate_state_dict()
        if dist.get_rank() == 0:
            torch.save({"model": run.net.state_dict(), "optimizer": run.opt.state_dict()}, place / "all.pt")
        torch.save(rest, place / f"{dist.get_rank()}.pt")
        dist.barrier()
    else:
        model, optimizer = get_state_dict(run.model, run.opt)
        dcp.save({"model": model, "optimizer": optimizer} | rest, checkpoint_id=place)


def load(run: Run, place: Path) -> None:
    if run.kind == "zero":
        saved = torch.load(place / "all.pt", weights_only=True)
        run.net.load_state_dict(saved["model"])
        run.opt.load_state_dict(saved["optimizer"])
        rest = torch.load(place / f"{dist.get_rank()}.pt", weights_only=True)
        for average, kept in zip(run.averages.values(), rest["averages"].values(), strict=True):
            average.copy_(kept)
    else:
        # Of copies, so that it is set_state_dict that brings them in.
        model, optimizer = deepcopy(get_state_dict(run.model, run.opt))
        averages = {str(i): average for i, average in enumerate(run.averages.values())}
        rest = {"model": model, "optimizer": optimizer, "averages": averages, "updates": 0}
        dcp.load(rest, checkpoint_id=place)
        set_state_dict(run.model, run.opt, model_state_dict=model, optim_state_dict=optimizer)
    run.local.ema_updates = rest["updates"]


def resumes(kind: str, folder: Path) -> None:
    """Saved, and loaded into what began elsewhere, it goes on to the same bits."""
    float32 = {"dtype": torch.float32}
    mixed = {"dtype": torch.bfloat16, "state_dtype": torch.float32}
    for i, (rule, options) in enumerate([*((rule, float32) for rule in rules(kind)), ("AdamW", mixed)]):
        options |= {"max_norm": MAX_NORM, "zero_grads": True}
        run, again = Run(kind, rule, **options), Run(kind, rule, seed=1, **options)
        # DDP lays out its buckets after the first backward; until then gloo adds up four gradients in another order.
        again.backward(1)
        again.opt.zero_grad()
        run.train(1, 3)
        at_save = run.everything()
        place = folder / f"{kind}{i}"
        place.mkdir(exist_ok=True)
        save(run, place)
        run.train(4, 6)
        load(again, place)
        assert_same_bits(again.everything(), at_save)
        again.train(4, 6)
        assert_same_bits(again.everything(), run.everything())


def resumes_otherwise(kind: str, folder: Path) -> None:
    """What was saved of one kind goes on as another."""
    run = Run(kind, "AdamW")
    run.train(1, 3)
    save(run, folder / f"from {kind}")
    for other in ("ddp", "fsdp", "hybrid"):
        again = Run(other, "AdamW", seed=1)
        load(again, folder / f"from {kind}")
        assert_same_bits(again.everything(), run.everything())


def poison(run: Run, value: float) -> None:
    """One element of the gradient, in the only process that steps it, or in all that do."""
    p = run.net.last.weight
    if run.kind == "ddp" or (run.kind == "zero" and any(p is own for own in run.params)):
        p.grad[1, 2] = value
    elif isinstance(p, DTensor):
        places = zip(p.device_mesh.get_coordinate(), p.device_mesh.shape, p.placements, strict=True)
        if all(place == min(1, size - 1) for place, size, way in places if not way.is_replicate()):
            p.grad.to_local()[0, 2] = value


def skips(kind: str, folder: Path) -> None:
    """One value in one process is not finite: none moves, all know it, and the next step is as if it had not been."""
    for value in (torch.nan, -torch.inf):
        solo, run = Run("solo", "AdamW"), Run(kind, "AdamW", skip_nonfinite=True, max_norm=1e9)
        for r in (solo, run):
            r.train(1, 2)
        run.backward(3)
        before = run.everything()
        poison(run, value)
        run.step()
        assert_same_bits(run.everything(), before)
        assert run.local.last_stats.skipped and run.local.last_stats.nonfinite == 1, run.local.last_stats
        run.opt.zero_grad()
        for r in (solo, run):
            r.train(3, 4)
        assert not run.local.last_stats.skipped
        assert_close(run.tensors(), solo.tensors())


def scales(kind: str, folder: Path) -> None:
    """With a GradScaler: unscaled in the step; where one process overflows, all skip and have the same lower scale."""
    solo, run = Run("solo", "SGD", max_norm=MAX_NORM), Run(kind, "SGD", max_norm=MAX_NORM)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    scaler.scale(torch.ones(()))  # makes the scale
    solo.train(1, 4)
    scales = []
    for step, bad in ((1, False), (2, True), (2, False), (3, False), (4, False)):
        run.backward(step, scaler.get_scale())
        if bad:
            poison(run, torch.inf)
        run.step(scaler=scaler)
        assert run.local.last_stats.skipped == bad
        scaler.update()
        scales.append(scaler.get_scale())
        run.opt.zero_grad()
    assert scales == [1024, 512, 512, 512, 1024]
    assert_close(run.tensors(), solo.tensors())


def placements(kind: str, folder: Path) -> None:
    """Parameters sharded in every way, beside plain ones: norms are of all of it, each element counted once."""
    one, two, kinds = line(), grid(), (Replicate(), Shard(0), Shard(1))
    ways: list[Any] = [None, *((one, [a]) for a in kinds), *((two, [a, b]) for a in kinds for b in kinds)]
    g = torch.Generator().manual_seed(0)
    params, solo = [], []
    for shape in ((8, 6), (5, 3), (1, 2)):
        for way in ways:
            p, grad = (torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(2))
            solo.append(nn.Parameter(p.clone()))
            params.append(nn.Parameter(laid(p, way)))
            solo[-1].grad, params[-1].grad = grad.clone(), laid(grad, way)
    before = [p.detach().clone() for p in solo]
    norm = nn.utils.clip_grad_norm_(solo, 1.0)
    torch.optim.AdamW(solo, lr=0.1).step()
    opt = fastgd.torch.AdamW(params, lr=0.1, max_norm=1.0, stats=True)
    opt.step()
    expected = {f"{p.shape} {way}": p.detach() for p, way in zip(solo, 3 * ways, strict=True)}
    assert_close(dict(zip(expected, map(whole, params), strict=True)), expected)
    stats = opt.last_stats
    update = nn.utils.get_total_norm([p.detach() - b for p, b in zip(solo, before, strict=True)])
    norms = {"gradient": norm, "update": update, "parameters": nn.utils.get_total_norm([p.detach() for p in solo])}
    found = torch.tensor([stats.grad_norm, stats.update_norm, stats.param_norm], dtype=torch.float64)
    assert_close(dict(zip(norms, found, strict=True)), norms)
    assert_same_everywhere(found.tolist())

    # A NaN in one parameter, which some of the processes may have no part of: all skip the step.
    opt.one_pass["skip_nonfinite"] = True
    for p, way in zip(params, 3 * ways, strict=True):
        grad, bad = p.grad, torch.zeros(p.shape, dtype=torch.float64)
        bad[0, 0] = torch.nan
        p.grad = laid(bad, way)
        opt.step()
        assert opt.last_stats.skipped, way
        assert_same_everywhere(opt.last_stats.nonfinite)
        p.grad = grad
    assert_close(dict(zip(expected, map(whole, params), strict=True)), expected)


def laid(t: Any, way: Any) -> Any:
    return distribute_tensor(t, *way) if way else t


def gradients_otherwise(kind: str, folder: Path) -> None:
    """Gradients that lie otherwise than their parameters, as backward may leave them."""
    mesh, start, ones = line(), torch.arange(15.0).reshape(5, 3), torch.ones(5, 3)
    summed = DTensor.from_local(ones / dist.get_world_size(), mesh, [Partial()])
    lie = [distribute_tensor(ones, mesh, [way]) for way in (Replicate(), Shard(0), Shard(1))]
    for grad in (summed, *lie):
        for way in (Replicate(), Shard(0), Shard(1)):
            p = nn.Parameter(distribute_tensor(start.clone(), mesh, [way]))
            p.grad = grad.clone()
            fastgd.torch.SGD([p], lr=1.0, zero_grads=True).step()
            found, expected = {"p": whole(p), "grad": whole(p.grad)}, {"p": start - 1, "grad": 0 * ones}
            assert_same_bits(found, expected)


def stale_graph(kind: str, folder: Path) -> None:
    """A graph made before the step is refused after it, as with torch's optimizers."""
    p = nn.Parameter(distribute_tensor(torch.ones(4, 4), line(), [Shard(0)]))
    loss = (p * p).sum()
    p.grad = distribute_tensor(torch.ones(4, 4), line(), [Shard(0)])
    fastgd.torch.SGD([p], lr=0.1).step()
    try:
        loss.backward()
    except RuntimeError as e:
        assert "modified by an inplace operation" in str(e)
    else:
        raise AssertionError("a stale graph was not noticed")


def without_parameters(kind: str, folder: Path) -> None:
    """ZeRO with one parameter: the other processes have none to step, and are not waited for."""
    for value in (1.0, torch.nan):
        p = nn.Parameter(torch.zeros(4))
        opt = ZeroRedundancyOptimizer(
            [p], fastgd.torch.SGD, lr=1.0, norm_group=dist.group.WORLD, max_norm=1.0, skip_nonfinite=True
        )
        p.grad = torch.full((4,), value)
        opt.step()
        assert_same_everywhere(opt.optim.last_stats.nonfinite)
        # -0.5 is 1 / (norm 2), and 1e-6 is what torch adds to the norm
        torch.testing.assert_close(p.detach(), torch.full((4,), -0.5 if value == 1 else 0.0), rtol=1e-6, atol=0)


def work(rank: int, world: int, folder: Path, checks: list[str]) -> None:
    for i, check in enumerate(checks):
        name, _, kind = check.partition(" ")
        # A group of its own for each: where one fails in one process alone, the others run into the timeout and go on.
        store, timeout = f"file://{folder}/store{i}", timedelta(seconds=20)
        dist.init_process_group("gloo", store, timeout=timeout, rank=rank, world_size=world)
        try:
            globals()[name](kind, folder)
            outcome = "passed"
        except Exception:
            outcome = traceback.format_exc()
        (folder / f"{check}.{rank}").write_text(outcome)
        dist.destroy_process_group()


if __name__ == "__main__":
    place, world, *checks = sys.argv[1:]
    # Forked, for it is importing torch that takes the time.
    start_processes(work, (int(world), Path(place), checks), int(world), start_method="fork")
