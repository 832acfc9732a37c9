"""Optimizer steps on PyTorch: those of Keras, and those with the averages of PyTorch libraries."""

import importlib
import importlib.util
import pathlib
import types
from collections.abc import Callable, Sequence
from typing import Any

import keras
import torch
from torch.optim import swa_utils

from benchmarks import averages

MODES = ("eager",)


def finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def then_finish(call: Callable[..., Any], *arguments: Any, **keywords: Any) -> Callable[[], None]:
    def run() -> None:
        call(*arguments, **keywords)
        finish()

    return run


def triad(count: int) -> Callable[[], None]:
    device = keras.ops.ones(()).device
    a, b, c = (torch.ones(count, device=device) for _ in range(3))
    return then_finish(torch.add, a, b, out=c)


def copy(count: int) -> Callable[[], None]:
    device = keras.ops.ones(()).device
    a, b = (torch.ones(count, device=device) for _ in range(2))
    return then_finish(a.copy_, b)


class Steps:
    """Steps of several optimizers on the same variables. Each optimizer keeps its own averages."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], dtype: str, mode: str) -> None:
        self.variables = [keras.Variable(keras.ops.ones(s, dtype), dtype=dtype) for s in shapes]
        self.gradients = [torch.full_like(v.value, 1e-3) for v in self.variables]

    def of(self, optimizer: Any) -> Callable[[], None]:
        optimizer.build(self.variables)
        return then_finish(optimizer.apply, self.gradients, self.variables)

    def rivals(self) -> dict[str, Callable[[], Callable[[], None]]]:
        found = {
            "AveragedModel, multi_avg_fn": self._averaged_model_of_lists,
            "AveragedModel, avg_fn": self._averaged_model_of_tensors,
            "AveragedModel, default (SWA)": lambda: self._averaged_model(),
        }
        if importlib.util.find_spec("timm"):
            found["timm ModelEmaV3"] = self._timm
        if importlib.util.find_spec("ema_pytorch"):
            found["ema-pytorch"] = self._ema_pytorch
        if _lightning() is not None:
            found["Lightning EMAWeightAveraging"] = self._lightning
        return found

    def _module(self, kind: type = torch.nn.Module) -> Any:
        module = kind()
        module.weights = torch.nn.ParameterList([v.value for v in self.variables])
        return module

    def _followed_by(self, update: Callable[[], Any]) -> Callable[[], None]:
        step = self.of(averages.optimizers(keras.optimizers.SGD)[averages.BARE]())

        def run() -> None:
            step()
            update()
            finish()

        return run

    def _averaged_model(self, **how: Any) -> Callable[[], None]:
        module = self._module()
        average = swa_utils.AveragedModel(module, **how)
        return self._followed_by(lambda: average.update_parameters(module))

    def _averaged_model_of_lists(self) -> Callable[[], None]:
        average_lists = swa_utils.get_ema_multi_avg_fn(averages.DECAY)
        return self._averaged_model(multi_avg_fn=average_lists)

    def _averaged_model_of_tensors(self) -> Callable[[], None]:
        return self._averaged_model(avg_fn=swa_utils.get_ema_avg_fn(averages.DECAY))

    def _timm(self) -> Callable[[], None]:
        module = self._module()
        average = _timm_class()(module, decay=averages.DECAY, dtype=torch.float32)
        return self._followed_by(lambda: average.update(module))

    def _ema_pytorch(self) -> Callable[[], None]:
        average = importlib.import_module("ema_pytorch").EMA(
            self._module(),
            beta=averages.DECAY,
            update_after_step=0,
            update_every=1,
            use_foreach=True,
            include_online_model=False,
        )
        return self._followed_by(average.update)

    def _lightning(self) -> Callable[[], None]:
        lightning = _lightning()
        module = self._module(lightning.LightningModule)
        trainer = types.SimpleNamespace(global_step=0)
        callback = lightning.callbacks.EMAWeightAveraging(decay=averages.DECAY)
        callback.setup(trainer, module, "fit")

        def update() -> None:
            trainer.global_step += 1
            callback.on_train_batch_end(trainer, module, None, None, 0)

        return self._followed_by(update)


def _timm_class() -> type:
    # Loaded from its file: the package imports torchvision, which this class does not use.
    (folder,) = importlib.util.find_spec("timm").submodule_search_locations
    file = pathlib.Path(folder) / "utils" / "model_ema.py"
    spec = importlib.util.spec_from_file_location("timm_model_ema", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ModelEmaV3


def _lightning() -> Any:
    for package in ("lightning.pytorch", "pytorch_lightning"):
        if importlib.util.find_spec(package.partition(".")[0]):
            module = importlib.import_module(package)
            if hasattr(importlib.import_module(f"{package}.callbacks"), "EMAWeightAveraging"):
                return module
    return None
