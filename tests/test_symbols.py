"""What was compiled for one instruction set stays there: read from the object files of the build that is kept.

The build folder is that of ``pip install .`` in this checkout, or FASTGD_BUILD_DIR.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastgd import _core

elffile = pytest.importorskip("elftools.elf.elffile", reason="pyelftools: Linux only")

ROOT = Path(__file__).parents[1]
# What a compiler may call of itself, and the table through which position-independent code finds it.
ALLOWED = {"memcpy", "memset", "_GLOBAL_OFFSET_TABLE_"}
X86 = pytest.mark.skipif("avx2" not in _core.available_isas(), reason="x86 with AVX2")


@pytest.fixture(scope="module")
def objects() -> dict[str, list[Path]]:
    """The object files of every target: ``isa_avx2`` and so on, and the rest of ``_core``."""
    if given := os.environ.get("FASTGD_BUILD_DIR"):
        folder = Path(given)
    else:
        version = "".join(map(str, sys.version_info[:2]))
        found = ROOT.glob(f"build/cp{version}-cp{version}{getattr(sys, 'abiflags', '')}-*")
        folder = max(found, key=lambda path: path.stat().st_mtime, default=Path())
        if not folder.name:
            pytest.skip("no build folder in this checkout: the package was built elsewhere")
    targets = {path.stem: list(path.rglob("*.cpp.o")) for path in (folder / "CMakeFiles").glob("*.dir")}
    assert {"_core", *(f"isa_{isa}" for isa in _core.available_isas())} <= set(targets)
    return targets


@pytest.fixture(scope="module")
def units(objects) -> dict[str, Path]:
    """The one object file of each instruction set."""
    return {target.removeprefix("isa_"): path for target, (path, *_) in objects.items() if target.startswith("isa_")}


def read(path: Path) -> tuple[list[str], list[Any]]:
    """The names of an object file's sections, and its symbols."""
    with path.open("rb") as file:
        elf = elffile.ELFFile(file)
        return [s.name for s in elf.iter_sections()], list(elf.get_section_by_name(".symtab").iter_symbols())


def instructions(path: Path) -> list[str]:
    """Lines like ``mulps %xmm1,%xmm0``."""
    objdump = shutil.which("objdump") or pytest.skip("needs objdump (binutils)")
    done = subprocess.run([objdump, "-d", "--no-show-raw-insn", path], capture_output=True, text=True, check=True)
    lines = [line.partition("\t")[2] for line in done.stdout.splitlines() if line.startswith(" ")]
    assert len(lines) > 100
    return lines


def test_one_symbol_leaves_a_unit(units):
    """All else has internal linkage: the linker has nothing of which it could keep another unit's copy."""
    for isa, path in units.items():
        outside = [s for s in read(path)[1] if s["st_info"]["bind"] != "STB_LOCAL"]
        defined = [s for s in outside if s["st_shndx"] != "SHN_UNDEF"]
        assert [(s.name, s["st_info"]["bind"]) for s in defined] == [
            (f"_ZN6fastgd{len(isa) + 8}kernels_{isa}E", "STB_GLOBAL")
        ]
        assert {s.name for s in outside if s not in defined} <= ALLOWED, isa


def test_loading_a_unit_runs_none_of_it(units):
    """No constructors at namespace scope: they would run before anyone has asked what the CPU has."""
    for isa, path in units.items():
        names = read(path)[0]
        assert ".text" in names
        assert not [n for n in names if re.search(r"\.(preinit_array|init_array|fini_array|ctors|dtors)", n)], isa


def test_nothing_was_contracted(units):
    """No fused multiply-add of x86 or Arm, in any of their spellings."""
    fused = re.compile(r"vfn?m(add|sub)\S*[sp][sdh]\b|fn?m(add|sub)|fml[als]")
    for isa, path in units.items():
        assert not [line for line in instructions(path) if fused.match(line)], isa


@X86
def test_units_keep_to_their_instruction_set(objects):
    """And everything outside of them keeps to the baseline: AVX's mnemonics begin with v."""
    beyond = {"isa_avx2": r"%zmm|%[xy]mm(1[6-9]|[23]\d)|%k[0-7]", "isa_avx512": r"^$"}
    for target, paths in objects.items():
        pattern = re.compile(beyond.get(target, r"^v|%[yz]mm|%k[0-7]"))
        for path in paths:
            wrong = [line for line in instructions(path) if pattern.search(line)]
            assert not wrong, f"{path.name} of {target}: {wrong[:3]}"


@X86
def test_loops_are_vectorised(units):
    """Roots and quotients of whole registers, in float32 and float64."""
    for isa, register in {"baseline": "%xmm", "avx2": "%ymm", "avx512": "%zmm"}.items():
        packed = {line.split()[0].removeprefix("v") for line in instructions(units[isa]) if register in line}
        assert {"sqrtps", "sqrtpd", "divps", "divpd"} <= packed, isa
