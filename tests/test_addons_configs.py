"""Configs and files of TensorFlow Addons 0.7 to 0.23, around optimizers of Keras 2, are loaded."""

import copy
import json

import h5py
import keras
import numpy as np
import pytest
import small_training as small
from keras import optimizers

from keras_avg import SWA, MovingAverage, schedules

LEGACY_SGD = {
    "class_name": "SGD",
    "config": {
        "name": "SGD",
        "learning_rate": 0.25,
        "decay": 0.0,
        "momentum": 0.5,
        "nesterov": True,
    },
}
RECORDED_SWA = {"name": "SWA", "optimizer": LEGACY_SGD, "average_period": 5, "start_averaging": 3}
OLD_SWA = RECORDED_SWA | {"sequential_update": True}  # Addons 0.7 to 0.11
RECORDED_MOVING_AVERAGE = {
    "name": "MovingAverage",
    "optimizer": LEGACY_SGD,
    "average_decay": 0.75,
    "num_updates": None,
    "start_step": 2,
    "dynamic_decay": True,
}
CUSTOM_OBJECTS = {"Addons>SWA": SWA, "Addons>MovingAverage": MovingAverage}


def legacy(class_name, **config):
    """A config in the form in which Keras 2 wrote it before 2.12."""
    return {"class_name": class_name, "config": config}


def around(inner):
    return {"name": "SWA", "optimizer": inner, "average_period": 5, "start_averaging": 3}


def inner_of(inner, **arguments):
    return SWA.from_config(around(inner), **arguments).inner_optimizer


def rate_at(optimizer, step):
    return keras.ops.convert_to_numpy(optimizer._learning_rate(step))


@pytest.mark.slow_on("jax")
@pytest.mark.parametrize("config", [RECORDED_SWA, OLD_SWA], ids=["0.23", "0.7"])
def test_a_recorded_swa_config_is_loaded(config):
    optimizer = SWA.from_config(config)
    assert (optimizer.start_averaging, optimizer.average_period) == (3, 5)
    assert type(optimizer.inner_optimizer) is type(optimizers.SGD())
    assert float(optimizer.learning_rate) == 0.25
    assert (optimizer.inner_optimizer.momentum, optimizer.inner_optimizer.nesterov) == (0.5, True)


@pytest.mark.slow_on("jax")
def test_a_recorded_moving_average_config_is_loaded():
    optimizer = MovingAverage.from_config(RECORDED_MOVING_AVERAGE)
    assert optimizer.average_decay == 0.75
    assert (optimizer.start_step, optimizer.dynamic_decay) == (2, True)


def test_a_decay_that_num_updates_has_capped_is_not_capped_again():
    # Addons wrote the capped decay, a float32 scalar of NumPy. With num_updates=1 it is 2 / 11.
    config = {
        "optimizer": LEGACY_SGD,
        "average_decay": np.float32(2 / 11),
        "num_updates": np.int64(1),
    }
    optimizer = MovingAverage.from_config(config)
    assert optimizer.average_decay == pytest.approx(2 / 11, rel=1e-7)
    json.dumps(optimizer.get_config())


def test_from_config_does_not_change_its_argument():
    config = around(legacy("SGD", learning_rate=0.1, decay=0.5, jit_compile=True))
    before = copy.deepcopy(config)
    SWA.from_config(config)
    assert config == before


def test_decay_becomes_inverse_time_decay():
    inner = inner_of(legacy("SGD", name="SGD", learning_rate=1.0, decay=0.5))
    # In Keras 2 the rate was  rate / (1 + decay * step).
    assert [rate_at(inner, step) for step in (0, 2, 6)] == [1.0, 0.5, 0.25]


def test_decay_slows_training_as_in_keras_2():
    variable = keras.Variable([1.0])
    optimizer = SWA.from_config(around(legacy("SGD", learning_rate=1.0, decay=1.0)))
    small.apply(optimizer, [variable], [np.ones(1, "float32")], times=2)
    np.testing.assert_array_equal(small.numpy(variable), [-0.5])  # 1 - 1 / 1 - 1 / 2


