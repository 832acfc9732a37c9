"""All the machinery of averaging: build, step, clock, averages. The rules are in the wrappers."""

from typing import Any

import keras
from keras import ops

from keras_avg import _backend, _keras_internals
from keras_avg._optimizers import arguments, bindings, gradients, keywords, rates
from keras_avg._optimizers.added_variables import AddsVariables
from keras_avg._optimizers.configuration import HasConfig
from keras_avg._optimizers.files import StoredInFiles
from keras_avg._optimizers.forwarding import ForwardsToInnerOptimizer
from keras_avg._optimizers.minimizing import Minimizes
from keras_avg._optimizers.raw_values import RawValues
from keras_avg._optimizers.storage import StoresOwnVariables, check_attached
from keras_avg._optimizers.swapping import SwapsWeights, supersede


@keras.saving.register_keras_serializable(package="keras_avg")
class AveragedOptimizerWrapper(
    ForwardsToInnerOptimizer,
    SwapsWeights,
    StoresOwnVariables,
    StoredInFiles,
    AddsVariables,
    Minimizes,
    HasConfig,
    keras.optimizers.Optimizer,
):
    """Base of the optimizers that average a model's variables while another optimizer trains them.

    After the inner optimizer has taken step `i` (the first is 0), the wrapper asks its rule whether
    an averaging is due, and with which weight the variable enters its average:

        if is_due(i):  average <- average + value_weight(i) * (variable - average)

    Only real updates count: gradient accumulation micro-steps, and updates that loss scaling skips,
    neither average nor advance `i`. Training itself is bit for bit that of the inner optimizer,
    except where the averages flow back into the variables (`Lookahead`, `ModelAverage`). Averages
    of several kinds are nested: `SWA(MovingAverage("adam"))`.

    A new kind of average is a subclass with two methods, `is_due(step)` and `value_weight(step)`:
    scalars from an integer step, through `keras.ops`; they run inside compiled code. A subclass may
    override `average_op` alone; then every step is due. State of its own it adds in `build`, as
    Keras' optimizers do, by `add_variable` or `add_weight`.

    Args:
        optimizer: The optimizer that takes the steps: a Keras optimizer, its name, or its config.
        sequential_update: Bool. Kept for compatibility with TensorFlow Addons: the averages read
            the variables after the step with either value. Default True.
        name: String. Scope of the variables' names.
        average_dtype: Dtype of the averages. Default None: float32 for float16, bfloat16 and float8
            variables (an average of such dtype stops moving), the variable's own for all others.
        skip_nonfinite: Bool. If True an averaging does not take place while any element of any
            variable is NaN or infinite. Default False, because looking costs a read.
        gradient_transformers: List of functions of a list of `(gradient, variable)` pairs that
            return such a list, applied in order before clipping. They see unscaled gradients; with
            gradient accumulation, those of each micro-step.
        gradient_aggregator: One such function, applied first. Default None: the backend aggregates.
        **kwargs: `clipnorm`, `clipvalue` or `global_clipnorm`: clip the gradients before the inner
            optimizer sees them. `learning_rate` (or `lr`): set the inner optimizer's; of a variable
            the value is taken. `decay`: make that `InverseTimeDecay(learning_rate, 1, decay)`; a
            wrapper whose rule has a decay of its own does not take it.

    All arguments are read-only once the optimizer is built, because compiled training has taken
    them in. The learning rate stays settable.

    Raises:
        TypeError: If `optimizer` is None, `sequential_update` is not a bool, or this base class
            itself is constructed.
        AttributeError: If an argument's attribute is set after the optimizer was built.
        ValueError: If an argument is out of range, unknown, or the inner optimizer's; if
            `optimizer` is a `LossScaleOptimizer` (wrap the other way), or a `MultiOptimizer` whose
            members accumulate gradients (wrap the members).

    Example:

    ```python
    @keras.saving.register_keras_serializable(package="my_package")
    class EveryOther(keras_avg.AveragedOptimizerWrapper):
        def is_due(self, step):
            return step % 2 == 0

        def value_weight(self, step):
            return 0.1

    model.compile(optimizer=EveryOther("adam"), loss="mse")
    ```

    Reference:
        `tfa.optimizers.AveragedOptimizerWrapper` of TensorFlow Addons.
    """

    #: Whether the averages start at the values the variables have before the first update. If not,
    #: the first averaging has the weight 1, whatever the rule says.
    average_starts_at_variable = True

    #: Whether the variables take their averages' values after an averaging.
    average_flows_back = False

    #: Whether no other averaging wrapper may be around this one.
    must_be_outermost = False

    def __init__(
        self,
        optimizer: Any,
        sequential_update: bool = True,
        name: str | None = "AverageOptimizer",
        *,
        average_dtype: Any = None,
        skip_nonfinite: bool = False,
        gradient_transformers: list | None = None,
        gradient_aggregator: Any = None,
        **kwargs: Any,
    ) -> None:
        kind = type(self).__name__
        _refuse_without_rule(type(self))
        clipping, rate = keywords.split(type(self), kwargs)
        inner = arguments.inner_optimizer(optimizer, kind)
        sequential_update = arguments.truth("sequential_update", sequential_update)
        average_dtype = arguments.average_dtype(average_dtype)
        skip_nonfinite = arguments.truth("skip_nonfinite", skip_nonfinite)
        aggregator, transformers = arguments.gradient_functions(
            gradient_aggregator, gradient_transformers
        )
        # A callable rate, so that Keras makes no variable for a rate that is the inner optimizer's.
        super().__init__(
            learning_rate=lambda: self.inner_optimizer.learning_rate,
            name=arguments.variable_scope_name(name),
            **clipping,
        )
        rates.set_rate(inner, kind, rate)
        _keras_internals.share_step_counter(self, inner)
        self.inner_optimizer = inner
        self.sequential_update = sequential_update
        self.average_dtype = average_dtype
        self.skip_nonfinite = skip_nonfinite
        self.gradient_aggregator = aggregator
        self.gradient_transformers = transformers
        self._own_variables = {}
        self._raw: RawValues | None = None
        self._averages: list[Any] = []

    def is_due(self, step: Any) -> Any:
        """Whether an averaging follows update `step` (integer scalar, first is 0). Default: always.

        Runs inside compiled code: use `keras.ops` and operators, no Python `if` on `step`.
        """
        return True

    def value_weight(self, step: Any) -> Any:
        """The weight, in [0, 1], with which the variables enter their averages after update `step`.

        Returns a Python float where it is constant (it is then cast once, to the averages' dtype),
        else a scalar tensor.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define `value_weight`.")

    def build(self, variables: list[Any]) -> None:
        """Make the averages, one for each variable, and build the inner optimizer."""
        variables = list(variables)
        if self.built and (not variables or _keras_internals.built_variables(self)):
            return
        kind = type(self).__name__
        if self.inner_optimizer.built:
            arguments.refuse_other_variables(self.inner_optimizer, variables, kind)
        elif variables:  # built for none, it could not be built for those that come later
            with _backend.outside_trace(variables):
                self.inner_optimizer.build(variables)
        arguments.refuse_accumulating_members(self.inner_optimizer, kind)
        self._clock = _backend.Counter(_keras_internals.step_counter(self))
        with _backend.outside_trace():
            self._add_own_variables(variables)
        super().build(variables)
        bindings.note_built(self)
        supersede(self)

    def apply(self, grads: list[Any], trainable_variables: list[Any] | None = None) -> None:
        """Let the inner optimizer take a step, then average if it is time.

        Args:
            grads: List of gradients, as the inner optimizer takes them.
            trainable_variables: List of the variables they belong to. Default None: those that the
                optimizer was built with.

        Raises:
            RuntimeError: If the averages are in the model.
        """
        self._apply(list(grads), trainable_variables, aggregate=True)

    def _apply(self, grads: list[Any], variables: list[Any] | None, aggregate: bool) -> None:
        if not grads:
            return
        check_attached([_keras_internals.step_counter(self)])
        variables = self._variables_for(grads, variables)
        if _backend.concrete(self._swapped.read()) is None:  # in code that is being compiled
            bindings.note_training_model(self)
        self._refuse_while_in_model("training")
        with _backend.after(grads):
            grads = gradients.process(self, grads, variables, aggregate)
            if not aggregate:
                grads = gradients.parts_of_sums(grads, variables)
            before = self._clock.read()
            if self.average_starts_at_variable:
                _backend.start_averages(self._updates.read(), *self._averages_and_variables())
            self.inner_optimizer.apply(grads, variables)
            self._average_after(before)

    def _variables_for(self, grads: list[Any], variables: list[Any] | None) -> list[Any]:
        if variables is not None:
            variables = list(variables)
            if not self.built or not _keras_internals.built_variables(self):
                self.build(variables)
        elif self.built:
            variables = _keras_internals.built_variables(self)
        else:
            raise ValueError(
                "The first `apply` needs the variables too, to build the optimizer. Received: "
                f"{len(grads)} gradients and no variables. Pass `trainable_variables`, or call "
                "`optimizer.build(trainable_variables)` first."
            )
        if len(grads) != len(variables):
            raise ValueError(
                "Gradients and variables belong together one to one. Received: "
                f"{len(grads)} gradients for {len(variables)} variables."
            )
        return variables

    def _average_after(self, before: Any) -> None:
        step, after = self._step(before), self._step(self._clock.read_after_step())
        moved = self._counts_every_step() or step != after
        due = _backend.scalar(lambda: _both(moved, self.is_due(step)))
        if self.skip_nonfinite:
            due = self._due_if_finite(due)
        self._updates.advance(moved)  # first: the step is taken, even if a round of workers fails
        self._average(due, step)

    def _due_if_finite(self, due: Any) -> Any:
        _, variables = self._averages_and_variables()
        return _backend.scalar(
            lambda: ops.cond(due, lambda: _backend.all_finite(variables), lambda: _false())
        )

    def _average(self, due: Any, step: Any) -> None:
        averages, variables = self._averages_and_variables()
        if self._overrides_average_op():
            _backend.assign_if(due, averages, variables, self._average_ops)
        else:
            _backend.lerp_if(due, averages, variables, lambda: self._weight(step))
        if self.average_flows_back:
            _backend.assign_if(due, variables, averages, _copies_of_sources)
        self._snapshots.advance(due)

    def _counts_every_step(self) -> bool:
        inner = self.inner_optimizer
        if isinstance(inner, AveragedOptimizerWrapper):
            leaves_apply = type(inner).apply is AveragedOptimizerWrapper.apply
            return leaves_apply and inner._counts_every_step()
        return _keras_internals.counts_every_step(inner)

    def _overrides_average_op(self) -> bool:
        return type(self).average_op is not AveragedOptimizerWrapper.average_op

    def _average_ops(self, averages: Any, variables: Any) -> list[Any]:
        return [self.average_op(v, a) for a, v in zip(averages, variables, strict=True)]


def _copies_of_sources(targets: Any, sources: Any) -> list[Any]:
    return [_backend.copy(source) for source in sources]


def _both(first: Any, second: Any) -> Any:
    # Where one is known to hold, no condition is compiled in.
    if first is True:
        return second
    return first if second is True else ops.logical_and(first, second)


def _false() -> Any:
    return ops.convert_to_tensor(False)


def _refuse_without_rule(kind: type[AveragedOptimizerWrapper]) -> None:
    base = AveragedOptimizerWrapper
    if kind.value_weight is base.value_weight and kind.average_op is base.average_op:
        raise TypeError(
            f"{kind.__name__} does not say how to average, so it cannot be constructed. Use "
            "keras_avg.SWA or keras_avg.MovingAverage, or a subclass that defines `value_weight` "
            "(and `is_due`) or `average_op`."
        )
