"""Quickstart: train once and get three copies of the weights: raw, EMA and SWA.

A small convolutional network learns scikit-learn's handwritten digits. Its learning rate is too
high for the raw weights to converge. One optimizer, `SWA(MovingAverage(SGD))`, trains it and keeps
two averages of its weights. The script prints and draws their test accuracies. It also shows that a
saved and loaded model continues training from the same state. It needs keras, one of jax,
tensorflow and torch, scikit-learn and matplotlib, and takes up to a minute:

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
    """The optimizer keeps both averages. Their arguments count steps, not epochs."""
    swa_start = (EPOCHS - SWA_EPOCHS) * TRAIN_SIZE // BATCH_SIZE
    # Without weight decay, the network would fit the training data exactly. Then the gradients
    # vanish, and there is no noise to average.
    rate = keras_avg.schedules.SWALearningRate(
        0.15, swa_learning_rate=0.1, start_step=swa_start // 2, anneal_steps=swa_start // 2
    )
    sgd = keras.optimizers.SGD(learning_rate=rate, momentum=0.9, weight_decay=0.01)
    ema = keras_avg.MovingAverage(sgd, average_decay=0.99)
    swa = keras_avg.SWA(ema, start_averaging=swa_start, average_period=10)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=swa, loss=loss, metrics=["accuracy"])


class MeasureOtherCopies(keras.callbacks.Callback):
    """After each epoch, the test accuracy of the copies that `fit` does not validate."""

    def __init__(self, x_train, test):
        super().__init__()
        self.x_train, self.test = x_train, test
        self.recomputed, self.ema = [], []

    def on_epoch_end(self, epoch, logs=None):
        self.recomputed.append(self.accuracy())
        _, ema = keras_avg.averaging_optimizers(self.model)
        with ema.average_weights():
            self.ema.append(self.accuracy())

    def accuracy(self):
        """In percent, of the weights in the model, with their own batch-norm statistics."""
        statistics = [v.numpy() for v in self.model.non_trainable_variables]
        keras_avg.update_batch_norm(self.model, self.x_train, batch_size=256, verbose=0)
        result = self.model.evaluate(*self.test, batch_size=256, verbose=0, return_dict=True)
        for variable, value in zip(self.model.non_trainable_variables, statistics, strict=True):
            variable.assign(value)
        return 100 * result["accuracy"]


def train_with_averages(model, train, test):
    """Returns the curves of test accuracy over epochs, in percent, for each copy of the weights."""
    # `fit` trains the raw weights and validates the averages. Then the raw weights come back.
    averages = keras_avg.callbacks.SwapAverageWeights(
        swap_on_epoch=False, batch_norm_data=train[0], log_raw=True
    )
    others = MeasureOtherCopies(train[0], test)
    model.fit(
        *train,
        batch_size=BATCH_SIZE,
        epochs=EPOCHS,
        validation_data=test,
        callbacks=[averages, others],
    )
    history = model.history.history
    return {
        "raw": [100 * accuracy for accuracy in history["val_raw_accuracy"]],
        "raw, statistics recomputed": others.recomputed,
        "EMA": others.ema,
        # Until SWA has a snapshot, `fit` validates the averages of the inner wrapper, the EMA.
        "SWA": [100 * accuracy for accuracy in history["val_accuracy"][-SWA_EPOCHS:]],
    }


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
    model.save(path)  # the averages; the raw weights are in the file too
    loaded = keras.saving.load_model(path)
    for each in (model, loaded):
        averages = keras_avg.callbacks.SwapAverageWeights(batch_norm_data=train[0])
        each.fit(*train, batch_size=BATCH_SIZE, shuffle=False, verbose=0, callbacks=[averages])
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
    curves = train_with_averages(model, train, test)

    print(f"\n2. Accuracy in percent on {len(test[0])} test images\n")
    print_table(curves)
    draw(curves, out / "accuracy.png")
    print(f"\nPicture: {out / 'accuracy.png'}")

    print("\n3. Save, load, and train on\n")
    equal = trains_on_equally(model, out / "digits.keras", train)
    print(f"Model: {out / 'digits.keras'}")
    print(f"Steps taken now: {int(model.optimizer.iterations)}")
    print(f"Original and loaded model equal after one more epoch, bit for bit: {equal}")
    sys.exit(not equal)


if __name__ == "__main__":
    main()
