"""The README says what is so: its commands, its code, its links, its rules."""

import doctest
import re
from pathlib import Path

import pytest

from fastgd.reference import engine

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "csrc/README.md"]


def code_blocks(text):
    """(language, code) of every block, fenced or indented."""
    pattern = r"^```(\w*)[^\n]*\n(.*?)^```|((?:^    [^\n]*\n|^\n(?=    ))+)"
    for language, fenced, indented in re.findall(pattern, text, re.DOTALL | re.MULTILINE):
        code = fenced or "".join(line[4:] for line in indented.strip("\n").splitlines(keepends=True))
        yield language, code.strip("\n")


def test_first_block_is_all_a_fresh_machine_needs():
    _, first = next(code_blocks(README))
    commands = [line.partition("#")[0].strip() for line in first.splitlines()]
    assert commands == ['pip install ".[demo]" && python -m fastgd demo', 'pip install ".[test]" && pytest']


def test_code_runs(tmp_path, monkeypatch):
    """Every block of Python, in order, as one session; `>>>` blocks must print what they say."""
    monkeypatch.chdir(tmp_path)
    names = {}
    blocks = [code for language, code in code_blocks(README) if language in {"python", "py", "pycon"}]
    assert blocks
    for code in blocks:
        if code.lstrip().startswith(">>>"):
            test = doctest.DocTestParser().get_doctest(code + "\n", names, "README.md", None, None)
            assert doctest.DocTestRunner().run(test, clear_globs=False).failed == 0
            names.update(test.globs)
        else:
            exec(compile(code, "README.md", "exec"), names)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text("utf-8")
    links = re.findall(r"\]\((?!https?://|#|mailto:)([^)#\s]+)", text)
    missing = [link for link in links if not ((ROOT / page).parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES)
def test_paths_in_backticks_exist(page):
    """`tests/test_symbols.py` and the like, by folder from the root or from the page."""
    text = (ROOT / page).read_text("utf-8")
    paths = re.findall(r"`((?:csrc|tests|bench|python|cpu|bind|pass|rules)/[\w./]+\.\w+)`", text)
    missing = [path for path in paths if not (ROOT / path).exists() and not ((ROOT / page).parent / path).exists()]
    assert not missing


def test_names_every_rule():
    assert [rule for rule in engine.RULES if f"{rule}_step" not in README] == []
