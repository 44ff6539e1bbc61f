"""DLPack's structs as this library has them, against the published header that torch ships."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from bits import run_python

import fastgd

torch = pytest.importorskip("torch")

ROOT = Path(__file__).parents[1]

# Ours, the published name, and the fields of both in order.
STRUCTS = [
    ("Device", "DLDevice", "type:device_type id:device_id"),
    ("DataType", "DLDataType", "code bits lanes"),
    ("Tensor", "DLTensor", "data device ndim dtype shape strides byte_offset"),
    ("Version", "DLPackVersion", "major minor"),
    ("ExchangeApiHeader", "DLPackExchangeAPIHeader", "version prev_api"),
    (
        "ExchangeApi",
        "DLPackExchangeAPI",
        "header managed_tensor_allocator managed_tensor_from_py_object_no_sync managed_tensor_to_py_object_no_sync "
        "dltensor_from_py_object_no_sync current_work_stream",
    ),
]
NUMBERS = {"cpu": "kDLCPU", "cuda": "kDLCUDA", "cuda_host": "kDLCUDAHost", "cuda_managed": "kDLCUDAManaged"}
NUMBERS |= {"floating": "kDLFloat", "bfloat": "kDLBfloat"}


def assertions():
    for ours, theirs, fields in STRUCTS:
        yield f"sizeof({ours}) == sizeof(::{theirs}) && alignof({ours}) == alignof(::{theirs})"
        for field in fields.split():
            name, _, published = field.partition(":")
            published = published or name
            yield f"offsetof({ours}, {name}) == offsetof(::{theirs}, {published})"
            yield f"sizeof({ours}::{name}) == sizeof(::{theirs}::{published})"
    for ours, theirs in NUMBERS.items():
        yield f"int({ours}) == int(::{theirs})"
    yield "DLPACK_MAJOR_VERSION == 1"


def compiled(tmp_path, lines):
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "c++", "g++", "clang++"))), None)
    if compiler is None:
        pytest.skip("no C++ compiler here")
    header = Path(torch.__file__).parent / "include" / "ATen" / "dlpack.h"
    source = tmp_path / "dlpack.cpp"
    text = [
        f'#include "{header}"',
        '#include "bind/dlpack.hpp"',
        "#include <cstddef>",
        "using namespace fastgd::dlpack;",
    ]
    source.write_text("\n".join([*text, *(f"static_assert({line});" for line in lines)]), "utf-8")
    command = [compiler, "-std=c++20", f"-I{ROOT / 'csrc'}", "-fsyntax-only", source]
    return subprocess.run(command, capture_output=True, text=True)


def test_structs_are_the_published_ones(tmp_path):
    result = compiled(tmp_path, assertions())
    assert result.returncode == 0, result.stderr


def test_no_field_is_left_out():
    """The fields listed above are all that the structs have."""
    text = (ROOT / "csrc" / "bind" / "dlpack.hpp").read_text("utf-8")
    for ours, _, fields in STRUCTS:
        body = text.partition(f"struct {ours} {{")[2].partition("};")[0]
        for field in fields.split():
            assert field.partition(":")[0] in body
        declared = sum(
            line.count(";") + line.partition("//")[0].count(",") for line in body.splitlines() if "(" not in line
        )
        assert declared + body.count("(*") == len(fields.split()), body


def test_a_field_elsewhere_is_noticed(tmp_path):
    result = compiled(tmp_path, ["offsetof(Tensor, shape) == offsetof(::DLTensor, strides)"])
    assert result.returncode != 0
    assert "static assertion failed" in result.stderr or "static_assert failed" in result.stderr


def test_torchs_capsule():
    """Its name and version are those that are asked for."""
    capsule = torch.Tensor.__dlpack_c_exchange_api__
    name, pointer = ctypes.pythonapi.PyCapsule_GetName, ctypes.pythonapi.PyCapsule_GetPointer
    name.restype, name.argtypes = ctypes.c_char_p, [ctypes.py_object]
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    assert name(capsule) == b"dlpack_exchange_api"
    assert (ctypes.c_uint32 * 2).from_address(pointer(capsule, b"dlpack_exchange_api"))[0] == 1


CAPSULE = """
import ctypes
import fastgd
new = ctypes.pythonapi.PyCapsule_New
new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
def capsule(major, function, name=b"dlpack_exchange_api"):
    words = (ctypes.c_uint64 * 7)(major, 0, 1, 1, 1, function, 1)
    keep.append((words, name))
    return new(ctypes.addressof(words), name, None)
keep = []
def kind(**attributes):
    return type("Foreign", (), attributes)
learn = lambda t: fastgd._core.learn(t, "is_neg")
"""


@pytest.mark.skipif(not hasattr(fastgd, "_core"), reason="the compiled module alone")
def test_what_is_not_learned():
    """A type without the API, of another major version, without the function that is called; and the wrong capsule."""
    result = run_python(
        CAPSULE + "assert not learn(kind())\n"
        "assert not learn(kind(__dlpack_c_exchange_api__=capsule(2, 1)))\n"
        "assert not learn(kind(__dlpack_c_exchange_api__=capsule(1, 0)))\n"
        "try:\n    learn(kind(__dlpack_c_exchange_api__=capsule(1, 1, b'another')))\n"
        "except ValueError:\n    print('refused')\n"
        "known = [kind(__dlpack_c_exchange_api__=capsule(1, 1)) for _ in range(20)]\n"
        "learned = [learn(t) for t in known]\n"
        "assert learned == sorted(learned, reverse=True) and learned[0] and not learned[-1]\n"
        "assert [learn(t) for t in known] == learned\n"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["refused"]
