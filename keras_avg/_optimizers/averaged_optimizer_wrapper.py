"""The base class of all rules. A rule says when an averaging is due, and with which weight."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import keras
from keras import ops

from keras_avg import _backend, _checks, _keras_internals
from keras_avg._types import (
    Config,
    DType,
    GradientFunction,
    InnerKeywords,
    OptimizerLike,
    Tensor,
    Variable,
)
from keras_avg._wrapping import arguments
from keras_avg._wrapping.shows_averages import ShowsAverages

if TYPE_CHECKING:
    from typing_extensions import Unpack


@keras.saving.register_keras_serializable(package="keras_avg")
class AveragedOptimizerWrapper(ShowsAverages):
    """Base of the optimizers that average a model's variables while another optimizer trains them.

    After the inner optimizer has taken step `i` (the first step is 0), the wrapper asks its rule
    two things: whether an averaging is due, and with which weight the variable enters its average.

        if is_due(i):  average <- average + value_weight(i) * (variable - average)

    Only real updates count. Micro-steps of gradient accumulation, and updates that loss scaling
    skips, do not average and do not advance `i`. The inner optimizer trains exactly as it would
    alone, bit for bit. Only the wrappers that change the variables change training: `Lookahead`,
    `ModelAverage`, `ScheduleFree` and `PrimalAverage`. To keep averages of several kinds, nest the
    wrappers: `SWA(MovingAverage("adam"))`.

    To write a new kind of average, subclass this class. Most rules need two methods, `is_due(step)`
    and `value_weight(step)`. Both take an integer step and return a scalar. They run inside
    compiled code, so they use `keras.ops`. A subclass may override `average_op` alone. Then an
    averaging is due after every step.

    A rule that keeps more than one average can override further hooks. Each has a default:

    | hook | what it says |
    |---|---|
    | `stores()` | which tensors the rule keeps beside each variable, and their first values |
    | `before_step()` | what happens before the inner optimizer's step |
    | `accumulate(due, step)` | what an averaging does |
    | `averages()` | which values the model holds while it is swapped |
    | `snapshots_so_far` | how many averagings there were, in compiled code too |

    `self.kept["name"]` is a store. Change its values with `lerp_if` and `assign_if`. If `stores()`
    gives a name an integer, `self.rings["name"]` is a ring of so many values. For any other state,
    call `add_variable` or `add_weight` in `build`, as Keras' optimizers do.

    Args:
        optimizer: The optimizer that takes the steps: a Keras optimizer, its name, or its config.
        sequential_update: Bool. It changes nothing, and is here for compatibility with TensorFlow
            Addons: the averages always read the variables after the step. Default True.
        name: String. Scope of the variables' names.
        average_dtype: Dtype of the averages. With the default, None, it is float32 for float16,
            bfloat16 and float8 variables, because an average in these dtypes stops moving. For all
            other variables it is the variable's own dtype.
        skip_nonfinite: Bool. If True, no averaging takes place while any element of any variable
            is NaN or infinite. Default False, because the check reads all variables.
        gradient_transformers: List of functions. Each takes a list of `(gradient, variable)` pairs
            and returns a list of such pairs. They are called in order, before clipping. They see
            unscaled gradients. With gradient accumulation they see those of each micro-step.
        gradient_aggregator: A function like a gradient transformer. It is called before all of
            them. Default None: the backend aggregates the gradients.
        exclude: List of regular expressions, searched in the variables' paths (for a native
            variable, in its name). A variable that matches has no average. It needs no memory, and
            the averaged copy of the model holds its raw value. Default None.
        **kwargs: `clipnorm`, `clipvalue` or `global_clipnorm`: clip the gradients before the inner
            optimizer sees them. `learning_rate` (or `lr`): sets the inner optimizer's learning
            rate; if it is a variable, its current value is taken. `decay`: replaces that rate by
            `InverseTimeDecay(learning_rate, 1, decay)`. A wrapper whose rule has a decay of its own
            does not take `decay`.

    All arguments are read-only once the optimizer is built, because compiled training contains
    their values. The learning rate can still be set.

    Raises:
        TypeError: If `optimizer` is None, `sequential_update` is not a bool, or this base class
            itself is constructed.
        AttributeError: If an argument's attribute is set after the optimizer was built.
        ValueError: If an argument is out of range, unknown, or belongs to the inner optimizer. If
            `optimizer` is a `LossScaleOptimizer` (wrap the other way). If it is a `MultiOptimizer`
            whose members accumulate gradients (wrap the members). When the wrapper is built: if a
            pattern of `exclude` matches no variable, or if all variables are excluded.

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

    #: Whether the averages start at the values that the variables have before the first update. If
    #: not, the first averaging has the weight 1, and the rule's weight is not used for it.
    average_starts_at_variable = True

    #: Whether the variables take their averages' values after an averaging.
    average_flows_back = False

    #: Whether the wrapper computes the model's variables from its stores at each step. Then no
    #: other wrapper may change the variables, because the next step would undo the change.
    owns_variables = False

    #: Whether a mean of the stores over several workers is meaningful even where the workers have
    #: taken different numbers of snapshots.
    means_over_workers = True

    def __init__(
        self,
        optimizer: OptimizerLike,
        sequential_update: bool = True,
        name: str | None = "AverageOptimizer",
        *,
        average_dtype: DType | None = None,
        skip_nonfinite: bool = False,
        gradient_transformers: Sequence[GradientFunction] | None = None,
        gradient_aggregator: GradientFunction | None = None,
        exclude: Sequence[str] | None = None,
        **kwargs: "Unpack[InnerKeywords]",
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

    def is_due(self, step: Tensor) -> bool | Tensor:
        """Whether an averaging follows update `step` (integer scalar, first is 0). Default: always.

        It runs inside compiled code. Use `keras.ops` and operators, and no Python `if` on `step`.
        """
        return True

    def value_weight(self, step: Tensor) -> float | Tensor:
        """The weight, in [0, 1], with which the variables enter their averages after update `step`.

        Return a Python float if the weight is constant. It is then cast only once, to the
        averages' dtype. Otherwise return a scalar tensor.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define `value_weight`.")

    def stores(self) -> Mapping[str, str | int]:
        """Name and first value of each tensor that the rule keeps beside a variable.

        The default is one store, `"average"`. `average_starts_at_variable` says how it begins.
        """
        return {"average": "variable" if self.average_starts_at_variable else "zeros"}

    def before_step(self) -> None:
        """What to do before the inner optimizer takes a step. Default: nothing.

        The stores that begin with the variables' values hold them by then. It runs inside compiled
        code.
        """
        return  # TensorFlow warns that it cannot transform a function that is a docstring only

    def accumulate(self, due: bool | Tensor, step: Tensor) -> None:
        """What an averaging does. Default: the average moves towards the variables.

        It is called after each step, except where Python knows that nothing is due. It must change
        nothing if `due` is false.

        Args:
            due: Bool, or a bool scalar tensor. Whether an averaging is due. With `skip_nonfinite`
                it is true only if all variables are also finite.
            step: Integer scalar. The update that was just taken. The first is 0.
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
    def snapshots_so_far(self) -> Tensor:
        """The number of averagings so far. It is an integer scalar, in compiled code too."""
        return self._snapshots.read()

    def average_op(self, var: Variable | Tensor, average_var: Variable | Tensor) -> Tensor:
        """The new value of an average if an averaging took place now. It assigns nothing.

        Args:
            var: The variable, or a tensor of its shape.
            average_var: The average, or a tensor of its shape.

        Returns:
            A tensor of the shape and dtype of `average_var`.

        Raises:
            ValueError: If the optimizer has not been built, because then there is no weight yet.
        """
        self._check_built("average_op")
        _keras_internals.check_attached([*self.variables, var, average_var])
        last = _backend.scalar(lambda: ops.maximum(self._clock.updates() - 1, 0))
        return _backend.lerp([average_var], [var], self._weight(last))[0]

    def get_config(self) -> Config:
        """The arguments that construct an equal wrapper, in serializable form.

        Returns:
            A dict. The learning rate is not in it, because it is in the inner optimizer's config.

        Raises:
            ValueError: If a gradient function is not registered with Keras.
        """
        return super().get_config() | {
            "sequential_update": self.sequential_update,
            "skip_nonfinite": self.skip_nonfinite,
        }

    def rule(self) -> str:
        """The arguments that decide when and with which weight is averaged, as text for errors."""
        shared = AveragedOptimizerWrapper.get_config(self)
        own = {name: value for name, value in self.get_config().items() if name not in shared}
        return ", ".join(f"{name}={_as_text(value)}" for name, value in own.items())

    def _refuse_owners_inside(self) -> None:
        arguments.refuse_owners_of_variables(self.inner_optimizer, type(self).__name__)

    def _before_inner_step(self) -> None:
        super()._before_inner_step()
        self.before_step()

    def _after_inner_step(self, step: Any, moved: Any) -> None:
        due = _backend.scalar(lambda: _both(moved, self.is_due(step)))
        if self.skip_nonfinite:
            due = self._due_if_finite(due)
        # Must come first: the step has been taken, even if a round of the workers fails below.
        self._updates.advance(moved)
        # On torch, Python knows it here. Then a step is equally cheap for every rule.
        if due is False:
            return
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
        """The rule's weight, or 1 while there is no average yet."""
        weight = self.value_weight(step)
        if self.average_starts_at_variable:
            return weight
        dtype = _backend.widest_float()
        # Not `ops.cast`: it rounds a Python float to float32 first.
        weight = ops.convert_to_tensor(weight, dtype)
        return ops.where(self.snapshots_so_far == 0, ops.ones((), dtype), weight)


def _as_text(value: Any) -> str:
    """A value of a config as text. An object is written as the call that constructs it."""
    if not (isinstance(value, dict) and "class_name" in value):
        return repr(value)
    config = (value.get("config") or {}).items()
    return f"{value['class_name']}({', '.join(f'{k}={_as_text(v)}' for k, v in config)})"


def _both(first: Any, second: Any) -> Any:
    # If one of them is known to be true, no condition is compiled in.
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
