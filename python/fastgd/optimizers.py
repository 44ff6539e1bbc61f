"""The optimizer classes: torch.optim's groups and state dicts around one prepared call into the engine."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Mapping, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import numpy as np

from fastgd import arrays, coefficients, devices, engine, onepass, tensors
from fastgd.arrays import Array, Arrays
from fastgd.onepass import OnePass
from fastgd.stats import StepStats

if TYPE_CHECKING:
    from typing_extensions import Unpack

Lr: TypeAlias = float | Callable[[int], float]
Params: TypeAlias = Arrays | Sequence[dict[str, Any]]


class Optimizer:
    """What the optimizers share: groups, the step, and saving and loading.

    A subclass names its rule and states and turns a group's hyperparameters into a row.

    Attributes
    ----------
    param_groups : list of dict
        One dict a group: ``params``, a list of its arrays, and its hyperparameters, which may be changed between
        steps. Groups are added by `add_param_group` only.
    defaults : dict
        The hyperparameters of a group that does not give its own.
    """

    _rule: ClassVar[str]
    _states: ClassVar[dict[str, str | None]]  # torch's key: the flag of the rule that calls for it, None for always
    _engine: ClassVar[Any] = engine.active

    def __init__(self, params: Params, defaults: dict[str, Any], state_dtype: Any, capturable: bool) -> None:
        self.defaults = defaults
        self.param_groups: list[dict[str, Any]] = []
        self._state_dtype = None if state_dtype is None else np.dtype(state_dtype)
        if self._state_dtype is not None:
            arrays.check_dtype("state_dtype", self._state_dtype)
        self._forms: list[arrays.Form] = []  # by group
        self._last_lr: list[Any] = []  # by group
        self._params: list[Array] = []  # by parameter, over all groups
        self._tensors: dict[int, Any] = {}  # those that came as tensors, by their index
        self._labels: list[str] = []
        self._names: Sequence[Hashable] = []  # what a StepStats calls them
        self._group_of: list[int] = []
        self._state: list[dict[str, Array]] = []
        if isinstance(params, (list, tuple, Mapping)) and not len(params):
            raise ValueError(f"params: expected at least one array, got {arrays.described(params)}")
        groups: Any = params if isinstance(params, (list, tuple)) and isinstance(params[0], Mapping) else None
        self._module = devices.engine_of(groups[0].get("params") if groups else params, self._engine)
        self._on_gpu = self._module is not self._engine
        self._capturable = bool(capturable)
        if self._capturable and not self._on_gpu:
            raise ValueError("capturable: expected parameters on a GPU, got some in the host's memory; leave it out")
        self._prepared = self._module.Prepared(self._rule, False, self._capturable)

        if groups:
            for group in groups:
                self.add_param_group(group)
        else:
            self._add_group({"params": params}, "params")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, for instance when layers are unfrozen.

        Parameters
        ----------
        param_group : dict
            ``params``, an array or a list, tuple or dict of arrays, and the hyperparameters that differ from the
            defaults.
        """
        label = f"param_groups[{len(self.param_groups)}]"
        if not isinstance(param_group, Mapping):
            raise TypeError(f"{label}: expected a dict with the key 'params', got {arrays.described(param_group)}")
        if "params" not in param_group:
            raise ValueError(f"{label}: expected the key 'params', got {list(param_group)}")
        self._add_group(param_group, f"{label}['params']")

    def step(self, grads: Any, **one_pass: Unpack[OnePass]) -> StepStats | None:
        """Update every parameter that has a gradient, and its state, in place.

        Parameters
        ----------
        grads : array, list, tuple or dict of arrays
            In the form of the parameters; with several groups a list of one entry a group, or one flat list. None
            skips a parameter: neither it, nor its state, nor its step count moves.
        **one_pass
            What to do in the same sweep: ``grad_scale``, ``max_norm``, ``skip_nonfinite``, ``ema`` with
            ``ema_decay``, ``copies``, ``zero_grads``, ``stats``; see `fastgd.onepass.OnePass`. ``ema`` and ``copies``
            have any form that `grads` may have.

        Returns
        -------
        StepStats or None
            With ``stats`` or ``skip_nonfinite``; else None.

        Raises
        ------
        TypeError
            Not an array, or an unsupported dtype.
        ValueError
            Shapes, lengths or forms that differ, gradients that overlap parameters or state, a hyperparameter out of
            range. Nothing has changed then.
        """
        if self._tensors:
            self._check_tensors()
        if one_pass:
            return self._one_pass(grads, one_pass)
        flat = self._listed(grads) if type(grads) is dict else grads
        if not self._prepared.step(flat, self._row, self._initialise, False):
            self._check_and_step(grads)
        if self._tensors:
            self._tell(grads)
        return None

    @property
    def state(self) -> dict[int, dict[str, Array]]:
        """State of each parameter that has stepped, by its index over all groups.

        The arrays are the live ones, under torch's names; ``step`` is a 0-d int64 copy of the count.
        """
        return {i: {"step": np.array(n, np.int64), **self._state[i]} for i, n in enumerate(self._prepared.steps) if n}

    def state_dict(self) -> dict[str, Any]:
        """All that a resume needs, in torch's layout.

        Returns
        -------
        dict
            ``state``: as the property, by index, arrays not copied. ``param_groups``: the groups, with the indices of
            their parameters as ``params``; for a callable ``lr`` the last value it gave.
        """
        groups = []
        first = 0
        for index, group in enumerate(self.param_groups):
            saved = {key: value for key, value in group.items() if key != "params"}
            if callable(saved["lr"]):
                last = self._last_lr[index]
                saved["lr"] = float(saved["lr"](1) if last is None else last)
            saved["params"] = list(range(first, first + len(group["params"])))
            first += len(group["params"])
            groups.append(saved)
        return {"state": self.state, "param_groups": groups}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was called, to the bit.

        Parameters
        ----------
        state_dict : dict
            From `state_dict` of this class or of torch's class of the same name. Arrays are copied and keep the dtype
            they were saved with. A group with a callable ``lr`` keeps it.

        Raises
        ------
        TypeError, ValueError
            Groups or shapes that differ, missing or unknown keys, unsupported dtypes, a step count that is no
            integer, a hyperparameter out of range. Nothing has changed then.
        """
        for key, kind in (("state", Mapping), ("param_groups", (list, tuple))):
            if not isinstance(state_dict, Mapping) or not isinstance(state_dict.get(key), kind):
                raise ValueError(
                    f"state_dict: expected a dict of a dict 'state' and a list 'param_groups', no {key!r} came"
                )
        saved_groups = state_dict["param_groups"]
        if len(saved_groups) != len(self.param_groups):
            raise ValueError(
                f"state_dict['param_groups']: expected {len(self.param_groups)} groups, got {len(saved_groups)}"
            )
        groups: list[dict[str, Any]] = []
        index_of: dict[Any, int] = {}
        for i, (group, saved) in enumerate(zip(self.param_groups, saved_groups, strict=True)):
            label = f"state_dict['param_groups'][{i}]"
            if not isinstance(saved, Mapping) or not isinstance(saved.get("params"), (list, tuple)):
                raise ValueError(f"{label}: expected a dict with a list 'params', got {saved!r}")
            if len(saved["params"]) != len(group["params"]):
                raise ValueError(
                    f"{label}['params']: expected {len(group['params'])} parameters, got {len(saved['params'])}"
                )
            for key in saved["params"]:
                if key in index_of:
                    raise ValueError(f"{label}['params']: expected each index once, got {key!r} twice")
                index_of[key] = len(index_of)
            new = {**group, **deepcopy({k: v for k, v in saved.items() if k != "params"})}
            self._check_group(new)
            if callable(group["lr"]):
                new["lr"] = group["lr"]
            groups.append(new)

        steps = [0] * len(self._params)
        states: list[dict[str, Array]] = [{} for _ in self._params]
        for key, entry in state_dict["state"].items():
            label = f"state_dict['state'][{key!r}]"
            if key not in index_of:
                raise ValueError(f"{label}: expected the index of a parameter in 'param_groups'")
            i = index_of[key]
            variant = self._row_of(groups[self._group_of[i]], 1, 0.0)[0]
            steps[i], states[i] = self._read_state(label, entry, self._params[i], self._keys(variant))

        self._prepared.load(steps)  # first: it refuses in the middle of a step
        for i, group in enumerate(self.param_groups):
            self._last_lr[i] = saved_groups[i].get("lr")
            group.update(groups[i])
        self._state[:] = states

    def __repr__(self) -> str:
        lines = [type(self).__name__ + " ("]
        for i, group in enumerate(self.param_groups):
            lines.append(f"Parameter Group {i}")
            lines += [f"    {key}: {group[key]}" for key in sorted(group) if key != "params"]
        return "\n".join(lines) + "\n)"

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["_prepared"] = self._prepared.steps
        del state["_module"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        given = [p for group in self.param_groups for p in group["params"]]
        self._params = arrays.check_params(self._labels, given, None if self._on_gpu else devices.HOST)
        self._module = devices.engine_of(given, self._engine)
        self._prepared = self._module.Prepared(self._rule, False, self._capturable)
        for group, p in zip(self._group_of, self._params, strict=True):
            self._prepared.add(group, [devices.readable(p)])
        self._prepared.load(state["_prepared"])

    @staticmethod
    def _row_of(group: Mapping[str, Any], step: int, lr: Any) -> coefficients.Row:
        """The row of a group's hyperparameters, with ``lr`` called already."""
        raise NotImplementedError

    @staticmethod
    def _fill(group: Mapping[str, Any]) -> float:
        """What a new state is filled with."""
        return 0.0

    def _check_group(self, group: Mapping[str, Any]) -> None:
        """Check hyperparameters by making a row of them; what a callable ``lr`` gives is checked in the step.

        A rate on a GPU is not looked at: that would wait for it.
        """
        lr = group["lr"]
        self._row_of(group, 1, 0.0 if callable(lr) or devices.is_on_gpu(lr) else lr)

    def _row(self, index: int, step: int) -> coefficients.Row | None:
        """The row of a group for one step count: called by the engine, in a step, before anything is written.

        For step 0, where a device counts: the hyperparameters, or None where they depend on the count.
        """
        group = self.param_groups[index]
        lr = group["lr"]
        if not callable(lr):
            if step == 0 and devices.is_on_gpu(lr):
                row = self._row_of(group, 0, 0.0)
                return (*row[:2], devices.number(f"param_groups[{index}]['lr']", lr), *row[3:])
            return self._row_of(group, step, lr)
        if self._capturable:
            raise ValueError(
                f"param_groups[{index}]['lr']: expected a number or a 0-d array with capturable, got a function, which "
                "no graph can call; pass a 0-d array on the GPU, and change it between replays"
            )
        if step == 0:
            return None
        lr = lr(step)
        row = self._row_of(group, step, lr)
        self._last_lr[index] = lr
        return row

    def _initialise(self, index: int, variant: int) -> tuple[Array, ...]:
        """The states of a parameter: called by the engine where it has none, or another number of them."""
        state = self._state[index]
        keys = self._keys(variant)
        for key in keys:
            if key not in state:
                dtype = self._state_dtype or self._params[index].dtype
                fill = self._fill(self.param_groups[self._group_of[index]])
                state[key] = devices.full_like(self._params[index], fill, dtype)
        if not self._on_gpu:
            return tuple(state[key] for key in keys)
        return tuple(devices.readable(devices.window(key, state[key], True)) for key in keys)

    @classmethod
    def _keys(cls, variant: int) -> list[str]:
        """The states that a variant of the rule needs, in the rule's order."""
        flags = cls._engine.RULES[cls._rule]["flags"]
        return [key for key, flag in cls._states.items() if flag is None or variant >> flags.index(flag) & 1]

    def _read_state(self, label: str, saved: Any, param: Array, needed: Sequence[str]) -> tuple[int, dict[str, Array]]:
        """Step count and states of one parameter from a state dict."""
        if not isinstance(saved, Mapping):
            raise TypeError(f"{label}: expected a dict, got {arrays.described(saved)}")
        unknown = [key for key in saved if key != "step" and key not in self._states]
        if unknown:
            raise ValueError(f"{label}: expected no keys but 'step' and {list(self._states)}, got {unknown[0]!r}")
        states = {}
        for key in self._states:
            value = saved.get(key)
            if value is None:  # as torch's SGD saves a buffer that it does not use
                continue
            a = arrays.check_array(f"{label}[{key!r}]", value, place=None if self._on_gpu else devices.HOST)
            if a.shape != param.shape:
                raise ValueError(f"{label}[{key!r}]: expected shape {param.shape}, got {a.shape}")
            states[key] = devices.copied_like(param, a)  # in the parameter's layout
        if "step" in saved:
            step = _read_step(f"{label}['step']", saved["step"])
        elif self._rule == "sgd":  # torch's SGD counts no steps: with a buffer the next is not the first
            step = 1 if states else 0
        else:
            raise ValueError(f"{label}: missing key 'step'")
        missing = [key for key in needed if key not in states]
        if step and missing:
            raise ValueError(f"{label}: missing key {missing[0]!r}")
        return step, states

    def _add_group(self, group: Mapping[str, Any], label: str) -> None:
        new = {**group, **{key: value for key, value in self.defaults.items() if key not in group}}
        form = arrays.Form(group["params"])
        labels = form.labels(label)
        given = form.flatten(label, group["params"])
        params = arrays.check_params(labels, given, self._place())
        arrays.check_memory([*zip(self._labels, self._params, strict=True), *zip(labels, params, strict=True)], [])
        self._check_group(new)
        new["params"] = given
        index = len(self.param_groups)
        self._prepared.add(index, [devices.readable(p) for p in params])
        self.param_groups.append(new)
        self._forms.append(form)
        self._last_lr.append(None)
        self._params += params
        first = len(self._labels)
        self._tensors.update((first + i, x) for i, x in enumerate(given) if tensors.is_tensor(x))
        self._labels += labels
        self._group_of += [index] * len(params)
        self._state += [{} for _ in params]
        keys = [key for form in self._forms for key in form.keys or ()]
        self._names = keys if len(set(keys)) == len(self._params) else range(len(self._params))

    def _place(self) -> str | None:
        """Where parameters lie; None as long as any GPU will do."""
        return devices.place(self._params[0]) if self._params else None if self._on_gpu else devices.HOST

    def _one_pass(self, grads: Any, one_pass: OnePass) -> StepStats | None:
        """A step with more than the step asked of it."""
        ask = onepass.read(f"{type(self).__name__}.step", one_pass)
        if ask.stream is not None and not self._on_gpu:
            raise ValueError(onepass.NO_STREAM)
        last_lr = list(self._last_lr)
        flat = self._listed(grads)
        flat_ask = ask._replace(ema=self._listed(ask.ema), copies=self._listed(ask.copies))
        result = self._prepared.step(flat, self._row, self._initialise, False, flat_ask)
        if result is False:
            result = self._check_and_step(grads, ask)
            flat = self._flatten("grads", grads)[1]
        if self._tensors and onepass.may_have_moved(result):
            self._tell(grads)
        if result is True:
            return None
        entries = flat if isinstance(flat, (list, tuple)) else [flat]
        stats = StepStats(self._names, entries, result, ask.stats)
        if self._last_lr != last_lr and stats.skipped:
            self._last_lr[:] = last_lr
        return stats

    def _check_and_step(self, grads: Any, ask: onepass.Ask = onepass.NOTHING) -> Any:
        """What the engine did not take as it came: raise what is wrong with it, or step it as plain lists."""
        labels, flat = self._flatten("grads", grads)
        checked = arrays.check_grads(labels, self._params, flat, ask.zero_grads)
        labelled_grads = [(label, g) for label, g in zip(labels, checked, strict=True) if g is not None]
        # Parameters and states again: their owner may have made one read-only since, or changed its shape.
        written = list(zip(self._labels, arrays.check_params(self._labels, self._params, self._place()), strict=True))
        for i, (param, state) in enumerate(zip(self._params, self._state, strict=True)):
            labelled = [(f"state[{i}][{key!r}]", a) for key, a in state.items()]
            written += [(label, arrays.check_state(label, param, a)) for label, a in labelled]
        given_ema = given_copies = None
        if ask.ema is not None:
            labels, given_ema = self._flatten("ema", ask.ema)
            ask = ask._replace(ema=[*map(arrays.check_ema, labels, self._params, given_ema)])
            written += zip(labels, ask.ema, strict=True)
        if ask.copies is not None:
            labels, given_copies = self._flatten("copies", ask.copies)
            ask = ask._replace(copies=[*map(arrays.check_copy, labels, self._params, given_copies)])
            written += zip(labels, ask.copies, strict=True)
        if ask.zero_grads:
            arrays.check_memory(written + labelled_grads, [])
        else:
            arrays.check_memory(written, labelled_grads)
        if self._on_gpu:
            ask = ask._replace(stream=devices.stream_for(self._params[0], ask.stream))
        result = self._prepared.step(checked, self._row, self._initialise, True, ask)
        if result is False:
            raise RuntimeError(
                f"{self._rule}: the arrays changed during the step, or this is a bug to report; nothing was stepped"
            )
        if onepass.may_have_moved(result):
            tensors.wrote([given_ema, given_copies, *[self._flatten("grads", grads)[1]] * ask.zero_grads])
        return result

    def _check_tensors(self) -> None:
        """A tensor may have been given other memory; what is stepped here is the memory that it had."""
        for i, x in self._tensors.items():
            p = self._params[i]
            if p.size and (x.data_ptr() != p.ctypes.data or tuple(x.shape) != p.shape):
                raise ValueError(
                    f"{self._labels[i]}: expected the memory that it had when the optimizer was made, got other; "
                    "make the optimizer anew, or use fastgd.torch"
                )

    def _tell(self, grads: Any) -> None:
        """Tell torch of the tensors that have been stepped."""
        flat = self._flatten("grads", grads)[1]
        tensors.wrote([[x for i, x in self._tensors.items() if flat[i] is not None]])

    def _listed(self, value: Any) -> Any:
        """A dict whose keys are the parameters', in their order, as the list that the engine takes."""
        if type(value) is dict and len(self._forms) == 1 and list(value) == self._forms[0].keys:
            return list(value.values())
        return value

    def _flatten(self, name: str, value: Any) -> tuple[list[str], list[Any]]:
        """Labels and entries of an argument, over all groups."""
        listed = isinstance(value, (list, tuple))
        nested = listed and any(isinstance(entry, (list, tuple, Mapping)) for entry in value)
        if nested and (len(self._forms) > 1 or len(value) == 1):  # an entry a group
            if len(value) != len(self._forms):
                raise ValueError(f"{name}: expected {len(self._forms)} entries, one a group, got {len(value)}")
            labels, flat = [], []
            for i, (form, entry) in enumerate(zip(self._forms, value, strict=True)):
                labels += form.labels(f"{name}[{i}]")
                flat += form.flatten(f"{name}[{i}]", entry, f"params of group {i}")
            return labels, flat
        form = self._forms[0]
        if listed or len(self._forms) > 1 or (form.kind == "list" and len(self._params) > 1):
            form = arrays.Form(self._params)
        elif not isinstance(value, Mapping) and len(self._params) == 1:
            form = arrays.Form(value)
        return form.labels(name), form.flatten(name, value)


