"""Networks side by side: each is the plain network that a reader would write."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qmri import IVIM, FunctionModel, Parameter, Rician
from qmri.networks import NetworkBank, NetworkEstimator, Networks, mlp_widths

BVALUES = (0, 10, 20, 30, 50, 80, 100, 200, 400, 800)
MODEL = IVIM(BVALUES)
SCALE = np.array([1.0, 0.3, 1.7, 80.0])
SHAPES = {"standard": {}, "wide": {"width": 150}, "deep": {"hidden": 10}}
# Some ten roundings of single precision in a row, each of a number near 1.
ROUNDING = 1e-5


def stack(count=3, **shape) -> Networks:
    return Networks(mlp_widths(MODEL, **shape), SCALE, seeds=range(count))


def signals(voxels: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return Rician(1 / 30).sample(MODEL.signal(MODEL.sample(voxels, rng)), rng)


def run(networks: Networks, measured: np.ndarray) -> np.ndarray:
    """The same signals through all networks of a stack."""
    with torch.inference_mode():
        x = torch.tensor(measured, dtype=torch.float32).expand(len(networks), -1, -1)
        return networks(x).numpy()


def estimator(**changes) -> NetworkEstimator:
    return NetworkEstimator(**{"network": stack(1), "model": MODEL, "snr": 15, **changes})


class TestStructure:
    @pytest.mark.parametrize("shape", SHAPES)
    def test_each_network_is_a_plain_sequence_of_layers(self, shape):
        networks, measured = stack(3, **SHAPES[shape]), signals(200)
        together = run(networks, measured)
        for k in range(3):
            layers = []
            for weight, bias in zip(networks.weights, networks.biases, strict=True):
                layer = torch.nn.Linear(*weight.shape[1:])
                layer.weight.data, layer.bias.data = weight[k].T.detach(), bias[k, 0].detach()
                layers += [layer, torch.nn.ELU()]
            alone = torch.nn.Sequential(*layers[:-1])
            with torch.inference_mode():
                expected = alone(torch.tensor(measured, dtype=torch.float32)).abs().numpy()
            np.testing.assert_allclose(together[k] / SCALE, expected, rtol=0, atol=ROUNDING)

    @pytest.mark.parametrize(
        ("shape", "widths"),
        [
            ("standard", (10, 10, 10, 10, 4)),
            ("wide", (10, 150, 150, 150, 4)),
            ("deep", (10, 10, 10, 10, 10, 10, 10, 10, 10, 10, 10, 4)),
        ],
    )
    def test_widths_of_the_paper(self, shape, widths):
        assert mlp_widths(MODEL, **SHAPES[shape]) == widths

    def test_first_weights_depend_on_the_seed_alone(self):
        together = Networks(mlp_widths(MODEL), SCALE, seeds=[7, 8]).arrays()
        alone = Networks(mlp_widths(MODEL), SCALE, seeds=[8]).arrays()
        for name, values in together.items():
            np.testing.assert_array_equal(values[1], alone[name][0])
            assert not np.any(values[0] == values[1])

    def test_first_weights_are_uniform(self):
        networks = stack(50, width=25)
        reaches = [1 / np.sqrt(10), 1 / 5, 1 / 5, 1 / 5]
        for weights, biases, reach in zip(networks.weights, networks.biases, reaches, strict=True):
            for values in (weights.detach().numpy(), biases.detach().numpy()):
                assert np.abs(values).max() <= reach
                # Variance of a uniform variable; that of its square is 4/5 of it, squared.
                tolerance = 4 * np.sqrt(0.8 / values.size)
                assert np.var(values) == pytest.approx(reach**2 / 3, rel=tolerance)

    @settings(max_examples=30, deadline=None)
    @given(seed=st.integers(0, 2**32 - 1), size=st.floats(1e-3, 1e3))
    def test_estimates_are_never_negative(self, seed, size):
        measured = size * np.random.default_rng(seed).standard_normal((20, 10))
        assert np.all(run(stack(), measured) >= 0)

    def test_scale_stretches_the_estimates(self):
        measured = signals(20)
        one = run(Networks(mlp_widths(MODEL), np.ones(4), seeds=[1]), measured)
        other = run(Networks(mlp_widths(MODEL), SCALE, seeds=[1]), measured)
        np.testing.assert_allclose(other, one * SCALE, rtol=1e-6)


class TestWeights:
    def test_they_come_back_as_they_were(self):
        old, measured = stack(), signals(50)
        new = Networks(mlp_widths(MODEL), SCALE, seeds=[10, 11, 12]).load(old.arrays())
        np.testing.assert_array_equal(run(new, measured), run(old, measured))

    def test_copies_are_independent(self):
        networks, measured = stack(), signals(50)
        before = run(networks, measured)
        for values in networks.arrays().values():
            values[:] = 0
        part = networks.at([0, 1])
        with torch.no_grad():
            part.weights[0].zero_()
        np.testing.assert_array_equal(run(networks, measured), before)

    def test_some_of_a_stack_in_any_order(self):
        networks, measured = stack(), signals(50)
        chosen = run(networks.at([2, 0, 2]), measured)
        expected = run(networks, measured)[[2, 0, 2]]
        np.testing.assert_allclose(chosen / SCALE, expected / SCALE, rtol=0, atol=ROUNDING)

    def test_one_network_can_begin_all(self):
        one = Networks(mlp_widths(MODEL), SCALE, seeds=[5])
        for name, values in stack(4).load(one.arrays()).arrays().items():
            np.testing.assert_array_equal(values, np.repeat(one.arrays()[name], 4, axis=0))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda a: a.pop("weights.0"), r"arrays must hold 'weights.0', got \['biases.0'"),
            (
                lambda a: a.update({"biases.1": np.zeros((3, 1, 9))}),
                r"arrays\['biases.1'\] must have shape \(3, 1, 10\), got \(3, 1, 9\)",
            ),
            (
                lambda a: a.update({"weights.0": np.zeros((2, 10, 10))}),
                r"arrays\['weights.0'\] must have shape \(3, 10, 10\), got \(2, 10, 10\)",
            ),
            (lambda a: a["biases.3"].fill(np.nan), r"arrays\['biases.3'\] must be finite"),
        ],
    )
    def test_weights_of_something_else(self, change, message):
        arrays = stack().arrays()
        change(arrays)
        with pytest.raises(ValueError, match=message):
            stack().load(arrays)


class TestBadShapes:
    @pytest.mark.parametrize("scale", [[1, 1, 1], [1, 1, 1, 0], [1, 1, 1, -1], [1, 1, 1, np.nan]])
    def test_a_scale_that_is_none(self, scale):
        with pytest.raises(ValueError, match="scale must hold 4 positive numbers.*got"):
            Networks((10, 10, 4), scale, seeds=[0])

    def test_no_networks(self):
        with pytest.raises(ValueError, match="seeds must hold one seed for each network, got none"):
            Networks((10, 10, 4), SCALE, seeds=[])

    @pytest.mark.parametrize("shape", [{"hidden": 0}, {"width": 0}])
    def test_no_layers(self, shape):
        with pytest.raises(ValueError, match="hidden and width must be 1 or more, got"):
            mlp_widths(MODEL, **shape)


class TestEstimator:
    def test_it_is_the_network(self):
        measured = signals(10_000)
        expected = run(stack(1), measured)[0]
        found = estimator().estimate(measured)
        np.testing.assert_allclose(found / SCALE, expected / SCALE, rtol=0, atol=ROUNDING)

    def test_it_says_what_it_estimates(self):
        assert estimator().names == ("S0", "f", "Dslow", "Dfast")
        assert estimator().units == ("1", "1", "um2/ms", "um2/ms")

    def test_it_says_what_it_was_trained_for(self):
        text = repr(estimator(name="mine"))
        assert "mine" in text and "SNR 15" in text and "800.0]" in text and "0.8 to 1.2" in text

    def test_single_precision_read_only_and_lists_will_do(self):
        measured = signals(20).astype(np.float32)
        expected = estimator().estimate(measured)
        measured.flags.writeable = False
        for same in (measured, measured.tolist(), np.asfortranarray(measured)):
            np.testing.assert_array_equal(estimator().estimate(same), expected)

    def test_input_is_left_alone(self):
        measured = signals(20)
        before = measured.copy()
        estimator().estimate(measured)
        np.testing.assert_array_equal(measured, before)

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
    def test_a_bad_voxel_is_nan_and_spoils_nobody(self, bad):
        measured = signals(5000)
        expected = estimator().estimate(measured)
        measured[4321, 3] = bad
        found = estimator().estimate(measured)
        assert np.isnan(found[4321]).all()
        np.testing.assert_array_equal(np.delete(found, 4321, 0), np.delete(expected, 4321, 0))

    def test_nothing_but_bad_voxels(self):
        assert np.isnan(estimator().estimate(np.full((3, 10), np.nan))).all()

    def test_no_voxels(self):
        assert estimator().estimate(np.empty((0, 10))).shape == (0, 4)

    @pytest.mark.parametrize(
        ("measured", "message"),
        [
            (np.ones((5, 9)), r"signals must have 10 columns, got 9: .*IVIM.*800.*SNR 15"),
            (np.ones(10), r"signals must be real and have shape \(voxels, 10\).*\(10,\)"),
            (np.ones((5, 10)) * 1j, "signals must be real.*complex128"),
            (400 * np.ones((5, 10)), "median maximum of 400, .*SNR 15 .*divide each voxel's"),
            (0.01 * np.ones((5, 10)), "median maximum of 0.01, .*S0 from 0.8 to 1.2"),
        ],
    )
    def test_signals_that_it_was_not_trained_for(self, measured, message):
        with pytest.raises(ValueError, match=message):
            estimator().estimate(measured)

    def test_noisy_signals_of_all_its_tissue_have_the_right_scale(self):
        rng = np.random.default_rng(1)
        for s0 in (0.8, 1.2):
            theta = MODEL.sample(200, rng)
            theta[:, 0] = s0
            measured = Rician(1 / 15).sample(MODEL.signal(theta), rng)
            assert np.isfinite(estimator().estimate(measured)).all()

    def test_some_dark_voxels_are_no_reason_to_refuse(self):
        measured = signals(100)
        measured[:40] = 0.01
        assert np.isfinite(estimator().estimate(measured)).all()

    def test_signals_without_an_amplitude_have_no_scale(self):
        model = FunctionModel(
            lambda t, a: a, [1.0, 2.0], [Parameter("a", "a", "1", (1, 2), (0, 9))]
        )
        network = Networks(mlp_widths(model), [1.0], seeds=[0])
        found = NetworkEstimator(network, model, 10).estimate([[100.0, 200.0]])
        assert np.isfinite(found).all()


class TestRequire:
    def test_the_acquisition_and_noise_of_training(self):
        estimator().require()
        estimator().require(bvalues=BVALUES, snr=15)
        estimator().require(bvalues=np.array(BVALUES) + 0.1, snr=16.4)

    @pytest.mark.parametrize(
        "bvalues", [BVALUES[:-1], BVALUES[::-1], (*BVALUES[:-1], 1000), (*BVALUES[:-1], np.nan)]
    )
    def test_other_bvalues(self, bvalues):
        message = r"bvalues are .*, but mine was trained for \[0.0, 10.0, .*800.0\] s/mm2"
        with pytest.raises(ValueError, match=message):
            estimator(name="mine").require(bvalues=bvalues)

    @pytest.mark.parametrize("snr", [30, 13, 0, -15, np.nan])
    def test_another_snr(self, snr):
        with pytest.raises(ValueError, match=f"snr is {snr}, but mine was trained for SNR 15"):
            estimator(name="mine").require(snr=snr)

    def test_bvalues_for_a_model_without_any(self):
        model = FunctionModel(
            lambda t, a: a, [1.0, 2.0], [Parameter("a", "a", "1", (1, 2), (0, 9))]
        )
        network = NetworkEstimator(Networks(mlp_widths(model), [1.0], seeds=[0]), model, 10)
        with pytest.raises(ValueError, match="bvalues are .*FunctionModel.*, which has none"):
            network.require(bvalues=[0, 100])


class TestBadEstimators:
    def test_more_than_one_network(self):
        with pytest.raises(ValueError, match="network must be a stack of one, got 3 networks"):
            estimator(network=stack(3))

    def test_another_acquisition(self):
        with pytest.raises(ValueError, match=r"must map 9 signals to 4 parameters.*\(10, 10"):
            estimator(model=IVIM(BVALUES[:-1]))


@pytest.mark.slow
def test_millions_of_voxels_a_second():
    """Two million on one core. Its own time is measured: the machine may be busy otherwise."""
    measured = np.tile(signals(10_000), (50, 1))
    threads, rates = torch.get_num_threads(), []
    torch.set_num_threads(1)
    try:
        for _ in range(5):
            begin = time.process_time()
            estimator().estimate(measured)
            rates.append(len(measured) / (time.process_time() - begin))
    finally:
        torch.set_num_threads(threads)
    assert max(rates) > 2e6


SNRS = (5, 7, 10, 15, 22, 32)


def bank(sigma: float = 1.0, snrs=SNRS) -> NetworkBank:
    """Networks of different weights, so that it shows which one a voxel went to."""
    members = [
        NetworkEstimator(Networks(mlp_widths(MODEL), SCALE, [int(s)]), MODEL, s) for s in snrs
    ]
    return NetworkBank(members, sigma)


def agree(found, expected, unit: float) -> None:
    """Up to rounding, for signals of about `unit`."""
    size = SCALE * [unit, 1, 1, 1]
    np.testing.assert_allclose(found / size, expected / size, rtol=0, atol=ROUNDING)


class TestBank:
    def test_a_voxel_at_a_networks_own_snr_meets_that_network_as_it_was_trained(self):
        """In any unit: the trained network sees noise of 1 / SNR and S0 near 1."""
        for unit in (1.0, 37.0, 1e-4):
            for snr in SNRS:
                measured = signals(50)
                found = bank(sigma=unit / snr)
                # S0 itself chooses; measured S0 from 0.8 to 1.2 may choose a neighbour.
                estimates = found.estimate(unit * measured, s0=np.full(50, unit))
                alone = NetworkEstimator(
                    Networks(mlp_widths(MODEL), SCALE, [snr]), MODEL, snr
                ).estimate(measured)
                alone[:, 0] *= unit
                agree(estimates, alone, unit)

    @given(ratio=st.floats(4.0, 38.4))
    @settings(deadline=None, max_examples=50)
    def test_no_gap_between_four_and_thirty_eight(self, ratio):
        """Every S0 / sigma finds a network that has seen it, with the noise it was trained on."""
        sigma = 3.0
        found = bank(sigma)
        route = found.routes(np.full((1, MODEL.measurements), ratio * sigma, np.float32))
        snr = found.snrs[route.network[0]]
        assert not route.outside[0]
        assert sigma / route.factor[0] == pytest.approx(1 / snr)
        assert 0.8 - 1e-6 <= ratio * sigma / route.factor[0] <= 1.2 + 1e-6

    @pytest.mark.parametrize(("ratio", "scaled"), [(2.0, 0.8), (200.0, 1.2)])
    def test_beyond_its_ends_s0_comes_to_lie_on_the_end(self, ratio, scaled):
        found = bank(sigma=0.5)
        route = found.routes(np.full((1, MODEL.measurements), ratio * 0.5))
        assert route.outside[0]
        assert ratio * 0.5 / route.factor[0] == pytest.approx(scaled)
        assert np.isfinite(found.estimate(np.full((1, MODEL.measurements), ratio * 0.5))).all()

    def test_the_amplitude_alone_follows_the_unit(self):
        measured = 20 * signals(300)
        one, other = bank(sigma=2.0).estimate(measured), bank(sigma=200.0).estimate(100 * measured)
        agree(other, one * [100, 1, 1, 1], 100 * 20)

    def test_voxels_do_not_depend_on_their_neighbours(self):
        measured = signals(40) * np.linspace(3, 40, 40)[:, np.newaxis]
        together = bank().estimate(measured)
        alone = [bank().estimate(measured[[v]])[0] for v in range(40)]
        agree(together, alone, 40)

    def test_a_voxel_that_cannot_be_estimated_is_nan(self):
        measured = 10 * signals(4)
        measured[1, 3] = np.nan
        measured[2] = 0
        found = bank().estimate(measured)
        assert np.isnan(found[[1, 2]]).all() and np.isfinite(found[[0, 3]]).all()

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: bank(sigma=0), "sigma must be one positive, finite number, got 0"),
            (lambda: bank(sigma=np.ones(3)), "sigma must be one positive"),
            (lambda: bank(snrs=(5, 5)), "an SNR of their own, got SNRs .5.0, 5.0."),
            (lambda: NetworkBank([], 1.0), "an SNR of their own"),
            (lambda: bank().require(bvalues=BVALUES[:-1]), "bvalues are .* was trained for"),
            (lambda: bank().require(snr=50), "snr is 50, but networks was trained for 4 to 38.4"),
            (lambda: bank().estimate(signals(3), s0=np.ones(2)), r"s0 must have shape \(3,\)"),
            (lambda: bank().estimate(signals(3)[:, :-1]), "signals must have 10 columns, got 9"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, make, message):
        with pytest.raises(ValueError, match=message):
            make()
