"""The context in which averages are read in place of the variables' values."""

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_avg import _backend, _keras_internals

COMPILED = ("train_function", "test_function", "predict_function")  # attributes of a model


class Reading(keras.StatelessScope):
    """A scope in which variables have other values. Assignments are lost when it ends.

    `model(x)` reads the values through the scope. `predict` and `evaluate` need more:

    * On TensorFlow they compile a function once. It would read the raw values, or keep the averages
      after the scope. So inside the scope a model compiles functions of its own.
    * On JAX they take the values away from the variables, let the compiled step reuse the buffers,
      and assign the values again at the end. In a scope this assignment is lost, and the averages'
      own buffers would be reused. So they get copies, and the values are put back afterwards.

    Args:
        variables: List of Keras variables.
        values: List of tensors, one for each variable.
        models: List of the models that are known to have these variables.
    """

    def __init__(self, variables: Sequence[Any], values: Sequence[Any], models: Sequence[Any]):
        super().__init__(list(zip(variables, values, strict=True)))
        self._models = list({id(model): model for model in models}.values())
        self._functions: list[tuple[Any, str, Any]] = []
        self._taken: list[tuple[Any, Any]] = []
        self._number = ops.convert_to_tensor(0)
        self._backend = keras.backend.backend()
        self._is_eager = self._backend == "tensorflow" and not self._is_traced()

    def __enter__(self) -> "Reading":
        """Begin to replace the values."""
        if self._is_eager:
            for model in self._models:
                self._compile_again(model)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Let the variables have their own values again."""
        super().__exit__(*error)
        for model, name, function in reversed(self._functions):
            setattr(model, name, function)
        for variable, value in self._taken:
            _keras_internals.give_back_value(variable, value)

    def get_current_value(self, variable: Any) -> Any:
        """The value of a variable in the scope. None if the scope has no value for it."""
        value = super().get_current_value(variable)
        if self._backend == "jax" and _keras_internals.is_trainer_taking_values():
            return self._for_trainer(variable, value)
        if self._is_eager and self._is_traced():
            self._note_compiling_models()
        return value

    def add_update(self, update: tuple[Any, Any]) -> None:
        """Note an assignment. Only metrics that a compiled function changes are really changed.

        Raises:
            RuntimeError: If a compiled function assigns to another variable.
        """
        variable, value = update
        if self._is_eager and id(variable) in self._metrics():
            _keras_internals.assign_outside_scopes(variable, value)
        elif self._is_eager and self._is_traced():
            raise RuntimeError(
                f"A function that is compiled in `reading_averages()` assigns to "
                f"{_keras_internals.path_of(variable)!r}, as training does. Values that are "
                "assigned in this context are lost. Use `average_weights()`, or end the context."
            )
        else:
            super().add_update(update)

    def _metrics(self) -> set[int]:
        return {id(v) for model in self._models for v in model.metrics_variables}

    def _note_compiling_models(self) -> None:
        for model in _keras_internals.models_among_callers("self"):
            if all(model is not known for known in self._models):
                self._models.append(model)
                self._functions += [(model, name, None) for name in COMPILED[1:]]

    def _is_traced(self) -> bool:
        return _backend.concrete(self._number) is None

    def _compile_again(self, model: Any) -> None:
        """Let a model compile functions for this scope. It has its own ones again afterwards."""
        for name in COMPILED:
            self._functions.append((model, name, getattr(model, name, None)))
            setattr(model, name, None)

    def _for_trainer(self, variable: Any, value: Any) -> Any:
        own = _keras_internals.stored_value(variable)
        if own is not None:
            self._taken.append((variable, own))
        source = own if value is None else value
        return None if source is None else _backend.copy(source)
