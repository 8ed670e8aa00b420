"""Synthetic data: the paper's protocol, and labels that are what they say."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from qmri import IVIM, Gaussian, Rician
from qmri.datasets import Dataset, Labels, labels_from_fit, mle_labels, simulate, truth_labels
from qmri.mle import fit_mle

MODEL = IVIM((0, 10, 20, 30, 50, 80, 100, 200, 400, 800))
VOXELS = 10_000
SNRS = (15, 30)
NOISES = (Gaussian, Rician)


@pytest.fixture(scope="module")
def datasets() -> dict[int, Dataset]:
    theta = MODEL.sample(VOXELS, np.random.default_rng(1))
    return {
        snr: simulate(MODEL, Rician(1 / snr), theta, np.random.default_rng([2, snr]))
        for snr in SNRS
    }


@pytest.fixture(scope="module")
def labels(datasets) -> dict[tuple[int, type], Labels]:
    return {
        (snr, kind): mle_labels(datasets[snr], kind(1 / snr)) for snr in SNRS for kind in NOISES
    }


def some(voxels=10, **changes) -> Dataset:
    rng = np.random.default_rng(3)
    theta = MODEL.sample(voxels, rng)
    entries = {
        "model": MODEL,
        "noise": Rician(0.05),
        "theta": theta,
        "signals": MODEL.signal(theta),
        "training": np.arange(voxels) < 8,
    }
    return Dataset(**{**entries, **changes})


class TestProtocol:
    def test_four_fifths_are_for_training(self, datasets):
        assert [d.training.sum() for d in datasets.values()] == [8000, 8000]

    def test_another_share_can_be_asked_for(self):
        data = simulate(
            MODEL,
            Rician(0.1),
            MODEL.sample(1000, np.random.default_rng(4)),
            np.random.default_rng(5),
            validation=0.35,
        )
        assert data.training.sum() == 650

    @pytest.mark.parametrize(
        ("parameter", "low", "high"),
        [("S0", 0.8, 1.2), ("f", 0.1, 0.5), ("Dslow", 0.4, 3.0), ("Dfast", 10, 150)],
    )
    def test_tissue_is_uniform_over_the_papers_ranges(self, datasets, parameter, low, high):
        values = datasets[15].theta[:, MODEL.names.index(parameter)]
        for part in (values, values[datasets[15].training], values[~datasets[15].training]):
            assert stats.kstest(part, "uniform", (low, high - low)).pvalue > 1e-3

    def test_parameters_are_independent(self, datasets):
        correlations = np.corrcoef(datasets[15].theta.T)[np.triu_indices(4, 1)]
        assert np.all(np.abs(correlations) < 4 / np.sqrt(VOXELS))

    def test_both_snrs_share_the_signals_without_noise(self, datasets):
        np.testing.assert_array_equal(datasets[15].theta, datasets[30].theta)
        noise = {snr: (d.signals - MODEL.signal(d.theta))[:, 0] for snr, d in datasets.items()}
        for snr, values in noise.items():
            # At b = 0 the signal is 12 sigma or more: Rician noise is normal to half a percent.
            standard_error = 1 / np.sqrt(2 * VOXELS)
            assert np.std(values) * snr == pytest.approx(1, abs=4 * standard_error + 0.005)
        assert abs(np.corrcoef(noise[15], noise[30])[0, 1]) < 4 / np.sqrt(VOXELS)

    def test_same_generator_same_signals(self, datasets):
        again = simulate(MODEL, Rician(1 / 15), datasets[15].theta, np.random.default_rng([2, 15]))
        np.testing.assert_array_equal(again.signals, datasets[15].signals)

    def test_mean_is_that_of_the_training_tissue(self):
        theta = np.ones((10, 4))
        theta[:8, 1], theta[8:, 1] = 0.2, 0.4
        assert some(theta=theta).mean[1] == pytest.approx(0.2)


class TestTruthLabels:
    def test_truth_is_always_there(self, datasets):
        truth = datasets[15].labels["truth"]
        np.testing.assert_array_equal(truth.values, datasets[15].theta)
        assert truth.usable.all() and not truth.bound_hit.any()

    def test_further_labels_join_it(self):
        data = some()
        shifted = truth_labels(data.theta + 1)
        both = data.with_labels({"shifted": shifted})
        assert set(both.labels) == {"truth", "shifted"} and set(data.labels) == {"truth"}
        np.testing.assert_array_equal(both.labels["truth"].values, data.theta)


class TestMaximumLikelihoodLabels:
    @pytest.mark.parametrize("kind", NOISES)
    @pytest.mark.parametrize("snr", SNRS)
    def test_they_are_likelier_than_the_truth(self, datasets, labels, snr, kind):
        data, label = datasets[snr], labels[snr, kind]
        noise = kind(1 / snr)
        fitted = np.isfinite(label.values).all(axis=1)
        at = {
            name: noise.nll(data.signals, MODEL.signal(values)).sum(axis=1)[fitted]
            for name, values in (("truth", data.theta), ("label", label.values))
        }
        assert fitted.mean() > 0.999
        assert np.all(at["label"] <= at["truth"] + 1e-6)
        # Wilks: twice the gain is chi-squared, with as many degrees as there are parameters; a
        # bound takes some of it.
        assert 1 < np.mean(at["truth"] - at["label"]) < 2.5

    @pytest.mark.parametrize("kind", NOISES)
    @pytest.mark.parametrize("snr", SNRS)
    def test_none_on_a_bound_is_usable(self, labels, snr, kind):
        label = labels[snr, kind]
        low, high = MODEL.bounds.T
        inside = np.all((label.values > low) & (label.values < high), axis=1)
        assert np.all(inside[label.usable])
        # All others were estimated as well as can be, but for the few that did not converge.
        assert np.mean(inside & ~label.usable) < 0.005

    @pytest.mark.parametrize("kind", NOISES)
    @pytest.mark.parametrize("snr", SNRS)
    def test_shares_on_bounds_are_counts(self, labels, snr, kind):
        label = labels[snr, kind]
        shares = label.share_on_bounds(MODEL)
        assert tuple(shares) == MODEL.names
        for p, (low, high) in enumerate(MODEL.bounds):
            values = label.values[:, p]
            inside = np.mean((values > low) & (values < high))
            found = shares[MODEL.names[p]]
            assert found == pytest.approx((np.mean(values == low), np.mean(values == high)))
            assert sum(found) + inside == pytest.approx(1)
        # A voxel on several bounds counts once among the unusable.
        largest = max(max(pair) for pair in shares.values())
        total = sum(sum(pair) for pair in shares.values())
        assert largest <= 1 - label.usable.mean() <= total + 0.005

    def test_noise_drives_labels_onto_the_bounds(self, labels):
        for kind in NOISES:
            assert labels[15, kind].usable.mean() < labels[30, kind].usable.mean() - 0.05

    def test_without_noise_they_are_the_truth(self):
        data = some(noise=Gaussian(1e-4))
        label = mle_labels(data, Gaussian(1e-4))
        assert label.usable.all()
        np.testing.assert_allclose(label.values, data.theta, rtol=1e-4)

    def test_signals_that_are_impossible_have_no_usable_label(self):
        """Gaussian noise makes some signals negative; no Rician likelihood explains those."""
        theta = np.tile([1.0, 0.3, 2.9, 50.0], (500, 1))
        theta[:, 0] += np.linspace(0, 0.1, 500)
        data = simulate(MODEL, Gaussian(1 / 15), theta, np.random.default_rng(6))
        negative = (data.signals < 0).any(axis=1)
        label = mle_labels(data, Rician(1 / 15))
        assert 50 < negative.sum() < 450
        assert np.isnan(label.values[negative]).all() and not label.usable[negative].any()
        assert label.usable[~negative].any()
        data.with_labels({"mle-rician": label})

    def test_a_fit_without_labels_on_bounds_is_usable_where_it_converged(self):
        data = some()
        fit = fit_mle(MODEL, Rician(0.05), data.signals, max_iterations=1)
        label = labels_from_fit(fit)
        assert not fit.converged.all()
        np.testing.assert_array_equal(label.usable, fit.converged & ~fit.at_bound)


class TestBadInput:
    @pytest.mark.parametrize(
        ("theta", "message"),
        [
            (np.empty((0, 4)), "theta must hold at least 2 voxels to learn from, got 0"),
            (np.ones((1, 4)), "theta must hold at least 2 voxels to learn from, got 1"),
            ([], r"theta must have shape \(voxels, 4\).*got \(0,\)"),
            (np.tile([1, 0.3, 1, 50], (6, 1)), r"theta must vary, got 6 voxels that all are \[1.0"),
            (np.full((3, 4), np.nan), "theta must be finite, got 3 voxels"),
            ([[1, 0.3, 1, 50], [1, 0.3, np.inf, 50]], "theta must be finite, got 1 voxels"),
            (np.ones((3, 5)), r"one column for each of S0, f, Dslow, Dfast, got \(3, 5\)"),
            (np.ones(4), r"theta must have shape \(voxels, 4\).*got \(4,\)"),
        ],
    )
    def test_tissue_that_teaches_nothing(self, theta, message):
        with pytest.raises(ValueError, match=message):
            simulate(MODEL, Rician(0.1), theta, np.random.default_rng(0))

    @pytest.mark.parametrize("share", [0, 1, -0.1, 1.5, np.nan])
    def test_a_share_for_validation_that_is_none(self, share):
        theta = MODEL.sample(10, np.random.default_rng(7))
        with pytest.raises(ValueError, match="validation must be a share between 0 and 1, got"):
            simulate(MODEL, Rician(0.1), theta, np.random.default_rng(0), validation=share)

    @pytest.mark.parametrize("share", [0.01, 0.99])
    def test_too_few_voxels_for_the_share(self, share):
        theta = MODEL.sample(10, np.random.default_rng(7))
        with pytest.raises(ValueError, match="some for validation, got (10|0) of 10"):
            simulate(MODEL, Rician(0.1), theta, np.random.default_rng(0), validation=share)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"signals": np.ones((10, 9))}, r"signals must have shape \(10, 10\), got \(10, 9\)"),
            ({"signals": np.ones((9, 10))}, r"signals must have shape \(10, 10\), got \(9, 10\)"),
            ({"signals": np.full((10, 10), np.nan)}, "signals must be finite, got 10 voxels"),
            ({"training": np.ones(9, dtype=bool)}, r"training must have shape \(10,\), got \(9,\)"),
            ({"training": np.ones(10, dtype=bool)}, "training must leave some.*got 10 of 10"),
            ({"training": np.zeros(10, dtype=bool)}, "training must leave some.*got 0 of 10"),
            ({"labels": {"mle": truth_labels(np.ones((9, 4)))}}, r"labels\['mle'\].*got \(9, 4\)"),
            (
                {"labels": {"mle": Labels(np.ones((10, 4)), np.ones(9, dtype=bool), None)}},
                r"usable of shape \(10,\), got \(10, 4\) and \(9,\)",
            ),
            (
                {"labels": {"mle": truth_labels(np.full((10, 4), np.nan))}},
                r"labels\['mle'\] must be finite wherever they are usable",
            ),
        ],
    )
    def test_parts_that_do_not_fit_together(self, changes, message):
        with pytest.raises(ValueError, match=message):
            some(**changes)

    def test_a_label_that_is_not_usable_may_be_nan(self):
        label = truth_labels(some().theta)
        label.values[3], label.usable[3] = np.nan, False
        assert not some(labels={"mle": label}).labels["mle"].usable[3]
