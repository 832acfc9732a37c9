"""A pytest plugin that wraps every optimizer in the test files that pytest collects.

Keras' test files are not changed. While such a file is imported, the names of optimizers in Keras
are those of constructors that return wrapped optimizers. Keras itself still uses its own classes.
"""

import fnmatch
import importlib.util
import sys
import types
from typing import ClassVar

import keras
import pytest
from keras.src import optimizers as keras_src_optimizers
from keras.src import testing  # noqa: F401  (must be imported before anything is patched)

import keras_avg

WRAPPERS = {
    "SWA": lambda optimizer: keras_avg.SWA(optimizer, start_averaging=0, average_period=1),
    "MovingAverage": keras_avg.MovingAverage,
}
OUTSIDE = (keras.optimizers.LossScaleOptimizer, keras.optimizers.MultiOptimizer)

CLIPS = "calls `_clip_gradients`, a private helper"
MUON = "calls a helper of Muon"
UPDATE_STEP = "calls `update_step`, which is half of a step and each class's own"
CLASS = "asks of which class the optimizer is"
NAME = "expects the name of the optimizer's class"
ARGUMENT = "reads an argument of the constructor, which is kept on `inner_optimizer`"

# Keras' tests of the optimizers' classes themselves. They cannot pass with a wrapper.
EXCLUDED = {
    "*::test_clip_norm": CLIPS,
    "*::test_clip_value": CLIPS,
    "optimizer_test::test_global_clip_norm": CLIPS,
    "optimizer_test::test_clip_args": ARGUMENT,
    "optimizer_test::test_gradient_accumulation": ARGUMENT,
    "optimizer_distribute_test::test_gradient_accumulation": ARGUMENT,
    "optimizer_test::test_get_method": CLASS,
    "optimizer_test::test_optimizer_auto_naming": NAME,
    "multi_optimizer_test::test_tensorboard_logging_with_multi_optimizer": NAME,
    "multi_optimizer_test::test_serialization": CLASS,
    "multi_optimizer_test::test_swap_ema_weights_with_multi_optimizer": ARGUMENT + " (`use_ema`)",
    "muon_test::test_Newton_Schulz": MUON,
    "muon_test::test_lr_adjust_*": MUON,
    "muon_test::test_should_use_adamw": MUON,
    "muon_test::test_*_weight_decay": "calls `_apply_weight_decay`, a private helper",
    "muon_test::test_*_single_step": UPDATE_STEP,
    "nadam_test::test_build_with_empty_var_list": "reads `_u_product`, a private variable of Nadam",
    "optimizer_sparse_test::test_sparse_gradients_*": "puts mocks in place of the class's `assign`",
    "sgd_test::test_single_step": "counts the variables of the class",
}
EXCLUDED_AROUND_MULTI = {
    "multi_optimizer_test::test_default_fallback": "reads `_var_to_optimizer_idx`, a private table",
    "multi_optimizer_test::test_serialization": "reads `_var_to_optimizer_idx`, a private table",
    "multi_optimizer_test::test_multi_optimizer_blocks_nested_optimizers": CLASS,
}
# The private attributes of an optimizer that Keras' tests read. There are no public names for them.
INNER_STATE = ("_model_variables_moving_average", "_accumulated_gradients")


class Constructor(type):
    """Makes classes whose instances are wrapped optimizers. The same holds for their subclasses."""

    wrap: ClassVar = None

    def __call__(cls, *arguments, **keywords):
        kind = vars(cls).get("stands_for")
        construct = kind or super().__call__
        return Constructor.wrap(construct(*arguments, **keywords))


