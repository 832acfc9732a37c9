"""The texts and numbers about averages: the table, the line of an epoch, the two logs."""

import keras
import numpy as np
import pytest
import small_training as small

import keras_avg
from keras_avg import LAWA, SWA, MovingAverage, decays
from keras_avg.callbacks import SwapAverageWeights

TOLERANCE = 1e-5  # float32, of a norm over 54 numbers of order 1


def table(model):
    lines = []
    keras_avg.summary(model, print_fn=lines.append)
    return lines


def fit(model, **arguments):
    callback = SwapAverageWeights(**arguments)
    return model.fit(
        small.X, small.Y, small.BATCH_SIZE, 2, shuffle=False, verbose=0, callbacks=[callback]
    )


def test_the_summary_has_a_column_for_each_wrapper():
    model = small.model(SWA(MovingAverage("adam", average_decay=decays.PowerFunction(0.1)), 2, 3))
    small.fit(model)
    keras_avg.swap_weights(model)
    assert table(model) == [
        "wrapper         SWA (SWA)           MovingAverage (MovingAverage)",
        "rule            start_averaging=2   average_decay=PowerFunction(sigma_rel=0.1)",
        "                average_period=3    num_updates=None",
        "                                    start_step=0",
        "                                    dynamic_decay=False",
        "                                    average_period=1",
        "updates         12                  12",
        "snapshots       4                   12",
        "next snapshot   after update 15     after update 13",
        "memory          220 bytes           220 bytes",
        "in the model    averages            raw weights",
    ]


def test_the_summary_is_printed(capsys):
    model = small.model(SWA("sgd"))
    keras_avg.summary(model)
    assert "SWA" in capsys.readouterr().out


def test_the_summary_of_a_model_without_averages_is_refused():
    with pytest.raises(ValueError, match=r"keeps no averages. Received: optimizer=<keras"):
        keras_avg.summary(small.model("sgd"))


def test_each_epoch_says_in_one_line_which_averages_there_are(capsys):
    fit(small.model(SWA("sgd", start_averaging=8, average_period=2)), verbose=1)
    assert capsys.readouterr().out.splitlines() == [
        "Epoch 2: averages of SWA (start_averaging=8, average_period=2): 2 snapshots in 12 updates"
    ]


def test_the_logs_hold_the_decay_and_the_distance():
    model = small.model(MovingAverage("sgd", average_decay=0.75))
    logs = fit(model, log_averages=True).history
    with_averages = [small.numpy(v) for v in model.trainable_variables]
    keras_avg.swap_weights(model)
    raw = [small.numpy(v) for v in model.trainable_variables]
    squares = [np.sum((r - a) ** 2) for r, a in zip(raw, with_averages, strict=True)]
    assert logs["average/decay"] == [0.75, 0.75]
    np.testing.assert_allclose(logs["average/distance"][-1], np.sqrt(sum(squares)), TOLERANCE)


def test_the_logs_of_a_rule_without_a_decay_hold_only_the_distance():
    logs = fit(small.model(LAWA("sgd", average_period=1)), log_averages=True).history
    assert "average/decay" not in logs
    assert all(distance > 0 for distance in logs["average/distance"])


def test_before_the_first_snapshot_the_logs_hold_neither():
    model = small.model(SWA("sgd", start_averaging=6))
    logs = fit(model, log_averages=True, swap_on_epoch=False).history
    assert len(logs["average/distance"]) == 1


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="TensorBoard is installed there"
)
def test_tensorboard_draws_the_decay_and_the_distance(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = keras.callbacks.TensorBoard(tmp_path)
    callbacks = [SwapAverageWeights(log_averages=True), board]
    model = small.model(MovingAverage("sgd"))
    model.fit(small.X, small.Y, verbose=0, callbacks=callbacks)
    found = EventAccumulator(str(tmp_path / "train")).Reload().Tags()["tensors"]
    assert {"epoch_average/decay", "epoch_average/distance"} <= set(found)
