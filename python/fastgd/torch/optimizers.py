"""torch.optim's classes with their step replaced by one call into the engine."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, TypeAlias

import numpy as np
import torch

from fastgd import coefficients, onepass, optimizers
from fastgd.stats import StepStats, total
from fastgd.torch import amp, sharded
from fastgd.torch.plan import Plan, ViewedPlan, direct, place

Pairs: TypeAlias = Iterable[tuple[torch.Tensor, torch.Tensor]] | Mapping[torch.Tensor, torch.Tensor]


class OnePassOptimizer(torch.optim.Optimizer):
    """What the classes share: torch.optim's everything, but one call into the engine for a step.

    A class names the one of ``fastgd`` that has its rule, and derives from torch's class of the same name, whose
    arguments, groups, state and state dicts it keeps.

    Parameters
    ----------
    *args, **keywords
        torch's. ``foreach``, ``fused`` and ``capturable`` change nothing, ``differentiable`` is refused.
    max_norm : float, optional
        The L2 norm, over all parameters of the optimizer, to which gradients are clipped in each step. Of sharded
        parameters (DTensor) it is the norm of the whole model.
    skip_nonfinite : bool
        Leave a step out where any gradient holds NaN or inf: nothing moves and nothing is counted.
    zero_grads : bool
        Leave zeros in the gradients after each step, one that was skipped too; ``zero_grad`` need not be called then.
    stats : bool
        Measure each step: `last_stats`. Of sharded parameters the norms are of the whole; with `norm_group` they are of
        this process's parameters.
    copies : sequence of tensors, optional
        One a parameter, which takes the new values, rounded: a bfloat16 model of float32 master weights.
    norm_group : ProcessGroup or "world", optional
        Where the members of a group hold different parameters, as under ``ZeroRedundancyOptimizer``: `max_norm` and
        `skip_nonfinite` are of all of them then. A name can be pickled, which a group cannot.
    state_dtype : torch.dtype, optional
        dtype of new state, such as float32 beside bfloat16 parameters; by default that of the parameter.

    Attributes
    ----------
    one_pass : dict
        `max_norm` to `norm_group`, which may be changed between steps.
    last_stats : StepStats or None
        Of the last step, where it was asked for ``stats`` or ``skip_nonfinite`` or had a GradScaler.
    ema_updates : int
        How often the averages of `track_ema` have been updated.

    Notes
    -----
    A ``GradScaler`` may call the step, ``scaler.step(opt)``, and then reads all gradients once before it does;
    ``opt.step(scaler=scaler)`` has the same effect in the one pass.
    """

    _numpy: ClassVar[type[optimizers.Optimizer]]
    _counts: ClassVar[bool] = True  # whether torch keeps a step count in the state
    _step_supports_amp_scaling = True  # a GradScaler leaves unscaling to the step

    # Also what an unpickled optimizer starts from.
    last_stats: StepStats | None = None
    ema_updates: int = 0
    _ema: tuple[list[tuple[torch.Tensor, torch.Tensor]], Any] | None = None
    _plan: Plan | None = None

    def __init__(
        self,
        *args: Any,
        max_norm: float | None = None,
        skip_nonfinite: bool = False,
        zero_grads: bool = False,
        stats: bool = False,
        copies: Iterable[torch.Tensor] | None = None,
        norm_group: Any = None,
        state_dtype: torch.dtype | None = None,
        **keywords: Any,
    ) -> None:
        self.one_pass: dict[str, Any] = dict(
            max_norm=max_norm,
            skip_nonfinite=skip_nonfinite,
            zero_grads=zero_grads,
            stats=stats,
            copies=None if copies is None else list(copies),
            norm_group=norm_group,
        )
        onepass.read(type(self).__name__, {"max_norm": max_norm})
        if state_dtype is not None and state_dtype not in _DTYPES:
            raise TypeError(f"state_dtype: expected one of {_DTYPES} or None, got {state_dtype!r}")
        self._state_dtype = state_dtype
        super().__init__(*args, **keywords)
        if state_dtype is not None:
            for state in self.state.values():  # Adagrad's class has made them
                for key in self._numpy._states:
                    state[key] = state[key].to(state_dtype)

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if len(cls.__bases__) == 2 and cls.__bases__[0] is OnePassOptimizer:  # with a class of torch's
            signature, every = inspect.signature(cls.__bases__[1]), inspect.signature(OnePassOptimizer).parameters
            own = [parameter for parameter in every.values() if parameter.kind is parameter.KEYWORD_ONLY]
            cls.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *own])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, as torch does; complex tensors and ``differentiable`` are refused."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            if group.get("differentiable"):
                raise ValueError(
                    "differentiable: expected False, got True; a step in place has no derivative, "
                    "torch.optim's classes have one"
                )
            for i, p in enumerate(group["params"]):
                if not p.dtype.is_floating_point:
                    raise TypeError(
                        f"param_groups[{len(self.param_groups) - 1}]['params'][{i}]: expected a tensor of real "
                        f"numbers, got dtype {p.dtype}; of a complex one pass torch.view_as_real(p)"
                    )
        except Exception:
            self.param_groups.pop()
            raise
        self._plan = None

    def track_ema(
        self,
        tensors: Pairs | None,
        decay: float | Callable[[int], float] | None = None,
        *,
        updates: int = 0,
    ) -> None:
        """Keep moving averages of tensors, updated in each step: ``average += (1 - decay) * (tensor - average)``.

        Those that are parameters of this optimizer are averaged in the step's pass, others, such as buffers and
        frozen parameters, in the same call. A step that is skipped averages nothing. Averages and `ema_updates` are the
        caller's to save; restore them last, for ``torch.distributed.checkpoint`` makes an optimizer's state by a step.

        Parameters
        ----------
        tensors : iterable of (tensor, average), or dict of average by tensor, or None
            Of floating point and the same shapes, such as ``zip(model.parameters(), averaged.parameters())``. None
            ends the averaging.
        decay : float or callable
            The share that the averages keep, in [0, 1], or a function to it from the 1-based number of the update.
        updates : int
            How many updates were made before, for a resume.

        Raises
        ------
        TypeError, ValueError
            What is no pair of such tensors, or a tensor or an average that comes twice.
        """
        if tensors is None:
            self._ema, self.ema_updates, self._plan = None, updates, None
            return
        pairs = list(tensors.items() if isinstance(tensors, Mapping) else tensors)
        seen: dict[Any, Any] = {}
        kept = []
        for i, pair in enumerate(pairs):
            label = f"tensors[{i}]"
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                raise TypeError(f"{label}: expected a pair (tensor, average), got {type(pair).__name__}")
            tensor, average = pair
            for x in pair:
                if not isinstance(x, torch.Tensor) or not x.is_floating_point():
                    got = f"dtype {x.dtype}" if isinstance(x, torch.Tensor) else type(x).__name__
                    raise TypeError(f"{label}: expected two tensors of floating point, got {got}; leave it out")
            if tensor.shape != average.shape:
                raise ValueError(
                    f"{label}: expected an average of shape {tuple(tensor.shape)}, as its tensor has, "
                    f"got {tuple(average.shape)}"
                )
            source, target = (place(sharded.local(x)) for x in pair)
            if tensor.numel() and seen.get(source) == target:  # tied tensors, under two names
                continue
            if tensor.numel() and source in seen:
                raise ValueError(f"{label}: expected each tensor once, got one that has an average already")
            seen[source] = target
            kept.append((tensor, average))
        if not callable(decay):
            _weight(decay)
        self._ema, self.ema_updates, self._plan = (kept, decay), updates, None

    def step(self, closure: Callable[[], Any] | None = None, *, scaler: Any = None) -> Any:
        """Update every parameter that has a gradient, and its state, in place.

        Parameters
        ----------
        closure : callable, optional
            Evaluates the model again and returns the loss.
        scaler : torch.amp.GradScaler, optional
            That scaled the loss. The gradients are unscaled and checked in the same pass, a step with NaN or inf in
            them is skipped, and the scaler is told: in place of ``scaler.unscale_(opt)``, clipping and
            ``scaler.step(opt)``. ``scaler.update()`` remains to be called.

        Returns
        -------
        object
            What `closure` returned, else None.

        Raises
        ------
        TypeError
            A parameter or gradient that is no dense tensor of real numbers on the CPU, by name.
        ValueError
            Tensors that overlap, a hyperparameter out of range. Nothing has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            (self._step_uncompiled if torch.compiler.is_compiling() else self._step)(scaler)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was called, to the bit.

        Parameters
        ----------
        state_dict : dict
            Of this class or of torch's or ``fastgd``'s class of the same name. States are copied, and keep
            the dtype that they were saved with, unless the parameter's (or ``state_dtype``) is wider; torch's own
            method recasts them all to the parameter's.
        """
        saved: dict[str, Any] = {}

        def before(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
            saved.update(state_dict)
            saved["state"] = {key: _as_tensors(entry) for key, entry in state_dict["state"].items()}
            return saved

        def after(_: Any) -> None:
            ids = [i for group in saved["param_groups"] for i in group["params"]]
            params = [p for group in self.param_groups for p in group["params"]]
            for i, p in zip(ids, params, strict=True):
                for key, value in saved["state"].get(i, {}).items():
                    loaded = self.state[p].get(key)
                    if not isinstance(loaded, torch.Tensor) or not isinstance(value, torch.Tensor):
                        continue
                    dtype = loaded.dtype
                    if key in self._numpy._states:
                        dtype = torch.promote_types(value.dtype, self._state_dtype or p.dtype)
                    if loaded is value or loaded.dtype != dtype:
                        self.state[p][key] = value.detach().to(loaded.device, dtype, copy=True)

        hooks = [
            self.register_load_state_dict_pre_hook(before),  # after the user's
            self.register_load_state_dict_post_hook(after, prepend=True),  # before the user's
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def __getstate__(self) -> dict[str, Any]:
        own = ("one_pass", "ema_updates", "_ema", "_state_dtype")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plan = None

    def _step(self, scaler: Any) -> None:
        plan = self._plan
        if plan is None or not plan.holds(self):
            plan = self._plan = Plan(self) if direct(self) else None
        plan = plan or ViewedPlan(self)  # for one step only
        try:
            ask = self._ask(plan, amp.scale_and_found(self, scaler))
            grads = plan.gradients()
            result = plan.step(grads, ask)
            if result is False:
                self._plan, plan = None, ViewedPlan(self)
                result = plan.step(grads, ask)
        except BaseException:
            plan.forget_new_states()
            self._plan = None
            for name in ("grad_scale", "found_inf"):  # a GradScaler's, which does not clear them then
                self.__dict__.pop(name, None)
            raise
        if ask is not None and (ask.skip_nonfinite or plan.whole) and not isinstance(result, (bool, tuple)):
            result = result.fetch()  # waits for the GPU: torch's state counts no step that was skipped
        skipped = isinstance(result, tuple) and result[0]
        plan.settle(grads, ask is not None and ask.zero_grads, skipped)
        if ask is not None and ask.tracked is not None and not skipped:
            self.ema_updates += 1
        if scaler is not None and scaler.is_enabled():
            amp.tell(self, scaler, skipped)
        self.last_stats = self._stats(plan, grads, result, ask) if ask is not None and result is not True else None

    _step_uncompiled = torch._disable_dynamo(_step)  # torch.compile breaks its graph here

    def _rule_of_groups(self) -> type[optimizers.Optimizer]:
        """The class of ``fastgd`` that has the rule of all groups."""
        if self._numpy not in (optimizers.Adam, optimizers.AdamW):
            return self._numpy
        # torch's Adam and AdamW are told apart by this, where it is not too old.
        decoupled = {
            group.get("decoupled_weight_decay", self._numpy is optimizers.AdamW) for group in self.param_groups
        }
        if len(decoupled) > 1:
            raise ValueError(
                "decoupled_weight_decay: expected the same in all groups, got True and False; "
                "use two optimizers, Adam and AdamW"
            )
        return optimizers.AdamW if True in decoupled else optimizers.Adam

    def _ask(self, plan: Plan, scaling: tuple[float, bool] | None) -> onepass.Ask | None:
        """What is asked for beside the step; None for nothing."""
        if scaling is None and self._ema is None and self.one_pass == _NOTHING:
            return None
        scale, found = scaling or (1.0, False)
        own: Any = {**self.one_pass, "grad_scale": scale}
        copies, _ = own.pop("copies"), own.pop("norm_group")
        own["skip_nonfinite"] = own["skip_nonfinite"] or scaling is not None
        ask = onepass.read(f"{type(self).__name__}.step", own)
        if copies is not None:
            if len(copies) != len(plan.params):
                raise ValueError(f"copies: expected {len(plan.params)} tensors, one a parameter, got {len(copies)}")
            ask = ask._replace(copies=[sharded.local(copy) for copy in copies])
        if self._ema is not None:
            decay = self._ema[1]
            weight = _weight(decay(self.ema_updates + 1) if callable(decay) else decay)
            ask = ask._replace(ema=plan.ema, ema_weight=weight, tracked=plan.tracked)
        if plan.whole or found:

            def reduce(squares: list[float], nonfinite: int) -> tuple[float, int]:
                nonfinite += found
                return plan.whole.total(squares, nonfinite) if plan.whole else (total(squares), nonfinite)

            ask = ask._replace(reduce=reduce)
        return ask

    def _stats(self, plan: Plan, grads: list[Any], result: Any, ask: onepass.Ask) -> StepStats:
        if plan.whole and ask.stats:
            skipped, nonfinite, clip_factor, *squares = result
            squares = plan.whole.by_param(squares)
            if ask.max_norm is None and not ask.skip_nonfinite:
                nonfinite = plan.whole.total([0.0] * len(plan.params), nonfinite)[1]
            result = (skipped, nonfinite, clip_factor, *squares)
        return StepStats(plan.names, grads, result, ask.stats)


class SGD(OnePassOptimizer, torch.optim.SGD):
    """torch.optim.SGD in one pass; see `OnePassOptimizer` for what it takes beside torch's arguments."""

    _numpy = optimizers.SGD
    _counts = False


