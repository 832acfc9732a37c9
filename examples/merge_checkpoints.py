"""Merge checkpoints of a run at a constant rate, instead of annealing the rate.

A small network learns scikit-learn's handwritten digits at a constant learning rate, and saves its
weights after each epoch. A second run starts in the middle of the first, and anneals the rate to 0.
The script compares the second run with means of the last files of the first run. These means need
no training. It needs keras, one of jax, tensorflow and torch, scikit-learn and matplotlib:

    python examples/merge_checkpoints.py --out merge_output
"""

import argparse
import importlib.util
import os
import pathlib

BACKENDS = ("jax", "tensorflow", "torch")
INSTALLED = [name for name in BACKENDS if importlib.util.find_spec(name)]
os.environ.setdefault("KERAS_BACKEND", (INSTALLED or BACKENDS)[0])  # before Keras is imported
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # no start-up messages
os.environ["MPLBACKEND"] = "Agg"  # draw to files, without a window

import keras  # noqa: E402
import matplotlib.pyplot as plt  # noqa: E402
import sklearn.datasets  # noqa: E402

from keras_avg import checkpoints  # noqa: E402

SEED, RATE, BATCH_SIZE, TRAIN_SIZE = 0, 0.3, 32, 1280
CONSTANT, ANNEALED = 10, 10  # epochs at the constant rate, and epochs in which it may go down
DECAYS = ("linear", "cosine", "1-sqrt")


def load_digits():
    """Pictures of 64 pixels between 0 and 1, in the data set's own order: train, test."""
    x, y = sklearn.datasets.load_digits(return_X_y=True)
    x = x.astype("float32") / 16
    return (x[:TRAIN_SIZE], y[:TRAIN_SIZE]), (x[TRAIN_SIZE:], y[TRAIN_SIZE:])


def build_model():
    layers = [keras.Input((64,)), keras.layers.Dense(64, "relu"), keras.layers.Dense(10)]
    return keras.Sequential(layers)


def compile_model(model, rate):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    sgd = keras.optimizers.SGD(rate, momentum=0.5, weight_decay=0.003)
    model.compile(optimizer=sgd, loss=loss)


def test_loss(model, test):
    return model.evaluate(*test, batch_size=256, verbose=0)


def train(model, data, test, epochs, folder=None):
    """Trains, saves the weights after each epoch, and returns the test losses."""
    losses = []
    for epoch in range(epochs):
        model.fit(*data, batch_size=BATCH_SIZE, verbose=0)
        losses.append(test_loss(model, test))
        if folder is not None:
            model.save_weights(folder / f"{epoch:02d}.weights.h5")
    return losses


def draw(constant, annealed, merged, path):
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    epochs = range(1, CONSTANT + ANNEALED + 1)
    axes.plot(epochs, constant, color="0.6", marker=".", label="constant rate")
    axes.plot(epochs[CONSTANT:], annealed, color="tab:blue", marker=".", label="annealed to 0")
    styles = zip(merged.items(), ("o", "s", "^"), strict=True)
    for (decay, losses), marker in styles:
        axes.plot(epochs[CONSTANT:], losses, marker=marker, ls=":", label=f"merged, {decay}")
    axes.set(title="Merging files of a run at a constant rate", xlabel="epoch", ylabel="test loss")
    axes.set(xticks=range(2, CONSTANT + ANNEALED + 1, 2), yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default="merge_output")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    keras.utils.set_random_seed(SEED)
    data, test = load_digits()

    model = build_model()
    compile_model(model, RATE)
    constant = train(model, data, test, CONSTANT)
    middle = model.get_weights()
    constant += train(model, data, test, ANNEALED, folder=out)
    files = sorted(out.glob("*.weights.h5"))

    model.set_weights(middle)
    steps = ANNEALED * TRAIN_SIZE // BATCH_SIZE
    compile_model(model, keras.optimizers.schedules.PolynomialDecay(RATE, steps, 0.0))
    annealed = train(model, data, test, ANNEALED)

    merged = {decay: [] for decay in DECAYS}
    for number in range(1, ANNEALED + 1):
        for decay, losses in merged.items():
            weights = checkpoints.merge_weights(number, decay)
            checkpoints.average(model, files[:number], weights, verbose=0)
            losses.append(test_loss(model, test))

    print(f"{'weights':<28}{'test loss':>10}")
    print(f"{'constant rate, last epoch':<28}{constant[-1]:>10.4f}")
    print(f"{'annealed to 0':<28}{annealed[-1]:>10.4f}")
    for decay, losses in merged.items():
        print(f"{f'{ANNEALED} files merged, {decay}':<28}{losses[-1]:>10.4f}")
    draw(constant, annealed, merged, out / "loss.png")
    print(f"Picture: {out / 'loss.png'}")


if __name__ == "__main__":
    main()
