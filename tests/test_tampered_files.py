"""Truncated and changed files run no code. If a file is refused, it changes nothing."""

import codecs
import io
import json
import marshal
import pickle
import zipfile

import h5py
import keras
import numpy as np
import pytest
import small_training as small
from keras import optimizers

import keras_avg
from keras_avg import LAWA, SWA, SWAG, ModelAverage, MovingAverage


def trained(optimizer=None):
    """A model after three steps by hand, so that nothing must be compiled."""
    model = small.model(optimizer or SWA(MovingAverage("adam"), 0, 2))
    ones = [np.ones(v.shape, "float32") for v in model.trainable_variables]
    small.apply(model.optimizer, model.trainable_variables, ones, times=3)
    return model


@pytest.fixture
def swapped_file(tmp_path):
    """A `.weights.h5` file that holds averages and raw weights."""
    model = trained()
    model.optimizer.swap_weights()
    model.save_weights(tmp_path / "m.weights.h5")
    return tmp_path / "m.weights.h5"


def expect_own_state_kept(loaded, load, error, match):
    """Check that `load` fails, and that the end of a swap still gives the same raw weights.

    Keras loads the model's weights before the optimizer, and does not undo that.
    """
    optimizer = loaded.optimizer
    raw = loaded.get_weights()
    optimizer.swap_weights()
    state = optimizer.get_weights()
    with pytest.raises(error, match=match):
        load()
    small.assert_same_bits(optimizer.get_weights(), state)
    assert optimizer.averages_in_model
    optimizer.swap_weights()
    trained_values = [small.numpy(v) for v in loaded.trainable_variables]
    expected = [v for v, w in zip(raw, loaded.weights, strict=True) if w.trainable]
    small.assert_same_bits(trained_values, expected)


@pytest.mark.parametrize("name", ["m.keras", "m.weights.h5"])
@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_changes_nothing(tmp_path, name, kept):
    saved, model = trained(), trained()
    (saved.save if name.endswith(".keras") else saved.save_weights)(tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(kept * len(whole))])
    before, state = model.get_weights(), model.optimizer.get_weights()

    with pytest.raises((OSError, zipfile.BadZipFile)):
        model.load_weights(tmp_path / name)
    if name.endswith(".keras"):
        with pytest.raises((OSError, ValueError, zipfile.BadZipFile)):
            keras.saving.load_model(tmp_path / name)

    small.assert_same_bits(model.get_weights(), before)
    small.assert_same_bits(model.optimizer.get_weights(), state)


def put(name, value):
    def change(arrays):
        del arrays[name]
        arrays[name] = value

    return change


def drop(name):
    return lambda arrays: arrays.pop(name)


def put_new(name, value=1.0):
    return lambda arrays: arrays.create_dataset(name, data=value)


def retype(name, dtype):
    def change(arrays):
        shape = arrays[name].shape
        del arrays[name]
        arrays.create_dataset(name, shape=shape, dtype=dtype)

    return change


def group(name):
    def change(arrays):
        del arrays[name]
        arrays.create_group(name)

    return change


def rename(name, new_name):
    return lambda arrays: arrays.move(name, new_name)


