"""What the engine needs of an optimizer, made ready once and used as long as the optimizer holds the same objects."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from operator import is_
from typing import Any

import numpy as np
import torch

from fastgd import arrays, devices, engine, onepass, optimizers, tensors
from fastgd.torch import sharded

Pairs = list[tuple[torch.Tensor, torch.Tensor]]


class Plan:
    """A step over the tensors themselves, which the engine reads anew each time.

    Parameters
    ----------
    optimizer : OnePassOptimizer
        Whose groups and state these are; nothing of it is changed but its state.
    """

    def __init__(self, optimizer: Any) -> None:
        self.state = optimizer.state
        self.groups = optimizer.param_groups
        self.rule = optimizer._rule_of_groups()
        self._counts: bool = optimizer._counts
        self._state_dtype: torch.dtype | None = optimizer._state_dtype
        self.params: list[Any] = [p for group in self.groups for p in group["params"]]
        self._group_of = [i for i, group in enumerate(self.groups) for _ in group["params"]]
        names = [name for group in self.groups for name in group.get("param_names", ())]
        self.names: Sequence[Any] = names if len(names) == len(self.params) else range(len(self.params))
        self._sharded = [p for p in self.params if sharded.is_sharded(p)]  # and their states
        self._shards = [sharded.local(p) for p in self._sharded]
        self._norm_group = optimizer.one_pass["norm_group"]
        self.whole = sharded.Whole(self.params, sharded.group_of(self._norm_group))
        self.local = [sharded.local(p) for p in self.params]
        self._engine = engine_of(optimizer)
        self._on_gpu = self._engine is not engine.active
        if self._on_gpu and any(group.get("capturable") for group in self.groups):
            raise ValueError(
                "capturable: expected False on a GPU, got True; torch's state counts the steps on the host here; "
                "fastgd's own classes have capturable=True"
            )
        self._with_momentum = self._momentum()
        self._made: list[tuple[Any, list[str]]] = []  # states that this step has made: parameter and keys
        self.ema, self.tracked = self._place_averages(optimizer._ema[0] if optimizer._ema else [])
        self._prepare()

    def _prepare(self) -> None:
        self._snapshot: Any = None
        self._owners: dict[int, Any] = {}
        for kind in {type(p) for p in self.local}:
            tensors.learn(kind, self._engine)
        self._prepared = self._engine.Prepared(self.rule._rule, True)
        self._shows_counts = not self._on_gpu
        self._count_versions = self._versions_of_counts() if self._on_gpu else []
        self._add(self.local)

    def _add(self, params: Sequence[Any]) -> None:
        """Give the engine the parameters, and the step counts that the state has."""
        for i, p in zip(self._group_of, params, strict=True):
            self._add_one(i, p)
        self._prepared.load([self._steps_of(p) for p in self.params])

    def _add_one(self, group: int, p: Any) -> None:
        try:
            self._prepared.add(group, [p])
        except TypeError:  # what cannot be read is nothing to mind as long as it has no gradient
            self._prepared.add(group, [np.empty(0)])

    def holds(self, optimizer: Any) -> bool:
        """Whether the optimizer still has all that this was made from."""
        if optimizer.state is not self.state or optimizer.param_groups is not self.groups:
            return False
        if optimizer.one_pass["norm_group"] is not self._norm_group or optimizer._rule_of_groups() is not self.rule:
            return False
        return (
            self._snapshot is not None
            and self._snapshot.same(self.state, self.groups)
            and all(map(is_, map(sharded.local, self._sharded), self._shards))
            and self._with_momentum == self._momentum()
            and (self._shows_counts or self._count_versions == self._versions_of_counts())
        )

    def _versions_of_counts(self) -> list[int]:
        """Which change where a count is changed in place, and not by a step here."""
        return [state["step"]._version for state in self.state.values() if _is_count(state.get("step"))]

    def _momentum(self) -> list[bool]:
        """Of the groups of a class that keeps no count: where momentum is new, the next step is the first."""
        return [] if self._counts else [bool(group.get("momentum")) for group in self.groups]

    def gradients(self) -> list[Any]:
        """The gradients, or this process's parts of them."""
        grads = [p.grad for p in self.params]
        if self._sharded:
            grads = [sharded.local(sharded.aligned(g, p)) for g, p in zip(grads, self.params, strict=True)]
        return grads

    def step(self, grads: list[Any], ask: onepass.Ask | None) -> Any:
        """What ``Prepared.step`` returns; False where something needs a closer look, and nothing has changed."""
        result = self._prepared.step(grads, self._row, self._initialise, False, ask)
        if self._snapshot is None:
            self._snapshot = engine.active.Snapshot(self.state, self.groups)
        return result

    def forget_new_states(self) -> None:
        """After a step that moved nothing: with a state, the next would not be the first."""
        for p, keys in self._made:
            for key in keys:
                self.state[p].pop(key, None)
            if not self.state[p]:
                del self.state[p]
        if self._made:
            self._snapshot = None
            self._made.clear()

    def settle(self, grads: list[Any], zero_grads: bool, skipped: bool) -> None:
        """What is left to do when a step has ended."""
        if skipped:
            self.forget_new_states()
            if zero_grads:  # else what is not finite stays in them, and every step to come is skipped
                for g in grads:
                    if g is not None:
                        g.zero_()
        elif self._counts and not self._shows_counts:
            counts = [self.state[p]["step"] for p, g in zip(self.params, grads, strict=True) if g is not None]
            if counts:
                torch._foreach_add_(counts, 1)
            self._count_versions = self._versions_of_counts()
        self._made.clear()
        for p in self._sharded:  # the engine knew their shards
            if p.grad is None:
                continue
            if not skipped:
                torch.autograd.graph.increment_version(p)
            if zero_grads and tuple(p.grad.placements) != tuple(p.placements):  # a copy was read and zeroed
                p.grad.zero_()

    def _row(self, index: int, step: int) -> Any:
        group = self.groups[index]
        lr = _number(group["lr"])
        if type(lr) is float and -1e-9 < lr < 0:  # where a schedule that ends at zero may end, and torch does not mind
            lr = 0.0
        if "betas" in group:
            group = {**group, "betas": tuple(map(_number, group["betas"]))}
        if group.get("nesterov") and not group["momentum"]:  # of which torch then makes a plain step
            group = {**group, "nesterov": False}
        return self.rule._row_of(group, step, lr)

    def _initialise(self, index: int, variant: int) -> tuple[Any, ...]:
        """The states of a parameter, new ones where it has none, and its count: called by the engine."""
        keys = self.rule._keys(variant)
        if not keys and not self._counts:
            return ()
        p = self.params[index]
        state = self.state[p]
        before = set(state)
        self._snapshot = None
        if self._counts and not _is_count(state.get("step")):
            dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32  # as torch
            state["step"] = torch.tensor(float(state.get("step", 0)), dtype=dtype, device="cpu")
        for key in keys:
            if state.get(key) is None:
                if self._counts and state["step"] and self.rule._states[key] is None:
                    raise ValueError(
                        f"state: expected {key!r} beside a step of {state['step']:g} for parameter {index}, got none; "
                        "load a whole state, or clear what is there"
                    )
                fill = self.rule._fill(self.groups[self._group_of[index]])
                state[key] = torch.full_like(p, fill, dtype=self._state_dtype, requires_grad=False)
        self._made.append((p, [key for key in state if key not in before]))
        states = [sharded.local(state[key]) for key in keys]
        for key, local in zip(keys, states, strict=True):
            if local is not state[key]:
                self._sharded.append(state[key])
                self._shards.append(local)
        if self._counts and self._shows_counts:
            states.append(state["step"])
        # An owner in C++: where Python is the only one, torch takes twice as long to show a tensor.
        with suppress(BufferError, AttributeError):  # a state that the engine will not read either
            self._owners[index] = [x.__dlpack__() for x in states]
        return tuple(states)

    def _steps_of(self, p: Any) -> int:
        state = self.state.get(p)
        if not state:
            return 0
        if not self._counts:  # with a state the next is not the first
            return int(any(value is not None for value in state.values()))
        return optimizers._read_step("state['step']", state.get("step", 0))

    def _place_averages(self, pairs: Pairs) -> tuple[list[Any] | None, tuple[list[Any], list[Any]] | None]:
        """The averages of the parameters, None where one has none; and the other tensors with theirs."""
        if not pairs:
            return None, None
        ema: list[Any] = [None] * len(self.params)
        index_of = {place(p): i for i, p in enumerate(self.local) if p.numel()}
        others: list[Any] = []
        for tensor, average in pairs:
            source, target = sharded.local(tensor), sharded.local(average)
            i = index_of.get(place(source))
            if i is not None and source.numel():
                ema[i] = target
            elif source.numel():
                others.append((source, target))
        tracked = ([source for source, _ in others], [target for _, target in others])
        return (ema if any(e is not None for e in ema) else None), tracked


