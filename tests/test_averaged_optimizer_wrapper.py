"""What all wrappers share: constructor, clock, slots, forwarding, and rules of users."""

import keras
import numpy as np
import pytest
import small_training as small
from keras import ops, optimizers

from keras_avg import SWA, AveragedOptimizerWrapper, Lookahead, ModelAverage, MovingAverage

TOLERANCE = 1e-6  # rounding of a few float32 operations on numbers of order 1

has_multi_optimizer = pytest.mark.skipif(
    not hasattr(optimizers, "MultiOptimizer"), reason="MultiOptimizer came with Keras 3.15"
)


@keras.saving.register_keras_serializable(package="keras_avg_tests")
class EveryOther(AveragedOptimizerWrapper):
    def is_due(self, step):
        return ops.equal(ops.mod(step, 2), 1)

    def value_weight(self, step):
        return 0.25


@keras.saving.register_keras_serializable(package="keras_avg_tests")
class RunningMaximum(AveragedOptimizerWrapper):
    def average_op(self, var, average_var):
        return ops.maximum(ops.convert_to_tensor(var), ops.convert_to_tensor(average_var))


def variable_of(value, dtype="float32"):
    return keras.Variable(value, dtype=dtype)


LARGEST = 2**31 - 1  # the largest number of steps in int32


class TestConstructor:
    @pytest.mark.slow_on("jax", "tensorflow")
    @pytest.mark.parametrize(
        "wrapper",
        [
            lambda steps: SWA("sgd", start_averaging=steps),
            lambda steps: SWA("sgd", average_period=steps),
            lambda steps: MovingAverage("sgd", start_step=steps, dynamic_decay=True),
            lambda steps: MovingAverage("sgd", average_period=steps),
            lambda steps: Lookahead("sgd", sync_period=steps),
            lambda steps: ModelAverage("sgd", interval_steps=steps),
            lambda steps: ModelAverage("sgd", start_step=steps),
        ],
    )
    def test_step_arguments_must_fit_into_int32(self, wrapper):
        small.fit(small.model(wrapper(LARGEST)), epochs=1)
        with pytest.raises(ValueError, match=r"< 2\*\*31.*Received: \w+=2147483648"):
            wrapper(LARGEST + 1)

    def test_none_as_optimizer_is_a_type_error(self):
        with pytest.raises(TypeError, match="Received: optimizer=None"):
            SWA(None)

    def test_the_base_class_cannot_be_constructed(self):
        with pytest.raises(TypeError, match="does not say how to average"):
            AveragedOptimizerWrapper("sgd")

    @pytest.mark.parametrize(
        "identifier",
        [
            "adam",
            optimizers.Adam(0.01),
            {"class_name": "Adam", "config": {"learning_rate": 0.01}},
        ],
        ids=["name", "instance", "config"],
    )
    def test_each_form_in_which_keras_takes_an_optimizer_is_accepted(self, identifier):
        before = str(identifier)

        optimizer = SWA(identifier)

        assert isinstance(optimizer.inner_optimizer, optimizers.Adam)
        assert isinstance(optimizer, optimizers.Optimizer)
        assert str(identifier) == before

    def test_a_loss_scale_optimizer_inside_is_refused(self):
        with pytest.raises(ValueError, match=r"LossScaleOptimizer\(SWA\(...\)\)"):
            SWA(optimizers.LossScaleOptimizer(optimizers.SGD()))

    @pytest.mark.parametrize(
        "argument",
        ["weight_decay", "use_ema", "gradient_accumulation_steps"],
    )
    def test_arguments_of_the_inner_optimizer_are_refused(self, argument):
        with pytest.raises(ValueError, match="set it on the inner optimizer"):
            SWA("sgd", **{argument: 2})

    def test_an_unknown_argument_is_refused_as_in_keras(self):
        with pytest.raises(ValueError, match=r"Argument\(s\) not recognized: {'typo': 1}"):
            SWA("sgd", typo=1)

    def test_a_refused_argument_changes_nothing(self):
        inner = optimizers.SGD(optimizers.schedules.CosineDecay(0.5, 10))
        before = inner.get_config()
        with pytest.raises(ValueError, match="schedule already"):
            SWA(inner, decay=0.1)
        with pytest.raises(ValueError, match="Pass one of them"):
            SWA(inner, lr=1.0, learning_rate=1.0)
        assert inner.get_config() == before

    @pytest.mark.parametrize("wrong", [True, "x", [], float("inf"), -1])
    def test_a_decay_that_is_no_number_is_refused(self, wrong):
        with pytest.raises(ValueError, match=r"`decay` must be a number >= 0\. Received: decay="):
            SWA("sgd", decay=wrong)

    @pytest.mark.parametrize("wrong", [True, "x", [], float("nan")])
    def test_a_learning_rate_that_is_no_number_is_refused(self, wrong):
        with pytest.raises(ValueError, match=r"must be a finite number.*Received: "):
            SWA("sgd", lr=wrong)

    def test_learning_rate_and_decay_are_set_on_the_inner_optimizer(self):
        assert float(SWA("sgd", lr=0.25).inner_optimizer.learning_rate) == 0.25

        optimizer = SWA("sgd", learning_rate=0.5, decay=0.1)

        variable = variable_of([0.0])
        small.apply(optimizer, [variable], [[-1.0]], times=2)
        np.testing.assert_allclose(variable, [0.5 + 0.5 / 1.1], rtol=TOLERANCE)
        config = optimizer.get_config()
        assert not {"lr", "learning_rate", "decay"} & set(config)

    @pytest.mark.parametrize("wrong", ["a/b", "", 3])
    def test_a_malformed_name_is_refused(self, wrong):
        with pytest.raises(ValueError, match="`name` must be"):
            SWA("sgd", name=wrong)

    def test_averages_need_a_float_dtype(self):
        with pytest.raises(ValueError, match="average_dtype='int32'"):
            SWA("sgd", average_dtype="int32")

    @has_multi_optimizer
    def test_a_multi_optimizer_whose_members_accumulate_is_refused(self):
        members = optimizers.OptimizerMap(optimizers.Adam(gradient_accumulation_steps=2), {})
        with pytest.raises(ValueError, match="Wrap the members instead"):
            SWA(optimizers.MultiOptimizer(members))

    def test_an_optimizer_built_for_other_variables_is_refused(self):
        inner = optimizers.SGD()
        inner.build([variable_of([1.0])])
        with pytest.raises(ValueError, match="built for other variables"):
            SWA(inner).build([variable_of([2.0])])


