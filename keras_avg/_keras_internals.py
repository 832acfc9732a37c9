"""The only file that uses private names of Keras.

All other files use only Keras' public interface. So only this file must be checked when a new
version of Keras comes out. Each function says why the public interface is not enough.
"""

import contextlib
import operator
import re
import sys
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import h5py
import keras
import numpy as np
from keras.src.backend.common.stateless_scope import get_stateless_scope, in_stateless_scope
from keras.src.saving import saving_lib
from keras.src.trainers import data_adapters
from keras.src.utils import tracking

JAX_STATE = (
    "trainable_variables",
    "non_trainable_variables",
    "optimizer_variables",
    "metrics_variables",
)
TORCH_OPTIMIZERS_MODULE = "keras.src.backend.torch.optimizers"


@tracking.no_automatic_dependency_tracking
def share_step_counter(wrapper: Any, inner_optimizer: Any) -> None:
    """Replace `wrapper`'s step counter by the counter of its inner optimizer.

    Every Keras optimizer makes a counter when it is constructed. A counter of the wrapper could
    differ from the inner one. Also, two wrappers with one name would have the same path
    (`SWA/iteration`) in a state tree.
    """
    renew_variables(wrapper, [])
    wrapper._iterations = inner_optimizer._iterations


@tracking.no_automatic_dependency_tracking
def renew_variables(optimizer: Any, variables: list[Any]) -> None:
    """Give an optimizer a new list of its own variables.

    If an element was removed from a list of an object, TensorFlow refuses to save the object. Keras
    removes an element when a schedule replaces a constant learning rate.
    """
    tracker = optimizer._tracker
    is_variable, _ = tracker.config["variables"]
    optimizer._variables = list(variables)
    tracker.config["variables"] = (is_variable, optimizer._variables)
    tracker.stored_ids["variables"] = {id(variable) for variable in variables}


def own_variables(optimizer: Any) -> list[Any]:
    """The variables that an optimizer itself has made. Its `variables` may contain others too."""
    return list(optimizer._variables)


def step_counter(optimizer: Any) -> Any:
    """The variable behind `iterations`. It also counts micro-steps of gradient accumulation.

    With gradient accumulation, the public `iterations` is a newly computed tensor. One needs the
    variable to see whether it has changed, without waiting for a device.
    """
    return optimizer._iterations


def counts_every_step(optimizer: Any) -> bool:
    """Whether each `apply` of this optimizer is known to be a real update.

    It is true if the optimizer has Keras' `apply`, and does not accumulate gradients. Then no
    condition is compiled in.
    """
    return type(optimizer).apply is keras.optimizers.Optimizer.apply and not (
        optimizer.gradient_accumulation_steps
    )


def built_variables(optimizer: Any) -> list[Any]:
    """The model variables with which the optimizer was built, in order."""
    return list(optimizer._trainable_variables)


def variable_index(optimizer: Any, variable: Any) -> int | None:
    """The place of a model variable among `built_variables`, or None.

    The key is the one of Keras. On TensorFlow the same variable may be passed as a Keras variable,
    as the `tf.Variable` inside it, or as the copy of a replica.
    """
    try:
        key = optimizer._var_key(variable)
    except AttributeError:  # It is not a variable.
        return None
    return optimizer._trainable_variables_indices.get(key)


def is_averageable(variable: Any) -> bool:
    """Whether a variable can be averaged. Gradients overwrite float8 scales, so these cannot.

    The attribute that says so is public, but a plain `tf.Variable` does not have it.
    """
    return not getattr(variable, "overwrite_with_gradient", False)


def add_variable_like(
    optimizer: Any,
    variable: Any,
    name: str,
    dtype: str,
    initializer: Any = "zeros",
    rows: int | None = None,
    layout_of_rows: Callable[[Any], Any] = lambda layout: layout,
) -> Any:
    """An optimizer variable with the shape, layout and device of `variable`, but its own dtype.

    Keras' `add_variable_from_reference` does this, but only with the dtype of `variable`.

    Args:
        optimizer: The optimizer that gets the variable.
        variable: A variable of the model.
        name: String, the end of the new variable's name.
        dtype: String, the new variable's dtype.
        initializer: As for `add_variable`.
        rows: Integer. If it is given, the new variable has so many rows, and each is like
            `variable`.
        layout_of_rows: Function from the layout of `variable` to that of a variable with rows.
    """
    shape, layout = tuple(variable.shape), getattr(variable, "_layout", None)
    if rows is not None:
        shape, layout = (rows, *shape), layout_of_rows(layout)
    with _colocated(optimizer, variable):
        return keras.optimizers.Optimizer.add_variable(
            optimizer,
            shape=shape,
            initializer=initializer,
            dtype=dtype,
            layout=layout,
            name=f"{_flat_path(variable)}_{name}",
        )


