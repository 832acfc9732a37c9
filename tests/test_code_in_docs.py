"""The code on the pages and in the docstrings runs as it stands, on each backend."""

import pathlib
import re

import keras
import pytest

ROOT = pathlib.Path(__file__).parents[1]
BACKEND = keras.backend.backend()
MADE_FROM_CODE = {"api", "gallery"}
PAGES = [ROOT / "README.md"] + [
    page
    for page in sorted((ROOT / "docs").rglob("*.md"))
    if not MADE_FROM_CODE & set(page.relative_to(ROOT / "docs").parts[:-1])
]
# A block may have a note before it: `<!-- not run: why -->`, or `<!-- only: jax, torch -->`.
BLOCK = re.compile(r"(?:^<!-- (?P<note>[^\n]*) -->\n)?^```python\n(?P<code>.*?)^```$", re.M | re.S)


def blocks(text):
    """Pairs of the line before a block, and its code: of the blocks for this backend."""
    for match in BLOCK.finditer(text):
        note = match["note"] or ""
        backends = re.fullmatch(r"only: (.*)", note)
        if note.startswith("not run: ") or (backends and BACKEND not in backends[1].split(", ")):
            continue
        yield text[: match.start("code")].count("\n"), match["code"]


def run(text, name, names):
    """Run the blocks of a text one after the other, with the same names."""
    for line, code in blocks(text):
        # Empty lines before the code, so that a traceback names the line of the page.
        exec(compile("\n" * line + code, name, "exec"), names)


def title(page):
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", [p for p in PAGES if BLOCK.search(p.read_text())], ids=title)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(page.read_text(), str(page), {"__name__": "__main__"})


def test_a_block_for_another_backend_is_left_out_and_lines_are_those_of_the_page():
    other = "jax" if BACKEND != "jax" else "torch"
    text = f"Text\n\n<!-- only: {other} -->\n```python\n1 / 0\n```\n\n```python\na = 2\n```\n"
    assert list(blocks(text)) == [(8, "a = 2\n")]
    assert list(blocks("<!-- not run: old -->\n```python\n1 / 0\n```\n")) == []
