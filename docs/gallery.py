"""Makes the pages of the gallery from `examples/*.py`. Sphinx calls it in each build.

A page begins with the module's docstring. Then come the pictures that the example writes, and the
code in blocks. An example can also have cells, like those of keras.io: a string alone at the top
level is text.

The pictures are in `docs/pictures/gallery`, because a build runs no example. To draw them again:

    python docs/gallery.py quickstart          # without a name: all examples
"""

import ast
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).parent
EXAMPLES = HERE.parent / "examples"
PAGES = HERE / "gallery"
PICTURES = HERE / "pictures" / "gallery"
SOURCE = "https://github.com/keras-avg/keras-avg/blob/main/examples"


def write_pages():
    """Make one page for each example, and the page that lists them."""
    PAGES.mkdir(exist_ok=True)
    examples = sorted(EXAMPLES.glob("*.py"))
    for old in PAGES.glob("*.md"):
        if old.stem not in {each.stem for each in examples} | {"index"}:
            old.unlink()
    for path in examples:
        _write(PAGES / f"{path.stem}.md", page(path))
    _write(PAGES / "index.md", index(examples))


def index(examples):
    """The page that lists the examples, by their titles."""
    rows = [f"* [{opening(path)[0]}]({path.stem}.md)" for path in examples]
    toctree = ["```{toctree}", ":hidden:", "", *(path.stem for path in examples), "```"]
    about = "Each example runs without changes on every backend, in under two minutes on two cores."
    return "\n".join(["# Gallery", "", about, "", *rows, "", *toctree, ""])


def opening(path):
    """Title and first text of an example, from its docstring or from the fields of keras.io."""
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    fields = dict(re.findall(r"^(\w[\w ]*): (.*)$", docstring, re.MULTILINE))
    if docstring.startswith("Title:"):
        return fields["Title"], fields["Description"]
    first, _, text = docstring.partition("\n")
    text = re.sub(r"(?<!\]\()(?<!<)https?://[^\s),]+", r"<\g<0>>", text)  # a link in Markdown
    return first.removesuffix("."), text.strip()


def page(path):
    """An example as a page in Markdown."""
    title, text = opening(path)
    lines = [f"# {title}", "", text, ""]
    lines += [f"The example is [`examples/{path.name}`]({SOURCE}/{path.name}).", ""]
    for picture in sorted(PICTURES.glob(f"{path.stem}*.png")):
        lines += [f"![What the example draws](../pictures/gallery/{picture.name})", ""]
    for kind, content in cells(path.read_text()):
        lines += [content, ""] if kind == "text" else ["```python", content, "```", ""]
    return "\n".join(lines)


def cells(source):
    """Pairs of `"text"` or `"code"` and the content, without the module's docstring.

    If there are strings at the top level, they divide the code. Otherwise each function and class
    is a block of its own.
    """
    body = ast.parse(source).body[1:]
    has_text = any(_is_text(node) for node in body)
    lines = source.splitlines()
    found, begin = [], ast.parse(source).body[0].end_lineno
    for node in body:
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))]) - 1
        if _is_text(node):
            found.append(("code", lines[begin:first]))
            found.append(("text", node.value.value.strip().splitlines()))
            begin = node.end_lineno
        elif not has_text and isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.append(("code", lines[begin:first]))
            found.append(("code", lines[first : node.end_lineno]))
            begin = node.end_lineno
    found.append(("code", lines[begin:]))
    texts = [(kind, "\n".join(content).strip("\n")) for kind, content in found]
    return [(kind, text) for kind, text in texts if text.strip()]


def draw(names):
    """Run examples, each in an empty folder, and keep the pictures that they write."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    for path in sorted(EXAMPLES.glob("*.py")):
        if names and path.stem not in names:
            continue
        with tempfile.TemporaryDirectory() as folder:
            shutil.copy(path, folder)  # a picture may be written beside the example
            subprocess.run([sys.executable, path.name], cwd=folder, check=True)
            pictures = sorted(pathlib.Path(folder).rglob("*.png"))
            for number, picture in enumerate(pictures):
                suffix = f"_{number}" if len(pictures) > 1 else ""
                shutil.copy(picture, PICTURES / f"{path.stem}{suffix}.png")


def _is_text(node):
    is_string = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return is_string and isinstance(node.value.value, str)


def _write(path, text):
    # Sphinx reads a page again if the file is newer than before.
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


if __name__ == "__main__":
    draw(sys.argv[1:])
