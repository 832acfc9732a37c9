"""Checks that a feature of Keras works with wrappers: they do not change training, and are right.

`assert_invisible` trains a model twice: with the bare inner optimizer, and with wrappers around it.
In the second training the variables are recorded after each real update. The oracle computes the
averages from these records.
"""

import keras
import numpy as np
import small_training as small
from keras import ops
from wrappers import NEST, WRAPPERS, chain, shown

import keras_avg

# Rounding of a float32 average, relative to 1 + |average|, over a dozen averagings.
AVERAGE_TOLERANCE = 1e-6


def wrapped(optimizer, wrapper=NEST):
    return WRAPPERS[wrapper].make(optimizer)


class Trajectories(keras.callbacks.Callback):
    """The values of the trainable variables before the first update, and after each update.

    A batch without an update still applies constraints. So the first value is the one just before
    the first update.
    """

    def on_train_begin(self, logs=None):
        self.values = [[small.numpy(v)] for v in self.model.trainable_variables]
        self.updates = self._updates()

    def on_train_batch_end(self, batch, logs=None):
        variables = self.model.trainable_variables  # on JAX this reads the state from the trainer
        moved = self._updates() > self.updates
        self.updates = self._updates()
        for values, variable in zip(self.values, variables, strict=True):
            if moved:
                values.append(small.numpy(variable))
            elif len(values) == 1:
                values[0] = small.numpy(variable)

    def _updates(self):
        return int(ops.convert_to_numpy(self.model.optimizer.iterations))


def assert_invisible(make_model, make_inner, fit=small.fit, wrapper=NEST, still=(), **tolerance):
    """Train with and without wrappers, and compare.

    `make_model(optimizer)` returns a compiled model, and `fit(model, callbacks=...)` trains it. The
    two trainings are compared only if the wrapper does not change training. `still` has the names
    of variables that do not move. All others must move, because any average of a variable that does
    not move would be right.

    Returns:
        The model that was trained with the wrappers.
    """
    record = Trajectories()
    model = fit(make_model(wrapped(make_inner(), wrapper)), callbacks=[record])

    pairs = zip(model.trainable_variables, record.values, strict=True)
    assert {v.name for v, values in pairs if np.array_equal(values[0], values[-1])} == set(still)
    if WRAPPERS[wrapper].is_transparent:
        assert_same_training(model, fit(make_model(make_inner()), callbacks=[]))
    assert_averages(model, record.values, wrapper, **tolerance)
    return model


def assert_same_training(model, bare):
    """Check that weights, loss scale and the inner optimizer's state are equal bit for bit."""
    small.assert_same_bits(state(model), state(bare))
    optimizer, same = model.optimizer, bare.optimizer
    if isinstance(same, keras.optimizers.LossScaleOptimizer):
        assert small.numpy(optimizer.dynamic_scale) == small.numpy(same.dynamic_scale)
        optimizer, same = optimizer.inner_optimizer, same.inner_optimizer
    small.assert_same_bits(state(chain(optimizer)[1]), state(same))


def assert_averages(model, trajectories, wrapper=NEST, tolerance=AVERAGE_TOLERANCE):
    wrappers, _ = chain(outermost(model))
    by_variable = {
        id(variable): values
        for variable, values in zip(model.trainable_variables, trajectories, strict=True)
    }
    for optimizer, oracle in zip(wrappers, WRAPPERS[wrapper].shown, strict=True):
        averages = shown(optimizer)
        assert averages
        for variable, average in zip(optimizer.averaged_variables, averages, strict=True):
            assert_close(average, oracle(by_variable[id(variable)]), tolerance)


def assert_close(average, expected, tolerance=AVERAGE_TOLERANCE):
    deviation = np.abs(average.astype("float64") - expected) / (1 + np.abs(expected))
    assert np.max(deviation) <= tolerance, f"off by {np.max(deviation)}"


def outermost(model):
    return keras_avg.averaging_optimizers(model)[0]


def state(model_or_optimizer):
    return [small.numpy(v) for v in model_or_optimizer.variables]
