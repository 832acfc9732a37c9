"""Wrappers do not change training of any kind of variable, or with optimizers for some of them."""

import bare_training
import keras
import numpy as np
import oracles
import pytest
import small_training as small
from keras import layers, optimizers
from wrappers import INNER, chain, swa_of_variables, warm_moving_average

from keras_avg import SWA, MovingAverage

has_multi_optimizer = pytest.mark.skipif(
    not hasattr(optimizers, "MultiOptimizer"), reason="MultiOptimizer came with Keras 3.15"
)

WORDS = np.random.default_rng(3).integers(0, 9, size=(small.BATCH_SIZE * small.BATCHES, 4))
WORDS[:, 2:] = WORDS[:, :2]  # Each word occurs twice in its row.


def compiled(optimizer, stack):
    """A compiled model of these layers. Its weights are the same each time."""
    keras.utils.set_random_seed(42)
    model = keras.Sequential([keras.Input((5,)), *stack()])
    model.compile(optimizer, "mse")
    return model


def constrained(optimizer):
    return compiled(
        optimizer,
        lambda: [
            layers.Dense(6, kernel_constraint=keras.constraints.MaxNorm(0.5)),
            layers.Dense(1, kernel_constraint="non_neg"),
        ],
    )


def of_several_dtypes(optimizer):
    return compiled(
        optimizer,
        lambda: [
            layers.Dense(6, activation="tanh", dtype="bfloat16"),
            layers.Dense(6, activation="tanh", dtype="mixed_bfloat16"),
            layers.Dense(4, activation="tanh", dtype="float16"),
            layers.Dense(1, dtype="float32"),
        ],
    )


def low_rank(optimizer):
    """A model with a LoRA layer: its kernel is frozen, and two factors are trained."""
    model = compiled(optimizer, lambda: [layers.Dense(6, activation="tanh"), layers.Dense(1)])
    model.layers[0].enable_lora(rank=2)
    model.compile(optimizer, "mse")
    return model


def partly_frozen(optimizer):
    model = compiled(optimizer, lambda: [layers.Dense(6, activation="tanh"), layers.Dense(1)])
    model.layers[0].trainable = False
    model.compile(optimizer, "mse")
    return model


def in_float8(optimizer):
    """A float8 model. Its scales and histories are overwritten by their gradients."""
    model = compiled(optimizer, lambda: [layers.Dense(16, activation="tanh"), layers.Dense(1)])
    model.layers[0].quantize("float8")
    model.compile(optimizer, "mse")
    return model


def embedding(optimizer):
    keras.utils.set_random_seed(42)
    stack = [layers.Embedding(9, 3), layers.Flatten(), layers.Dense(1)]
    model = keras.Sequential([keras.Input((4,), dtype="int32"), *stack])
    model.compile(optimizer, "mse")
    return model


def fit_words(model, callbacks):
    arguments = {"batch_size": small.BATCH_SIZE, "shuffle": False, "verbose": 0}
    model.fit(WORDS, small.Y, epochs=2, callbacks=callbacks, **arguments)
    return model


def test_averages_are_right_for_layers_of_several_dtypes():
    # Not Adam: its beta_2 is rounded to 1 in bfloat16, and then nothing moves.
    bare_training.assert_invisible(of_several_dtypes, INNER["nesterov"])


@pytest.mark.parametrize("inner", ["adam", "accumulation"])
@pytest.mark.parametrize("model", [constrained, low_rank, partly_frozen], ids=lambda f: f.__name__)
def test_averages_are_right_for_models_of_all_kinds(model, inner):
    bare_training.assert_invisible(model, INNER[inner])