TAMPERED = {
    "an average of another shape": (put("average_0", np.zeros((5, 7))), r"\(5, 6\).*\(5, 7\)"),
    "an average of text": (put("average_0", np.full((5, 6), b"text")), "float32.*Received: dtype"),
    "no average": (drop("average_0"), "has 9 variables. Received: 8 variables"),
    "a number too many": (lambda arrays: arrays.create_dataset("x", data=1), "9 .*Received: 10"),
    "a name exchanged": (lambda arrays: arrays.move("average_0", "x"), "'average_0'. Received: "),
    "updates that are NaN": (put("updates", np.nan), "counts. Received: nan"),
    "updates below 0": (put("updates", -1), "counts. Received: -1"),
    "snapshots and a half": (put("snapshots", 1.5), "counts. Received: 1.5"),
    "snapshots beyond all counting": (put("snapshots", 1e300), "counts. Received: 1e"),
    "a list of snapshots": (put("snapshots", [1, 2]), r"shape \(\). Received: shape \(2,\)"),
    "no step of the swap": (drop("swapped_after"), "has 7 variables. Received: 6 variables"),
    "a step of the swap that is NaN": (put("swapped_after", np.nan), "counts. Received: nan"),
    "a raw value of another shape": (put("raw_0", np.zeros((1, 6))), r"\(5, 6\).*\(1, 6\)"),
    "a raw value of text": (put("raw_0", np.full((5, 6), b"text")), "float32.*Received: dtype"),
    "an average of arrays": (retype("average_0", "(3,)f4"), r"Received: dtype .*\(3,\)"),
    "updates of arrays": (retype("updates", "(9,)i8"), r"Received: dtype .*\(9,\)"),
    "updates of a kilobyte": (retype("updates", "V1000"), r"Received: dtype \|V1000"),
    "updates of nothing": (put("updates", h5py.Empty("f4")), "Received: dtype of no array"),
    "a group in the place of updates": (group("updates"), "Received: dtype of no array"),
    "a raw value of arrays": (retype("raw_0", "(3,)f4"), r"Received: dtype .*\(3,\)"),
    "an average numbered otherwise": (rename("average_1", "average_01"), "'average_1'. Received"),
    "a statistic without a number": (put_new("raw_statistic_x"), "has 7 variables. Received: 8"),
    "a weight of wide numbers": (put_new("weight_w", np.longdouble(1)), "Received: dtype float128"),
    "a raw value missing": (drop("raw_3"), "has 7 variables. Received: 6 variables"),
}


@pytest.mark.slow_on("tensorflow")
@pytest.mark.parametrize(
    "build",
    [
        lambda: SWA(MovingAverage("adam"), 0, 2),
        lambda: LAWA("adam", 2, 0, 1),
        lambda: ModelAverage("adam", interval_steps=1, outer_optimizer="adam"),
    ],
    ids=["nested", "alone", "with an outer optimizer"],
)
def test_what_is_inside_takes_nothing_of_a_file_that_was_refused(tmp_path, build):
    saved, model = trained(build()), small.fit(small.model(build()))  # of other steps
    saved.save_weights(tmp_path / "m.weights.h5")
    with h5py.File(tmp_path / "m.weights.h5", "r+") as file:
        put("updates", np.nan)(file["optimizer/vars"])
    before = model.optimizer.get_weights()
    with pytest.raises(ValueError, match="counts"):
        model.load_weights(tmp_path / "m.weights.h5")
    small.assert_same_bits(model.optimizer.get_weights(), before)
    saved.save_weights(tmp_path / "m.weights.h5")
    model.load_weights(tmp_path / "m.weights.h5")  # the next file is loaded whole
    small.assert_same_bits(model.optimizer.get_weights(), saved.optimizer.get_weights())


def test_what_is_outside_takes_nothing_of_a_file_that_was_refused_inside(tmp_path):
    saved, model = (trained(SWA(MovingAverage("adam"), 0, 2)) for _ in range(2))
    small.fit(model)
    saved.save_weights(tmp_path / "m.weights.h5")
    with h5py.File(tmp_path / "m.weights.h5", "r+") as file:
        put("updates", 0.5)(file["optimizer/inner_optimizer/vars"])
    before = model.optimizer.get_weights()
    with pytest.raises(ValueError, match=r"counts. Received: 0\.5"):
        model.load_weights(tmp_path / "m.weights.h5")
    small.assert_same_bits(model.optimizer.get_weights(), before)