def variable_like(variable: Any, value: float) -> Any:
    """A new variable with the shape, dtype and path of `variable`. All its elements are `value`.

    Keras computes a path from the place where a variable is made, so the path is set by hand. Some
    optimizers use it: Muon recognizes embeddings by their paths.
    """
    new = keras.Variable(np.full(tuple(variable.shape), value), dtype=variable.dtype)
    new._path = path_of(variable)
    return new


def _flat_path(variable: Any) -> str:
    return re.sub("[/:]", "_", path_of(variable))


def slots(optimizer: Any, variable: Any) -> dict[str, Any]:
    """The slots of a Keras optimizer for one model variable, by Keras' names (`"momentum"`).

    Keras has no method for it. Paths do not decide it, because two `tf.Variable`s may have the same
    name. But each kind of slot is an attribute of the optimizer: a list with as many elements as
    there are model variables. If Keras gives a slot no name (Adafactor's `r` and `c`), the name of
    this attribute is used.
    """
    index = variable_index(optimizer, variable)
    if index is None:
        return {}
    trained, own = optimizer._trainable_variables, {id(v) for v in optimizer.variables}
    prefix, found = f"{_flat_path(trained[index])}_", {}
    for attribute, kept in vars(optimizer).items():
        if attribute == "_variables" or not isinstance(kept, list) or len(kept) != len(trained):
            continue
        if id(kept[index]) in own:
            name = kept[index].path.rpartition("/")[2]
            named = name.startswith(prefix)
            found[name.removeprefix(prefix) if named else attribute.strip("_")] = kept[index]
    return found


@contextlib.contextmanager
def _colocated(optimizer: Any, variable: Any) -> Iterator[None]:
    strategy = getattr(optimizer, "_distribution_strategy", None)  # TensorFlow only
    if strategy is None:
        yield
        return
    value = variable.value if isinstance(variable, keras.Variable) else variable
    with strategy.extended.colocate_vars_with(value):
        yield


def is_purged(variable: Any) -> bool:
    """Whether the JAX trainer has taken the variable's value away for the time of an epoch.

    It is false inside a `StatelessScope` that has a value for the variable.
    """
    if not isinstance(variable, keras.Variable):
        return False
    if stored_value(variable) is not None or variable._initializer is not None:
        return False
    return not in_stateless_scope() or get_stateless_scope().get_current_value(variable) is None


def stored_value(variable: Any) -> Any:
    """The value of the variable itself, or None. A value in a `StatelessScope` is ignored."""
    return variable._value if isinstance(variable, keras.Variable) else variable  # `tf.Variable`


def values_of(variables: Iterable[Any]) -> list[Any]:
    """The values of many variables.

    The public `value` looks up the scope and the device for each variable. On torch this takes more
    time than the averaging of a small tensor.
    """
    read = operator.attrgetter("value") if in_stateless_scope() else stored_value
    return [read(variable) for variable in variables]


def check_attached(variables: Iterable[Any]) -> None:
    """Raise if the JAX trainer holds the values of the variables now."""
    if any(is_purged(variable) for variable in variables):
        raise RuntimeError(
            "During `fit` on JAX the variables' values live in the train step, not in the "
            "variables. Call `model.jax_state_sync()` first."
        )


def scopes() -> Iterator[Any]:
    """The `StatelessScope`s in which this runs, the innermost first."""
    scope = get_stateless_scope()
    while scope is not None:
        yield scope
        scope = scope.original_scope


def is_trainer_taking_values() -> bool:
    """Whether a variable is read now because the JAX trainer takes its value away.

    Raises:
        RuntimeError: If the trainer takes it to train.
    """
    frame: types.FrameType | None = sys._getframe(1)
    for _ in range(7):  # `value` of a variable, and a list comprehension, are between them.
        frame = frame.f_back if frame else None
        if frame is not None and frame.f_code.co_name == "_get_jax_state":
            if frame.f_locals.get("optimizer_variables"):
                raise RuntimeError(
                    "A model cannot train in `reading_averages()`: what is assigned there is lost. "
                    "End the context before the step."
                )
            return True
    return False


