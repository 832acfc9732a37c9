"""An image classifier with a cyclical learning rate, SWA, and batch-normalization statistics.

With a cyclical learning rate, the weights are good at the end of each cycle. The mean of these
weights is usually better than each of them. This is stochastic weight averaging as it was published
(https://arxiv.org/abs/1803.05407). It needs three lines: the rate, the wrapper around the
optimizer, and the callback that puts the averages into the model for validation.

Batch normalization collects its moving statistics with the raw weights. Averaged weights give other
activations. So the callback recomputes the statistics by one pass over the training data. The
script also shows the accuracy without this pass. It learns handwritten digits, and takes half a
minute:

    KERAS_BACKEND=jax python examples/classifier_swa.py
"""

import argparse
import pathlib

import keras
import matplotlib.pyplot as plt
import numpy as np
import sklearn.datasets

import keras_avg

EPOCHS = 24
EPOCHS_OF_A_CYCLE = 2
BATCH_SIZE = 16
TRAIN_SIZE = 1280
STEPS = TRAIN_SIZE // BATCH_SIZE  # of an epoch: wrappers and schedules count steps
LOWEST, HIGHEST = 0.01, 0.3


def load_digits():
    """Pictures of 8 x 8 pixels between 0 and 1, in the order of their writers: train, test."""
    x, y = sklearn.datasets.load_digits(return_X_y=True)
    x = x.reshape(-1, 8, 8, 1).astype("float32") / 16
    return (x[:TRAIN_SIZE], y[:TRAIN_SIZE]), (x[TRAIN_SIZE:], y[TRAIN_SIZE:])


def build_model():
    layers = [keras.Input((8, 8, 1))]
    for filters in (8, 16):
        layers += [
            keras.layers.Conv2D(filters, 3, padding="same", use_bias=False),
            keras.layers.BatchNormalization(momentum=0.9),
            keras.layers.ReLU(),
            keras.layers.MaxPooling2D(),
        ]
    layers += [keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(10)]
    return keras.Sequential(layers)


def compile_model(model, epochs):
    """Returns the schedule of the rate, to draw it."""
    cycle = EPOCHS_OF_A_CYCLE * STEPS
    rate = keras_avg.schedules.TriangularCyclicalLearningRate(LOWEST, HIGHEST, step_size=cycle / 2)
    sgd = keras.optimizers.SGD(rate, momentum=0.9, weight_decay=0.01)
    # A snapshot after the last step of each cycle, from a quarter of the training on.
    first = max(epochs // 4 // EPOCHS_OF_A_CYCLE, 1) * cycle - 1
    swa = keras_avg.SWA(sgd, start_averaging=first, average_period=cycle)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(swa, loss=loss, metrics=["accuracy"])
    return rate


def fit(model, train, test, epochs):
    """Validates the averages, with their own batch-norm statistics, and also the raw weights."""
    averages = keras_avg.callbacks.SwapAverageWeights(batch_norm_data=train[0], log_raw=True)
    return model.fit(
        *train,
        batch_size=BATCH_SIZE,
        epochs=epochs,
        validation_data=test,
        verbose=0,
        callbacks=[averages],
    ).history


def print_accuracies(model, test):
    """Accuracies after `fit`, when the model holds the averages."""
    accuracies = {"SWA": accuracy(model, test)}
    keras_avg.swap_weights(model)
    accuracies["raw"] = accuracy(model, test)
    with keras_avg.average_weights(model):
        accuracies["SWA, statistics of the raw weights"] = accuracy(model, test)
    keras_avg.swap_weights(model)
    for name, found in accuracies.items():
        print(f"{name:<36}{found:>6.1f} %")


def accuracy(model, test):
    return 100 * model.evaluate(*test, batch_size=256, verbose=0, return_dict=True)["accuracy"]


def draw(history, schedule, first, path):
    """The rate, and below it the accuracies at the end of each epoch."""
    epochs = np.arange(1, len(history["val_accuracy"]) + 1)
    figure, (top, axes) = plt.subplots(
        2, sharex=True, figsize=(8, 5), height_ratios=(1, 3), layout="constrained"
    )
    steps = np.arange(0, len(epochs) * STEPS, 5)
    top.plot(steps / STEPS, [float(schedule(int(step))) for step in steps], color="0.4")
    top.set(title="A cyclical learning rate, and the mean of the ends of its cycles")
    top.set(ylabel="learning rate")
    axes.plot(epochs, 100 * np.array(history["val_raw_accuracy"]), ".-", color="0.6", label="raw")
    averaged = epochs > first / STEPS
    axes.plot(
        epochs[averaged],
        100 * np.array(history["val_accuracy"])[averaged],
        ".-",
        color="tab:orange",
        label="SWA",
    )
    axes.set(xlabel="epoch", ylabel="test accuracy (%)", ylim=(60, 100), xlim=(0, epochs[-1] + 0.5))
    axes.legend(loc="lower center")
    for each in (top, axes):
        each.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--out", default=pathlib.Path(__file__).with_suffix(".png"))
    arguments = parser.parse_args()
    keras.utils.set_random_seed(0)
    train, test = load_digits()
    model = build_model()
    rate = compile_model(model, arguments.epochs)
    history = fit(model, train, test, arguments.epochs)
    print(f"{model.optimizer.num_snapshots} snapshots; accuracy on {len(test[0])} test pictures:")
    print_accuracies(model, test)
    draw(history, rate, model.optimizer.start_averaging, arguments.out)
    print(f"Picture: {arguments.out}")


if __name__ == "__main__":
    main()