@pytest.mark.slow_on("jax", "tensorflow")
@pytest.mark.parametrize(
    "around",
    [
        optimizers.LossScaleOptimizer,
        pytest.param(
            lambda wrapper: optimizers.MultiOptimizer(
                optimizers.OptimizerMap(default_optimizer=wrapper)
            ),
            marks=pytest.mark.skipif(
                not hasattr(optimizers, "MultiOptimizer"), reason="it came with Keras 3.15"
            ),
        ),
    ],
    ids=["LossScaleOptimizer", "MultiOptimizer"],
)
def test_a_wrapper_takes_nothing_of_a_refused_file_through_the_optimizer_around_it(
    tmp_path, around
):
    # By `fit`: on JAX, Keras' LossScaleOptimizer cannot take a step by hand.
    saved, model = (
        small.fit(small.model(around(MovingAverage("adam"))), epochs=epochs) for epochs in (2, 1)
    )
    saved.save_weights(tmp_path / "m.weights.h5")
    with h5py.File(tmp_path / "m.weights.h5", "r+") as file:
        part = (
            "optimizers/moving_average" if "optimizers" in file["optimizer"] else "inner_optimizer"
        )
        put("average_2", np.zeros(9))(file[f"optimizer/{part}/vars"])
        put("15", np.zeros(9))(file["optimizer/vars"])
    (wrapper,) = keras_avg.averaging_optimizers(model)
    before = wrapper.get_weights()
    with pytest.raises(ValueError, match=r"could not be loaded|\(9,\)"):
        model.load_weights(tmp_path / "m.weights.h5")
    small.assert_same_bits(wrapper.get_weights(), before)


@pytest.mark.parametrize("kind", TAMPERED)
def test_arrays_that_do_not_fit_are_refused(swapped_file, kind):
    change, match = TAMPERED[kind]
    with h5py.File(swapped_file, "r+") as file:
        change(file["optimizer/vars"])
    model = trained()
    expect_own_state_kept(model, lambda: model.load_weights(swapped_file), ValueError, match)


def test_an_array_of_arrays_inside_is_refused_before_anything_is_taken(swapped_file):
    with h5py.File(swapped_file, "r+") as file:
        retype("5", "(3,)f4")(file["optimizer/inner_optimizer/inner_optimizer/vars"])
    model = trained()
    load = lambda: model.load_weights(swapped_file)  # noqa: E731
    expect_own_state_kept(model, load, ValueError, r"Received: dtype .*\(3,\)")


def test_an_array_inside_whose_values_are_in_another_file_is_refused_before_anything_is_taken(
    tmp_path, swapped_file
):
    (tmp_path / "other").write_bytes(bytes(4000))
    with h5py.File(swapped_file, "r+") as file:
        inner = file["optimizer/inner_optimizer/inner_optimizer/vars"]
        shape = inner["5"].shape
        del inner["5"]
        inner.create_dataset("5", shape, "f4", external=[(str(tmp_path / "other"), 0, 4000)])
    model = trained()
    load = lambda: model.load_weights(swapped_file)  # noqa: E731
    expect_own_state_kept(model, load, ValueError, "Received: dtype of another file")


@pytest.mark.slow_on("tensorflow")
@pytest.mark.parametrize("label", ["gone", "may_not_fit", "why_none", "path"])
@pytest.mark.parametrize("value", [7, np.zeros(3), h5py.Empty("f4")], ids=["7", "zeros", "empty"])
def test_labels_that_are_no_text_say_nothing(swapped_file, label, value):
    with h5py.File(swapped_file, "r+") as file:
        file["optimizer/vars/updates"].attrs[label] = value
        if label == "path":
            file["optimizer/vars/average_0"].attrs[label] = value
    model, expected = trained(), trained()
    model.load_weights(swapped_file)
    expected.optimizer.swap_weights()
    small.assert_same_bits(model.optimizer.get_weights(), expected.optimizer.get_weights())


@pytest.mark.parametrize(
    ("optimizer", "argument"),
    [(LAWA("sgd"), "window"), (SWAG("sgd"), "rank")],
    ids=["LAWA", "SWAG"],
)
def test_a_config_cannot_ask_for_any_number_of_copies(optimizer, argument):
    config = optimizer.get_config() | {argument: 10**9}
    with pytest.raises(ValueError, match=f"< 1001.*Received: {argument}=1000000000"):
        type(optimizer).from_config(config)


def test_a_model_is_not_returned_when_an_array_does_not_fit(tmp_path):
    trained().save(tmp_path / "m.keras")
    weights = io.BytesIO(member(tmp_path / "m.keras", "model.weights.h5"))
    with h5py.File(weights, "r+") as file:
        put("average_0", np.zeros((5, 7)))(file["optimizer/vars"])
    replace(tmp_path / "m.keras", "model.weights.h5", weights.getvalue())
    with pytest.raises(ValueError, match=r"\(5, 6\).*\(5, 7\)"):
        keras.saving.load_model(tmp_path / "m.keras")


