"""Recomputes batch-normalization statistics, for weights that were never trained with data."""

import contextlib
import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_avg import _backend, _checks, _keras_internals
from keras_avg._types import Data
from keras_avg._wrapping import swap


def update_batch_norm(
    model: keras.Model,
    x: Data,
    batch_size: int | None = None,
    steps: int | None = None,
    verbose: int | str = "auto",
) -> None:
    """Recompute the statistics of all BatchNormalization layers by one pass over the data.

    The moving statistics were collected with the raw weights. Averaged weights give other
    activations, so they need other statistics. Each layer, at any depth, gets the mean and the
    variance of all elements that it normalizes during the pass. Let call `b` of the layer have
    `n_b` elements per channel (masked elements do not count), with mean `m_b` and biased variance
    `v_b`, and let `N = sum(n_b)`. Then, in float64,

        moving_mean     = sum(n_b * m_b) / N
        moving_variance = sum(n_b * (v_b + m_b**2)) / N - moving_mean**2

    The layers' momentum and the old statistics are not used. As in training, a layer normalizes
    each batch by the batch's own moments before later layers see it, and each call of a shared
    layer counts. All other layers run in inference mode, without dropout. The pass changes only
    these statistics. If an exception ends the pass, it changes nothing. While a model holds the
    averages of an optimizer (`swap_weights`, `average_weights`), the statistics of the raw weights
    are set aside. They are put back together with the raw weights.

    `torch.optim.swa_utils.update_bn` does something else: it takes the plain mean over batches, of
    batch means and of unbiased batch variances. There a short last batch counts like a full one,
    and the variance between the means of batches is lost.

    Layers with `trainable=False` run in inference mode and keep their statistics, as in training.
    If a model's `call` passes `training=False` to a layer, its statistics are still recomputed. To
    keep them, freeze the layer. Layers with `renorm=True` are normalized by the moments of the
    batch alone. Their training statistics, `renorm_mean` and `renorm_stddev`, do not change.
    `synchronized=True` makes no difference, because the pass runs in one process: each process uses
    the data that it is given. The pass runs eagerly, even in functions that are decorated with
    `tf.function`. Layers inside loops or functions that are compiled nevertheless (`jax.jit`) are
    refused.

    Args:
        model: Keras model or layer. If it is not built, the first batch builds it.
        x: Data as `fit` takes it as `x`: an array, or a list or dict of arrays, a generator, a
            `tf.data.Dataset`, a torch `DataLoader`, or a `keras.utils.PyDataset`. Targets and
            sample weights in its batches are ignored. The best choice is the training data, with
            the batch size of training. If there is no layer to update, the data is not read.
        batch_size: Integer >= 1, for arrays only. Default None, which means 32 as in `fit`.
        steps: Integer >= 1. The number of batches to take. Default None, which means all.
        verbose: `"auto"` or 1 for a progress bar, 2 for one line, 0 for silence. Default `"auto"`.

    Returns:
        None. The model is changed in place.

    Raises:
        ValueError: If there is no data. If the data has no end, and `steps` is not given. If
            `batch_size`, `steps` or `verbose` is out of range. If the moments of a layer cannot be
            observed: a subclass of BatchNormalization does not compute them with the inherited
            method, or the layer is called in compiled code.

    Example:

    ```python
    model.compile(optimizer=keras_avg.SWA("sgd", start_averaging=200), loss="mse")
    model.fit(x, y, epochs=20)
    model.optimizer.assign_average_vars(model.variables)
    keras_avg.update_batch_norm(model, x, batch_size=32)
    ```

    Reference:
        Izmailov et al., Averaging Weights Leads to Wider Optima and Better Generalization,
        https://arxiv.org/abs/1803.05407, section 3.2.
    """
    if batch_size is not None:
        batch_size = _checks.whole_number("batch_size", batch_size, minimum=1, unit="samples")
    if steps is not None:
        steps = _checks.whole_number("steps", steps, minimum=1, unit="batches")
    verbose = _checks.verbosity(verbose)
    if _is_built(model) and not _layers_to_update(model):
        return
    _keras_internals.check_attached(model.variables)
    adapter = _adapter(x, batch_size, steps)
    with _backend.random_state_kept(), _keras_internals.batches(adapter) as data:
        pools = _filled_pools(model, _inputs(data, adapter.num_batches, steps, verbose))
    swap.set_statistics_aside(model, statistics(model))
    for pool in pools:
        pool.assign()


