"""Blood on a capillary network: limits of the simulation, and labels without a gradient."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from qmri import IVIM, Gaussian, Rician, fit_mle
from qmri.datasets import labels_from_fit, simulate
from qmri.losses import signal_error
from qmri.networks import Networks, mlp_widths
from qmri.studies.black_box import (
    BVALUES,
    CapillaryFlow,
    Decoder,
    DifferenceDecoder,
    compare,
    maximum_likelihood,
    tasks,
)
from qmri.training import train

SPINS = 5000
# Phases spread all around give cosines of variance 1/2.
MONTE_CARLO_SD = 1 / np.sqrt(2 * SPINS)


@pytest.fixture(scope="module")
def model() -> CapillaryFlow:
    return CapillaryFlow(BVALUES)


@pytest.fixture(scope="module")
def labelled(model):
    """Truth, signals at SNR 30 and their maximum-likelihood fit."""
    rng = np.random.default_rng(20)
    theta = model.sample(3000, rng)
    signals = Rician(1 / 30).sample(model.signal(theta), rng)
    return theta, signals, maximum_likelihood(model, Rician(1 / 30), signals)


def blood(model: CapillaryFlow, v: float) -> np.ndarray:
    """What flow alone does to the signal of blood: its signal over that of still blood."""
    return model.signal([[1.0, 1.0, 1.0, v]])[0] / model.signal([[1.0, 1.0, 1.0, 0.0]])[0]


class TestSignal:
    def test_without_weighting_it_is_S0(self, model):
        theta = model.sample(100, np.random.default_rng(1))
        np.testing.assert_allclose(model.signal(theta)[:, 0], theta[:, 0], rtol=1e-14)

    def test_without_blood_it_is_one_exponential(self, model):
        signal = model.signal([[1.1, 0.0, 1.5, 3.0]])[0]
        np.testing.assert_allclose(signal, 1.1 * np.exp(-model.bvalues * 1.5e-3), rtol=1e-14)

    def test_blood_that_stands_still_is_tissue(self, model):
        signal = model.signal([[1.0, 0.4, 1.5, 0.0]])[0]
        np.testing.assert_allclose(signal, np.exp(-model.bvalues * 1.5e-3), rtol=1e-14)

    def test_faster_blood_loses_more_signal(self, model):
        # Where the phases stay below half a turn, they spread with every node passed.
        signal = np.array([blood(model, v) for v in model.speeds])
        assert np.all(np.diff(signal[:, 1:4], axis=0) < 0)

    def test_straight_flow_is_a_sinc(self):
        # On one endless segment all displacements have length v * time: mean of cos over a sphere.
        v, time_ms = 2.1, 50.0
        straight = CapillaryFlow(BVALUES, segment=1e6, time=time_ms, spins=SPINS)
        path = 10.0 * np.floor(v * time_ms / 10.0)  # um
        phase = np.sqrt(straight.bvalues * 1e-3 / time_ms) * path
        expected = np.sinc(phase / np.pi)
        np.testing.assert_allclose(blood(straight, v), expected, atol=4 * MONTE_CARLO_SD)

    def test_each_segment_multiplies_by_a_sinc(self):
        # A segment of a single node: all turns are independent, and the mean is a product.
        walk = CapillaryFlow(BVALUES, segment=20.0, spacing=20.0, spins=SPINS)
        phase = np.sqrt(walk.bvalues * 1e-3 / 50.0) * 20.0
        for v, turns in ((0.6, 1), (2.1, 5), (5.9, 14)):
            expected = np.sinc(phase / np.pi) ** turns
            np.testing.assert_allclose(blood(walk, v), expected, atol=4 * MONTE_CARLO_SD)

    def test_many_short_segments_are_pseudo_diffusion(self):
        # Le Bihan: Dfast = segment * v / 6; um * mm/s = um2/ms. The walk is as many whole steps.
        bvalues, segment, v = (0, 10, 20, 50, 100, 200), 5.0, 4.05
        short = CapillaryFlow(bvalues, segment=segment, spacing=5.0, spins=SPINS)
        theta = [1.0, 0.3, 1.0]
        limit = IVIM(bvalues).signal([[*theta, segment * 4.0 / 6]])[0]
        signal = short.signal([[*theta, v]])[0]
        # Next term of the expansion: exp(-x^2 n / 6) (1 - n x^4 / 180), here below 0.001.
        np.testing.assert_allclose(signal, limit, atol=0.001 + 4 * 0.3 * MONTE_CARLO_SD)

    def test_few_long_segments_are_not_pseudo_diffusion(self, model):
        v = 1.1  # half a segment of 100 um in 50 ms: blood runs straight on
        limit = np.exp(-model.bvalues * 1e-3 * model.segment * 1.0 / 6)
        assert np.max(np.abs(blood(model, v) - limit)) > 20 * MONTE_CARLO_SD

    def test_same_seed_same_network(self, model):
        theta = model.sample(10, np.random.default_rng(2))
        again, other = CapillaryFlow(BVALUES), CapillaryFlow(BVALUES, seed=1)
        np.testing.assert_array_equal(again.signal(theta), model.signal(theta))
        difference = np.abs(other.signal(theta) - model.signal(theta)).max()
        assert 0 < difference < 6 * MONTE_CARLO_SD


class TestDerivative:
    def test_by_v_it_is_zero_almost_everywhere(self, model):
        theta = model.sample(5000, np.random.default_rng(3))
        moved = theta.copy()
        moved[:, 3] += 1e-7
        change = np.any(model.signal(moved) != model.signal(theta), axis=1)
        # An edge every 0.2 mm/s: one voxel in two million should lie within 1e-7 of one.
        assert change.sum() == 0
        assert not model.jacobian(theta)[:, :, 3].any()

    def test_across_an_edge_the_signal_jumps(self, model):
        edges = (model.speeds[:-1] + model.speeds[1:]) / 2
        theta = np.tile([1.0, 0.3, 1.0, 0.0], (len(edges), 1))
        below, above = theta.copy(), theta.copy()
        below[:, 3], above[:, 3] = edges - 1e-7, edges + 1e-7
        jump = np.abs(model.signal(above) - model.signal(below)).max(axis=1)
        assert np.all(jump > 1e-4)

    def test_by_the_others_it_matches_differences(self, model):
        theta = model.sample(50, np.random.default_rng(4))
        exact = model.jacobian(theta)
        differences = super(CapillaryFlow, model).jacobian(theta)
        np.testing.assert_allclose(exact[:, :, :3], differences[:, :, :3], rtol=1e-7, atol=1e-9)


class TestLabels:
    def test_clean_signals_give_the_truth(self, model):
        theta = model.sample(200, np.random.default_rng(5))
        theta[:, 3] = np.random.default_rng(6).choice(model.speeds[2:24], 200)
        fit = maximum_likelihood(model, Gaussian(1e-5), model.signal(theta))
        np.testing.assert_array_equal(fit.theta[:, 3], theta[:, 3])
        np.testing.assert_allclose(fit.theta, theta, rtol=0.02)

    def test_never_less_likely_than_the_truth(self, model, labelled):
        theta, signals, fit = labelled
        at_truth = Rician(1 / 30).nll(signals, model.signal(theta)).sum(axis=1)
        assert np.all(fit.converged)
        assert np.all(fit.nll <= at_truth + 1e-6)
        # Wilks: twice the gain is chi-squared with at most as many degrees as parameters.
        assert 0.5 < np.mean(at_truth - fit.nll) < 2.5

    def test_no_other_step_is_likelier(self, model, labelled):
        # Begun at the truth, another route to each step.
        theta, signals, fit = (labelled[0][:200], labelled[1][:200], labelled[2])
        for v in model.speeds:
            start = np.clip(np.column_stack([theta[:, :3], np.full(200, v)]), *model.bounds.T)
            other = fit_mle(model, Rician(1 / 30), signals, start, bounds={"v": (v, v)})
            # Slow blood looks like slow diffusion: valleys of equal depth, to a hundredth of what
            # one standard error costs, are not told apart.
            assert np.all(fit.nll[:200] < other.nll + 0.02)

    def test_v_can_be_told_at_snr_30(self, labelled):
        theta, _, fit = labelled
        # 3000 unrelated pairs would have a correlation of 0 +- 0.02.
        assert np.corrcoef(theta[:, 3], fit.theta[:, 3])[0, 1] > 0.5

    def test_v_is_told_as_well_as_Dfast_in_ivim(self, labelled):
        theta, _, fit = labelled
        rng = np.random.default_rng(21)
        ivim = IVIM(BVALUES)
        truth = ivim.sample(3000, rng)
        signals = Rician(1 / 30).sample(ivim.signal(truth), rng)
        dfast = fit_mle(ivim, Rician(1 / 30), signals).theta[:, 3]
        of_v = np.sqrt(np.mean((fit.theta[:, 3] - theta[:, 3]) ** 2)) / np.std(theta[:, 3])
        of_dfast = np.sqrt(np.mean((dfast - truth[:, 3]) ** 2)) / np.std(truth[:, 3])
        assert of_v < of_dfast

    def test_steps_at_either_end_count_as_bounds(self, model, labelled):
        fit = labelled[2]
        v, hit = fit.theta[:, 3], fit.bound_hit[:, 3]
        np.testing.assert_array_equal(hit == -1, v == model.speeds[0])
        np.testing.assert_array_equal(hit == 1, v == model.speeds[-1])
        assert np.all(np.isin(v, model.speeds))
        assert np.all(fit.at_bound[hit != 0])

    def test_impossible_voxels_do_not_touch_their_neighbours(self, model, labelled):
        signals = labelled[1][:4].copy()
        signals[1, 3], signals[2, 5] = np.nan, -0.1
        fit = maximum_likelihood(model, Rician(1 / 30), signals)
        assert np.all(np.isnan(fit.theta[1:3])) and np.all(np.isnan(fit.nll[1:3]))
        assert not fit.converged[1:3].any() and not fit.bound_hit[1:3].any()
        np.testing.assert_allclose(fit.theta[[0, 3]], labelled[2].theta[[0, 3]], rtol=1e-6)

    def test_a_magnitude_of_zero_still_counts_its_neighbours(self, model):
        signals = model.signal([[1.0, 0.4, 2.5, 3.1]])
        nearly, exactly = signals.copy(), signals.copy()
        nearly[0, -1], exactly[0, -1] = 1e-12, 0.0
        a = maximum_likelihood(model, Rician(1 / 30), nearly)
        b = maximum_likelihood(model, Rician(1 / 30), exactly)
        np.testing.assert_allclose(b.theta, a.theta, rtol=1e-5)

    def test_each_voxel_has_its_own_noise(self, model, labelled):
        signals = labelled[1][:20]
        sigma = np.where(np.arange(20) < 10, 1 / 30, 1 / 10)[:, np.newaxis]
        together = maximum_likelihood(model, Rician(sigma), signals)
        noisy = maximum_likelihood(model, Rician(1 / 10), signals[10:])
        np.testing.assert_allclose(together.theta[10:], noisy.theta, rtol=1e-6)

    @pytest.mark.slow
    def test_labels_take_no_longer_than_training(self, model):
        rng = np.random.default_rng(7)
        signals = Rician(1 / 30).sample(model.signal(model.sample(10_000, rng)), rng)
        maximum_likelihood(model, Rician(1 / 30), signals[:10])  # compile
        begin = time.perf_counter()
        maximum_likelihood(model, Rician(1 / 30), signals)
        # A thousand voxels a second, half of what two cores reach: they may have other work.
        assert time.perf_counter() - begin < 10.0


class TestDecoders:
    def test_where_speeds_were_simulated_they_are_the_simulator(self, model):
        theta = model.sample(100, np.random.default_rng(8))
        for decoder in (Decoder(model), DifferenceDecoder(model)):
            np.testing.assert_array_equal(decoder.signal(theta), model.signal(theta))
            np.testing.assert_array_equal(
                decoder.jacobian(theta)[:, :, :3], model.jacobian(theta)[:, :, :3]
            )

    @pytest.mark.parametrize("kind", [Decoder, DifferenceDecoder])
    def test_speeds_not_simulated_give_the_nearest_signal(self, model, kind):
        theta = np.array([[1.0, 0.3, 1.0, v] for v in (-3.0, 0.0, 6.0, 1e30, np.inf)])
        signal, jacobian = kind(model).signal_and_jacobian(theta)
        np.testing.assert_array_equal(signal[0], signal[1])
        np.testing.assert_array_equal(signal[2:4], signal[3:5])
        assert np.isfinite(jacobian).all()

    @pytest.mark.parametrize("kind", [Decoder, DifferenceDecoder])
    def test_nan_stays_in_its_voxel(self, model, kind):
        theta = np.array([[1.0, 0.3, 1.0, np.nan], [1.0, 0.3, 1.0, 2.0]])
        signal = kind(model).signal(theta)
        assert np.isnan(signal[0]).all()
        np.testing.assert_array_equal(signal[1], model.signal(theta[1:])[0])

    def test_a_difference_of_one_step_is_the_jump(self, model):
        # From the middle of one step to the middles of its neighbours.
        theta = np.array([[1.0, 0.3, 1.0, v] for v in model.speeds[5:9]])
        slope = DifferenceDecoder(model, step=0.2).jacobian(theta)[1:3, :, 3]
        signal = model.signal(theta)
        np.testing.assert_allclose(slope, (signal[2:] - signal[:2]) / 0.4, rtol=1e-12)

    def test_differences_approach_the_slope_of_the_physics(self):
        # One endless segment: F = sinc(q v t), and its slope by v is known.
        straight = CapillaryFlow(BVALUES, segment=1e6, spacing=5.0, spins=20_000)
        slope = DifferenceDecoder(straight, step=0.2).jacobian([[1.0, 1.0, 0.0, 1.55]])[0, :, 3]
        q = np.sqrt(straight.bvalues * 1e-3 / 50.0)
        expected = (np.sinc(q * 85 / np.pi) - np.sinc(q * 65 / np.pi)) / 0.4  # um walked
        # Spins are shared by the two sums; the tolerance is that of sums that share nothing.
        np.testing.assert_allclose(slope, expected, atol=4 / np.sqrt(20_000) / 0.4)

    def test_a_gradient_by_v_comes_back_through_differences_only(self, model):
        rng = np.random.default_rng(9)
        signals = torch.tensor(model.signal(model.sample(50, rng))[None], dtype=torch.float32)
        for decoder, flows in ((Decoder(model), False), (DifferenceDecoder(model), True)):
            estimate = torch.tensor(
                model.sample(50, rng)[None], dtype=torch.float32, requires_grad=True
            )
            signal_error(estimate, signals, decoder).sum().backward()
            assert torch.all(estimate.grad[..., :3] != 0)
            assert torch.any(estimate.grad[..., 3] != 0) == flows

    @pytest.mark.parametrize("step", [0.1, 3.1, 0.0, -0.5, np.nan])
    def test_steps_that_make_no_difference(self, model, step):
        with pytest.raises(ValueError, match="step must be from 0.2 mm/s"):
            DifferenceDecoder(model, step)


class TestLearning:
    @pytest.fixture(scope="class")
    @staticmethod
    def learnt():
        return compare(600, 2, seed=3, replicates=2)

    def test_shapes(self, learnt):
        networks = [
            f"{kind}{begin}"
            for begin in ("", "-from-gt")
            for kind in ("self-supervised", "self-supervised-differences")
        ] + ["supervised-gt", "supervised-mle"]
        single = ["mle", "always the mean"]
        assert sorted(learnt["estimators"]) == sorted(networks + single)
        bins = len(learnt["speed/edges"]) - 1
        for name in networks + single:
            replicates = 1 if name in single else 2
            for score in ("rmse", "slope", "correlation"):
                assert learnt[f"{score}/{name}"].shape == (replicates, 4)
            assert learnt[f"residual/{name}"].shape == (replicates,)
            assert learnt[f"speed/{name}"].shape == (replicates, 3, bins)
        for name in networks:
            assert np.all((learnt[f"epochs/{name}"] >= 1) & (learnt[f"epochs/{name}"] <= 2))

    def test_the_mean_knows_nothing_of_the_tissue(self, learnt, model):
        np.testing.assert_allclose(learnt["slope/always the mean"], 0, atol=1e-12)
        assert np.isnan(learnt["correlation/always the mean"]).all()
        # Its error is the spread of a uniform distribution, width / sqrt(12), within 4 SE.
        width = np.diff(model.training, axis=1)[:, 0]
        np.testing.assert_allclose(learnt["rmse/always the mean"][0], width / 12**0.5, rtol=0.08)

    def test_the_fit_leaves_less_than_the_noise(self, learnt):
        # Four parameters and ten signals: sqrt(6 / 10) of sigma, were the model linear.
        assert 0.7 < learnt["residual/mle"][0] < 0.9

    @pytest.mark.slow
    def test_labels_carry_the_speed_and_a_zero_derivative_does_not(self, model):
        rng = np.random.default_rng(30)
        dataset = simulate(model, Rician(1 / 30), model.sample(5000, rng), rng)
        fit = maximum_likelihood(model, Rician(1 / 30), dataset.signals)
        kinds = tasks(dataset.with_labels({"mle": labels_from_fit(fit)}))
        fresh = Networks(mlp_widths(model), dataset.mean, [0] * len(kinds))
        trained, _ = train(fresh, list(kinds.values()), epochs=80, learning_rate=0.005)
        truth = model.sample(5000, rng)
        signals = torch.tensor(Rician(1 / 30).sample(model.signal(truth), rng)).float()
        with torch.inference_mode():
            estimates = trained(signals.expand(len(kinds), -1, -1)).numpy()
        error, correlation = {}, {}
        for name, theta in zip(kinds, estimates, strict=True):
            error[name] = np.sqrt(np.mean((theta[:, 3] - truth[:, 3]) ** 2))
            correlation[name] = np.corrcoef(theta[:, 3], truth[:, 3])[0, 1]
        nothing = np.std(truth[:, 3])  # what always answering the mean costs
        for name in ("supervised-gt", "supervised-mle", "self-supervised-differences"):
            assert error[name] < nothing and correlation[name] > 0.6
        assert error["self-supervised"] > nothing
        # No gradient ever reaches the weights that only v depends on.
        before, after = fresh.weights[-1].detach(), trained.weights[-1].detach()
        untouched = [torch.equal(x[:, 3], y[:, 3]) for x, y in zip(before, after, strict=True)]
        assert dict(zip(kinds, untouched, strict=True)) == {
            name: name == "self-supervised" for name in kinds
        }


class TestBadInput:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"segment": -1.0}, "segment must be positive and finite, got -1.0"),
            ({"time": np.nan}, "time must be positive and finite, got nan"),
            ({"spacing": 0.0}, "spacing must be positive and finite"),
            ({"segment": 95.0}, "segment must be a multiple of spacing, got segment=95.0"),
            ({"spins": 0}, "spins must be a number of spins, 1 or more, got 0"),
            ({"segment": 1000.0, "spacing": 1000.0}, "spacing must be short enough"),
        ],
    )
    def test_a_network_that_cannot_be(self, settings, message):
        with pytest.raises(ValueError, match=message):
            CapillaryFlow(BVALUES, **settings)

    def test_bvalues_in_another_unit(self):
        with pytest.raises(ValueError, match="must be in s/mm2"):
            CapillaryFlow([0, 0.1, 0.8])

    @pytest.mark.parametrize("v", [-0.1, 6.1, np.nan, np.inf])
    def test_speeds_that_were_not_simulated(self, model, v):
        with pytest.raises(ValueError, match="v must be from 0 to 6 mm/s, the speeds simulated"):
            model.signal([[1.0, 0.3, 1.0, v]])

    def test_signals_of_another_acquisition(self, model):
        with pytest.raises(ValueError, match="signals must have shape"):
            maximum_likelihood(model, Rician(1 / 30), np.ones((5, 9)))