def test_averages_without_raw_values_are_an_error_at_the_next_use(swapped_file):
    with h5py.File(swapped_file, "r+") as file:
        for name in [n for n in file["optimizer/vars"] if n.startswith(("raw", "swapped"))]:
            del file[f"optimizer/vars/{name}"]
    model = small.model(SWA(MovingAverage("adam"), 0, 2))
    model.optimizer.build(model.trainable_variables)

    model.load_weights(swapped_file)

    assert model.optimizer.averages_in_model
    for use in (
        model.optimizer.swap_weights,
        lambda: model.save_weights(swapped_file),
        lambda: small.fit(model),
    ):
        with pytest.raises(RuntimeError, match="raw weights are not there"):
            use()


@pytest.mark.slow_on("jax", "tensorflow")
def test_raw_values_of_a_state_that_is_not_swapped_are_dropped(swapped_file):
    with h5py.File(swapped_file, "r+") as file:
        put("averages_in_model", 0)(file["optimizer/vars"])
    model = trained()
    model.load_weights(swapped_file)
    assert not model.optimizer.averages_in_model
    small.fit(model)


class TestOtherFiles:
    """A file of which only a part fits is refused, before the optimizer takes anything from it."""

    def test_a_file_of_another_model_is_refused(self, tmp_path):
        other = keras.Sequential([keras.Input((5,)), keras.layers.Dense(3), keras.layers.Dense(1)])
        other.compile(SWA(MovingAverage("adam"), 0, 2), "mse")
        other.optimizer.build(other.trainable_variables)
        other.save_weights(tmp_path / "m.weights.h5")
        model = trained()
        match = "could not be loaded"  # Keras' own error about the layers comes first.
        load = lambda: model.load_weights(tmp_path / "m.weights.h5")  # noqa: E731
        expect_own_state_kept(model, load, ValueError, match)

    @pytest.mark.parametrize(
        ("build", "match"),
        [
            (lambda: SWA(MovingAverage("sgd"), 0, 2), "has 14 variables. Received: 2 variables"),
            (lambda: SWA("adam", 0, 2), "has a variable|has 9 variables. Received: 14 variables"),
            (
                lambda: SWA(MovingAverage(SWA("adam")), 0, 2),
                "has a variable|has 14 variables. Received: 9 variables",
            ),
        ],
        ids=["another inner optimizer", "less nesting", "more nesting"],
    )
    def test_a_file_of_another_inner_optimizer_is_refused(self, tmp_path, build, match):
        trained(build()).save_weights(tmp_path / "m.weights.h5")
        model = trained()
        load = lambda: model.load_weights(tmp_path / "m.weights.h5")  # noqa: E731
        expect_own_state_kept(model, load, ValueError, match)

    def test_a_file_with_inner_variables_of_other_shapes_is_refused(self, tmp_path):
        trained().save_weights(tmp_path / "m.weights.h5")
        with h5py.File(tmp_path / "m.weights.h5", "r+") as file:
            put("5", np.zeros(7))(file["optimizer/inner_optimizer/inner_optimizer/vars"])
        model = trained()
        load = lambda: model.load_weights(tmp_path / "m.weights.h5")  # noqa: E731
        expect_own_state_kept(model, load, ValueError, r"Received: shape \(7,\)")

    def test_a_file_of_a_wrapper_is_refused_by_an_optimizer_without_one(self, tmp_path):
        trained().save_weights(tmp_path / "m.weights.h5")
        model = trained(optimizers.SGD(momentum=0.5))
        before = [small.numpy(v) for v in model.optimizer.variables]
        with pytest.warns(UserWarning, match="Skipping variable loading"):  # a warning of Keras
            model.load_weights(tmp_path / "m.weights.h5")
        small.assert_same_bits([small.numpy(v) for v in model.optimizer.variables], before)

    def test_averages_of_another_rule_are_loaded_if_they_fit(self, tmp_path):
        """A `MovingAverage` can start from the averages of `SWA`, because names and shapes fit."""
        saved = trained(SWA("adam", 0, 2))
        saved.save_weights(tmp_path / "m.weights.h5")
        model = trained(MovingAverage("adam"))
        model.load_weights(tmp_path / "m.weights.h5")
        small.assert_same_bits(model.optimizer.get_weights(), saved.optimizer.get_weights())


