"""A wrapper belongs to one model. It is found by its variables, also with shared layers."""

import keras
import numpy as np
import pytest
import small_training as small
from keras import layers, ops, optimizers

import keras_avg
from keras_avg import SWA, MovingAverage
from keras_avg.callbacks import AverageModelCheckpoint, SwapAverageWeights

has_multi_optimizer = pytest.mark.skipif(
    not hasattr(optimizers, "MultiOptimizer"), reason="MultiOptimizer came with Keras 3.15"
)


def own_loop(optimizer=None, steps=3):
    """A model that is not compiled, and an optimizer that has trained its variables."""
    model, optimizer = small.model(), optimizer or MovingAverage(optimizers.SGD(0.1))
    ones = [np.ones(v.shape) for v in model.trainable_variables]
    small.apply(optimizer, model.trainable_variables, ones, times=steps)
    return model, optimizer


def trainable(model):
    return [small.numpy(v) for v in model.trainable_variables]


class TestStatisticsInALoopOfOnesOwn:
    def test_statistics_of_the_raw_weights_come_back_in_a_custom_loop(self):
        model, optimizer = own_loop()
        raw = model.get_weights()
        with optimizer.average_weights():
            keras_avg.update_batch_norm(model, small.X, verbose=0)
            recomputed = model.get_weights()
        small.assert_same_bits(model.get_weights(), raw)
        assert any(map(np.any, np.subtract(recomputed[4:6], raw[4:6])))

    def test_raw_statistics_come_back_if_an_outer_model_was_updated(self, tmp_path):
        model = small.fit(small.model(SWA(optimizers.Adam(0.01), 0, 2)), epochs=1)
        outer = keras.Sequential([keras.Input((5,)), layers.Rescaling(1.0), model])
        raw = model.get_weights()
        with model.optimizer.average_weights():
            keras_avg.update_batch_norm(outer, small.X, verbose=0)
            recomputed = model.get_weights()
            model.save(tmp_path / "model.keras")
        small.assert_same_bits(model.get_weights(), raw)

        loaded = keras.saving.load_model(tmp_path / "model.keras")
        small.assert_same_bits(loaded.get_weights(), recomputed)
        loaded.optimizer.swap_weights()
        small.assert_same_bits(loaded.get_weights(), raw)

    def test_raw_statistics_come_back_if_a_part_of_the_model_was_updated(self, tmp_path):
        model = small.fit(small.model(SWA(optimizers.Adam(0.01), 0, 2)), epochs=1)
        part = keras.Sequential([keras.Input((5,)), *model.layers[:2]])
        raw = model.get_weights()
        model.optimizer.swap_weights()
        keras_avg.update_batch_norm(part, small.X, verbose=0)
        model.save(tmp_path / "model.keras")
        for each in (model, keras.saving.load_model(tmp_path / "model.keras")):
            each.optimizer.swap_weights()
            small.assert_same_bits(each.get_weights(), raw)


MAKERS = {
    "one wrapper": lambda: SWA("sgd", 0, 1),
    "the inner of two": lambda: SWA(MovingAverage("sgd"), start_averaging=1000),
    "under a LossScaleOptimizer": lambda: optimizers.LossScaleOptimizer(SWA("sgd", 0, 1)),
    "members of a MultiOptimizer": lambda: optimizers.MultiOptimizer(
        optimizers.OptimizerMap(SWA("sgd", 0, 1), {".*bias": MovingAverage("adam")})
    ),
}


def _has(wrapper, variable):
    return any(variable is averaged for averaged in wrapper.averaged_variables)