class Adam(OnePassOptimizer, torch.optim.Adam):
    """torch.optim.Adam in one pass; see `OnePassOptimizer` for what it takes beside torch's arguments."""

    _numpy = optimizers.Adam


class AdamW(OnePassOptimizer, torch.optim.AdamW):
    """torch.optim.AdamW in one pass; see `OnePassOptimizer` for what it takes beside torch's arguments."""

    _numpy = optimizers.AdamW


class Adagrad(OnePassOptimizer, torch.optim.Adagrad):
    """torch.optim.Adagrad in one pass; see `OnePassOptimizer` for what it takes beside torch's arguments."""

    _numpy = optimizers.Adagrad


class RMSprop(OnePassOptimizer, torch.optim.RMSprop):
    """torch.optim.RMSprop in one pass; see `OnePassOptimizer` for what it takes beside torch's arguments."""

    _numpy = optimizers.RMSprop


class Lion(OnePassOptimizer):
    """Lion (arXiv 2302.06675), which torch has not; see `OnePassOptimizer` for what it takes beside these arguments.

    Parameters
    ----------
    params : iterable of tensors, of (name, tensor), or of dict
        As in torch.optim.
    lr : float or tensor
        Learning rate, >= 0.
    betas : (float, float)
        Weights of the average in the step taken and in its own update, each in [0, 1).
    weight_decay : float
        Decoupled decay, >= 0.
    maximize : bool
        Step up the gradient instead of down.
    foreach, capturable, differentiable, fused
        As in torch.optim.
    """

    _numpy = optimizers.Lion
    _counts = False

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **one_pass: Any,
    ) -> None:
        coefficients.lion(lr, betas, weight_decay, maximize)
        defaults = dict(
            lr=lr,
            betas=betas,
            weight_decay=weight_decay,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
        super().__init__(params, defaults, **one_pass)


_NOTHING = {
    "max_norm": None,
    "skip_nonfinite": False,
    "zero_grads": False,
    "stats": False,
    "copies": None,
    "norm_group": None,
}
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def _weight(decay: Any) -> float:
    """What the new value counts in an average."""
    return 1.0 - coefficients.checked("decay", decay, lambda x: 0.0 <= x <= 1.0, "a number with 0 <= number <= 1")


def _as_tensors(entry: Any) -> Any:
    """The state of a parameter, with tensors where ``fastgd``'s own classes have arrays."""
    if not isinstance(entry, Mapping):
        return entry
    count = entry.get("step")
    tensors = {key: _as_tensor(x) if isinstance(x, np.ndarray) else x for key, x in entry.items()}
    return {**tensors, "step": torch.tensor(float(count))} if isinstance(count, np.ndarray) else tensors


def _as_tensor(a: np.ndarray[Any, Any]) -> torch.Tensor:
    if a.dtype.name == "bfloat16":  # which torch does not know from NumPy
        return torch.from_numpy(a.view(np.int16)).view(torch.bfloat16)
    return torch.as_tensor(a)
