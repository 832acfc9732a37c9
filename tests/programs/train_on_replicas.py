"""On two logical devices, every replica has the averages of a training on one device.

python train_on_replicas.py FOLDER POLICY [resumed]

With `resumed` the model is also saved, loaded and trained on, which takes ten times as long.
"""

import pathlib
import sys

import keras
import numpy as np
import tensorflow as tf

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import bare_training
import small_training as small
from wrappers import chain

import keras_avg

# Each of two replicas sums half a batch. The difference is rounding of float32 gradients, over
# twelve steps.
TOLERANCE = 1e-4


def model(optimizer):
    """A model without batch normalization, because each replica would have its own moments."""
    keras.utils.set_random_seed(42)
    layers = [keras.layers.Dense(6, activation="tanh"), keras.layers.Dense(1)]
    new = keras.Sequential([keras.Input((5,)), *layers])
    new.compile(optimizer, "mse", jit_compile=False)
    return new


def inner():
    return keras.optimizers.SGD(0.05, momentum=0.9, nesterov=True)


def replicas(variable):
    native = variable.value if isinstance(variable, keras.Variable) else variable
    return [component.numpy() for component in native.values]


def assert_alike_on_replicas(variables):
    for variable in variables:
        first, second = replicas(variable)
        np.testing.assert_array_equal(first, second, err_msg=variable.path)


def averages(trained):
    wrappers, _ = chain(bare_training.outermost(trained))
    return [a for wrapper in wrappers for a in small.slots(wrapper, trained.trainable_variables)]


def trains_as_bare_and_alike_everywhere(strategy):
    with strategy.scope():
        bare = small.fit(model(inner()))
        trained = model(bare_training.wrapped(inner()))
    record = bare_training.Trajectories()
    small.fit(trained, callbacks=[record])

    bare_training.assert_same_training(trained, bare)
    bare_training.assert_averages(trained, record.values)
    assert_alike_on_replicas(trained.variables)
    assert_alike_on_replicas(trained.optimizer.variables)
    return trained


def swaps_on_every_replica(trained):
    wrapper, variables = bare_training.outermost(trained), trained.trainable_variables
    raw = bare_training.state(trained)
    with wrapper.average_weights():
        assert_alike_on_replicas(variables)
        small.assert_same_bits([small.numpy(v) for v in variables], small.slots(wrapper, variables))
    assert_alike_on_replicas(variables)
    small.assert_same_bits(bare_training.state(trained), raw)


def is_saved_and_resumed(strategy, trained, folder):
    wrapper = bare_training.outermost(trained)
    with wrapper.average_weights():
        trained.save(folder / "swapped.keras")
    trained.save(folder / "raw.keras")
    tf.train.Checkpoint(model=trained).write(str(folder / "checkpoint"))
    with strategy.scope():
        swapped = keras.saving.load_model(folder / "swapped.keras")
        bare_training.outermost(swapped).swap_weights()
        loaded = keras.saving.load_model(folder / "raw.keras")
        restored = small.fit(model(bare_training.wrapped(inner())), epochs=1)
        tf.train.Checkpoint(model=restored).read(str(folder / "checkpoint")).assert_consumed()
    copies = [small.fit(copy) for copy in (trained, swapped, loaded, restored)]
    for copy in copies[1:]:
        small.assert_same_bits(bare_training.state(copy), bare_training.state(trained))
        small.assert_same_bits(
            bare_training.state(copy.optimizer), bare_training.state(trained.optimizer)
        )
        assert_alike_on_replicas(copy.optimizer.variables)


def is_resumed_on_one_device(trained, folder):
    outside = small.fit(keras.saving.load_model(folder / "raw.keras"))
    for ours, theirs in zip(averages(outside), averages(trained), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)


def rings_are_alike(strategy):
    """Both replicas have the ring's rows of a training on one device."""

    def optimizer():
        return keras_avg.SWAG(keras_avg.LAWA(inner(), 3, average_period=2), 1, 1, rank=4)

    with strategy.scope():
        ours = small.fit(model(optimizer())).optimizer
    alone = small.fit(model(optimizer())).optimizer
    pairs = ((ours, alone), (ours.inner_optimizer, alone.inner_optimizer))
    for (one, other), ring in zip(pairs, ("deviation", "snapshot"), strict=True):
        assert_alike_on_replicas(one.rings[ring].kept)
        for found, expected in zip(one.rings[ring].kept, other.rings[ring].kept, strict=True):
            rows, expected = small.numpy(found), small.numpy(expected)
            np.testing.assert_allclose(rows, expected, atol=TOLERANCE)
            assert np.all(np.any(expected.reshape(len(rows), -1), axis=1)), "a row is zero"


def two_replicas():
    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    assert strategy.num_replicas_in_sync == 2
    return strategy


def main(folder, policy, part="trained"):
    strategy = two_replicas()
    keras.config.set_dtype_policy(policy)
    trained = trains_as_bare_and_alike_everywhere(strategy)
    swaps_on_every_replica(trained)
    if policy == "float32":
        alone = small.fit(model(bare_training.wrapped(inner())))
        for ours, theirs in zip(averages(trained), averages(alone), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)
    if policy == "float32":
        rings_are_alike(strategy)
    if part == "resumed":
        is_saved_and_resumed(strategy, trained, pathlib.Path(folder))
    if part == "resumed" and policy == "float32":
        is_resumed_on_one_device(trained, pathlib.Path(folder))


if __name__ == "__main__":
    main(*sys.argv[1:])