class TestFunctionsOfAModel:
    def model(self, kind):
        if kind == "members of a MultiOptimizer" and not hasattr(optimizers, "MultiOptimizer"):
            pytest.skip("MultiOptimizer came with Keras 3.15")
        return small.fit(small.model(MAKERS[kind]()), epochs=2)

    def averages(self, model):
        wrappers = [w for w in keras_avg.averaging_optimizers(model) if w.has_average]
        return [
            small.numpy(wrapper.get_slot(v, "average"))
            for v in model.trainable_variables
            for wrapper in wrappers
            if _has(wrapper, v)
        ]

    @pytest.mark.slow_on("tensorflow")
    @pytest.mark.parametrize("kind", MAKERS)
    def test_swap_weights_swaps_the_averages_in_and_out(self, kind):
        model = self.model(kind)
        raw, averages = trainable(model), self.averages(model)
        keras_avg.swap_weights(model)
        small.assert_same_bits(trainable(model), averages)
        keras_avg.swap_weights(model)
        small.assert_same_bits(trainable(model), raw)
        with keras_avg.average_weights(model):
            small.assert_same_bits(trainable(model), averages)
            with keras_avg.average_weights(model):
                pass
            small.assert_same_bits(trainable(model), averages)
        small.assert_same_bits(trainable(model), raw)

    @pytest.mark.slow_on("tensorflow")
    @pytest.mark.sample(4)
    @pytest.mark.parametrize("swapped", [False, True])
    @pytest.mark.parametrize("kind", MAKERS)
    def test_assign_average_vars_assigns_the_averages_for_good(self, kind, swapped):
        model = self.model(kind)
        averages = self.averages(model)
        if swapped:
            keras_avg.swap_weights(model)
        keras_avg.assign_average_vars(model)
        small.assert_same_bits(trainable(model), averages)
        assert not any(w.averages_in_model for w in keras_avg.averaging_optimizers(model))
        small.fit(model, epochs=1)

    @pytest.mark.slow_on("tensorflow")
    @pytest.mark.sample(2)
    @pytest.mark.parametrize("kind", MAKERS)
    def test_the_error_names_functions_that_put_the_raw_weights_back(self, kind, tmp_path):
        model = self.model(kind)
        raw = trainable(model)
        keras_avg.swap_weights(model)
        model.save(tmp_path / "model.keras")
        loaded = keras.saving.load_model(tmp_path / "model.keras")
        for each in (model, loaded):
            with pytest.raises(RuntimeError) as refusal:
                small.fit(each, epochs=1)
            line = "keras_avg.swap_weights(model)"
            assert f"`{line}`" in str(refusal.value)
            assert "`keras_avg.assign_average_vars(model)`" in str(refusal.value)
            eval(line, {"keras_avg": keras_avg, "model": each})
            small.assert_same_bits(trainable(each), raw)
            small.fit(each, epochs=1)
        small.assert_same_bits(trainable(loaded), trainable(model))

    def test_the_wrapper_of_an_uncompiled_model_is_found_by_its_variables(self):
        model, optimizer = own_loop(SWA(MovingAverage("sgd"), start_averaging=100))
        raw, averages = (
            trainable(model),
            small.slots(optimizer.inner_optimizer, model.variables[:1]),
        )
        with keras_avg.average_weights(model):
            assert optimizer.inner_optimizer.averages_in_model
            small.assert_same_bits(trainable(model)[:1], averages)
        small.assert_same_bits(trainable(model), raw)

    def test_several_optimizers_with_averages_of_an_uncompiled_model_are_refused(self):
        model, first = own_loop()
        second = SWA("sgd", 0, 1)
        ones = [np.ones(v.shape) for v in model.trainable_variables]
        small.apply(second, model.trainable_variables, ones)
        raw = trainable(model)
        with pytest.raises(ValueError, match="Several optimizers keep averages"):
            keras_avg.swap_weights(model)
        small.assert_same_bits(trainable(model), raw)
        assert not first.averages_in_model

    @pytest.mark.slow_on("tensorflow")
    @pytest.mark.parametrize(
        "use", [keras_avg.swap_weights, keras_avg.assign_average_vars, lambda m: averages_of(m)]
    )
    def test_a_model_without_averages_is_refused(self, use):
        for model in (small.model(), small.model("sgd")):
            with pytest.raises(ValueError, match="no averaging wrapper of keras_avg is at work"):
                use(model)
        model = small.fit(small.model(SWA(MovingAverage("sgd", average_period=50), 90)), epochs=1)
        with pytest.raises(ValueError, match=r"no snapshot has been taken\. Received: 6 updates"):
            use(model)

    @has_multi_optimizer
    def test_swap_weights_swaps_all_members_or_none(self):
        model = self.model("members of a MultiOptimizer")
        raw, last = trainable(model), keras_avg.averaging_optimizers(model)[-1]
        last.averages = lambda: 1 / 0
        with pytest.raises(ZeroDivisionError):
            keras_avg.swap_weights(model)
        small.assert_same_bits(trainable(model), raw)
        assert not any(w.averages_in_model for w in keras_avg.averaging_optimizers(model))


def averages_of(model):
    with keras_avg.average_weights(model):
        pass


class TwoOptimizers(keras.Model):
    """A model with two optimizers, as a GAN. Its own `train_step` trains a part with each."""

    def __init__(self):
        super().__init__()
        self.first, self.second = layers.Dense(3), layers.Dense(1)
        self.first_optimizer = MovingAverage(optimizers.SGD(0.1), average_decay=0.5)
        self.second_optimizer = optimizers.SGD(0.1)

    def call(self, x):
        return self.second(self.first(x))

    def train_step(self, *args):
        raise NotImplementedError


class TestSeveralOptimizers:
    def model(self):
        keras.utils.set_random_seed(0)
        model = TwoOptimizers()
        model(small.X)
        ones = [np.ones(v.shape) for v in model.first.trainable_variables]
        small.apply(model.first_optimizer, model.first.trainable_variables, ones)
        return model

    def test_wrappers_in_attributes_are_found(self):
        model = self.model()
        assert keras_avg.averaging_optimizers(model) == [model.first_optimizer]
        raw = trainable(model)
        with keras_avg.average_weights(model):
            assert model.first_optimizer.averages_in_model
        small.assert_same_bits(trainable(model), raw)

    def test_the_callback_uses_the_wrapper_that_it_is_given(self):
        model = self.model()
        model.compile(loss="mse")
        raw = trainable(model)
        callback = SwapAverageWeights(optimizer=model.first_optimizer)
        with_averages = model.predict(small.X, verbose=0, callbacks=[callback])
        assert np.any(with_averages != model.predict(small.X, verbose=0))
        small.assert_same_bits(trainable(model), raw)


