"""The base of all rules: when an averaging is due, and with which weight."""

from typing import Any

import keras
from keras import ops

from keras_avg import _backend, _checks, _keras_internals
from keras_avg._wrapping import arguments
from keras_avg._wrapping.shows_averages import ShowsAverages


@keras.saving.register_keras_serializable(package="keras_avg")
class AveragedOptimizerWrapper(ShowsAverages):
    """Base of the optimizers that average a model's variables while another optimizer trains them.

    After the inner optimizer has taken step `i` (the first is 0), the wrapper asks its rule whether
    an averaging is due, and with which weight the variable enters its average:

        if is_due(i):  average <- average + value_weight(i) * (variable - average)

    Only real updates count: gradient accumulation micro-steps, and updates that loss scaling skips,
    neither average nor advance `i`. Training itself is bit for bit that of the inner optimizer,
    except where the averages flow back into the variables (`Lookahead`, `ModelAverage`). Averages
    of several kinds are nested: `SWA(MovingAverage("adam"))`.

    A new kind of average is a subclass. Most need two methods, `is_due(step)` and
    `value_weight(step)`: scalars from an integer step, through `keras.ops`. They run inside
    compiled code. A subclass may override `average_op` alone; then every step is due.

    Rules that keep more than one average have further hooks, each with a default:

    | hook | says |
    |---|---|
    | `stores()` | what is kept beside each variable, and what it begins with |
    | `before_step()` | what happens before the inner optimizer's step |
    | `accumulate(due, step)` | what an averaging does |
    | `averages()` | what the model holds when it is swapped |
    | `snapshots_so_far` | how many averagings there were, in compiled code too |

    `self.kept["name"]` is a store: it moves by `lerp_if` and `assign_if`. Other state a subclass
    adds in `build`, as Keras' optimizers do, by `add_variable` or `add_weight`.

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
        exclude: List of regular expressions, searched in the variables' paths (a native variable's
            name). A variable that matches has no average: it costs nothing, and holds its raw
            value in both copies. Default None.
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
            members accumulate gradients (wrap the members). When built, if a pattern of `exclude`
            matches no variable, or all variables are excluded.

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

    #: Whether the model's variables are made of what is kept, so that others must not change them.
    owns_variables = False

    #: Whether what is kept on several workers has a mean, whatever their numbers of snapshots are.
    means_over_workers = True

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
        exclude: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        _refuse_without_rule(type(self))
        sequential_update = _checks.truth("sequential_update", sequential_update)
        skip_nonfinite = _checks.truth("skip_nonfinite", skip_nonfinite)
        super().__init__(
            average_dtype=arguments.average_dtype(average_dtype),
            exclude=arguments.patterns("exclude", exclude),
            optimizer=optimizer,
            name=name,
            gradient_transformers=gradient_transformers,
            gradient_aggregator=gradient_aggregator,
            **kwargs,
        )
        if self.average_flows_back:
            self._refuse_owners_inside()
        self.sequential_update = sequential_update
        self.skip_nonfinite = skip_nonfinite

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

    def stores(self) -> dict[str, str]:
        """What is kept beside each variable: `"average"`, see `average_starts_at_variable`."""
        return {"average": "variable" if self.average_starts_at_variable else "zeros"}

    def before_step(self) -> None:
        """What to do before the inner optimizer takes a step. Default: nothing.

        What begins with the variables has begun by then. Runs inside compiled code.
        """
        return  # TensorFlow warns that it cannot transform a function that is a docstring only

    def accumulate(self, due: Any, step: Any) -> None:
        """What an averaging does. Default: the average moves towards the variables.

        Called after each step. Nothing may change where `due` does not hold.

        Args:
            due: Bool, or a bool scalar: whether an averaging is due, and all variables are finite
                if that is asked for.
            step: Integer scalar. The update that was taken; the first is 0.
        """
        average = self.kept["average"]
        if type(self).average_op is AveragedOptimizerWrapper.average_op:
            average.lerp_if(due, lambda: self._weight(step))
        else:
            average.assign_if(due, lambda kept, variable: self.average_op(variable, kept))
        if self.average_flows_back:
            average.flow_back_if(due)

    @property
    def must_be_outermost(self) -> bool:
        """Whether no other averaging wrapper may be around this one."""
        return False

    @property
    def snapshots_so_far(self) -> Any:
        """How many averagings have been done: an integer scalar, in compiled code too."""
        return self._snapshots.read()

    def average_op(self, var: Any, average_var: Any) -> Any:
        """The new value of an average, as if an averaging were due now. Assigns nothing.

        Args:
            var: The variable, or a tensor in its place.
            average_var: The average, or a tensor of the same shape.

        Returns:
            A tensor of the shape and dtype of `average_var`.

        Raises:
            ValueError: If the optimizer has not been built, so that there is no current weight.
        """
        self._check_built("average_op")
        _keras_internals.check_attached([*self.variables, var, average_var])
        last = _backend.scalar(lambda: ops.maximum(self._clock.updates() - 1, 0))
        return _backend.lerp([average_var], [var], self._weight(last))[0]

    def get_config(self) -> dict[str, Any]:
        """The arguments to construct the wrapper with again, serializable.

        Returns:
            A dict. The rate is not in it: it is part of the inner optimizer's config.

        Raises:
            ValueError: If a gradient function is not registered with Keras.
        """
        return super().get_config() | {
            "sequential_update": self.sequential_update,
            "skip_nonfinite": self.skip_nonfinite,
        }

    def rule(self) -> str:
        """The arguments that say when and how much is averaged, as text for messages."""
        shared = AveragedOptimizerWrapper.get_config(self)
        own = {name: value for name, value in self.get_config().items() if name not in shared}
        return ", ".join(f"{name}={value!r}" for name, value in own.items())

    def _refuse_owners_inside(self) -> None:
        arguments.refuse_owners_of_variables(self.inner_optimizer, type(self).__name__)

    def _before_inner_step(self) -> None:
        super()._before_inner_step()
        self.before_step()

    def _after_inner_step(self, step: Any, moved: Any) -> None:
        due = _backend.scalar(lambda: _both(moved, self.is_due(step)))
        if self.skip_nonfinite:
            due = self._due_if_finite(due)
        self._updates.advance(moved)  # first: the step is taken, even if a round of workers fails
        self.accumulate(due, step)
        self._count_snapshot_if(due)

    def _count_snapshot_if(self, due: Any) -> None:
        self.count_snapshots(due)

    def _due_if_finite(self, due: Any) -> Any:
        variables = self.averaged_variables
        return _backend.scalar(
            lambda: ops.cond(due, lambda: _backend.all_finite(variables), lambda: _false())
        )

    def _weight(self, step: Any) -> Any:
        return _backend.scalar(lambda: self._weight_or_start(step))

    def _weight_or_start(self, step: Any) -> Any:
        """The rule's weight; 1 while there is no average yet, whatever the rule makes of `step`."""
        weight = self.value_weight(step)
        if self.average_starts_at_variable:
            return weight
        dtype = _backend.widest_float()
        # Not `ops.cast`, which takes a Python float through float32.
        weight = ops.convert_to_tensor(weight, dtype)
        return ops.where(self.snapshots_so_far == 0, ops.ones((), dtype), weight)


def _both(first: Any, second: Any) -> Any:
    # Where one is known to hold, no condition is compiled in.
    if first is True:
        return second
    return first if second is True else ops.logical_and(first, second)


def _false() -> Any:
    return ops.convert_to_tensor(False)


def _refuse_without_rule(kind: type[AveragedOptimizerWrapper]) -> None:
    base = AveragedOptimizerWrapper
    ways = ("value_weight", "average_op", "accumulate")
    if all(getattr(kind, way) is getattr(base, way) for way in ways):
        raise TypeError(
            f"{kind.__name__} does not say how to average, so it cannot be constructed. Use "
            "keras_avg.SWA or keras_avg.MovingAverage, or a subclass that defines `value_weight` "
            "(and `is_due`), `average_op` or `accumulate`."
        )
