"""Pictures from noise: an average of the weights in a diffusion model.

A diffusion model learns to predict the noise in a picture, at each level of noise. To draw, it
starts from noise alone, and removes a little of it in each of many steps. The errors of noisy
weights add up over these steps. So diffusion models usually draw with an average of the weights.

This model is small enough for two processor cores: a dense network learns scikit-learn's
handwritten digits of 8 x 8 pixels at a constant rate. `MovingAverage` keeps the average. Its length
is a share of the run so far (`decays.PowerFunction`, https://arxiv.org/abs/2312.02696). Both copies
then draw from the same noise. The script shows the digits side by side. It prints the Frechet
distance, in pixels, between a thousand drawn digits and the data. It takes a minute:

    KERAS_BACKEND=jax python examples/diffusion_ema.py
"""

import argparse
import itertools
import pathlib

import keras
import matplotlib.pyplot as plt
import numpy as np
import sklearn.datasets

import keras_avg

EPOCHS = 200
BATCH_SIZE = 64
RATE = 2e-3
LEVELS = 40  # of noise, from no noise to noise only
SHARE = 0.1  # standard deviation of the average's profile, as a share of the run


def load_digits():
    """Pictures as rows of 64 numbers between -1 and 1, and the digits as one-hot rows."""
    x, y = sklearn.datasets.load_digits(return_X_y=True)
    return x.astype("float32") / 8 - 1, np.eye(10, dtype="float32")[y]


def blend(time):
    """The shares of the picture and of the noise at a time in [0, 1]."""
    return np.cos(time * np.pi / 2), np.sin(time * np.pi / 2)


class NoisyPictures(keras.utils.PyDataset):
    """Batches of noisy pictures, their times and digits, and the noise to be predicted."""

    def __init__(self, pictures, digits):
        super().__init__()
        self.pictures, self.digits = pictures, digits
        self.random = np.random.default_rng(0)

    def __len__(self):
        return len(self.pictures) // BATCH_SIZE

    def __getitem__(self, index):
        chosen = self.random.integers(len(self.pictures), size=BATCH_SIZE)
        time = self.random.uniform(size=(BATCH_SIZE, 1)).astype("float32")
        noise = self.random.normal(size=(BATCH_SIZE, 64)).astype("float32")
        signal, amount = blend(time)
        return (signal * self.pictures[chosen] + amount * noise, time, self.digits[chosen]), noise


def build_model():
    picture, time, digit = keras.Input((64,)), keras.Input((1,)), keras.Input((10,))
    waves = time * (np.pi * 2.0 ** np.arange(4, dtype="float32"))
    about = keras.layers.Concatenate()([keras.ops.sin(waves), keras.ops.cos(waves), digit])
    about = keras.layers.Dense(128, activation="silu")(about)
    hidden = keras.layers.Dense(256)(picture)
    for _ in range(2):
        more = keras.layers.LayerNormalization()(hidden + keras.layers.Dense(256)(about))
        more = keras.layers.Dense(256, activation="silu")(more)
        hidden = hidden + keras.layers.Dense(256)(more)
    noise = keras.layers.Dense(64)(keras.layers.LayerNormalization()(hidden))
    return keras.Model((picture, time, digit), noise)


def draw_digits(model, digits, seed=1):
    """Removes the noise step by step, always from the same initial noise (DDIM)."""
    picture = np.random.default_rng(seed).normal(size=(len(digits), 64)).astype("float32")
    times = np.linspace(0.99, 0.0, LEVELS + 1, dtype="float32")
    for now, later in itertools.pairwise(times):
        time = np.full((len(digits), 1), now)
        noise = np.asarray(model.predict_on_batch((picture, time, digits)))
        signal, amount = blend(now)
        clean = np.clip((picture - amount * noise) / signal, -1, 1)
        noise = (picture - signal * clean) / amount
        signal, amount = blend(later)
        picture = (signal * clean + amount * noise).astype("float32")
    return picture


def frechet_distance(ones, others):
    """The distance of normal distributions with the means and covariances of two picture sets."""
    means, covariances = zip(*((s.mean(0), np.cov(s.T)) for s in (ones, others)), strict=True)
    values, vectors = np.linalg.eigh(covariances[0])
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    both = np.sqrt(np.linalg.eigvalsh(root @ covariances[1] @ root).clip(0)).sum()
    return np.sum((means[0] - means[1]) ** 2) + sum(map(np.trace, covariances)) - 2 * both


def draw(drawn, path):
    """Rows of the digits 0 to 9, drawn by each copy of the weights."""
    figure, axes = plt.subplots(1, len(drawn), figsize=(9, 4.2), layout="constrained")
    for each, (name, pictures) in zip(axes, drawn.items(), strict=True):
        rows = [np.hstack([np.pad(p, 1, constant_values=-1) for p in r]) for r in rows_of(pictures)]
        each.imshow(np.vstack(rows), cmap="gray_r", vmin=-1, vmax=1)
        each.set(title=name, xticks=[], yticks=[])
        each.spines[:].set_visible(False)
    figure.suptitle("Digits drawn from the same noise")
    figure.savefig(path, dpi=150)


def rows_of(pictures, rows=8):
    return pictures[: 10 * rows].reshape(rows, 10, 8, 8)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--out", default=pathlib.Path(__file__).with_suffix(".png"))
    arguments = parser.parse_args()
    keras.utils.set_random_seed(0)
    pictures, digits = load_digits()
    model = build_model()
    adam = keras.optimizers.Adam(RATE)
    ema = keras_avg.MovingAverage(adam, average_decay=keras_avg.decays.PowerFunction(SHARE))
    model.compile(ema, loss="mse")
    model.fit(NoisyPictures(pictures, digits), epochs=arguments.epochs, verbose=0)

    wanted = np.tile(np.eye(10, dtype="float32"), (100, 1))
    drawn = {"raw weights": draw_digits(model, wanted)}
    with keras_avg.average_weights(model):
        drawn["averaged weights"] = draw_digits(model, wanted)
    for name, found in drawn.items():
        print(f"{name:<18} Frechet distance {frechet_distance(found, pictures):.2f}")
    draw(drawn, arguments.out)
    print(f"Picture: {arguments.out}")


if __name__ == "__main__":
    main()
