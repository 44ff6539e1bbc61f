"""What all tests share."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import fastgd

NO_SKIPS = os.environ.get("FASTGD_NO_SKIPS", "0") not in ("", "0")


def pytest_report_header() -> str:
    return f"fastgd: {fastgd.config()}"


def _forbid_skip(report: Any) -> Any:
    """In CI a test that does not run is a failure: what it needs is missing."""
    if NO_SKIPS and report.outcome == "skipped" and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped, which FASTGD_NO_SKIPS forbids: {report.longrepr[-1]}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Any:
    return _forbid_skip((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Any:
    return _forbid_skip((yield))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What needs a GPU or nvcc is no part of the suite where there is none; most of what runs again is slow."""
    again = [
        i for i in items if i.module.__name__ == "test_cuda_emulated" and i.function.__module__ != i.module.__name__
    ]
    for n, item in enumerate(again):
        if n % 8:
            item.add_marker(pytest.mark.slow)
    lacks = [name for name, there in (("gpu", has_gpu()), ("nvcc", shutil.which("nvcc"))) if not there]
    gone = [item for item in items if any(item.get_closest_marker(name) for name in lacks)]
    if gone:
        config.hook.pytest_deselected(items=gone)
        items[:] = [item for item in items if item not in set(gone)]


def has_gpu() -> bool:
    cuda = fastgd.config()["cuda"]
    return bool(cuda and cuda["devices"])


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """set_num_threads for the length of a test."""
    before = fastgd.get_num_threads()
    yield fastgd.set_num_threads
    fastgd.set_num_threads(before)
