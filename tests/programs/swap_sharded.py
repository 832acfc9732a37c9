"""On four virtual devices, averages and rings are sharded like their variables.

They are so when swapped and after loading too.

python swap_sharded.py FOLDER [data|model]
"""

import os
import pathlib
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import keras
import numpy as np

import keras_avg


def distribution(kind):
    devices = keras.distribution.list_devices("cpu")
    if kind == "data":
        return keras.distribution.DataParallel(devices=devices)
    mesh = keras.distribution.DeviceMesh((1, 4), ["batch", "model"], devices)
    layout = keras.distribution.LayoutMap(mesh)
    layout[".*kernel"] = (None, "model")
    return keras.distribution.ModelParallel(layout_map=layout, batch_dim_name="batch")


def model():
    keras.utils.set_random_seed(1)
    layers = [keras.Input((8,)), keras.layers.Dense(16), keras.layers.Dense(4)]
    new = keras.Sequential(layers)
    inner = keras_avg.MovingAverage(keras.optimizers.Adam(0.02))
    inner = keras_avg.LAWA(inner, window=3, average_period=1)
    new.compile(keras_avg.SWA(inner, start_averaging=3, average_period=2), "mse")
    return new


def fit(trained):
    random = np.random.default_rng(0)
    x, y = random.normal(size=(64, 8)), random.normal(size=(64, 4))
    trained.fit(x, y, batch_size=8, shuffle=False, verbose=0)


def values(variables):
    return [np.asarray(v.value) for v in variables]


def same(ours, theirs):
    assert len(ours) == len(theirs)
    assert all(map(np.array_equal, ours, theirs))


def main(folder, kind):
    keras.distribution.set_distribution(distribution(kind))
    trained = model()
    fit(trained)
    optimizer, variables = trained.optimizer, trained.trainable_variables
    averages = [optimizer.get_slot(v, "average") for v in variables]
    rings = [optimizer.inner_optimizer.get_slot(v, "snapshot") for v in variables]

    def check_shardings():
        for variable, average in zip(variables, averages, strict=True):
            assert len(variable.value.sharding.device_set) == 4
            assert variable.value.sharding == average.value.sharding
        for variable, ring in zip(variables, rings, strict=True):
            rows = ring.value.sharding.shard_shape(ring.shape)
            assert rows == (3, *variable.value.sharding.shard_shape(variable.shape))
        if kind == "model":
            assert not variables[0].value.sharding.is_fully_replicated

    check_shardings()
    raw = values(variables)
    optimizer.swap_weights()
    check_shardings()
    same(values(variables), values(averages))
    for kept, variable in zip(optimizer._swap.raw.tensors, variables, strict=True):
        assert kept.sharding == variable.value.sharding, "the raw values were gathered"
    trained.save(pathlib.Path(folder) / "swapped.keras")
    optimizer.swap_weights()
    check_shardings()
    same(values(variables), raw)

    loaded = keras.saving.load_model(pathlib.Path(folder) / "swapped.keras")
    loaded.optimizer.swap_weights()
    same(values(loaded.trainable_variables), raw)
    fit(trained)
    fit(loaded)
    same(values(loaded.variables), values(trained.variables))
    same(values(loaded.optimizer.variables), values(optimizer.variables))


main(*sys.argv[1:])