class TestRulesOfOnesOwn:
    def test_two_methods_are_enough_for_a_rule(self):
        optimizer, variable = EveryOther(optimizers.SGD(1.0)), variable_of([0.0])

        small.apply(optimizer, [variable], [[-1.0]], times=5)  # the variable is 1, 2, 3, 4, 5

        assert optimizer.num_snapshots == 2
        expected = 0.75 * (0.25 * 2) + 0.25 * 4
        np.testing.assert_allclose(optimizer.get_slot(variable, "average"), [expected])

    def test_average_op_alone_is_enough_for_a_rule(self):
        optimizer, variable = RunningMaximum(optimizers.SGD(1.0)), variable_of([0.0])
        for gradient in (-2.0, 1.0, 1.0):  # the variable is 2, 1, 0
            small.apply(optimizer, [variable], [[gradient]])

        np.testing.assert_array_equal(optimizer.get_slot(variable, "average"), [2.0])
        assert optimizer.num_snapshots == 3

    @pytest.mark.slow_on("jax", "tensorflow")
    @pytest.mark.parametrize("kind", [EveryOther, RunningMaximum])
    def test_rules_of_users_run_in_compiled_code_and_are_saved(self, kind, tmp_path):
        model = small.fit(small.model(kind("adam")))
        model.save(tmp_path / "model.keras")

        loaded = keras.saving.load_model(tmp_path / "model.keras")

        assert type(loaded.optimizer) is kind
        assert loaded.optimizer.num_snapshots == model.optimizer.num_snapshots > 0
        small.assert_same_bits(loaded.optimizer.get_weights(), model.optimizer.get_weights())

    def test_average_op_gives_the_next_value_and_assigns_nothing(self):
        optimizer, variable = SWA(optimizers.SGD(1.0), 0, 1), variable_of([0.0])
        small.apply(optimizer, [variable], [[-1.0]], times=3)  # the average is that of 1, 2, 3
        average = optimizer.get_slot(variable, "average")
        variable.assign([6.0])

        value = optimizer.average_op(variable, average)

        np.testing.assert_allclose(ops.convert_to_numpy(value), [3.0], rtol=TOLERANCE)
        np.testing.assert_allclose(average, [2.0], rtol=TOLERANCE)

    def test_average_op_uses_the_weight_of_the_last_step(self):
        optimizer = MovingAverage(optimizers.SGD(1.0), average_decay=0.9, dynamic_decay=True)
        variable = variable_of([0.0])
        small.apply(optimizer, [variable], [[-1.0]], times=3)

        value = optimizer.average_op(ops.ones((1,)), ops.zeros((1,)))

        np.testing.assert_allclose(ops.convert_to_numpy(value), [9 / 12], rtol=TOLERANCE)


