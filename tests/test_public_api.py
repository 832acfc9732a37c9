"""`__all__` lists exactly the public names, and each public name is documented."""

import inspect
import re
import subprocess
import sys

import keras
import pytest

import keras_avg
import keras_avg.callbacks
import keras_avg.checkpoints
import keras_avg.decays
import keras_avg.distributed
import keras_avg.schedules

MODULES = [
    keras_avg,
    keras_avg.callbacks,
    keras_avg.checkpoints,
    keras_avg.decays,
    keras_avg.distributed,
    keras_avg.schedules,
]
PUBLIC = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module in MODULES
    for name in module.__all__
    if not inspect.ismodule(getattr(module, name))
}
CLASSES = {name: thing for name, thing in PUBLIC.items() if inspect.isclass(thing)}
SERIALIZABLE = (keras.optimizers.Optimizer, keras.optimizers.schedules.LearningRateSchedule)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_all_lists_exactly_the_exported_names(module):
    visible = {
        name
        for name, thing in vars(module).items()
        if not name.startswith("_") and not inspect.ismodule(thing)
    }
    modules = {m.__name__.rpartition(".")[2] for m in MODULES if m is not module}
    assert visible == set(module.__all__) - modules
    assert all(hasattr(module, name) for name in module.__all__)


def arguments(name):
    function = PUBLIC[name].__init__ if name in CLASSES else PUBLIC[name]
    parameters = inspect.signature(function).parameters.values()
    unnamed = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.kind not in unnamed and p.name != "self"]


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_symbol_has_its_arguments_and_an_example(name):
    documentation = inspect.getdoc(PUBLIC[name])
    sections = ["Args:", "Example:"] if arguments(name) else ["Example:"]
    sections += ["Raises:", "Reference:"] if name in CLASSES else ["Returns:"]
    for section in sections:
        assert section in documentation, section


@pytest.mark.parametrize("name", PUBLIC)
def test_every_argument_is_documented(name):
    documentation = inspect.getdoc(PUBLIC[name])
    for argument in arguments(name):
        assert re.search(rf"^ +{argument}: ", documentation, re.MULTILINE), argument


@pytest.mark.parametrize(
    "name", [name for name, kind in CLASSES.items() if issubclass(kind, SERIALIZABLE)]
)
def test_optimizers_and_schedules_are_registered_with_keras(name):
    kind = CLASSES[name]
    assert keras.saving.get_registered_name(kind) == f"keras_avg>{kind.__name__}"


@pytest.mark.parametrize("name", CLASSES)
def test_public_methods_have_docstrings(name):
    kind = CLASSES[name]
    own = [c for c in kind.__mro__ if c.__module__.startswith("keras_avg")]
    public = {n: t for c in own for n, t in vars(c).items() if not n.startswith("_")}
    undocumented = [
        n
        for n, thing in public.items()
        if (callable(thing) or isinstance(thing, property)) and not inspect.getdoc(getattr(kind, n))
    ]
    assert not undocumented


@pytest.mark.slow_on("jax", "tensorflow")
def test_importing_the_package_loads_no_framework_that_keras_did_not_load():
    check = (
        "import sys, keras; before = set(sys.modules); import keras_avg; "
        "new = {m.split('.')[0] for m in set(sys.modules) - before}; "
        "assert not new & {'tensorflow', 'jax', 'torch', 'flax', 'orbax'}, new; "
        "engines = [m for m in sys.modules if m.startswith('keras_avg._backend.communicators.')]; "
        "assert not engines, engines"
    )
    subprocess.run([sys.executable, "-c", check], check=True, timeout=300)
