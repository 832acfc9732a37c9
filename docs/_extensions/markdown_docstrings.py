"""Reads docstrings as they are written here: Markdown code, tables and formulas, as in Keras.

Sphinx expects reStructuredText. What differs is put into that form before napoleon reads sections.
"""

import re

import keras

FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)$")
SECTION = re.compile(r"^(Args|Attributes|Example|Raises|Reference|Returns|Yields):$")
CODE = re.compile(r"(?<!`)`([^`]+)`(?!`)")


def convert(lines):
    """The lines of a docstring in reStructuredText."""
    return [line for block in _blocks(lines) for line in block]


def _blocks(lines):
    lines, in_section = list(lines), False
    while lines:
        line = lines.pop(0)
        if SECTION.match(line):
            in_section = True
        elif line and not line.startswith(" "):
            in_section = False
        if fence := FENCE.match(line):
            yield _code(lines, fence["indent"], fence["language"])
        elif line.lstrip().startswith("|"):
            yield _table(lines, line)
        elif line.startswith("    ") and not in_section:
            yield ["::", "", line, *_while(lines, lambda each: each.startswith(" ") or not each)]
        else:
            yield [_literals(line)]


def _literals(text):
    return CODE.sub(r"``\1``", text)


def _while(lines, holds):
    taken = []
    while lines and holds(lines[0]):
        taken.append(lines.pop(0))
    return taken


def _code(lines, indent, language):
    inside = _while(lines, lambda each: not FENCE.match(each))
    lines.pop(0)
    body = [f"{indent}    {line[len(indent) :]}".rstrip() for line in inside]
    return [f"{indent}.. code-block:: {language or 'text'}", "", *body, ""]


def _table(lines, first):
    rows = [first, *_while(lines, lambda each: each.lstrip().startswith("|"))]
    cells = [row.strip().strip("|").split("|") for row in rows if not set(row) <= set(" |-")]
    table = [".. list-table::", "   :header-rows: 1", ""]
    for row in cells:
        for place, cell in enumerate(row):
            mark = "* -" if place == 0 else "  -"
            table.append(f"   {mark} {_literals(cell.strip())}")
    return [*table, ""]


def process(app, what, name, thing, options, lines):
    lines[:] = convert(lines)


def skip_what_is_keras_own(app, what, name, member, skip, options):
    """What a wrapper inherits from Keras is described by Keras."""
    function = getattr(member, "fget", None) or member
    if (getattr(function, "__module__", None) or "").startswith("keras.src"):
        return True
    return None  # as Sphinx sees fit


def show_public_bases(app, name, thing, options, bases):
    """Of a class' bases, those that have a page or are Keras' own."""
    import keras_avg

    public = {getattr(keras_avg, each) for each in keras_avg.__all__}
    for base in thing.__mro__[1:]:
        if base in public or not base.__module__.startswith("keras_avg"):
            bases[:] = [_public_name(base)]
            return


def _public_name(base):
    places = {"keras.optimizers": keras.optimizers, "keras.callbacks": keras.callbacks}
    places["keras.optimizers.schedules"] = keras.optimizers.schedules
    for place, module in places.items():
        if getattr(module, base.__name__, None) is base:
            return f":py:class:`{place}.{base.__name__}`"
    return base


def setup(app):
    app.connect("autodoc-process-docstring", process, priority=100)  # before napoleon
    app.connect("autodoc-skip-member", skip_what_is_keras_own)
    app.connect("autodoc-process-bases", show_public_bases)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
