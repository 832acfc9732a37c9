"""A model gets the mean of files of every kind, with or without a wrapper, or does not change."""

import os
import pathlib
import subprocess
import sys
import tracemalloc

import keras
import numpy as np
import pytest
import small_training as small

from keras_avg import SWA, MovingAverage, average_weights, checkpoints, swap_weights

KINDS = ["keras", "weights.h5", "weights.json"]
HERE = pathlib.Path(__file__).parent


def save(model, path):
    if str(path).endswith(".keras"):
        model.save(path)
    elif str(path).endswith(".json"):
        model.save_weights(path, max_shard_size=2e-7)  # several shards
    else:
        model.save_weights(path)
    return path


def randomized(seed, optimizer=None):
    """A model with its own weights, statistics and counters."""
    model = small.model(optimizer)
    random = np.random.default_rng(seed)
    for variable in model.variables:
        if keras.backend.is_float_dtype(variable.dtype):
            variable.assign(random.normal(size=variable.shape).astype("float32"))
    return model


def written(folder, number, kind="weights.h5", optimizer=None):
    """Files of models with different weights, and those weights in float64."""
    models = [randomized(seed, optimizer and optimizer()) for seed in range(number)]
    files = [save(model, folder / f"{i}.{kind}") for i, model in enumerate(models)]
    return files, [[small.numpy(v).astype("float64") for v in m.variables] for m in models]


def values_of(model):
    return [small.numpy(variable) for variable in model.variables]


@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_of_three_files_equals_the_numpy_mean_rounded_once(tmp_path, kind):
    files, weights = written(tmp_path, 3, kind)
    model = randomized(9)
    assert checkpoints.average(model, files, verbose=0) is None
    expected = [np.mean(each, axis=0).astype("float32") for each in zip(*weights, strict=True)]
    small.assert_same_bits(values_of(model), expected)


@pytest.mark.slow_on("tensorflow")
def test_the_weighted_mean_of_1_2_and_6_is_right(tmp_path):
    files = []
    for value in (1.0, 2.0, 6.0):
        model = small.model()
        model.set_weights([np.full(w.shape, value) for w in model.weights])
        files.append(save(model, tmp_path / f"{value}.weights.h5"))
    checkpoints.average(model, files, verbose=0)
    small.assert_same_bits(values_of(model), [np.full(v.shape, 3.0) for v in model.variables])
    checkpoints.average(model, files, weights=[1, 2, 1], verbose=0)
    small.assert_same_bits(values_of(model), [np.full(v.shape, 2.75) for v in model.variables])
    checkpoints.average(model, iter(files), weights=np.array([2.0, -1.0, 0.0]), verbose=0)
    small.assert_same_bits(values_of(model), [np.zeros(v.shape) for v in model.variables])


@pytest.mark.slow_on("tensorflow")
def test_weights_are_divided_by_their_sum(tmp_path):
    files, weights = written(tmp_path, 3)
    model = randomized(9)
    checkpoints.average(model, map(str, files), weights=(3, 5, 9), verbose=0)
    expected = [
        np.average(each, axis=0, weights=[3, 5, 9]).astype("float32")
        for each in zip(*weights, strict=True)
    ]
    small.assert_same_bits(values_of(model), expected)


def test_files_of_several_kinds_and_optimizers_are_averaged_together(tmp_path):
    optimizers = ["adam", SWA("sgd"), MovingAverage(SWA(keras.optimizers.RMSprop()))]
    weights = []
    for kind, optimizer in zip(KINDS, optimizers, strict=True):
        model = small.fit(randomized(len(weights), optimizer), epochs=1)
        save(model, tmp_path / f"m.{kind}")
        weights.append([v.astype("float64") for v in values_of(model)])
    model = small.fit(small.model(SWA("adam", 0, 2)))
    state = [small.numpy(v) for v in model.optimizer.variables]
    checkpoints.average(model, [tmp_path / f"m.{kind}" for kind in KINDS], verbose=0)
    expected = [np.mean(each, axis=0).astype("float32") for each in zip(*weights, strict=True)]
    small.assert_same_bits(values_of(model), expected)
    small.assert_same_bits([small.numpy(v) for v in model.optimizer.variables], state)
    small.fit(model)  # On JAX a train step donates buffers, so the model must own its buffers.


@pytest.mark.slow_on("tensorflow")
def test_the_copy_that_was_in_the_model_is_averaged(tmp_path):
    model = small.fit(small.model(SWA("adam", 0, 2)))
    raw = save(model, tmp_path / "raw.keras")
    with average_weights(model):
        averages, swapped = values_of(model), save(model, tmp_path / "swapped.keras")
    expected = [
        np.mean([a.astype("float64"), b.astype("float64")], axis=0).astype("float32")
        for a, b in zip(values_of(model), averages, strict=True)
    ]
    other = small.model()
    checkpoints.average(other, [raw, swapped], verbose=0)
    small.assert_same_bits(values_of(other), expected)