class SGD(Optimizer):
    """Gradient descent with momentum; see `sgd_step` for the formula.

    Parameters
    ----------
    params : array, list, tuple or dict of arrays, or list of dict
        What to optimize; dicts are groups with ``params`` and hyperparameters of their own.
    lr : float or callable
        Learning rate, or a function from the 1-based step to it.
    momentum, dampening, weight_decay, nesterov, maximize
        As in `sgd_step`.
    state_dtype : dtype, optional
        dtype of the state; by default its parameter's.
    capturable : bool
        For arrays on a GPU: count the steps there, so that a CUDA graph of a step counts when it is replayed. ``lr``
        may then be a 0-d array there, which may be changed between replays.
    """

    _rule = "sgd"
    _states: ClassVar = {"momentum_buffer": "momentum"}

    def __init__(
        self,
        params: Params,
        lr: Lr,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        state_dtype: Any = None,
        capturable: bool = False,
    ) -> None:
        defaults = dict(
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            maximize=maximize,
        )
        super().__init__(params, defaults, state_dtype, capturable)

    @staticmethod
    def _row_of(group: Mapping[str, Any], step: int, lr: Any) -> coefficients.Row:
        return coefficients.sgd(
            step,
            lr,
            group["momentum"],
            group["dampening"],
            group["weight_decay"],
            group["nesterov"],
            group["maximize"],
        )


