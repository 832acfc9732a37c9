"""Every average against theory: the noise that is left in the stationary state of training.

Gradient descent on a quadratic with gradient noise does not converge. It keeps moving around the
minimum. With the learning rate eta, the curvature h and noise of the size c, a step is

    x' = (1 - eta h) x - eta c xi,    xi standard normal

The variance converges to V = eta^2 c^2 / (1 - a^2) with a = 1 - eta h. Values that are k steps
apart have the correlation a^k. So the variance of every weighted mean of them has a formula. The
ratio to V says how much noise an average removes, before any network is trained.

The script runs the wrappers of this package on 20,000 such quadratics at once, measures the
variance of their averages, and draws it beside the formula. `ScheduleFree` and `PrimalAverage`
change training. Their theory is a linear recurrence. If a bar does not end at its line, there is a
bug. It takes half a minute:

    KERAS_BACKEND=jax python examples/noisy_quadratic.py
"""

import argparse
import pathlib

import keras
import matplotlib.pyplot as plt
import numpy as np

import keras_avg

ETA, H, C = 0.1, 1.0, 1.0
A = 1 - ETA * H
V = ETA**2 * C**2 / (1 - A**2)
COORDINATES = 20_000
STEPS = 240


def of_weights(weights):
    """Variance of the sum of weights[j] * x(t - j), in units of V."""
    lags = np.arange(len(weights))
    return weights @ A ** abs(lags[:, None] - lags) @ weights


def of_mean(number, period):
    """The plain mean of snapshots that are `period` steps apart."""
    j = np.arange(1, number)
    return (1 + 2 * np.sum((1 - j / number) * A ** (period * j))) / number


def of_moving_average(decay, period=1):
    b, a = decay**period, A**period
    return (1 - b) / (1 + b) * (1 + a * b) / (1 - a * b)


def of_power_function(gamma, steps):
    edges = (np.arange(steps + 1) / steps) ** (gamma + 1)
    return of_weights(np.diff(edges)[::-1])


def of_lookahead(period, share):
    fast = share**2 * (1 - A ** (2 * period))
    return fast / (fast + 2 * share * (1 - share) * (1 - A**period))


def of_bema(steps, power=0.5, bias_power=0.2, lag=10.0):
    """The weights of all values in the corrected average. The oldest value is the start."""
    ages = lag + np.arange(1.0, steps + 1)
    fresh = ages**-power
    kept = np.append(np.cumprod((1 - fresh)[::-1])[::-1][1:], 1.0)
    weights = np.append(np.prod(1 - fresh), fresh * kept)
    weights[0] -= ages[-1] ** -bias_power
    weights[-1] += ages[-1] ** -bias_power
    return of_weights(weights[::-1])


def of_interpolated(fresh, interpolation, steps):
    """ScheduleFree and PrimalAverage: the covariance of (x, z), step by step, from V in both.

    z <- z - eta (h y + c xi) with y between x and z. Then x moves by the share `fresh(t)` to z.
    """
    b = interpolation
    covariance = np.ones((2, 2)) * V
    for t in range(1, steps + 1):
        share = fresh(t)
        z = np.array([-ETA * H * b, 1 - ETA * H * (1 - b)])  # the new z, as a function of x and z
        step = np.array([(1 - share) * np.array([1.0, 0.0]) + share * z, z])
        noise = ETA * C * np.array([share, 1.0])
        covariance = step @ covariance @ step.T + np.outer(noise, noise)
    return covariance[0, 0] / V


def rules():
    """Names, wrappers around an optimizer, and the share of V that theory predicts."""
    averages, decays = keras_avg, keras_avg.decays
    power = decays.PowerFunction(0.1)
    return {
        "raw": (lambda o: averages.LAWA(o, 1, 0, 1), 1.0),
        "EMA\n0.95": (
            lambda o: averages.MovingAverage(o, average_decay=0.95),
            of_moving_average(0.95),
        ),
        "EMA\nevery 4": (
            lambda o: averages.MovingAverage(o, average_decay=0.95, average_period=4),
            of_moving_average(0.95, 4),
        ),
        "half-life\n8 steps": (
            lambda o: averages.MovingAverage(o, average_decay=decays.HalfLife(8)),
            of_moving_average(0.5 ** (1 / 8)),
        ),
        "power\nfunction": (
            lambda o: averages.MovingAverage(o, average_decay=power),
            of_power_function(power.gamma, STEPS),
        ),
        "LAWA\n6, every 5": (lambda o: averages.LAWA(o, 6, 0, 5), of_mean(6, 5)),
        "SWA\nevery 3": (lambda o: averages.SWA(o, 0, 3), of_mean(STEPS // 3, 3)),
        "SWAG\nevery 3": (lambda o: averages.SWAG(o, 0, 3, rank=1), of_mean(STEPS // 3, 3)),
        "BEMA": (averages.BEMA, of_bema(STEPS)),
        "Lookahead\n5, 0.4": (lambda o: averages.Lookahead(o, 5, 0.4), of_lookahead(5, 0.4)),
        "Schedule-\nFree": (
            averages.ScheduleFree,
            of_interpolated(lambda t: 1 / t, 0.9, STEPS),
        ),
        "Primal-\nAverage": (
            lambda o: averages.PrimalAverage(o, average_decay=0.95),
            of_interpolated(lambda t: 0.05, 0.7, STEPS),
        ),
    }


def measure(wrapper, coordinates):
    """The variance over the coordinates of the final averages, in units of V."""
    random = np.random.default_rng(11)
    x = keras.Variable(random.normal(size=coordinates, scale=V**0.5))
    optimizer = wrapper(keras.optimizers.SGD(ETA))
    optimizer.build([x])
    for _ in range(STEPS):
        value = keras.ops.convert_to_numpy(x)
        gradient = H * value + C * random.normal(size=coordinates)
        optimizer.apply([keras.ops.convert_to_tensor(gradient, "float32")], [x])
    (shown,) = optimizer.averages()
    return float(np.mean(keras.ops.convert_to_numpy(shown) ** 2)) / V


def draw(theory, measured, path):
    figure, axes = plt.subplots(figsize=(10, 4.8), layout="constrained")
    places = np.arange(len(theory))
    colors = ["0.75" if name == "raw" else "tab:blue" for name in theory]
    axes.bar(places, measured.values(), 0.6, color=colors, alpha=0.7, label="measured")
    axes.scatter(
        places, theory.values(), 500, marker="_", color="black", linewidths=2, label="theory"
    )
    for place, value in zip(places, measured.values(), strict=True):
        axes.text(place, value + 0.02, f"{value:.2f}", ha="center", va="bottom", fontsize=9)
    axes.set(title=f"Variance that is left at rest, after {STEPS} steps with a rate of {ETA}")
    axes.set(ylabel="share of the raw weights' variance", ylim=(0, 1.15))
    axes.set_xticks(places, theory, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper right", frameon=False)
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--coordinates", type=int, default=COORDINATES)
    parser.add_argument("--out", default=pathlib.Path(__file__).with_suffix(".png"))
    arguments = parser.parse_args()
    theory, measured = {}, {}
    print(f"{'rule':<22}{'theory':>8}{'measured':>10}{'deviation':>11}")
    for name, (wrapper, share) in rules().items():
        theory[name], measured[name] = share, measure(wrapper, arguments.coordinates)
        line = " ".join(name.split("\n"))
        print(f"{line:<22}{share:>8.3f}{measured[name]:>10.3f}{measured[name] / share - 1:>11.1%}")
    draw(theory, measured, arguments.out)
    print(f"Picture: {arguments.out}")


if __name__ == "__main__":
    main()
