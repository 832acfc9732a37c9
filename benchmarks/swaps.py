"""A swap of the averages into the model and a swap back, in copies of the same bytes."""

import gc
import importlib
from collections.abc import Callable
from typing import Any

import keras

import keras_avg
from benchmarks import averages, measuring

COPY = "copy"
SIZES = ((50_000_000, 200), (1_000_000, 200), (1_000_000, 2_000))
QUICK_SIZES = ((10_000_000, 200),)


class Weights(keras.layers.Layer):
    """A layer of tensors. It returns a sum of one element of each, so each has a gradient."""

    def __init__(self, shapes: list[tuple[int, ...]]) -> None:
        super().__init__()
        self.kernels = [self.add_weight(shape=shape, initializer="ones") for shape in shapes]

    def call(self, x: Any) -> Any:
        return x + sum(kernel[0, 0] for kernel in self.kernels)


def model_of(shapes: list[tuple[int, ...]], optimizer: Any) -> keras.Model:
    """A compiled model of bare tensors. Its optimizer has taken one step outside `fit`."""
    model = keras.Sequential([keras.Input((1,)), Weights(shapes)])
    model.compile(optimizer, "mse")
    gradients = [keras.ops.ones(shape) for shape in shapes]
    optimizer.apply(gradients, model.trainable_variables)
    return model


def measure(sizes: list[tuple[int, int]], rounds: int) -> list[dict[str, Any]]:
    """One row for each size and way to swap."""
    framework = importlib.import_module(f"benchmarks.on_{averages.backend()}")
    ways = averages.optimizers(keras.optimizers.SGD)
    rows = []
    for parameters, tensors in sizes:
        shapes = averages.shapes(parameters, tensors)
        ours = model_of(shapes, ways[averages.EMA]())
        keras_own = model_of(shapes, ways[averages.USE_EMA]())
        calls = {
            "keras_avg.swap_weights": _twice(lambda model=ours: keras_avg.swap_weights(model)),
            "SwapAverageWeights": _validated(keras_avg.callbacks.SwapAverageWeights(), ours),
            "Keras SwapEMAWeights": _validated(keras.callbacks.SwapEMAWeights(), keras_own),
        }
        for name, call in calls.items():
            # One at a time. If one way returns freed memory to the system, the next would have to
            # ask for it again, which takes as long as several copies.
            seconds = measuring.interleaved({COPY: framework.copy(parameters), name: call}, rounds)
            row = {"parameters": parameters, "tensors": tensors, "name": name}
            row["copies"] = measuring.ratio(seconds[name], seconds[COPY])
            row["ms"] = 1000 * measuring.summary(seconds[name])["median"]
            rows.append(row)
            print(row, flush=True)
        del ours, keras_own, calls
        gc.collect()
    return rows


def _twice(swap: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        swap()
        swap()

    return run


def _validated(callback: keras.callbacks.Callback, model: keras.Model) -> Callable[[], None]:
    """Run the hooks of a callback around a validation, without the validation itself."""

    def run() -> None:
        callback.set_model(model)
        callback.on_test_begin()
        callback.on_test_end()

    return run
