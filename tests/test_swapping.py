"""Swaps exchange the raw and the averaged values in the model, and no bit is lost."""

import math

import keras
import numpy as np
import pytest
import small_training as small
from keras import optimizers

import keras_avg
from keras_avg import SWA, MovingAverage

sees_compiled_steps = pytest.mark.skipif(
    keras.backend.backend() == "torch", reason="torch runs Python at each step"
)


def trained(optimizer=None, **arguments):
    optimizer = optimizer or SWA(optimizers.Adam(0.01), 0, 2)
    return small.fit(small.model(optimizer), epochs=1, **arguments)


def trainable(model):
    return [small.numpy(v) for v in model.trainable_variables]


def wide_variable():
    """Weights of all magnitudes. A swap by addition and subtraction would change half of them."""
    signs = np.random.default_rng(0).choice([-1.0, 1.0], size=4000)
    return keras.Variable(np.geomspace(1e-8, 1e8, 4000) * signs, dtype="float32")


def test_a_swap_puts_averages_in_and_a_second_swap_restores_raw_weights():
    optimizer, variable = MovingAverage(optimizers.SGD(2.0), average_decay=0.5), None
    variable = keras.Variable([1.0], dtype="float32")
    small.apply(optimizer, [variable], [[0.1]])  # The variable is 0.8, and the average is 0.9.

    optimizer.swap_weights()
    assert optimizer.averages_in_model
    np.testing.assert_allclose(variable, [0.9])

    optimizer.swap_weights()
    assert not optimizer.averages_in_model
    np.testing.assert_allclose(variable, [0.8])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_swaps_restore_every_bit_of_weights_of_all_magnitudes(dtype):
    variable = keras.Variable(wide_variable(), dtype=dtype)
    optimizer = MovingAverage(optimizers.SGD(1.0), average_decay=0.9)
    gradient = np.random.default_rng(1).normal(size=4000) * 1e3
    small.apply(optimizer, [variable], [gradient])
    raw, average = small.numpy(variable), small.numpy(optimizer.get_slot(variable, "average"))

    optimizer.swap_weights()
    swapped = small.numpy(variable)
    optimizer.swap_weights()

    np.testing.assert_array_equal(swapped, average.astype(raw.dtype))
    np.testing.assert_array_equal(small.numpy(variable), raw)
    np.testing.assert_array_equal(optimizer.get_slot(variable, "average"), average)


def test_a_swap_takes_no_trip_through_numpy(monkeypatch):
    variable = wide_variable()
    optimizer = MovingAverage(optimizers.SGD(1.0), average_decay=0.9)
    small.apply(optimizer, [variable], [np.ones(4000)])
    sizes = []
    convert = keras.ops.convert_to_numpy
    monkeypatch.setattr(
        "keras.ops.convert_to_numpy", lambda x: (sizes.append(math.prod(x.shape)), convert(x))[1]
    )
    optimizer.swap_weights()
    optimizer.swap_weights()
    assert max(sizes, default=0) <= 1  # counters
    keras.ops.convert_to_numpy(variable.value)
    assert sizes[-1] == 4000


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="only JAX variables keep arrays")
def test_raw_weights_come_back_in_the_buffer_that_they_had():
    variable = wide_variable()
    optimizer = MovingAverage(optimizers.SGD(1.0), average_decay=0.9)
    small.apply(optimizer, [variable], [np.ones(4000)])

    def buffers():
        average = optimizer.get_slot(variable, "average")
        return [v.value.unsafe_buffer_pointer() for v in (variable, average)]

    raw, average = buffers()
    optimizer.swap_weights()
    shown, kept = buffers()
    assert kept == average
    assert shown not in (raw, average)  # a compiled step gives both away
    optimizer.swap_weights()
    assert buffers() == [raw, average]


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="counts operations of torch")
def test_a_swap_in_and_back_writes_three_copies():
    from torch.utils._python_dispatch import TorchDispatchMode

    variable = wide_variable()
    optimizer = MovingAverage(optimizers.SGD(1.0), average_decay=0.9)
    small.apply(optimizer, [variable], [np.ones(4000)])
    written = []

    class Writes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            result = function(*arguments, **(keywords or {}))
            name = function.overloadpacket.__name__
            if name in ("clone", "copy_", "_to_copy"):
                written.append(result.numel())
            elif name == "_foreach_copy_":
                written.extend(target.numel() for target in arguments[0])
            return result

    with Writes():
        optimizer.swap_weights()
        optimizer.swap_weights()
    assert written.count(4000) == 3


