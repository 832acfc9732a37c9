"""A ring is one variable in memory. In a file each of its rows is an array, as in version 0.2.

The files of version 0.2 hold the small model after twelve steps: one with LAWA and raw weights, one
with SWAG and its averages in the model. They were written on torch, with the oldest Keras that is
supported.
"""

import pathlib
import re

import h5py
import keras
import numpy as np
import pytest
import small_training as small
from keras import optimizers

import keras_avg
from keras_avg import LAWA, SWAG

FILES = pathlib.Path(__file__).parent / "files_of_0_2"


def expected(prefix):
    with np.load(FILES / "expected.npz") as arrays:
        return {n.removeprefix(prefix): arrays[n] for n in sorted(arrays.files) if prefix in n}


def rows(optimizer, ring):
    """The rows of each ring by their names in a file."""
    return {
        f"{ring}_{place}_{i}": row
        for i, variable in enumerate(optimizer.rings[ring].kept)
        for place, row in enumerate(small.numpy(variable))
    }


@pytest.mark.parametrize(("name", "ring"), [("lawa", "snapshot"), ("swag", "deviation")])
def test_a_file_of_0_2_with_a_ring_is_loaded(name, ring):
    model = keras.saving.load_model(FILES / f"{name}.keras")
    found = rows(model.optimizer, ring)
    wanted = expected(f"{name}/{ring}_")
    assert len(found) == len(wanted) > 0
    for row, value in found.items():
        np.testing.assert_array_equal(value, wanted[row.removeprefix(f"{ring}_")])
    small.assert_same_bits(model.get_weights(), list(expected(f"{name}/weights_").values()))
    model.optimizer.swap_weights()
    other = "raw" if name == "swag" else "averaged"
    for ours, theirs in zip(
        model.get_weights(), expected(f"{name}/{other}_").values(), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7)


def test_a_file_has_one_array_for_each_row(tmp_path):
    model = small.fit(small.model(LAWA("sgd", 3, average_period=1)), epochs=1)
    model.save_weights(tmp_path / "m.weights.h5")
    with h5py.File(tmp_path / "m.weights.h5") as file:
        stored = file["optimizer/vars"]
        for name, row in rows(model.optimizer, "snapshot").items():
            np.testing.assert_array_equal(stored[name], row)
            assert stored[name].attrs["path"]
        assert not any(np.shape(array)[:1] == (3,) for array in stored.values())


@pytest.mark.slow_on("jax", "tensorflow")
def test_a_shard_need_not_hold_a_whole_ring(tmp_path):
    """The rings are larger than a shard, and the model's variables are not."""
    if not hasattr(keras.src.saving.saving_lib, "ShardedH5IOStore"):
        pytest.skip("this Keras has no sharded files")
    model = small.fit(small.model(SWAG("sgd", 0, 1, rank=8)), epochs=1)
    largest = max(small.numpy(v).nbytes for v in model.variables)
    model.save_weights(tmp_path / "m.weights.json", max_shard_size=2 * largest / 1024**3)
    other = small.model(SWAG("sgd", 0, 1, rank=8))
    other.optimizer.build(other.trainable_variables)
    other.load_weights(tmp_path / "m.weights.json")
    small.assert_same_bits(other.optimizer.get_weights(), model.optimizer.get_weights())


class TestFilesThatDoNotFit:
    def saved(self, folder, change):
        model = small.fit(small.model(LAWA("sgd", 3, average_period=1)), epochs=1)
        model.save_weights(folder / "m.weights.h5")
        with h5py.File(folder / "m.weights.h5", "r+") as file:
            change(file["optimizer/vars"])
        return folder / "m.weights.h5"

    def refused(self, path, match, window=3):
        model = small.model(LAWA("sgd", window, average_period=1))
        model.optimizer.build(model.trainable_variables)
        before = model.optimizer.get_weights()
        with pytest.raises(ValueError, match=match):
            model.load_weights(path)
        small.assert_same_bits(model.optimizer.get_weights(), before)

    @pytest.mark.parametrize("window", [2, 4])
    def test_another_window_is_refused(self, tmp_path, window):
        path = self.saved(tmp_path, lambda stored: None)
        self.refused(path, rf"has shape \({window}, .*Received: shape \(3, ", window)

    def test_a_missing_row_is_refused(self, tmp_path):
        path = self.saved(tmp_path, lambda stored: stored.pop("snapshot_1_0"))
        self.refused(path, "does not fit optimizer 'LAWA'")

    def test_a_row_of_another_shape_is_refused(self, tmp_path):
        def change(stored):
            del stored["snapshot_1_0"]
            stored["snapshot_1_0"] = np.zeros((7,), "float32")

        self.refused(self.saved(tmp_path, change), "does not fit optimizer 'LAWA'")

    def test_rows_beside_a_whole_ring_are_refused(self, tmp_path):
        def change(stored):
            stored["snapshot_0"] = np.stack([stored[f"snapshot_{i}_0"][...] for i in range(3)])

        self.refused(self.saved(tmp_path, change), "does not fit optimizer 'LAWA'")


@keras.saving.register_keras_serializable(package="keras_avg_tests")
class Middle(keras_avg.AveragedOptimizerWrapper):
    """The median of the last three snapshots, in a ring that a user's rule asks for."""

    def stores(self):
        return {"last": 3}

    def accumulate(self, due, step):
        self.rings["last"].put_if(due, self.snapshots_so_far, lambda variable: variable)

    def averages(self):
        return [keras.ops.median(ring, axis=0) for ring in self.rings["last"].values()]


@pytest.mark.parametrize("first", [0, -1, 1001, True, 2.5, None, "variables"])
def test_a_store_that_begins_with_something_else_is_refused(first):
    optimizer = Middle("sgd")
    optimizer.stores = lambda: {"last": first}
    message = re.escape(f"Received from `stores()`: {first!r}")
    with pytest.raises(ValueError, match=message):
        optimizer.build([keras.Variable([1.0])])


@pytest.mark.slow_on("jax", "tensorflow")
@pytest.mark.parametrize("compiled", [True, False])
def test_a_rule_of_a_user_may_have_a_ring(tmp_path, compiled):
    if compiled and keras.backend.backend() == "torch":
        pytest.skip("torch runs Python at each step")
    model = small.model(Middle(optimizers.SGD(0.1)))
    model.compile(model.optimizer, "mse", jit_compile=compiled)
    trajectories = small.trajectories(model, 6)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for each in (model, loaded):
        each.optimizer.swap_weights()
        for variable, values in zip(each.trainable_variables, trajectories, strict=True):
            np.testing.assert_array_equal(small.numpy(variable), np.median(values[-3:], axis=0))
