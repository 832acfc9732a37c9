"""Periodic averaging of the models of several workers."""

import zlib
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_avg import _backend, _checks, _keras_internals
from keras_avg._keras2.classic_steps import variables_in
from keras_avg._optimizers.averaged_optimizer_wrapper import AveragedOptimizerWrapper
from keras_avg._workers import arguments
from keras_avg._workers.inner_state import InnerState
from keras_avg._workers.meeting import Meeting
from keras_avg._workers.rounds import Rounds
from keras_avg._wrapping import nesting


@keras.saving.register_keras_serializable(package="keras_avg")
class ModelAverage(AveragedOptimizerWrapper):
    """Local steps on each worker, and every `interval_steps` of them the mean over all workers.

    A worker is a process with its own copy of the model and its own shard of the data. With step
    `t` counted from 1, a round takes place after update `t` when `t <= start_step` or
    `(t - start_step) % interval_steps == 0`:

        center   <- mean of the variables over all workers
        variables <- center

    The center is the average here: the initial values before the first round, those of the chief.
    With an `outer_optimizer` the center takes a step of that along the pseudo-gradient
    `center - mean` instead: `SGD(0.7, momentum=0.9, nesterov=True)` gives DiLoCo,
    `SGD(block_lr, momentum)` gives BMUF.

    In one process this has names of its own. With an outer SGD that has momentum it is SNOO, and
    with Muon inside it is MuLoCo with one worker; without momentum it is `Lookahead`:

    ```python
    outer = keras.optimizers.SGD(0.7, momentum=0.9, nesterov=True)
    snoo = keras_avg.ModelAverage("adamw", interval_steps=20, outer_optimizer=outer)
    muloco = keras_avg.ModelAverage(keras.optimizers.Muon(0.02), outer_optimizer="sgd")
    ```

    Averages of the center are wrappers around it, `SWA(ModelAverage(...))`, where there is one
    worker. With several, an average around it would be each worker's own: that is refused when
    training begins. Nest the other way, `ModelAverage(SWA(...))`.

    In `fit` rounds take place between batches, in `keras_avg.callbacks.SynchronizeWorkers`, on
    every backend; in a loop of your own that runs eagerly, in `apply`: call `build` and
    `start_together` before it, so that the first gradients are those of the chief's variables.
    (`minimize` and `get_updates` do so by themselves, if the variables are known before the loss is
    computed; in `fit` without the callback, the first gradients are of each worker's own start.)
    One worker alone needs no callback. `Lookahead` is the same machine with one worker and a step
    size.

    Shards may differ in size. Each worker counts its own steps, so then all resume from one file,
    such as the chief's: workers that begin at different steps are refused.

    Args:
        optimizer: The optimizer that takes the local steps: a Keras optimizer, its name, or its
            config. Averages that wrappers in it keep (`ModelAverage(MovingAverage("adam"))`) are
            averaged over the workers too, at each round, and so are their numbers of snapshots;
            a worker without a snapshot adds nothing.
        num_worker: Integer, or None to take it from the communicator. Checked against it.
        is_chief: Bool, or None to take it from the communicator. Checked against it.
        interval_steps: Integer in [1, 2**31), in steps, from one round to the next. Default 100.
        name: String. Default `"ModelAverage"`.
        outer_optimizer: The Keras optimizer that moves the center, its name, or its config. Its
            state is part of `variables`. Default None: the center is the mean.
        start_step: Integer in [0, 2**31). Up to this step there is a round after every update, as
            the synchronous beginning of post-local SGD. Default 0.
        inner_state: What becomes of the inner optimizer's float slots, such as momenta, at a round:
            `"keep"` leaves each worker its own, `"average"` takes their mean over the workers,
            `"reset"` gives them their initial values (the variable's, if they begin with that, as
            a momentum of ScheduleFreeAdamW). Default `"keep"`.
        communicator: A `keras_avg.distributed.Communicator`. Default None: that of
            `keras_avg.distributed.initialize()`. Not part of the config.
        sequential_update: Bool. See `AveragedOptimizerWrapper`, as for the arguments below.
        average_dtype: Dtype of the center.
        skip_nonfinite: Bool. If True, a worker with NaN or infinite weights adds nothing to a mean.
        gradient_transformers: List of functions of a list of `(gradient, variable)` pairs.
        gradient_aggregator: One such function, applied first.
        exclude: List of regular expressions. Variables whose paths match have no average.
        **kwargs: `clipnorm`, `clipvalue`, `global_clipnorm`, `learning_rate`, `lr`, `decay`.

    Raises:
        TypeError: If `optimizer` is None.
        ValueError: If an argument is out of range, `num_worker` or `is_chief` is not what the
            communicator says, or as for `AveragedOptimizerWrapper`. When built, if the outer
            optimizer was built for another model. When training begins, if the workers differ in
            model, interval or step.
        RuntimeError: In training, if another worker is gone or stalled for longer than the timeout;
            the local weights stay valid. If training was compiled without `SynchronizeWorkers`.

    Example:

    ```python
    keras_avg.distributed.initialize()  # first of all: under torchrun, for instance
    optimizer = keras_avg.ModelAverage("adam", interval_steps=100)
    model.compile(optimizer=optimizer, loss="mse")
    model.fit(my_shard, epochs=10, callbacks=[keras_avg.callbacks.SynchronizeWorkers()])
    ```

    Reference:
        `tf.contrib.opt.ModelAverageOptimizer` of TensorFlow 1. Lin et al., Don't Use Large
        Mini-Batches, Use Local SGD, https://arxiv.org/abs/1808.07217 (post-local SGD). Chen and
        Huo, Scalable Training of Deep Learning Machines by Incremental Block Training (BMUF),
        https://doi.org/10.1109/ICASSP.2016.7472805, equations 1-4. Douillard et al., DiLoCo,
        https://arxiv.org/abs/2311.08105, Algorithm 1. Kallusky et al., SNOO,
        https://arxiv.org/abs/2510.15830. Thérien et al., MuLoCo, https://arxiv.org/abs/2505.23725.
    """

    average_flows_back = True

    def __init__(
        self,
        optimizer: Any,
        num_worker: int | None = None,
        is_chief: bool | None = None,
        interval_steps: int = 100,
        name: str | None = "ModelAverage",
        *,
        outer_optimizer: Any = None,
        start_step: int = 0,
        inner_state: str = "keep",
        communicator: Any = None,
        sequential_update: bool = True,
        **kwargs: Any,
    ) -> None:
        interval = _checks.whole_number("interval_steps", interval_steps, minimum=1)
        start = _checks.whole_number("start_step", start_step, minimum=0)
        inner_state = arguments.inner_state(inner_state)
        outer = arguments.outer_optimizer(outer_optimizer)
        communicator = arguments.communicator(communicator, num_worker, is_chief)
        super().__init__(optimizer, sequential_update, name, **kwargs)
        if outer is not None:
            super()._refuse_owners_inside()
        arguments.names_apart(outer, [self, *nesting.workers_inside(self)])
        self.interval_steps = interval
        self.start_step = start
        self.inner_state = inner_state
        self.outer_optimizer = outer
        self.communicator = communicator
        self._inner = InnerState(self, inner_state)
        alike = {"inner_state": inner_state, "outer_optimizer": type(outer).__name__}
        self.meeting = Meeting(
            self,
            communicator,
            Rounds(interval, start),
            self._inner,
            {f"{name} (checksum)": zlib.crc32(text.encode()) for name, text in alike.items()},
        )

    # The original counts local steps from 1 and averages after steps k, 2k, 3k, ...:
    #     local_step += 1;  if local_step % interval_steps == 0: average
    # Its local_step is i + 1 here. Post-local SGD begins with s steps of interval 1:
    #     due  iff  t <= s  or  (t - s) % interval_steps == 0.

    def is_due(self, step: Any) -> Any:
        since = step + 1 - self.start_step
        return (since <= 0) | (since % self.interval_steps == 0)

    # The center is the mean of the workers, so with one worker, or the mean in the variables'
    # place, the value has all the weight. An outer optimizer takes the place of this formula: from
    # BMUF's  G <- eta * G + zeta * (mean - center);  center <- center + G  one reads off that it
    # is SGD with momentum eta and rate zeta on the gradient  center - mean.

    def value_weight(self, step: Any) -> Any:
        return 1.0

    def last_due_step(self, step: int) -> int:
        """The last of the steps 1, 2, ... `step` after which a round takes place; 0 if none."""
        return self.meeting.rounds.last_due(step)

    def next_due_step(self, step: int) -> int:
        """The first step after `step` (the first of all is 1) after which there is a round."""
        return self.meeting.rounds.next_due(step)

    def start_together(self, others: Sequence[Any] = ()) -> None:
        """Once, before the first step: compare the workers, and take the chief's variables.

        Args:
            others: List of variables (non-trainable ones) to take from the chief too.

        Raises:
            ValueError: If the optimizer has not been built; or if the workers differ in model,
                interval or step, on every worker.
        """
        self.meeting.start_together(others)

    def no_round_is_missing(self) -> None:
        """Called when `fit` begins, or a state was loaded in it: rounds count from here."""
        self.meeting.no_round_is_missing()

    def meet(self, others: Sequence[Any] = (), is_training: bool = True) -> bool:
        """One round with all workers: mean, center, variables.

        Args:
            others: List of float variables that take the mean over the workers too.
            is_training: Bool. False for a worker that has run out of data, and only keeps the
                others company: its values have no weight.

        Returns:
            Whether any worker was still training.

        Raises:
            ValueError: If the optimizer has not been built.
        """
        return self.meeting.meet(others, is_training)

    @property
    def must_be_outermost(self) -> bool:
        """Whether no other averaging wrapper may be around: where there are several workers."""
        return self.meeting.is_of_several

    @property
    def variables(self) -> list[Any]:
        """Own variables, the inner optimizer's, then the outer optimizer's."""
        outer = self.outer_optimizer
        return super().variables + (list(outer.variables) if outer else [])

    def build(self, variables: list[Any]) -> None:
        """Make the center, and build the inner and the outer optimizer."""
        if _keras_internals.built_variables(self):
            return
        arguments.refuse_built_outer_optimizer(self.outer_optimizer, type(self).__name__)
        super().build(variables)
        centers = self.kept["average"].kept
        if not centers:  # built for none, it could not be built for those that come later
            return
        if self.outer_optimizer:
            self.outer_optimizer.build(centers)
        if self.inner_state == "reset":
            self._inner.note_initial_values()

    def accumulate(self, due: Any, step: Any) -> None:
        """A round with the other workers, or by itself if there are none."""
        if self.meeting.is_of_several:
            if _backend.concrete(due) and not self.meeting.is_between_batches():
                self.meeting.meet()
        elif self.outer_optimizer is None and self.inner_state != "reset":
            super().accumulate(due, step)
        else:
            variables = self.averaged_variables
            changed = [*self.kept["average"].kept, *variables, *self.variables]
            _backend.run_if(due, lambda: self.finish_round(variables, 1.0), changed)

    def finish_round(self, sums: list[Any], total: float) -> None:
        """Move the center towards the means, which are sums / total; the variables go to it."""
        centers, variables = self.kept["average"].kept, self.averaged_variables
        if self.outer_optimizer:
            pairs = zip(centers, sums, strict=True)
            gradients = [center - ops.cast(s, center.dtype) / total for center, s in pairs]
            self.outer_optimizer.apply(gradients, centers)
            _backend.assign_quotients(centers, 1.0, variables)
        else:
            _backend.assign_quotients(sums, total, centers, variables)
        self._inner.reset()

    def has_trained(self) -> bool:
        """Whether there was an update since the wrapper was made."""
        return int(self._updates.read()) > 0

    def finalize_variable_values(self, var_list: list[Any]) -> None:
        """Called by `fit` when training ends.

        Raises:
            RuntimeError: If a round was missed, in code compiled for `SynchronizeWorkers`.
        """
        super().finalize_variable_values(var_list)
        if not any(map(_keras_internals.is_purged, var_list)):
            self.meeting.refuse_missed_round()

    def get_config(self) -> dict[str, Any]:
        outer = self.outer_optimizer
        return super().get_config() | {
            "interval_steps": self.interval_steps,
            "outer_optimizer": outer and _keras_internals.serialize(outer),
            "start_step": self.start_step,
            "inner_state": self.inner_state,
        }

    def _take_step(self, grads: list[Any], variables: list[Any] | None, aggregate: bool) -> None:
        meeting = self.meeting
        if grads and meeting.is_of_several:
            # Asked before `build`: TensorFlow would leave variables of a trace that is refused.
            compiled = self._is_being_compiled()
            if (compiled or meeting.met_until is None) and not meeting.is_between_batches():
                if compiled:
                    raise meeting.forgotten("the train step is compiled")
                variables = self._variables_for(grads, variables)
                meeting.start_together()
        super()._take_step(grads, variables, aggregate)

    def _before_first_gradients(self, var_list: Any) -> None:
        if not self.meeting.is_of_several or self._is_being_compiled():
            return
        if not callable(var_list):
            self.build(variables_in(var_list))
        if _keras_internals.built_variables(self):
            self.meeting.start_together()

    def _is_being_compiled(self) -> bool:
        variable = _keras_internals.step_counter(self)
        _keras_internals.check_attached([variable])
        if self.built:
            return self._clock.is_being_compiled()
        return _backend.concrete(_backend.Counter(variable).read()) is None

    def _after_state_was_set(self) -> None:
        super()._after_state_was_set()
        self.meeting.forget()

    def _due_if_finite(self, due: Any) -> Any:
        # Over workers a round is due for all or none: see `Meeting`.
        return due if self.meeting.is_of_several else super()._due_if_finite(due)

    def _refuse_owners_inside(self) -> None:
        """The mean over workers may flow back: all that is kept takes it, too."""

    def _count_snapshot_if(self, due: Any) -> None:
        if not self.meeting.is_of_several:  # else the meeting counts
            super()._count_snapshot_if(due)

    def _parts_on_file(self) -> dict[str, Any]:
        return super()._parts_on_file() | {"outer_optimizer": self.outer_optimizer}