def test_nan_and_infinity_survive_a_swap():
    variable = keras.Variable([1.0, 2.0, 3.0], dtype="float32")
    optimizer = SWA(optimizers.SGD(1.0), 0, 1)
    small.apply(optimizer, [variable], [[0.0, 0.0, 0.0]])
    variable.assign([np.nan, np.inf, -0.0])
    raw = small.numpy(variable)

    with optimizer.average_weights():
        np.testing.assert_array_equal(variable, [1.0, 2.0, 3.0])

    assert small.numpy(variable).tobytes() == raw.tobytes()


@pytest.mark.slow_on("tensorflow")
def test_the_context_puts_raw_weights_back_after_an_exception():
    model = trained()
    raw = trainable(model)

    def fail():
        with model.optimizer.average_weights():
            averages = small.slots(model.optimizer, model.trainable_variables)
            small.assert_same_bits(trainable(model), averages)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not model.optimizer.averages_in_model
    small.assert_same_bits(trainable(model), raw)


@pytest.mark.slow_on("tensorflow")
def test_statistics_computed_in_the_context_are_swapped_out_with_the_averages(tmp_path):
    model = trained()
    raw = model.get_weights()
    with model.optimizer.average_weights():
        keras_avg.update_batch_norm(model, small.X)
        recomputed = model.get_weights()
        keras_avg.update_batch_norm(model, small.X)
        model.save(tmp_path / "model.keras")
    small.assert_same_bits(model.get_weights(), raw)

    loaded = keras.saving.load_model(tmp_path / "model.keras")
    small.assert_same_bits(loaded.get_weights(), recomputed)
    keras_avg.update_batch_norm(loaded, 2 * small.X)
    loaded.optimizer.swap_weights()
    small.assert_same_bits(loaded.get_weights(), raw)


@pytest.mark.slow_on("jax", "tensorflow")
def test_statistics_of_a_model_that_lost_its_raw_weights_can_be_computed():
    model, other = trained(), trained()
    model.optimizer.swap_weights()
    other.optimizer.set_weights(model.optimizer.get_weights())
    keras_avg.update_batch_norm(other, small.X)
    assert other.optimizer.averages_in_model


def test_the_context_keeps_raw_weights_that_were_put_back_inside_it():
    model = trained()
    raw = trainable(model)
    with model.optimizer.average_weights():
        model.optimizer.swap_weights()
    assert not model.optimizer.averages_in_model
    small.assert_same_bits(trainable(model), raw)


@pytest.mark.slow_on("tensorflow")
def test_the_context_keeps_averages_that_were_in_the_model_before():
    model = trained()
    model.optimizer.swap_weights()
    with model.optimizer.average_weights():
        assert model.optimizer.averages_in_model
    assert model.optimizer.averages_in_model


@pytest.mark.slow_on("jax", "tensorflow")
@pytest.mark.sample(1)
@pytest.mark.parametrize(
    "optimizer",
    [lambda: SWA(optimizers.Adam(0.01), 1, 2), lambda: MovingAverage(optimizers.Adam(0.01))],
)
def test_evaluating_the_averages_does_not_change_training(optimizer):
    undisturbed, looked_at = small.model(optimizer()), small.model(optimizer())
    for _ in range(3):
        small.fit(undisturbed, epochs=1)
        small.fit(looked_at, epochs=1)
        with looked_at.optimizer.average_weights():
            looked_at.evaluate(small.X, small.Y, verbose=0)
            looked_at.predict(small.X, verbose=0)

    small.assert_same_bits(looked_at.get_weights(), undisturbed.get_weights())
    small.assert_same_bits(looked_at.optimizer.get_weights(), undisturbed.optimizer.get_weights())


@pytest.mark.slow_on("jax")
def test_a_swap_before_the_first_snapshot_is_refused():
    model = trained(SWA("sgd", start_averaging=100))
    raw = trainable(model)
    with pytest.raises(ValueError, match=r"no snapshot yet.*Received: 6 updates"):
        model.optimizer.swap_weights()
    assert not model.optimizer.averages_in_model
    small.assert_same_bits(trainable(model), raw)