@pytest.mark.parametrize(
    ("class_name", "arguments"),
    [
        ("SGD", {"momentum": 0.5, "nesterov": True}),
        ("Adam", {"beta_1": 0.8, "beta_2": 0.9, "epsilon": 1e-6, "amsgrad": True}),
        ("RMSprop", {"rho": 0.8, "momentum": 0.5, "epsilon": 1e-6, "centered": True}),
        ("Adagrad", {"initial_accumulator_value": 0.2, "epsilon": 1e-6}),
        ("Adadelta", {"rho": 0.8, "epsilon": 1e-6}),
        ("Adamax", {"beta_1": 0.8, "beta_2": 0.9, "epsilon": 1e-6}),
        ("Nadam", {"beta_1": 0.8, "beta_2": 0.9, "epsilon": 1e-6, "decay": 0.004}),
        (
            "Ftrl",
            {
                "learning_rate_power": -0.4,
                "initial_accumulator_value": 0.2,
                "l1_regularization_strength": 0.1,
                "l2_regularization_strength": 0.1,
                "l2_shrinkage_regularization_strength": 0.1,
                "beta": 0.1,
            },
        ),
    ],
)
def test_every_optimizer_of_keras_2_comes_back_with_its_arguments(class_name, arguments):
    config = {"name": class_name, "learning_rate": 0.25, "decay": 0.0, "clipnorm": 2.0} | arguments
    inner = inner_of(legacy(class_name, **config))
    expected = {k: v for k, v in config.items() if k != "decay"}
    assert type(inner) is type(optimizers.get(class_name))
    # The rate of Nadam is constant, because its `decay` is the schedule of its momentum.
    assert expected.items() <= inner.get_config().items()


@pytest.mark.parametrize("class_name", ["SGD", "Adam", "AdamW", "Lion", "Adafactor"])
def test_optimizers_of_keras_2_11_and_later_are_loaded(class_name):
    kind = getattr(optimizers, class_name)
    expected = kind(0.25, weight_decay=0.01, clipnorm=2.0, use_ema=True).get_config()
    # Three arguments are new in Keras 3, and two are gone.
    later = ("loss_scale_factor", "gradient_accumulation_steps")
    config = {k: v for k, v in expected.items() if k not in later}
    config |= {"jit_compile": True, "is_legacy_optimizer": False}
    module = {"module": "keras.optimizers", "registered_name": None}
    inner = inner_of(legacy(class_name, **config) | module)
    assert inner.get_config() == expected


@pytest.mark.parametrize(
    "written",
    [
        {},
        {"module": "keras.optimizers.legacy", "registered_name": None},
        {"module": "keras.optimizers.legacy", "registered_name": "Adam"},
    ],
    ids=["to 2.11", "2.12", "registered"],
)
def test_legacy_optimizers_are_loaded_however_keras_2_wrote_them(written):
    arguments = {"learning_rate": 0.5, "decay": 0.0, "beta_1": 0.5, "is_legacy_optimizer": True}
    inner = inner_of(legacy("Adam", **arguments) | written)
    assert type(inner) is type(optimizers.Adam())
    assert inner.beta_1 == 0.5


def test_a_learning_rate_becomes_a_python_float():
    # A built optimizer of Keras 2 read its rate from a variable. Before that it may be an int.
    assert float(inner_of(legacy("SGD", learning_rate=np.float32(0.5))).learning_rate) == 0.5
    assert float(inner_of(legacy("SGD", learning_rate=1)).learning_rate) == 1.0


def test_the_config_of_a_built_optimizer_can_be_written_as_json_again():
    config = legacy("Adam", learning_rate=np.float32(0.5), beta_1=np.float32(0.5))
    json.dumps(SWA.from_config(around(config)).get_config())


def test_class_names_are_found_in_upper_and_lower_case():
    assert inner_of(legacy("rmsprop", learning_rate=0.1, rho=0.5)).rho == 0.5


@pytest.mark.parametrize(
    "written", [{}, {"module": "keras.optimizers.schedules", "registered_name": None}]
)
def test_a_nested_schedule_of_keras_2_is_loaded(written):
    schedule = legacy(
        "ExponentialDecay",
        initial_learning_rate=1.0,
        decay_steps=1,
        decay_rate=0.5,
        staircase=False,
        name=None,
    )
    inner = inner_of(legacy("SGD", learning_rate=schedule | written, decay=0.0))
    assert [rate_at(inner, step) for step in (0, 1, 2)] == [1.0, 0.5, 0.25]


