"""How long a fingerprint takes: this library beside a loop of matrix exponentials, in one run.

``make bench`` runs this. The loop does what the library does, one tissue after the other: SciPy's
``expm`` for each pulse and each pause, the periodic steady state from their product. Its rate is
measured on a few tissues. Derivatives of the loop would be differences, two more signals for each
of seven parameters.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import numpy as np
from scipy.linalg import expm

from qmri.mt import MTModel, PulseTrain, lineshape

TISSUES = 2048
LOOP_TISSUES = 2
ROUNDS = 5
REQUIRED = {"signals": 4000, "with derivatives": 1500}  # per second on two cores


def loop(train: PulseTrain, theta: np.ndarray) -> np.ndarray:
    """Signals of tissues, one after the other."""
    return np.array([one_signal(train, tissue) for tissue in theta])


def one_signal(train: PulseTrain, tissue: np.ndarray) -> np.ndarray:
    m0s, t1, t2f, rx, t2s, b0, b1 = tissue
    m0f, r1, r2f = 1 - m0s, 1 / t1, 1 / t2f

    def generator(w1: float, r2l: float) -> np.ndarray:
        return np.array(
            [
                [-r2f, -b0, w1, 0, 0, 0],
                [b0, -r2f, 0, 0, 0, 0],
                [-w1, 0, -r1 - rx * m0s, 0, rx * m0f, r1 * m0f],
                [0, 0, 0, -r2l, w1, 0],
                [0, 0, rx * m0s, -w1, -r1 - rx * m0f, r1 * m0s],
                [0, 0, 0, 0, 0, 0],
            ]
        )

    forget, advance = np.diag([1.0, 1, 1, 0, 1, 1]), np.diag([-1.0, -1, 1, 1, 1, 1])
    table, steps = lineshape.table(), []
    for number, (angle, duration) in enumerate(
        zip(train.flip_angles, train.durations, strict=True)
    ):
        r = lineshape.lookup(b1 * angle, duration / t2s, *table)[0]
        pulse = expm(generator(b1 * angle / duration, r / duration) * duration)
        if number == 0:  # between crushers, about the x axis: what they refocus keeps its x
            share = (pulse[1, 1] - pulse[0, 0]) / 2
            turned = (pulse[0, 1] + pulse[1, 0]) / 2
            pulse[:2], pulse[2:5, :2] = 0, 0
            pulse[:2, :2] = [[share, -turned], [-turned, -share]]
        free = expm(generator(0.0, 0.0) * (train.repetition_time - duration) / 2)
        steps.append(free @ forget @ pulse @ forget @ advance @ free)
    cycle = np.eye(6)
    for step in steps:
        cycle = step @ cycle
    kept = [0, 1, 2, 4]
    m = np.zeros(6)
    m[5] = 1
    m[kept] = np.linalg.solve(np.eye(4) - cycle[np.ix_(kept, kept)], cycle[kept, 5])
    signal = []
    for step in steps:
        m = step @ m
        signal.append(m[0] + 1j * m[1])
    return np.array(signal)


def rate(work: Callable[[], object], tissues: int, rounds: int = ROUNDS) -> float:
    """Tissues per second in the fastest of several rounds."""
    seconds = []
    for _ in range(rounds):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return tissues / min(seconds)


def main() -> None:
    train = PulseTrain.default()
    model = MTModel(train)
    theta = model.sample(TISSUES, np.random.default_rng(0))
    some = theta[:LOOP_TISSUES]
    model.signal_and_jacobian(some)
    error = np.abs(model.signal(some) - loop(train, some)).max()
    print(f"MT fingerprints of {train.pulses} pulses, {os.cpu_count()} cores")
    print(f"fingerprints per second, fastest of {ROUNDS} rounds")
    scipy = rate(lambda: loop(train, some), LOOP_TISSUES, 2)
    ours = {
        "signals": rate(lambda: model.signal(theta), TISSUES),
        "with derivatives": rate(lambda: model.signal_and_jacobian(theta), TISSUES),
    }
    print(f"SciPy loop {scipy:.2f}; largest difference from it {error:.1e}")
    for name, found in ours.items():
        times = found / scipy * (15 if name == "with derivatives" else 1)
        verdict = "met" if found >= REQUIRED[name] else "MISSED"
        print(
            f"{name}: {found:,.0f}, {times:,.0f} times the loop "
            f"({REQUIRED[name]:,} asked for: {verdict})"
        )


if __name__ == "__main__":
    main()
