"""Four more averages side by side: LAWA, BEMA, ScheduleFree and PrimalAverage.

All are wrappers around your optimizer, and you use them in the same way: wrap the optimizer, call
`fit`, and let `SwapAverageWeights` put the average into the model for validation. They average
different values:

* `LAWA` is the mean of the last few snapshots. It needs no start, because it drops old snapshots.
* `BEMA` is a moving average of growing length. It adds a share of the change of the weights since
  the start, to correct the lag. It is meant for short fine-tuning.
* `ScheduleFree` averages the whole run. It computes gradients between the average and the weights
  of the inner optimizer. The rate stays constant, and the length of the run need not be known.
* `PrimalAverage` does the same with an exponential average.

The first two do not change training: their raw weights are the same. The last two change it: their
raw curve belongs to the point at which gradients are computed. The script learns handwritten digits
with each wrapper, and draws the accuracy of both copies. It takes half a minute:

    KERAS_BACKEND=jax python examples/averages_side_by_side.py
"""

import argparse
import pathlib

import keras
import matplotlib.pyplot as plt
import numpy as np
import sklearn.datasets

import keras_avg

EPOCHS = 15
BATCH_SIZE = 16
TRAIN_SIZE = 1280
STEPS = TRAIN_SIZE // BATCH_SIZE  # of an epoch
RATE = 0.5


def load_digits():
    """Rows of 64 numbers between 0 and 1, in the order of their writers: train, test."""
    x, y = sklearn.datasets.load_digits(return_X_y=True)
    x = x.astype("float32") / 16
    return (x[:TRAIN_SIZE], y[:TRAIN_SIZE]), (x[TRAIN_SIZE:], y[TRAIN_SIZE:])


def optimizers():
    """SGD without momentum, because the average of the last two wrappers replaces momentum."""

    def sgd():
        return keras.optimizers.SGD(RATE, weight_decay=0.001)

    return {
        "LAWA: the last 10 snapshots": keras_avg.LAWA(sgd(), window=10, average_period=STEPS // 4),
        "BEMA: an average that does not lag": keras_avg.BEMA(sgd()),
        "ScheduleFree: the whole run": keras_avg.ScheduleFree(sgd()),
        "PrimalAverage: an average that forgets": keras_avg.PrimalAverage(
            sgd(), average_decay=0.98
        ),
    }


def build_model():
    layers = [keras.layers.Dense(64, activation="relu"), keras.layers.Dense(10)]
    return keras.Sequential([keras.Input((64,)), *layers])


def train(optimizer, known, test, epochs):
    """The history: `val_accuracy` of the averages, `val_raw_accuracy` of the raw weights."""
    keras.utils.set_random_seed(0)  # each training begins with the same weights
    model = build_model()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss=loss, metrics=["accuracy"])
    averages = keras_avg.callbacks.SwapAverageWeights(log_raw=True)
    return model.fit(
        *known,
        batch_size=BATCH_SIZE,
        epochs=epochs,
        validation_data=test,
        verbose=0,
        callbacks=[averages],
    ).history


def draw(histories, path):
    figure, grid = plt.subplots(
        2, 2, sharex=True, sharey=True, figsize=(8, 5.6), layout="constrained"
    )
    for axes, (name, history) in zip(grid.flat, histories.items(), strict=True):
        epochs = range(1, len(history["loss"]) + 1)
        for copy, color in (("val_raw_accuracy", "0.6"), ("val_accuracy", "tab:orange")):
            label = "raw" if "raw" in copy else "average"
            axes.plot(epochs, 100 * np.array(history[copy]), ".-", color=color, label=label)
        axes.set_title(name, fontsize=10)
        axes.grid(alpha=0.3)
    for axes in grid[1]:
        axes.set_xlabel("epoch")
    for axes in grid[:, 0]:
        axes.set_ylabel("test accuracy (%)")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--out", default=pathlib.Path(__file__).with_suffix(".png"))
    arguments = parser.parse_args()
    data = load_digits()
    histories = {}
    print(f"{'accuracy (%), mean of the last 5 epochs':<42}{'raw':>8}{'average':>10}")
    for name, optimizer in optimizers().items():
        history = histories[name] = train(optimizer, *data, arguments.epochs)
        copies = ("val_raw_accuracy", "val_accuracy")
        raw, average = (100 * np.mean(history[copy][-5:]) for copy in copies)
        print(f"{name:<42}{raw:>8.1f}{average:>10.1f}")
    draw(histories, arguments.out)
    print(f"Picture: {arguments.out}")


if __name__ == "__main__":
    main()
