"""Gradients are aggregated, transformed and clipped before the inner optimizer sees them."""

import keras
import numpy as np
import pytest
import small_training as small
from keras import ops, optimizers

from keras_avg import SWA

TOLERANCE = 1e-6  # rounding of a few float32 operations on numbers of order 1


@keras.saving.register_keras_serializable(package="keras_avg_tests")
def doubled(grads_and_vars):
    return [(grad * 2.0, variable) for grad, variable in grads_and_vars]


@keras.saving.register_keras_serializable(package="keras_avg_tests")
def minus_one(grads_and_vars):
    return [(grad - 1.0, variable) for grad, variable in grads_and_vars]


def moved(variables):
    """How far variables with one element have moved from 0, against the gradient."""
    return [-small.numpy(v)[0] for v in variables]


def step(gradient=(3.0, 4.0), inner=None, **arguments):
    """How far one step of size 1 moves a variable."""
    variable = keras.Variable(np.zeros(len(gradient)), dtype="float32")
    optimizer = SWA(inner or optimizers.SGD(1.0), **arguments)
    small.apply(optimizer, [variable], [gradient])
    return -small.numpy(variable)


@pytest.mark.parametrize(
    ("clipping", "expected"),
    [
        ({"clipnorm": 1.0}, [0.6, 0.8]),
        ({"global_clipnorm": 1.0}, [0.6, 0.8]),
        ({"clipvalue": 3.5}, [3.0, 3.5]),
    ],
)
def test_the_wrapper_clips_gradients(clipping, expected):
    np.testing.assert_allclose(step(**clipping), expected, rtol=TOLERANCE)


def test_global_clipping_uses_the_norm_over_all_variables():
    variables = [keras.Variable([0.0]), keras.Variable([0.0])]
    small.apply(SWA(optimizers.SGD(1.0), global_clipnorm=1.0), variables, [[3.0], [4.0]])
    np.testing.assert_allclose(moved(variables), [0.6, 0.8], rtol=TOLERANCE)


def test_two_ways_to_clip_exclude_each_other():
    with pytest.raises(ValueError, match="Only one of"):
        SWA("sgd", clipnorm=1.0, clipvalue=1.0)


@pytest.mark.parametrize("argument", ["clipnorm", "clipvalue", "global_clipnorm"])
@pytest.mark.parametrize("value", [[1.0], {}, "1", True, float("nan")], ids=repr)
def test_a_clipping_argument_that_is_no_number_is_refused(argument, value):
    with pytest.raises(ValueError, match=f"`{argument}` must be a number. Received"):
        SWA("sgd", **{argument: value})


def test_the_aggregator_comes_first_then_transformers_then_clipping():
    transformed = step(
        (3.0,), gradient_aggregator=minus_one, gradient_transformers=[doubled, minus_one]
    )
    np.testing.assert_allclose(transformed, [(3.0 - 1.0) * 2.0 - 1.0], rtol=TOLERANCE)
    clipped = step((3.0,), gradient_transformers=[doubled], clipvalue=5.0)
    np.testing.assert_allclose(clipped, [5.0], rtol=TOLERANCE)


@pytest.mark.parametrize(
    "processing",
    [{"clipnorm": 1.0}, {"gradient_transformers": [minus_one]}],
    ids=["clipping", "transformer"],
)
def test_gradient_functions_and_clipping_see_unscaled_gradients(processing):
    scaled = step(
        (3.0 * 64, 4.0 * 64), inner=optimizers.SGD(1.0, loss_scale_factor=64.0), **processing
    )
    np.testing.assert_allclose(scaled, step(**processing), rtol=TOLERANCE)


def test_a_missing_gradient_is_not_shown_to_a_transformer():
    seen = []

    def look(grads_and_vars):
        seen.extend(variable for _, variable in grads_and_vars)
        return grads_and_vars

    first, second = keras.Variable([1.0]), keras.Variable([1.0])
    optimizer = SWA("sgd", gradient_transformers=[look])
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        small.apply(optimizer, [first, second], [None, [1.0]])
    assert len(seen) == 1
    assert seen[0] is second


def test_a_transformer_may_reorder_but_not_lose_pairs():
    variables = [keras.Variable([0.0]), keras.Variable([0.0])]
    backwards = SWA(optimizers.SGD(1.0), gradient_transformers=[lambda pairs: pairs[::-1]])
    small.apply(backwards, variables, [[1.0], [2.0]])
    np.testing.assert_allclose(moved(variables), [1.0, 2.0])

    losing = SWA(optimizers.SGD(1.0), gradient_transformers=[lambda pairs: pairs[1:]])
    with pytest.raises(ValueError, match=r"one \(gradient, variable\) pair for each pair"):
        small.apply(losing, variables, [[1.0], [2.0]])
    np.testing.assert_allclose(moved(variables), [1.0, 2.0])


def test_registered_functions_are_part_of_the_config():
    optimizer = SWA("sgd", gradient_transformers=[doubled], gradient_aggregator=minus_one)

    again = SWA.from_config(optimizer.get_config())

    assert list(again.gradient_transformers) == [doubled]
    assert again.gradient_aggregator is minus_one


def test_a_function_that_is_not_registered_has_no_config():
    optimizer = SWA("sgd", gradient_transformers=[lambda pairs: pairs])
    with pytest.raises(ValueError, match="must be registered"):
        optimizer.get_config()


@pytest.mark.parametrize(
    "wrong", [{"gradient_transformers": doubled}, {"gradient_transformers": [1]}]
)
def test_transformers_that_are_not_a_list_of_functions_are_refused(wrong):
    with pytest.raises(TypeError, match="must be a list of functions"):
        SWA("sgd", **wrong)
    with pytest.raises(TypeError, match="`gradient_aggregator` must be a function"):
        SWA("sgd", gradient_aggregator=3)


def test_clipping_on_the_inner_optimizer_works_too():
    inner = optimizers.SGD(1.0, clipvalue=0.5)
    np.testing.assert_allclose(step((3.0,), inner=inner), [0.5], rtol=TOLERANCE)


def test_gradients_reach_the_inner_optimizer_unchanged_without_functions():
    seen = []

    class Looks(optimizers.SGD):
        def apply(self, grads, trainable_variables=None):
            seen.extend(grads)
            super().apply(grads, trainable_variables)

    gradient = ops.ones((1,))
    SWA(Looks(1.0)).apply([gradient], [keras.Variable([1.0])])
    assert seen[0] is gradient
