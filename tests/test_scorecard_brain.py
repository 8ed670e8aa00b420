"""The rule that decides B8 and B9, on estimates whose verdict is known."""

from __future__ import annotations

import numpy as np
import pytest

from qmri.studies.brain import DEEP, TUBES
from qmri.studies.scorecard_brain import part_b_in_vivo

VOXELS = 400
PART = VOXELS // (len(DEEP) + 1)


class StandIn:
    """Tissue whose deep structures have a T2f shorter by 10 ms, and two networks."""

    def __init__(self):
        rng = np.random.default_rng(0)
        typical = np.array([0.13, 1.6, 0.07])
        self.truth = typical * (1 + 0.2 * rng.standard_normal((VOXELS, 3)))
        self.truth[:, 2] = 0.07 + 0.002 * rng.standard_normal(VOXELS)
        names = ("white matter", *DEEP)
        self.regions = {"tissue": np.ones(VOXELS, dtype=bool)}
        for k, name in enumerate(names):
            self.regions[name] = np.arange(VOXELS) // PART == k
            if name != "white matter":
                self.truth[self.regions[name], 2] -= 0.010
        noise = rng.standard_normal((2, VOXELS, 3)) * typical * 0.01
        self.estimates = {"nlls": self.truth, "crb": self.truth + noise[0]}
        self.estimates["mse"] = self.truth + noise[1]
        self.estimates["mse"][:, 2] = 0.065
        self.phantom = {
            "truth": [np.tile(typical, (5, 1)) for _ in TUBES],
            "nlls": [np.tile(typical, (5, 1)) for _ in TUBES],
            "crb": [np.tile(1.01 * typical, (5, 1)) for _ in TUBES],
            "mse": [np.tile(1.02 * typical, (5, 1)) for _ in TUBES],
        }

    def estimate(self, name):
        return self.estimates[name]

    def tubes(self, name):
        return self.phantom[name]

    def agreement(self, name):
        x, y = self.estimates["nlls"], self.estimates[name]
        correlation = [np.corrcoef(a, b)[0, 1] for a, b in zip(x.T, y.T, strict=True)]
        return {"correlation": np.array(correlation), "mean": (y - x).mean(axis=0)}

    def contrast(self, name, region, against="white matter"):
        found = self.estimates[name]
        return found[self.regions[region]].mean(axis=0) - found[self.regions[against]].mean(axis=0)

    def contrast_error(self, region, against="white matter"):
        found = self.estimates["nlls"]
        parts = [found[self.regions[name]] for name in (region, against)]
        return np.sqrt(sum(p.var(axis=0, ddof=1) / len(p) for p in parts))


@pytest.fixture
def results():
    return StandIn()


def test_claims_that_hold_are_reproduced(results):
    phantom, slice_ = part_b_in_vivo(results)
    assert (phantom.id, phantom.verdict, phantom.compared) == ("B8", "reproduced", 18)
    assert (slice_.id, slice_.verdict) == ("B9", "reproduced")
    assert slice_.compared == 8 + 2 * len(DEEP)


def test_a_network_that_is_closer_in_half_of_the_tubes_wins_nothing(results):
    results.phantom["mse"][:3] = results.phantom["nlls"][:3]
    row = part_b_in_vivo(results)[0]
    assert (row.held, row.compared, row.verdict) == (9, 18, "not reproduced")


def test_contrast_in_both_networks_does_not_support_the_claim(results):
    results.estimates["mse"] = results.estimates["crb"].copy()
    row = part_b_in_vivo(results)[1]
    assert row.compared - row.held == len(DEEP)
    assert row.verdict == "partly"


def test_a_network_with_a_bias_does_not_agree(results):
    results.estimates["crb"][:, 1] *= 1.25
    row = part_b_in_vivo(results)[1]
    assert row.compared - row.held == 1
    assert "crb, T1: correlation 0.99" in row.measured and "difference +2" in row.measured


def test_a_structure_without_contrast_is_not_compared(results):
    first = results.regions[DEEP[0]]
    for found in results.estimates.values():
        found[first, 2] = 0.07
    row = part_b_in_vivo(results)[1]
    assert row.compared == 8 + 2 * (len(DEEP) - 1)
    assert "not compared" in row.measured