class Wrapping:
    """Wraps optimizers, and remembers the wrappers."""

    def __init__(self, wrapper, around_multi):
        self.wrapper, self.around_multi = WRAPPERS.get(wrapper), around_multi
        self.excluded = EXCLUDED_AROUND_MULTI if around_multi else EXCLUDED
        self.made, self.averagings = [], 0

    def wrap(self, optimizer):
        if optimizer is None:
            return None
        self.made.append(self.wrapper(optimizer))
        return self.made[-1]

    def kinds(self):
        if self.around_multi:
            return [keras.optimizers.MultiOptimizer]
        named = [kind for kind in vars(keras.optimizers).values() if isinstance(kind, type)]
        return [k for k in named if issubclass(k, keras.optimizers.Optimizer) and k not in OUTSIDE]

    def patch(self, patch):
        names = types.ModuleType(keras_src_optimizers.__name__)
        vars(names).update(vars(keras_src_optimizers))
        for kind in self.kinds():
            constructor = Constructor(kind.__name__, (kind,), {"stands_for": kind})
            setattr(names, kind.__name__, constructor)
            patch.setattr(sys.modules[kind.__module__], kind.__name__, constructor)
        if not self.around_multi:
            names.get = lambda identifier: self.wrap(keras_src_optimizers.get(identifier))
        patch.setattr("keras.src.optimizers", names)

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(self, collector):
        if self.wrapper is None or not isinstance(collector, pytest.Module):
            return (yield)
        with pytest.MonkeyPatch.context() as patch:
            self.patch(patch)
            return (yield)

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, config, items):
        """Mark excluded tests: with wrappers they must fail, and without them only they run."""
        self.refuse_stale(items)
        reasons = {item: self.reason(item) for item in items}
        for item, reason in reasons.items():
            if needs_tensorflow(item):
                item.add_marker(pytest.mark.skip(reason="TensorBoard needs TensorFlow"))
            elif reason and self.wrapper:
                item.add_marker(pytest.mark.xfail(reason=reason, strict=True))
        if self.wrapper is None:
            items[:] = [item for item in items if reasons[item]]

    def refuse_stale(self, items):
        files = {item.path.stem for item in items}
        for pattern in self.excluded:
            file, _, _ = pattern.partition("::")
            expected = file in files or (file == "*" and len(files) > 1)
            if expected and not fnmatch.filter(map(name, items), pattern):
                raise pytest.UsageError(f"Excluded is a test that Keras does not have: {pattern}")

    def reason(self, item):
        return next((r for p, r in self.excluded.items() if fnmatch.fnmatch(name(item), p)), None)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        """After each test, check that every optimizer has averaged as often as it has stepped."""
        self.made.clear()
        result = yield
        for optimizer in self.made:
            if optimizer.built:
                iterations = keras.ops.convert_to_numpy(optimizer.iterations)
                assert optimizer.num_snapshots == iterations
                self.averagings += optimizer.num_snapshots
        return result

    def pytest_terminal_summary(self, terminalreporter):
        stats = {kind: len(reports) for kind, reports in terminalreporter.stats.items()}
        terminalreporter.write_line(
            f"{stats.get('passed', 0)} passed, {stats.get('xfailed', 0)} excluded by name, "
            f"{stats.get('skipped', 0)} skipped, {stats.get('failed', 0)} failed; "
            f"{self.averagings} averagings"
        )


def name(item):
    return f"{item.path.stem}::{item.name}"


def needs_tensorflow(item):
    return "tensorboard" in item.name and importlib.util.find_spec("tensorflow") is None


def pytest_addoption(parser):
    parser.addoption("--wrapper", choices=[*WRAPPERS, "none"], required=True)
    parser.addoption("--around-multi", action="store_true", help="wrap MultiOptimizer, not members")


def pytest_configure(config):
    config.addinivalue_line("markers", "requires_trainable_backend: of Keras")
    wrapping = Wrapping(config.option.wrapper, config.option.around_multi)
    Constructor.wrap = wrapping.wrap
    config.pluginmanager.register(wrapping)
    for state in INNER_STATE:
        inner = property(lambda self, state=state: getattr(self.inner_optimizer, state))
        setattr(keras_avg.AveragedOptimizerWrapper, state, inner)
