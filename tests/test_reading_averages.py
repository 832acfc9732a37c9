"""While averages are read in place of variables, all of Keras reads them, and nothing is lost."""

import keras
import numpy as np
import pytest
import small_training as small
from keras import ops, optimizers

from keras_avg import SWA, MovingAverage

ROUNDING = {"rtol": 1e-5, "atol": 1e-5}  # A compiled model rounds in another order.


def trained(**compiled):
    inner = MovingAverage(optimizers.SGD(0.1), average_decay=0.9)
    return small.fit(small.model(SWA(inner, 0, 2), **compiled), epochs=2)


def answers(model):
    """All that Keras computes with the weights, as arrays, and the loss by hand."""
    called = small.numpy(model(ops.convert_to_tensor(small.X), training=False))
    loss = np.mean((called - small.Y) ** 2)
    return called, loss, model.predict(small.X, batch_size=8, verbose=0)


@pytest.mark.parametrize("is_compiled_before", [False, True])
def test_predict_and_evaluate_read_the_averages_inside_and_the_raw_weights_outside(
    is_compiled_before,
):
    model = trained()
    raw = small.numpy(model(ops.convert_to_tensor(small.X), training=False))
    before = [small.numpy(v) for v in model.variables]
    with model.optimizer.average_weights():
        expected, loss, _ = answers(model)
    if is_compiled_before:
        model.predict(small.X, verbose=0)
        model.evaluate(small.X, small.Y, verbose=0)
    for _ in range(2):
        with model.optimizer.reading_averages():
            np.testing.assert_allclose(model.predict(small.X, verbose=0), expected, **ROUNDING)
            np.testing.assert_allclose(model.predict_on_batch(small.X), expected, **ROUNDING)
            reached = model.evaluate(small.X, small.Y, verbose=0, return_dict=True)["loss"]
            assert reached == pytest.approx(loss, rel=1e-4)
            again, _, _ = answers(model)
            np.testing.assert_allclose(again, expected, **ROUNDING)
        np.testing.assert_allclose(model.predict(small.X, verbose=0), raw, **ROUNDING)
        reached = model.evaluate(small.X, small.Y, verbose=0, return_dict=True)["loss"]
        assert reached == pytest.approx(np.mean((raw - small.Y) ** 2), rel=1e-4)
    small.assert_same_bits([small.numpy(v) for v in model.variables], before)


def test_training_after_predict_with_averages_is_as_without():
    models = [trained(), trained()]
    with models[0].optimizer.reading_averages():
        models[0].predict(small.X, verbose=0)
        models[0].evaluate(small.X, small.Y, verbose=0)
    for model in models:
        small.fit(model)
    small.assert_same_bits(*(m.get_weights() for m in models))
    small.assert_same_bits(*(m.optimizer.get_weights() for m in models))


def test_a_model_that_the_optimizer_does_not_know_predicts_with_averages_only_inside():
    variables_of = trained()
    model = keras.Sequential(variables_of.layers)  # Its name is another, its variables are not.
    raw = small.numpy(model(ops.convert_to_tensor(small.X), training=False))
    with variables_of.optimizer.reading_averages():
        inside = model.predict(small.X, verbose=0)
    np.testing.assert_allclose(model.predict(small.X, verbose=0), raw, **ROUNDING)
    assert np.max(np.abs(inside - raw)) > 1e-3


def test_averages_of_nested_wrappers_can_be_read_inside_each_other():
    model = trained()
    x = ops.convert_to_tensor(small.X)
    outer, inner = model.optimizer, model.optimizer.inner_optimizer
    expected = []
    for wrapper in (outer, inner):
        with wrapper.average_weights():
            expected.append(small.numpy(model(x, training=False)))
    with outer.reading_averages():
        with inner.reading_averages():
            np.testing.assert_array_equal(small.numpy(model(x, training=False)), expected[1])
        np.testing.assert_array_equal(small.numpy(model(x, training=False)), expected[0])


def test_training_while_averages_are_read_is_refused_and_changes_nothing():
    model = trained()
    before = [small.numpy(v) for v in [*model.variables, *model.optimizer.variables]]
    # On torch the loss has no gradient, because the averages have none.
    with (
        model.optimizer.reading_averages(),
        pytest.raises(RuntimeError, match=r"in `reading_averages\(\)`|require grad"),
    ):
        small.fit(model)
    after = [small.numpy(v) for v in [*model.variables, *model.optimizer.variables]]
    small.assert_same_bits(after, before)
    small.fit(model)


def test_a_step_by_hand_while_averages_are_read_is_refused():
    variable = keras.Variable([1.0])
    optimizer = MovingAverage(optimizers.SGD(1.0))
    small.apply(optimizer, [variable], [[0.5]])
    with optimizer.reading_averages(), pytest.raises(RuntimeError, match="End the context"):
        small.apply(optimizer, [variable], [[0.5]])
    np.testing.assert_array_equal(variable, [0.5])
    assert int(optimizer.iterations) == 1
