"""The benchmark of the one pass: what its tables hold, and that its contenders do the same work."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec

import numpy as np
import pytest

import fastgd
from fastgd.cli import main
from fastgd.cli.bench import measure
from fastgd.cli.bench.case import settings
from fastgd.cli.bench.chain import ChainMemory
from fastgd.cli.bench.contest import ours
from fastgd.cli.bench.measure import Contender, compete, steps_taken

bfloat16 = pytest.importorskip("ml_dtypes").bfloat16

QUICK = ["bench", "--suite", "pass", "--quick", "--rounds", "3", "--seconds", "0.01"]
CHAINS = ["torch, check apart", "torch, check by norm"]
ROWS = ["adamw, all", "adamw, all but stats", "nesterov, all", "nesterov, all but stats"]


def chain_of(name, shapes=((3000,),)):
    chain = ChainMemory("a chain", shapes, bfloat16, single=len(shapes) == 1).chain(settings()[name])
    chain.reset()
    return chain


def tables(out):
    found = re.findall(r"^## (.*)\n\n((?:\|.*\n)+)", out, re.MULTILINE)
    return {
        title: [[c.strip() for c in row.strip("|").split("|")] for row in rows.splitlines()] for title, rows in found
    }


def test_the_chain_against_torch(tmp_path, capsys):
    """Every row is there, torch's chains compute the same, and JSON has every timing."""
    pytest.importorskip("torch")
    saved, plot = tmp_path / "pass.json", tmp_path / "roofline.png"
    arguments = ["--sections", "sizes", "lists", "--sizes", "3000", "--lists", "mlp-mnist", "--json", str(saved)]
    if find_spec("matplotlib"):
        arguments += ["--plot", str(plot)]
    assert main([*QUICK, *arguments]) == 0
    out = capsys.readouterr().out
    assert "does not compute the same step" not in out and "failed" not in out
    one, several = tables(out).values()
    assert one[0] == ["", "fastgd", "GB/s", "of limit", *CHAINS, "best peer", "its time"]
    assert several[0] == ["", "fastgd", "GB/s", "of limit", "fastgd class", *CHAINS, "best peer", "its time"]
    for head, _, *rows in (one, several):
        assert [row[0] for row in rows] == ROWS
        for row in (dict(zip(head, row, strict=True)) for row in rows):
            assert all(re.fullmatch(r"[\d.]+ (us|ms|s)", row[column]) for column in ("fastgd", "its time"))
            ratios = {column: float(row[column]) for column in ("of limit", *CHAINS)}
            assert min(ratios.values()) > 0
            assert float(row["best peer"]) == min(ratios[name] for name in CHAINS)

    for section, elements in zip(json.loads(saved.read_text())["sections"], (3000, 101770), strict=True):
        assert [result["label"] for result in section["results"]] == ROWS
        # An element of AdamW: the gradient for the norm 4, again and zeroed 8, four arrays rewritten 32, the copy 2.
        assert [result["bytes"] / elements for result in section["results"]] == [46, 46, 38, 38]
        assert all(len(times) == 3 for result in section["results"] for times in result["times"].values())
    assert plot.exists() == bool(find_spec("matplotlib"))


def test_the_step_alone(capsys):
    """Neutral arguments and statistics, beside a plain step."""
    assert main([*QUICK, "--sections", "plain", "small", "--sizes", "3000"]) == 0
    plain, small = tables(capsys.readouterr().out).values()
    assert plain[0] == ["", "fastgd", "GB/s", "of limit", "fastgd, neutral arguments", "fastgd with stats"]
    assert [row[0] for row in plain[2:]] == ["sgd", "nesterov", "adamw"]
    assert small[0] == ["", "fastgd", "fastgd, neutral arguments", "fastgd with stats"]
    assert [row[0] for row in small[2:]] == ["one element, `sgd_step(w, g, lr)`", "class AdamW, 366 arrays of 8"]


