"""Quickstart: train once and get three copies of the weights: raw, EMA and SWA.

A small convolutional network learns scikit-learn's handwritten digits, at a learning rate too high
for it to settle down. One optimizer, `SWA(MovingAverage(SGD))`, trains it and keeps two averages of
its weights. The script prints and draws their test accuracies, and shows that a saved and loaded
model trains on from the same state. It needs keras, one of jax, tensorflow and torch, scikit-learn
and matplotlib, and takes up to a minute:

    python examples/quickstart.py --out quickstart_output
"""

import argparse
import importlib.util
import os
import pathlib
import sys

BACKENDS = ("jax", "tensorflow", "torch")
INSTALLED = [name for name in BACKENDS if importlib.util.find_spec(name)]
os.environ.setdefault("KERAS_BACKEND", (INSTALLED or BACKENDS)[0])  # before Keras is imported
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # no start-up messages
os.environ["MPLBACKEND"] = "Agg"  # draw to files, without a window

import keras  # noqa: E402
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import sklearn.datasets  # noqa: E402

import keras_avg  # noqa: E402

SEED = 0
EPOCHS = 20
SWA_EPOCHS = 10  # the last ones
BATCH_SIZE = 16
TRAIN_SIZE = 1280


def load_digits():
    """Pictures of 8 x 8 pixels between 0 and 1, in the data set's own order: train, test."""
    x, y = sklearn.datasets.load_digits(return_X_y=True)
    x = x.reshape(-1, 8, 8, 1).astype("float32") / 16
    return (x[:TRAIN_SIZE], y[:TRAIN_SIZE]), (x[TRAIN_SIZE:], y[TRAIN_SIZE:])


def build_model():
    layers = [keras.Input((8, 8, 1))]
    for filters in (8, 16):
        layers += [
            keras.layers.Conv2D(filters, 3, padding="same", use_bias=False),
            # Keras' default of 0.99 lags behind weights that move this fast.
            keras.layers.BatchNormalization(momentum=0.9),
            keras.layers.ReLU(),
            keras.layers.MaxPooling2D(),
        ]
    layers += [keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(10)]
    return keras.Sequential(layers)


def compile_model(model):
    """Both averages are kept by the optimizer; their arguments count steps, not epochs."""
    swa_start = (EPOCHS - SWA_EPOCHS) * TRAIN_SIZE // BATCH_SIZE
    # Weight decay keeps the network from settling where it fits the training data exactly: there
    # the gradients vanish, and nothing is left to average out.
    sgd = keras.optimizers.SGD(learning_rate=0.1, momentum=0.9, weight_decay=0.01)
    ema = keras_avg.MovingAverage(sgd, average_decay=0.99)
    swa = keras_avg.SWA(ema, start_averaging=swa_start, average_period=10)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=swa, loss=loss, metrics=["accuracy"])


def recompute_batch_norm(model, x, batch_size=256):
    """Replace the batch-normalization statistics by those that the present weights have on `x`.

    With momentum k / (k + 1) for batch k = 0, 1, ..., the running mean over equal batches is their
    plain mean. The pass is in training mode: dropout, which this model does not have, would be on.
    """
    layers = [la for la in model.layers if isinstance(la, keras.layers.BatchNormalization)]
    momenta = [layer.momentum for layer in layers]
    try:
        for k, batch in enumerate(np.split(x, len(x) // batch_size)):
            for layer in layers:
                layer.momentum = k / (k + 1)
            model(batch, training=True)
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum


class CompareOnTest(keras.callbacks.Callback):
    """After each epoch, measures the test accuracy of every copy of the weights, in percent."""

    def __init__(self, x_train, x_test, y_test):
        super().__init__()
        self.x_train, self.x_test, self.y_test = x_train, x_test, y_test
        self.curves = {"raw": [], "raw, statistics recomputed": [], "EMA": [], "SWA": []}

    def on_epoch_end(self, epoch, logs=None):
        swa = self.model.optimizer
        self.curves["raw"].append(self.accuracy())
        self.curves["raw, statistics recomputed"].append(self.recomputed_accuracy())
        self.curves["EMA"].append(self.recomputed_accuracy(swa.inner_optimizer))
        if swa.has_average:
            self.curves["SWA"].append(self.recomputed_accuracy(swa))

    def accuracy(self):
        logits = self.model.predict_on_batch(self.x_test)
        return 100 * np.mean(logits.argmax(axis=-1) == self.y_test)

    def recomputed_accuracy(self, average=None):
        raw = self.model.get_weights()
        try:
            if average is not None:
                average.assign_average_vars(self.model.variables)
            recompute_batch_norm(self.model, self.x_train)
            return self.accuracy()
        finally:
            self.model.set_weights(raw)


def print_table(curves):
    over = f"of last {SWA_EPOCHS}"
    print(f"{'weights':<28}{'last epoch':>12}{f'mean {over}':>18}{f'worst {over}':>18}")
    for name, curve in curves.items():
        late = curve[-SWA_EPOCHS:]
        print(f"{name:<28}{late[-1]:>12.1f}{np.mean(late):>18.1f}{min(late):>18.1f}")


def draw(curves, path):
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    styles = ("-", "0.6"), (":", "0.6"), ("-", "tab:blue"), ("-", "tab:orange")
    for (name, curve), (line, color) in zip(curves.items(), styles, strict=True):
        epochs = range(EPOCHS - len(curve) + 1, EPOCHS + 1)  # SWA begins late
        axes.plot(epochs, curve, line, color=color, marker=".", label=name)
    axes.set(title="One training run, three copies of the weights")
    axes.set(xlabel="epoch", xticks=range(2, EPOCHS + 1, 2))
    axes.set(ylabel="test accuracy (%)", ylim=(70, 100))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=len(curves))
    figure.savefig(path, dpi=150)


def state(model):
    """Everything that training changes: weights, averages, momentum, counters."""
    return [*model.get_weights(), *(v.numpy() for v in model.optimizer.variables)]


def trains_on_equally(model, path, train):
    """Save and load `model`, train both for one more epoch, and compare bit for bit."""
    model.save(path)
    loaded = keras.saving.load_model(path)
    for each in (model, loaded):
        each.fit(*train, batch_size=BATCH_SIZE, shuffle=False, verbose=0)
    ours, theirs = state(model), state(loaded)
    return len(ours) == len(theirs) and all(map(np.array_equal, ours, theirs))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default="quickstart_output")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    keras.utils.set_random_seed(SEED)
    train, test = load_digits()

    print(f"\n1. Train (Keras {keras.__version__} on {keras.backend.backend()})\n")
    model = build_model()
    compile_model(model)
    compare = CompareOnTest(train[0], *test)
    model.fit(*train, batch_size=BATCH_SIZE, epochs=EPOCHS, callbacks=[compare])

    print(f"\n2. Accuracy in percent on {len(test[0])} test images\n")
    print_table(compare.curves)
    draw(compare.curves, out / "accuracy.png")
    print(f"\nPicture: {out / 'accuracy.png'}")

    print("\n3. Save, load, and train on\n")
    equal = trains_on_equally(model, out / "digits.keras", train)
    print(f"Model: {out / 'digits.keras'}")
    print(f"Steps taken now: {int(model.optimizer.iterations)}")
    print(f"Original and loaded model equal after one more epoch, bit for bit: {equal}")
    sys.exit(not equal)


if __name__ == "__main__":
    main()
