"""Runs the rounds of a ModelAverage between the batches of `fit`."""

import contextlib
from collections.abc import Iterator
from typing import Any

import keras

from keras_avg import _checks, _keras_internals
from keras_avg._optimizers.model_average import ModelAverage
from keras_avg._types import Logs
from keras_avg._wrapping import finding, nesting, train_function
from keras_avg.batch_norm import frozen_batch_norms


class SynchronizeWorkers(keras.callbacks.Callback):
    """Lets the workers of a `ModelAverage` meet in `fit`: at the start, at each round, at the end.

    Before the very first batch, all workers take the chief's variables. These include variables of
    frozen layers and float state that is not trained. After a batch, if a round is due, all workers
    take the mean. A worker that has no data left joins the rounds with weight 0 until the last
    worker has finished. So with shards of different sizes no worker hangs, and the mean is of
    training workers only.

    With one worker the callback does nothing.

    Keras refuses to fit no data. A worker that has none calls the callback itself in the place of
    `fit`: `callback.set_model(model)`, `callback.on_train_begin()`, `callback.on_train_end()`. It
    returns when the others have finished. Its model has the mean of the last round.

    List `BackupAndRestore` after this callback, with a folder for each worker. Otherwise a worker
    that finishes early would delete its backup while others still train.

    Each worker makes its backup at the end of its own epoch, and only rounds make workers wait for
    each other. So let each epoch end with a round: let its number of batches be a multiple of
    `interval_steps`. If a worker dies while the backups are of different epochs, the restarted job
    is refused, because the workers are at different steps. Then copy the folder of one worker to
    all others.

    Args:
        average_non_trainable: Bool. Whether each round also averages float state that is not
            trained, such as batch-normalization statistics. Weights of frozen layers are never
            averaged, because they do not change. Default True.

    Raises:
        ValueError: When training begins, if the model's optimizer has no `ModelAverage` or several.
            If `interval_steps` is not a multiple of `steps_per_execution`. If
            `steps_per_execution` is not 1 with a `LossScaleOptimizer` (`mixed_float16` adds one).
        RuntimeError: In training, if another worker has ended, or has not answered for longer than
            the timeout. The local weights stay valid, and can be saved.

    Example:

    ```python
    communicator = keras_avg.distributed.initialize()
    model.compile(optimizer=keras_avg.ModelAverage("adam", interval_steps=100), loss="mse")
    callbacks = [
        keras_avg.callbacks.SynchronizeWorkers(),
        keras_avg.callbacks.BackupAndRestore(f"backup_{communicator.rank}"),
    ]
    model.fit(my_shard, epochs=10, callbacks=callbacks)
    ```

    Reference:
        `tf.contrib.opt.ModelAverageOptimizer` of TensorFlow 1, `make_session_run_hook`.
    """

    def __init__(self, average_non_trainable: bool = True) -> None:
        super().__init__()
        self.average_non_trainable = _checks.truth("average_non_trainable", average_non_trainable)
        self._wrapper: Any = None  # None: there is one worker, and nothing to do
        self._trained: Any = None  # the model; reading `self.model` syncs the state on JAX
        self._history: Any = None  # the history of the `fit` that has this callback
        self._step = 0  # the number of updates when it was last read
        self._executions = 0  # the number of executions since then
        self._steps_per_execution = 1
        self._has_begun = False
        self._is_by_hand = False  # whether a training loop of the user calls it
        self._is_in_batch = False
        self._is_in_step = False

    def on_train_begin(self, logs: Logs = None) -> None:
        """Check that rounds can take place between batches."""
        model = self.model
        wrapper = _model_average(model)
        self._wrapper = wrapper if wrapper.meeting.is_of_several else None
        if self._wrapper is None:
            return
        _check_rounds_end_executions(wrapper, model)
        wrapper.meeting.callback = self
        self._trained, self._history = model, getattr(model, "history", None)
        self._is_by_hand = not train_function.watch(model, id(self), self._step_of_fit)
        self._steps_per_execution = model.steps_per_execution
        self._has_begun = self._is_in_batch = False

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        """Before the first step, start together. Other callbacks may have loaded weights before."""
        if self._wrapper is not None:
            self._begin(self.model)
            self._look()
            self._refuse_missed_round()

    def on_train_batch_begin(self, batch: int, logs: Logs = None) -> None:
        """If another callback has loaded a state, count rounds from there."""
        if self._wrapper is None:
            return
        self._is_in_batch = True
        if self._wrapper.meeting.met_until is None:
            self._wrapper.no_round_is_missing()
            self._look()

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        """Take a round if one is due."""
        self._is_in_batch = False
        if self._wrapper is None:
            return
        self._executions += 1
        if self._steps_at_most() < self._wrapper.next_due_step(self._step):
            return
        model, before = self.model, self._step
        self._look()
        due = self._wrapper.last_due_step(self._step)
        if due <= max(before, self._wrapper.meeting.met_until or 0):
            return
        if due != self._step:
            raise RuntimeError(
                f"A round was due after step {due}, in the middle of an execution. Received: "
                f"step {self._step}, steps_per_execution={self._steps_per_execution}. Let the "
                "number of batches in an epoch be a multiple of `steps_per_execution`."
            )
        self._wrapper.meet(self._others(model))

    def on_train_end(self, logs: Logs = None) -> None:
        """Join the rounds with weight 0 until all workers have finished."""
        self.keep_company()

    def keep_company(self) -> None:
        """Join the rounds with weight 0 until all workers have finished. Once in a `fit`."""
        if self._wrapper is None:
            return
        model, wrapper, has_trained = self.model, self._wrapper, self._has_begun
        self._begin(model)  # There may have been no epoch.
        self._look()
        self._refuse_missed_round()
        with contextlib.ExitStack() as stack:
            for holding in finding.averaging_optimizers(model):
                stack.enter_context(holding.raw_weights())
            while wrapper.meet(self._others(model), is_training=False):
                pass
        if has_trained:  # `use_ema` of Keras must write its average into the variables again.
            model.optimizer.finalize_variable_values(model.trainable_weights)
        train_function.leave(model, id(self))
        self._wrapper = self._trained = None

    def is_at_work(self) -> bool:
        """Whether Keras will call this callback after the current step.

        If an exception ends `fit`, callbacks are not told. So this asks the train function, which
        always says when it ends. In a training loop of the user, the user's calls decide.
        """
        in_batch = self._is_by_hand and self._is_in_batch
        return self.is_in_fit() and (self._is_in_step or in_batch)

    def is_in_fit(self) -> bool:
        """Whether the last training of the model has this callback."""
        if self._wrapper is None:
            return False
        return self._is_by_hand or getattr(self._trained, "history", None) is self._history

    @contextlib.contextmanager
    def _step_of_fit(self) -> Iterator[None]:
        self._is_in_step = True
        try:
            yield
        finally:
            self._is_in_step = False

    def _begin(self, model: Any) -> None:
        if self._has_begun:
            return
        if not model.optimizer.built:  # Otherwise TensorFlow builds it while the step is traced.
            model.optimizer.build(model.trainable_variables)
        self._wrapper.start_together(_floats(model.non_trainable_variables))
        self._wrapper.no_round_is_missing()
        self._has_begun = True

    def _look(self) -> None:
        self._step, self._executions = self._wrapper.updates_so_far(), 0

    def _refuse_missed_round(self) -> None:
        met, due = self._wrapper.meeting.met_until, self._wrapper.last_due_step(self._step)
        if met is not None and due > met:
            raise RuntimeError(
                f"A round of '{self._wrapper.name}' was due after step {due} and did not take "
                f"place: the optimizer's `iterations` moved to {self._step} outside of the batches "
                f"that this callback saw. Received: the last round at step {met}. Train on data "
                "of known length, or with `jit_compile=True`."
            )

    def _steps_at_most(self) -> int:
        micro_steps = self._executions * self._steps_per_execution
        accumulated = nesting.innermost(self._wrapper).gradient_accumulation_steps or 1
        return self._step + -(-micro_steps // accumulated)

    def _others(self, model: Any) -> list[Any]:
        if not self.average_non_trainable:
            return []
        frozen = {id(v) for v in _keras_internals.weights_made_to_train(model)}
        frozen |= {id(v) for layer in frozen_batch_norms(model) for v in layer.variables}
        return [v for v in _floats(model.non_trainable_variables) if id(v) not in frozen]


def _floats(variables: list[Any]) -> list[Any]:
    return [v for v in variables if keras.backend.is_float_dtype(v.dtype)]


def keep_company(model: Any) -> None:
    """If the current `fit` has a `SynchronizeWorkers`, let it join the last rounds now."""
    for wrapper in finding.averaging_optimizers(model):
        if isinstance(wrapper, ModelAverage) and wrapper.meeting.is_in_fit():
            wrapper.meeting.keep_company()


def _model_average(model: Any) -> ModelAverage:
    found = [w for w in finding.averaging_optimizers(model) if isinstance(w, ModelAverage)]
    if len(found) != 1:
        raise ValueError(
            "SynchronizeWorkers needs a model compiled with one keras_avg.ModelAverage, around all "
            f"other optimizers. Received: {len(found)} in optimizer={model.optimizer!r}."
        )
    return found[0]


def _check_rounds_end_executions(wrapper: ModelAverage, model: Any) -> None:
    steps = model.steps_per_execution
    if steps > 1 and isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer):
        raise ValueError(
            "Workers meet between executions, and loss scaling skips updates, on each worker "
            "others, so that rounds would fall into the middle of executions. Received: "
            f"steps_per_execution={steps} and optimizer={model.optimizer!r}. Compile with "
            "`steps_per_execution=1`, or train in float32 or mixed_bfloat16."
        )
    if steps > 1 and (wrapper.start_step or wrapper.interval_steps % steps):
        raise ValueError(
            "Workers meet between executions, so `interval_steps` must be a multiple of "
            f"`steps_per_execution`, and `start_step` 0. Received: interval_steps="
            f"{wrapper.interval_steps}, start_step={wrapper.start_step}, "
            f"steps_per_execution={steps}."
        )
