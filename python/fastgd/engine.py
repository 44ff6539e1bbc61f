"""Which engine runs the steps: the compiled module, or the twin where there is none."""

from __future__ import annotations

import os
import warnings
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastgd import threads

active: Any  # fastgd._core, or fastgd.reference.engine, which keeps the same contract
try:
    import fastgd._core as _compiled

    active = _compiled
except ImportError as error:
    # An instruction set asked for by name, or a compiled module required by name: that or an error.
    if os.environ.get("FASTGD_ISA") or os.environ.get("FASTGD_REQUIRE_COMPILED", "0") not in ("", "0"):
        raise
    from fastgd.reference import engine as active

    warnings.warn(
        f"fastgd: the compiled module cannot be imported ({error}); steps run in NumPy: the same bits, but slower",
        RuntimeWarning,
        stacklevel=3,
    )
active.set_num_threads(threads.default())

try:
    __version__ = version("fastgd")
except PackageNotFoundError:  # run from the sources
    __version__ = "0+uninstalled"


def config() -> dict[str, Any]:
    """What this build is and runs on.

    Returns
    -------
    dict
        ``version`` (str), ``isa`` (str, the instruction set in use; ``"reference"`` without the compiled module),
        ``available_isas`` (list of str, in order of preference), ``num_threads`` (int), ``cuda`` (None: not built; else
        a dict of ``devices`` and ``architectures``, lists of str, and of ``problem``, why there are no devices).
    """
    return {
        "version": __version__,
        "isa": active.isa(),
        "available_isas": list(active.available_isas()),
        "num_threads": active.get_num_threads(),
        "cuda": _cuda(),
    }


def _cuda() -> dict[str, Any] | None:
    try:
        module: Any = import_module("fastgd._cuda")
    except ImportError:
        return None
    devices, problem = module.devices()
    told = {"devices": devices, "architectures": module.architectures()}
    return told if devices else {**told, "problem": problem}


def get_num_threads() -> int:
    """The most threads a step uses.

    Returns
    -------
    int
        As set; by default ``FASTGD_NUM_THREADS``, else what affinity and cgroup allow.
    """
    n: int = active.get_num_threads()
    return n


def set_num_threads(n: int) -> None:
    """Set the most threads a step uses. No number of threads changes a bit of the results.

    Parameters
    ----------
    n : int
        At least 1.

    Raises
    ------
    TypeError
        If ``n`` is not an integer.
    ValueError
        If ``n`` is below 1.
    """
    active.set_num_threads(threads.checked(n))
