"""Uncertainty from one run: SWAG draws thirty networks around the average of the weights.

A network that learned from few examples is overconfident: it is wrong more often than its
confidence says. `SWAG` keeps the mean of snapshots, as `SWA` does, and also their spread. From this
distribution it draws networks. Where the data determine the answer, the networks agree. Elsewhere
they differ, so the mean of their predictions has a lower confidence there. All of this needs only
one training run.

The script learns from 320 handwritten digits. It compares three predictions on digits by other
writers: of the raw weights, of their mean (SWA), and of thirty samples (SWAG). Batch-normalization
statistics are recomputed for each copy. The script prints accuracy, negative log-likelihood and
calibration error. It draws how often a prediction of each confidence is right. With more data the
mean alone is as good, and samples do not help: `docs/studies/swag_on_digits.py` has both cases,
over ten seeds. The script takes about a minute:

    KERAS_BACKEND=jax python examples/swag_uncertainty.py
"""

import argparse
import pathlib

import keras
import matplotlib.pyplot as plt
import numpy as np
import sklearn.datasets

import keras_avg

EPOCHS = 20
BATCH_SIZE = 16
TRAIN_SIZE = 320  # few, so that the network cannot be sure
SAMPLES = 30
BINS = 10
FEWEST = 5  # a bin with fewer predictions is not drawn


def load_digits():
    """Pictures of 8 x 8 pixels between 0 and 1, in the order of their writers: train, test."""
    x, y = sklearn.datasets.load_digits(return_X_y=True)
    x = x.reshape(-1, 8, 8, 1).astype("float32") / 16
    return (x[:TRAIN_SIZE], y[:TRAIN_SIZE]), (x[1280:], y[1280:])


def build_model():
    layers = [keras.Input((8, 8, 1))]
    for filters in (8, 16):
        layers += [
            keras.layers.Conv2D(filters, 3, padding="same", use_bias=False),
            keras.layers.BatchNormalization(momentum=0.9),
            keras.layers.ReLU(),
            keras.layers.MaxPooling2D(),
        ]
    layers += [keras.layers.Flatten(), keras.layers.Dense(10, activation="softmax")]
    return keras.Sequential(layers)


def train(train, epochs):
    """Snapshots in the second half of the run, four in each epoch."""
    model = build_model()
    steps = len(train[0]) // BATCH_SIZE  # of an epoch
    sgd = keras.optimizers.SGD(0.2, momentum=0.9, weight_decay=0.002)
    swag = keras_avg.SWAG(sgd, epochs // 2 * steps, average_period=steps // 4, rank=20)
    model.compile(swag, loss="sparse_categorical_crossentropy")
    model.fit(*train, batch_size=BATCH_SIZE, epochs=epochs, verbose=0)
    return model


def probabilities(model, x_train, x):
    """Predictions of the weights in the model, with their own batch-norm statistics."""
    keras_avg.update_batch_norm(model, x_train, batch_size=256, verbose=0)
    return model.predict(x, batch_size=256, verbose=0)


def predictions(model, x_train, x, samples=SAMPLES, scale=1.0):
    """The probabilities of the digits, by each of the three copies."""
    found = {"raw": probabilities(model, x_train, x)}
    with keras_avg.average_weights(model):
        found["SWA"] = probabilities(model, x_train, x)
    drawn = []
    for seed in range(samples):
        with model.optimizer.sample_weights(seed, scale):
            drawn.append(probabilities(model, x_train, x))
    found["SWAG"] = np.mean(drawn, axis=0)
    return found


def reliability(found, y):
    """For each bin of confidence: its predictions, their mean confidence, how many are right."""
    confidence, right = found.max(axis=1), found.argmax(axis=1) == y
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    rows = [(np.sum(b), confidence[b].mean(), right[b].mean()) for b in masks(bins) if b.any()]
    return np.array(rows).T


def masks(bins):
    return (bins == number for number in range(BINS))


def scores(found, y):
    number, confidence, right = reliability(found, y)
    return {
        "accuracy (%)": 100 * float(np.mean(found.argmax(axis=1) == y)),
        "negative log-likelihood": float(-np.mean(np.log(found[np.arange(len(y)), y] + 1e-12))),
        "calibration error (%)": 100 * float(np.sum(number * abs(confidence - right)) / len(y)),
    }


def print_table(found, y):
    print(f"{'':<6}{'accuracy (%)':>14}{'neg. log-lik.':>16}{'calibration error (%)':>24}")
    for name, each in found.items():
        accuracy, loss, error = scores(each, y).values()
        print(f"{name:<6}{accuracy:>14.1f}{loss:>16.3f}{error:>24.1f}")


def draw(found, y, path):
    figure, axes = plt.subplots(figsize=(6.4, 4.8), layout="constrained")
    axes.plot([0, 1], [0, 1], ":", color="0.5", label="as often right as it says")
    for (name, each), color in zip(found.items(), ("0.6", "tab:blue", "tab:orange"), strict=True):
        rows = reliability(each, y)
        number, confidence, right = rows[:, rows[0] >= FEWEST]
        axes.plot(confidence, right, color=color, label=name)
        axes.scatter(confidence, right, s=5 + number, color=color, alpha=0.8, linewidths=0)
    axes.set(title="How often predictions are right, by how sure they are", xlabel="confidence")
    axes.set(ylabel="share that is right", xlim=(0.3, 1.03), ylim=(0, 1.05))
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--out", default=pathlib.Path(__file__).with_suffix(".png"))
    arguments = parser.parse_args()
    keras.utils.set_random_seed(0)
    known, (x, y) = load_digits()
    model = train(known, arguments.epochs)
    found = predictions(model, known[0], x, arguments.samples)
    print_table(found, y)
    draw(found, y, arguments.out)
    print(f"Picture: {arguments.out}")


if __name__ == "__main__":
    main()
