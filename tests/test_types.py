"""Public signatures say which types they take and return. mypy reads tests/typing/ in `lint`."""

import ast
import inspect
import textwrap
from typing import Any

import pytest
from test_public_api import CLASSES, PUBLIC

# Keras takes what these hold, and the docstring lists it.
MAY_TAKE_ANY = {
    "AverageModelCheckpoint.__init__": {"**kwargs"},
    "ClassicSlots.add_variable": {"*args", "**kwargs"},
}


def without_type(function):
    """The arguments of a function that have the type `Any` or none, and `return`."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    arguments = tree.args
    types = {a.arg: a.annotation for a in (*arguments.args, *arguments.kwonlyargs)}
    types |= {f"*{arguments.vararg.arg}": arguments.vararg.annotation} if arguments.vararg else {}
    types |= {f"**{arguments.kwarg.arg}": arguments.kwarg.annotation} if arguments.kwarg else {}
    types |= {"return": tree.returns}
    return {
        name
        for name, annotation in types.items()
        if name not in ("self", "cls") and (annotation is None or says_any(annotation))
    }


def says_any(annotation):
    """Whether `Any` stands in a type, other than in `dict[str, Any]`."""
    if ast.unparse(annotation).startswith("dict[str, Any]"):
        return False
    return any(isinstance(node, ast.Name) and node.id == "Any" for node in ast.walk(annotation))


def functions_of(kind):
    """The public methods and properties of a class, and its constructor."""
    for base in kind.__mro__:
        for name, thing in vars(base).items() if base.__module__.startswith("keras_avg") else ():
            # The constructors of its base classes are not called by users.
            is_called = name == "__call__" or (name == "__init__" and thing is kind.__init__)
            if name.startswith("_") and not is_called:
                continue
            for part in (thing.fget, thing.fset) if isinstance(thing, property) else (thing,):
                function = inspect.unwrap(getattr(part, "__func__", getattr(part, "func", part)))
                if inspect.isfunction(function):
                    yield f"{base.__name__}.{name}", function


@pytest.mark.parametrize("name", PUBLIC)
def test_public_signatures_say_more_than_any(name):
    functions = dict(functions_of(PUBLIC[name])) if name in CLASSES else {name: PUBLIC[name]}
    functions = {called: inspect.unwrap(function) for called, function in functions.items()}
    found = {
        called: kinds
        for called, f in functions.items()
        if (kinds := without_type(f) - MAY_TAKE_ANY.get(called, set()))
    }
    assert functions
    assert not found, f"{found}. keras_avg/_types.py has names for types that Python cannot say."


def test_the_search_finds_a_type_that_says_nothing():
    assert without_type(says_nothing) == {"a", "b", "*args", "d", "return"}


def says_nothing(a, b: list[Any], c: int, *args: Any, d: Any | None = None) -> Any:
    """Has types from which nobody learns anything."""
