"""What a wrapper asks of the host at each step, on torch, where Python runs at each of them."""

import gc

import keras
import pytest
import small_training as small

import keras_avg

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "torch", reason="others run compiled steps"
)
NEVER = 10**6


def operations_of_a_step(optimizer, number_of_variables):
    """Names of the operations of the second step."""
    from torch.utils._python_dispatch import TorchDispatchMode

    gc.collect()  # A step also asks the swaps of models that other tests have left.
    variables = [keras.Variable([1.0, 2.0]) for _ in range(number_of_variables)]
    gradients = [[0.1, 0.1]] * number_of_variables
    small.apply(optimizer, variables, gradients)
    names = []

    class Records(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            names.append(function.overloadpacket.__name__)
            return function(*arguments, **(keywords or {}))

    with Records():
        small.apply(optimizer, variables, gradients)
    return names


@pytest.mark.parametrize("number", [1, 30])
def test_a_step_on_which_nothing_is_due_adds_one_operation_that_counts_it(number):
    bare = operations_of_a_step(keras.optimizers.SGD(0.1), number)
    idle = operations_of_a_step(keras_avg.SWA("sgd", start_averaging=NEVER), number)
    assert len(idle) - len(bare) == 1
    assert idle.count("add_") == bare.count("add_") + 1


def test_averaging_many_variables_of_a_dtype_takes_one_operation():
    few, many = (
        operations_of_a_step(keras_avg.MovingAverage("sgd", average_decay=0.9), number)
        for number in (2, 30)
    )
    assert few.count("_foreach_lerp_") == many.count("_foreach_lerp_") == 1
    bare_few, bare_many = (operations_of_a_step(keras.optimizers.SGD(0.1), n) for n in (2, 30))
    assert len(many) - len(bare_many) == len(few) - len(bare_few)