class Adam(Optimizer):
    """Adam and AMSGrad; see `adam_step` for the formula.

    Parameters
    ----------
    params : array, list, tuple or dict of arrays, or list of dict
        What to optimize; dicts are groups with ``params`` and hyperparameters of their own.
    lr : float or callable
        Learning rate, or a function from the 1-based step to it.
    betas, eps, weight_decay, maximize
        As in `adam_step`.
    amsgrad : bool
        Divide by the largest average of squares so far.
    state_dtype : dtype, optional
        dtype of the state; by default its parameter's.
    capturable : bool
        For arrays on a GPU: count the steps there, so that a CUDA graph of a step counts when it is replayed. ``lr``
        may then be a 0-d array there, which may be changed between replays.
    """

    _rule = "adam"
    _states: ClassVar = {"exp_avg": None, "exp_avg_sq": None, "max_exp_avg_sq": "amsgrad"}

    def __init__(
        self,
        params: Params,
        lr: Lr = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        state_dtype: Any = None,
        capturable: bool = False,
    ) -> None:
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad, maximize=maximize)
        super().__init__(params, defaults, state_dtype, capturable)

    @staticmethod
    def _row_of(group: Mapping[str, Any], step: int, lr: Any) -> coefficients.Row:
        return coefficients.adam(
            step, lr, group["betas"], group["eps"], group["weight_decay"], group["amsgrad"], group["maximize"]
        )