@pytest.mark.parametrize(
    "written",
    [
        {},
        {
            "class_name": "TriangularCyclicalLearningRate",
            "module": "tensorflow_addons.optimizers.cyclical_learning_rate",
            "registered_name": "Addons>TriangularCyclicalLearningRate",
        },
    ],
    ids=["to 2.11", "2.12"],
)
def test_a_nested_schedule_of_addons_is_loaded(written):
    schedule = legacy(
        "Addons>TriangularCyclicalLearningRate",
        initial_learning_rate=0.0,
        maximal_learning_rate=1.0,
        step_size=2,
        scale_mode="cycle",
    )
    inner = inner_of(legacy("SGD", learning_rate=schedule | written, decay=0.0))
    assert isinstance(inner._learning_rate, schedules.TriangularCyclicalLearningRate)
    assert [rate_at(inner, step) for step in range(5)] == [0.0, 0.5, 1.0, 0.5, 0.0]


def halved(x):
    return 0.5


class TestScaleFunctions:
    """Keras 2 wrote only the name of a function. For a lambda it wrote `<lambda>`."""

    @staticmethod
    def config(scale_fn):
        schedule = legacy(
            "Addons>CyclicalLearningRate",
            initial_learning_rate=0.0,
            maximal_learning_rate=1.0,
            step_size=2,
            scale_fn=scale_fn,
            scale_mode="cycle",
        )
        return legacy("SGD", learning_rate=schedule)

    def test_a_scale_function_is_found_by_its_name(self):
        inner = inner_of(self.config("halved"), custom_objects={"halved": halved})
        assert rate_at(inner, 2) == 0.5

    def test_a_config_may_contain_the_scale_function_itself(self):
        assert rate_at(inner_of(self.config(halved)), 2) == 0.5

    def test_the_lambda_of_a_scale_function_is_refused(self):
        with pytest.raises(ValueError, match=r"scale_fn='<lambda>'.*custom_objects"):
            inner_of(self.config("<lambda>"))


@keras.saving.register_keras_serializable()  # registered as `Custom>Halving`, as in Keras 2
class Halving(optimizers.schedules.LearningRateSchedule):
    def __init__(self, start):
        self.start = start

    def __call__(self, step):
        return self.start * 0.5 ** keras.ops.cast(step, "float32")

    def get_config(self):
        return {"start": self.start}


class HalvingTwice(Halving):
    def __call__(self, step):
        return super().__call__(2 * step)


def test_a_registered_schedule_of_the_user_is_loaded():
    schedule = legacy("Custom>Halving", start=1.0)
    inner = inner_of(legacy("SGD", learning_rate=schedule, decay=0.0))
    assert rate_at(inner, 2) == 0.25


@pytest.mark.parametrize("name", ["Custom>HalvingTwice", "HalvingTwice"])
def test_a_schedule_of_the_user_is_found_in_custom_objects(name):
    schedule = legacy("Custom>HalvingTwice", start=1.0)
    inner = inner_of(legacy("SGD", learning_rate=schedule), custom_objects={name: HalvingTwice})
    assert rate_at(inner, 2) == 0.0625


def test_an_optimizer_of_the_user_keeps_its_arguments():
    class Mine(optimizers.SGD):
        def __init__(self, decay, **arguments):
            super().__init__(**arguments)
            self.decay = decay

    config = legacy("Custom>Mine", learning_rate=0.5, decay=0.25)
    inner = inner_of(config, custom_objects={"Custom>Mine": Mine})
    assert isinstance(inner, Mine)
    assert inner.decay == 0.25


@pytest.mark.parametrize("custom_objects", [CUSTOM_OBJECTS, {"Addons>SWA": SWA}])
def test_nested_wrappers_are_loaded_by_their_registered_names(custom_objects):
    inner = legacy("Addons>MovingAverage", **RECORDED_MOVING_AVERAGE)
    config = legacy("Addons>SWA", **around(inner))
    optimizer = optimizers.deserialize(copy.deepcopy(config), custom_objects)
    assert type(optimizer) is SWA
    assert type(optimizer.inner_optimizer) is MovingAverage
    assert type(optimizer.inner_optimizer.inner_optimizer) is type(optimizers.SGD())
    assert optimizer.inner_optimizer.average_decay == 0.75


def test_nested_wrappers_are_loaded_as_keras_2_12_wrote_them():
    inner = {
        "module": "tensorflow_addons.optimizers.moving_average",
        "class_name": "MovingAverage",
        "config": RECORDED_MOVING_AVERAGE,
        "registered_name": "Addons>MovingAverage",
    }
    assert type(inner_of(inner)) is MovingAverage


def test_a_translated_config_is_not_translated_again():
    optimizer = SWA.from_config(around(legacy("Adam", learning_rate=0.5, decay=0.5)))
    again = SWA.from_config(optimizer.get_config())
    assert again.get_config() == optimizer.get_config()