class TestAverages:
    @pytest.mark.slow_on("jax", "tensorflow")
    def test_assigning_averages_does_not_change_variables_without_an_average(self):
        model = small.fit(small.model(SWA("sgd", 0, 1)))
        untrained = [small.numpy(v) for v in model.non_trainable_variables]
        averages = small.slots(model.optimizer, model.trainable_variables)

        model.optimizer.assign_average_vars(model.variables)

        small.assert_same_bits([small.numpy(v) for v in model.trainable_variables], averages)
        small.assert_same_bits([small.numpy(v) for v in model.non_trainable_variables], untrained)

    @pytest.mark.slow_on("tensorflow")
    def test_assigning_averages_to_no_averaged_variable_is_an_error(self):
        model = small.fit(small.model(SWA("sgd", 0, 1)))
        with pytest.raises(ValueError, match="None of the variables has an average"):
            model.optimizer.assign_average_vars(model.non_trainable_variables)

    @pytest.mark.parametrize(
        "use",
        [
            lambda optimizer: optimizer.assign_average_vars([]),
            lambda optimizer: optimizer.get_slot(None, "average"),
            lambda optimizer: optimizer.average_op(0.0, 0.0),
        ],
    )
    def test_averages_cannot_be_used_before_build(self, use):
        optimizer = SWA("sgd")
        assert (optimizer.num_snapshots, optimizer.has_average) == (0, False)
        with pytest.raises(ValueError, match="before it is built"):
            use(optimizer)

    def test_variables_and_averages_stay_independent_after_assigning(self):
        optimizer, variable = MovingAverage(optimizers.SGD(2.0), average_decay=0.5), None
        variable = variable_of([1.0, 2.0])
        small.apply(optimizer, [variable], [[0.1, 0.1]], times=2)
        optimizer.assign_average_vars([variable])
        np.testing.assert_allclose(variable, [0.75, 1.75], rtol=TOLERANCE)
        average = optimizer.get_slot(variable, "average")

        variable.assign_add([1.0, 1.0])
        average.assign_add([3.0, 3.0])

        np.testing.assert_allclose(variable, [1.75, 2.75], rtol=TOLERANCE)
        np.testing.assert_allclose(average, [3.75, 4.75], rtol=TOLERANCE)

    def test_get_slot_finds_the_average_and_refuses_unknown_slots(self):
        optimizer, variable = SWA("sgd"), variable_of([1.0])
        optimizer.build([variable])
        assert optimizer.get_slot(variable, "average").shape == variable.shape
        with pytest.raises(ValueError, match="name='momentum'"):
            optimizer.get_slot(variable, "momentum")
        with pytest.raises(ValueError, match="not built with this variable"):
            optimizer.get_slot(variable_of([1.0]), "average")

    @pytest.mark.parametrize(
        ("dtype", "asked", "expected"),
        [
            ("float32", None, "float32"),
            ("float16", None, "float32"),
            ("bfloat16", None, "float32"),
            ("bfloat16", "bfloat16", "bfloat16"),
            ("float32", "float16", "float16"),
        ],
    )
    def test_an_average_has_a_wide_dtype_or_the_one_that_was_asked_for(
        self, dtype, asked, expected
    ):
        optimizer = SWA("sgd", 0, 1, average_dtype=asked)
        variable = variable_of([0.5, 1.5], dtype)

        small.apply(optimizer, [variable], [[0.0, 0.0]])

        average = optimizer.get_slot(variable, "average")
        assert average.dtype == expected
        np.testing.assert_array_equal(small.numpy(average).astype("float32"), [0.5, 1.5])
        optimizer.assign_average_vars([variable])
        assert variable.dtype == dtype

    @pytest.mark.skipif(keras.backend.backend() == "jax", reason="JAX has float64 only with x64")
    def test_float64_averages_have_float64_weights(self):
        optimizer = SWA(optimizers.SGD(1.0), 0, 1)
        variable = variable_of([1.0], "float64")

        small.apply(optimizer, [variable], [[-1.0]], times=2)  # the variable is 2, 3
        small.apply(optimizer, [variable], [[-5.0]])  # the variable is 8

        average = optimizer.get_slot(variable, "average")
        assert average.dtype == "float64"
        np.testing.assert_allclose(average, [13 / 3], rtol=1e-15)

    @pytest.mark.skipif(keras.backend.backend() == "jax", reason="JAX has float64 only with x64")
    @pytest.mark.parametrize("arguments", [{"dynamic_decay": True}, {"start_step": 1}])
    def test_float64_decays_keep_their_digits(self, arguments):
        optimizer = MovingAverage(optimizers.SGD(1.0), average_decay=0.1, **arguments)
        variable = variable_of([0.0], "float64")

        small.apply(optimizer, [variable], [[-1.0]], times=3)  # the variable is 1, 2, 3

        decays = [0.0 if "start_step" in arguments else 0.1, 0.1, 0.1]
        expected = 0.0
        for value, decay in zip([1.0, 2.0, 3.0], decays, strict=True):
            expected = decay * expected + (1 - decay) * value
        np.testing.assert_allclose(optimizer.get_slot(variable, "average"), [expected], rtol=1e-15)

    @pytest.mark.skipif(keras.backend.backend() != "jax", reason="others always have float64")
    def test_float64_averages_on_jax_without_x64_are_refused(self):
        with pytest.raises(ValueError, match="jax_enable_x64"):
            SWA("sgd", average_dtype="float64")

    def test_a_variable_without_a_gradient_is_averaged_too(self):
        optimizer = SWA(optimizers.SGD(1.0), 0, 1)
        moved, still = variable_of([1.0]), variable_of([5.0])

        with pytest.warns(UserWarning, match="Gradients do not exist"):
            small.apply(optimizer, [moved, still], [[-1.0], None])

        np.testing.assert_array_equal(optimizer.get_slot(still, "average"), [5.0])

    def test_a_variable_that_its_gradient_overwrites_has_no_average(self):
        scale, weight = variable_of([1.0]), variable_of([1.0])
        scale.overwrite_with_gradient = True
        optimizer = SWA(optimizers.SGD(1.0), 0, 1, clipvalue=0.5)

        small.apply(optimizer, [scale, weight], [[3.0], [3.0]])

        assert optimizer.get_slot(scale, "average") is None
        np.testing.assert_array_equal(scale, [3.0])
        np.testing.assert_allclose(optimizer.get_slot(weight, "average"), [0.5])

    def test_averages_see_variables_after_constraints(self):
        variable = variable_of([1.0, 1.0])
        variable.constraint = keras.constraints.NonNeg()
        optimizer = SWA(optimizers.SGD(1.0), 0, 1)

        small.apply(optimizer, [variable], [[5.0, 0.5]])

        np.testing.assert_array_equal(optimizer.get_slot(variable, "average"), [0.0, 0.5])