class AdamW(Optimizer):
    """AdamW: Adam with decoupled decay; see `adamw_step` for the formula.

    Parameters
    ----------
    params : array, list, tuple or dict of arrays, or list of dict
        What to optimize; dicts are groups with ``params`` and hyperparameters of their own.
    lr : float or callable
        Learning rate, or a function from the 1-based step to it.
    betas, eps, weight_decay, maximize
        As in `adamw_step`.
    amsgrad : bool
        Divide by the largest average of squares so far.
    state_dtype : dtype, optional
        dtype of the state; by default its parameter's.
    capturable : bool
        For arrays on a GPU: count the steps there, so that a CUDA graph of a step counts when it is replayed. ``lr``
        may then be a 0-d array there, which may be changed between replays.
    """

    _rule = "adamw"
    _states: ClassVar = {"exp_avg": None, "exp_avg_sq": None, "max_exp_avg_sq": "amsgrad"}

    def __init__(
        self,
        params: Params,
        lr: Lr = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        state_dtype: Any = None,
        capturable: bool = False,
    ) -> None:
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad, maximize=maximize)
        super().__init__(params, defaults, state_dtype, capturable)

    @staticmethod
    def _row_of(group: Mapping[str, Any], step: int, lr: Any) -> coefficients.Row:
        return coefficients.adamw(
            step, lr, group["betas"], group["eps"], group["weight_decay"], group["amsgrad"], group["maximize"]
        )


