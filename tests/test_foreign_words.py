"""If a user passes an argument of another library, the error says its name here."""

import keras
import numpy as np
import pytest
import small_training as small
from keras import optimizers

from keras_avg import SWA, Lookahead, ModelAverage, MovingAverage

ALL = [SWA, MovingAverage, Lookahead, ModelAverage]


@pytest.mark.parametrize("value", [0.999, 0, None])
def test_decay_is_refused_if_the_rule_has_a_decay_of_its_own(value):
    with pytest.raises(TypeError, match=r"`average_decay`.*Received: decay=.*InverseTimeDecay"):
        MovingAverage("adam", decay=value)


@pytest.mark.parametrize("wrapper", [SWA, Lookahead, ModelAverage])
def test_decay_is_that_of_the_learning_rate_for_all_other_rules(wrapper):
    rate = wrapper("sgd", learning_rate=0.5, decay=0.1).inner_optimizer.get_config()
    assert rate["learning_rate"]["class_name"] == "InverseTimeDecay"


def test_a_config_of_addons_with_decay_in_the_inner_optimizer_is_translated():
    inner = {"class_name": "SGD", "config": {"learning_rate": 1.0, "decay": 1.0}}
    optimizer = MovingAverage.from_config({"optimizer": inner, "average_decay": 0.5})
    small.apply(optimizer, [keras.Variable([1.0])], [[0.0]])
    np.testing.assert_allclose(float(optimizer.learning_rate), 0.5)


@pytest.mark.parametrize(
    ("wrapper", "word", "name"),
    [
        (MovingAverage, "ema_momentum", "average_decay"),
        (MovingAverage, "beta", "average_decay"),
        (MovingAverage, "half_life", r"0\.5 \*\* \(1 / n\)"),
        (MovingAverage, "update_after_step", "`start_step`, in steps"),
        (MovingAverage, "start_averaging", "`start_step`, in steps"),
        (MovingAverage, "update_every", "`average_period`, in steps"),
        (MovingAverage, "use_ema_warmup", "`dynamic_decay`"),
        (SWA, "swa_start", "`start_averaging`, in steps"),
        (SWA, "start", "`start_averaging`, in steps"),
        (SWA, "swa_epoch_start", "Multiply epochs by the steps of an epoch"),
        (SWA, "every", "`average_period`, in steps"),
        (SWA, "swa_lr", r"keras_avg\.schedules\.SWALearningRate"),
        (SWA, "use_buffers", r"keras_avg\.update_batch_norm"),
        (SWA, "average_decay", "MovingAverage"),
        (SWA, "ema_momentum", "MovingAverage"),
        (Lookahead, "k", "`sync_period`, in steps"),
        (Lookahead, "alpha", "`slow_step_size`"),
        (ModelAverage, "every", "`interval_steps`, in steps"),
        (ModelAverage, "world_size", "`num_worker`"),
        *[(wrapper, "device", "lie on the device of their variables") for wrapper in ALL],
    ],
)
def test_an_error_says_the_name_here_for_a_word_of_another_library(wrapper, word, name):
    with pytest.raises(ValueError, match=f"{name}.*Received: {word}=3") as refusal:
        wrapper("adam", **{word: 3})
    assert "inner optimizer, as in" not in str(refusal.value)


@pytest.mark.parametrize("wrapper", ALL)
def test_the_error_for_an_unknown_argument_lists_all_arguments(wrapper):
    with pytest.raises(ValueError, match=r"not recognized: {'typo': 1}") as refusal:
        wrapper("sgd", typo=1)
    listed = str(refusal.value).split(" takes: ")[1].rstrip(".").split(", ")
    assert {"optimizer", "average_dtype", "clipnorm", "learning_rate"} <= set(listed)
    assert set(wrapper("sgd").get_config()) <= set(listed)


@pytest.mark.parametrize(
    ("wrapper", "argument"),
    [(SWA, "start_averaging"), (SWA, "average_period"), (MovingAverage, "start_step")],
)
def test_the_error_for_a_share_of_the_run_says_that_steps_are_meant(wrapper, argument):
    with pytest.raises(
        ValueError, match=rf"in steps\. Received: {argument}=0\.75.*0\.75 \* epochs"
    ):
        wrapper("sgd", **{argument: 0.75})


def test_the_error_for_a_function_as_decay_recommends_a_schedule():
    with pytest.raises(ValueError, match="LearningRateSchedule"):
        MovingAverage("sgd", average_decay=lambda step: 0.9)


class TestHyperParameters:
    @pytest.mark.slow_on("tensorflow")
    @pytest.mark.parametrize(
        ("optimizer", "name", "value"),
        [
            (lambda: MovingAverage("sgd"), "average_decay", 0.0),
            (lambda: MovingAverage("sgd"), "average_period", 7),
            (lambda: SWA("sgd"), "start_averaging", 7),
            (lambda: SWA("sgd"), "skip_nonfinite", True),
            (lambda: SWA("sgd"), "clipnorm", 1.0),
            (lambda: SWA("sgd"), "gradient_transformers", [list]),
            (lambda: Lookahead("sgd"), "slow_step_size", 1.0),
            (lambda: ModelAverage("sgd"), "interval_steps", 7),
        ],
    )
    def test_arguments_are_read_only_once_the_optimizer_is_built(self, optimizer, name, value):
        model = small.fit(small.model(optimizer()), epochs=1)
        before = getattr(model.optimizer, name)
        with pytest.raises(AttributeError, match=f"`{name}` of .* is read-only.*from_config"):
            setattr(model.optimizer, name, value)
        assert getattr(model.optimizer, name) == before
        setattr(model.optimizer, name, before)

    def test_arguments_can_be_set_before_the_optimizer_is_built(self):
        optimizer = MovingAverage("sgd", average_decay=0.5)
        optimizer.average_decay = 0.0
        variable = keras.Variable([1.0])
        small.apply(optimizer, [variable], [[1.0]])
        np.testing.assert_array_equal(optimizer.get_slot(variable, "average"), variable)

    @pytest.mark.slow_on("tensorflow")
    def test_the_learning_rate_can_be_set_after_build(self):
        model = small.fit(small.model(SWA("sgd")), epochs=1)
        model.optimizer.learning_rate = 0.5
        assert float(model.optimizer.inner_optimizer.learning_rate) == 0.5


class TestARateThatIsSomebodysVariable:
    def test_the_constructor_takes_the_value_of_a_learning_rate_variable(self, tmp_path):
        rate = keras.Variable(0.05)
        model = small.model(SWA("sgd", 0, 1, learning_rate=rate))
        self.check(model, rate, 0.05, tmp_path)

    def test_the_setter_takes_the_value_of_a_learning_rate_variable(self, tmp_path):
        model = small.fit(small.model(SWA("sgd", 0, 1)), epochs=1)
        rate = keras.Variable(0.05)
        model.optimizer.learning_rate = rate
        self.check(model, rate, 0.05, tmp_path)

    def check(self, model, rate, value, tmp_path):
        expected = small.model(optimizers.SGD(value))
        expected.set_weights(model.get_weights())
        for each in (model, expected):
            small.fit(each, epochs=2)
        small.assert_same_bits(model.get_weights(), expected.get_weights())
        assert small.numpy(rate) == np.float32(value)
        model.save(tmp_path / "model.keras")
        loaded = keras.saving.load_model(tmp_path / "model.keras")
        assert float(loaded.optimizer.learning_rate) == np.float32(value)
        small.fit(loaded, epochs=1)
