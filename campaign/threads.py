"""Trains and evaluates models in several threads, and deletes models while they hold averages.

python campaign/threads.py [--times 20]

The model of each thread equals a model that is trained alone, bit for bit. Models that are deleted
while they hold averages are freed, and do not disturb other models.
"""

import argparse
import gc
import json
import sys
import threading
import time
import warnings
import weakref

import keras
import numpy as np
from keras import ops

import keras_avg
from keras_avg.callbacks import SwapAverageWeights

X = np.random.default_rng(0).normal(size=(32, 4)).astype("float32")
Y = X[:, :1] * X[:, 1:2]


def build(seed):
    layers = [
        keras.Input((4,)),
        keras.layers.Dense(8, "tanh", kernel_initializer=keras.initializers.GlorotUniform(seed)),
        keras.layers.BatchNormalization(),
        keras.layers.Dense(1, kernel_initializer=keras.initializers.GlorotUniform(seed)),
    ]
    model = keras.Sequential(layers)
    model.compile(keras_avg.SWA(keras_avg.MovingAverage("adam"), 0, 2), "mse")
    return model


def train(model, epochs=3):
    how = {"batch_size": 4, "epochs": epochs, "shuffle": False, "verbose": 0}
    model.fit(X, Y, validation_data=(X, Y), callbacks=[SwapAverageWeights()], **how)
    keras_avg.swap_weights(model)


def everything(model):
    return [
        np.array(ops.convert_to_numpy(v)) for v in [*model.variables, *model.optimizer.variables]
    ]


def same(ours, theirs):
    assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


def together(*functions):
    errors = []

    def run(function):
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def two_models_train():
    alone = [build(1), build(2)]
    for model in alone:
        train(model)
    models = [build(1), build(2)]
    together(*(lambda m=m: train(m) for m in models))
    for model, expected in zip(models, alone, strict=True):
        same(everything(model), everything(expected))


def one_is_judged_while_another_trains():
    alone, judged = build(1), build(2)
    train(alone)
    train(judged)
    before, model = everything(judged), build(1)

    def judge():
        for _ in range(5):
            with keras_avg.average_weights(judged):
                judged.evaluate(X, Y, verbose=0)
            judged.evaluate(X, Y, verbose=0, callbacks=[SwapAverageWeights()])

    together(lambda: train(model), judge)
    same(everything(model), everything(alone))
    same(everything(judged), before)


def deleted_while_swapped():
    model = build(1)
    train(model)
    keras_avg.swap_weights(model)
    gone = weakref.ref(model.optimizer)
    del model
    keras.backend.clear_session()
    gc.collect()
    assert gone() is None, "a deleted optimizer is not freed"
    other = build(2)
    train(other)


def the_optimizer_goes_and_the_model_stays():
    model = build(1)
    train(model)
    keras_avg.swap_weights(model)
    held = [np.array(w) for w in model.get_weights()]
    model.compile("sgd", "mse")
    gc.collect()
    same(model.get_weights(), held)
    model.fit(X, Y, verbose=0)


KINDS = [
    two_models_train,
    one_is_judged_while_another_trains,
    deleted_while_swapped,
    the_optimizer_goes_and_the_model_stays,
]


def main():
    options = argparse.ArgumentParser()
    options.add_argument("--times", type=int, default=20)
    chosen = options.parse_args()
    warnings.simplefilter("ignore")
    began = time.perf_counter()
    for _ in range(chosen.times):
        for kind in KINDS:
            kind()
    names = [kind.__name__ for kind in KINDS]
    print(json.dumps({"backend": keras.backend.backend(), "times": chosen.times, "kinds": names,
        "seconds": round(time.perf_counter() - began)}))  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
