"""Lets BatchNormalization layers run in training mode, and notes the moments of their calls."""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from keras import ops

from keras_avg import _backend, _keras_internals
from keras_avg._moments.pool import Moments

FLAGS = ("renorm", "synchronized")  # Both are off during a pass.


class Observer:
    """Notes the moments of all calls of some layers.

    Args:
        layers: List of BatchNormalization layers.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self._layers = list(layers)
        self._found: list[Moments] = []
        self._calls = [0] * len(self._layers)
        self._place: Any = None

    @contextlib.contextmanager
    def observing(self) -> Iterator[None]:
        """Context in which the layers run in training mode, without `renorm`."""
        with contextlib.ExitStack() as stack:
            for number, layer in enumerate(self._layers):
                for name in FLAGS:
                    if hasattr(layer, name):
                        stack.callback(setattr, layer, name, getattr(layer, name))
                        setattr(layer, name, False)
                on_call = functools.partial(self._on_call, number)
                on_moments = functools.partial(self._on_moments, number)
                stack.enter_context(_keras_internals.in_training_mode(layer, on_call, on_moments))
            yield

    def moments(self, infer: Any, inputs: Any) -> list[Moments]:
        """Call `infer(inputs)`, and return the moments of all calls of the layers in it.

        It may run in code that is being compiled. Then the moments are tensors of this code.

        Raises:
            ValueError: If a layer did not compute its moments with the observed method, or was
                called in code that is compiled by itself.
        """
        self._found, self._calls = [], [0] * len(self._layers)
        self._place = _backend.place_in_code()
        infer(inputs)
        for number, calls in enumerate(self._calls):
            self._check(number, calls, sum(found.number == number for found in self._found))
        return self._found

    def _on_call(self, number: int) -> None:
        self._calls[number] += 1
        # This must be raised now, while the code is traced. Otherwise compiled code that contains
        # training mode would be kept.
        if _backend.place_in_code() != self._place:
            raise ValueError(
                f"The moments of {self._layers[number].path!r} cannot be known. Received: a call "
                "from compiled code, or from a loop that is compiled. Call the layer outside of "
                "it, or set its `trainable = False` to keep its statistics."
            )

    def _on_moments(self, number: int, inputs: Any, mask: Any, mean: Any, variance: Any) -> None:
        shape = np.array(ops.shape(inputs), "int32")
        self._found.append(Moments(number, shape, mask, mean, variance))

    def _check(self, number: int, calls: int, reductions: int) -> None:
        if calls != reductions:
            layer = self._layers[number]
            raise ValueError(
                f"The moments of {layer.path!r}, of type {type(layer).__name__}, cannot be known: "
                "it does not compute them once a call by the method that it has from "
                f"BatchNormalization. Received: moments {reductions} times in {calls} calls. Let "
                "its `call` take `training` and pass it to `super().call`, or set its "
                "`trainable = False` to keep its statistics."
            )