def assign_outside_scopes(variable: Any, value: Any) -> None:
    """Assign to a variable itself, whatever `StatelessScope` there is."""
    variable._direct_assign(value)


def assign_converted(variable: Any, value: Any) -> None:
    """Assign a tensor that has the variable's dtype.

    On JAX, the conversion in `assign` takes as long as the copy of a small tensor.
    """
    if in_stateless_scope() or value.shape != tuple(variable.shape):
        variable.assign(value)  # It refuses another shape.
    else:
        variable._direct_assign(value)


def give_back_value(variable: Any, value: Any) -> None:
    """Give a variable its value again if the JAX trainer has taken it away."""
    if variable._value is None:
        variable._value = value


def refuse_stateless_scope(member: str, but: type) -> None:
    """Refuse to replace the values of variables where the JAX trainer has already replaced them.

    Args:
        member: The name of the method, for the message.
        but: A class of scopes that are allowed.
    """
    is_foreign = any(not isinstance(scope, but) for scope in scopes())
    if keras.backend.backend() == "jax" and is_foreign:
        raise RuntimeError(
            f"`{member}` does not work in a function of states, as a compiled JAX step is one. "
            "Call `model.stateless_call(optimizer.stateless_average(optimizer_variables), "
            "non_trainable_variables, x)` there."
        )


def path_of(variable: Any) -> str:
    """The path of a variable. A native `tf.Variable` has no path, so its name is returned."""
    return getattr(variable, "path", variable.name)


def reattach_state(optimizer: Any) -> bool:
    """Restore the values that the JAX trainer took away, if `fit` failed before the first step.

    Keras 3.13 to 3.15 need this. If an error occurs while the train step is traced (training is
    refused, or a shape is wrong), the variables of model and optimizer would have no values. Keras
    restores the state of the last step, but there was no step. Until the error has left `fit`, a
    local variable there has the values. `tests/test_jax.py` fails when Keras restores them by
    itself. Then remove this function.

    Returns:
        Whether the variables have values now.
    """
    for model, state in _training_under_way():
        if not any(map(is_purged, optimizer.variables)):
            break
        if any(array.is_deleted() for values in state for array in values):
            return False
        _set_jax_state(model, state)
        model.jax_state_sync()
    return not any(map(is_purged, optimizer.variables))


def keep_state_of_refused_step() -> None:
    """Let the JAX trainer restore the state from before a step that is being refused.

    When `fit` fails, Keras restores the state of the last step. If `fit` has done no step, this is
    the state after the last `train_on_batch`, so what was assigned since then would be lost. The
    same happens later if `train_on_batch` fails. It takes no values away, so nothing is to restore.
    """
    for model, state in _training_under_way():
        if any(map(is_purged, model.variables)):
            _set_jax_state(model, state)
        else:
            model._jax_state_synced = True


def _set_jax_state(model: keras.Model, state: tuple[Any, ...]) -> None:
    model._jax_state = dict(zip(JAX_STATE, state, strict=True))
    model._jax_state_synced = False


def _training_under_way() -> Iterator[tuple[keras.Model, tuple[Any, ...]]]:
    """The models that the JAX trainer trains now, and the states that it holds in the meantime."""
    frame: types.FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name in ("fit", "train_on_batch") and _is_of_keras(frame):
            model, state = frame.f_locals.get("self"), frame.f_locals.get("state")
            if isinstance(model, keras.Model) and isinstance(state, tuple) and len(state) == 4:
                yield model, state
        frame = frame.f_back


def models_among_callers(name: str) -> Iterator[Any]:
    """The Keras models in the local variable `name` of the callers. The innermost call is first.

    With `"self"`, these are the models in whose train step, `fit` or `compile` this runs. With
    `"saveable"`, these are the models that Keras saves or loads now. This is necessary because
    Keras does not tell an optimizer which model it trains: the trainer passes only arrays, and the
    reader of a file passes only the optimizer's part of the file.

    Only functions of Keras are searched. Up to Python 3.12, a search keeps all local variables of
    the function alive until it returns.
    """
    frame: types.FrameType | None = sys._getframe()
    while frame is not None:
        is_candidate = name in frame.f_code.co_varnames and _is_of_keras(frame)
        if is_candidate and isinstance(model := frame.f_locals.get(name), keras.Model):
            yield model
        frame = frame.f_back