def test_every_rule_has_its_chain(capsys):
    pytest.importorskip("torch")
    rules = ["sgd", "momentum", "adam", "adagrad", "rmsprop", "lion"]
    assert main([*QUICK, "--sections", "sizes", "--sizes", "3000", "--rules", *rules]) == 0
    out = capsys.readouterr().out
    assert "does not compute the same step" not in out and "failed" not in out
    (rows,) = tables(out).values()
    assert all(name in rows[0] for name in CHAINS) and all("-" not in row for row in rows[2:])


def test_other_peers_alone_leave_torch_out(capsys):
    assert main([*QUICK, "--sections", "sizes", "--sizes", "3000", "--peers", "numpy"]) == 0
    out = capsys.readouterr().out
    assert "torch, check" not in out and "best peer" not in out


@pytest.mark.parametrize(
    "suite, section, message",
    [("core", "plain", "core has no plain, only sizes"), ("pass", "growth", "pass has no growth, only sizes")],
)
def test_a_section_of_the_other_suite(suite, section, message, capsys):
    assert main(["bench", "--suite", suite, "--quick", "--sections", section]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("step", ["_foreach_copy_", "_foreach_zero_", "_foreach_lerp_", "_foreach_mul_", "clip"])
def test_a_chain_that_leaves_something_out_is_seen(step, capsys, monkeypatch):
    """The check before the timing can fail."""
    torch = pytest.importorskip("torch")
    from fastgd.cli.bench.peers import torch_chain

    if step == "clip":
        monkeypatch.setattr(torch_chain, "clip_grad_norm_", lambda params, norm, foreach: torch.ones(()))
    else:
        monkeypatch.setattr(torch, step, lambda *args, **more: None)
    assert main([*QUICK, "--sections", "sizes", "--sizes", "3000", "--rules", "nesterov"]) == 0
    out = capsys.readouterr().out
    assert "torch, check by norm, nesterov, 3000 elements: left out, it does not compute the same step" in out


@pytest.mark.parametrize("check", ["check_apart", "check_by_norm"])
@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_both_skip(check, bad):
    """The work compared includes the decision: what is not finite leaves parameters, averages and copies alone."""
    pytest.importorskip("torch")
    from fastgd.cli.bench.peers import torch_chain

    for contender_of in (lambda c: ours(c, **c.asked(), stats=True), getattr(torch_chain, check)):
        chain = chain_of("adamw")
        chain.grads[0][1234] = bad
        before = [a.copy() for a in (*chain.params, *chain.ema, *chain.copies, *chain.states[0], *chain.states[1])]
        contender_of(chain).seconds(1)
        after = (*chain.params, *chain.ema, *chain.copies, *chain.states[0], *chain.states[1])
        assert all(a.tobytes() == b.tobytes() for a, b in zip(before, after, strict=True))


def test_the_gradients_are_clipped_and_not_all():
    """The norm that is asked for is about half of theirs, so that a clip left out is seen."""
    chain = chain_of("nesterov", [(300, 5), (7,)])
    stats = fastgd.SGD(chain.params, **chain.setting.hyper).step(chain.grads, **chain.asked(), stats=True)
    assert 0.4 < stats.clip_factor < 0.6


def test_every_timing_is_of_one_step_on_fresh_gradients(monkeypatch):
    """A step sets the gradients to zero; the next must not be timed on zeros."""
    monkeypatch.setattr(measure, "_LONG", np.inf)  # whatever else the machine does
    chain = chain_of("adamw")
    met = []

    def step():
        met.append(float(np.abs(chain.grads[0]).max()))
        chain.grads[0].fill(0)

    contender = Contender("a step", step, params=chain.written, prepare=chain.refill)
    steps_taken(contender)
    assert len(met) == 2 and min(met) > 0
    met.clear()
    times = compete([contender], 3, 1.0)["a step"]
    assert len(times) == 3
    # One step to see how long it takes; then in each round one to warm up, and the one that is timed.
    assert met[0] == 0 and [x > 0 for x in met[1:]] == [False, True] * 3
