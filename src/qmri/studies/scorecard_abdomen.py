"""The scorecard of the first paper in vivo: claims A12 and A13, by the rule of `scorecard`.

The comparisons, the bins and what makes a bin plentiful were fixed before the numbers of paper
scale were seen; quick runs had been looked at.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from qmri.studies.abdomen import (
    DESIGNS,
    ESTIMATORS,
    METRICS,
    PARAMETERS,
    PLENTIFUL,
    Curve,
    Results,
    curve,
)
from qmri.studies.scorecard import Row, count

__all__ = ["FOLLOWERS", "explained", "part_a_in_vivo"]

FOLLOWERS = ("self-supervised", "supervised-mle-rician")
_DESIGN = {"together": "reference from all images", "apart": "disjoint halves"}
_LABEL = {"bias": "mean bias", "sd": "SD", "rmse": "RMSE"}


def part_a_in_vivo(results: Results) -> list[Row]:
    """Claims A12 and A13 of the first paper, scored from a stored study.

    Parameters
    ----------
    results : Results

    References
    ----------
    Epstein et al. {cite}`epstein2024labels`.
    """
    score = _InVivo(results)
    return [score.a12(), score.a13()]


def explained(in_vivo: Curve, uniform: Curve, matched: Curve, metric: str = "bias") -> float:
    """Share of the difference between in vivo and uniform simulation that matching explains.

    One minus the ratio of the mean squared distances of the two simulations' curves to the one
    in vivo, over bins that are plentiful in vivo and not empty in either simulation, each
    counted by its voxels in vivo. 1 where the matched curve lies on the one in vivo, 0 where it
    is as far as the uniform one, negative where it is farther. NaN without such a bin.
    """
    bins = _common(in_vivo, uniform, matched)
    if not bins.any():
        return float("nan")
    far, near = (in_vivo.distance(other, metric, bins) for other in (uniform, matched))
    return 1 - (near / far) ** 2


def _common(in_vivo: Curve, *simulated: Curve) -> NDArray[np.bool_]:
    bins = in_vivo.plentiful
    for other in simulated:
        bins = bins & (other.count > 0)
    return bins


class _InVivo:
    def __init__(self, results: Results):
        self.results = results
        self.curve = cache(self._curve)

    def _curve(
        self, name: str, estimator: str, parameter: str, design: str, against: str = "reference"
    ) -> Curve:
        return curve(self.results.measured(name), estimator, parameter, design, against=against)

    def a12(self) -> Row:
        trends = {metric: [] for metric in METRICS}
        followers: list[bool] = []
        text = []
        for design in DESIGNS:
            by_design = []
            for parameter in PARAMETERS:
                mle, gt, *near = (
                    self.curve("in-vivo", name, parameter, design)
                    for name in ("mle-rician", "supervised-gt", *FOLLOWERS)
                )
                bins = mle.plentiful
                for metric in METRICS:
                    own, other = gt.average(metric, bins), mle.average(metric, bins)
                    trends[metric].append(own > other if metric == "bias" else own < other)
                    far = mle.distance(gt, metric, bins)
                    followers += [mle.distance(n, metric, bins) < far for n in near]
                by_design.append(
                    f"{parameter} "
                    + ", ".join(
                        f"{_LABEL[m]} {gt.average(m, bins):.3g} against {mle.average(m, bins):.3g}"
                        for m in METRICS
                    )
                )
            text.append(f"{_DESIGN[design]}: " + "; ".join(by_design))
        counts = ", ".join(f"{_LABEL[m]} {sum(h)} of {len(h)}" for m, h in trends.items())
        return Row(
            "A12",
            "In vivo the trends hold where voxels are plentiful: SupervisedGT with more bias, less "
            "SD and RMSE than MLE, the others close to MLE",
            "5, 7",
            f"as claimed of SupervisedGT: {counts}; of Self-supervised and SupervisedMLE: "
            f"{sum(followers)} of {len(followers)}. Bins with {PLENTIFUL['voxels']} voxels of "
            f"{PLENTIFUL['volunteers']} volunteers or more, {len(self.results.volunteers)} "
            "volunteers; SupervisedGT against MLE, " + ". ".join(text),
            *count([*trends.values(), followers]),
        )

    def a13(self) -> Row:
        held = {metric: [] for metric in METRICS}
        shares = {parameter: {"truth": [], "reference": []} for parameter in PARAMETERS}
        for parameter in PARAMETERS:
            for estimator in ESTIMATORS:
                in_vivo = self.curve("in-vivo", estimator, parameter, "together")
                uniform, matched = (
                    self.curve(name, estimator, parameter, "together", "truth")
                    for name in ("uniform", "matched")
                )
                noisy = self.curve("matched", estimator, parameter, "together")
                bins = _common(in_vivo, uniform, matched)
                for metric in METRICS:
                    near, far = (
                        in_vivo.distance(other, metric, bins) for other in (matched, uniform)
                    )
                    held[metric].append(near < far)
                shares[parameter]["truth"].append(explained(in_vivo, uniform, matched))
                shares[parameter]["reference"].append(explained(in_vivo, uniform, noisy))
        text = "; ".join(
            f"{parameter} {100 * np.median(found['truth']):.0f} % against the simulated truth, "
            f"{100 * np.median(found['reference']):.0f} % against a simulated noisy reference"
            for parameter, found in shares.items()
        )
        counts = ", ".join(f"{_LABEL[m]} {sum(h)} of {len(h)}" for m, h in held.items())
        return Row(
            "A13",
            "Where they do not, matching the distribution of tissue in simulation reproduces the "
            "difference",
            "6",
            f"matched simulation closer than the uniform one to the curves in vivo: {counts}. "
            f"Share of the squared difference in bias that it explains, median estimator: {text}",
            *count(held.values()),
        )
