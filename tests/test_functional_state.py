"""Functions for training loops that keep the optimizer's state in a list."""

import keras
import numpy as np
import pytest
import small_training as small
from keras import ops, optimizers
from rules import MeanByStep

from keras_avg import SWA, MovingAverage

cannot_apply = pytest.mark.skipif(
    keras.backend.backend() == "tensorflow", reason="Keras has no stateless_apply on TensorFlow"
)


def built(optimizer):
    variables = [keras.Variable([1.0, 2.0]), keras.Variable([[3.0]])]
    optimizer.build(variables)
    return optimizer, [v.value for v in variables], [v.value for v in optimizer.variables]


def step(optimizer, trainable, state):
    grads = [ops.ones(tuple(value.shape)) for value in trainable]
    return optimizer.stateless_apply(state, grads, trainable)


def arrays(tensors):
    return [ops.convert_to_numpy(tensor) for tensor in tensors]


@cannot_apply
def test_stateless_average_returns_raw_values_before_the_first_snapshot():
    optimizer, trainable, state = built(SWA(optimizers.SGD(0.5), start_averaging=2))
    for done in range(4):
        averages = arrays(optimizer.stateless_average(state, trainable))
        snapshots = int(optimizer.stateless_num_snapshots(state))
        assert snapshots == (done == 3)
        expected = arrays(trainable)
        small.assert_same_bits(averages, expected)
        if done < 3:
            assert not any(map(np.any, arrays(optimizer.stateless_average(state))))
        trainable, state = step(optimizer, trainable, state)
    assert not optimizer.has_average  # It reads the optimizer's own variables, and not the list.


@cannot_apply
def test_stateless_average_also_returns_averages_of_inner_wrappers():
    inner = MovingAverage(optimizers.SGD(2.0), average_decay=0.5)
    optimizer, trainable, state = built(SWA(inner, start_averaging=100))
    start = arrays(trainable)
    trainable, state = step(optimizer, trainable, state)

    averages = optimizer.stateless_average(state, trainable, optimizer=inner)

    small.assert_same_bits(arrays(averages), [value - 1.0 for value in start])
    assert int(optimizer.stateless_num_snapshots(state, optimizer=inner)) == 1
    assert int(optimizer.stateless_num_snapshots(state)) == 0


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="about jit")
def test_the_stateless_functions_can_be_compiled():
    import jax

    optimizer, trainable, state = built(SWA(optimizers.SGD(0.5), 0, 1))
    trainable, state = step(optimizer, trainable, state)
    average = jax.jit(lambda s, t: optimizer.stateless_average(s, t))
    small.assert_same_bits(arrays(average(state, trainable)), arrays(trainable))
    assert int(jax.jit(optimizer.stateless_num_snapshots)(state)) == 1


def test_stateless_averages_of_low_precision_values_keep_their_dtype():
    optimizer = SWA("sgd")
    variable = keras.Variable([1.0], dtype="bfloat16")
    optimizer.build([variable])
    state = [v.value for v in optimizer.variables]
    (average,) = optimizer.stateless_average(state, [variable.value])
    assert keras.backend.standardize_dtype(average.dtype) == "float32"
    np.testing.assert_array_equal(ops.convert_to_numpy(average), [1.0])


def test_lists_of_the_wrong_length_and_unrelated_optimizers_are_refused():
    optimizer, trainable, state = built(SWA("sgd"))
    for ask in (optimizer.stateless_average, optimizer.stateless_num_snapshots):
        with pytest.raises(ValueError, match="Received: a list of 3"):
            ask(state[:3])
        with pytest.raises(ValueError, match="averaging wrapper inside it"):
            ask(state, optimizer=optimizer.inner_optimizer)
        with pytest.raises(ValueError, match="averaging wrapper inside it"):
            ask(state, optimizer=SWA("sgd"))
    with pytest.raises(ValueError, match=r"built for 2 variables\. Received: a list of 1"):
        optimizer.stateless_average(state, trainable[:1])


class Constant(MeanByStep):
    def value_weight(self, step):
        return 0.25


@pytest.mark.parametrize("rule", [MeanByStep, Constant])
def test_the_first_average_is_the_value_with_any_rule(rule):
    variable, inner = keras.Variable([1.0, 3.0]), optimizers.SGD(1.0)
    inner.build([variable])
    inner.iterations.assign(99)
    optimizer = rule(inner)
    small.apply(optimizer, [variable], [[0.0, 1.0]])
    np.testing.assert_array_equal(optimizer.get_slot(variable, "average"), [1.0, 2.0])

    weight = float(optimizer.value_weight(100))
    small.apply(optimizer, [variable], [[0.0, 1.0]])
    expected = 2.0 + weight * (1.0 - 2.0)
    np.testing.assert_allclose(optimizer.get_slot(variable, "average"), [1.0, expected], rtol=1e-6)
