"""Ten runs of SWAG on handwritten digits: accuracy, likelihood and calibration, with intervals.

The network of `examples/swag_uncertainty.py` is trained in two ways. Both are tested on the same
pictures, whose writers are not in the training data:

* 320 pictures at a high rate, as in the example.
* 1280 pictures with more weight decay. Here the raw network is only sometimes overconfident.

    KERAS_BACKEND=jax python docs/studies/swag_on_digits.py --seeds 10
"""

import argparse
import pathlib
import sys

import keras

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples"))

import report
import sklearn.datasets
import swag_uncertainty as example

import keras_avg

SETTINGS = {
    "few": {"pictures": 320, "rate": 0.2, "weight_decay": 0.002},
    "all": {"pictures": 1280, "rate": 0.1, "weight_decay": 0.01},
}


def data(pictures):
    """The first `pictures` for training, and always the same 517 for the test."""
    x, y = sklearn.datasets.load_digits(return_X_y=True)
    x = x.reshape(-1, 8, 8, 1).astype("float32") / 16
    return (x[:pictures], y[:pictures]), (x[1280:], y[1280:])


def train(known, rate, weight_decay, epochs):
    steps = len(known[0]) // example.BATCH_SIZE
    sgd = keras.optimizers.SGD(rate, momentum=0.9, weight_decay=weight_decay)
    swag = keras_avg.SWAG(sgd, epochs // 2 * steps, average_period=steps // 4, rank=20)
    model = example.build_model()
    model.compile(swag, loss="sparse_categorical_crossentropy")
    model.fit(*known, batch_size=example.BATCH_SIZE, epochs=epochs, verbose=0)
    return model


def one_run(seed, epochs, samples, pictures, rate, weight_decay):
    """The scores of raw, SWA and SWAG after one training."""
    keras.utils.set_random_seed(seed)
    known, (x, y) = data(pictures)
    model = train(known, rate, weight_decay, epochs)
    found = example.predictions(model, known[0], x, samples)
    return {name: example.scores(each, y) for name, each in found.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=example.EPOCHS)
    parser.add_argument("--samples", type=int, default=example.SAMPLES)
    parser.add_argument("--out", default=pathlib.Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    found = {}
    for name, settings in SETTINGS.items():
        runs = []
        for seed in range(arguments.seeds):
            keras.backend.clear_session()
            runs.append(one_run(seed, arguments.epochs, arguments.samples, **settings))
        found[f"{settings['pictures']} pictures"] = report.by_method(runs)
        print(f"{name}: done", flush=True)
    settings = SETTINGS | {"epochs": arguments.epochs, "samples": arguments.samples, "rank": 20}
    report.save(arguments.out, __doc__, settings, arguments.seeds, found, "raw")


if __name__ == "__main__":
    main()
