"""Evaluates a model with its averages during `fit`."""

import warnings
from typing import Any

import keras
import numpy as np

from keras_avg import _backend, _keras_internals
from keras_avg._optimizers.averaged_optimizer_wrapper import AveragedOptimizerWrapper
from keras_avg._types import Data, Logs
from keras_avg._wrapping import bindings, due_steps, finding, nesting, summary, swap
from keras_avg.batch_norm import refuse_one_pass_data, statistics, update_batch_norm
from keras_avg.callbacks import _scalars
from keras_avg.callbacks.synchronize_workers import keep_company
from keras_avg.distributed import LocalCommunicator

LONELY = LocalCommunicator()


class SwapAverageWeights(keras.callbacks.Callback):
    """Puts the averages into the model for evaluation, and the raw weights back for training.

    In `fit`, the model holds the averages from the start of validation until the next epoch begins.
    So the `val_*` metrics describe the averages. `ModelCheckpoint`, `BackupAndRestore` and
    `EarlyStopping(restore_best_weights=True)` save the averages that were evaluated. The order of
    these callbacks does not matter.

    Without validation data, the model holds the averages from the end of the epoch. Then the order
    does matter. Callbacks that are listed after this one see the averages. Callbacks that are
    listed before it see the raw weights. If such a callback restores raw weights when training
    ends, they are replaced by the averages.

    A file that is written while the averages are in the model holds both copies. After training,
    the model holds the averages, and the optimizer holds the raw weights. The next `fit` with this
    callback goes on from the raw weights. Training is the same with and without this callback, bit
    for bit.

    `evaluate` and `predict` outside of `fit` use the averages too, if they are called with this
    callback. Afterwards the model holds what it held before. Before the first snapshot, all of
    these use the raw weights.

    The callback uses the outermost wrapper that has a snapshot. It also finds it inside a
    `LossScaleOptimizer` and among the members of a `MultiOptimizer`.

    Args:
        swap_on_epoch: Bool. If False, the raw weights are put back right after validation. Then
            callbacks at the end of an epoch see the raw weights. In this case list
            `EarlyStopping(restore_best_weights=True)` before this callback, because it restores raw
            weights when training ends. Default True.
        batch_norm_data: Data as for `keras_avg.update_batch_norm`. It must have an end, and must
            not be a generator. If given, the statistics of batch-normalization layers are
            recomputed for the averages. In `fit` this happens once for each change of the averages.
            The statistics are swapped together with the averages. Default None: the layers keep the
            statistics of the raw weights.
        log_raw: Bool. If True, the raw weights are evaluated too. Then the logs, the history and
            the progress bar have `val_raw_*` beside `val_*`. This reads the validation data a
            second time, so the data must not be a Python generator. List callbacks that read the
            logs, such as `TensorBoard`, after this one. Default False.
        log_averages: Bool. If True, the logs of an epoch have two more numbers. `average/decay` is
            the share of the average that an averaging keeps now. Rules without such a number do not
            log it. `average/distance` is the norm of the raw weights minus the averages. It is
            computed once in an epoch, when the averages are put in. List `TensorBoard` after this
            callback to draw both. Default False.
        verbose: 0 or 1. If 1, each epoch that has averages ends with a line. It says which averages
            they are, how many snapshots they have, and how many updates there were. Default 0.
        optimizer: One of the model's averaging wrappers, whose averages to use. Default None: the
            outermost wrapper that has a snapshot.

    Raises:
        ValueError: If `batch_norm_data` can be read only once. When used: if the model's optimizer
            keeps no averages, if `optimizer` is none of its wrappers, or if `log_raw` is True and
            the validation data is a Python generator.

    Example:

    ```python
    model.compile(optimizer=keras_avg.MovingAverage("adam"), loss="mse")
    best = keras.callbacks.ModelCheckpoint("best.keras", save_best_only=True)
    averages = keras_avg.callbacks.SwapAverageWeights()
    model.fit(x, y, validation_data=(x_val, y_val), epochs=20, callbacks=[averages, best])
    ```

    Reference:
        `keras.callbacks.SwapEMAWeights`, for averages that `use_ema` keeps.
    """

    def __init__(
        self,
        swap_on_epoch: bool = True,
        batch_norm_data: Data | None = None,
        log_raw: bool = False,
        optimizer: AveragedOptimizerWrapper | None = None,
        log_averages: bool = False,
        verbose: int = 0,
    ) -> None:
        super().__init__()
        refuse_one_pass_data("batch_norm_data", batch_norm_data)
        self.swap_on_epoch = swap_on_epoch
        self.batch_norm_data = batch_norm_data
        self.log_raw = log_raw
        self.optimizer = optimizer
        self.log_averages = log_averages
        self.verbose = verbose
        self._scalars: dict[str, float] = {}  # for the logs of this epoch
        self._in_fit = False
        self._validated = False  # in this epoch
        self._has_validated = False  # in this `fit`
        self._has_begun = False  # an epoch of this `fit`
        self._has_warned = False  # in this `fit`, that there will be no snapshot
        # Whether the model held averages when the current evaluation outside of `fit` began.
        self._found_averages: bool | None = None
        # For which averages the statistics were recomputed, and the statistics.
        self._recomputed: tuple[Any, list[Any]] | None = None

    def set_model(self, model: keras.Model) -> None:
        """Called once at the start of each `fit`, `evaluate` or `predict`."""
        super().set_model(model)
        self._in_fit, self._recomputed = False, None  # Other averages may have been loaded.

    def on_train_begin(self, logs: Logs = None) -> None:
        """Go on from the raw weights."""
        self._in_fit, self._found_averages, self._recomputed = True, None, None
        self._has_validated = self._has_begun = self._has_warned = False
        self._take_averages_out()

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        """Go on from the raw weights. `BackupAndRestore` may have loaded averages before."""
        self._in_fit, self._validated, self._scalars = True, False, {}
        self._take_averages_out()
        if not self._has_begun:
            self._has_begun = True
            self._warn_if_too_short()

    def on_test_begin(self, logs: Logs = None) -> None:
        """Put the averages in for validation."""
        if self.log_raw and self._in_fit and _keras_internals.validates_on_generator(self.model):
            raise ValueError(
                "`log_raw=True` takes the validation data twice. Received: validation data from a "
                "Python generator, which would give others the second time. Pass arrays, a "
                "tf.data.Dataset or a keras.utils.PyDataset."
            )
        self._begin_judging()

    def on_test_end(self, logs: Logs = None) -> None:
        """Leave the averages in for callbacks at the epoch's end, or put the raw weights back."""
        self._validated = self._in_fit
        self._has_validated |= self._in_fit
        self._end_judging()

    def on_predict_begin(self, logs: Logs = None) -> None:
        """Predict with the averages."""
        self._begin_judging()

    def on_predict_end(self, logs: Logs = None) -> None:
        """Leave the model as it was found."""
        self._end_judging()

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        """With `log_raw`, evaluate the raw weights too. Then put the averages into the model."""
        if self.log_raw and self._validated and logs is not None:
            logs.update(self._raw_logs(logs))
        if self.swap_on_epoch:
            self._put_averages_in()
        if self.log_averages and logs is not None:
            logs.update(self._scalars or _scalars.of(self._chosen()))
        if self.verbose:
            for wrapper in self._chosen():
                print(f"Epoch {epoch + 1}: averages of {summary.in_one_line(wrapper)}")

    def on_train_end(self, logs: Logs = None) -> None:
        """Leave the averages in the model. Several workers first finish their last round."""
        keep_company(self.model)
        # Without validation, another callback may have restored raw weights into the swapped model.
        if not self._has_validated or self._statistics_are_of_others():
            self._take_averages_out()
        self._put_averages_in()
        self._in_fit = False
        if not self._has_warned and not any(w.has_average for w in self._wrappers()):
            warnings.warn(self._no_snapshot("ended", "holds", 0), stacklevel=2)

    def _wrappers(self) -> list[Any]:
        """The wrappers whose averages may be put in. Reads `self.model`, which syncs JAX' state."""
        wrappers = finding.wrappers_of(self.model)
        if self.optimizer is not None and bindings.works_for(self.optimizer, self.model):
            return [self.optimizer]
        if not wrappers:
            raise ValueError(
                "SwapAverageWeights needs a model whose optimizer keeps averages. Received: "
                f"optimizer={getattr(self.model, 'optimizer', None)!r}. Compile the model with an "
                'optimizer such as keras_avg.SWA("adam").'
            )
        if self.optimizer is not None:
            raise ValueError(
                "The wrapper given to SwapAverageWeights is not at work in the model. Received: "
                f"optimizer={self.optimizer!r}, and the model has {wrappers!r}."
            )
        return wrappers

    def _chosen(self) -> list[Any]:
        return finding.with_snapshot(self._wrappers())

    def _begin_judging(self) -> None:
        holding = any(wrapper.averages_in_model for wrapper in self._wrappers())
        if not self._in_fit and self._found_averages is None:
            self._found_averages = holding
        self._put_averages_in()

    def _end_judging(self) -> None:
        if self._in_fit:
            back = not self.swap_on_epoch
        else:
            back, self._found_averages = not self._found_averages, None
        if back:
            self._take_averages_out()

    def _put_averages_in(self) -> None:
        chosen = [wrapper for wrapper in self._chosen() if not wrapper.averages_in_model]
        if self.log_averages and chosen:
            self._scalars = _scalars.of(chosen)
        for wrapper in chosen:
            wrapper.swap_weights()
        if chosen and self.batch_norm_data is not None:
            swap.set_statistics_aside(self.model, statistics(self.model))
            self._set_statistics(tuple((w, w.num_snapshots) for w in chosen))

    def _set_statistics(self, averages: Any) -> None:
        if self._recomputed is None or self._recomputed[0] != averages:
            update_batch_norm(self.model, self.batch_norm_data, verbose=0)
            copies = [_backend.copy(variable) for variable in statistics(self.model)]
            self._recomputed = averages, copies
        for variable, value in zip(statistics(self.model), self._recomputed[1], strict=True):
            variable.assign(_backend.copy(value))

    def _statistics_are_of_others(self) -> bool:
        """Whether the averages in the model have changed since the statistics were recomputed."""
        averages = self._recomputed[0] if self._recomputed else ()
        return any(w.averages_in_model and w.num_snapshots != number for w, number in averages)

    def _take_averages_out(self) -> None:
        for wrapper in [*self._wrappers(), *finding.wrappers_of(self.model)]:
            if wrapper.averages_in_model:
                wrapper.bind_model(self.model)
                wrapper.swap_weights()

    def _raw_logs(self, logs: dict) -> dict:
        if self._chosen():
            self._take_averages_out()
            with _backend.random_state_kept():
                raw = _keras_internals.validate_again(self.model)
            if self.swap_on_epoch:
                self._put_averages_in()
        else:
            raw = {k.removeprefix("val_"): v for k, v in logs.items() if k.startswith("val_")}
        return {f"val_raw_{name}": value for name, value in raw.items()}

    def _warn_if_too_short(self) -> None:
        """Warn at the beginning if it is known that there will be no snapshot."""
        batches = (self.params.get("epochs") or 0) * (self.params.get("steps") or 0)
        if batches and not any(
            w.has_average or _will_average(w, batches) for w in self._wrappers()
        ):
            self._has_warned = True
            warnings.warn(self._no_snapshot("will end", "will hold", batches), stacklevel=2)

    def _no_snapshot(self, ends: str, holds: str, batches: int) -> str:
        rules = "; ".join(
            f"{w.name!r} ({w.rule()}) after {w.updates_so_far() + _updates_in(w, batches)} updates"
            for w in self._wrappers()
        )
        return (
            f"Training {ends} without a snapshot, so the model {holds} the raw weights. Received: "
            f"{rules}. Train longer, or let averaging start earlier."
        )


def _updates_in(wrapper: Any, batches: int) -> int:
    return batches // (nesting.innermost(wrapper).gradient_accumulation_steps or 1)


def _will_average(wrapper: Any, batches: int) -> bool:
    """Whether an averaging will be due within `batches`. True if the rule cannot say it."""
    if getattr(wrapper, "communicator", LONELY).size > 1:  # Other workers may train longer.
        return True
    done = wrapper.updates_so_far()
    last = done + min(_updates_in(wrapper, batches), due_steps.LOOK_AHEAD)
    try:
        return due_steps.first_due(wrapper, np.arange(done, last)) is not None
    except (TypeError, ValueError, RuntimeError):  # The rule takes no array of steps.
        return True
