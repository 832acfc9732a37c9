"""Averages are right if the train step is compiled or eager, and in Keras' loop or the user's."""

import functools

import bare_training
import keras
import pytest
import small_training as small
from keras import ops
from wrappers import INNER

BACKEND = keras.backend.backend()
STEPS = 8
RUNS = {
    "jit_compile=False": {"jit_compile": False},
    "jit_compile=True": {"jit_compile": True},
    "jit_compile=auto": {"jit_compile": "auto"},
    "run_eagerly": {"run_eagerly": True},
}


def batch(step):
    rows = slice(small.BATCH_SIZE * (step % small.BATCHES), None)
    return small.X[rows][: small.BATCH_SIZE], small.Y[rows][: small.BATCH_SIZE]


@pytest.fixture
def quick_torch_compile(monkeypatch):
    """Replaces the C++ compiler, which is slow. Dynamo still traces and breaks the graph."""
    if BACKEND == "torch":
        import torch

        quick = functools.partial(torch.compile, backend="aot_eager")
        monkeypatch.setattr(torch, "compile", quick)


# PyTorch gives this warning about its own code, while it traces Keras.
of_torch_compile = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not")


@pytest.mark.sample(2)
@of_torch_compile
@pytest.mark.usefixtures("quick_torch_compile")
@pytest.mark.parametrize("run", RUNS)
def test_averages_are_right_however_the_train_step_runs(run):
    inner = INNER["accumulation" if run == "jit_compile=True" else "adam"]

    bare_training.assert_invisible(
        lambda optimizer: small.model(optimizer, **RUNS[run]),
        inner,
        lambda model, callbacks: small.fit(model, epochs=1, callbacks=callbacks),
    )


@pytest.mark.sample(1)
@pytest.mark.skipif(BACKEND == "torch", reason="Keras refuses `steps_per_execution` > 1 on torch")
@pytest.mark.parametrize(
    ("steps", "inner"),
    [(2, "accumulation"), (4, "adam")],  # An epoch has 6 batches, which 4 does not divide.
)
def test_averages_are_right_with_several_steps_per_execution(steps, inner):
    def model(optimizer):
        return small.model(optimizer, steps_per_execution=steps)

    bare = small.fit(model(INNER[inner]()))
    trained = small.fit(model(bare_training.wrapped(INNER[inner]())))

    bare_training.assert_same_training(trained, bare)
    record = bare_training.Trajectories()
    small.fit(small.model(bare_training.wrapped(INNER[inner]())), callbacks=[record])
    bare_training.assert_averages(trained, record.values)


def test_averages_are_right_with_train_on_batch():
    bare, model = small.model(INNER["adam"]()), small.model(bare_training.wrapped(INNER["adam"]()))

    small.trajectories(bare, STEPS)
    values = small.trajectories(model, STEPS)

    bare_training.assert_same_training(model, bare)
    bare_training.assert_averages(model, values)


@pytest.mark.sample(2)
@of_torch_compile
@pytest.mark.usefixtures("quick_torch_compile")
@pytest.mark.parametrize("inner", ["adam", "accumulation"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_averages_are_right_in_a_custom_loop(compiled, inner):
    def train(optimizer):
        model = small.model()
        optimizer.build(model.trainable_variables)
        model.optimizer = optimizer  # The assertions need it. The model is not compiled.
        trajectories = [[small.numpy(v)] for v in model.trainable_variables]
        LOOPS[BACKEND](model, optimizer, compiled, trajectories)
        return model, trajectories

    bare, _ = train(INNER[inner]())
    model, trajectories = train(bare_training.wrapped(INNER[inner]()))

    bare_training.assert_same_training(model, bare)
    accumulated = 2 if inner == "accumulation" else 1
    updates = [values[::accumulated] for values in trajectories]
    assert int(model.optimizer.iterations) == STEPS // accumulated
    bare_training.assert_averages(model, updates)


def record(trajectories, tensors):
    for values, tensor in zip(trajectories, tensors, strict=True):
        values.append(small.numpy(tensor))


def tensorflow_loop(model, optimizer, compiled, trajectories):
    import tensorflow as tf

    def step(x, y):
        with tf.GradientTape() as tape:
            loss = ops.mean((model(x, training=True) - y) ** 2)
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))

    step = tf.function(step) if compiled else step
    for number in range(STEPS):
        step(*map(tf.constant, batch(number)))
        record(trajectories, model.trainable_variables)


def torch_loop(model, optimizer, compiled, trajectories):
    import torch

    def step(x, y):
        model.zero_grad()
        loss = ops.mean((model(x, training=True) - y) ** 2)
        loss.backward()
        with torch.no_grad():
            optimizer.apply([v.value.grad for v in model.trainable_variables])

    step = torch.compile(step) if compiled else step
    for number in range(STEPS):
        step(*map(torch.tensor, batch(number)))
        record(trajectories, model.trainable_variables)


def jax_loop(model, optimizer, compiled, trajectories):
    import jax

    def loss(trainable, non_trainable, x, y):
        prediction, non_trainable = model.stateless_call(trainable, non_trainable, x, training=True)
        return ops.mean((prediction - y) ** 2), non_trainable

    def step(trainable, non_trainable, state, x, y):
        gradients, non_trainable = jax.grad(loss, has_aux=True)(trainable, non_trainable, x, y)
        trainable, state = optimizer.stateless_apply(state, gradients, trainable)
        return trainable, non_trainable, state

    # The step donates its arguments. This fails if two variables share a buffer.
    step = jax.jit(step, donate_argnums=(0, 1, 2)) if compiled else step
    variables = model.trainable_variables, model.non_trainable_variables, optimizer.variables
    states = [[jax.numpy.array(v.value) for v in group] for group in variables]
    for number in range(STEPS):
        states = step(*states, *batch(number))
        record(trajectories, states[0])
    for group, values in zip(variables, states, strict=True):
        for variable, value in zip(group, values, strict=True):
            variable.assign(value)
    if hasattr(optimizer, "stateless_average"):
        averages = optimizer.stateless_average(states[2])
        small.assert_same_bits(averages, small.slots(optimizer, model.trainable_variables))


LOOPS = {"tensorflow": tensorflow_loop, "torch": torch_loop, "jax": jax_loop}
