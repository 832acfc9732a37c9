"""The structure of the package.

Only `_backend/` imports frameworks. Only one file uses Keras' private names. A folder imports only
from the folders below it. A class of a wrapper uses only what its base classes define.
"""

import ast
import inspect
import pathlib
import textwrap

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
    """Pairs (line, dotted name) for everything that a module imports."""
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
def test_frameworks_are_imported_only_in_backend(path):
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


# The order of the folders. A folder imports only from those that are listed after it.
ORDER = [
    "__main__",
    "__init__",
    "callbacks",
    "checkpoints",
    "batch_norm",
    "_moments",
    "_optimizers",
    "_workers",
    "_wrapping",
    "_keras2",
    "decays",
    "schedules",
    "distributed",
    "_registered_functions",
    "_checks",
    "_atomic",
    "_backend",
    "_keras_internals",
    "_types",
]


def part_of(path):
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def wrong_way_imports(path):
    """The imports from a folder that is above the file's own folder."""
    own = ORDER.index(part_of(path))
    for line, name in imported(ast.parse(path.read_text())):
        parts = name.split(".")
        is_ours = parts[0] == "keras_avg" and len(parts) > 1 and parts[1] in ORDER
        if is_ours and ORDER.index(parts[1]) < own:
            yield line, name


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_folders_import_only_from_folders_below_them(path):
    found = list(wrong_way_imports(path))
    assert not found, f"{path}: {found}. What both need belongs into the lower of the two."


WRAPPERS = [
    thing
    for name in keras_avg.__all__
    if inspect.isclass(thing := getattr(keras_avg, name))
    and issubclass(thing, keras_avg.AveragedOptimizerWrapper)
    and thing is not keras_avg.AveragedOptimizerWrapper
]
LONGEST_LINE = (
    7  # our classes in a wrapper's MRO: the rule, its family, and the common base classes
)


def line_of(wrapper):
    return [kind for kind in wrapper.__mro__ if kind.__module__.startswith("keras_avg")]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapper_is_the_end_of_one_short_line_of_classes(wrapper):
    line = line_of(wrapper)
    assert len(line) <= LONGEST_LINE, line
    for kind in line:
        ours = [base for base in kind.__bases__ if base.__module__.startswith("keras_avg")]
        assert len(ours) <= 1, f"{kind} has several bases. Parts are objects, not bases."


def used_and_defined(kind):
    """The attributes of `self` that a class uses, and those that it defines."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    defined = {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
    for node in tree.body:
        targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
        if isinstance(node, ast.Assign) or (isinstance(node, ast.AnnAssign) and node.value):
            defined |= {t.id for t in targets if isinstance(t, ast.Name)}
    used = set()
    for node in ast.walk(tree):
        is_of_self = isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "self"
        if is_of_self:
            (defined if isinstance(node.ctx, ast.Store) else used).add(node.attr)
    return used, defined


def defined_by_keras():
    optimizer = keras.optimizers.SGD(1.0)
    optimizer.build([keras.Variable([1.0])])
    return set(dir(optimizer))


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_no_class_uses_an_attribute_that_only_a_subclass_defines(wrapper):
    known = defined_by_keras()
    for kind in reversed(line_of(wrapper)):
        used, defined = used_and_defined(kind)
        known |= defined
        missing = used - known
        assert not missing, f"{kind.__name__} uses {missing}. Define it there, or in a part."


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_no_class_declares_an_attribute_that_it_does_not_set(path):
    for tree in ast.walk(ast.parse(path.read_text())):
        bases = {getattr(base, "id", "") for base in getattr(tree, "bases", ())}
        if not isinstance(tree, ast.ClassDef) or bases & {"NamedTuple", "Protocol"}:
            continue
        if any(keyword.arg == "total" for keyword in tree.keywords):  # a TypedDict
            continue
        declared = {n.target.id for n in tree.body if isinstance(n, ast.AnnAssign) and not n.value}
        stored = {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
        }
        if path.parent.name != "distributed":  # Subclasses of Communicator set rank and size.
            assert declared <= stored, f"{path}: {tree.name} declares {declared - stored}."


def test_the_searches_find_violations():
    source = "import jax.numpy\nfrom keras.src import ops\nx._tracker = 1\n"
    tree = ast.parse(source)
    assert framework_imports(tree) == [(1, "jax.numpy")]
    found = {name for _, name in keras_internals(tree, private_names_of_keras())}
    assert found >= {"keras.src", "._tracker"}
    assert used_and_defined(LooksDown) == ({"above", "below"}, {"look", "above"})


class LooksDown:
    above = 1

    def look(self):
        return self.above + self.below