@pytest.mark.parametrize(
    "name", ["Addons>LAMB", "Addons>AdamW", "Addons>ConditionalGradient", "Adafactory"]
)
def test_an_error_names_an_optimizer_without_counterpart(name):
    with pytest.raises(ValueError, match=f"'{name}' of Keras 2 has no counterpart"):
        inner_of(legacy(name, learning_rate=0.1))


def test_an_error_names_a_schedule_without_counterpart():
    schedule = legacy("NoisyLinearCosineDecay", initial_learning_rate=0.1)
    with pytest.raises(ValueError, match="'NoisyLinearCosineDecay' of Keras 2 has no counterpart"):
        inner_of(legacy("SGD", learning_rate=schedule))


def test_decay_over_a_schedule_is_refused():
    schedule = legacy("ExponentialDecay", initial_learning_rate=1.0, decay_steps=1, decay_rate=0.5)
    with pytest.raises(ValueError, match=r"decay=0.5 and learning_rate="):
        inner_of(legacy("SGD", learning_rate=schedule, decay=0.5))


def test_an_error_names_unknown_arguments():
    with pytest.raises(ValueError, match=r"not recognized: \{'colour': 3\}"):
        SWA.from_config(RECORDED_SWA | {"colour": 3})
    with pytest.raises(ValueError, match=r"not recognized: \{'colour': 3\}"):
        inner_of(legacy("SGD", learning_rate=0.1, colour=3))


def test_a_serialized_lambda_does_not_run(tmp_path):
    marker = tmp_path / "ran"
    code = {"class_name": "__lambda__", "config": {"value": [f"open({str(marker)!r}, 'w')"]}}
    schedule = legacy(
        "Addons>CyclicalLearningRate",
        initial_learning_rate=0.1,
        maximal_learning_rate=1.0,
        step_size=2,
        scale_fn=code,
    )
    with pytest.raises(ValueError, match="lambda"):
        inner_of(legacy("SGD", learning_rate=schedule))
    assert not marker.exists()


def write_legacy_h5(path, model, optimizer_config, with_optimizer_weights=False):
    """A file with the layout, the model config and the training config of Keras 2.15."""
    dense, norm, out = model.layers
    layer_configs = [
        {
            "class_name": "InputLayer",
            "config": {
                "batch_input_shape": [None, 5],
                "dtype": "float32",
                "sparse": False,
                "ragged": False,
                "name": "input_1",
            },
        },
        *(keras_2_dense(layer) for layer in (dense, out)),
    ]
    layer_configs.insert(2, keras_2_batch_normalization(norm))
    model_config = {
        "class_name": "Sequential",
        "config": {"name": "small", "layers": layer_configs},
    }
    training_config = {
        "loss": "mean_squared_error",  # Keras 3 does not know `"mse"` in such a file.
        "metrics": None,
        "weighted_metrics": None,
        "loss_weights": None,
        "optimizer_config": optimizer_config,
    }
    with h5py.File(path, "w") as file:
        file.attrs["keras_version"] = "2.15.0"
        file.attrs["backend"] = "tensorflow"
        file.attrs["model_config"] = json.dumps(model_config)
        file.attrs["training_config"] = json.dumps(training_config)
        group = file.create_group("model_weights")
        group.attrs["keras_version"] = b"2.15.0"
        group.attrs["backend"] = b"tensorflow"
        group.attrs["layer_names"] = [layer.name.encode() for layer in model.layers]
        group.create_group("top_level_model_weights").attrs["weight_names"] = []
        for layer in model.layers:
            weights = layer.trainable_variables + layer.non_trainable_variables
            names = [f"{layer.name}/{w.name}:0".encode() for w in weights]
            inside = group.create_group(layer.name)
            inside.attrs["weight_names"] = names
            for name, weight in zip(names, weights, strict=True):
                inside[name.decode()] = small.numpy(weight)
        if with_optimizer_weights:
            write_optimizer_weights(file, model)


def write_optimizer_weights(file, model):
    """The step, and then the slots: the average and the momentum of each variable."""
    values = {"iter:0": np.asarray(7, "int64")}
    for variable in model.trainable_variables:
        for slot in ("average", "momentum"):
            values[f"SWA/{variable.path}/{slot}:0"] = small.numpy(variable)
    group = file.create_group("optimizer_weights")
    group.attrs["weight_names"] = [name.encode() for name in values]
    for name, value in values.items():
        group[name] = value