@pytest.mark.sample(1)
@pytest.mark.parametrize("inner", ["adam", "accumulation"])
def test_averages_are_right_for_float8_layers(inner):
    model = bare_training.assert_invisible(in_float8, INNER[inner])

    wrapper, variables = model.optimizer, model.trainable_variables
    overwritten = [v for v in variables if v.overwrite_with_gradient]
    assert len(overwritten) == 6
    assert all(wrapper.get_slot(v, "average") is None for v in overwritten)
    assert sum(wrapper.get_slot(v, "average") is not None for v in variables) == 4
    scale = small.numpy(model.layers[0].kernel_scale)
    with wrapper.average_weights():
        small.assert_same_bits([small.numpy(model.layers[0].kernel_scale)], [scale])


@pytest.mark.sample(2)
@pytest.mark.parametrize("inner", ["adam", "nesterov", "clipping", "accumulation", "loss scale"])
def test_averages_are_right_for_an_embedding_with_repeated_words(inner):
    if keras.backend.backend() == "tensorflow" and inner == "loss scale":
        pytest.skip("Keras cannot divide sparse gradients by a static `loss_scale_factor`")
    bare_training.assert_invisible(embedding, INNER[inner], fit_words)


def test_averages_are_right_for_an_embedding_under_a_loss_scale_optimizer(dtype_policy):
    dtype_policy("mixed_float16")
    bare_training.assert_invisible(embedding, INNER["clipping"], fit_words)


@pytest.mark.sample(1)
@pytest.mark.parametrize("clipping", ["clipnorm", "clipvalue", "global_clipnorm"])
def test_gradients_of_an_embedding_are_clipped_like_by_the_inner_optimizer(clipping):
    bare = fit_words(embedding(optimizers.SGD(0.5, **{clipping: 0.01})), [])
    outside = fit_words(embedding(SWA(optimizers.SGD(0.5), **{clipping: 0.01})), [])
    free = fit_words(embedding(optimizers.SGD(0.5)), [])

    small.assert_same_bits(outside.get_weights(), bare.get_weights())
    assert not np.array_equal(outside.get_weights()[0], free.get_weights()[0])


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_averages_are_right_for_variables_without_a_gradient():
    class Unused(layers.Layer):
        def build(self, shape):
            self.unused = self.add_weight(name="unused", shape=(3,), initializer="ones")

        def call(self, x):
            return x

    def model(optimizer):
        return compiled(optimizer, lambda: [Unused(name="idle"), layers.Dense(1)])

    trained = bare_training.assert_invisible(model, INNER["adam"], still=["unused"])

    unused = trained.get_layer("idle").unused
    np.testing.assert_array_equal(trained.optimizer.get_slot(unused, "average"), [1.0, 1.0, 1.0])


def test_averages_are_right_for_layers_frozen_between_two_compiles():
    def unfrozen_then_frozen(model, callbacks):
        model.get_layer("hidden").trainable = False
        model.compile(model.optimizer.__class__.from_config(model.optimizer.get_config()), "mse")
        return small.fit(model, callbacks=callbacks)

    def trained_before(optimizer):
        return small.fit(small.model(optimizer), epochs=1)

    model = bare_training.assert_invisible(trained_before, INNER["adam"], unfrozen_then_frozen)

    assert model.optimizer.num_snapshots == 6
    frozen = model.get_layer("hidden").kernel
    with pytest.raises(ValueError, match="not built with this variable"):
        model.optimizer.get_slot(frozen, "average")


@pytest.mark.skipif(
    keras.backend.backend() == "jax",
    reason="Keras' `stateless_apply` wants all variables that the optimizer was built with",
)
def test_one_optimizer_works_with_layers_frozen_between_two_compiles():
    def freeze_and_go_on(model, callbacks):
        model.get_layer("hidden").trainable = False
        model.compile(model.optimizer, "mse")
        return small.fit(model, callbacks=callbacks)

    def trained_before(optimizer):
        return small.fit(small.model(optimizer), epochs=1)

    bare = freeze_and_go_on(trained_before(INNER["adam"]()), [])
    model = freeze_and_go_on(trained_before(SWA(INNER["adam"](), 6, 1)), [])

    bare_training.assert_same_training(model, bare)
    frozen = model.get_layer("hidden").kernel
    np.testing.assert_array_equal(
        small.numpy(model.optimizer.get_slot(frozen, "average")), small.numpy(frozen)
    )