class TestTrainingWhileSwapped:
    def test_eager_training_while_swapped_is_refused(self):
        variable = keras.Variable([1.0])
        optimizer = SWA(optimizers.SGD(1.0), 0, 1)
        small.apply(optimizer, [variable], [[1.0]])
        optimizer.swap_weights()
        with pytest.raises(RuntimeError, match="so training is refused"):
            small.apply(optimizer, [variable], [[1.0]])
        assert int(optimizer.iterations) == 1

    @pytest.mark.slow_on("tensorflow")
    def test_training_while_swapped_is_refused_when_the_step_is_traced(self):
        model = trained()
        raw = trainable(model)
        model.optimizer.swap_weights()
        model.compile(model.optimizer, "mse")  # The compiled step is dropped.
        averages, state = trainable(model), model.optimizer.get_weights()

        with pytest.raises(RuntimeError, match="so training is refused"):
            small.fit(model)

        small.assert_same_bits(trainable(model), averages)
        small.assert_same_bits(model.optimizer.get_weights(), state)
        model.optimizer.swap_weights()
        small.assert_same_bits(trainable(model), raw)

    @pytest.mark.parametrize("swap", [lambda m: m.optimizer.swap_weights(), keras_avg.swap_weights])
    def test_training_while_swapped_is_refused_if_the_step_was_compiled_before(self, swap):
        model = trained()
        compiled, raw = model.train_function, trainable(model)
        swap(model)
        averages, state = model.get_weights(), model.optimizer.get_weights()
        for train in (small.fit, lambda m: m.train_on_batch(small.X[:8], small.Y[:8])) * 2:
            with pytest.raises(RuntimeError, match=r"`keras_avg.swap_weights\(model\)`"):
                train(model)
        small.assert_same_bits(model.get_weights(), averages)  # These include the statistics.
        small.assert_same_bits(model.optimizer.get_weights(), state)

        swap(model)
        assert model.train_function is compiled
        small.assert_same_bits(trainable(model), raw)
        small.fit(model, epochs=1)

    @pytest.mark.parametrize("eagerly", [False, True])
    def test_a_loaded_model_that_never_trained_refuses_training_and_keeps_its_statistics(
        self, eagerly, tmp_path
    ):
        model = trained()
        keras_avg.swap_weights(model)
        model.save_weights(tmp_path / "m.weights.h5")
        loaded = small.model(SWA(optimizers.Adam(0.01), 0, 2))
        loaded.run_eagerly = eagerly
        loaded.optimizer.build(loaded.trainable_variables)
        loaded.load_weights(tmp_path / "m.weights.h5")
        before = loaded.get_weights()

        with pytest.raises(RuntimeError, match="so training is refused"):
            small.fit(loaded, epochs=1)

        small.assert_same_bits(loaded.get_weights(), before)
        keras_avg.swap_weights(loaded)
        small.fit(loaded, epochs=1)

    @pytest.mark.parametrize("eagerly", [False, True])
    def test_a_swapped_model_that_is_compiled_again_refuses_training_and_keeps_its_statistics(
        self, eagerly
    ):
        model = trained()
        keras_avg.swap_weights(model)
        model.compile(model.optimizer, "mse", run_eagerly=eagerly)
        before = model.get_weights()

        for train in (small.fit, lambda m: m.train_on_batch(small.X[:8], small.Y[:8])):
            with pytest.raises(RuntimeError, match="so training is refused"):
                train(model)
            small.assert_same_bits(model.get_weights(), before)

        keras_avg.swap_weights(model)
        small.fit(model, epochs=1)
        assert "make_train_function" not in vars(model)

    @pytest.mark.slow_on("tensorflow")
    @pytest.mark.parametrize(
        "is_traced_again", [False, pytest.param(True, marks=sees_compiled_steps)]
    )
    def test_the_averages_stay_in_a_model_whose_last_step_was_one_batch(self, is_traced_again):
        model = trained()
        model.train_on_batch(small.X[:8], small.Y[:8])
        raw = trainable(model)
        keras_avg.swap_weights(model)
        state = [*model.get_weights(), *model.optimizer.get_weights()]
        if is_traced_again:
            model.train_function = None

        with pytest.raises(RuntimeError, match="so training is refused"):
            small.fit(model)

        small.assert_same_bits([*model.get_weights(), *model.optimizer.get_weights()], state)
        keras_avg.swap_weights(model)
        small.assert_same_bits(trainable(model), raw)

    @pytest.mark.slow_on("tensorflow")
    def test_a_batch_that_is_refused_in_a_callback_changes_nothing(self):
        class Tries(keras.callbacks.Callback):
            def on_epoch_end(self, epoch, logs=None):
                before = self.model.get_weights()
                with pytest.raises(RuntimeError, match="so training is refused"):
                    self.model.train_on_batch(small.X[:8], small.Y[:8])
                small.assert_same_bits(self.model.get_weights(), before)

        model = small.model(SWA(optimizers.Adam(0.01), 0, 2))
        small.fit(model, epochs=1, callbacks=[keras_avg.callbacks.SwapAverageWeights(), Tries()])
        assert model.optimizer.averages_in_model
        small.assert_same_bits(trainable(model), list(map(small.numpy, model.optimizer.averages())))

    @pytest.mark.slow_on("jax", "tensorflow")
    def test_a_second_fit_without_the_callback_is_refused(self):
        model = small.model(SWA(optimizers.Adam(0.01), 0, 2))
        small.fit(model, epochs=1, callbacks=[keras_avg.callbacks.SwapAverageWeights()])
        averages, updates = model.get_weights(), int(model.optimizer.iterations)
        with pytest.raises(RuntimeError, match=r"`keras_avg.assign_average_vars\(model\)`"):
            small.fit(model, epochs=1)
        assert int(model.optimizer.iterations) == updates
        small.assert_same_bits(model.get_weights(), averages)
        keras_avg.assign_average_vars(model)
        small.fit(model, epochs=1)
        assert int(model.optimizer.iterations) == 2 * updates

    @pytest.mark.slow_on("tensorflow")
    @sees_compiled_steps
    def test_hidden_training_while_swapped_is_found_at_the_end_of_each_fit(self):
        model = trained()
        compiled, raw = model.train_function, trainable(model)
        model.optimizer.swap_weights()
        model.train_function = compiled

        for updates in (6, 12):
            with pytest.raises(RuntimeError, match=f"{updates} updates since they were put in"):
                small.fit(model, epochs=1)

        model.optimizer.swap_weights()
        small.assert_same_bits(trainable(model), raw)

    @sees_compiled_steps
    def test_hidden_training_while_swapped_is_found_when_a_file_is_saved(self, tmp_path):
        model = small.model(SWA(optimizers.Adam(0.01), 0, 2))
        model.train_on_batch(small.X[:8], small.Y[:8])
        compiled = model.train_function
        model.optimizer.swap_weights()
        model.train_function = compiled
        model.train_on_batch(small.X[:8], small.Y[:8])
        for _ in range(2):
            with pytest.raises(RuntimeError, match="1 updates since they were put in"):
                model.save_weights(tmp_path / "mixed.weights.h5")

    @pytest.mark.slow_on("jax", "tensorflow")
    @sees_compiled_steps
    def test_training_by_another_wrapper_while_swapped_is_found_at_the_end_of_fit(self):
        model = trained(SWA(optimizers.Adam(0.01), 0, 2))
        first, second = model.optimizer, SWA(optimizers.Adam(0.01), 0, 2)
        model.compile(second, "mse")
        small.fit(model, epochs=1)
        compiled, raw = model.train_function, trainable(model)
        first.swap_weights()
        with pytest.raises(RuntimeError, match="averages of 'SWA', so training is refused"):
            small.fit(model, epochs=1)
        model.train_function = compiled
        with pytest.raises(RuntimeError, match="trained by 'SWA' while it held the averages of"):
            small.fit(model, epochs=1)
        first.swap_weights()
        small.assert_same_bits(trainable(model), raw)

    def test_the_inner_wrapper_cannot_train_while_the_outer_one_is_swapped(self):
        model = trained(SWA(MovingAverage("sgd"), 0, 1))
        swa, moving_average = keras_avg.averaging_optimizers(model)
        with swa.average_weights():
            zeros = [np.zeros(v.shape) for v in model.trainable_variables]
            with pytest.raises(RuntimeError, match="averages of 'SWA', so training is refused"):
                small.apply(moving_average, model.trainable_variables, zeros)
            with pytest.raises(RuntimeError, match="averages of 'SWA', so assigning"):
                moving_average.assign_average_vars(model.variables)

    def test_assigning_averages_while_swapped_is_refused(self):
        model = trained()
        model.optimizer.swap_weights()
        with pytest.raises(RuntimeError, match="assigning them for good is refused"):
            model.optimizer.assign_average_vars(model.variables)

    def test_a_second_wrapper_cannot_swap_before_the_first_has_swapped_back(self):
        model = trained(SWA(MovingAverage("sgd"), 0, 1))
        swa, moving_average = keras_avg.averaging_optimizers(model)
        swa.swap_weights()
        held = trainable(model)
        with pytest.raises(RuntimeError, match="holds the averages of 'SWA' already"):
            moving_average.swap_weights()
        small.assert_same_bits(trainable(model), held)
        swa.swap_weights()
        moving_average.swap_weights()
        moving_average.swap_weights()


