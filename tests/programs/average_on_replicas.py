"""A worker with two logical devices. After each round both replicas equal a worker with one."""

import keras
import numpy as np
from train_on_replicas import TOLERANCE, assert_alike_on_replicas, inner, model, small, two_replicas

import keras_avg


class OtherIsAhead(keras_avg.distributed.Communicator):
    """One of two workers. The other worker brings the same values plus one half."""

    rank, size = 0, 2

    def all_reduce_sum(self, arrays):
        values = [np.asarray(array) for array in arrays]
        if len(values) == 1:  # This array serves to check that the workers are alike.
            return [2 * values[0]]
        return [2 * value + 0.5 * (value.ndim > 0) for value in values]


def trained():
    optimizer = keras_avg.ModelAverage(inner(), interval_steps=2, communicator=OtherIsAhead())
    new = model(optimizer)
    return small.fit(new, callbacks=[keras_avg.callbacks.SynchronizeWorkers()])


def main():
    strategy = two_replicas()
    with strategy.scope():
        on_replicas = trained()
    alone = trained()
    assert on_replicas.optimizer.num_snapshots == alone.optimizer.num_snapshots == 6
    assert_alike_on_replicas(on_replicas.variables)
    assert_alike_on_replicas(on_replicas.optimizer.variables)
    for ours, theirs in zip(on_replicas.weights, alone.weights, strict=True):
        np.testing.assert_allclose(small.numpy(ours), small.numpy(theirs), atol=TOLERANCE)
        assert np.abs(small.numpy(theirs)).max() > 0.2  # Each round has shifted the values.
    for optimizer in (on_replicas.optimizer, alone.optimizer):
        assert keras.ops.convert_to_numpy(optimizer.iterations) == 12


main()
