"""How users look at a wrapper's averages and take them into the model."""

from collections.abc import Callable
from typing import Any

from keras import ops

from keras_avg import _backend, _keras_internals
from keras_avg._optimizers import nesting
from keras_avg._optimizers.storage import AVERAGE, check_attached


class HasAverages:
    """The averages, their variables, and what may be done with the two."""

    built: bool
    name: str
    assign: Callable[[Any, Any], Any]
    value_weight: Callable[[Any], Any]
    average_starts_at_variable: bool
    variables: list[Any]
    _own_variables: dict[str, Any]
    _averages: list[Any]
    _clock: _backend.Counter
    _snapshots: _backend.Counter
    _without_averages: Callable[[], str]
    _refuse_while_in_model: Callable[[str], None]

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
        check_attached([*self.variables, var, average_var])
        weight = self._weight(self._last_step())
        return _backend.lerp([average_var], [var], weight)[0]

    def assign_average_vars(self, var_list: list[Any]) -> None:
        """Give the variables the values of their averages; the raw values are gone.

        Args:
            var_list: List of variables, such as `model.variables`. Those that have no average
                (batch-normalization statistics) are left alone.

        Raises:
            ValueError: If none of them has an average, or there is no snapshot yet.
            RuntimeError: If the averages are in the model already, and the raw values set aside.

        Example:

        ```python
        model.compile(optimizer=keras_avg.SWA("sgd", start_averaging=100), loss="mse")
        model.fit(x, y, epochs=10)
        model.optimizer.assign_average_vars(model.variables)
        model.save("averaged.keras")
        ```
        """
        self._check_built("assign_average_vars")
        pairs = [(v, average) for v in var_list if (average := self._average_of(v)) is not None]
        if not pairs:
            raise ValueError(
                f"None of the variables has an average in '{self.name}': nothing can be assigned. "
                f"Received: {[getattr(v, 'path', str(v)) for v in var_list]}. Pass the variables "
                "that the optimizer trains, such as `model.variables`."
            )
        if not self.has_average:
            raise ValueError(
                f"'{self.name}' has taken no snapshot yet, so there are no averages to assign. "
                f"Received: {int(ops.convert_to_numpy(self._step(self._clock.read())))} updates so "
                f"far. Train on, or let averaging start earlier.{self._without_averages()}"
            )
        self._refuse_while_in_model("assigning them for good")
        for variable, average in pairs:
            self.assign(variable, _backend.copy(average))

    def stateless_average(
        self,
        optimizer_variables: list[Any],
        trainable_variables: list[Any] | None = None,
        optimizer: Any = None,
    ) -> list[Any]:
        """The averages out of a list of values for `variables`; jittable.

        Args:
            optimizer_variables: List of tensors, one for each of `variables`, as
                `stateless_apply` takes and returns it.
            trainable_variables: List of tensors, the raw values, one for each variable that the
                optimizer was built with. If given, they are what this returns before the first
                snapshot, in the averages' dtype. Default None: before the first snapshot the
                averages are returned as they are stored, which for `SWA` is zeros.
            optimizer: A wrapper inside this one, whose averages are wanted. The lists are those of
                this optimizer. Default None: this wrapper.

        Returns:
            List of tensors, one for each variable that has an average, in order.

        Raises:
            ValueError: If a list does not have the right length, or `optimizer` is not inside.

        Example:

        ```python
        trainable, state = optimizer.stateless_apply(state, gradients, trainable)
        averages = optimizer.stateless_average(state, trainable)
        ```
        """
        values = self._values_of(optimizer or self, optimizer_variables)
        averages = [v for name, v in values.items() if name.startswith(AVERAGE)]
        if trainable_variables is None:
            return averages
        built = _keras_internals.built_variables(self)
        if len(trainable_variables) != len(built):
            raise ValueError(
                f"'{self.name}' was built for {len(built)} variables. Received: a list of "
                f"{len(trainable_variables)}. Pass one value for each of them, in order."
            )
        wrapper = optimizer or self
        raw = [
            value
            for variable, value in zip(built, trainable_variables, strict=True)
            if wrapper._average_of(variable) is not None
        ]
        is_there = values["snapshots"] > 0
        pairs = zip(averages, raw, strict=True)
        return [ops.where(is_there, a, ops.cast(value, a.dtype)) for a, value in pairs]

    def stateless_num_snapshots(self, optimizer_variables: list[Any], optimizer: Any = None) -> Any:
        """How many averagings have been done, out of a list of values for `variables`; jittable.

        Args:
            optimizer_variables: List of tensors, one for each of `variables`, as
                `stateless_apply` takes and returns it.
            optimizer: A wrapper inside this one, whose number is wanted. Default None: this one.

        Returns:
            Integer scalar tensor.

        Raises:
            ValueError: If the list does not have the right length, or `optimizer` is not inside.

        Example:

        ```python
        if optimizer.stateless_num_snapshots(state) > 0:
            averages = optimizer.stateless_average(state)
        ```
        """
        return self._values_of(optimizer or self, optimizer_variables)["snapshots"]

    def _values_of(self, wrapper: Any, optimizer_variables: list[Any]) -> dict[str, Any]:
        """The own variables of this wrapper, or of one inside it, with values from a list."""
        variables = self.variables
        if len(optimizer_variables) != len(variables):
            raise ValueError(
                f"'{self.name}' has {len(variables)} variables. Received: a list of "
                f"{len(optimizer_variables)}. Pass one value for each of `optimizer.variables`."
            )
        check_attached(optimizer_variables)
        values = {
            id(variable): value
            for variable, value in zip(variables, optimizer_variables, strict=True)
        }
        own = getattr(wrapper, "_own_variables", {})
        if not own or any(id(variable) not in values for variable in own.values()):
            raise ValueError(
                f"The averages of {wrapper!r} are not in the state of '{self.name}'. Pass as "
                "`optimizer` an averaging wrapper inside it."
            )
        return {name: ops.convert_to_tensor(values[id(v)]) for name, v in own.items()}

    @property
    def num_snapshots(self) -> int:
        """How many averagings have been done. For use outside compiled code."""
        if not self.built:
            return 0
        check_attached(self._own_variables.values())
        return int(self._snapshots.read())

    @property
    def has_average(self) -> bool:
        """Whether there has been a snapshot. For use outside compiled code."""
        return self.num_snapshots > 0

    def _average_of(self, variable: Any) -> Any:
        index = _keras_internals.variable_index(self, variable)
        return None if index is None else self._averages[index]

    def _averages_and_variables(self) -> tuple[list[Any], list[Any]]:
        pairs = zip(self._averages, _keras_internals.built_variables(self), strict=True)
        kept = [(average, variable) for average, variable in pairs if average is not None]
        return [average for average, _ in kept], [variable for _, variable in kept]

    def _step(self, count: Any) -> Any:
        """Real updates, from the count of micro-steps."""
        accumulated = nesting.innermost(self).gradient_accumulation_steps
        return count // accumulated if accumulated else count

    def _last_step(self) -> Any:
        return ops.maximum(self._step(self._clock.read()) - 1, 0)

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
        return ops.where(self._snapshots.read() == 0, ops.ones((), dtype), weight)

    def _check_built(self, member: str) -> None:
        if not self.built:
            raise ValueError(
                f"'{self.name}' has no averages before it is built, so `{member}` has nothing to "
                "work on. Take a first step, or call `optimizer.build(model.trainable_variables)`."
            )
