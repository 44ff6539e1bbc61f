"""Ultralytics YOLO through the one pass: trained, step by step, resumed, and where it is left alone."""

import copy
import importlib.util
import logging
import re
import runpy
import shutil
import sys
import warnings
from pathlib import Path

import pytest

if importlib.util.find_spec("ultralytics") is None:  # looked for and not imported, for its settings come first
    pytest.skip("could not import 'ultralytics'", allow_module_level=True)

import torch
import yolo

import fastgd

# Of the losses of two trainings. Their steps differ in the last place only, but the gradient of a bias before a batch
# norm is nothing but rounding, and AdamW and its like make a step of full size of it. So each step is compared, too.
LOSS_RTOL = 1e-2
EXAMPLE = Path(__file__).parents[1] / "examples" / "ultralytics_yolo.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where all is written that Ultralytics writes."""
    return tmp_path_factory.mktemp("ultralytics")


@pytest.fixture(scope="module")
def accelerate(folder):
    """The callback, with Ultralytics imported as a test can have it."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        yolo.load(folder / "settings", monkeypatch)
        yield pytest.importorskip("fastgd.ultralytics").accelerate


@pytest.fixture
def train(accelerate, folder, tmp_path, monkeypatch):
    """train(fast, model, callbacks, **settings): as `yolo.train`, with the callback or without."""
    monkeypatch.chdir(tmp_path)
    data = folder / "data" / "data.yaml"
    if not data.exists():
        yolo.make_images(data.parent)
    runs = iter(range(100))

    def run(fast, model="yolo26n.yaml", callbacks=(("on_train_start", compare_steps),), **settings):
        if fast:
            callbacks = [("on_train_start", accelerate), *callbacks]
        settings = {**yolo.QUICK, "data": str(data), "project": str(tmp_path), "name": f"run{next(runs)}", **settings}
        return yolo.train(model, callbacks, **settings)

    return run


@pytest.fixture
def ready(train):
    """ready(fast, **settings): a trainer of Ultralytics' own making, as it stands at its first batch."""

    def stop(trainer):
        raise yolo.Stopped

    return lambda fast, **settings: train(fast, callbacks=[("on_train_start", stop)], **settings)[0]


@pytest.fixture
def said(caplog):
    """What the user reads on the console, by level."""
    logger = logging.getLogger("ultralytics")
    level = logger.level
    logger.addHandler(caplog.handler)
    logger.setLevel(logging.INFO)
    yield lambda level: [r.getMessage() for r in caplog.records if r.levelno == level and "fastgd" in r.getMessage()]
    logger.removeHandler(caplog.handler)
    logger.setLevel(level)


def tensors(trainer):
    """Copies of all that a step may change: model, averages, and states by parameter."""
    module, averages = copied(trainer.model), copied(trainer.ema.ema) if trainer.ema else {}
    names = {p: name for name, p in trainer.model.named_parameters()}
    states = {
        f"{names[p]}.{key}": torch.as_tensor(value).clone()
        for p, state in trainer.optimizer.state.items()
        for key, value in state.items()
        if value is not None
    }
    return module, averages, states


def assert_close(actual, expected, rtol=1e-5):
    """Tensor by tensor, as vectors: a norm is summed in another order, and so a clipped gradient rounded elsewhere."""
    for have, want in zip(actual, expected, strict=True):
        assert have.keys() == want.keys()
        for name, t in want.items():
            error = (have[name].double() - t.double()).norm().item()
            assert error <= rtol * t.double().norm().item(), name


def compare_steps(trainer):
    """Before each step, let Ultralytics' own make it on a copy of all that it reads and writes."""
    step = trainer.optimizer_step

    def optimizer_step():
        slow = copy.copy(trainer)
        del slow.optimizer_step
        slow.model, slow.ema = copy.deepcopy(trainer.model), copy.deepcopy(trainer.ema)
        counterpart = dict(zip(trainer.model.parameters(), slow.model.parameters(), strict=True))
        for p, its_copy in counterpart.items():
            its_copy.grad = None if p.grad is None else p.grad.clone()
        groups = [
            {**group, "params": [counterpart[p] for p in group["params"]]} for group in trainer.optimizer.param_groups
        ]
        slow.optimizer = getattr(torch.optim, type(trainer.optimizer).__name__)(groups)
        slow.optimizer.load_state_dict(copy.deepcopy(trainer.optimizer.state_dict()))
        slow.optimizer_step()
        step()
        assert_close(tensors(trainer), tensors(slow))
        assert trainer.ema.updates == slow.ema.updates

    if type(trainer.optimizer).__module__.startswith("fastgd"):
        trainer.optimizer_step = optimizer_step


