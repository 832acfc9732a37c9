"""Random walks through the operations on a model. They search for a law that does not hold.

python campaign/walks.py [--walks 10000] [--steps 15] [--seed 0]

Each rule of the state machine does an operation on a model with wrappers. A twin without wrappers
is trained in the same way, and not changed otherwise. After each rule:

* The raw weights and the inner optimizer's state equal those of the twin, bit for bit.
* The averages equal those that NumPy float64 computes from the twin's trajectory.
* The model holds the copy that `averages_in_model` says.
* A refused operation raises the documented error, and changes nothing.
"""

import argparse
import contextlib
import copy
import gc
import json
import pathlib
import pickle
import sys
import tempfile
import time
import traceback
import warnings

import hypothesis
import keras
import numpy as np
import pytest
import stacks
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from hypothesis.stateful import run_state_machine_as_test as run_machine
from keras import ops

import keras_avg
from keras_avg._wrapping import nesting
from keras_avg.callbacks import AverageModelCheckpoint, BackupAndRestore, SwapAverageWeights

TOLERANCE = 1e-5  # of averages of a few dozen float32 values of order 1
BATCH, BATCHES = 4, 6
AT_ONCE = 20  # walks of one run; the first that breaks a law ends the run
_random = np.random.default_rng(7)
X = _random.normal(size=(BATCH * BATCHES, 3)).astype("float32")
Y = (X[:, :1] * X[:, 1:2] + X[:, 2:]).astype("float32")


def build(optimizer, frozen=False):
    keras.utils.set_random_seed(42)
    layers = [
        keras.Input((3,)),
        keras.layers.Dense(4, activation="tanh", name="hidden"),
        keras.layers.BatchNormalization(name="norm"),
        keras.layers.Dropout(0.2, seed=1, name="dropout"),
        keras.layers.Dense(1, name="out"),
    ]
    model = keras.Sequential(layers, name="walk")
    model.layers[0].trainable = not frozen
    model.compile(optimizer, "mse")
    return model


def numpy(variable):
    return np.array(ops.convert_to_numpy(variable), copy=True)


def same(ours, theirs, what):
    assert len(ours) == len(theirs), f"{what}: {len(ours)} and {len(theirs)}"
    for i, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        np.testing.assert_array_equal(one, other, err_msg=f"{what}, array {i}")


def shares_variables(wrapper, other):
    ours = {id(v) for v in wrapper.averaged_variables}
    return any(id(v) in ours for v in other.averaged_variables)


def all_variables(model):
    scale = getattr(model.optimizer, "dynamic_scale", None)
    return [*model.variables, *model.optimizer.variables, *([] if scale is None else [scale])]


def everything(model):
    """All values of a model and its optimizer."""
    return [numpy(v) for v in all_variables(model)]


class BrokenError(Exception):
    """An error that user code raises during an operation."""


class Dies(keras.callbacks.Callback):
    def __init__(self, batches):
        super().__init__()
        self.left = batches

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        if not self.left:
            raise BrokenError


