"""The workers of a ModelAverage start together. Here the workers are threads."""

import gc

import fake_workers
import keras
import numpy as np
import pytest
import small_training as small
from fake_workers import Twin
from keras import ops, optimizers

from keras_avg import ModelAverage


def half_of_square(variable):
    return lambda: ops.sum(variable * variable) / 2


class TestTheFirstGradientsAreThoseOfTheChiefsVariables:
    """The gradient of v^2 / 2 is v. So SGD(0.5) halves the chief's value, 1."""

    def first_step(self, take_step, is_built):
        def work(communicator):
            optimizer = ModelAverage(optimizers.SGD(0.5), communicator=communicator)
            variable = keras.Variable([1.0 + 9.0 * communicator.rank])
            if is_built:
                optimizer.build([variable])
            take_step(optimizer, variable)
            return small.numpy(variable)

        return fake_workers.run(2, work)

    @pytest.mark.parametrize("is_built", [True, False])
    @pytest.mark.parametrize("call", ["minimize", "get_updates"])
    def test_a_step_from_a_loss_starts_from_the_chiefs_variables(self, call, is_built):
        def take_step(optimizer, variable):
            getattr(optimizer, call)(half_of_square(variable), [variable])

        np.testing.assert_array_equal(self.first_step(take_step, is_built), [[0.5], [0.5]])

    def test_a_step_with_a_function_for_variables_starts_from_the_chiefs_variables(self):
        def take_step(optimizer, variable):
            optimizer.minimize(half_of_square(variable), lambda: [variable])

        np.testing.assert_array_equal(self.first_step(take_step, is_built=True), [[0.5], [0.5]])


@pytest.mark.skipif(not hasattr(optimizers, "ScheduleFreeAdamW"), reason="of a later Keras")
@pytest.mark.parametrize("inner_state", ["keep", "average", "reset"])
def test_slots_that_begin_with_the_variable_begin_with_the_chiefs_variable(inner_state):
    def work(communicator):
        inner = optimizers.ScheduleFreeAdamW()
        optimizer = ModelAverage(inner, inner_state=inner_state, communicator=communicator)
        variable = keras.Variable([1.0 + communicator.rank])
        optimizer.build([variable])
        optimizer.start_together()
        return [small.numpy(optimizer.get_slot(variable, n)) for n in ("momentum", "velocity")]

    np.testing.assert_array_equal(fake_workers.run(2, work), [[[1.0], [0.0]]] * 2)


@pytest.mark.parametrize("call", ["start_together", "meet"])
@pytest.mark.parametrize("variables", [None, []], ids=["not built", "built for none"])
def test_workers_without_variables_cannot_meet(call, variables):
    def work(communicator):
        optimizer = ModelAverage("sgd", communicator=communicator)
        if variables is not None:
            optimizer.build(variables)
        with pytest.raises(ValueError, match=rf"`{call}` has none.*Call `optimizer.build"):
            getattr(optimizer, call)()

    fake_workers.run(2, work)


def test_workers_that_load_the_state_of_a_failed_round_do_not_take_the_chiefs_variables():
    twin, variable = Twin(), keras.Variable([1.0])
    optimizer = ModelAverage("sgd", interval_steps=1, communicator=twin)
    optimizer.build([variable])
    optimizer.start_together()
    twin.is_lost = True
    with pytest.raises(RuntimeError, match="lost"):
        small.apply(optimizer, [variable], [[1.0]])
    state = optimizer.get_weights()
    assert optimizer.num_snapshots == 0

    def again(communicator):
        optimizer = ModelAverage("sgd", interval_steps=1, communicator=communicator)
        variable = keras.Variable([1.0 + communicator.rank])
        optimizer.build([variable])
        optimizer.set_weights(state)
        optimizer.start_together()
        return small.numpy(variable)

    np.testing.assert_array_equal(fake_workers.run(2, again), [[1.0], [2.0]])


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="others decide in compiled code")
def test_a_step_without_a_round_reads_no_number_from_the_device(monkeypatch):
    import torch

    gc.collect()  # While other models hold averages, each step reads their flags.
    reads = []

    def counting(name, original):
        def counted(tensor, *args, **kwargs):
            reads.append(name)
            return original(tensor, *args, **kwargs)

        return counted

    for name in ("__bool__", "__index__", "__int__", "cpu", "item", "numpy", "tolist"):
        monkeypatch.setattr(torch.Tensor, name, counting(name, getattr(torch.Tensor, name)))

    optimizer = ModelAverage(optimizers.SGD(0.5), communicator=Twin())
    variables, grads = [keras.Variable([1.0])], [ops.ones(1)]
    optimizer.apply(grads, variables)
    reads.clear()
    for _ in range(3):
        optimizer.apply(grads, variables)
    assert not reads
