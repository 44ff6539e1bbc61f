"""The command line, as a user meets it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
from cases import RULES

import fastgd
from fastgd.cli import main
from fastgd.cli.bench.peers import numpy_lines

QUICK = ["bench", "--quick", "--peers", "numpy", "--rounds", "3", "--seconds", "0.01"]


@pytest.fixture
def without(monkeypatch):
    """Packages as if they were not installed."""

    def hide(*names):
        for name in names:
            monkeypatch.setitem(sys.modules, name, None)
        found = {name: None for name in names}
        for module in ("fastgd.cli.demo", "fastgd.cli.bench"):
            monkeypatch.setattr(f"{module}.find_spec", lambda name: found.get(name, True))

    return hide


def test_as_a_program():
    """`python -m fastgd`, and what it says of itself."""
    for arguments, code in ((["--help"], 0), ([], 2), (["dmeo"], 2)):
        command = [sys.executable, "-m", "fastgd", *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == code
        assert "python -m fastgd" in done.stdout + done.stderr
        if code == 0 or "dmeo" in arguments:
            assert all(name in done.stdout + done.stderr for name in ("demo", "info", "bench"))


@pytest.mark.parametrize("command", ["demo", "info", "bench"])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"python -m fastgd {command}" in capsys.readouterr().out


def test_info(capsys):
    assert main(["info"]) == 0
    lines = dict(re.split(r"  +", line) for line in capsys.readouterr().out.splitlines())
    assert list(lines) == list(fastgd.config())
    assert lines["version"] == fastgd.__version__
    assert lines["isa"] == fastgd.config()["isa"]
    assert lines["available_isas"] == ", ".join(fastgd.config()["available_isas"])
    assert lines["num_threads"] == str(fastgd.get_num_threads())


def test_demo(tmp_path, capsys):
    for package in ("matplotlib", "sklearn", "tqdm"):
        pytest.importorskip(package)
    plot = tmp_path / "loss.png"
    assert main(["demo", "--plot", str(plot)]) == 0
    out, progress = capsys.readouterr()
    assert re.search(r"w = 5, loss \(w - 2\)\*\*2, learning rate 0\.1.*\n\s+gradient\s+6\.0\n\s+w\s+4\.4\n", out)
    (accuracy,) = re.findall(r"^accuracy: (0\.\d{3})$", out, re.MULTILINE)
    assert float(accuracy) >= 0.95
    ours, twins = re.findall(r"^loss.*: +(\d\.\d+)$", out, re.MULTILINE)
    assert ours == twins and 0 < float(ours) < 0.1
    assert "twin" in out and "Equal to the last bit" in out
    assert all(re.search(rf"^\s+{part}\s+\d+\.\d+ s\s+\d+\.\d %$", out, re.MULTILINE) for part in ("forward", "step"))
    assert "100%" in progress
    for saved in (plot, tmp_path / "loss-norms.png"):
        assert saved.read_bytes().startswith(b"\x89PNG") and str(saved) in out
    assert "\nThe learning rate is neither too large nor far too small: a step changes the parameters by " in out


def test_demo_that_cannot_save_says_so(tmp_path, capsys):
    for package in ("matplotlib", "sklearn", "tqdm"):
        pytest.importorskip(package)
    for path in (tmp_path / "missing" / "loss.png", tmp_path / "loss.nonsense"):
        assert main(["demo", "--plot", str(path)]) == 1
        err = capsys.readouterr().err.splitlines()[-1]
        assert err.startswith("fastgd: cannot save") and "Traceback" not in err


def test_demo_tells_a_difference(capsys, monkeypatch):
    """The comparison with the twin can fail."""
    for package in ("matplotlib", "sklearn", "tqdm"):
        pytest.importorskip(package)
    monkeypatch.setattr(fastgd.reference, "adamw_step", lambda *args, **more: None)
    monkeypatch.setattr("fastgd.cli.demo.EPOCHS", 1)
    assert main(["demo", "--no-plot"]) == 1
    assert "NOT EQUAL" in capsys.readouterr().out


@pytest.mark.parametrize(
    "names", [["matplotlib"], ["sklearn"], ["tqdm"], ["matplotlib", "sklearn", "tqdm"]], ids=" ".join
)
def test_demo_without_its_extra_says_how_to_get_it(names, without, capsys):
    without(*names)
    assert main(["demo"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fastgd: ") and 'pip install "fastgd[demo]"' in err
    assert all(name in err for name in names)


def test_bench(tmp_path, capsys):
    """Every rule on one array: the table, JSON with every timing, the roofline."""
    saved, plot = tmp_path / "bench.json", tmp_path / "roofline.png"
    arguments = ["--sections", "sizes", "--sizes", "1", "3000", "--json", str(saved)]
    rules = ["momentum", "nesterov", *RULES]
    if find_spec("matplotlib"):
        arguments += ["--plot", str(plot)]
    assert main([*QUICK, *arguments, "--rules", *rules]) == 0
    out = capsys.readouterr().out
    tables = re.findall(r"^## (.*)\n\n((?:\|.*\n)+)", out, re.MULTILINE)
    assert [title for title, _ in tables] == ["One array: 1 element, float32", "One array: 3000 elements, float32"]
    for _, table in tables:
        head, _, *rows = ([cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines())
        assert head == ["", "fastgd", "GB/s", "of limit", "numpy", "best peer"]
        assert [row[0] for row in rows] == rules
        assert all(re.fullmatch(r"[\d.]+ (ns|us|ms|s)", row[1]) for row in rows)
        assert all(float(row[3]) > 0 and float(row[4]) > 0 for row in rows)
    assert "does not compute the same step" not in out and "failed" not in out

    report = json.loads(saved.read_text())
    assert report["machine"]["isa"] == fastgd.config()["isa"]
    for section, elements in zip(report["sections"], (1, 3000), strict=True):
        assert [result["label"] for result in section["results"]] == rules
        for result in section["results"]:
            assert result["elements"] == elements
            assert set(result["times"]) == {"limit", "fastgd", "numpy"}
            assert all(len(times) == 3 and min(times) > 0 for times in result["times"].values())
    assert plot.exists() == bool(find_spec("matplotlib"))


def test_bench_knows_how_much_each_rule_moves(tmp_path):
    """Bytes of a step: the gradient read, the parameter and each state read and written."""
    saved = tmp_path / "bench.json"
    arrays = {"sgd": 3, "momentum": 5, "nesterov": 5, "adam": 7, "adamw": 7, "adagrad": 5, "rmsprop": 5, "lion": 5}
    assert main([*QUICK, "--sections", "sizes", "--sizes", "1000", "--rules", *arrays, "--json", str(saved)]) == 0
    (section,) = json.loads(saved.read_text())["sections"]
    assert {r["label"]: r["bytes"] / 4000 for r in section["results"]} == arrays


def test_bench_of_lists_and_classes(capsys):
    arguments = ["--sections", "lists", "small", "--lists", "mlp-mnist", "--rules", "adamw"]
    assert main([*QUICK, *arguments]) == 0
    out = capsys.readouterr().out
    assert "fastgd class" in out and "## mlp-mnist: " in out and "366 arrays of 8" in out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--rules", "sdg"], "--rules: there is no sdg, only sgd"),
        (["--json", "missing/bench.json"], "cannot save missing"),
        (["--sections", "small", "--plot", "roofline.png"], "nothing to draw"),
    ],
)
def test_bench_errors(arguments, message, capsys, tmp_path, monkeypatch):
    if "--plot" in arguments:
        pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    assert main([*QUICK, *arguments]) == 1
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_bench_without_matplotlib_says_how_to_get_it(without, capsys):
    without("matplotlib")
    assert main([*QUICK, "--plot", "roofline.png"]) == 1
    assert 'pip install "fastgd[demo]"' in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "1 TiB", "Mi"])
def test_bench_sizes(text, capsys):
    with pytest.raises(SystemExit):
        main(["bench", "--sizes", text])
    assert "expected a number such as" in capsys.readouterr().err


def test_a_peer_that_computes_something_else_is_left_out(capsys, monkeypatch):
    """The check before the timing can fail."""
    monkeypatch.setitem(numpy_lines.RULES, "sgd", lambda p, g, t, *, lr: np.subtract(p, 1.1 * lr * g, out=p))
    assert main([*QUICK, "--sections", "sizes", "--sizes", "3000", "--rules", "sgd"]) == 0
    out = capsys.readouterr().out
    assert "numpy, sgd, 3000 elements: left out, it does not compute the same step" in out
    assert "best peer" not in out