def copied(module):
    return {name: t.detach().clone() for name, t in module.state_dict().items()}


def some_gradients(trainer, seed, size=1.0):
    """Gradients and running statistics as a batch might have left them."""
    generator = torch.Generator().manual_seed(seed)
    for p in trainer.model.parameters():
        if p.requires_grad:
            p.grad = size * torch.randn(p.shape, generator=generator)
    for name, buffer in trainer.model.named_buffers():
        if buffer.is_floating_point():
            buffer.add_(torch.rand(buffer.shape, generator=generator))
        elif "num_batches" in name:
            buffer += 1


def in_warmup(trainer, i):
    """What Ultralytics writes into the groups before every batch of its warmup."""
    for group in trainer.optimizer.param_groups:
        group["lr"] = 1e-2 * (i + 1) * (2 if group["param_group"] == "bias" else 1)
        if "momentum" in group:
            group["momentum"] = 0.8 + 0.02 * i


slow = pytest.mark.slow


STEPPED = [(name, scale) for name in ("AdamW", "SGD", "Adam", "RMSprop") for scale in (1024.0, None)]
QUICK = {("AdamW", 1024.0), ("SGD", None)}


@pytest.mark.parametrize("name, scale", [pytest.param(*case, marks=[] if case in QUICK else slow) for case in STEPPED])
def test_step_by_step(ready, name, scale):
    """The same gradients for both, clipped and not, in warmup, with averages whose decay climbs steeply."""
    trainers = [ready(fast, optimizer=name) for fast in (False, True)]
    for trainer in trainers:
        trainer.ema = type(trainer.ema)(trainer.model, decay=0.99, tau=4, updates=1)
        trainer.scaler = torch.amp.GradScaler("cpu", enabled=scale is not None, init_scale=scale or 1.0)
        trainer.scaler.scale(torch.zeros(()))  # which is when it makes its tensors
        for i, size in enumerate([1.0, 1e-3, 1e-3, 1.0]):
            some_gradients(trainer, i, size * (scale or 1.0))
            in_warmup(trainer, i)
            trainer.optimizer_step()
            assert all(p.grad is None for p in trainer.model.parameters())
    plain, fast = trainers
    assert type(fast.optimizer) is getattr(fastgd.torch, name)
    assert_close(tensors(fast), tensors(plain))
    assert fast.ema.updates == plain.ema.updates == 5
    assert fast.scaler.state_dict() == plain.scaler.state_dict()


def test_a_skipped_step_averages_nothing(ready):
    trainer = ready(True, optimizer="AdamW")
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    trainer.scaler.scale(torch.zeros(()))
    some_gradients(trainer, 0)
    trainer.optimizer_step()
    some_gradients(trainer, 1)
    before = tensors(trainer)
    trainer.model.model[0].conv.weight.grad[0, 0, 0, 0] = float("inf")
    trainer.optimizer_step()
    assert_close(tensors(trainer), before, 0.0)
    assert trainer.ema.updates == 1
    assert trainer.scaler.get_scale() == 512.0
    assert all(p.grad is None for p in trainer.model.parameters())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_without_a_scaler_nothing_is_skipped(ready, value):
    """What is not finite spreads as far as it does with Ultralytics, which notices and recovers."""
    trainers = [ready(fast, optimizer="SGD") for fast in (False, True)]
    for trainer in trainers:
        some_gradients(trainer, 0)
        trainer.model.model[0].conv.weight.grad[0, 0, 0, 0] = value
        trainer.optimizer_step()
    plain, fast = (copied(trainer.ema.ema) for trainer in trainers)
    torch.testing.assert_close(fast, plain, equal_nan=True)