class Adagrad(Optimizer):
    """Adagrad; see `adagrad_step` for the formula.

    Parameters
    ----------
    params : array, list, tuple or dict of arrays, or list of dict
        What to optimize; dicts are groups with ``params`` and hyperparameters of their own.
    lr : float or callable
        Learning rate, or a function from the 1-based step to it.
    lr_decay, weight_decay, eps, maximize
        As in `adagrad_step`.
    initial_accumulator_value : float
        What the sums of squares start from, >= 0.
    state_dtype : dtype, optional
        dtype of the state; by default its parameter's.
    capturable : bool
        For arrays on a GPU: count the steps there, so that a CUDA graph of a step counts when it is replayed. ``lr``
        may then be a 0-d array there, which may be changed between replays.
    """

    _rule = "adagrad"
    _states: ClassVar = {"sum": None}

    def __init__(
        self,
        params: Params,
        lr: Lr = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        *,
        maximize: bool = False,
        state_dtype: Any = None,
        capturable: bool = False,
    ) -> None:
        defaults = dict(
            lr=lr,
            lr_decay=lr_decay,
            weight_decay=weight_decay,
            initial_accumulator_value=initial_accumulator_value,
            eps=eps,
            maximize=maximize,
        )
        super().__init__(params, defaults, state_dtype, capturable)

    @staticmethod
    def _row_of(group: Mapping[str, Any], step: int, lr: Any) -> coefficients.Row:
        return coefficients.adagrad(step, lr, group["lr_decay"], group["weight_decay"], group["eps"], group["maximize"])

    def _check_group(self, group: Mapping[str, Any]) -> None:
        super()._check_group(group)
        self._fill(group)

    @staticmethod
    def _fill(group: Mapping[str, Any]) -> float:
        return coefficients.non_negative("initial_accumulator_value", group["initial_accumulator_value"])