@pytest.mark.slow_on("tensorflow")
def test_a_new_optimizer_starts_from_the_averages_that_another_left_in_the_model():
    model = trained()
    first = model.optimizer
    first.swap_weights()
    second = SWA("sgd", 0, 1)
    model.compile(second, "mse")

    small.fit(model, epochs=1)
    raw = trainable(model)
    second.swap_weights()
    second.swap_weights()

    small.assert_same_bits(trainable(model), raw)
    assert first.averages_in_model  # It cannot know that the other optimizer has trained them.


@pytest.mark.skipif(
    not hasattr(optimizers, "MultiOptimizer"), reason="MultiOptimizer came with Keras 3.15"
)
def test_a_new_optimizer_of_a_part_of_the_variables_starts_from_the_averages_of_members():
    rest, kernels = SWA("sgd", 0, 1), SWA("adam", 0, 1)
    members = optimizers.OptimizerMap(rest, {".*kernel": kernels})
    model = small.fit(small.model(optimizers.MultiOptimizer(members)), epochs=1)
    keras_avg.swap_weights(model)
    model.layers[0].trainable = False
    second = SWA("sgd", 0, 1)
    model.compile(second, "mse")
    second.build(model.trainable_variables)  # Some kernels are frozen, and biases are new here.

    small.fit(model, epochs=1)
    assert second.num_snapshots > 0


