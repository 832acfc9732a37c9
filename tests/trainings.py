"""One training for each pair of a wrapper and an inner optimizer. Several tests look at it.

To compile a model takes longer than to train it. So the tests of a pair share one training.
On TensorFlow they also build the optimizer first. Otherwise Keras makes its variables in the first
step, and TensorFlow traces this step twice. Most other quick tests train without `build`.
"""

import functools
import math
from typing import NamedTuple

import keras
import numpy as np
import small_training as small
from bare_training import Trajectories
from wrappers import INNER, chain, wrapped

UPDATES = 11
STEPS_BEFORE_FILE = 5


class Training(NamedTuple):
    """What the tests look at. They must not change it.

    Attributes:
        wrapper: Name of the wrapper.
        inner: Name of the inner optimizer.
        model: The model after `UPDATES` updates.
        trajectories: For each trainable variable its values: before training, and after each
            update.
        file: The model after `STEPS_BEFORE_FILE` steps, saved. With two micro-steps for each
            update, this is in the middle of an accumulation.
        state_in_file: The optimizer's weights at that moment.
    """

    wrapper: str
    inner: str
    model: keras.Model
    trajectories: list[list[np.ndarray]]
    file: str
    state_in_file: list[np.ndarray]


def of_pair(wrapper, inner, folder):
    """The training of one pair, with a file in `folder`."""
    model = _built_model(wrapped(wrapper, inner))
    first, second = Trajectories(), Trajectories()
    begin(model, callbacks=[first])
    file = str(folder / "model.keras")
    model.save(file)
    state = model.optimizer.get_weights()
    finish(model, callbacks=[second])
    values = [a + b[1:] for a, b in zip(first.values, second.values, strict=True)]
    return Training(wrapper, inner, model, values, file, state)


@functools.cache
def without_wrapper(inner):
    """The model after the same training with the bare inner optimizer."""
    model = _built_model(INNER[inner]())
    begin(model)
    finish(model)
    return model


def _built_model(optimizer):
    model = small.model(optimizer)
    model.optimizer.build(model.trainable_variables)
    return model


def begin(model, **arguments):
    small.fit(model, epochs=1, steps_per_epoch=STEPS_BEFORE_FILE, **arguments)


def finish(model, **arguments):
    """Train for whole epochs, until there were `UPDATES` updates."""
    _, innermost = chain(model.optimizer)
    steps = UPDATES * (innermost.gradient_accumulation_steps or 1) - STEPS_BEFORE_FILE
    small.fit(model, epochs=math.ceil(steps / small.BATCHES), **arguments)