def is_loading_model() -> bool:
    """Whether Keras now builds an optimizer for a model that it loads from a file.

    The model may have fewer trainable variables than it had when the optimizer was first built.
    Then layers were frozen or quantized before the model was saved. Keras does not tell the
    optimizer that a file is loaded.
    """
    frame: types.FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "compile_from_config" and _is_of_keras(frame):
            return True
        frame = frame.f_back
    return False


def _is_of_keras(frame: types.FrameType) -> bool:
    return str(frame.f_globals.get("__name__")).startswith("keras.")


def validate_again(model: Any) -> dict[str, float]:
    """Evaluate on the validation data of the current `fit`. Only the trainer has this data."""
    return model.evaluate(return_dict=True, verbose=0, _use_cached_eval_dataset=True)


def validates_on_generator(model: Any) -> bool:
    """Whether the validation data of the current `fit` comes from a Python generator."""
    adapter = getattr(getattr(model, "_eval_epoch_iterator", None), "data_adapter", None)
    return isinstance(adapter, data_adapters.GeneratorDataAdapter)


def set_initial_epoch(model: Any, epoch: int | None) -> None:
    """Let the current `fit` and all later ones begin with this epoch.

    For None, each `fit` begins with its own `initial_epoch`. `fit` reads the attribute after
    `on_train_begin`, and never resets it. No public method sets it.
    """
    model._initial_epoch = epoch


def build_metrics(model: Any, batch: Any) -> None:
    """Make the metrics of a model before it is trained on batches like this one.

    No public method makes them. On TensorFlow `fit` makes them in the first trace of the train
    step, and this is too late to restore their values.
    """
    model._symbolic_build(data_batch=batch)


def clip_gradients(optimizer: Any, grads: list[Any]) -> list[Any]:
    """Clip gradients by the optimizer's `clipnorm`, `clipvalue` or `global_clipnorm`."""
    return list(optimizer._clip_gradients(grads))


def serialize(optimizer: Any) -> dict[str, Any]:
    """Serialize `optimizer` with the public names of Keras' own classes.

    On torch, `keras.optimizers.Adam(...)` is an instance of a subclass that exists only on torch.
    Keras writes the module of this subclass. Other backends could not load such a file.
    """
    return _with_public_names(keras.saving.serialize_keras_object(optimizer))


def _with_public_names(config: Any) -> Any:
    if isinstance(config, list):
        return [_with_public_names(item) for item in config]
    if not isinstance(config, dict):
        return config
    config = {key: _with_public_names(value) for key, value in config.items()}
    if str(config.get("module")).startswith(TORCH_OPTIMIZERS_MODULE):
        config |= {"module": "keras.optimizers", "registered_name": None}
    return config


class Entry(NamedTuple):
    """The entry of an array in a file's index. The array itself is not read.

    Attributes:
        shape: The shape of the array.
        dtype: Its dtype. It is text if Keras stores another dtype, or if this is not an array.
        attributes: Its attributes whose values are text.
    """

    shape: tuple[int, ...]
    dtype: Any
    attributes: dict[str, str]


def index_of(store: Any) -> dict[str, Entry]:
    """Shapes and dtypes of all arrays in a store, by name, without reading any from a file.

    The public `store[name]` reads the array, even if the file says that it is very large.
    """
    if not hasattr(store, "_h5_entry_group"):
        return {name: _entry(store[name]) for name in store.keys()}  # noqa: SIM118 (no `__iter__`)
    if not hasattr(store, "_switch_h5_file"):
        return _entries(store._h5_entry_group)
    index = {}
    for filename in list(store.current_shard_filenames):
        store._switch_h5_file(filename, mode="r")
        index.update(_entries(store._h5_entry_group))
    store._restore_h5_file()
    return index


def _entries(group: Any) -> dict[str, Entry]:
    """The entries of a group. A link to another file has no shape, because Keras refuses it."""
    found = {}
    for name in group:
        is_here = isinstance(group, dict) or type(group.get(name, getlink=True)) is h5py.HardLink
        found[name] = _entry(group[name]) if is_here else Entry((), "a link", {})
    return found