class TestFilesWrittenWhileSwapped:
    @pytest.mark.slow_on("tensorflow")
    @pytest.mark.sample(2)
    @pytest.mark.parametrize("name", ["model.keras", "model.weights.h5"])
    @pytest.mark.parametrize(
        "optimizer",
        [
            lambda: SWA(MovingAverage(optimizers.Adam(0.01)), 0, 2),
            lambda: optimizers.LossScaleOptimizer(SWA(optimizers.Adam(0.01), 0, 2)),
        ],
        ids=["nested", "under a LossScaleOptimizer"],
    )
    def test_a_file_of_a_swapped_model_holds_both_copies_and_resumes_bit_for_bit(
        self, optimizer, name, tmp_path
    ):
        model = trained(optimizer())
        (wrapper, *_) = keras_avg.averaging_optimizers(model)
        raw, averages = trainable(model), small.slots(wrapper, model.trainable_variables)
        with wrapper.average_weights():
            if name.endswith(".keras"):
                model.save(tmp_path / name)
                loaded = keras.saving.load_model(tmp_path / name)
            else:
                model.save_weights(tmp_path / name)
                loaded = small.model(optimizer())
                loaded.optimizer.build(loaded.trainable_variables)
                loaded.load_weights(tmp_path / name)

        (other, *_) = keras_avg.averaging_optimizers(loaded)
        assert other.averages_in_model
        small.assert_same_bits(trainable(loaded), averages)
        other.swap_weights()
        small.assert_same_bits(trainable(loaded), raw)
        for each in (model, loaded):
            small.fit(each)
        small.assert_same_bits(loaded.get_weights(), model.get_weights())
        small.assert_same_bits(
            [small.numpy(v) for v in loaded.optimizer.variables],
            [small.numpy(v) for v in model.optimizer.variables],
        )

    def test_a_file_of_a_swapped_model_holds_low_precision_raw_weights(
        self, tmp_path, dtype_policy
    ):
        dtype_policy("bfloat16")
        model = trained()
        raw = trainable(model)
        with model.optimizer.average_weights():
            model.save(tmp_path / "model.keras")

        loaded = keras.saving.load_model(tmp_path / "model.keras")
        loaded.optimizer.swap_weights()

        small.assert_same_bits(trainable(loaded), raw)

    def test_a_file_with_raw_weights_ends_a_swap(self, tmp_path):
        model = trained()
        model.save_weights(tmp_path / "raw.weights.h5")
        raw = trainable(model)
        model.optimizer.swap_weights()

        model.load_weights(tmp_path / "raw.weights.h5")

        assert not model.optimizer.averages_in_model
        small.assert_same_bits(trainable(model), raw)
        small.fit(model)

    def test_raw_weights_of_the_wrong_shape_are_refused(self):
        model = trained()
        model.optimizer.swap_weights()
        store = {}
        model.optimizer.save_own_variables(store)
        before = model.optimizer.get_weights()
        store["raw_0"] = np.zeros((2, 2))
        with pytest.raises(ValueError, match="Received: shape"):
            model.optimizer.load_own_variables(store)
        small.assert_same_bits(model.optimizer.get_weights(), before)
        model.optimizer.swap_weights()


