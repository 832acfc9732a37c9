"""The models of several workers are averaged at regular steps."""

import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import keras
from keras import ops

from keras_avg import _backend, _checks, _keras_internals
from keras_avg._keras2.classic_steps import variables_in
from keras_avg._optimizers.averaged_optimizer_wrapper import AveragedOptimizerWrapper
from keras_avg._types import AverageKeywords, Config, OptimizerLike, Tensor, Variable
from keras_avg._workers import arguments
from keras_avg._workers.inner_state import InnerState
from keras_avg._workers.meeting import Meeting
from keras_avg._workers.rounds import Rounds
from keras_avg._wrapping import nesting
from keras_avg.distributed import Communicator

if TYPE_CHECKING:
    from typing_extensions import Unpack


@keras.saving.register_keras_serializable(package="keras_avg")
class ModelAverage(AveragedOptimizerWrapper):
    """Each worker takes local steps. Every `interval_steps` steps, the workers take their mean.

    A worker is a process with its own copy of the model and its own shard of the data. With step
    `t` counted from 1, a round takes place after update `t` when `t <= start_step` or
    `(t - start_step) % interval_steps == 0`:

        center   <- mean of the variables over all workers
        variables <- center

    The center is what other wrappers call the average. Before the first round it holds the initial
    values of the chief's variables. With an `outer_optimizer`, the center is not replaced by the
    mean. Instead the outer optimizer moves it by one step, with `center - mean` in place of a
    gradient: `SGD(0.7, momentum=0.9, nesterov=True)` gives DiLoCo, and `SGD(block_lr, momentum)`
    gives BMUF.

    Some methods for one process are this class with one worker. With an outer SGD that has momentum
    it is SNOO. With Muon as the inner optimizer it is MuLoCo with one worker. With an outer SGD
    without momentum it is `Lookahead`.

    ```python
    outer = keras.optimizers.SGD(0.7, momentum=0.9, nesterov=True)
    snoo = keras_avg.ModelAverage("adamw", interval_steps=20, outer_optimizer=outer)
    muloco = keras_avg.ModelAverage(keras.optimizers.Muon(0.02), outer_optimizer="sgd")
    ```

    With one worker, another wrapper may average the center: `SWA(ModelAverage(...))`. With several
    workers, each worker would have its own such average, so this is refused when training begins.
    Nest the other way: `ModelAverage(SWA(...))`.

    In `fit`, the callback `keras_avg.callbacks.SynchronizeWorkers` runs the rounds between batches,
    on every backend. One worker alone needs no callback. In an eager loop of your own, `apply` runs
    the rounds. Call `build` and `start_together` before this loop. Then all workers compute their
    first gradients at the chief's variables. `minimize` and `get_updates` call both by themselves
    if the variables are known before the loss is computed. In `fit` without the callback, each
    worker computes its first gradients at its own initial values.

    Shards may differ in size. Then the workers' step counts differ too, because each worker counts
    its own steps. To resume, let all workers load one file, such as the chief's: workers that begin
    at different steps are refused.

    Args:
        optimizer: The optimizer that takes the local steps: a Keras optimizer, its name, or its
            config. If it contains averaging wrappers (`ModelAverage(MovingAverage("adam"))`), each
            round also takes the mean of their averages and of their numbers of snapshots over the
            workers. A worker without a snapshot adds nothing to it.
        num_worker: Integer, the number of workers. Default None: the communicator says it. An
            error is raised if the communicator says another number.
        is_chief: Bool, whether this worker is the chief. Default None: the communicator says it.
            An error is raised if the communicator says otherwise.
        interval_steps: Integer in [1, 2**31), in steps, from one round to the next. Default 100.
        name: String. Default `"ModelAverage"`.
        outer_optimizer: The Keras optimizer that moves the center, its name, or its config. Its
            state is part of `variables`. Default None: the center is the mean.
        start_step: Integer in [0, 2**31). Up to this step there is a round after every update, as
            in the synchronous beginning of post-local SGD. Default 0.
        inner_state: What a round does with the inner optimizer's float slots, such as momenta.
            `"keep"`: each worker keeps its own. `"average"`: each slot becomes its mean over the
            workers. `"reset"`: each slot gets its initial value. If a slot began with the value of
            its variable (as a momentum of ScheduleFreeAdamW does), it gets the variable's new
            value. Default `"keep"`.
        communicator: A `keras_avg.distributed.Communicator`. Default None: the one that
            `keras_avg.distributed.initialize()` returns. It is not part of the config.
        sequential_update: Bool. `AveragedOptimizerWrapper` describes this argument and those below.
        average_dtype: Dtype of the center.
        skip_nonfinite: Bool. If True, a worker with NaN or infinite weights adds nothing to a mean.
        gradient_transformers: List of functions of a list of `(gradient, variable)` pairs.
        gradient_aggregator: A function like a gradient transformer. It is called before them.
        exclude: List of regular expressions. A variable whose path matches has no average.
        **kwargs: `clipnorm`, `clipvalue`, `global_clipnorm`, `learning_rate`, `lr`, `decay`.

    Raises:
        TypeError: If `optimizer` is None.
        ValueError: If an argument is out of range, `num_worker` or `is_chief` is not what the
            communicator says, or as for `AveragedOptimizerWrapper`. When built, if the outer
            optimizer was built for another model. When training begins, if the workers differ in
            model, interval or step.
        RuntimeError: In training, if another worker has ended, or has not answered for longer than
            the timeout. The local weights stay valid. Also if training was compiled without
            `SynchronizeWorkers`.

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
        optimizer: OptimizerLike,
        num_worker: int | None = None,
        is_chief: bool | None = None,
        interval_steps: int = 100,
        name: str | None = "ModelAverage",
        *,
        outer_optimizer: OptimizerLike | None = None,
        start_step: int = 0,
        inner_state: str = "keep",
        communicator: Communicator | None = None,
        sequential_update: bool = True,
        **kwargs: "Unpack[AverageKeywords]",
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

    def is_due(self, step: Tensor) -> bool | Tensor:
        since = step + 1 - self.start_step
        return (since <= 0) | (since % self.interval_steps == 0)

    # The center is the mean over the workers. So the weight of the value is 1 if the value is that
    # mean, or if there is one worker. An outer optimizer replaces this formula. BMUF writes
    #     G <- eta * G + zeta * (mean - center);  center <- center + G.
    # This is SGD with momentum eta and learning rate zeta, on the gradient  center - mean.

    def value_weight(self, step: Tensor) -> float | Tensor:
        return 1.0

    def last_due_step(self, step: int) -> int:
        """The last of the steps 1, 2, ... `step` after which a round takes place, or 0 if none."""
        return self.meeting.rounds.last_due(step)

    def next_due_step(self, step: int) -> int:
        """The first step later than `step` after which a round takes place. Steps begin at 1."""
        return self.meeting.rounds.next_due(step)

    def start_together(self, others: Sequence[Variable] = ()) -> None:
        """Compare the workers, and take the chief's variables. Does so once, before the first step.

        Args:
            others: List of further variables (non-trainable ones) to take from the chief.

        Raises:
            ValueError: If the optimizer has not been built. If the workers differ in model,
                interval or step; then every worker raises.
        """
        self.meeting.start_together(others)

    def no_round_is_missing(self) -> None:
        """Count rounds from this step on. Called when `fit` begins, or loads a state."""
        self.meeting.no_round_is_missing()

    def meet(self, others: Sequence[Variable] = (), is_training: bool = True) -> bool:
        """One round with all workers: take the mean, move the center, set the variables to it.

        Args:
            others: List of further float variables to replace by their mean over the workers.
            is_training: Bool. False for a worker that has no data left. It joins the rounds only
                because the others wait for it, and its values have weight 0.

        Returns:
            Whether any worker was still training.

        Raises:
            ValueError: If the optimizer has not been built.
        """
        return self.meeting.meet(others, is_training)

    @property
    def must_be_outermost(self) -> bool:
        """Whether no other averaging wrapper may be around this one. True with several workers."""
        return self.meeting.is_of_several

    @property
    def variables(self) -> list[Variable]:
        """The wrapper's own variables, the inner optimizer's, and then the outer optimizer's."""
        outer = self.outer_optimizer
        return super().variables + (list(outer.variables) if outer else [])

    def build(self, variables: list[Variable]) -> None:
        """Make the center, and build the inner and the outer optimizer."""
        if _keras_internals.built_variables(self):
            return
        arguments.refuse_built_outer_optimizer(self.outer_optimizer, type(self).__name__)
        super().build(variables)
        centers = self.kept["average"].kept
        if not centers:  # An optimizer is built once: it could not be built for later variables.
            return
        if self.outer_optimizer:
            self.outer_optimizer.build(centers)
        if self.inner_state == "reset":
            self._inner.note_initial_values()

    def accumulate(self, due: bool | Tensor, step: Tensor) -> None:
        """Take a round with the other workers, or alone if there are none."""
        if self.meeting.is_of_several:
            if _backend.concrete(due) and not self.meeting.is_between_batches():
                self.meeting.meet()
        elif self.outer_optimizer is None and self.inner_state != "reset":
            super().accumulate(due, step)
        else:
            variables = self.averaged_variables
            changed = [*self.kept["average"].kept, *variables, *self.variables]
            _backend.run_if(due, lambda: self.finish_round(variables, 1.0), changed)

    def finish_round(self, sums: list[Tensor], total: float) -> None:
        """Move the center towards the means, `sums / total`. Then set the variables to it."""
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

    def finalize_variable_values(self, var_list: list[Variable]) -> None:
        """Called by `fit` when training ends.

        Raises:
            RuntimeError: If a round was missed, in code compiled for `SynchronizeWorkers`.
        """
        super().finalize_variable_values(var_list)
        if not any(map(_keras_internals.is_purged, var_list)):
            self.meeting.refuse_missed_round()

    def get_config(self) -> Config:
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
            # Must come before `build`. If the trace is refused after `build`, TensorFlow leaves
            # variables behind that belong to the trace.
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
        # All workers must join every round. `Meeting` gives non-finite weights the weight 0.
        return due if self.meeting.is_of_several else super()._due_if_finite(due)

    def _refuse_owners_inside(self) -> None:
        """Do not refuse them: a round also averages the stores of the wrappers inside."""

    def _count_snapshot_if(self, due: Any) -> None:
        if not self.meeting.is_of_several:  # With several workers, the meeting counts.
            super()._count_snapshot_if(due)

    def _parts_on_file(self) -> dict[str, Any]:
        return super()._parts_on_file() | {"outer_optimizer": self.outer_optimizer}
