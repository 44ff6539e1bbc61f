"""The tools as tests: lint, format, types, stubs, docstrings, and no sentence about the machine it was written on."""

import doctest
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastgd
from fastgd import optimizers, stats, steps

ROOT = Path(__file__).parents[1]
CPP = sorted(str(p) for kind in ("csrc/**/*.?pp", "csrc/**/*.cu", "tests/cuda/*.c*") for p in ROOT.glob(kind))
CLANG_FORMAT = "from clang_format import clang_format; clang_format()"

TOOLS = {
    "ruff-check": ("ruff", "-m", "ruff", "check", "--no-cache", "."),
    "ruff-format": ("ruff", "-m", "ruff", "format", "--no-cache", "--check", "."),
    "mypy": ("mypy", "-m", "mypy", "--strict", "python/fastgd"),
    "stubtest": ("mypy", "-m", "mypy.stubtest", "fastgd._core", "--allowlist", "stubtest.allow"),
    "clang-format": ("clang_format", "-c", CLANG_FORMAT, "--dry-run", "-Werror", *CPP),
}


@pytest.mark.parametrize("tool", TOOLS)
def test_tool(tool, tmp_path):
    package, *arguments = TOOLS[tool]
    pytest.importorskip(package)
    allow = tmp_path / "stubtest.allow"
    allow.write_text(
        "fastgd._core.Prepared\nfastgd._core.Snapshot\n"
    )  # their metaclass is pybind11's, which a stub cannot name
    arguments = [str(allow) if a == allow.name else a for a in arguments]
    env = os.environ | {"MYPYPATH": str(ROOT / "python")}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_machine_is_named():
    machine = re.compile(r"""(^|[\s"'`(=:])/(work|home|root|tmp|Users|mnt)/""", re.MULTILINE)
    kinds = {".py", ".pyi", ".cpp", ".hpp", ".md", ".toml", ".txt", ".yml", ".json", ".sh", ""}
    texts = [p for folder in ("python", "csrc", "tests", "bench", ".ci", ".github") for p in (ROOT / folder).rglob("*")]
    texts += ROOT.glob("*")
    texts = [p for p in texts if p.is_file() and p.suffix in kinds and not {"__pycache__", ".ruff_cache"} & {*p.parts}]
    assert ROOT / "python" / "fastgd" / "__init__.py" in texts
    named = {str(p.relative_to(ROOT)): found[0] for p in texts if (found := machine.search(p.read_text("utf-8")))}
    assert not named


def public():
    """Every public function and class, with its methods."""
    for module in (fastgd, fastgd.reference):
        for name in module.__all__:
            value = getattr(module, name)
            if not callable(value):
                continue
            yield f"{module.__name__}.{name}", value
            if inspect.isclass(value):
                for method, function in inspect.getmembers(value, inspect.isfunction):
                    if not method.startswith("_"):
                        yield f"{module.__name__}.{name}.{method}", function


@pytest.mark.parametrize("value", [pytest.param(value, id=name) for name, value in public()])
def test_docstring(value):
    """NumPy style: a summary of one line, and a section Parameters that names every parameter and nothing else."""
    doc = inspect.getdoc(value)
    summary, *rest = doc.split("\n")
    assert summary.endswith(".")
    assert not rest or rest[0] == ""
    parameters = [name for name in inspect.signature(value).parameters if name != "self"]
    section = re.search(r"^Parameters\n-+\n(.*?)(\n\n\w+\n-+\n|\Z)", doc, re.DOTALL | re.MULTILINE)
    lines = section[1].split("\n") if section else []
    documented = [n for line in lines if re.match(r"[\w*]", line) for n in line.split(" : ")[0].lstrip("*").split(", ")]
    assert sorted(documented) == sorted(parameters)


def test_every_module_has_a_docstring():
    modules = list((ROOT / "python").rglob("*.py"))
    assert modules
    bare = [str(p) for p in modules if not re.match(r'"""\S', p.read_text("utf-8"))]
    assert not bare


@pytest.mark.parametrize("module", [steps, optimizers, stats], ids=lambda m: m.__name__)
def test_examples_in_docstrings(module):
    assert doctest.testmod(module, optionflags=doctest.ELLIPSIS).failed == 0


def test_the_tools_come_with_the_test_extra():
    extra = re.search(r"^test = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text("utf-8"), re.DOTALL | re.MULTILINE)[1]
    for package, *_ in TOOLS.values():
        assert f'"{package.replace("_", "-")}' in extra