class ViewedPlan(Plan):
    """One step over NumPy's views of the tensors, each checked: for what is odd, and to say what is wrong with it."""

    def _prepare(self) -> None:
        self._labels = [
            f"param_groups[{g}]['params'][{i}]"
            for g, group in enumerate(self.groups)
            for i in range(len(group["params"]))
        ]
        self._place = None if self._on_gpu else devices.HOST
        self._views = [self._view(*entry) for entry in zip(self._labels, self.params, self.local, strict=True)]
        self._owners = {}
        self._prepared = self._engine.Prepared(self.rule._rule)
        self._shows_counts = False
        self._add(self._views)

    def _view(self, label: str, p: Any, local: Any) -> Any:
        try:
            view = arrays.check_params([label], [local], self._place)[0]
            self._place = devices.place(view)
            return view
        except (TypeError, ValueError):
            if p.grad is not None:
                raise
            return np.empty(0)

    def step(self, grads: list[Any], ask: onepass.Ask | None) -> Any:
        ask = ask or onepass.NOTHING
        labels = [f"{label}.grad" for label in self._labels]
        grads = [g.resolve_neg() if g is not None and not ask.zero_grads and g.is_neg() else g for g in grads]
        views = arrays.check_grads(labels, self._views, grads, ask.zero_grads)
        written = list(zip(self._labels, self._views, strict=True))
        read: list[tuple[str, Any]] = []
        (written if ask.zero_grads else read).extend(
            (label, g) for label, g in zip(labels, views, strict=True) if g is not None
        )
        for label, p, view in zip(self._labels, self.params, self._views, strict=True):
            for key, value in self.state.get(p, {}).items() if p.grad is not None else ():
                if key in self.rule._states and value is not None:
                    label_of = f"the state {key!r} of {label}"
                    written.append((label_of, arrays.check_state(label_of, view, sharded.local(value))))
        plain = ask
        if ask.ema is not None:
            labels = [f"the average of {label}" for label in self._labels]
            entries = zip(labels, self._views, ask.ema, strict=True)
            ema = [None if e is None else arrays.check_ema(label, p, e) for label, p, e in entries]
            written += [(label, e) for label, e in zip(labels, ema, strict=True) if e is not None]
            plain = plain._replace(ema=ema)
        if ask.copies is not None:
            labels = [f"copies[{i}]" for i in range(len(self.params))]
            copies = [arrays.check_copy(*entry) for entry in zip(labels, self._views, ask.copies, strict=True)]
            written += zip(labels, copies, strict=True)
            plain = plain._replace(copies=copies)
        if ask.tracked is not None:
            sources = [arrays.check_array("a tracked tensor", x, place=self._place) for x in ask.tracked[0]]
            averages = [
                arrays.check_ema("the average of a tracked tensor", x, e)
                for x, e in zip(sources, ask.tracked[1], strict=True)
            ]
            read += [("a tracked tensor", x) for x in sources]
            written += [("the average of a tracked tensor", e) for e in averages]
            plain = plain._replace(tracked=(sources, averages))
        arrays.check_memory(written, read)
        if self._on_gpu:
            plain = plain._replace(stream=devices.stream_for(self._views[0], ask.stream))
        result = self._prepared.step(views, self._row, self._initialise, True, plain)
        if result is False:
            raise RuntimeError(f"{self.rule._rule}: the engine refused tensors that were checked; please report this")
        if onepass.may_have_moved(result):
            stepped = [p for p, g in zip(self.params, grads, strict=True) if g is not None]
            tensors.wrote([stepped, ask.ema, ask.copies, ask.tracked and ask.tracked[1], *[grads] * ask.zero_grads])
        return result

    def _initialise(self, index: int, variant: int) -> tuple[Any, ...]:
        return tuple(arrays.check_array("state", x, place=self._place) for x in super()._initialise(index, variant))


def engine_of(optimizer: Any) -> Any:
    """The module for where the parameters lie."""
    first = next((sharded.local(p) for group in optimizer.param_groups for p in group["params"]), None)
    return devices.engine_of([first], engine.active)


def direct(optimizer: Any) -> bool:
    """Whether the engine reads tensors itself: it is a compiled one, and torch has the exchange API."""
    return tensors.learn(torch.Tensor, engine_of(optimizer))


def _is_count(value: Any) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.ndim == 0
        and value.device.type == "cpu"
        and value.dtype in (torch.float32, torch.float64)
    )


def _number(x: Any) -> Any:
    """A hyperparameter, which may be a tensor of one element."""
    return x.item() if isinstance(x, torch.Tensor) else x


def place(x: Any) -> tuple[Any, ...]:
    """Where a tensor lies: two that lie alike are one, as a parameter and its entry in a state dict are."""
    return x.data_ptr(), x.dtype, tuple(x.shape), x.stride()