def _entry(array: Any) -> Entry:
    if not isinstance(array, h5py.HLObject):
        array = array if hasattr(array, "dtype") else np.asarray(array)
        return Entry(tuple(array.shape), array.dtype, {})
    if not isinstance(array, h5py.Dataset) or array.shape is None:
        return Entry((), "of no array", {})
    if array.external or array.is_virtual:  # Keras would refuse it, but after it has read others.
        return Entry(array.shape, "of another file", {})
    attributes = {name: text for name in array.attrs if (text := _text(array.attrs, name))}
    is_bfloat16 = attributes.get("dtype") == "bfloat16"
    return Entry(array.shape, "bfloat16" if is_bfloat16 else array.dtype, attributes)


def _text(attributes: Any, name: str) -> str:
    try:
        value = attributes[name]
    except (OSError, TypeError, ValueError, RuntimeError):  # h5py cannot read this kind.
        return ""
    return value if isinstance(value, str) else ""


def set_attributes(store: Any, name: str, attributes: dict[str, str]) -> None:
    """Set attributes of an array that was just written to a file. Other stores have none."""
    group = getattr(store, "_h5_entry_group", {})
    if name in group:
        group[name].attrs.update(attributes)


@contextlib.contextmanager
def inside(store: Any, path: str) -> Iterator[Any]:
    """Context in which a store gives the part of a file for an object inside its own object.

    It yields None if this part cannot be read. Keras gives an object only its own part of a file,
    and loads the objects inside afterwards. Then it is too late to refuse a file if only its first
    part fits.
    """
    if not hasattr(store, "_h5_entry_path"):
        yield None
        return
    own = store._h5_entry_path
    try:
        yield store.get(f"{own}/{path}")
    finally:
        store.get(own)


def weakly(store: Any) -> Callable[[], Any]:
    """A weak reference to a store.

    For a dict it returns None: then a user loads by hand, and Keras does not load a second time.
    """
    return (lambda: None) if isinstance(store, Mapping) else weakref.ref(store)


def skip_next_load(optimizer: Any, store: Any) -> None:
    """Let an optimizer load nothing from this file, because its wrapper loads nothing.

    Keras loads the optimizers inside a wrapper by itself. An optimizer that is not built would load
    its counter and its learning rate, and ignore the rest.
    """
    the_store = weakly(store)

    def load(other: Any) -> None:
        del vars(optimizer)["load_own_variables"]
        if other is not the_store():
            optimizer.load_own_variables(other)

    if the_store() is not None:
        vars(optimizer)["load_own_variables"] = load


class _Unchanged:
    """Stands for a variable that is to keep its value."""

    def assign(self, value: Any) -> None: ...


def unless_loaded_around(variables: list[Any]) -> list[Any]:
    """The variables of a wrapper. Keras gets none of them while it loads an optimizer around it.

    `LossScaleOptimizer` and `MultiOptimizer` save the variables of the optimizers inside a second
    time. They assign them one by one from the file, before the wrapper is asked whether its own
    part of the file fits. No public method tells a wrapper what is around it. A dict of a user
    gives the variables: nobody loads the optimizers inside after that.
    """
    frame: types.FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_name == "variables":
        frame = frame.f_back
    if frame is None or frame.f_code.co_name != "load_own_variables" or not _is_of_keras(frame):
        return variables
    if isinstance(frame.f_locals.get("store"), Mapping):
        return variables
    return [_Unchanged() for _ in variables]


def values_in_file(model: Any, path: str, without: list[Any]) -> list[Any]:
    """The values in a file for each of `model.variables`, as tensors. None if there is no value.

    The model does not change. The public `load_weights` changes the first layers before it finds
    that the last ones do not fit. It also cannot skip the optimizer of a `.keras` file.

    Args:
        model: A model that is built.
        path: String. A file that `model.load_weights` takes.
        without: List of objects that Keras saves with the model and that are skipped here, such as
            optimizers.
    """
    with keras.StatelessScope() as scope:
        if path.endswith((".keras", ".weights.h5", ".weights.json")):
            saving_lib.load_weights_only(model, path, objects_to_skip=without)
        else:  # From a legacy file Keras takes only weights. It refuses all other files.
            model.load_weights(path)
    return [scope.get_current_value(variable) for variable in model.variables]