@pytest.mark.slow_on("tensorflow")
def test_a_model_that_holds_averages_is_refused(tmp_path):
    files, _ = written(tmp_path, 2)
    model = small.fit(small.model(SWA("adam", 0, 2)))
    raw = values_of(model)
    swap_weights(model)
    before = values_of(model)
    with pytest.raises(RuntimeError, match=r"holds the averages of 'SWA'.*averaging files"):
        checkpoints.average(model, files, verbose=0)
    small.assert_same_bits(values_of(model), before)
    swap_weights(model)
    small.assert_same_bits(values_of(model), raw)


class Counts(keras.layers.Layer):
    """A layer with variables that have no mean."""

    def build(self, shape):
        arguments = {"shape": (), "trainable": False, "initializer": "zeros"}
        self.number = self.add_weight(dtype="int32", name="number", **arguments)
        self.flag = self.add_weight(dtype="bool", name="flag", **arguments)

    def call(self, x):
        return x


def test_integers_come_from_the_last_file(tmp_path):
    model = keras.Sequential([keras.Input((5,)), Counts()])
    (counts,) = model.layers
    files = []
    for number in (7, 30, 5):
        counts.number.assign(number)
        counts.flag.assign(number == 5)
        files.append(save(model, tmp_path / f"{number}.weights.h5"))
    counts.number.assign(0)
    counts.flag.assign(False)
    checkpoints.average(model, files, weights=[1, 1, 0], verbose=0)
    assert int(small.numpy(counts.number)) == 5
    assert bool(small.numpy(counts.flag))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_dtypes_are_summed_in_float64(tmp_path, dtype):
    if dtype == "float64" and keras.backend.backend() == "jax":
        dtype = "float32"  # all there is
    layers = [keras.Input((5,)), keras.layers.Dense(3, dtype=dtype)]
    model = keras.Sequential(layers)
    values = [1.0, 2**-7, 2**-7]  # If bfloat16 added them one by one, the sum would be 1.
    files = []
    for i, value in enumerate(values):
        model.set_weights([np.full(w.shape, value) for w in model.weights])
        files.append(save(model, tmp_path / f"{i}.keras"))
    checkpoints.average(model, files, weights=[1, 1, -1.0], verbose=0)
    small.assert_same_bits(
        [small.numpy(v).astype("float64") for v in model.variables],
        [np.ones(v.shape) for v in model.variables],
    )


def test_a_normalization_layer_computes_with_the_mean(tmp_path):
    model = keras.Sequential([keras.Input((5,)), keras.layers.Normalization()])
    files = []
    for value in (1.0, 3.0):
        model.layers[0].adapt(small.X + value)
        files.append(save(model, tmp_path / f"{value}.weights.h5"))
    checkpoints.average(model, files, verbose=0)
    before = model.predict(small.X, verbose=0)
    save(model, tmp_path / "mean.weights.h5")
    model.load_weights(tmp_path / "mean.weights.h5")
    np.testing.assert_array_equal(before, model.predict(small.X, verbose=0))

    (tmp_path / "cut.weights.h5").write_bytes(b"")
    with pytest.raises(ValueError, match=r"cut\.weights\.h5"):
        checkpoints.average(model, [*files, tmp_path / "cut.weights.h5"], verbose=0)
    np.testing.assert_array_equal(before, model.predict(small.X, verbose=0))


def cut_short(folder, kind):
    path = save(randomized(1), folder / f"bad.{kind}")
    path = folder / "bad_00000.weights.h5" if kind == "weights.json" else path
    path.write_bytes(path.read_bytes()[:-1000])
    return folder / f"bad.{kind}"


def text(folder, kind):
    (folder / f"bad.{kind}").write_text("These are no weights.")
    return folder / f"bad.{kind}"


def of_other_shapes(folder, kind):
    layers = [keras.Input((5,)), keras.layers.Dense(3), keras.layers.BatchNormalization()]
    return save(keras.Sequential([*layers, keras.layers.Dense(1)]), folder / f"bad.{kind}")


def of_other_layers(folder, kind):
    layers = [keras.Input((5, 1)), keras.layers.Conv1D(3, 2)]
    return save(keras.Sequential(layers), folder / f"bad.{kind}")


def missing(folder, kind):
    return folder / f"bad.{kind}"


@pytest.mark.sample(15, jax=8, tensorflow=4)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spoil", [cut_short, text, of_other_shapes, of_other_layers, missing])
def test_the_error_names_an_unreadable_file_and_nothing_changes(tmp_path, kind, spoil):
    files, _ = written(tmp_path, 2, kind)
    model = small.fit(small.model(SWA("adam", 0, 2)))
    before = values_of(model)
    state = [small.numpy(v) for v in model.optimizer.variables]
    with pytest.raises(ValueError, match=r"bad\.") as refused:
        checkpoints.average(model, [*files, spoil(tmp_path, kind)], verbose=0)
    assert str(tmp_path) in str(refused.value)
    small.assert_same_bits(values_of(model), before)
    small.assert_same_bits([small.numpy(v) for v in model.optimizer.variables], state)
    model.optimizer.swap_weights()
    model.optimizer.swap_weights()
    small.assert_same_bits(values_of(model), before)


