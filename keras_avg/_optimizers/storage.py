"""How a wrapper's state is made, listed and set."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_avg import _backend, _keras_internals
from keras_avg._optimizers import fitting, nesting
from keras_avg._optimizers.raw_values import RawValues

AVERAGE = "average_"  # what the names of averages in a file begin with
ADDED = ("slot_", "weight_")  # and those of variables that users added


class StoresOwnVariables:
    """State: own variables, then the inner optimizer's."""

    inner_optimizer: Any
    built: bool
    name: str
    average_dtype: str | None
    averages_in_model: bool
    _own_variables: dict[str, Any]
    _hold: Callable[[RawValues | None], None]
    _notice_restored_state: Callable[[], None]

    def _add_own_variables(self, variables: list[Any]) -> None:
        """Three numbers, and an average for each variable: zeros until the averages start.

        An initializer that reads the variable would fail where TensorFlow creates both in the first
        trace of a `tf.function`, and weights loaded later would not count.
        """
        names = ("updates", "snapshots", "averages_in_model")
        made = self._own_variables  # by a `build` for no variables
        numbers = {n: made[n] if n in made else self._add_counter(n) for n in names}
        self._updates, self._snapshots, self._swapped = map(_backend.Counter, numbers.values())
        self._averages = [self._add_average(variable) for variable in variables]
        averages = {f"{AVERAGE}{i}": a for i, a in enumerate(self._averages) if a is not None}
        self._own_variables = numbers | averages | self._own_variables  # weights added before

    def _add_counter(self, name: str) -> Any:
        # The innermost optimizer's name is unique in a program (Keras numbers it), the depth makes
        # it so among nested wrappers: Keras' state trees want every path once.
        return keras.optimizers.Optimizer.add_variable(
            self,
            shape=(),
            dtype="int",
            aggregation="only_first_replica",
            name=f"{nesting.innermost(self).name}_{name}{depth_suffix(self)}",
        )

    def _add_average(self, variable: Any) -> Any:
        if not _keras_internals.is_averageable(variable):
            return None
        dtype = keras.backend.standardize_dtype(variable.dtype)
        dtype = self.average_dtype or ("float32" if dtype in fitting.LOW_PRECISION else dtype)
        name = f"average{depth_suffix(self)}"
        return _keras_internals.add_variable_like(self, variable, name, dtype)

    @property
    def variables(self) -> list[Any]:
        """Own variables (three numbers, the averages, added ones), then the inner optimizer's."""
        self._notice_restored_state()  # JAX' trainer asks for them before it takes the values away
        return [*self._own_variables.values(), *self.inner_optimizer.variables]

    @property
    def weights(self) -> list[Any]:
        """The name `variables` had in Keras 2."""
        return self.variables

    def get_weights(self) -> list[np.ndarray]:
        """The values of `variables` as NumPy arrays, one to one."""
        check_attached(self.variables)
        return [ops.convert_to_numpy(variable) for variable in self.variables]

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Set `variables` from a list of arrays as `get_weights` gives it, all or none.

        Raises:
            ValueError: If the optimizer has not been built, or the number or a shape of the arrays
                is not that of the variables.
        """
        built_for_some = self.built and _keras_internals.built_variables(self)
        if not built_for_some and len(weights) != len(self.variables):
            # Keras' loader of legacy `.h5` files builds every optimizer for no variables.
            self.built = False
            raise ValueError(
                f"You are calling `set_weights()` on '{self.name}', which has no variables to "
                "set before it is built. Call `optimizer.build(model.trainable_variables)`, or "
                "take a first step."
            )
        check_attached(self.variables)
        variables = {str(i): variable for i, variable in enumerate(self.variables)}
        values = {str(i): weight for i, weight in enumerate(weights)}
        fitting.check_fit(self.name, variables, values)
        fitting.check_numbers(self.name, variables, values)
        fitting.assign(variables, values)
        if not self.averages_in_model:
            self._hold(None)


def depth_suffix(wrapper: Any) -> str:
    """What tells the variables of nested wrappers apart."""
    depth = nesting.depth(wrapper)
    return f"_{depth}" if depth > 1 else ""


def check_attached(variables: Any) -> None:
    """Raise if the JAX trainer holds the values of variables at the moment."""
    if any(_keras_internals.is_purged(variable) for variable in variables):
        raise RuntimeError(
            "During `fit` on JAX the variables' values live in the train step, not in the "
            "variables. Call `model.jax_state_sync()` first."
        )