def are_stored_as_they_are(model: Any, variables: list[Any]) -> bool:
    """Whether variables of a model have the same values after saving and loading.

    A layer may store other values: a LoRA layer stores a merged kernel. No public method says this.
    """
    wanted = {id(variable): variable for variable in variables}
    for layer in layers_at_any_depth(model):
        own = [v for v in layer._trainable_variables if id(v) in wanted]
        if own and type(layer).save_own_variables is not keras.layers.Layer.save_own_variables:
            stored: dict[str, Any] = {}
            layer.save_own_variables(stored)
            kept = {id(value) for value in stored.values()}
            if not all(id(v) in kept or _comes_back(layer, stored, v) for v in own):
                return False
    return True


def _comes_back(layer: Any, stored: dict[str, Any], variable: Any) -> bool:
    arrays = {name: keras.ops.convert_to_numpy(value) for name, value in stored.items()}
    with keras.StatelessScope() as scope:
        layer.load_own_variables(arrays)
    value = scope.get_current_value(variable)
    return value is None or np.array_equal(
        keras.ops.convert_to_numpy(value), keras.ops.convert_to_numpy(variable), equal_nan=True
    )


def is_stored_by_number(optimizer: Any) -> bool:
    """Whether Keras numbers the variables of an optimizer in a file."""
    kind = type(optimizer)
    return (
        kind.save_own_variables is keras.optimizers.Optimizer.save_own_variables
        and kind.load_own_variables is keras.optimizers.Optimizer.load_own_variables
    )


def layers_at_any_depth(layer: Any) -> list[Any]:
    """`layer` and all layers inside it. The public `model.layers` stops at the first level."""
    return layer._flatten_layers()


def weights_made_to_train(layer: Any) -> list[Any]:
    """The weights of `layer` and its inner layers that were made trainable. They may be frozen now.

    The public `non_trainable_variables` mixes weights of frozen layers with state that changes.
    """
    return [v for each in layers_at_any_depth(layer) for v in each._trainable_variables]


def data_adapter(x: Any, batch_size: int | None, steps: int | None) -> Any:
    """The adapter through which `fit` reads data. It keeps the order of the data.

    Its `num_batches` is None if the number is not known. Keras' `EpochIterator` is not used,
    because it warns at the end of data of unknown length.
    """
    return data_adapters.get_data_adapter(
        x, batch_size=batch_size, steps_per_epoch=steps, shuffle=False
    )


@contextlib.contextmanager
def batches(adapter: Any) -> Iterator[Any]:
    """An iterable over one epoch of an adapter's batches, as the backend's `fit` sees them."""
    kinds = {"tensorflow": "tf_dataset", "jax": "jax_iterator", "torch": "torch_dataloader"}
    kind = kinds.get(keras.backend.backend(), "numpy_iterator")
    adapter.on_epoch_begin()
    try:
        yield getattr(adapter, f"get_{kind}")()
    finally:
        adapter.on_epoch_end()  # This ends the workers of a PyDataset.


@contextlib.contextmanager
def in_training_mode(
    layer: Any, on_call: Callable[[], None], on_moments: Callable[..., None]
) -> Iterator[None]:
    """Let a BatchNormalization layer run in training mode, with any `training` of its callers.

    `on_call()` is called at each call of the layer. `on_moments(inputs, mask, mean, variance)` is
    called each time the layer has computed moments. The moving statistics are not enough to find
    the moments: they have the variables' dtype. They also do not say how many elements were used if
    a subclass changes the inputs first.
    """
    call, moments = layer.call, layer._moments

    def training_call(*args: Any, **kwargs: Any) -> Any:
        on_call()
        return call(*args, **(kwargs | training))

    def observed_moments(inputs: Any, mask: Any) -> Any:
        mean, variance = moments(inputs, mask)
        on_moments(inputs, mask, mean, variance)
        return mean, variance

    training = {"training": True} if layer._call_has_training_arg else {}
    own = vars(layer)  # Not `setattr`, because Keras tracks attributes that are set with it.
    before = {name: own[name] for name in ("call", "_moments") if name in own}
    own.update(call=training_call, _moments=observed_moments)
    try:
        yield
    finally:
        del own["call"], own["_moments"]
        own.update(before)
