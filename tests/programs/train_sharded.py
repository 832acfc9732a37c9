"""On four virtual devices, wrappers do not change training, and averaging moves no data.

python train_sharded.py [data|model]
"""

import os
import pathlib
import re
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import bare_training
import jax
import keras
import numpy as np
import small_training as small
from wrappers import chain

# Each of four devices sums a quarter of a batch. The difference is rounding of float32 gradients,
# over twelve steps.
TOLERANCE = 1e-4
COMMUNICATES = re.compile(
    r"(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
)


def distribution(kind):
    devices = keras.distribution.list_devices("cpu")
    if kind == "data":
        return keras.distribution.DataParallel(devices=devices)
    mesh = keras.distribution.DeviceMesh((1, 4), ["batch", "model"], devices)
    layout = keras.distribution.LayoutMap(mesh)
    layout[".*kernel"] = (None, "model")
    return keras.distribution.ModelParallel(layout_map=layout, batch_dim_name="batch")


def model(optimizer):
    keras.utils.set_random_seed(42)
    layers = [keras.layers.Dense(8, activation="tanh"), keras.layers.Dense(4)]
    new = keras.Sequential([keras.Input((5,)), *layers])
    new.compile(optimizer, "mse")
    return new


def inner():
    return keras.optimizers.SGD(0.05, momentum=0.9, nesterov=True)


def communication(trained):
    """The collective operations in the compiled update."""
    variables = trained.trainable_variables, trained.optimizer.variables
    trainable, state = [[v.value for v in group] for group in variables]
    update = jax.jit(trained.optimizer.stateless_apply)
    compiled = update.lower(state, trainable, trainable).compile()
    return COMMUNICATES.findall(compiled.as_text())


def averages(trained):
    return [
        average
        for wrapper in chain(trained.optimizer)[0]
        for average in (wrapper.get_slot(v, "average") for v in trained.trainable_variables)
    ]


def main(kind):
    alone = averages(small.fit(model(bare_training.wrapped(inner()))))
    assert all(len(a.value.sharding.device_set) == 1 for a in alone)

    keras.distribution.set_distribution(distribution(kind))
    trained = bare_training.assert_invisible(model, inner)

    for ours, theirs in zip(averages(trained), alone, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)
        assert len(ours.value.sharding.device_set) == 4
    variables = trained.trainable_variables * 2  # two wrappers
    for average, variable in zip(averages(trained), variables, strict=True):
        assert average.value.sharding == variable.value.sharding
    kernel = trained.trainable_variables[0].value
    assert kernel.sharding.is_fully_replicated == (kind == "data")
    assert communication(trained) == communication(small.fit(model(inner())))


main(*sys.argv[1:])
