"""Argument names of other libraries, and the arguments here that mean the same."""

from collections.abc import Collection
from typing import Any, NamedTuple


class _Idea(NamedTuple):
    """One idea, and all the names that libraries give to it."""

    words: tuple[str, ...]
    arguments: tuple[str, ...]  # the names here; a wrapper has at most one of them
    example: str  # a wrapper that has such an argument
    unit: str = ""


IDEAS = (
    _Idea(
        (
            *("decay", "ema_decay", "ema_momentum", "beta", "half_life", "max_decay"),
            *("average_decay", "ema_alpha"),
        ),
        ("average_decay",),
        "keras_avg.MovingAverage(optimizer, average_decay=0.999)",
    ),
    _Idea(
        (
            *("start", "swa_start", "swa_epoch_start", "update_after_step", "start_iter"),
            *("start_averaging", "start_step", "update_starting_at_step", "start_epoch", "begin"),
        ),
        ("start_averaging", "start_step"),
        "keras_avg.SWA(optimizer, start_averaging=1000)",
        ", in steps",
    ),
    _Idea(
        (
            *(
                "every",
                "period",
                "interval",
                "update_every",
                "update_freq",
                "swa_freq",
                "swa_period",
            ),
            *("update_every_n_steps", "sync_every", "k", "average_period", "sync_period"),
            *("interval_steps", "ema_overwrite_every"),
        ),
        ("average_period", "sync_period", "interval_steps"),
        "keras_avg.SWA(optimizer, average_period=10)",
        ", in steps",
    ),
    _Idea(
        ("la_alpha", "alpha", "slow_step", "slow_step_size"),
        ("slow_step_size",),
        "keras_avg.Lookahead(optimizer, slow_step_size=0.5)",
    ),
    _Idea(
        ("use_ema_warmup", "use_warmup", "warmup", "zero_debias", "dynamic_decay"),
        ("dynamic_decay",),
        "keras_avg.MovingAverage(optimizer, dynamic_decay=True)",
    ),
    _Idea(
        ("num_workers", "world_size", "num_replicas"),
        ("num_worker",),
        "keras_avg.ModelAverage(optimizer)",
    ),
)

# Names for which no wrapper has an argument, and what to do instead.
ELSEWHERE = {
    "device": "There is no such argument: averages lie on the device of their variables.",
    "swa_lr": "The learning rate of SWA is a schedule of the inner optimizer: "
    "keras_avg.schedules.SWALearningRate(...).",
    "anneal_epochs": "The learning rate of SWA is a schedule of the inner optimizer: "
    "keras_avg.schedules.SWALearningRate(..., anneal_steps=...), in steps.",
    "use_buffers": "Batch-normalization statistics of the averages are recomputed: "
    "keras_avg.update_batch_norm(model, x).",
    "avg_fn": "A formula of your own is a subclass of keras_avg.AveragedOptimizerWrapper.",
    "multi_avg_fn": "A formula of your own is a subclass of keras_avg.AveragedOptimizerWrapper.",
}


def refuse(wrapper: str, known: Collection[str], keywords: dict[str, Any]) -> None:
    """Refuse the first keyword that is a name of another library, and say its name here.

    Args:
        wrapper: Name of the wrapper's class.
        known: Names of all arguments that the wrapper takes.
        keywords: Dict of the keywords that were given.

    Raises:
        TypeError: If `decay` is given to a wrapper whose rule has a decay. For all other wrappers
            `decay` is the decay of the learning rate, as in Keras 2.
        ValueError: If another name of another library is given.
    """
    for word, value in keywords.items():
        if word == "decay" and "average_decay" in known:
            raise TypeError(
                f"{wrapper} takes the decay of its average as `average_decay`: "
                f"average_decay={value!r}. Received: decay={value!r}. For a learning rate that "
                "decays, give the inner optimizer a schedule: "
                "keras.optimizers.schedules.InverseTimeDecay(learning_rate, 1, decay)."
            )
        if word not in known and (meaning := _meaning(wrapper, word, known)):
            raise ValueError(f"{meaning} Received: {word}={value!r}.")


def _meaning(wrapper: str, word: str, known: Collection[str]) -> str | None:
    if word in ELSEWHERE:
        return ELSEWHERE[word]
    ideas = [idea for idea in IDEAS if word in idea.words]
    for idea in ideas:
        for argument in idea.arguments:
            if argument in known:
                return f"{wrapper} calls `{word}` `{argument}`{idea.unit}.{_converted(word)}"
    if ideas:
        return f"{wrapper} has no `{word}`. See {ideas[0].example}."
    return None


def _converted(word: str) -> str:
    if word == "half_life":
        return " A half-life of n steps is average_decay=0.5 ** (1 / n)."
    if word in ("swa_epoch_start", "start_epoch"):
        return " Multiply epochs by the steps of an epoch."
    return ""
