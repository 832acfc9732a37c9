"""Saves checkpoints that hold the averages."""

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import keras

from keras_avg import _atomic
from keras_avg._types import Path
from keras_avg._wrapping import finding


class AverageModelCheckpoint(keras.callbacks.ModelCheckpoint):
    """Saves the model with its averages, at the times when `ModelCheckpoint` saves.

    `save_best_only` compares `val_*` metrics. These are metrics of the raw weights, while the file
    holds the averages. If `SwapAverageWeights` is also among the callbacks, `val_*` are the metrics
    of the averages, and the same averages are saved.

    The saved batch-normalization statistics belong to the raw weights. To save the statistics of
    the averages, pass `batch_norm_data` and `swap_on_epoch=True` to `SwapAverageWeights`. Before
    the first snapshot, the raw model is saved, with one warning.

    A local file is written under another name, flushed to disk and renamed. If the process is
    killed meanwhile, the old file stays. Keras' own `ModelCheckpoint` overwrites the old file.

    Args:
        update_weights: Bool. True: when a file is written, the averages are assigned to the model
            for good. Training goes on from them, and the raw weights are lost. False: the averages
            are saved, and then the raw weights are put back into the model. The file then holds
            both: the averages as the model's weights, and the raw weights with the optimizer.
        filepath: String or path, as for `keras.callbacks.ModelCheckpoint`.
        **kwargs: The other arguments of `keras.callbacks.ModelCheckpoint`.

    Raises:
        TypeError: When training begins, if the model's optimizer keeps no averages.
        ValueError: As `keras.callbacks.ModelCheckpoint`.

    Example:

    ```python
    model.compile(optimizer=keras_avg.SWA("sgd"), loss="mse")
    checkpoint = keras_avg.callbacks.AverageModelCheckpoint(False, "model.{epoch:02d}.keras")
    model.fit(x, y, epochs=10, callbacks=[checkpoint])
    ```

    Reference:
        `tfa.callbacks.AverageModelCheckpoint` of TensorFlow Addons.
    """

    def __init__(self, update_weights: bool, filepath: Path, **kwargs: Any) -> None:
        super().__init__(filepath, **kwargs)
        self.update_weights = update_weights

    def set_model(self, model: keras.Model) -> None:
        """Called once at the start of training."""
        if not finding.wrappers_of(model):
            raise TypeError(
                "AverageModelCheckpoint is only used when training with MovingAverage or "
                "StochasticAverage, or another averaging wrapper of keras_avg. Received: "
                f"optimizer={getattr(model, 'optimizer', None)!r}."
            )
        super().set_model(_SavesAverages(model, self.update_weights))


class _SavesAverages:
    """Replaces the model in `ModelCheckpoint`, so that each save writes the averages."""

    def __init__(self, model: Any, update_weights: bool) -> None:
        self._model = model
        self._update_weights = update_weights
        self._has_warned = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def save(self, filepath: Any, **kwargs: Any) -> None:
        self._write(self._model.save, filepath, **kwargs)

    def save_weights(self, filepath: Any, **kwargs: Any) -> None:
        self._write(self._model.save_weights, filepath, **kwargs)

    def _write(self, save: Callable[..., None], filepath: Any, **kwargs: Any) -> None:
        with contextlib.ExitStack() as stack:
            if _atomic.is_local(filepath):
                filepath = str(stack.enter_context(_atomic.written_aside(filepath)))
            with self._averages():
                save(filepath, **kwargs)

    def _averages(self) -> contextlib.ExitStack:
        """Context in which the model holds the averages."""
        stack = contextlib.ExitStack()
        wrappers = finding.wrappers_of(self._model)
        if any(wrapper.averages_in_model for wrapper in wrappers):
            return stack
        chosen = finding.with_snapshot(wrappers)
        if not chosen and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                "AverageModelCheckpoint saves raw weights until there is a first snapshot. "
                f"Received: none yet, after {wrappers[0].updates_so_far()} updates.",
                stacklevel=2,
            )
        for wrapper in chosen:
            if self._update_weights:
                wrapper.assign_average_vars(self._model.trainable_variables)
            else:
                stack.enter_context(wrapper.average_weights())
        return stack
