"""Recomputes batch-normalization statistics, for weights that were never trained with data."""

import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import keras

from keras_avg import _backend, _checks, _keras_internals
from keras_avg._moments.batches import running
from keras_avg._moments.observer import Observer
from keras_avg._moments.pool import Pool
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
    the data that it is given.

    On JAX and TensorFlow, a pass of 10 batches or more is compiled, as `predict` is. If the number
    is not known, the first 9 batches run eagerly. The compiled code is kept for the next pass over
    the model, unless an attribute of a layer was set in between. Batches of another shape than the
    first run eagerly. A model that cannot be compiled runs eagerly too, even in functions that are
    decorated with `tf.function`. Layers inside loops or functions that are compiled nevertheless
    (`jax.jit`) are refused.

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
        number = min((n for n in (adapter.num_batches, steps) if n is not None), default=None)
        pools = _filled_pools(model, _inputs(data, number, steps, verbose), number)
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


def _filled_pools(model: Any, inputs: Iterator[Any], number: int | None) -> list[Pool]:
    first = next(inputs)
    if not _is_built(model):
        with keras.StatelessScope():
            _backend.eager_inference(lambda batch: model(batch, training=False))(first)
    layers = _layers_to_update(model)
    pools = list(map(Pool, layers))
    with running(model, Observer(layers), number) as batches:
        for batch in itertools.chain([first], inputs):
            for found in batches.moments(batch):
                pools[int(found.number)].add(found)
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


def _inputs(data: Any, number: int | None, steps: int | None, verbose: int) -> Iterator[Any]:
    """The inputs in the batches. A progress bar moves after each batch."""
    progress = keras.utils.Progbar(number, verbose=verbose)
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