@pytest.mark.parametrize("case", ["none", "disabled", "own", "replaced"])
def test_averages_that_are_not_there_or_others(ready, case):
    """Other ranks have none in some versions; ``enabled`` is a switch; a class of its own; a new one in mid-run."""

    class Copies(importlib.import_module("ultralytics.utils.torch_utils").ModelEMA):
        def update(self, model):
            self.ema.load_state_dict(model.state_dict())
            self.updates += 1

    trainers = [ready(fast, optimizer="SGD") for fast in (False, True)]
    for trainer in trainers:
        for i in range(3):
            if i == 1 and case == "none":
                trainer.ema = None
            elif i == 1 and case == "disabled":
                trainer.ema.enabled = False
            elif i == 1:
                trainer.ema = (Copies if case == "own" else type(trainer.ema))(trainer.model)
            elif i == 2 and case == "disabled":
                trainer.ema.enabled = True
            some_gradients(trainer, i)
            trainer.optimizer_step()
    plain, fast = trainers
    assert_close(tensors(fast), tensors(plain))
    assert case == "none" or fast.ema.updates == plain.ema.updates


TRAININGS = {
    "AdamW": {"optimizer": "AdamW"},
    "SGD": {"optimizer": "SGD", "lr0": 1e-3},
    "Adam": {"optimizer": "Adam"},
    "RMSprop": {"optimizer": "RMSprop"},
    "auto": {"optimizer": "auto"},
    "frozen": {"optimizer": "AdamW", "freeze": 10},
    "accumulated": {"optimizer": "SGD", "lr0": 1e-3, "batch": 2, "nbs": 4},
    "longer": {"optimizer": "SGD", "lr0": 1e-3, "cos_lr": True, "epochs": 4},
}


def assert_same_course(fast, losses, plain, expected):
    assert losses == pytest.approx(expected, rel=LOSS_RTOL)
    assert fast.ema.updates == plain.ema.updates > 2
    assert fast.lr == plain.lr
    assert fast.scheduler.get_last_lr() == plain.scheduler.get_last_lr()
    assert fast.scheduler.optimizer is fast.optimizer


@pytest.mark.parametrize("case", [pytest.param(case, marks=[] if case == "AdamW" else slow) for case in TRAININGS])
def test_trained_as_without(train, case):
    plain, expected = train(False, **TRAININGS[case])
    fast, losses = train(True, **TRAININGS[case])
    assert_same_course(fast, losses, plain, expected)
    assert type(fast.optimizer) is getattr(fastgd.torch, type(plain.optimizer).__name__)


@slow
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_resumed(train, tmp_path, name):
    """Cut off after its first epoch, each way, and resumed, each way."""

    def stop(trainer):
        raise yolo.Stopped

    runs = {}
    for first in (False, True):
        cut, _ = train(first, callbacks=[("on_model_save", stop)], optimizer=name, epochs=3)
        # Copies, for a resumed run goes on in the folder of the first.
        last = {second: shutil.copy(cut.last, tmp_path / f"{first:d}{second:d}.pt") for second in (False, True)}
        runs |= {(first, second): train(second, last[second], resume=True) for second in (False, True)}
    plain, expected = runs.pop((False, False))
    assert len(expected) == 4, "it began anew"
    for (_, second), (trainer, losses) in runs.items():
        assert_same_course(trainer, losses, plain, expected)
        assert type(trainer.optimizer) is getattr(fastgd.torch if second else torch.optim, name)


@slow
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_recovered_from_nan(train, name):
    """Ultralytics loads its last checkpoint in mid-run: momentum in float16, and averages in other tensors."""

    def spoil(trainer):
        if trainer.epoch == 1 and not trainer.nan_recovery_attempts:
            trainer.loss = trainer.loss * float("nan")

    callbacks = [("on_train_start", compare_steps), ("on_train_epoch_end", spoil)]
    runs = [train(fast, callbacks=callbacks, optimizer=name, epochs=3) for fast in (False, True)]
    (plain, expected), (fast, losses) = runs
    assert len(expected) == 8, "it did not redo an epoch"
    assert_same_course(fast, losses, plain, expected)
    dtypes = {t.dtype for state in fast.optimizer.state.values() for t in state.values() if torch.is_tensor(t)}
    assert dtypes == {torch.float32}