class TestNonFiniteVariables:
    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_one_nonfinite_element_prevents_an_averaging(self, bad):
        optimizer = SWA(optimizers.SGD(1.0), 0, 1, skip_nonfinite=True)
        variables = [variable_of([1.0, 2.0]), variable_of([3.0])]
        small.apply(optimizer, variables, [[0.0, 0.0], [0.0]])
        variables[0].assign([bad, 2.0])
        variables[1].assign([9.0])

        small.apply(optimizer, variables, [[0.0, 0.0], [0.0]])

        assert optimizer.num_snapshots == 1
        small.assert_same_bits(small.slots(optimizer, variables), [[1.0, 2.0], [3.0]])
        variables[0].assign([3.0, 2.0])
        small.apply(optimizer, variables, [[0.0, 0.0], [0.0]])
        assert optimizer.num_snapshots == 2
        small.assert_same_bits(small.slots(optimizer, variables), [[2.0, 2.0], [6.0]])

    @pytest.mark.slow_on("jax", "tensorflow")
    def test_nonfinite_weights_are_not_averaged_in_compiled_training(self):
        model = small.model(MovingAverage(optimizers.SGD(0.01), skip_nonfinite=True))
        small.fit(model, epochs=1)
        before = small.slots(model.optimizer, model.trainable_variables)
        model.get_layer("out").bias.assign([np.nan])

        small.fit(model, epochs=1)

        assert model.optimizer.num_snapshots == small.BATCHES
        small.assert_same_bits(small.slots(model.optimizer, model.trainable_variables), before)


