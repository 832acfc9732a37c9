"""The code on the pages and in the docstrings runs without changes on each backend."""

import inspect
import pathlib
import re
import shutil

import keras
import numpy as np
import pytest
from test_public_api import CLASSES, PUBLIC

import keras_avg

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
    """The blocks for this backend. Each is a pair: the line before the block, and its code."""
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


@pytest.mark.sample(6, jax=3, tensorflow=2)
@pytest.mark.parametrize("page", [p for p in PAGES if BLOCK.search(p.read_text())], ids=title)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch, dtype_policy):
    monkeypatch.chdir(tmp_path)
    run(page.read_text(), str(page), {"__name__": "__main__"})


def test_a_block_for_another_backend_is_skipped_and_line_numbers_are_kept():
    other = "jax" if BACKEND != "jax" else "torch"
    text = f"Text\n\n<!-- only: {other} -->\n```python\n1 / 0\n```\n\n```python\na = 2\n```\n"
    assert list(blocks(text)) == [(8, "a = 2\n")]
    assert list(blocks("<!-- not run: old -->\n```python\n1 / 0\n```\n")) == []


# Examples in docstrings

STEPS = 20  # of an epoch: so many that what the examples wait for comes


class Shard(keras.utils.PyDataset):
    """A dataset such as a worker has."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return X[:32], Y[:32]


RANDOM = np.random.default_rng(3)
X = RANDOM.normal(size=(32 * STEPS, 3)).astype("float32")
Y = X.sum(axis=1, keepdims=True)


class Quiet(keras.Sequential):
    """A model without a progress bar. The bar takes longer than the steps."""

    def fit(self, *arguments, **keywords):
        return super().fit(*arguments, **{"verbose": 0} | keywords)


def make_model(optimizer="sgd"):
    layers = [keras.layers.BatchNormalization(), keras.layers.Dense(1)]
    model = Quiet([keras.Input((3,)), *layers])
    model.compile(optimizer, loss="mse", metrics=["accuracy"])
    return model


def names_of_examples(name):
    """The names that the examples use: a model that was trained with averages, data, files."""
    kind = keras_avg.SWAG if name.startswith("SWAG.") else keras_avg.SWA
    model = make_model(kind("sgd", average_period=1))
    model.optimizer.build(model.trainable_variables)
    model.load_weights(f"trained/{kind.__name__}.weights.h5")
    if name.endswith("SaveAverages"):  # Its example writes these files.
        shutil.rmtree("run/averages")
    return {
        **{"keras": keras, "keras_avg": keras_avg, "numpy": np, "ops": keras.ops},
        **{"model": model, "optimizer": model.optimizer, "make_model": make_model},
        **{"x": X, "y": Y, "x_val": X[:64], "y_val": Y[:64], "x_new": X[:64], "my_shard": Shard()},
        **{"files": FILES, "v": keras.Variable(1.0), "w": keras.Variable(2.0)},
        **functional_state(model),
    }


FILES = [f"run/{epoch}.weights.h5" for epoch in range(11, 21)]


@pytest.fixture(scope="session")
def files_of_runs(tmp_path_factory):
    """A folder with the files of trained models. To train them anew for each example is slow."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        write_files_of_runs()
    return folder


def write_files_of_runs():
    """Train, and write files into the folder `run`, as if each file were of another epoch."""
    pathlib.Path("run").mkdir()
    pathlib.Path("trained").mkdir()
    for kind in (keras_avg.SWAG, keras_avg.SWA):
        model = make_model(kind("sgd", average_period=1))
        for epoch in (20, 30):
            model.fit(X[:64], Y[:64])
            model.save(f"run/{epoch}.keras")
        model.save_weights(f"trained/{kind.__name__}.weights.h5")
    for file in FILES:
        shutil.copy("trained/SWA.weights.h5", file)
    optimizer = "sgd"
    for sigma_rel in (0.05, 0.10):
        decay = keras_avg.decays.PowerFunction(sigma_rel)
        optimizer = keras_avg.MovingAverage(optimizer, average_decay=decay)
    averages = keras_avg.callbacks.SaveAverages("run/averages", every_steps=1)
    make_model(optimizer).fit(X[:64], Y[:64], epochs=16, callbacks=[averages])


def functional_state(model):
    state = [keras.ops.convert_to_tensor(v) for v in model.optimizer.variables]
    trainable = [keras.ops.convert_to_tensor(v) for v in model.trainable_variables]
    gradients = [keras.ops.zeros_like(v) for v in trainable]
    return {"state": state, "trainable": trainable, "gradients": gradients}


def documented():
    """Docstrings of the public symbols and of their public methods, by full name."""
    for name, thing in PUBLIC.items():
        yield name, inspect.getdoc(thing)
        kinds = inspect.getmro(thing) if name in CLASSES else ()
        for kind in (kind for kind in kinds if kind.__module__.startswith("keras_avg")):
            for member, function in vars(kind).items():
                if not member.startswith("_") and getattr(function, "__doc__", None):
                    yield f"{kind.__name__}.{member}", inspect.getdoc(function)


EXAMPLES = {name: text for name, text in documented() if BLOCK.search(text)}
if BACKEND == "tensorflow":  # where Keras has no `stateless_apply`
    del EXAMPLES["ShowsAverages.stateless_average"]


@pytest.mark.sample(12, jax=6, tensorflow=4)
@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_of_a_docstring_runs(name, files_of_runs, tmp_path, monkeypatch):
    shutil.copytree(files_of_runs, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    run(EXAMPLES[name], f"docstring of {name}", names_of_examples(name))