class Walk(RuleBasedStateMachine):
    """The operations and the laws."""

    @initialize(stack=stacks.stacks())
    def start(self, stack):
        self.folder = tempfile.TemporaryDirectory()
        self.begin(stack, build)

    def begin(self, stack, make):
        """Start with a new optimizer for the model and for the twin."""
        self.stack = stack
        self.model, self.twin = make(stack.wrapped()), build(stack.twin())
        self.followers, self.started, self.updates = stack.followers(), False, 0
        self.is_swapped, self.batch = False, 0
        self.is_recomputed = False  # batch-normalization statistics, for the averages

    def teardown(self):
        if hasattr(self, "folder"):
            self.folder.cleanup()

    # State.

    @property
    def wrappers(self):
        return keras_avg.averaging_optimizers(self.model)

    def path(self, name):
        return pathlib.Path(self.folder.name, name)

    def has_snapshot(self):
        return any(w.has_average for w in self.wrappers)

    def batches(self, number):
        chosen = [(self.batch + i) % BATCHES for i in range(number)]
        self.batch = (self.batch + number) % BATCHES
        rows = np.concatenate([np.arange(BATCH * b, BATCH * (b + 1)) for b in chosen])
        return X[rows], Y[rows]

    def build_optimizer(self):
        """Build the optimizer, as Keras does at the first training or evaluation."""
        if not self.model.optimizer.built:
            self.model.optimizer.build(self.model.trainable_variables)

    # Training.

    def train_twin(self, x, y):
        """Train the twin batch by batch. After each update the followers get the values."""
        for i in range(0, len(x), BATCH):
            values = self.twin_values()
            if not self.started:
                before = values
            self.twin.train_on_batch(x[i : i + BATCH], y[i : i + BATCH])
            updates = int(ops.convert_to_numpy(nesting.innermost(self.twin.optimizer).iterations))
            if updates == self.updates:
                continue
            if not self.started:
                self.started = True
                for follower in filter(None, self.followers):
                    follower.begin(before)
            self.follow(self.updates)
            self.updates = updates

    def twin_values(self):
        return [numpy(v).astype("float64") for v in self.twin.trainable_variables]

    def follow(self, i):
        values = self.twin_values()
        for k, (follower, wrapper) in enumerate(zip(self.followers, self.wrappers, strict=True)):
            if follower is None or not follower.is_due(i):
                continue
            skips = k == 0 and self.stack.outermost.get("skip_nonfinite")
            averaged = [values[n] for n in self.numbers(wrapper)]
            if skips and not all(np.all(np.isfinite(v)) for v in averaged):
                continue
            follower.follow(i, values)
            follower.count = getattr(follower, "count", 0) + 1

    def numbers(self, wrapper):
        """The places of a wrapper's averaged variables among the trainable variables."""
        if not wrapper.built:
            excluded = wrapper.exclude or []
            paths = [v.path for v in self.twin.trainable_variables]
            return [i for i, p in enumerate(paths) if not any(e in p for e in excluded)]
        places = {id(v): i for i, v in enumerate(self.model.trainable_variables)}
        return [places[id(v)] for v in wrapper.averaged_variables]

    @rule(number=st.integers(1, 4), way=st.sampled_from(["fit", "train_on_batch"]))
    def train(self, number, way):
        x, y = self.batches(number)
        if self.is_swapped:
            self.refused(RuntimeError, "holds the averages", lambda: self.fit(x, y))
            return
        if way == "fit":
            self.fit(x, y)
        else:
            for i in range(0, len(x), BATCH):
                self.model.train_on_batch(x[i : i + BATCH], y[i : i + BATCH])
        self.train_twin(x, y)

    def fit(self, x, y, *callbacks, **how):
        how = {"batch_size": BATCH, "shuffle": False, "verbose": 0} | how
        self.model.fit(x, y, callbacks=list(callbacks), **how)

    @rule(number=st.integers(1, 4), data=st.booleans(), on_epoch=st.booleans(), raw=st.booleans())
    def train_with_the_callback(self, number, data, on_epoch, raw):
        callback = SwapAverageWeights(on_epoch, X[:8] if data else None, raw)
        x, y = self.batches(number)
        self.fit(x, y, callback, validation_data=(X[:8], Y[:8]))
        self.train_twin(x, y)
        self.is_swapped = self.has_snapshot()
        self.is_recomputed = data and self.is_swapped

    @rule(number=st.integers(1, 3))
    def train_on_a_batch_that_is_not_finite(self, number):
        hypothesis.assume(not self.is_swapped)
        x, y = self.batches(number)
        y = y.copy()
        y[-1] = np.nan
        self.fit(x, y)
        self.train_twin(x, y)

    @rule(
        died=st.integers(1, 5),
        save_freq=st.sampled_from(["epoch", 1, 2]),
        with_averages=st.booleans(),
    )
    def restart_from_a_backup(self, died, save_freq, with_averages):
        hypothesis.assume(not self.is_swapped and not self.is_recomputed)
        self.build_optimizer()  # Otherwise the file would not have its rate.
        folder = self.path("backup")
        x, y = self.batches(3)
        initial = self.path("initial.weights.h5")
        self.model.save_weights(initial)

        def callbacks():
            own = [SwapAverageWeights()] if with_averages else []
            return [*own, BackupAndRestore(folder, save_freq)]

        with contextlib.suppress(BrokenError):
            self.fit(x, y, *callbacks(), Dies(died), epochs=2)
        seeds = [numpy(v) for v in self.twin.variables if "seed" in v.path]
        self.model = build(self.stack.wrapped(), self.is_frozen())
        self.model.optimizer.build(self.model.trainable_variables)
        self.model.load_weights(initial)
        for v, seed in zip(
            [v for v in self.model.variables if "seed" in v.path], seeds, strict=True
        ):
            v.assign(seed)
        self.fit(x, y, *callbacks(), epochs=2)
        self.train_twin(x, y)
        self.train_twin(x, y)
        self.is_swapped = with_averages and self.has_snapshot()

    def is_frozen(self):
        return not self.twin.layers[0].trainable

    # Reading.

    @rule(kind=st.sampled_from(["evaluate", "predict", "call"]), with_averages=st.booleans())
    def look(self, kind, with_averages):
        self.build_optimizer()
        before = everything(self.model)
        callbacks = [SwapAverageWeights()] if with_averages else []
        if kind == "evaluate":
            self.model.evaluate(X, Y, verbose=0, callbacks=callbacks)
        elif kind == "predict":
            self.model.predict(X, verbose=0, callbacks=callbacks)
        else:
            self.model(X)
        same(everything(self.model), before, f"{kind} changes the model")

    @rule()
    def read_the_averages(self):
        before = everything(self.model)
        for wrapper in self.wrappers:
            if not wrapper.built:
                continue
            if not wrapper.has_average:
                reading = wrapper.reading_averages()
                self.refused(ValueError, "no snapshot", reading.__enter__)
                continue
            with wrapper.reading_averages():
                self.model(X, training=False)
            wrapper.stateless_average([v.value for v in wrapper.variables])
        same(everything(self.model), before, "reading averages changes the model")

    # Swapping.

    @rule(times=st.integers(1, 2))
    def swap(self, times):
        for _ in range(times):
            if not self.is_swapped and not self.has_snapshot():
                self.refused(ValueError, "no snapshot|no averages", self.swap_model)
                return
            self.swap_model()
            self.is_swapped = not self.is_swapped
            self.is_recomputed = False

    def swap_model(self):
        keras_avg.swap_weights(self.model)

    @rule(number=st.integers(0, 2))
    def swap_one_of_the_wrappers(self, number):
        wrapper = self.wrappers[number % len(self.wrappers)]
        before = everything(self.model)
        if not wrapper.built:
            return
        if wrapper.averages_in_model:
            if self.is_recomputed:
                return
            wrapper.swap_weights()
            self.is_swapped = bool(self.holders())
            return
        if any(shares_variables(wrapper, holder) for holder in self.holders()):
            why = "holds the averages" if wrapper.has_average else "no snapshot"
            self.refused((RuntimeError, ValueError), why, wrapper.swap_weights)
            return
        if not wrapper.has_average:
            self.refused(ValueError, "no snapshot", wrapper.swap_weights)
            return
        was_swapped, self.is_swapped = self.is_swapped, True
        wrapper.swap_weights()
        self.law()
        wrapper.swap_weights()
        self.is_swapped = was_swapped
        same(everything(self.model), before, "a second swap does not undo the first")

    def holders(self):
        """The wrappers whose averages are in the model."""
        return [w for w in self.wrappers if w.averages_in_model]

    @precondition(lambda self: self.has_snapshot())
    @rule(broken=st.booleans(), recompute=st.booleans())
    def look_in_a_context(self, broken, recompute):
        before = everything(self.model)
        with contextlib.suppress(BrokenError), keras_avg.average_weights(self.model):
            if recompute and not self.is_swapped:
                keras_avg.update_batch_norm(self.model, X, BATCH, verbose=0)
            if broken:
                raise BrokenError
        same(everything(self.model), before, "a context changes the model")

    @precondition(lambda self: self.is_swapped)
    @rule()
    def recompute_statistics(self):
        keras_avg.update_batch_norm(self.model, X, BATCH, verbose=0)
        self.is_recomputed = True

    @rule()
    def assign(self):
        if not self.is_swapped and not self.has_snapshot():
            self.refused(ValueError, "no snapshot|no averages", self.assign_model)
            return
        self.assign_model()
        self.is_swapped = self.is_recomputed = False
        self.adopt_values()

    def assign_model(self):
        keras_avg.assign_average_vars(self.model)

    def adopt_values(self):
        """Give the twin the model's values. Training continues from these."""
        for ours, theirs in zip(self.model.variables, self.twin.variables, strict=True):
            theirs.assign(numpy(ours))
        if not self.stack.is_transparent:
            same_state = [numpy(v) for v in self.model.optimizer.variables]
            if self.model.optimizer.built and self.twin.optimizer.built:
                for value, theirs in zip(same_state, self.twin.optimizer.variables, strict=True):
                    theirs.assign(value)

    # Copies.

    @rule(
        route=st.sampled_from(
            [
                "keras",
                "weights",
                "sharded",
                "both",
                "pickle",
                "deepcopy",
                "clone",
                "checkpoint",
                "from_config",
            ]
        )
    )
    def go_on_with_a_copy(self, route):
        self.build_optimizer()
        before = everything(self.model)
        copied = self.copy_by(route)
        same(everything(self.model), before, f"saving as {route} changes the model")
        seeds = [v for v in copied.variables if "seed" in v.path]
        for v, old in zip(
            seeds, [v for v in self.model.variables if "seed" in v.path], strict=True
        ):
            v.assign(numpy(old))  # Keras does not save them everywhere
        same(everything(copied), before, f"a copy by {route} is not equal")
        self.model = copied

    def copy_by(self, route):
        if route == "pickle":
            return pickle.loads(pickle.dumps(self.model))
        if route == "deepcopy":
            return copy.deepcopy(self.model)
        if route == "keras":
            self.model.save(self.path("m.keras"))
            return keras.saving.load_model(self.path("m.keras"))
        optimizer = self.stack.wrapped()
        if route == "from_config":
            config = keras.optimizers.serialize(self.model.optimizer)
            optimizer = keras.optimizers.deserialize(config)
        copied = build(optimizer, self.is_frozen())
        copied.optimizer.build(copied.trainable_variables)
        if route == "clone" and not self.is_swapped:  # Raw weights that are aside are no variables.
            return self.clone()
        if route == "checkpoint" and self.has_snapshot() and not self.is_swapped:
            return self.copy_of_averages()
        if route == "both":
            self.model.save(self.path("m.keras"))
            copied.load_weights(self.path("m.keras"))
        else:
            name, size = {"sharded": ("m.weights.json", 1e-6)}.get(route, ("m.weights.h5", None))
            self.model.save_weights(self.path(name), **({"max_shard_size": size} if size else {}))
            copied.load_weights(self.path(name))
        return copied

    def clone(self):
        """Keras' clone of the model, with the values of all variables."""
        copied = keras.models.clone_model(self.model)
        config = keras.optimizers.serialize(self.model.optimizer)
        copied.compile(keras.optimizers.deserialize(config), "mse")
        copied.optimizer.build(copied.trainable_variables)
        for new, old in zip(all_variables(copied), all_variables(self.model), strict=True):
            new.assign(numpy(old))
        return copied

    def copy_of_averages(self):
        """A file as `AverageModelCheckpoint` writes it. A swap restores the raw weights."""
        checkpoint = AverageModelCheckpoint(False, self.path("c.keras"))
        checkpoint.set_model(self.model)
        checkpoint.on_epoch_begin(0)
        checkpoint.on_epoch_end(0, {})
        loaded = keras.saving.load_model(self.path("c.keras"))
        keras_avg.swap_weights(loaded)
        return loaded

    @rule(what=st.sampled_from(["optimizer", "model", "tree"]))
    def set_what_was_got(self, what):
        self.build_optimizer()
        before = everything(self.model)
        if what == "model":
            self.model.set_weights(self.model.get_weights())
        elif what == "tree":
            self.model.set_state_tree(self.model.get_state_tree(value_format="numpy_array"))
        else:
            self.wrappers[0].set_weights(self.wrappers[0].get_weights())
        same(everything(self.model), before, f"get and set of the {what} changes it")

    @rule(what=st.sampled_from(["too few", "a shape", "NaN counter"]))
    def set_what_does_not_fit(self, what):
        wrapper = self.wrappers[0]
        if not wrapper.built:
            return
        weights = [w.copy() for w in wrapper.get_weights()]
        if what == "too few":
            weights.pop()
        elif what == "a shape":
            weights[-1] = np.zeros((7, 7))
        else:
            weights[0] = np.array(np.nan)
        self.refused(ValueError, "does not fit", lambda: wrapper.set_weights(weights))

    @rule(where=st.floats(0.0, 0.98))
    def load_a_file_that_is_cut_short(self, where):
        self.build_optimizer()
        path = self.path("cut.weights.h5")
        self.model.save_weights(path)
        whole = path.read_bytes()
        path.write_bytes(whole[: int(len(whole) * where)])
        self.refused((OSError, ValueError), "", lambda: self.model.load_weights(path))

    # Changing the model.

    @rule(stack=stacks.stacks(), freeze=st.booleans())
    def compile_anew(self, stack, freeze):
        # A pattern of `exclude` that matches no trained variable is refused.
        hypothesis.assume(not freeze or "hidden/kernel" not in stack.outermost.get("exclude", []))
        model = self.model
        model.layers[0].trainable = not freeze

        def compiled(optimizer):
            model.compile(optimizer, "mse")
            return model

        self.begin(stack, compiled)
        self.twin = build(stack.twin(), freeze)
        self.adopt_values()

    @rule(rate=st.sampled_from([0.001, 0.02]))
    def change_the_rate(self, rate):
        for optimizer in (self.model.optimizer, self.twin.optimizer):
            try:
                optimizer.learning_rate = rate
            except (TypeError, ValueError, AttributeError):
                assert self.stack.inner in ("schedule", "multi", "members")

    @rule(change=st.sampled_from(["lora", "quantize"]))
    def change_the_layers_of_a_copy(self, change):
        self.build_optimizer()
        before = everything(self.model)
        copied = self.copy_by("deepcopy")
        if keras_avg.averaging_optimizers(copied)[0].averages_in_model:
            keras_avg.assign_average_vars(copied)
        if change == "lora":
            hypothesis.assume("hidden/kernel" not in self.stack.outermost.get("exclude", []))
            copied.layers[0].enable_lora(2)
            copied.compile(self.stack.wrapped(), "mse")
            copied.fit(X, Y, batch_size=BATCH, verbose=0)
        else:
            copied.quantize("int8")
        copied.save(self.path("changed.keras"))
        loaded = keras.saving.load_model(self.path("changed.keras"))
        found, expected = loaded.predict(X, verbose=0), copied.predict(X, verbose=0)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
        same(everything(self.model), before, f"{change} of a copy changes the model")

    def refused(self, error, match, operation):
        """The operation is refused with a message that says why, and changes nothing."""
        self.build_optimizer()
        before = everything(self.model)
        with pytest.raises(error, match=match):
            operation()
        same(everything(self.model), before, "a refused operation changes something")

    # The laws.

    @hypothesis.stateful.invariant()
    def law(self):
        if not hasattr(self, "model"):
            return
        wrappers = self.wrappers
        holders = self.holders()
        held = [id(v) for holder in holders for v in holder.averaged_variables]
        assert len(set(held)) == len(held), "two averages in one variable"
        assert bool(holders) == self.is_swapped
        for holder in holders:
            shown = [numpy(a) for a in holder.averages()]
            held = [numpy(v) for v in holder.averaged_variables]
            same(held, [a.astype(h.dtype) for a, h in zip(shown, held, strict=True)], "shown")
        with contextlib.ExitStack() as stack:
            for wrapper in wrappers:
                stack.enter_context(wrapper.raw_weights())
            ours = [numpy(v) for v in self.model.variables]
        same(ours, [numpy(v) for v in self.twin.variables], "raw weights")
        self.check_inner_state()
        self.check_averages()

    def check_inner_state(self):
        ours, theirs = self.model.optimizer, self.twin.optimizer
        if self.stack.loss_scale and ours.built and theirs.built:
            assert numpy(ours.dynamic_scale) == numpy(theirs.dynamic_scale)
        if ours.built and theirs.built:
            both = (nesting.leaves(ours), nesting.leaves(theirs))
            state = [[numpy(v) for leaf in leaves for v in leaf.variables] for leaves in both]
            same(*state, "the inner optimizers' state")

    def check_averages(self):
        for wrapper, follower in zip(self.wrappers, self.followers, strict=True):
            if follower is None:
                continue
            count = getattr(follower, "count", 0)
            assert wrapper.num_snapshots == count, f"{wrapper.num_snapshots}, not {count}"
            if not wrapper.has_average:
                continue
            expected = [follower.shown()[i] for i in self.numbers(wrapper)]
            for average, right in zip(wrapper.averages(), expected, strict=True):
                off = np.abs(numpy(average).astype("float64") - right) / (1.0 + np.abs(right))
                finite = np.isfinite(right)
                assert np.array_equal(finite, np.isfinite(numpy(average))), wrapper
                assert np.all(off[finite] <= TOLERANCE), f"{wrapper} is off by {np.nanmax(off)}"


