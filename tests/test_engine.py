"""Which engine runs: the compiled one, or with one warning the twin, which is complete and has its bits."""

from __future__ import annotations

import inspect
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from bits import digest, run_python
from cases import RULES
from classes import every_rule, normal

import fastgd
from fastgd import _core, reference

CONFIG = ["version", "isa", "available_isas", "num_threads", "cuda"]


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """A copy of the package without its compiled module, found before the installed one."""
    package = Path(fastgd.__file__).parent
    shutil.copytree(package, tmp_path / "fastgd", ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=None)
    for name in ("FASTGD_REQUIRE_COMPILED", "FASTGD_ISA"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


IMPORT = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import fastgd
    from fastgd import reference
    import fastgd.engine
"""

# The steps of every rule over the engine in use, which the tests' own modules cannot import: they need the other.
STEPS = """
import hashlib, inspect
import numpy as np
total = hashlib.sha256()
for name in sorted(set(fastgd.__all__)):
    value = getattr(fastgd, name)
    if name.endswith("_step"):
        p, g, *states = (np.linspace(k, 2, 3001, dtype="f4") for k in range(5))
        roles = [n for n, a in inspect.signature(value).parameters.items() if a.kind is a.POSITIONAL_OR_KEYWORD]
        more = {"step": 3} if "step" in inspect.signature(value).parameters else {}
        value(p, g, *([0.1] if "lr" in roles else states[: len(roles) - 2]), **more)
    elif hasattr(value, "step"):
        p = np.linspace(-1, 1, 3001, dtype="f4")
        optimizer = value([p], lr=0.1, weight_decay=0.1)
        for _ in range(3):
            optimizer.step([np.cos(p)])
    else:
        continue
    total.update(p.tobytes())
print(total.hexdigest(), fastgd.config()["isa"])
"""


def test_this_is_the_compiled_one():
    assert fastgd.engine.active is _core
    assert fastgd.config()["isa"] in _core.available_isas()


def test_without_it_the_twin_works_and_one_warning_says_so(bare):
    tell = "print(repr([(w.category.__name__, str(w.message)) for w in caught]))"
    done = run_python(IMPORT + STEPS + tell)
    assert done.returncode == 0, done.stderr
    steps, warnings = done.stdout.splitlines()
    ((category, message),) = eval(warnings)
    assert category == "RuntimeWarning"
    assert all(word in message for word in ("fastgd._core", "NumPy", "same bits"))
    bits, isa = steps.split()
    assert isa == "reference"
    isa = fastgd.config()["isa"]
    compiled = run_python("import fastgd\n" + STEPS, PYTHONPATH=str(Path(fastgd.__file__).parents[1]), FASTGD_ISA=isa)
    assert compiled.stdout.split() == [bits, isa]


def test_the_warning_points_to_the_import(bare):
    done = run_python("\n\nimport fastgd")
    assert done.stderr.count("RuntimeWarning") == 1
    assert done.stderr.startswith("<string>:3: RuntimeWarning")


def test_its_config(bare):
    script = "import warnings; warnings.simplefilter('ignore'); import fastgd; fastgd.set_num_threads(3)"
    done = run_python(script + "; print(fastgd.config())")
    config = eval(done.stdout)
    assert list(config) == CONFIG
    assert (config["isa"], config["available_isas"]) == ("reference", ["reference"])


@pytest.mark.parametrize("name, value", [("FASTGD_REQUIRE_COMPILED", "1"), ("FASTGD_ISA", "avx2"), ("FASTGD_ISA", "x")])
def test_where_it_is_asked_for_its_absence_is_an_error(bare, name, value):
    done = run_python("import fastgd", **{name: value})
    assert done.returncode == 1
    assert "fastgd._core" in done.stderr.splitlines()[-1]
    assert "ImportError" in done.stderr or "ModuleNotFoundError" in done.stderr


@pytest.mark.parametrize(
    "name, value", [("FASTGD_REQUIRE_COMPILED", "0"), ("FASTGD_REQUIRE_COMPILED", ""), ("FASTGD_ISA", "")]
)
def test_empty_asks_for_nothing(bare, name, value):
    done = run_python("import fastgd", **{name: value})
    assert done.returncode == 0 and "RuntimeWarning" in done.stderr


def test_a_module_that_breaks_at_import_is_no_silent_fallback(bare):
    """One that is there and cannot be loaded, as on another Python or an unknown CPU, is reported with its reason."""
    (bare / "fastgd" / "_core.py").write_text("raise ImportError('built for another machine')\n")
    done = run_python("import fastgd")
    assert done.returncode == 0
    assert "built for another machine" in done.stderr


def test_isa_is_never_a_silent_fallback():
    """A mistake in the name must not end in a warning and the twin."""
    done = run_python("import fastgd", FASTGD_ISA="avx1024", FASTGD_REQUIRE_COMPILED="")
    assert done.returncode == 1
    message = done.stderr.splitlines()[-1]
    assert message.startswith("ImportError: FASTGD_ISA: expected one")
    assert all(isa in message for isa in (*_core.available_isas(), "'avx1024'"))


def test_config():
    config = fastgd.config()
    assert list(config) == CONFIG
    assert config["version"] == fastgd.__version__
    assert config["isa"] == _core.isa()
    assert config["num_threads"] == fastgd.get_num_threads() >= 1
    assert config["cuda"] is None or {"devices", "architectures"} <= set(config["cuda"])
    config["available_isas"].clear()
    assert fastgd.config()["available_isas"] == _core.available_isas()


@pytest.mark.parametrize(
    "bad, error",
    [(0, ValueError), (-1, ValueError), (1.0, TypeError), ("2", TypeError), (None, TypeError), (True, TypeError)],
)
def test_set_num_threads_errors(bad, error):
    before = fastgd.get_num_threads()
    with pytest.raises(error, match=r"^n: expected an int (>= 1|from 1 to 1024), got"):
        fastgd.set_num_threads(bad)
    assert fastgd.get_num_threads() == before


def test_the_twin_is_complete():
    """Every step, with the same signature and the same words; and every name of the engine's contract."""
    steps = {name for name in fastgd.__all__ if name.endswith("_step")}
    assert steps == set(reference.__all__) == {f"{rule}_step" for rule in RULES}
    for name in steps:
        ours, twins = getattr(fastgd, name), getattr(reference, name)
        assert ours != twins
        assert inspect.signature(ours) == inspect.signature(twins)
    alone = {"stream"} | {
        "learn",
        "call_with_written",
        "Snapshot",
    }  # the benchmark's; for tensors that are read directly
    compiled = {name for name in dir(_core) if not name.startswith("_")} - alone
    assert compiled <= set(dir(reference.engine))
    methods = {name for name in dir(_core.Prepared) if not name.startswith("_")}
    assert methods == {name for name in dir(reference.engine.Prepared) if not name.startswith("_")}
    for rule in RULES:
        assert {k: RULES[rule][k] for k in ("flags", "coefficients")} == reference.engine.RULES[rule]


def test_the_twin_does_not_call_the_compiled_module(monkeypatch):
    """Otherwise they would agree whatever either does."""
    monkeypatch.setattr(_core, "step", None)
    expected = digest(reference)
    monkeypatch.undo()
    assert expected == digest(reference)
    for name, module in sys.modules.items():
        if name.startswith("fastgd.reference"):
            assert _core not in vars(module).values()


@every_rule
def test_step_refuses_before_it_writes(case):
    """The engine's side of the bargain: False and nothing written, unless all is plainly fine; checked, the same."""
    params, grads = normal(0), normal(1)
    states = tuple(normal(2 + k) for k in range(len(case.states)))
    hyper = {n: v for n, v in case.hyper.items() if n not in ("amsgrad", "nesterov", "centered")}
    flags = {flag: flag in case.flags for flag in ("amsgrad", "nesterov", "centered")}
    function = getattr(fastgd.coefficients, case.rule)
    given = {"step": 3, "maximize": False, **hyper, **flags}
    row = function(**{n: v for n, v in given.items() if n in inspect.signature(function).parameters})
    for bad in (normal(3)[:-1], [*normal(3)[:-1], np.zeros(3)], None, dict(enumerate(normal(3)))):
        for engine in (_core, reference.engine):
            before = [a.tobytes() for role in (params, grads, *states) for a in role]
            assert engine.step(case.rule, [row], None, params, bad, states, False) is False
            assert [a.tobytes() for role in (params, grads, *states) for a in role] == before
    assert _core.step(case.rule, [row], None, params, grads, states, False) is True
    assert reference.engine.step(case.rule, [row], None, params, grads, states, False) is False
    assert reference.engine.step(case.rule, [row], None, params, grads, states, True) is True
