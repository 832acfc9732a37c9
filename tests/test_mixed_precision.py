"""Dtype policies, loss scaling and accumulation. Keras decides which step counts as an update."""

import os

import bare_training
import keras
import numpy as np
import pytest
import small_training as small
from keras import optimizers
from wrappers import INNER, each_wrapper

from keras_avg import MovingAverage

# Rounding of a float64 average, relative to 1 + |average|, over a dozen averagings.
FLOAT64_TOLERANCE = 2e-15


SGD = {
    "nesterov": INNER["nesterov"],
    "accumulation": lambda: optimizers.SGD(0.05, momentum=0.9, gradient_accumulation_steps=2),
}


# Not Adam: its beta_2 is rounded to 1 in bfloat16, and then nothing moves.
@pytest.mark.sample(3, tensorflow=1)
@pytest.mark.parametrize("inner", SGD)
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "bfloat16"])
def test_averages_are_right_under_low_precision_policies(policy, inner, dtype_policy):
    dtype_policy(policy)

    model = bare_training.assert_invisible(small.model, SGD[inner])

    scaled = isinstance(model.optimizer, optimizers.LossScaleOptimizer)
    assert scaled == (policy == "mixed_float16")  # `compile` puts the scaling outside.
    average = bare_training.outermost(model).get_slot(model.trainable_variables[0], "average")
    assert average.dtype == "float32"


@pytest.mark.sample(4, tensorflow=2)
@pytest.mark.parametrize("inner", ["adam", "accumulation"])
@each_wrapper
def test_steps_that_loss_scaling_skips_do_not_average(wrapper, inner, dtype_policy):
    dtype_policy("mixed_float16")
    targets = small.Y.copy()
    targets[2 * small.BATCH_SIZE] = np.inf  # This is in the third batch of each epoch.

    def model(optimizer):
        return small.model(optimizers.LossScaleOptimizer(optimizer, initial_scale=64.0))

    def fit(model, callbacks):
        arguments = {"batch_size": small.BATCH_SIZE, "shuffle": False, "verbose": 0}
        model.fit(small.X, targets, epochs=2, callbacks=callbacks, **arguments)
        return model

    optimizer = bare_training.assert_invisible(model, INNER[inner], fit, wrapper).optimizer

    taken = 2 * (small.BATCHES - 1)
    assert int(optimizer.iterations) == (taken if inner == "adam" else taken // 2)
    assert float(optimizer.dynamic_scale) == 64.0 / 4


def test_averages_are_right_while_the_loss_scale_grows(dtype_policy):
    def model(optimizer):
        scaled = optimizers.LossScaleOptimizer(optimizer, dynamic_growth_steps=3)
        return small.model(scaled)

    trained = bare_training.assert_invisible(model, INNER["adam"])

    assert float(trained.optimizer.dynamic_scale) == 2.0**15 * 2**4  # after twelve steps


@pytest.mark.skipif(
    keras.backend.backend() == "jax" and os.environ.get("JAX_ENABLE_X64") != "1",
    reason="JAX has float64 only with JAX_ENABLE_X64=1; test_devices.py runs this with it",
)
def test_float64_weights_have_float64_averages(dtype_policy):
    dtype_policy("float64")

    model = bare_training.assert_invisible(
        small.model, INNER["nesterov"], tolerance=FLOAT64_TOLERANCE
    )

    average = bare_training.outermost(model).get_slot(model.trainable_variables[0], "average")
    assert average.dtype == "float64"


def test_the_average_of_a_bfloat16_variable_is_kept_in_float32(dtype_policy):
    """The weight is 1, and then 1 + 1/128, the next bfloat16. The average is between them."""
    variable = keras.Variable([1.0], dtype="bfloat16")
    optimizer = MovingAverage(optimizers.SGD(1.0), average_decay=0.75)

    small.apply(optimizer, [variable], [[-1 / 128]])

    np.testing.assert_array_equal(optimizer.get_slot(variable, "average"), [1 + 1 / 512])


def float32_of(tensor):
    return keras.ops.convert_to_numpy(keras.ops.cast(tensor, "float32"))


STRIDED = pytest.param(
    True, marks=pytest.mark.skipif(keras.backend.backend() != "torch", reason="torch has strides")
)


@pytest.mark.parametrize("is_strided", [False, STRIDED])
def test_float32_averages_of_large_low_precision_variables_are_right(is_strided):
    """On torch, such variables are averaged piece by piece, and all others as a whole."""
    rng = np.random.default_rng(0)
    shapes = [(3,), (300, 500), (2,), (70_000,), (1, 1)]
    variables = [keras.Variable(rng.normal(size=shape), dtype="bfloat16") for shape in shapes]
    optimizer = MovingAverage(optimizers.SGD(0.1), average_decay=0.75)
    optimizer.build(variables)
    expected = [float32_of(variable) for variable in variables]
    if is_strided:
        for variable in variables[1], optimizer.get_slot(variables[3], "average"):
            variable.value.data = strided(variable.value.data)

    for _ in range(3):
        optimizer.apply([keras.ops.ones(variable.shape, variable.dtype) for variable in variables])
        values = map(float32_of, variables)
        expected = [a + np.float32(0.25) * (v - a) for a, v in zip(expected, values, strict=True)]

    for variable, array in zip(variables, expected, strict=True):
        average = small.numpy(optimizer.get_slot(variable, "average"))
        np.testing.assert_allclose(average, array, rtol=1e-6, atol=1e-7)


def strided(tensor):
    """The same values, but in every second place of a larger memory."""
    wider = tensor.new_empty((*tensor.shape, 2))
    wider[..., 0] = tensor
    return wider[..., 0]
