"""What the package shows is what it says it shows, and each part is documented."""

import inspect
import re
import subprocess
import sys

import keras
import pytest

import keras_avg

NAMES = sorted(keras_avg.__all__)


def test_all_is_what_is_exported():
    visible = {
        name
        for name, thing in vars(keras_avg).items()
        if not name.startswith("_") and not inspect.ismodule(thing)
    }
    assert visible == set(keras_avg.__all__)


@pytest.mark.parametrize("name", NAMES)
def test_every_public_symbol_has_arguments_errors_an_example_and_a_reference(name):
    documentation = inspect.getdoc(getattr(keras_avg, name))
    for section in ("Args:", "Raises:", "Example:", "Reference:"):
        assert section in documentation, section


@pytest.mark.parametrize("name", NAMES)
def test_every_constructor_argument_is_documented(name):
    kind = getattr(keras_avg, name)
    documentation = inspect.getdoc(kind)
    for argument in inspect.signature(kind.__init__).parameters:
        if argument not in ("self", "kwargs"):
            assert re.search(rf"^ +{argument}: ", documentation, re.MULTILINE), argument


@pytest.mark.parametrize("name", NAMES)
def test_every_public_class_is_registered_with_keras(name):
    kind = getattr(keras_avg, name)
    assert keras.saving.get_registered_name(kind) == f"keras_avg>{name}"


@pytest.mark.parametrize("name", NAMES)
def test_public_methods_have_docstrings(name):
    kind = getattr(keras_avg, name)
    own = [c for c in kind.__mro__ if c.__module__.startswith("keras_avg")]
    public = {n: t for c in own for n, t in vars(c).items() if not n.startswith("_")}
    undocumented = [
        n
        for n, thing in public.items()
        if (callable(thing) or isinstance(thing, property)) and not inspect.getdoc(getattr(kind, n))
    ]
    assert not undocumented


def test_importing_the_package_loads_no_framework_that_keras_did_not():
    check = (
        "import sys, keras; before = set(sys.modules); import keras_avg; "
        "new = {m.split('.')[0] for m in set(sys.modules) - before}; "
        "assert not new & {'tensorflow', 'jax', 'torch', 'flax', 'orbax'}, new"
    )
    subprocess.run([sys.executable, "-c", check], check=True, timeout=300)