class RMSprop(Optimizer):
    """RMSprop, plain or centred, with or without momentum; see `rmsprop_step` for the formula.

    Parameters
    ----------
    params : array, list, tuple or dict of arrays, or list of dict
        What to optimize; dicts are groups with ``params`` and hyperparameters of their own.
    lr : float or callable
        Learning rate, or a function from the 1-based step to it.
    alpha, eps, weight_decay, momentum, centered, maximize
        As in `rmsprop_step`.
    state_dtype : dtype, optional
        dtype of the state; by default its parameter's.
    capturable : bool
        For arrays on a GPU: count the steps there, so that a CUDA graph of a step counts when it is replayed. ``lr``
        may then be a 0-d array there, which may be changed between replays.
    """

    _rule = "rmsprop"
    _states: ClassVar = {"square_avg": None, "grad_avg": "centered", "momentum_buffer": "momentum"}

    def __init__(
        self,
        params: Params,
        lr: Lr = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        *,
        capturable: bool = False,
        maximize: bool = False,
        state_dtype: Any = None,
    ) -> None:
        defaults = dict(
            lr=lr,
            alpha=alpha,
            eps=eps,
            weight_decay=weight_decay,
            momentum=momentum,
            centered=centered,
            maximize=maximize,
        )
        super().__init__(params, defaults, state_dtype, capturable)

    @staticmethod
    def _row_of(group: Mapping[str, Any], step: int, lr: Any) -> coefficients.Row:
        return coefficients.rmsprop(
            lr,
            group["alpha"],
            group["eps"],
            group["weight_decay"],
            group["momentum"],
            group["centered"],
            group["maximize"],
            step,
        )


