"""Choose the length of an exponential average after training.

A small network learns scikit-learn's handwritten digits once, at a constant rate. It keeps two
averages, and saves them after each epoch. After training, averages of any other length are computed
from the files. The script draws test loss and accuracy over the length. It needs keras, one of jax,
tensorflow and torch, scikit-learn and matplotlib:

    python examples/post_hoc_ema.py --out post_hoc_output
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

import keras_avg  # noqa: E402

SEED, RATE, BATCH_SIZE, TRAIN_SIZE, EPOCHS = 0, 0.3, 32, 1280, 16
KEPT = (0.05, 0.10)
LENGTHS = (0.05, 0.06, 0.075, 0.09, 0.10, 0.125, 0.15)


def load_digits():
    """Pictures of 64 pixels between 0 and 1, in the data set's own order: train, test."""
    x, y = sklearn.datasets.load_digits(return_X_y=True)
    x = x.astype("float32") / 16
    return (x[:TRAIN_SIZE], y[:TRAIN_SIZE]), (x[TRAIN_SIZE:], y[TRAIN_SIZE:])


def build_model():
    layers = [keras.Input((64,)), keras.layers.Dense(64, "relu"), keras.layers.Dense(10)]
    return keras.Sequential(layers)


def compile_model(model):
    optimizer = keras.optimizers.SGD(RATE, momentum=0.5, weight_decay=0.003)
    for sigma_rel in KEPT:
        decay = keras_avg.decays.PowerFunction(sigma_rel)
        optimizer = keras_avg.MovingAverage(optimizer, average_decay=decay)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=optimizer, loss=loss, metrics=["accuracy"])


def judge(model, test):
    result = model.evaluate(*test, batch_size=256, verbose=0, return_dict=True)
    return result["loss"], 100 * result["accuracy"]


def draw(raw, curves, path):
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for axes, name, value, curve in zip(
        (left, right),
        ("test loss", "test accuracy (%)"),
        raw,
        zip(*curves, strict=True),
        strict=True,
    ):
        axes.axhline(value, color="0.6", label="raw weights")
        axes.plot(LENGTHS, curve, marker=".", label="made up from the files")
        for sigma_rel in KEPT:
            axes.axvline(sigma_rel, color="tab:orange", ls=":", label=f"kept: {sigma_rel}")
        axes.set(xlabel="sigma_rel", ylabel=name)
        axes.grid(alpha=0.3)
    left.legend()
    figure.suptitle("One training run, every length of the average")
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default="post_hoc_output")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    keras.utils.set_random_seed(SEED)
    train, test = load_digits()

    model = build_model()
    compile_model(model)
    saved = keras_avg.callbacks.SaveAverages(out / "averages")
    model.fit(*train, batch_size=BATCH_SIZE, epochs=EPOCHS, verbose=2, callbacks=[saved])
    raw = judge(model, test)

    curves = []
    print(f"{'sigma_rel':>10}{'profile error':>15}{'test loss':>11}{'accuracy':>10}")
    print(f"{'raw':>10}{'':>15}{raw[0]:>11.4f}{raw[1]:>10.2f}")
    for sigma_rel in LENGTHS:
        row = keras_avg.checkpoints.synthesize(model, out / "averages", sigma_rel, verbose=0)
        curves.append(judge(model, test))
        loss, accuracy = curves[-1]
        print(f"{sigma_rel:>10}{row['relative_error']:>15.1e}{loss:>11.4f}{accuracy:>10.2f}")
    draw(raw, curves, out / "lengths.png")
    print(f"Picture: {out / 'lengths.png'}")


if __name__ == "__main__":
    main()