def refuse_one_pass_data(argument: str, x: Any) -> None:
    """Refuse data that can be read only once, or has no end."""
    if isinstance(x, Iterator) or _is_endless(x):
        raise ValueError(
            f"`{argument}` is gone through, from beginning to end, whenever the averages have "
            f"changed. Received: {argument} of type {type(x).__name__}, which gives its data only "
            "once or has no end. Pass arrays, a tf.data.Dataset with an end (`dataset.take(100)`) "
            "or a keras.utils.PyDataset."
        )


def statistics(model: Any) -> list[Any]:
    """The variables that `update_batch_norm` sets, in order."""
    return [v for layer in _layers_to_update(model) for v in layer.non_trainable_variables]


class _Pool:
    """Mean and variance, per channel, of all elements that one layer has normalized so far."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self._calls = 0
        self._reductions = 0
        self._count: Any = 0.0
        self._mean: Any = 0.0
        self._squares: Any = 0.0  # sum of squared deviations from the mean

    @contextlib.contextmanager
    def filling(self) -> Iterator[None]:
        """Let the layer run in training mode, without `renorm`, and collect its moments."""
        layer, flags = self._layer, ("renorm", "synchronized")
        before = {name: getattr(layer, name) for name in flags if hasattr(layer, name)}
        try:
            for name in before:
                setattr(layer, name, False)
            with _keras_internals.in_training_mode(layer, self._on_call, self._on_moments):
                yield
        finally:
            for name, value in before.items():
                setattr(layer, name, value)

    def _on_call(self) -> None:
        self._calls += 1

    def _on_moments(self, inputs: Any, mask: Any, mean: Any, variance: Any) -> None:
        self._reductions += 1
        try:
            arrays = _array(mean), _array(variance)
        except (TypeError, NotImplementedError) as error:
            # Must be raised now, while the code is traced. Otherwise compiled code that contains
            # training mode would be kept.
            raise ValueError(
                f"The moments of {self._layer.path!r} cannot be known. Received: a call from "
                "compiled code, or from a loop that is compiled. Call the layer outside of it, or "
                "set its `trainable = False` to keep its statistics."
            ) from error
        self._add(self._elements(ops.shape(inputs), mask), *arrays)

    def check(self) -> None:
        """Refuse a layer if a call did not compute its moments with the observed method."""
        if self._calls != self._reductions:
            raise ValueError(
                f"The moments of {self._layer.path!r}, of type {type(self._layer).__name__}, "
                "cannot be known: it does not compute them once a call by the method that it has "
                f"from BatchNormalization. Received: moments {self._reductions} times in "
                f"{self._calls} calls. Let its `call` take `training` and pass it to "
                "`super().call`, or set its `trainable = False` to keep its statistics."
            )

    def _elements(self, shape: tuple[int, ...], mask: Any) -> Any:
        """The number of elements in a call for each channel. A mask has all axes but the last."""
        axis = self._layer.axis % len(shape)
        if mask is None:
            return np.prod(shape[:axis] + shape[axis + 1 :], dtype=np.float64)
        counted = ops.convert_to_numpy(mask).astype(bool)[..., np.newaxis]
        others = tuple(i for i in range(len(shape)) if i != axis)
        return np.broadcast_to(counted, shape).sum(axis=others, dtype=np.float64)

    # The variance,  sum(n_b * (v_b + m_b**2)) / N - mean**2,  is a small difference of large
    # numbers if the mean is far from zero. So the pool keeps the sum of squared deviations from the
    # mean, which needs no such difference. Let N be the number of elements so far, and let a call
    # have n elements. With  d = m_b - mean,  the call moves the mean by  d * n / (N + n).  The new
    # sum of squared deviations from the new mean is
    #     squares + n * v_b + d**2 * N * n / (N + n).

    def _add(self, count: Any, mean: Any, variance: Any) -> None:
        share = count / np.maximum(self._count + count, 1)
        difference = np.where(count > 0, mean - self._mean, 0)  # Without elements, moments are NaN.
        self._mean = self._mean + difference * share
        self._squares = self._squares + np.where(count > 0, count * variance, 0)
        self._squares = self._squares + difference**2 * self._count * share
        self._count = self._count + count

    def assign(self) -> None:
        """Assign the statistics to the layer, except for channels without elements."""
        layer = self._layer
        if not np.all(self._count):
            warnings.warn(
                f"No data reached {layer.path!r}, or not all of its channels, or in compiled code "
                "only: it keeps its statistics there.",
                stacklevel=3,
            )
        if not np.any(self._count):
            return
        variance = self._squares / np.maximum(self._count, 1)
        _assign(layer.moving_mean, self._mean, self._count)
        _assign(layer.moving_variance, variance, self._count)
        if getattr(layer, "renorm", False):
            # At the next training step, the layer computes its variance from this one.
            _assign(layer.moving_stddev, np.sqrt(variance + layer.epsilon), self._count)


def _filled_pools(model: Any, batches: Iterator[Any]) -> list[_Pool]:
    infer = _backend.eager_inference(lambda inputs: model(inputs, training=False))
    first = next(batches)
    if not _is_built(model):
        with keras.StatelessScope():
            infer(first)
    pools = [_Pool(layer) for layer in _layers_to_update(model)]
    with contextlib.ExitStack() as stack:
        for pool in pools:
            stack.enter_context(pool.filling())
        scope = keras.StatelessScope()  # It keeps all assignments of the pass away from the model.
        for inputs in itertools.chain([first], batches):
            with scope:
                infer(inputs)
            for pool in pools:
                pool.check()
    return pools


def _is_built(model: Any) -> bool:
    return all(layer.built for layer in _keras_internals.layers_at_any_depth(model))


def _layers_to_update(model: Any) -> list[Any]:
    return [layer for layer in _batch_norms(model) if layer.trainable]


def frozen_batch_norms(model: Any) -> list[Any]:
    """The BatchNormalization layers that keep their statistics in training too, in order."""
    return [layer for layer in _batch_norms(model) if not layer.trainable]


def _batch_norms(model: Any) -> list[Any]:
    layers = _keras_internals.layers_at_any_depth(model)
    return [layer for layer in layers if isinstance(layer, keras.layers.BatchNormalization)]


def _adapter(x: Any, batch_size: int | None, steps: int | None) -> Any:
    if x is None or (isinstance(x, list | tuple | dict) and not x):
        raise _no_data(f"x={x!r}")
    try:
        adapter = _keras_internals.data_adapter(x, batch_size, steps)
    except IndexError as error:  # Older versions of Keras read a generator's first batch here.
        raise _no_data("data that yields no batch") from error
    if adapter.num_batches == 0:
        shapes = keras.tree.map_structure(lambda part: getattr(part, "shape", part), x)
        raise _no_data(f"x of type {type(x).__name__} with no batches: {shapes}")
    if steps is None and _is_endless(x):
        raise ValueError(
            f"The data has no end. Received: x of type {type(x).__name__} and steps=None. Say how "
            "many batches to take, with `steps`."
        )
    return adapter


def _is_endless(x: Any) -> bool:
    if isinstance(x, keras.utils.PyDataset):
        return x.num_batches is None
    cardinality = getattr(x, "cardinality", None)  # `tf.data.INFINITE_CARDINALITY` is -1
    return callable(cardinality) and int(cardinality()) == -1


def _inputs(data: Any, known: int | None, steps: int | None, verbose: int) -> Iterator[Any]:
    """The inputs in the batches. A progress bar moves after each batch."""
    target = min((n for n in (known, steps) if n is not None), default=None)
    progress = keras.utils.Progbar(target, verbose=verbose)
    done = 0
    for done, batch in enumerate(itertools.islice(data, steps), start=1):
        yield keras.utils.unpack_x_y_sample_weight(batch)[0]
        progress.update(done, finalize=False)
    if not done:
        raise _no_data("data that yields no batch")
    if steps is not None and done < steps:
        warnings.warn(
            f"Your input ran out of data: the statistics are of {done} batches. Received: "
            f"steps={steps}.",
            stacklevel=2,
        )
    progress.target = done
    progress.update(done, finalize=True)


def _no_data(received: str) -> ValueError:
    return ValueError(
        f"There is no data to compute statistics from. Received: {received}. Pass a batch or more."
    )


def _array(tensor: Any) -> Any:
    return ops.convert_to_numpy(tensor).astype(np.float64).reshape(-1)


def _assign(variable: Any, value: Any, count: Any) -> None:
    before = ops.convert_to_numpy(variable.value).astype(np.float64)
    variable.assign(np.where(count > 0, value, before))
