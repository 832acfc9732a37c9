"""Variables can be excluded from averaging, and averages can be read without a swap."""

import warnings

import keras
import numpy as np
import pytest
import small_training as small
from keras import ops, optimizers
from wrappers import WRAPPERS, each_wrapper

import keras_avg
from keras_avg import SWA, Lookahead, MovingAverage

BACKEND = keras.backend.backend()


class TestExclude:
    @pytest.mark.sample(4, jax=1, tensorflow=1)
    @each_wrapper
    def test_an_excluded_variable_has_no_average_and_keeps_its_raw_value(self, wrapper, tmp_path):
        optimizer = WRAPPERS[wrapper].make(optimizers.SGD(0.1), exclude=["bias", "^small/norm/"])
        model = small.fit(small.model(optimizer))
        raw = [small.numpy(v) for v in model.trainable_variables]
        paths = [v.path for v in model.trainable_variables]
        out = [i for i, path in enumerate(paths) if "bias" in path or "/norm/" in path]
        assert 0 < len(out) < len(raw)
        names = list(optimizer.kept)
        for i, variable in enumerate(model.trainable_variables):
            slots = [optimizer.get_slot(variable, name) for name in names]
            assert all((slot is None) == (i in out) for slot in slots)
        optimizer.swap_weights()
        for i, variable in enumerate(model.trainable_variables):
            if i in out:
                np.testing.assert_array_equal(small.numpy(variable), raw[i])
        model.save(tmp_path / "model.keras")
        loaded = keras.saving.load_model(tmp_path / "model.keras")
        for each in (model, loaded):
            each.optimizer.swap_weights()
            small.fit(each, epochs=1)
        small.assert_same_bits(loaded.get_weights(), model.get_weights())
        small.assert_same_bits(loaded.optimizer.get_weights(), model.optimizer.get_weights())

    def test_exclude_is_part_of_the_config(self):
        optimizer = SWA("sgd", exclude=["bias", r"norm/.*"])
        assert SWA.from_config(optimizer.get_config()).exclude == ["bias", r"norm/.*"]

    @pytest.mark.slow_on("jax", "tensorflow")
    def test_exclude_does_not_change_training(self):
        models = [small.fit(small.model(o)) for o in (SWA("adam", exclude=["bias"]), "adam")]
        small.assert_same_bits(*(m.get_weights() for m in models))

    def test_lookahead_does_not_change_an_excluded_variable(self):
        free, pulled = keras.Variable([0.0], name="free"), keras.Variable([0.0], name="pulled")
        optimizer = Lookahead(optimizers.SGD(1.0), 2, 0.5, exclude=["free"])
        small.apply(optimizer, [free, pulled], [[-1.0], [-1.0]], times=2)
        np.testing.assert_array_equal(free, [2.0])
        np.testing.assert_array_equal(pulled, [1.0])

    def test_a_nonfinite_excluded_variable_does_not_prevent_an_averaging(self):
        bad, good = keras.Variable([np.nan], name="bad"), keras.Variable([1.0], name="good")
        optimizer = SWA(optimizers.SGD(1.0), 0, 1, skip_nonfinite=True, exclude=["bad"])
        small.apply(optimizer, [bad, good], [[0.0], [0.0]])
        assert optimizer.num_snapshots == 1

    def test_a_pattern_that_matches_nothing_is_refused_with_the_paths(self):
        model = small.model(SWA("sgd", exclude=["bias", "biais"]))
        with pytest.raises(ValueError, match=r"Received: 'biais'.*small/hidden/kernel"):
            model.optimizer.build(model.trainable_variables)

    def test_excluding_all_variables_is_refused(self):
        model = small.model(SWA("sgd", exclude=["."]))
        with pytest.raises(ValueError, match="leaves 'SWA' no variable to average"):
            model.optimizer.build(model.trainable_variables)

    @pytest.mark.parametrize(
        ("wrong", "error"), [("bias", TypeError), ([1], TypeError), (["("], ValueError)]
    )
    def test_an_argument_that_is_not_a_list_of_patterns_is_refused(self, wrong, error):
        with pytest.raises(error, match="`exclude` must be a list"):
            SWA("sgd", exclude=wrong)

    @pytest.mark.skipif(BACKEND != "tensorflow", reason="about TensorFlow")
    def test_a_native_variable_is_excluded_by_its_name(self):
        import tensorflow as tf

        one, other = tf.Variable([1.0], name="one"), tf.Variable([1.0], name="other")
        optimizer = SWA(optimizers.SGD(1.0), 0, 1, exclude=["^other"])
        optimizer.apply([tf.constant([0.5])] * 2, [one, other])
        assert optimizer.get_slot(other, "average") is None
        np.testing.assert_array_equal(optimizer.get_slot(one, "average"), [0.5])


