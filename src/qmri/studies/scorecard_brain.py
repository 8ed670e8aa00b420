"""The in-vivo part of the second half of the scorecard: a phantom and the paper's own slice.

The rule is that of `scorecard`. Comparisons and thresholds were chosen before the numbers of the
whole slice were seen; runs on a part of its voxels had been looked at.
"""

from __future__ import annotations

import numpy as np

from qmri.models import Array
from qmri.studies.brain import DEEP, NETWORKS, TUBES, Results
from qmri.studies.crb_loss import TARGETS
from qmri.studies.scorecard import Row, count

__all__ = ["CORRELATED", "SHOWN", "SIMILAR", "part_b_in_vivo"]

CORRELATED = 0.9  # with least squares, over all tissue
SIMILAR = 0.10  # of the mean over all tissue: a difference on average that is small
SHOWN = 0.5  # of the contrast that least squares has
SEEN = 2.0  # standard errors, for least squares to have a contrast
UNIT = {"m0s": (1.0, ""), "T1": (1.0, " s"), "T2f": (1e3, " ms")}


def part_b_in_vivo(results: Results) -> list[Row]:
    """Claims B8 and B9 of the second paper, scored from a stored study.

    Parameters
    ----------
    results : Results

    Notes
    -----
    B8 compares, for each tube and parameter of the simulated phantom, the root mean square
    difference of either network to least squares. B9 compares each network with least squares
    over all tissue (correlation; difference on average), for m0s and T1; then, for each deep
    structure whose T2f is shorter than that of white matter by least squares, whether the
    network taught by the CRB loss has at least half of that contrast and the other less.

    References
    ----------
    Zhang et al. {cite}`zhang2022crb`.
    """
    return [_b8(results), _b9(results)]


def _b8(results: Results) -> Row:
    def away(name: str, reference: str) -> Array:
        """Root mean square difference, (tubes, targets)."""
        pairs = zip(results.tubes(name), results.tubes(reference), strict=True)
        return np.array([np.sqrt(np.mean((a - b) ** 2, axis=0)) for a, b in pairs])

    crb, mse = (away(name, "nlls") for name in NETWORKS)
    closer = crb < mse
    truly = away("crb", "truth") < away("mse", "truth")
    text = []
    for p, target in enumerate(TARGETS):
        factor, unit = UNIT[target]
        text.append(
            f"{target}: {factor * crb[:, p].mean():.3g} against {factor * mse[:, p].mean():.3g}"
            f"{unit}, smaller in {closer[:, p].sum()} of {len(TUBES)} tubes"
        )
    return Row(
        "B8",
        "In a phantom of six tubes the network taught by the CRB loss agrees better with least "
        "squares",
        "7",
        "root mean square difference to least squares, mean over tubes, with the CRB loss against "
        f"with the squared error: {'; '.join(text)}. To the truth it is smaller in "
        f"{truly.sum()} of {truly.size} cases",
        *count([list(closer.ravel())]),
    )


def _b9(results: Results) -> Row:
    held, text = [], []
    typical = np.abs(results.estimate("nlls")[results.regions["tissue"]].mean(axis=0))
    for name in NETWORKS:
        found = results.agreement(name)
        for p in range(2):
            share = found["mean"][p] / typical[p]
            held += [found["correlation"][p] > CORRELATED, abs(share) < SIMILAR]
            text.append(
                f"{name}, {TARGETS[p]}: correlation {found['correlation'][p]:.3f}, difference "
                f"{100 * share:+.1f} %"
            )
    for structure in DEEP:
        contrast = {n: 1e3 * results.contrast(n, structure)[2] for n in ("nlls", *NETWORKS)}
        error = 1e3 * results.contrast_error(structure)[2]
        seen = contrast["nlls"] < -SEEN * error
        if seen:
            held.append(contrast["crb"] < SHOWN * contrast["nlls"])
            held.append(contrast["mse"] > SHOWN * contrast["nlls"])
        text.append(
            f"T2f in the {structure} less that in white matter: least squares "
            f"{contrast['nlls']:+.1f} ± {error:.1f} ms, "
            + ", ".join(f"{n} {contrast[n]:+.1f}" for n in NETWORKS)
            + ("" if seen else " (not shorter by least squares: not compared)")
        )
    return Row(
        "B9",
        "In vivo both networks agree with least squares on m0s and T1; only the one taught by the "
        "CRB loss shows the short T2f of deep grey matter",
        "8",
        "; ".join(text),
        *count([held]),
    )
