"""Every compiler and processor at hand gives the same bits: the loops alone, without Python."""

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CMAKE = (ROOT / "CMakeLists.txt").read_text()

# float32, float64. g++ 12 and clang++ 14, SSE2, AVX2 and AVX-512, and aarch64 with NEON and without all gave this.
CHECKSUM = "18bece55df9d4d10 b6bc45d74466b99b"


def flags(name: str) -> list[str]:
    return re.findall(rf"set\({name}_flags (-[^)]*)\)", CMAKE)[-1].split()


def targets() -> list:
    """(compiler, flags, how to run it) of what is installed here."""
    cpu = Path("/proc/cpuinfo").read_text() if platform.system() == "Linux" else ""
    sets = {"baseline": [], **{isa: flags(isa) for isa in ("avx2", "avx512") if isa in cpu}}
    native = [c for c in ("g++", "clang++") if shutil.which(c) and platform.machine() == "x86_64"]
    found = [pytest.param(c, s, [], id=f"{c}-{name}") for c in native for name, s in sets.items()]
    if shutil.which("aarch64-linux-gnu-g++") and shutil.which("qemu-aarch64"):
        for name, s in {"neon": [], "baseline": flags("baseline")}.items():
            found.append(pytest.param("aarch64-linux-gnu-g++", ["-static", *s], ["qemu-aarch64"], id=f"aarch64-{name}"))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("compiler, extra, run", targets())
def test_checksum(tmp_path, compiler, extra, run):
    objects = []
    for name, more in {"checksum": ["-O1"], "isa": [*flags("strict"), *extra]}.items():
        source = ROOT / ("tests/cross" if name == "checksum" else "csrc/cpu") / f"{name}.cpp"
        objects.append(tmp_path / f"{name}.o")
        command = [compiler, "-std=c++20", "-DFASTGD_ISA=checked", f"-I{ROOT / 'csrc'}", *more]
        subprocess.run([*command, "-c", source, "-o", objects[-1]], check=True)
    program = tmp_path / "checksum"
    subprocess.run([compiler, *[f for f in extra if f == "-static"], *objects, "-o", program], check=True)
    out = subprocess.run([*run, program], check=True, capture_output=True, text=True).stdout.strip()
    assert out == CHECKSUM