class TestReadingAverages:
    def trained(self):
        return small.fit(small.model(MovingAverage(optimizers.SGD(0.1), average_decay=0.9)))

    @pytest.mark.slow_on("jax")
    def test_the_model_predicts_with_averages_while_it_holds_raw_weights(self):
        model = self.trained()
        weights, state = model.get_weights(), model.optimizer.get_weights()
        x = ops.convert_to_tensor(small.X)
        with model.optimizer.average_weights():
            expected = ops.convert_to_numpy(model(x, training=False))
        with model.optimizer.reading_averages():
            found = ops.convert_to_numpy(model(x, training=False))
            read = [ops.convert_to_numpy(v.value) for v in model.trainable_variables]
        small.assert_same_bits(read, small.slots(model.optimizer, model.trainable_variables))
        np.testing.assert_array_equal(found, expected)
        assert np.any(ops.convert_to_numpy(model(x, training=False)) != expected)
        small.assert_same_bits(model.get_weights(), weights)
        small.assert_same_bits(model.optimizer.get_weights(), state)
        assert not model.optimizer.averages_in_model

    @pytest.mark.slow_on("jax", "tensorflow")
    def test_assignments_inside_the_context_are_lost(self):
        model = self.trained()
        weights = model.get_weights()
        with model.optimizer.reading_averages():
            # This call changes batch-normalization statistics.
            model(ops.convert_to_tensor(small.X), training=True)
        small.assert_same_bits(model.get_weights(), weights)

    @pytest.mark.skipif(BACKEND == "jax", reason="a compiled JAX step is a function of states")
    @pytest.mark.parametrize("eagerly", [False, True])
    def test_a_teacher_can_be_called_inside_a_train_step(self, eagerly):
        class MeanTeacher(keras.Sequential):
            def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
                loss = super().compute_loss(x, y, y_pred, sample_weight, training)
                if self.optimizer.built:
                    with self.optimizer.reading_averages():
                        targets = self(x, training=False)
                    return loss + 0.0 * ops.mean(targets) + ops.mean((y_pred - targets) ** 2)
                return loss

        optimizer = MovingAverage(optimizers.SGD(0.05), average_decay=0.5)
        model = MeanTeacher(small.model().layers)
        model.compile(optimizer, "mse", run_eagerly=eagerly)
        ones = [np.ones(v.shape) * 1e-3 for v in model.trainable_variables]
        small.apply(optimizer, model.trainable_variables, ones)
        start = [small.numpy(v) for v in model.trainable_variables]
        small.fit(model, epochs=1)
        assert int(optimizer.iterations) == optimizer.num_snapshots == 1 + small.BATCHES
        assert np.any(small.numpy(model.trainable_variables[0]) != start[0])

    @pytest.mark.skipif(BACKEND != "jax", reason="about JAX")
    def test_the_error_in_a_compiled_jax_step_says_what_to_call(self):
        model = self.trained()
        reading = model.optimizer.reading_averages()
        with keras.StatelessScope(), pytest.raises(RuntimeError, match="stateless_call"), reading:
            pass

    @pytest.mark.slow_on("jax")
    @pytest.mark.skipif(BACKEND != "jax", reason="about JAX")
    def test_stateless_call_with_averages_works_in_a_compiled_jax_step(self):
        import jax

        model = self.trained()
        trainable = [v.value for v in model.trainable_variables]
        others = [v.value for v in model.non_trainable_variables]
        state = [v.value for v in model.optimizer.variables]

        @jax.jit
        def teach(trainable, others, state, x):
            averages = model.optimizer.stateless_average(state, trainable)
            return model.stateless_call(averages, others, x, training=False)[0]

        found = teach(trainable, others, state, small.X)
        with model.optimizer.average_weights():
            expected = model.predict(small.X, verbose=0)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.slow_on("jax", "tensorflow")
    def test_reading_averages_before_the_first_snapshot_is_refused(self):
        model = small.fit(small.model(SWA("sgd", start_averaging=100)), epochs=1)
        with pytest.raises(ValueError, match="no snapshot yet"), model.optimizer.reading_averages():
            pass

    @pytest.mark.skipif(BACKEND != "tensorflow", reason="about TensorFlow")
    def test_reading_averages_of_native_variables_is_refused(self):
        import tensorflow as tf

        variable = tf.Variable([1.0])
        optimizer = SWA(optimizers.SGD(1.0), 0, 1)
        optimizer.apply([tf.constant([0.5])], [variable])
        with pytest.raises(ValueError, match="average_weights"), optimizer.reading_averages():
            pass

    @pytest.mark.slow_on("tensorflow")
    def test_reading_averages_swaps_nothing(self):
        model = self.trained()
        with model.optimizer.reading_averages():
            assert not model.optimizer.averages_in_model
        keras_avg.swap_weights(model)
        with model.optimizer.reading_averages():
            pass
        keras_avg.swap_weights(model)


@pytest.mark.slow_on("jax", "tensorflow")
@pytest.mark.sample(4, jax=2, tensorflow=1)
@pytest.mark.parametrize("change", ["freeze", "quantize"])
@pytest.mark.parametrize("exclude", [["hidden/kernel"], ["hidden/kernel", "bias|norm"]], ids=str)
def test_a_model_loads_though_excluded_variables_are_no_longer_trained(tmp_path, change, exclude):
    model = small.fit(small.model(SWA("sgd", 0, 1, exclude=exclude)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of layers that are not quantized, averages that are gone
        if change == "quantize":  # the kernels are trained no more: all that is left is excluded
            model.quantize("int8")
        else:
            model.layers[0].trainable = False
        model.save(tmp_path / "m.keras")
        loaded = keras.saving.load_model(tmp_path / "m.keras")
    found, expected = (m.predict(small.X, verbose=0) for m in (loaded, model))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
