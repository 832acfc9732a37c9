"""Tests of what only JAX has: donated buffers, variables without values, functional loops."""

import keras
import numpy as np
import pytest
import small_training as small

import keras_avg
from keras_avg import SWA, MovingAverage

pytestmark = pytest.mark.skipif(keras.backend.backend() != "jax", reason="about JAX")


def buffers(model):
    variables = [*model.variables, *model.optimizer.variables]
    return [v.value.unsafe_buffer_pointer() for v in variables]


@pytest.mark.slow_on("jax")
@pytest.mark.parametrize(
    "optimizer",
    [
        lambda: SWA("sgd", 0, 1),
        lambda: MovingAverage("sgd", average_decay=0.0),
        lambda: SWA(MovingAverage("adam", average_decay=0.0, start_step=3), 0, 1),
    ],
)
def test_no_two_variables_share_a_buffer(optimizer):
    model = small.fit(small.model(optimizer()))
    assert len(set(buffers(model))) == len(buffers(model))

    model.optimizer.assign_average_vars(model.variables)
    assert len(set(buffers(model))) == len(buffers(model))

    zeros = [np.zeros(v.shape, "float32") for v in model.trainable_variables]
    small.apply(model.optimizer, model.trainable_variables, zeros)
    assert len(set(buffers(model))) == len(buffers(model))


@pytest.mark.parametrize(
    "use",
    [
        lambda optimizer: optimizer.num_snapshots,
        lambda optimizer: optimizer.has_average,
        lambda optimizer: optimizer.get_weights(),
        lambda optimizer: optimizer.save_own_variables({}),
        lambda optimizer: optimizer.set_weights([]),
        lambda optimizer: optimizer.load_own_variables({}),
        lambda optimizer: optimizer.average_op(1.0, 2.0),
        lambda optimizer: optimizer.stateless_average(optimizer.variables),
        lambda optimizer: optimizer.iterations,
        lambda optimizer: optimizer.learning_rate,
        lambda optimizer: optimizer.apply([np.zeros(2)], [keras.Variable(np.zeros(2))]),
        lambda optimizer: setattr(optimizer, "lr", 0.1),
        lambda optimizer: optimizer.get_config(),
    ],
)
def test_errors_during_an_epoch_say_how_to_get_the_variables(use):
    errors = []

    class Looks(keras.callbacks.Callback):
        def __init__(self, optimizer):
            super().__init__()
            self.optimizer = optimizer  # Reading `self.model` would sync the state.

        def on_train_batch_end(self, batch, logs=None):
            try:
                use(self.optimizer)
            except RuntimeError as error:
                errors.append(str(error))

    optimizer = SWA("sgd", 0, 1)
    small.fit(small.model(optimizer), epochs=1, callbacks=[Looks(optimizer)])

    assert len(errors) == small.BATCHES
    assert all("model.jax_state_sync()" in error for error in errors)


@pytest.mark.slow_on("jax")
def test_a_scheduled_rate_and_update_batch_norm_say_how_to_get_the_variables():
    errors = []

    class Looks(keras.callbacks.Callback):
        def __init__(self, model):
            super().__init__()
            self.uses = [
                lambda: model.optimizer.lr,
                lambda: keras_avg.update_batch_norm(model, small.X),
            ]

        def on_train_batch_end(self, batch, logs=None):
            for use in self.uses:
                with pytest.raises(RuntimeError, match=r"model\.jax_state_sync\(\)") as caught:
                    use()
                errors.append(caught)

    model = small.model(SWA("sgd", 0, 1, decay=0.1))
    small.fit(model, epochs=1, callbacks=[Looks(model)])
    assert len(errors) == 2 * small.BATCHES


def test_a_functional_loop_averages_the_values_it_is_given():
    import jax

    optimizer = MovingAverage(keras.optimizers.SGD(1.0), average_decay=0.5)
    variable = keras.Variable([0.0], dtype="float32")
    optimizer.build([variable])
    trainable = [jax.numpy.array([4.0])]  # The variable has another value.
    state = [v.value for v in optimizer.variables]
    step = jax.jit(optimizer.stateless_apply)

    for _ in range(2):
        # The value is 3, and then 2.
        trainable, state = step(state, [jax.numpy.array([1.0])], trainable)

    (average,) = optimizer.stateless_average(state)
    np.testing.assert_allclose(average, [0.5 * (0.5 * 4 + 0.5 * 3) + 0.5 * 2])
    assert small.numpy(variable)[0] == 0.0
    assert step._cache_size() == 1


class TestAnErrorBeforeTheFirstStep:
    """Keras takes the values away before it traces the step.

    After an error it restores the values of the last step, but here there was no step.
    """

    def fail(self, optimizer):
        class Fails(keras.Sequential):
            def train_step(self, *args):
                raise KeyError("in the trace")

        model = Fails(small.model().layers)
        model.compile(optimizer, "mse")
        weights = model.get_weights()
        with pytest.raises(KeyError, match="in the trace"):
            small.fit(model)
        return model, weights

    def test_an_error_before_the_first_step_leaves_no_values_without_a_wrapper(
        self,
    ):
        model, _ = self.fail("sgd")
        assert all(variable._value is None for variable in model.trainable_variables)

    def test_an_error_before_the_first_step_leaves_all_values_with_a_wrapper(self):
        model, weights = self.fail(SWA("sgd"))
        small.assert_same_bits(model.get_weights(), weights)
        assert model.optimizer.num_snapshots == 0