class TestCopiesThatLostTheRawWeights:
    def restored(self):
        model = trained()
        model.optimizer.swap_weights()
        copy = model.optimizer.get_weights()
        model.optimizer.swap_weights()
        model.optimizer.set_weights(copy)
        return model

    def test_the_next_swap_and_save_say_that_raw_weights_are_lost(self, tmp_path):
        model = self.restored()
        assert model.optimizer.averages_in_model
        with pytest.raises(RuntimeError, match="does not carry them"):
            model.optimizer.swap_weights()
        with pytest.raises(RuntimeError, match="does not carry them"):
            model.save(tmp_path / "model.keras")

    def test_the_context_says_that_raw_weights_are_lost(self):
        model = self.restored()
        with pytest.raises(RuntimeError, match="does not carry them"):
            model.optimizer.average_weights().__enter__()

    def test_the_next_step_says_that_raw_weights_are_lost(self):
        model = self.restored()
        with pytest.raises(RuntimeError, match="does not carry them"):
            small.fit(model)

    @pytest.mark.slow_on("jax")
    def test_a_state_of_another_update_than_the_raw_weights_is_not_saved(self, tmp_path):
        model = trained()
        model.optimizer.swap_weights()
        copy = model.optimizer.get_weights()
        model.optimizer.swap_weights()
        small.fit(model, epochs=1)
        raw = trainable(model)
        model.optimizer.swap_weights()

        model.optimizer.set_weights(copy)

        with pytest.raises(RuntimeError, match=r"another state restored.*-6 updates"):
            model.save_weights(tmp_path / "mixed.weights.h5")
        model.optimizer.swap_weights()
        small.assert_same_bits(trainable(model), raw)

    @pytest.mark.slow_on("tensorflow")
    @pytest.mark.parametrize("compiled_anew", [False, True])
    def test_restoring_an_unswapped_state_tree_ends_a_swap(self, compiled_anew):
        model = trained()
        raw, tree = trainable(model), model.get_state_tree(value_format="numpy_array")
        model.optimizer.swap_weights()

        model.set_state_tree(tree)
        if compiled_anew:
            model.compile(model.optimizer, "mse")

        small.assert_same_bits(trainable(model), raw)
        small.fit(model, epochs=1)
        assert not model.optimizer.averages_in_model

    def test_another_wrapper_can_swap_after_a_state_was_restored(self):
        model = trained(SWA(MovingAverage("sgd"), 0, 1))
        swa, moving_average = keras_avg.averaging_optimizers(model)
        tree = model.get_state_tree(value_format="numpy_array")
        swa.swap_weights()
        model.set_state_tree(tree)
        moving_average.swap_weights()
        assert moving_average.averages_in_model
        assert not swa.averages_in_model

    def test_restoring_an_unswapped_copy_ends_a_swap(self):
        model = trained()
        weights, copy = model.get_weights(), model.optimizer.get_weights()
        model.optimizer.swap_weights()
        model.set_weights(weights)
        model.optimizer.set_weights(copy)
        assert not model.optimizer.averages_in_model
        small.fit(model)


def test_wrappers_are_found_at_any_depth():
    def model(optimizer):
        return small.model(optimizer)

    inner = MovingAverage("sgd")
    outer = SWA(inner)
    assert keras_avg.averaging_optimizers(model(outer)) == [outer, inner]
    assert (
        keras_avg.averaging_optimizers(model(optimizers.LossScaleOptimizer(SWA(inner))))[1] is inner
    )
    assert keras_avg.averaging_optimizers(model("sgd")) == []
    assert keras_avg.averaging_optimizers(small.model()) == []
    if hasattr(optimizers, "MultiOptimizer"):
        members = optimizers.OptimizerMap(SWA("sgd"), {".*bias": MovingAverage("adam")})
        found = keras_avg.averaging_optimizers(model(optimizers.MultiOptimizer(members)))
        assert {type(f) for f in found} == {SWA, MovingAverage}


def test_averages_are_computed_from_a_functional_state():
    model = trained()
    state = [v.value for v in model.optimizer.variables]

    averages = model.optimizer.stateless_average(state)

    small.assert_same_bits(
        [small.numpy(a) for a in averages], small.slots(model.optimizer, model.trainable_variables)
    )
    with pytest.raises(ValueError, match="Received: a list of 3"):
        model.optimizer.stateless_average(state[:3])
