"""Draws the pictures of the page How it works, into `docs/pictures`: `python docs/pictures.py`.

It computes all values with NumPy. The averages follow the formulas of the page, so an error in a
formula is visible in the picture.
"""

import pathlib

import matplotlib

matplotlib.use("Agg")  # to files, without a window

import matplotlib.pyplot as plt
import numpy as np

PICTURES = pathlib.Path(__file__).parent / "pictures"
RAW, SWA, EMA, OTHER = "0.6", "tab:orange", "tab:blue", "tab:green"


def stochastic_gradient_descent(curvature, rate, noise, steps, start, seed):
    """All points of gradient descent on `sum(curvature * x**2) / 2`, with gradient noise."""
    random = np.random.default_rng(seed)
    points = [np.array(start, float)]
    for _ in range(steps):
        gradient = curvature * points[-1] + noise * random.normal(size=len(start))
        points.append(points[-1] - rate * gradient)
    return np.array(points)


def moving_average(points, decay):
    """The average after each step. It begins with the first point."""
    averages = [points[0]]
    for point in points[1:]:
        averages.append(averages[-1] + (1 - decay) * (point - averages[-1]))
    return np.array(averages)


def plain_mean(points):
    """The mean of all points so far."""
    return np.cumsum(points, axis=0) / np.arange(1, len(points) + 1)[:, None]


def valley():
    """The path of the raw weights in a valley, and of two averages of it."""
    curvature = np.array([1.0, 0.05])
    noise = np.sqrt(curvature)  # steep directions have more noise
    path = stochastic_gradient_descent(curvature, 0.5, noise, 400, [0.5, 9.0], seed=3)
    ema, swa = moving_average(path, 0.97), plain_mean(path[200:])
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    across, along = np.meshgrid(np.linspace(-3, 3, 200), np.linspace(-4, 10, 200))
    height = np.sqrt(curvature[0] * across**2 + curvature[1] * along**2)
    axes.contour(along, across, height, levels=8, colors="0.85", linewidths=0.8)
    axes.plot(path[:, 1], path[:, 0], color=RAW, lw=0.7, label="raw weights")
    axes.plot(ema[:, 1], ema[:, 0], color=EMA, lw=1.8, label="EMA, half-life 23 steps")
    axes.plot(swa[:, 1], swa[:, 0], color=SWA, lw=1.8, label="SWA from step 200")
    axes.plot(0, 0, "k*", ms=12, label="minimum")
    axes.set(xlabel="along the valley", ylabel="across it", xlim=(-3, 10))
    axes.legend(loc="upper right")
    return figure


def profiles():
    """The weight of the value of each step in the average after 1000 steps."""
    steps = np.arange(1, 1001)
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    swa = np.where(steps > 750, 1 / 250, 0)
    half_life = 2.0 ** (-(1000 - steps) / 100)
    lawa = np.where(steps > 900, 1 / 100, 0)
    power = steps**6.94
    axes.plot(steps, swa, color=SWA, label="SWA from step 750")
    axes.plot(steps, half_life / half_life.sum(), color=EMA, label="MovingAverage, half-life 100")
    axes.plot(steps, lawa, color=OTHER, label="LAWA, the last 100 steps")
    axes.plot(steps, power / power.sum(), "k--", label="PowerFunction(0.10)")
    axes.set(xlabel="step", ylabel="weight in the average", xlim=(500, 1005))
    axes.legend(loc="upper left")
    return figure


def noise_and_lag():
    """The variance that is left, by the mean age of the average: the formula and a measurement."""
    decays = 1 - np.logspace(0, -3.3, 60)
    rate, curvature = 0.1, 0.5
    a = 1 - rate * curvature
    left = (1 - decays) / (1 + decays) * (1 + a * decays) / (1 - a * decays)
    age = decays / (1 - decays)
    shown = [0.9, 0.99, 0.999]
    walk = stochastic_gradient_descent(
        np.full(1000, curvature), rate, 1.0, 10_000, np.zeros(1000), seed=0
    )
    variance = walk[2000:].var()
    measured = [moving_average(walk, decay)[-1].var() / variance for decay in shown]
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    axes.loglog(age[1:], left[1:], color=EMA, label="formula")
    points = [d / (1 - d) for d in shown]
    axes.loglog(points, measured, "o", color=SWA, label="measured in 1000 coordinates")
    for decay, point, value in zip(shown, points, measured, strict=True):
        place = {"xytext": (-8, -12), "textcoords": "offset points", "ha": "right"}
        axes.annotate(f"decay {decay}", (point, value), **place)
    axes.set(xlabel="mean age of the values in the average (steps)")
    axes.set(ylabel="variance left, raw = 1")
    axes.legend(loc="upper right")
    return figure


def main():
    PICTURES.mkdir(exist_ok=True)
    for draw in (valley, profiles, noise_and_lag):
        draw().savefig(PICTURES / f"{draw.__name__}.png", dpi=110)


if __name__ == "__main__":
    main()
