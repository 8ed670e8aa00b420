"""How long maximum likelihood takes: this library beside the loop over SciPy, in one run.

``make bench`` runs this. Both fit the same simulated voxels from the same start (the truth) with
the same bounds; the loop's rate is measured on a slice of them. The reader's scalar function is
fitted too, and, where the optional package is installed (``pip install "qmri-book[bench]"``),
DIPY's IVIM fit, which is a least-squares method of its own with its own starts.
"""

from __future__ import annotations

import os

# One BLAS thread: more only get into the way of SciPy's loop over tiny arrays, and the
# comparison shall be with the loop at its best.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import importlib.util
import math
import time
import warnings
from collections.abc import Callable

import numpy as np
from scipy.optimize import minimize
from scipy.special import i0e

from qmri import IVIM, FunctionModel, Gaussian, Rician, fit_mle

BVALUES = (0, 10, 20, 30, 50, 80, 100, 200, 400, 800)
SNRS = (15, 30)
VOXELS = 200_000
LOOP_VOXELS = 400
ROUNDS = 5
REQUIRED = {"Gaussian": 700, "Rician": 700, "reader's function": 50}


def ivim_signal(b, S0, f, Dslow, Dfast):
    """The model as a reader would write it."""
    b = b * 1e-3
    return S0 * (f * math.exp(-b * (Dfast + Dslow)) + (1 - f) * math.exp(-b * Dslow))


def loop(kind: type, sigma: float, signals: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """The usual way: one voxel after the other, gradients by differences."""
    b = np.array(BVALUES) * 1e-3

    def clean(theta):
        s0, f, dslow, dfast = theta
        return s0 * (f * np.exp(-b * (dfast + dslow)) + (1 - f) * np.exp(-b * dslow))

    def gaussian(theta, measured):
        return np.sum((measured - clean(theta)) ** 2) / (2 * sigma**2)

    def rician(theta, measured):
        s = clean(theta)
        log_bessel = np.log(i0e(measured * s / sigma**2))
        return np.sum((measured - s) ** 2 / (2 * sigma**2) - log_bessel)

    objective = gaussian if kind is Gaussian else rician
    bounds = IVIM(BVALUES).bounds
    return np.array(
        [
            minimize(objective, start, (measured,), method="L-BFGS-B", bounds=bounds).x
            for start, measured in zip(starts, signals, strict=True)
        ]
    )


def rate(work: Callable[[], object], voxels: int) -> float:
    """Voxels per second in the fastest of several rounds.

    As ``timeit`` advises: slower rounds measure what else the machine was doing.
    """
    seconds = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return voxels / min(seconds)


def simulate(model: IVIM, snr: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(snr)
    theta = model.sample(VOXELS, rng)
    return theta, Rician(1 / snr).sample(model.signal(theta), rng)


def main() -> None:
    model = IVIM(BVALUES)
    mine = FunctionModel(ivim_signal, BVALUES, model.parameters, amplitude="S0")
    print(f"IVIM, {len(BVALUES)} b-values, {os.cpu_count()} cores")
    print(f"voxels per second, fastest of {ROUNDS} rounds")
    print(
        f"{'noise':<10}{'SNR':>4}{'SciPy loop':>12}{'fit_mle':>12}{'ratio':>8}{'worse':>7}", end=""
    )
    print(f"{'no start':>12}{'function':>12}{'ratio':>8}")
    ratios: dict[str, list[float]] = {name: [] for name in REQUIRED}
    for kind in (Gaussian, Rician):
        for snr in SNRS:
            theta, signals = simulate(model, snr)
            noise, some = kind(1 / snr), slice(0, LOOP_VOXELS)
            for warm_up in (model, mine):
                fit_mle(warm_up, noise, signals[some], start=theta[some])
            scipy = rate(
                lambda: loop(kind, 1 / snr, signals[some], theta[some]),  # noqa: B023
                LOOP_VOXELS,
            )
            ours = rate(lambda: fit_mle(model, noise, signals, start=theta), VOXELS)  # noqa: B023
            blind = rate(lambda: fit_mle(model, noise, signals), VOXELS)  # noqa: B023
            tenth = slice(0, VOXELS // 10)
            reader = rate(
                lambda: fit_mle(mine, noise, signals[tenth], start=theta[tenth]),  # noqa: B023
                VOXELS // 10,
            )
            theirs = model.signal(loop(kind, 1 / snr, signals[some], theta[some]))
            nll = noise.nll(signals[some], theirs).sum(axis=1)
            worse = int(
                np.sum(fit_mle(model, noise, signals[some], start=theta[some]).nll > nll + 1e-6)
            )
            ratios[kind.__name__].append(ours / scipy)
            ratios["reader's function"].append(reader / scipy)
            print(
                f"{kind.__name__:<10}{snr:>4}{scipy:>12,.0f}{ours:>12,.0f}{ours / scipy:>8,.0f}"
                f"{worse:>7}{blind:>12,.0f}{reader:>12,.0f}{reader / scipy:>8,.0f}"
            )
    for name, required in REQUIRED.items():
        smallest = min(ratios[name])
        verdict = "met" if smallest >= required else "MISSED"
        print(f"{name}: at least {smallest:,.0f} times the loop ({required} asked for: {verdict})")
    dipy(model)


def dipy(model: IVIM) -> None:
    if importlib.util.find_spec("dipy") is None:
        print('DIPY is not installed (pip install "qmri-book[bench]" adds it): left out')
        return
    from dipy.core.gradients import gradient_table
    from dipy.reconst.ivim import IvimModel

    directions = np.tile([1.0, 0.0, 0.0], (len(BVALUES), 1))
    table = gradient_table(np.array(BVALUES, dtype=float), bvecs=directions, b0_threshold=0)
    _, signals = simulate(model, 30)
    some = signals[: LOOP_VOXELS // 4]
    fit = IvimModel(table, fit_method="trr")
    with warnings.catch_warnings():  # one for each voxel that its first stage cannot place
        warnings.simplefilter("ignore")
        speed = rate(lambda: fit.fit(some), len(some))
    print(f"DIPY (least squares in two stages): {speed:,.0f} voxels per second")


if __name__ == "__main__":
    main()