def keras_2_dense(layer):
    return {
        "class_name": "Dense",
        "config": {
            "name": layer.name,
            "trainable": True,
            "dtype": "float32",
            "units": layer.units,
            "activation": layer.activation.__name__,
            "use_bias": True,
            "kernel_initializer": {"class_name": "GlorotUniform", "config": {"seed": None}},
            "bias_initializer": {"class_name": "Zeros", "config": {}},
            "kernel_regularizer": None,
            "bias_regularizer": None,
            "activity_regularizer": None,
            "kernel_constraint": None,
            "bias_constraint": None,
        },
    }


def keras_2_batch_normalization(layer):
    return {
        "class_name": "BatchNormalization",
        "config": {
            "name": layer.name,
            "trainable": True,
            "dtype": "float32",
            "axis": [1],
            "momentum": 0.99,
            "epsilon": 0.001,
            "center": True,
            "scale": True,
        },
    }


ADDONS_OPTIMIZERS = {
    "SWA": legacy("Addons>SWA", **RECORDED_SWA | {"start_averaging": 0, "average_period": 2}),
    "MovingAverage": legacy("Addons>MovingAverage", **RECORDED_MOVING_AVERAGE),
    "nested": legacy(
        "Addons>SWA",
        **around(legacy("Addons>MovingAverage", **RECORDED_MOVING_AVERAGE))
        | {"start_averaging": 0, "average_period": 2},
    ),
}


@pytest.mark.sample(2)
@pytest.mark.parametrize("with_optimizer_weights", [False, True])
@pytest.mark.parametrize("kind", ADDONS_OPTIMIZERS)
def test_a_model_from_a_legacy_h5_file_is_compiled_and_trains(
    tmp_path, kind, with_optimizer_weights
):
    saved = small.model()
    config = ADDONS_OPTIMIZERS[kind]
    write_legacy_h5(tmp_path / "legacy.h5", saved, config, with_optimizer_weights)

    model = keras.saving.load_model(tmp_path / "legacy.h5", custom_objects=CUSTOM_OBJECTS)

    small.assert_same_bits(model.get_weights(), saved.get_weights())
    assert type(model.optimizer) is CUSTOM_OBJECTS[config["class_name"]]
    # The averages of Addons are not loaded, because Keras 3 keeps the state in another order.
    assert not model.optimizer.has_average
    expected = small.model(type(model.optimizer).from_config(config["config"]))
    small.assert_same_bits(small.fit(model).get_weights(), small.fit(expected).get_weights())
    small.assert_same_bits(model.optimizer.get_weights(), expected.optimizer.get_weights())
    assert model.optimizer.has_average


def test_a_legacy_h5_file_of_an_optimizer_without_counterpart_is_refused(tmp_path):
    config = legacy("Addons>SWA", **around(legacy("Addons>Yogi", learning_rate=0.1)))
    write_legacy_h5(tmp_path / "legacy.h5", small.model(), config)
    with pytest.raises(ValueError, match="'Addons>Yogi' of Keras 2 has no counterpart"):
        keras.saving.load_model(tmp_path / "legacy.h5", custom_objects=CUSTOM_OBJECTS)


@pytest.mark.slow_on("jax", "tensorflow")
def test_a_legacy_h5_file_that_keras_3_writes_is_loaded_and_trains(tmp_path):
    """Keras builds the optimizer with no variables, and then cannot train with its own ones."""
    model = small.model()
    model.compile(SWA(MovingAverage("adam"), 0, 2), keras.losses.MeanSquaredError())
    small.fit(model).save(tmp_path / "legacy.h5")

    loaded = keras.saving.load_model(tmp_path / "legacy.h5")

    small.assert_same_bits(loaded.get_weights(), model.get_weights())
    assert loaded.optimizer.get_config() == model.optimizer.get_config()
    assert not loaded.optimizer.has_average
    assert small.fit(loaded).optimizer.num_snapshots == small.BATCHES


@pytest.mark.parametrize("config", [{}, {"config": {}}, {"class_name": ["SGD"], "config": {}}])
def test_a_config_that_names_no_class_is_refused(config):
    with pytest.raises(ValueError, match=r"must name its class.*Received"):
        SWA(config)


@pytest.mark.parametrize("key", ["class_name", "module", "registered_name"])
def test_an_optimizer_whose_name_is_no_text_is_refused(key):
    inner = {"class_name": "SGD", "module": "keras.optimizers", "config": {}} | {key: ["SGD"]}
    with pytest.raises(ValueError, match=r"names that are text\. Received"):
        SWA.from_config({"optimizer": inner})