def alone(trainer, case):
    """Make the trainer one that is to be left alone."""
    if case == "a subclass":
        trainer.optimizer.__class__ = type("AdamW", (torch.optim.AdamW,), {})
    elif case == "a step of someone else's":
        trainer.optimizer_step = lambda: None
    elif case == "parameters of another model":
        trainer.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})
    elif case == "parameters that are missing":
        del trainer.optimizer.param_groups[0]["params"][0]
    return trainer


LEFT_ALONE = {
    "MuSGD": r"optimizer: .* got ultralytics.*\.MuSGD",
    "NAdam": r"optimizer: .* got torch.*\.NAdam",
    "a subclass": r"optimizer: .* got test_ultralytics\.AdamW",
    "a step of someone else's": r"trainer\.optimizer_step: ",
    "parameters of another model": r"trainer\.optimizer: ",
    "parameters that are missing": r"trainer\.optimizer: ",
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_left_alone_with_one_warning(ready, accelerate, said, case):
    name = case if case in ("MuSGD", "NAdam") else "AdamW"
    trainer = alone(ready(False, optimizer=name), case)
    before = trainer.optimizer, trainer.scheduler.optimizer, trainer.optimizer_step
    accelerate(trainer)
    assert (trainer.optimizer, trainer.scheduler.optimizer, trainer.optimizer_step) == before
    (warning,) = said(logging.WARNING)
    assert re.search(LEFT_ALONE[case], warning), warning
    assert not said(logging.INFO)


@slow
def test_trained_with_an_optimizer_that_is_left_alone(train, said):
    (_, expected), (_, losses) = (train(fast, optimizer="MuSGD") for fast in (False, True))
    assert losses == expected
    assert len(said(logging.WARNING)) == 1


def test_added_twice(ready, accelerate, said):
    trainer = ready(True, optimizer="AdamW")
    before = trainer.optimizer, trainer.optimizer_step
    accelerate(trainer)
    assert (trainer.optimizer, trainer.optimizer_step) == before
    assert not said(logging.WARNING)
    assert len(said(logging.INFO)) == 1


def test_another_scheduler(ready):
    """A run for a given time makes one after each epoch."""
    trainers = [ready(fast, optimizer="SGD") for fast in (False, True)]
    for trainer in trainers:
        trainer._setup_scheduler()
        some_gradients(trainer, 0)
        trainer.optimizer_step()
        trainer.scheduler.step()
    plain, fast = ([group["lr"] for group in trainer.optimizer.param_groups] for trainer in trainers)
    assert fast == plain


def test_groups_and_state_are_kept(ready, accelerate):
    trainer = ready(False, optimizer="SGD")
    trainer.optimizer.defaults["weight_decay"] = 0.125
    for i in range(2):
        some_gradients(trainer, i)
        trainer.optimizer_step()
    groups = [{k: v for k, v in group.items() if k != "params"} for group in trainer.optimizer.param_groups]
    params = [group["params"] for group in trainer.optimizer.param_groups]
    before, defaults = tensors(trainer), trainer.optimizer.defaults
    accelerate(trainer)
    assert [{k: v for k, v in group.items() if k != "params"} for group in trainer.optimizer.param_groups] == groups
    kept = [group["params"] for group in trainer.optimizer.param_groups]
    assert all(a is b for p, q in zip(kept, params, strict=True) for a, b in zip(p, q, strict=True))
    assert_close(tensors(trainer), before, 0.0)
    assert defaults.items() <= trainer.optimizer.defaults.items()


@slow
def test_example(accelerate, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    settings = {
        **yolo.QUIET,
        **yolo.QUICK,
        "data": yolo.make_images(tmp_path / "data"),
        "project": tmp_path,
        "epochs": 1,
    }
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *(f"{name}={value}" for name, value in settings.items())])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ultralytics' own
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert re.search(r"takes [\d.]+ ms without fastgd, [\d.]+ ms with it", capsys.readouterr().out)