class TestForwarding:
    def test_learning_rate_and_iterations_are_those_of_the_inner_optimizer(self):
        inner = optimizers.SGD(0.5)
        optimizer = SWA(MovingAverage(inner))

        optimizer.lr = 0.25

        assert float(inner.learning_rate) == float(optimizer.learning_rate) == 0.25
        assert optimizer.iterations is inner.iterations
        returned = optimizer.apply_gradients([(ops.ones((1,)), variable_of([1.0]))])
        assert int(returned) == int(inner.iterations) == 1

    @pytest.mark.slow_on("jax", "tensorflow")
    def test_callbacks_can_set_the_learning_rate(self):
        model = small.model(SWA(optimizers.SGD(0.5)))
        schedule = keras.callbacks.LearningRateScheduler(lambda epoch: 0.1 / (epoch + 1))
        small.fit(model, epochs=2, callbacks=[schedule])
        np.testing.assert_allclose(model.optimizer.inner_optimizer.learning_rate, 0.05)

    @pytest.mark.slow_on("jax", "tensorflow")
    @has_multi_optimizer
    def test_callbacks_set_the_learning_rates_of_the_members_of_a_multi_optimizer(self):
        slow, fast = optimizers.SGD(0.01), optimizers.SGD(0.5)
        members = optimizers.OptimizerMap(slow, {".*bias": fast})
        optimizer = SWA(MovingAverage(optimizers.MultiOptimizer(members)))
        halve = keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2)

        small.fit(small.model(optimizer), epochs=2, callbacks=[halve])

        assert optimizer.optimizers == [fast, slow]
        np.testing.assert_allclose([fast.learning_rate, slow.learning_rate], [0.125, 0.0025])

    def test_a_wrapper_without_members_inside_has_no_attribute_optimizers(self):
        assert not hasattr(SWA("sgd"), "optimizers")  # Keras' callbacks use `hasattr` for this.

    def test_the_loss_scale_is_that_of_the_inner_optimizer(self):
        inner = optimizers.SGD(0.5, loss_scale_factor=4.0)
        optimizer = SWA(inner)
        assert optimizer.loss_scale_factor == 4.0
        assert float(optimizer.scale_loss(ops.ones(()))) == 4.0

        optimizer.loss_scale_factor = None

        assert inner.loss_scale_factor is None

    def test_variables_can_be_excluded_from_weight_decay(self):
        optimizer = SWA(optimizers.SGD(0.5, weight_decay=0.5))
        optimizer.exclude_from_weight_decay(var_names=["bias"])
        bias = keras.Variable([1.0], name="bias")
        kernel = keras.Variable([1.0], name="kernel")

        small.apply(optimizer, [bias, kernel], [[0.0], [0.0]])

        np.testing.assert_allclose(bias, [1.0])
        np.testing.assert_allclose(kernel, [0.75])

    def test_use_ema_of_the_inner_optimizer_is_finished_at_the_end_of_fit(self):
        def with_ema():
            return optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5)

        plain, wrapped = small.model(with_ema()), small.model(SWA(with_ema()))

        for model in (plain, wrapped):
            small.fit(model, epochs=1)

        small.assert_same_bits(wrapped.get_weights(), plain.get_weights())

    @pytest.mark.slow_on("jax", "tensorflow")
    def test_use_ema_of_the_inner_optimizer_is_finished_by_each_fit(self):
        """Without a wrapper, a second `fit` fails on JAX, because variables share buffers."""
        model = small.model(SWA(optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5), 0, 2))
        small.fit(model, epochs=1)
        small.fit(model, epochs=1)
        assert int(model.optimizer.iterations) == 2 * small.BATCHES