def test_averages_are_right_with_three_nested_wrappers(tmp_path):
    def optimizer(inner):
        inmost = MovingAverage(inner, average_decay=0.5)
        return SWA(MovingAverage(inmost, average_decay=0.9, dynamic_decay=True), 1, 2)

    def halves(values):
        return oracles.moving_average(values, [0.5] * (len(values) - 1))

    bare = small.fit(small.model(INNER["adam"]()))
    record = bare_training.Trajectories()
    model = small.fit(small.model(optimizer(INNER["adam"]())), callbacks=[record])

    bare_training.assert_same_training(model, bare)
    wrappers, _ = chain(model.optimizer)
    for wrapper, oracle in zip(
        wrappers, [swa_of_variables, warm_moving_average, halves], strict=True
    ):
        assert_averages_of(wrapper, model.trainable_variables, record.values, oracle)
    model.get_state_tree()  # It raises if two variables have the same path.
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    small.assert_same_bits(
        small.fit(loaded).optimizer.get_weights(), small.fit(model).optimizer.get_weights()
    )


def assert_averages_of(wrapper, variables, trajectories, oracle):
    for variable, values in zip(variables, trajectories, strict=True):
        average = small.numpy(wrapper.get_slot(variable, "average"))
        bare_training.assert_close(average, oracle(values))


def for_kernels_and_the_rest(kernels, rest):
    return optimizers.MultiOptimizer(optimizers.OptimizerMap(rest, {".*kernel": kernels}))


def adam_and_sgd(wrap_kernels=lambda inner: inner, wrap_rest=lambda inner: inner):
    kernels, rest = wrap_kernels(optimizers.Adam(0.01)), wrap_rest(optimizers.SGD(0.1))
    return for_kernels_and_the_rest(kernels, rest)


@pytest.mark.sample(1)
@has_multi_optimizer
@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_averages_are_right_with_a_multi_optimizer_inside(policy, dtype_policy):
    dtype_policy(policy)
    bare_training.assert_invisible(small.model, adam_and_sgd)


@pytest.mark.sample(1)
@has_multi_optimizer
@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_averages_are_right_with_wrappers_as_members_of_a_multi_optimizer(policy, dtype_policy):
    dtype_policy(policy)
    swa, moving_average = [], []

    def with_swa(inner):
        swa.append(SWA(inner, 1, 2))
        return swa[-1]

    def with_moving_average(inner):
        moving_average.append(MovingAverage(inner, average_decay=0.9, dynamic_decay=True))
        return moving_average[-1]

    bare = small.fit(small.model(adam_and_sgd()))
    record = bare_training.Trajectories()
    optimizer = adam_and_sgd(with_swa, with_moving_average)
    model = small.fit(small.model(optimizer), callbacks=[record])

    small.assert_same_bits(bare_training.state(model), bare_training.state(bare))
    is_kernel = [v.path.endswith("kernel") for v in model.trainable_variables]
    for wrapper, oracle, kernels in (
        (swa[0], swa_of_variables, True),
        (moving_average[0], warm_moving_average, False),
    ):
        chosen = [i for i, kernel in enumerate(is_kernel) if kernel == kernels]
        variables = [model.trainable_variables[i] for i in chosen]
        assert_averages_of(wrapper, variables, [record.values[i] for i in chosen], oracle)


@has_multi_optimizer
def test_averages_are_right_with_wrappers_inside_and_outside_of_a_multi_optimizer():
    def inside():
        return adam_and_sgd(lambda inner: MovingAverage(inner, average_decay=0.5))

    bare = small.fit(small.model(adam_and_sgd()))
    model = bare_training.assert_invisible(small.model, inside)

    small.assert_same_bits(bare_training.state(model), bare_training.state(bare))
    model.get_state_tree()
