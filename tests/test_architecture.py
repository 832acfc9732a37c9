"""Two doors: frameworks come in through `_backend/`, Keras' private names through one file."""

import ast
import pathlib

import keras
import pytest

import keras_avg

PACKAGE = pathlib.Path(keras_avg.__file__).parent
BACKEND = PACKAGE / "_backend"
INTERNALS = PACKAGE / "_keras_internals.py"
FRAMEWORKS = {"tensorflow", "jax", "torch", "flax", "optax", "orbax"}
FILES = sorted(PACKAGE.rglob("*.py"))


def ids(path):
    return str(path.relative_to(PACKAGE))


def imported(tree):
    """(line, dotted name) of everything a module imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, node.module or ""
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def framework_imports(tree):
    return [(n, name) for n, name in imported(tree) if name.split(".")[0] in FRAMEWORKS]


def private_names_of_keras():
    optimizer = keras.optimizers.SGD(1.0, gradient_accumulation_steps=2)
    variable = keras.Variable([1.0])
    optimizer.build([variable])
    model, callback = keras.Sequential([keras.Input((1,))]), keras.callbacks.Callback()
    classes = {c for thing in (optimizer, variable, model, callback) for c in type(thing).__mro__}
    names = {name for c in classes if c.__module__.startswith("keras") for name in vars(c)}
    names |= vars(optimizer).keys() | vars(variable).keys()
    return {name for name in names if name.startswith("_") and not name.endswith("__")}


def keras_internals(tree, private):
    for line, name in imported(tree):
        if name.startswith("keras.src"):
            yield line, name
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in private:
            yield node.lineno, f".{node.attr}"
        if isinstance(node, ast.FunctionDef) and node.name in private:
            yield node.lineno, f"def {node.name}"


@pytest.mark.parametrize("path", [f for f in FILES if BACKEND not in f.parents], ids=ids)
def test_frameworks_are_imported_in_backend_only(path):
    found = framework_imports(ast.parse(path.read_text()))
    assert not found, f"{path}: {found}. Code of a framework belongs into keras_avg/_backend/."


@pytest.mark.parametrize("path", [f for f in FILES if f != INTERNALS], ids=ids)
def test_private_names_of_keras_are_used_in_one_file_only(path):
    found = list(keras_internals(ast.parse(path.read_text()), private_names_of_keras()))
    assert not found, f"{path}: {found}. Private Keras names belong into {INTERNALS.name}."


@pytest.mark.parametrize(
    ("folder", "loading_only"),
    [(BACKEND, {"numpy"}), (BACKEND / "communicators", set())],
    ids=["_backend", "communicators"],
)
def test_every_backend_has_the_same_functions_in_the_same_order(folder, loading_only):
    def signatures(path):
        tree = ast.parse(path.read_text())
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and public(node.name):
                for method in node.body:
                    if isinstance(method, ast.FunctionDef) and public(method.name):
                        yield f"{node.name}.{method.name}", [a.arg for a in method.args.args]
            elif isinstance(node, ast.FunctionDef) and public(node.name):
                yield node.name, [a.arg for a in node.args.args]

    def public(name):
        return not name.startswith("_") or name == "__init__"

    files = {path.stem: path for path in folder.glob("*.py") if path.stem != "__init__"}
    described = {name: list(signatures(path)) for name, path in files.items()}
    assert set(described) == {"tensorflow", "jax", "torch"} | loading_only
    assert all(functions == described["jax"] for functions in described.values())


def test_the_searches_find_what_they_look_for():
    source = "import jax.numpy\nfrom keras.src import ops\nx._tracker = 1\n"
    tree = ast.parse(source)
    assert framework_imports(tree) == [(1, "jax.numpy")]
    found = {name for _, name in keras_internals(tree, private_names_of_keras())}
    assert found >= {"keras.src", "._tracker"}