def run(walks, steps, seed, phases=tuple(hypothesis.Phase)):
    """Run walks. Raises the error of the shortest walk that breaks a law."""
    settings = hypothesis.settings(
        max_examples=walks,
        stateful_step_count=steps,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        print_blob=False,
        report_multiple_bugs=False,
        phases=phases,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_machine(hypothesis.seed(seed)(Walk), settings=settings)


def main():
    options = argparse.ArgumentParser()
    options.add_argument("--walks", type=int, default=10_000)
    options.add_argument("--steps", type=int, default=15)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--seconds", type=float, default=float("inf"))
    chosen = options.parse_args()
    gc.freeze()  # Keras' `quantize` collects garbage. It need not search the imported modules.
    began, done, broken = time.perf_counter(), 0, 0
    while done < chosen.walks and time.perf_counter() - began < chosen.seconds:
        seed = chosen.seed + done
        try:
            run(min(AT_ONCE, chosen.walks - done), chosen.steps, seed, [hypothesis.Phase.generate])
        except Exception:  # a law is broken, or the walk itself is wrong
            broken += 1
            print(f"--- in the {AT_ONCE} walks of seed {seed}", flush=True)
            traceback.print_exc(limit=-6)
        done += AT_ONCE
    seconds = time.perf_counter() - began
    print(
        json.dumps(
            {
                "backend": keras.backend.backend(),
                "walks": done,
                "steps": chosen.steps,
                "seed": chosen.seed,
                "seconds": round(seconds),
                "broken": broken,
            }
        )
    )
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main())
