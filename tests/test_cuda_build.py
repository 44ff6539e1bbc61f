"""What nvcc makes: nothing contracted, no driver needed to import it, and an architecture more compiles."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from bits import run_python
from cases import RULES

import fastgd

ROOT = Path(__file__).parents[1]
FLAGS = re.search(r"set\(cuda_flags ([^)]*)\)", (ROOT / "CMakeLists.txt").read_text())[1].split()
built = pytest.mark.skipif(fastgd.config()["cuda"] is None, reason="fastgd._cuda was not built")

pytestmark = pytest.mark.nvcc


def compiled(source: str, to: Path, *more: str) -> str:
    """The text that nvcc makes of a source: PTX, or a cubin's machine code."""
    command = ["nvcc", "-std=c++20", "--expt-relaxed-constexpr", f"-I{ROOT / 'csrc'}", *more, ROOT / source, "-o", to]
    subprocess.run(command, check=True)
    if to.suffix == ".ptx":
        return to.read_text()
    return subprocess.run([disassembler(to.parent), "-c", to], check=True, capture_output=True, text=True).stdout


def disassembler(folder: Path) -> str:
    """nvdisasm, of the toolkit or of its package."""
    if found := shutil.which("nvdisasm"):
        return found
    for place in (
        importlib.util.find_spec("nvidia").submodule_search_locations if importlib.util.find_spec("nvidia") else ()
    ):
        for path in Path(place).glob("*/bin/nvdisasm"):
            copy = folder / "nvdisasm"  # it may come without the right to be run
            shutil.copy(path, copy)
            copy.chmod(0o755)
            return str(copy)
    pytest.skip("needs nvdisasm: pip install nvidia-cuda-nvdisasm")


@pytest.mark.parametrize("rule", [pytest.param(r, marks=[pytest.mark.slow] * (r != "adamw")) for r in [*RULES, ""]])
def test_every_operation_rounds_once(tmp_path, rule):
    """In PTX an addition or a product that names its rounding is never contracted."""
    defined = [f"-DFASTGD_RULE={rule}"] if rule else []
    ptx = compiled("csrc/cuda/kernels.cu", tmp_path / "k.ptx", *FLAGS, *defined, "-arch=compute_75", "-ptx")
    used = set(
        re.findall(r"^\s+(?:@\S+ )?((?:add|sub|mul|div|sqrt|rcp|fma|mad|rsqrt|ex2|lg2)\.\S*f(?:32|64))\b", ptx, re.M)
    )
    assert {"add.rn.f64", "mul.rn.f64"} < used
    assert {name.partition(".")[2] for name in used} == {"rn.f32", "rn.f64"}
    assert not any(name.startswith(("fma", "mad", "rsqrt")) for name in used)
    assert ".ftz" not in ptx


def test_nothing_was_contracted(tmp_path):
    """In machine code, where division and roots have fused multiply-adds of their own: a rule without them."""
    code = compiled("tests/cuda/rule.cu", tmp_path / "rule.cubin", *FLAGS, "-arch=sm_90", "-cubin")
    assert {"FADD", "FMUL", "DADD", "DMUL"} <= set(re.findall(r"\b[FD](?:ADD|MUL)\b", code))
    assert not re.findall(r"\b[FD]FMA\b|\.FTZ\b", code)
    contracted = [flag for flag in FLAGS if flag != "-fmad=false"]
    code = compiled("tests/cuda/rule.cu", tmp_path / "other.cubin", *contracted, "-arch=sm_90", "-cubin")
    assert re.findall(r"\bFFMA\b", code) and re.findall(r"\bDFMA\b", code), "this test could not fail"


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["75", "80", "86", "89", "90", "100", "120"])
def test_architectures(tmp_path, architecture):
    """Each that CMakeLists.txt names; registers do not spill beyond what a cache line holds."""
    text = (ROOT / "CMakeLists.txt").read_text()
    assert architecture in re.search(r'FASTGD_CUDA_ARCHITECTURES "([0-9;]*)"', text)[1].split(";")
    command = ["nvcc", "-std=c++20", "--expt-relaxed-constexpr", f"-I{ROOT / 'csrc'}", *FLAGS, "-DFASTGD_RULE=lion"]
    command += [f"-arch=sm_{architecture}", "-Xptxas=-v", "-cubin", ROOT / "csrc/cuda/kernels.cu", "-o", tmp_path / "k"]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    assert max(int(n) for n in re.findall(r"(\d+) bytes spill stores", told)) <= 128


def module() -> Any:
    return importlib.util.find_spec("fastgd._cuda")


@built
def test_no_driver_is_needed_to_import_it():
    """The runtime is within the module, and looks for the driver when it is first asked for a device."""
    elffile = pytest.importorskip("elftools.elf.elffile", reason="pyelftools: Linux only")
    with Path(module().origin).open("rb") as file:
        needed = [tag.needed for tag in elffile.ELFFile(file).get_section_by_name(".dynamic").iter_tags("DT_NEEDED")]
    assert needed and not [name for name in needed if "cuda" in name]
    done = run_python("import fastgd._cuda as c; print(c.devices()[0] or c.devices()[1])", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


@built
def test_without_a_gpu_the_error_is_the_runtimes():
    """An exception that names the call, and no crash."""
    code = (
        "import numpy as np, fastgd.devices as d, fastgd._cuda as c\n"
        "w = d._window(None, 4096, (3,), None, 'float32', False, 0)\n"
        "try: c.step('sgd', [(0, 1.0, 0.1, 0.0, 1.0, 0.0)], None, [w], [w], (), True, None)\n"
        "except RuntimeError as error: print(error)\n"
    )
    done = run_python(code, CUDA_VISIBLE_DEVICES="")
    assert re.match(r"cuda\w+: cudaError\w+, .+", done.stdout), done.stdout + done.stderr