def member(path, name):
    with zipfile.ZipFile(path) as archive:
        return archive.read(name)


def replace(path, name, content, new_name=None):
    with zipfile.ZipFile(path) as archive:
        members = {n: archive.read(n) for n in archive.namelist() if n != name}
    with zipfile.ZipFile(path, "w") as archive:
        for other, value in (members | {new_name or name: content}).items():
            archive.writestr(other, value)


class TestNoCodeRuns:
    @pytest.fixture
    def marker(self, tmp_path):
        path = tmp_path / "ran"
        yield path
        assert not path.exists()

    @staticmethod
    def evil(marker):
        code = compile(f"open({str(marker)!r}, 'w').close()", "evil", "exec")
        dumped = codecs.encode(marshal.dumps(code), "base64").decode("ascii")
        function = {"class_name": "function", "config": "system", "module": "os"}
        return {
            "lambda": {
                "class_name": "__lambda__",
                "config": {"value": [dumped, None, None]},
                "module": "builtins",
                "registered_name": None,
            },
            "function": function | {"registered_name": "system"},
            "class": {
                "class_name": "Popen",
                "config": {"args": ["touch", str(marker)]},
                "module": "subprocess",
                "registered_name": "subprocess>Popen",
            },
            "module": {
                "class_name": "anything",
                "config": {},
                "module": "antigravity",
                "registered_name": None,
            },
        }

    @pytest.mark.slow_on("tensorflow")
    @pytest.mark.parametrize("kind", ["lambda", "function", "class", "module"])
    @pytest.mark.parametrize(
        "place", ["optimizer", "average_decay", "gradient_aggregator", "learning_rate", "itself"]
    )
    def test_a_config_runs_no_code(self, tmp_path, marker, kind, place):
        path = tmp_path / "m.keras"
        trained(MovingAverage("sgd")).save(path)
        config = json.loads(member(path, "config.json"))
        compiled = config["compile_config"]
        if place == "itself":
            compiled["optimizer"] = self.evil(marker)[kind]
        elif place == "learning_rate":
            inner = compiled["optimizer"]["config"]["optimizer"]["config"]
            inner["learning_rate"] = self.evil(marker)[kind]
        else:
            compiled["optimizer"]["config"][place] = self.evil(marker)[kind]
        replace(path, "config.json", json.dumps(config).encode())

        with pytest.raises((TypeError, ValueError)):
            keras.saving.load_model(path)

    def test_a_pickle_among_the_arrays_runs_no_code(self, tmp_path, marker):
        class Evil:
            def __reduce__(self):
                return open, (str(marker), "w")

        path = tmp_path / "m.keras"
        trained().save(path)
        arrays = io.BytesIO()
        np.savez(arrays, __root__=np.array([Evil()], dtype=object))
        assert b"posix" in arrays.getvalue() or b"io" in arrays.getvalue()
        replace(path, "model.weights.h5", arrays.getvalue(), "model.weights.npz")

        since_316 = "Expected a model.weights.h5 file"  # the message of Keras 3.16
        with pytest.raises(ValueError, match=f"allow_pickle|{since_316}"):
            keras.saving.load_model(path)

    def test_a_pickle_instead_of_an_array_runs_no_code(self, swapped_file, marker):
        class Evil:
            def __reduce__(self):
                return open, (str(marker), "w")

        pickled = np.void(pickle.dumps(Evil()))
        with h5py.File(swapped_file, "r+") as file:
            put("updates", pickled)(file["optimizer/vars"])
        model = trained()
        load = lambda: model.load_weights(swapped_file)  # noqa: E731
        expect_own_state_kept(model, load, ValueError, "Received: dtype")