class Lion(Optimizer):
    """Lion; see `lion_step` for the formula.

    Parameters
    ----------
    params : array, list, tuple or dict of arrays, or list of dict
        What to optimize; dicts are groups with ``params`` and hyperparameters of their own.
    lr : float or callable
        Learning rate, or a function from the 1-based step to it.
    betas, weight_decay, maximize
        As in `lion_step`.
    state_dtype : dtype, optional
        dtype of the state; by default its parameter's.
    capturable : bool
        For arrays on a GPU: count the steps there, so that a CUDA graph of a step counts when it is replayed. ``lr``
        may then be a 0-d array there, which may be changed between replays.
    """

    _rule = "lion"
    _states: ClassVar = {"exp_avg": None}

    def __init__(
        self,
        params: Params,
        lr: Lr = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        state_dtype: Any = None,
        capturable: bool = False,
    ) -> None:
        defaults = dict(lr=lr, betas=betas, weight_decay=weight_decay, maximize=maximize)
        super().__init__(params, defaults, state_dtype, capturable)

    @staticmethod
    def _row_of(group: Mapping[str, Any], step: int, lr: Any) -> coefficients.Row:
        return coefficients.lion(lr, group["betas"], group["weight_decay"], group["maximize"], step)


def _read_step(label: str, value: Any) -> int:
    """A step count, which torch saves as a 0-d float tensor."""
    number = coefficients.non_negative(label, value)
    try:
        step = operator.index(value)  # exact beyond 2**53 too
    except TypeError:
        step = int(number) if number.is_integer() else -1
    if not 0 <= step < 2**63 - 1:
        raise ValueError(f"{label}: expected an integer below 2**63 - 1, got {value!r}")
    return step
