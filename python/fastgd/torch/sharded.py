"""Parameters of which this process has a part: their local shards, and sums over the whole model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist


def is_sharded(x: Any) -> bool:
    """Whether ``x`` is a DTensor."""
    return hasattr(x, "_local_tensor") and hasattr(x, "placements")


def local(x: Any) -> Any:
    """The tensor that this process has of ``x``: of a DTensor its shard, else itself."""
    if not is_sharded(x):
        return x
    shard = x._local_tensor
    # A collective that gave it may not have ended.
    return shard if type(shard) is torch.Tensor else x.to_local()


def aligned(grad: Any, param: Any) -> Any:
    """A gradient laid over the processes as its parameter is."""
    if is_sharded(grad) and is_sharded(param) and tuple(grad.placements) != tuple(param.placements):
        return grad.redistribute(param.device_mesh, param.placements)
    return grad


def group_of(group: Any) -> Any:
    """A process group, or the one that a name stands for."""
    if group == "world":
        return dist.group.WORLD
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"norm_group: expected a process group or 'world', got {group!r}")
    return group


class Whole:
    """Sums over the whole model of what each process has summed over its part.

    Every process must ask for the same sums in the same order, whichever of its shards are empty.

    Parameters
    ----------
    params : sequence of tensors
        As the optimizer has them.
    group : ProcessGroup, optional
        One whose members hold different parameters, over which totals are added up, too.
    """

    def __init__(self, params: Sequence[Any], group: Any) -> None:
        self._group = group
        self._device = local(params[0]).device if params else torch.device("cpu")
        self._shards_of = [_shard_groups(p) for p in params]  # by parameter: the groups over which its shards lie
        self._groups = list(dict.fromkeys(g for groups in self._shards_of for g in groups))

    def __bool__(self) -> bool:
        return bool(self._groups) or self._group is not None

    def total(self, squares: Sequence[float], nonfinite: int) -> tuple[float, int]:
        """The sum of squares, from those by parameter, and the count of what is not finite.

        The count is exact where all parameters lie alike; else what several processes have may be counted by each.
        """
        sums = dict.fromkeys(self._shards_of, 0.0)
        for groups, square in zip(self._shards_of, squares, strict=True):
            sums[groups] += square
        for group in self._groups:
            shared = [groups for groups in sums if group in groups]
            *totals, count = self._added([*(sums[groups] for groups in shared), nonfinite], group)
            sums.update(zip(shared, totals, strict=True))
            nonfinite = int(count)
        square = sum(sums.values())
        if self._group is not None:
            square, count = self._added([square, nonfinite], self._group)
            nonfinite = int(count)
        return square, nonfinite

    def by_param(self, kinds: Sequence[Sequence[float]]) -> list[list[float]]:
        """Several kinds of sums by parameter, each of the whole parameter."""
        rows = [list(row) for row in zip(*kinds, strict=True)]
        for group in self._groups:
            shared = [i for i, groups in enumerate(self._shards_of) if group in groups]
            totals = iter(self._added([x for i in shared for x in rows[i]], group))
            for i in shared:
                rows[i] = [next(totals) for _ in rows[i]]
        return [list(kind) for kind in zip(*rows, strict=True)] if rows else [[] for _ in kinds]

    def _added(self, numbers: Sequence[float], group: Any) -> list[float]:
        """Each number summed over the members of a group."""
        t = torch.tensor(numbers, dtype=torch.float64, device=self._device)
        dist.all_reduce(t, group=group)
        return t.tolist()  # type: ignore[no-any-return]


def _shard_groups(x: Any) -> tuple[Any, ...]:
    if not is_sharded(x):
        return ()
    return tuple(x.device_mesh.get_group(i) for i, placement in enumerate(x.placements) if not placement.is_replicate())
