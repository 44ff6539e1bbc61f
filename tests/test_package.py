"""What is installed: the files, the metadata, and nothing but NumPy imported."""

import inspect
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import fastgd

ROOT = Path(__file__).parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text("utf-8")


@pytest.fixture
def installed():
    try:
        return metadata.distribution("fastgd")
    except metadata.PackageNotFoundError:
        pytest.skip("fastgd runs from its sources here, nothing is installed")


def test_metadata(installed):
    about = installed.metadata
    assert about["Name"] == "fastgd"
    assert about["Requires-Python"] == ">=3.10"
    assert about["License-Expression"] == "BSD-3-Clause"
    always = [r for r in installed.requires if "extra ==" not in r]
    assert [re.split(r"[<>=\[ ]", r)[0] for r in always] == ["numpy"]
    assert {"bfloat16", "demo", "test"} <= set(about.get_all("Provides-Extra"))


def test_version(installed):
    (version,) = re.findall(r'^version = "(.+)"$', PYPROJECT, re.MULTILINE)
    assert version == installed.version == fastgd.__version__ == fastgd.config()["version"]
    assert version in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_files(installed):
    """Everything of the sources is in the wheel, with the compiled module, and nothing else."""
    files = {f.as_posix() for f in installed.files if "__pycache__" not in f.parts}
    package = {f for f in files if not re.match(r"fastgd-[^/]+\.dist-info/", f)}
    source = ROOT / "python"
    expected = {p.relative_to(source).as_posix() for p in source.rglob("*") if p.suffix in {".py", ".pyi", ".json"}}
    expected.add("fastgd/py.typed")
    assert {"fastgd/_core.pyi", "fastgd/__init__.py"} < expected
    compiled = {f for f in package if re.fullmatch(r"fastgd/_(core|cuda)\.[^/]*(so|pyd)", f)}
    assert len(compiled) == 1 + (fastgd.config()["cuda"] is not None)
    assert package - compiled == expected
    assert any(f.endswith("LICENSE") for f in files)


def test_import_takes_numpy_alone():
    """The extras are extras: `import fastgd` loads no package but NumPy and itself."""
    script = (
        "import sys; before = set(sys.modules); import fastgd; new = set(sys.modules) - before;"
        "print(*sorted({name.partition('.')[0] for name in new} - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["fastgd", "numpy"]


SIGNATURES = {
    "sgd_step": "(params, grads, lr, *, momentum_buffers=None, momentum=0.0, dampening=0.0, weight_decay=0.0, "
    "nesterov=False, maximize=False, step=None, **one_pass)",
    "adam_step": "(params, grads, exp_avgs, exp_avg_sqs, *, step, lr=0.001, betas=(0.9, 0.999), eps=1e-08, "
    "weight_decay=0.0, max_exp_avg_sqs=None, maximize=False, **one_pass)",
    "adamw_step": "(params, grads, exp_avgs, exp_avg_sqs, *, step, lr=0.001, betas=(0.9, 0.999), eps=1e-08, "
    "weight_decay=0.01, max_exp_avg_sqs=None, maximize=False, **one_pass)",
    "adagrad_step": "(params, grads, state_sums, *, step, lr=0.01, lr_decay=0.0, weight_decay=0.0, eps=1e-10, "
    "maximize=False, **one_pass)",
    "rmsprop_step": "(params, grads, square_avgs, *, lr=0.01, alpha=0.99, eps=1e-08, weight_decay=0.0, momentum=0.0, "
    "momentum_buffers=None, centered=False, grad_avgs=None, maximize=False, **one_pass)",
    "lion_step": "(params, grads, exp_avgs, *, lr=0.0001, betas=(0.9, 0.99), weight_decay=0.0, maximize=False, "
    "**one_pass)",
}


@pytest.mark.parametrize("name", [name for name in fastgd.__all__ if name.endswith("_step")])
def test_signature(name):
    """What other code relies on, written out: changing it is a decision."""
    signature = inspect.signature(getattr(fastgd, name))
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    assert str(signature.replace(parameters=plain, return_annotation=inspect.Signature.empty)) == SIGNATURES[name]


def test_all_is_what_there_is():
    public = {name for name in vars(fastgd) if not name.startswith("_")}
    assert set(fastgd.__all__) - {"__version__"} <= public
    modules = {"arrays", "coefficients", "engine", "optimizers", "steps", "threads", "cli", "reference"}
    modules |= {"devices", "dynamics", "onepass", "stats", "tensors", "torch", "ultralytics"}
    assert public - set(fastgd.__all__) <= modules
