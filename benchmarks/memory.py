"""Peak resident memory above that of a bare optimizer, in float32 copies of the parameters.

Each optimizer trains in a process of its own: `python -m benchmarks.memory NAME PARAMETERS`.
"""

import json
import math
import subprocess
import sys
from typing import Any

import keras

import keras_avg
from benchmarks import averages, hardware, models

NAMES = (averages.BARE, averages.EMA, averages.USE_EMA)
BYTES = 4
STEPS = 5


def measure(parameters: int) -> list[dict[str, Any]]:
    """One row for each optimizer."""
    found = {name: _of_a_process(name, parameters) for name in NAMES}
    bare = found[averages.BARE]
    copy = bare["parameters"] * BYTES
    rows = []
    for name in NAMES[1:]:
        own = found[name]
        rows.append(
            {
                "name": name,
                "parameters": bare["parameters"],
                "bare_copies": (bare["training"] - bare["start"]) / copy,
                "training_copies": (own["training"] - bare["training"]) / copy,
                "swapped_copies": (own["swapped"] - bare["swapped"]) / copy,
            }
        )
        print(rows[-1], flush=True)
    return rows


def _of_a_process(name: str, parameters: int) -> dict[str, int]:
    command = [sys.executable, "-m", "benchmarks.memory", name, str(parameters)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.strip().splitlines()[-1])


def _train(name: str, parameters: int) -> dict[str, int]:
    """Train a wide model and validate it. Measure the peak memory of both."""
    width = int((parameters / 12) ** 0.5)
    x = inputs = keras.Input((width,))
    for _ in range(12):
        x = keras.layers.Dense(width, use_bias=False)(x)
    model = keras.Model(inputs, keras.layers.Dense(models.CLASSES)(x))
    model.compile(averages.optimizers(keras.optimizers.SGD)[name](), "mse")
    if name == averages.USE_EMA:
        averages.let_fit_again(model.optimizer)
    data = keras.ops.ones((8, width)), keras.ops.ones((8, models.CLASSES))
    start = hardware.peak_memory()
    model.fit(*data, epochs=STEPS, verbose=0)
    hardware.forget_peak()
    model.fit(*data, epochs=STEPS, verbose=0)
    training = hardware.peak_memory()
    hardware.forget_peak()
    model.evaluate(*data, verbose=0, callbacks=_callbacks(name))
    swapped = hardware.peak_memory()
    count = sum(math.prod(variable.shape) for variable in model.trainable_variables)
    return {"parameters": count, "start": start, "training": training, "swapped": swapped}


def _callbacks(name: str) -> list[keras.callbacks.Callback]:
    if averages.of_keras_avg(name):
        return [keras_avg.callbacks.SwapAverageWeights()]
    return [keras.callbacks.SwapEMAWeights()] if name == averages.USE_EMA else []


if __name__ == "__main__":
    print(json.dumps(_train(sys.argv[1], int(sys.argv[2]))))