@pytest.mark.slow_on("tensorflow")
def test_a_model_does_not_change_if_it_cannot_take_the_mean(tmp_path, monkeypatch):
    files, _ = written(tmp_path, 2)
    model = randomized(9)
    before = values_of(model)
    last = type(model.variables[-1])
    assign, left = last.assign, [0]

    def fails_once(variable, value):
        left[0] -= 1
        if left[0] == 0:
            raise MemoryError("no more")
        return assign(variable, value)

    monkeypatch.setattr(last, "assign", fails_once)
    left[0] = 2 * len(before) + 4  # Reading a file also assigns, inside a scope.
    with pytest.raises(MemoryError):
        checkpoints.average(model, files, verbose=0)
    small.assert_same_bits(values_of(model), before)


@pytest.mark.slow_on("tensorflow")
@pytest.mark.parametrize(
    ("weights", "match"),
    [
        ([1, 2], "one number for each of the 3 files. Received: 2"),
        ([1, 2, np.nan], r"2\.weights\.h5.* finite.*nan"),
        ([1, -np.inf, 1], r"1\.weights\.h5.* finite.*inf"),
        ([1, "2", 1], r"1\.weights\.h5.* finite.*'2'"),
        ([1, 1, -2], r"must not be 0.*0\.weights\.h5"),
        ([0.1, 0.2, -0.3], "must not be 0"),
        ([0, 0, 0], "must not be 0"),
        ("linear", "list of numbers"),
        (1.0, "list of numbers"),
    ],
)
def test_weights_without_a_mean_are_refused(tmp_path, weights, match):
    files, _ = written(tmp_path, 3)
    model = randomized(9)
    before = values_of(model)
    with pytest.raises(ValueError, match=match):
        checkpoints.average(model, files, weights, verbose=0)
    small.assert_same_bits(values_of(model), before)


@pytest.mark.slow_on("tensorflow")
@pytest.mark.parametrize(
    ("filepaths", "match"),
    [
        ([], "no file"),
        ("run/*.keras", "must be a list"),
        (pathlib.Path("a.keras"), "must be a list"),
        (None, "must be a list"),
        ([3], "by its path"),
        ([os.curdir], "cannot be read"),
    ],
)
def test_filepaths_must_be_a_list_of_files(filepaths, match):
    with pytest.raises(ValueError, match=match):
        checkpoints.average(small.model(), filepaths, verbose=0)


@pytest.mark.slow_on("tensorflow")
def test_the_model_must_be_a_built_keras_model(tmp_path):
    files, _ = written(tmp_path, 1)
    with pytest.raises(ValueError, match="not built"):
        checkpoints.average(small.model(with_input_shape=False), files, verbose=0)
    with pytest.raises(ValueError, match=r"must be a keras\.Model"):
        checkpoints.average("model", files, verbose=0)
    with pytest.raises(ValueError, match="verbose"):
        checkpoints.average(small.model(), files, verbose=3)


@pytest.mark.slow_on("tensorflow")
def test_a_bar_shows_how_many_files_were_read(tmp_path, capsys):
    files, _ = written(tmp_path, 3)
    model = randomized(9)
    checkpoints.average(model, files, verbose=0)
    assert capsys.readouterr().out == ""
    checkpoints.average(model, files, verbose=2)
    assert "3/3" in capsys.readouterr().out
    checkpoints.average(model, files)
    assert "3/3" in capsys.readouterr().out


@pytest.mark.slow_on("tensorflow")
def test_a_legacy_h5_file_is_read(tmp_path):
    model = randomized(3)
    model.save(tmp_path / "m.h5")
    other = small.model()
    checkpoints.average(other, [tmp_path / "m.h5"], verbose=0)
    small.assert_same_bits(values_of(other), values_of(model))


def peak_of_numpy(function):
    """The largest number of bytes that Python and NumPy had allocated at one time."""
    tracemalloc.start()
    function()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


@pytest.mark.skipif(
    not hasattr(keras.optimizers, "MultiOptimizer"),
    reason="on torch, an older Keras keeps tensors until Python collects garbage",
)
def test_many_files_take_no_more_of_numpys_memory_than_few(tmp_path):
    model = keras.Sequential([keras.Input((128,)), keras.layers.Dense(512, use_bias=False)])
    model.save_weights(tmp_path / "m.weights.h5")
    few, many = (
        peak_of_numpy(
            lambda number=number: checkpoints.average(
                model, [tmp_path / "m.weights.h5"] * number, verbose=0
            )
        )
        for number in (4, 24)
    )
    assert few > 8 * 128 * 512  # the accumulator
    assert many - few < 4 * 128 * 512  # one copy of the weights


@pytest.mark.thorough
def test_a_thousand_files_take_no_more_memory_than_ten(tmp_path):
    program = [sys.executable, HERE / "programs" / "average_many_files.py", tmp_path, "10", "1000"]
    done = subprocess.run(program, check=True, timeout=600, capture_output=True, text=True)
    few, many = map(int, done.stdout.split()[-2:])
    assert many - few < 3 * 2**20  # bytes, of a model of 1 MiB