class TestApply:
    def test_the_first_apply_without_variables_is_refused(self):
        with pytest.raises(ValueError, match="first `apply` needs the variables"):
            SWA("sgd").apply([ops.ones((1,))])

    def test_more_gradients_than_variables_are_refused(self):
        with pytest.raises(ValueError, match="2 gradients for 1 variables"):
            SWA("sgd").apply([ops.ones((1,)), ops.ones((1,))], [variable_of([1.0])])

    def test_apply_without_gradients_takes_no_step(self):
        optimizer = SWA("sgd")
        optimizer.apply([], [])
        assert int(optimizer.iterations) == 0

    @pytest.mark.slow_on("jax", "tensorflow")
    def test_a_model_can_be_trained_twice_after_averages_were_assigned(self):
        """After the assignment no buffer is shared by two variables. JAX could not donate it."""
        for optimizer in (SWA("sgd", 0, 1), MovingAverage("sgd", average_decay=0.0)):
            model = small.fit(small.model(optimizer))
            optimizer.assign_average_vars(model.variables)
            small.fit(small.fit(model))
            assert int(optimizer.iterations) == 6 * small.BATCHES

    @pytest.mark.slow_on("jax", "tensorflow")
    def test_steps_skipped_by_loss_scaling_are_not_averaged(self):
        inner = SWA(optimizers.SGD(0.01), 0, 1)
        optimizer = optimizers.LossScaleOptimizer(inner, initial_scale=2.0**126)

        model = small.fit(small.model(optimizer), epochs=2)

        assert 0 < inner.num_snapshots < 2 * small.BATCHES
        assert inner.num_snapshots == int(inner.iterations)
        assert model.optimizer is optimizer

    @pytest.mark.slow_on("jax", "tensorflow")
    @has_multi_optimizer
    def test_an_average_inside_a_multi_optimizer_counts_its_own_steps(self):
        members = {".*bias": MovingAverage("sgd"), ".*kernel": SWA("adam", 1, 3)}
        optimizer = optimizers.MultiOptimizer(
            optimizers.OptimizerMap(optimizers.SGD(0.01), members)
        )

        model = small.fit(small.model(optimizer))

        assert members[".*bias"].num_snapshots == 2 * small.BATCHES
        assert members[".*kernel"].num_snapshots == 4
        model.get_state_tree()  # It raises if two variables have the same path.

    @pytest.mark.slow_on("jax", "tensorflow")
    def test_a_model_without_input_shape_is_averaged_from_its_first_step(self):
        shaped = small.model(MovingAverage(optimizers.SGD(0.1), average_decay=0.5))
        unshaped = small.model(
            MovingAverage(optimizers.SGD(0.1), average_decay=0.5), with_input_shape=False
        )
        for model in (shaped, unshaped):
            small.fit(model)

        small.assert_same_bits(unshaped.optimizer.get_weights(), shaped.optimizer.get_weights())
