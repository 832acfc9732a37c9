"""`save FOLDER` trains and saves, and `load FOLDER SOURCE...` loads. Both write their values."""

import pathlib
import sys

import keras
import numpy as np
import small_model

from keras_avg import (
    BEMA,
    LAWA,
    SWA,
    SWAG,
    Lookahead,
    ModelAverage,
    MovingAverage,
    PrimalAverage,
    ScheduleFree,
    decays,
)

POLICIES = ("float32", "bfloat16")
HELD = ("raw", "averages")
NAMES = ("model.keras", "model.weights.h5")
CAN_TRAIN = keras.backend.backend() in ("tensorflow", "jax", "torch")


def new_model():
    return small_model.compiled(SWA(MovingAverage(keras.optimizers.Adam(0.01)), 1, 2))


def new_outer_optimizer():
    return keras.optimizers.SGD(0.7, momentum=0.9, nesterov=True)


KINDS = {
    "ModelAverage": lambda: ModelAverage(
        MovingAverage("sgd"), interval_steps=3, outer_optimizer=new_outer_optimizer()
    ),
    "Lookahead": lambda: Lookahead("sgd", sync_period=3),
    "LAWA": lambda: LAWA("sgd", window=2, average_period=3),
    "SWAG": lambda: SWAG("sgd", average_period=3, rank=2),
    "BEMA": lambda: BEMA("sgd", average_period=3),
    "ScheduleFree": lambda: ScheduleFree("sgd"),
    "PrimalAverage": lambda: PrimalAverage("sgd"),
    "PowerFunction": lambda: MovingAverage("sgd", average_decay=decays.PowerFunction(0.1)),
}


def save(folder):
    for name, optimizer in KINDS.items():
        model = small_model.compiled(optimizer())
        small_model.fit(model, epochs=2)
        for held in HELD:
            if held == "averages":
                model.optimizer.swap_weights()
            model.save(folder / f"{held}-{name}.keras")
            np.savez(folder / f"{held}-{name}.npz", **state(model))
    for policy in POLICIES:
        keras.config.set_dtype_policy(policy)
        for held in HELD:
            model = new_model()
            small_model.fit(model, epochs=2)
            if held == "averages":
                model.optimizer.swap_weights()
            for name in NAMES:
                write = model.save if name.endswith(".keras") else model.save_weights
                write(folder / f"{policy}-{held}-{name}")
            np.savez(folder / f"{policy}-{held}.npz", **state_and_future(model))


def load(folder, *sources):
    for source in sources:
        for name in KINDS:
            for held in HELD:
                model = keras.saving.load_model(source / f"{held}-{name}.keras")
                found = state(model)
                if held == "averages":
                    model.optimizer.swap_weights()
                found |= numbered("raw", model.variables)
                np.savez(folder / f"{source.name}-{held}-{name}.npz", **found)
    for policy in POLICIES:
        keras.config.set_dtype_policy(policy)
        for held in HELD:
            for source in sources:
                for name in NAMES:
                    file = f"{policy}-{held}-{name}"
                    found = state_and_future(loaded(source / file))
                    np.savez(folder / f"{source.name}-{file}.npz", **found)


def loaded(path):
    if path.suffix == ".keras":
        return keras.saving.load_model(path)
    model = new_model()
    model.optimizer.build(model.trainable_variables)
    model.load_weights(path)
    return model


def state_and_future(model):
    """All values: first as they are, then after a swap, after steps by hand, and after an epoch."""
    optimizer = model.optimizer
    found = {"averages_in_model": np.asarray(optimizer.averages_in_model)} | state(model)
    if optimizer.averages_in_model:
        optimizer.swap_weights()
    found |= numbered("raw", model.variables)
    if keras.config.dtype_policy().name != "float32":
        return found  # In bfloat16 each backend computes differently.
    found["predicted"] = model.predict(small_model.X, verbose=0)
    found["bare"] = predicted_without_keras_avg(model.get_weights())
    ones = [keras.ops.ones(v.shape, v.dtype) for v in model.trainable_variables]
    for _ in range(2):
        optimizer.apply(ones, model.trainable_variables)
    found |= numbered("after_steps", [*model.variables, *optimizer.variables])
    if CAN_TRAIN:
        small_model.fit(model, epochs=1)
        found |= numbered("after_fit", [*model.variables, *optimizer.variables])
    return found


def state(model):
    return numbered("model", model.variables) | numbered("optimizer", model.optimizer.variables)


def predicted_without_keras_avg(weights):
    bare = small_model.compiled(None)
    bare.set_weights(weights)
    return bare.predict(small_model.X, verbose=0)


def numbered(key, variables):
    return {f"{key}_{i}": value for i, value in enumerate(small_model.arrays(variables))}


if __name__ == "__main__":
    command, *folders = sys.argv[1:]
    {"save": save, "load": load}[command](*map(pathlib.Path, folders))