class TestOneOptimizerInTwoModels:
    """This happens in a loop over folds that makes a new model, but keeps the optimizer."""

    def models(self):
        shared = MovingAverage("sgd")
        first, second = small.model(shared), small.model(shared)
        small.fit(first, epochs=1)
        return first, second

    @pytest.mark.slow_on("tensorflow")
    @pytest.mark.parametrize(
        "use",
        [
            lambda m: small.fit(m, epochs=1),
            lambda m: m.train_on_batch(small.X[:8], small.Y[:8]),
            lambda m: m.evaluate(small.X, small.Y, verbose=0, callbacks=[SwapAverageWeights()]),
            keras_avg.swap_weights,
            keras_avg.assign_average_vars,
            averages_of,
        ],
        ids=["fit", "train_on_batch", "evaluate", "swap", "assign", "context"],
    )
    def test_one_optimizer_in_two_models_is_refused_and_changes_neither(self, use):
        first, second = self.models()
        weights, others = first.get_weights(), trainable(second)
        state = first.optimizer.get_weights()
        with pytest.raises(ValueError, match=r"Unknown variable|was built for other variables"):
            use(second)
        small.assert_same_bits(first.get_weights(), weights)
        small.assert_same_bits(trainable(second), others)
        small.assert_same_bits(first.optimizer.get_weights(), state)
        small.fit(first, epochs=1)

    def test_a_checkpoint_refuses_one_optimizer_in_two_models(self, tmp_path):
        _, second = self.models()
        checkpoint = AverageModelCheckpoint(False, tmp_path / "model.keras")
        with pytest.raises(ValueError, match="was built for other variables"):
            small.fit(second, epochs=1, callbacks=[checkpoint])


class TestALayerThatTwoModelsShare:
    def models(self, first=None, second=None):
        keras.utils.set_random_seed(3)
        shared = layers.Dense(6, activation="tanh")
        inputs = keras.Input((5,))
        hidden = shared(inputs)
        models = [keras.Model(inputs, layers.Dense(1)(hidden)) for _ in range(2)]
        for model, optimizer in zip(models, (first, second), strict=True):
            model.compile(optimizer or SWA(optimizers.SGD(0.1), 0, 1), "mse")
        return models

    def test_training_a_model_is_refused_while_it_holds_averages_of_another(self):
        first, second = self.models()
        small.fit(first, epochs=1, callbacks=[SwapAverageWeights()])
        held, others = first.get_weights(), second.get_weights()
        with pytest.raises(RuntimeError, match="averages of 'SWA', so training is refused"):
            small.fit(second, epochs=1)
        small.assert_same_bits(first.get_weights(), held)
        small.assert_same_bits(second.get_weights(), others)

        keras_avg.swap_weights(first)
        small.fit(second, epochs=1)

    def test_training_is_refused_if_the_second_model_was_compiled_before(self):
        first, second = self.models()
        small.fit(first, epochs=1)
        small.fit(second, epochs=1)
        with first.optimizer.average_weights():
            others = second.get_weights()
            with pytest.raises(RuntimeError, match="averages of 'SWA', so training is refused"):
                small.fit(second, epochs=1)
            small.assert_same_bits(second.get_weights(), others)
        small.fit(second, epochs=1)

    def test_training_the_second_model_is_refused_in_custom_loops(self):
        first, second = self.models()
        one, other = SWA(optimizers.SGD(0.1), 0, 1), SWA(optimizers.SGD(0.1), 0, 1)
        small.apply(
            one, first.trainable_variables, [np.ones(v.shape) for v in first.trainable_variables]
        )
        one.swap_weights()
        with pytest.raises(RuntimeError, match="averages of 'SWA', so training is refused"):
            small.apply(
                other,
                second.trainable_variables,
                [np.ones(v.shape) for v in second.trainable_variables],
            )

    @pytest.mark.slow_on("tensorflow")
    @pytest.mark.parametrize("frozen", [False, True])
    def test_a_model_with_averages_may_be_compiled_again(self, frozen):
        first, _ = self.models()
        small.fit(first, epochs=1, callbacks=[SwapAverageWeights()])
        first.layers[1].trainable = not frozen
        first.compile(SWA(optimizers.SGD(0.1), 0, 1), "mse")
        small.fit(first, epochs=1, callbacks=[SwapAverageWeights()])

    def test_a_deleted_model_does_not_prevent_training(self):
        import gc

        first, second = self.models()
        small.fit(first, epochs=1, callbacks=[SwapAverageWeights()])
        del first
        gc.collect()
        small.fit(second, epochs=1)


def test_swapping_a_model_whose_variables_were_replaced_is_refused():
    model = keras.Sequential([keras.Input((8,)), layers.Dense(4)])
    model.compile(SWA("sgd", 0, 1), "mse")
    model.fit(np.ones((8, 8)), np.ones((8, 4)), verbose=0)
    model.layers[0].quantize("int8")
    with pytest.raises(ValueError, match="as by `quantize`"):
        keras_avg.swap_weights(model)
    assert ops.shape(model.layers[0].kernel) == (8, 4)
