"""Calls `shadow_copy` in a strategy's scope, but outside of its steps, as Addons' own test does."""

import keras
import numpy as np
from train_on_replicas import assert_alike_on_replicas, small, two_replicas

import keras_avg


def main():
    strategy = two_replicas()
    with strategy.scope():
        model = small.model(keras_avg.MovingAverage("sgd", average_decay=0.5))
        optimizer = model.optimizer
        optimizer.shadow_copy(model.variables)
        small.assert_same_bits(
            small.slots(optimizer, model.trainable_variables),
            [small.numpy(v) for v in model.trainable_variables],
        )
        small.fit(model, epochs=1)
        raw = [small.numpy(v) for v in model.trainable_variables]
        with keras_avg.average_weights(model):
            keras_avg.update_batch_norm(model, small.X, verbose=0)
        small.assert_same_bits([small.numpy(v) for v in model.trainable_variables], raw)
        optimizer.set_weights(optimizer.get_weights())
        optimizer.add_slot(model.trainable_variables[0], "another")
        optimizer.assign_average_vars(model.variables)
    assert_alike_on_replicas(optimizer.variables)
    assert optimizer.num_snapshots == int(keras.ops.convert_to_numpy(optimizer.iterations)) == 6
    assert np.any(raw[0] != small.numpy(model.trainable_variables[0]))


main()
