"""Signal models: limits a physicist knows, derivatives, and a reader's own model."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from qmri import IVIM, FunctionModel, Parameter, SignalModel
from qmri.models import check_bvalues

PAPER_BVALUES = (0, 10, 20, 30, 50, 80, 100, 200, 400, 800)


@pytest.fixture
def model() -> IVIM:
    return IVIM(PAPER_BVALUES)


def ivim_signal(b, S0, f, Dslow, Dfast):
    b = b * 1e-3
    return S0 * (f * math.exp(-b * (Dfast + Dslow)) + (1 - f) * math.exp(-b * Dslow))


def ivim_as_a_reader_writes_it() -> FunctionModel:
    return FunctionModel(ivim_signal, PAPER_BVALUES, IVIM(PAPER_BVALUES).parameters, "S0")


class TestIVIM:
    def test_signal_without_weighting_is_S0(self, model):
        theta = model.sample(100, np.random.default_rng(1))
        np.testing.assert_array_equal(model.signal(theta)[:, 0], theta[:, 0])

    def test_without_perfusion_it_is_one_exponential(self, model):
        signal = model.signal([[1.0, 0.0, 1.5, 50.0]])[0]
        np.testing.assert_allclose(signal, np.exp(-model.bvalues * 1.5e-3), rtol=1e-14)

    def test_units(self):
        # b = 1000 s/mm2 and D = 1 um2/ms = 0.001 mm2/s: exp(-1)
        signal = IVIM([0, 1000]).signal([[1.0, 0.0, 1.0, 10.0]])[0]
        assert signal[1] == pytest.approx(math.exp(-1), rel=1e-14)

    def test_fast_water_is_gone_at_high_b(self, model):
        f, dslow = 0.3, 1.0
        signal = model.signal([[1.0, f, dslow, 150.0]])[0]
        left = (1 - f) * np.exp(-model.bvalues * dslow * 1e-3)
        at_200 = PAPER_BVALUES.index(200)
        np.testing.assert_allclose(signal[at_200:], left[at_200:], rtol=1e-12)

    def test_fast_water_diffuses_at_both_rates(self):
        # Dfast is counted on top of Dslow.
        signal = IVIM([0, 100]).signal([[1.0, 1.0, 2.0, 30.0]])[0]
        assert signal[1] == pytest.approx(math.exp(-0.1 * 32.0), rel=1e-14)

    def test_jacobian_matches_differences(self, model):
        theta = model.sample(200, np.random.default_rng(2))
        exact = model.jacobian(theta)
        numerical = SignalModel.jacobian(model, theta)
        scale = np.abs(exact).max(axis=1, keepdims=True)
        assert np.all(np.abs(exact - numerical) < 1e-8 * scale)

    def test_both_at_once_are_the_two_apart(self, model):
        theta = model.sample(50, np.random.default_rng(3))
        signal, jacobian = model.signal_and_jacobian(theta)
        np.testing.assert_allclose(signal, model.signal(theta), rtol=1e-15)
        np.testing.assert_array_equal(jacobian, model.jacobian(theta))

    def test_shapes(self, model):
        theta = model.sample(7, np.random.default_rng(4))
        assert theta.shape == (7, 4)
        assert model.signal(theta).shape == (7, 10)
        assert model.jacobian(theta).shape == (7, 10, 4)
        assert model.signal(theta[:0]).shape == (0, 10)

    def test_names_units_and_ranges_of_the_paper(self, model):
        assert model.names == ("S0", "f", "Dslow", "Dfast")
        assert model.units == ("1", "1", "um2/ms", "um2/ms")
        np.testing.assert_array_equal(
            model.training, [[0.8, 1.2], [0.1, 0.5], [0.4, 3.0], [10, 150]]
        )
        np.testing.assert_array_equal(model.bounds, [[0, 10_000], [0.01, 0.5], [0.01, 4], [2, 300]])

    def test_sample_is_uniform_over_the_training_ranges(self, model):
        theta = model.sample(20_000, np.random.default_rng(5))
        low, high = model.training.T
        assert np.all((theta >= low) & (theta <= high))
        for column, (a, b) in zip(theta.T, model.training, strict=True):
            assert stats.kstest(column, stats.uniform(a, b - a).cdf).pvalue > 1e-3

    def test_same_seed_same_tissue(self, model):
        np.testing.assert_array_equal(
            model.sample(5, np.random.default_rng(6)), model.sample(5, np.random.default_rng(6))
        )

    def test_negative_sample_size_is_refused(self, model):
        with pytest.raises(ValueError, match="n must be a number of voxels.*-1"):
            model.sample(-1, np.random.default_rng(0))

    @pytest.mark.parametrize("shape", [(4,), (3, 5), (2, 3, 4)])
    def test_theta_of_another_shape_is_refused(self, model, shape):
        with pytest.raises(ValueError, match=r"theta must have shape \(voxels, 4\).*Dslow"):
            model.signal(np.ones(shape))

    def test_starts_lie_within_bounds_and_near_noise_free_truth(self, model):
        theta = model.sample(500, np.random.default_rng(8))
        starts = model.starting_points(model.signal(theta) * 250)
        low, high = model.bounds.T
        assert np.all((starts >= low) & (starts <= high))
        # The grid step of Dslow is about 20 %, and S0 is linear.
        np.testing.assert_allclose(starts[0, :, 0], 250 * theta[:, 0], rtol=0.05)
        assert np.median(np.abs(np.log(starts[0, :, 2] / theta[:, 2]))) < 0.2

    @settings(max_examples=50, deadline=None)
    @given(
        data=st.data(),
        bvalues=st.lists(st.floats(0, 3000), min_size=1, max_size=20),
        voxels=st.integers(0, 5),
    )
    def test_any_protocol_decays_from_S0(self, data, bvalues, voxels):
        model = IVIM([0, *bvalues, 1000])
        low, high = model.bounds.T
        unit = data.draw(arrays(float, (voxels, 4), elements=st.floats(0, 1)))
        theta = low + unit * (high - low)
        signal = model.signal(theta)
        assert signal.shape == (voxels, len(bvalues) + 2)
        assert np.all((signal >= 0) & (signal <= theta[:, :1] * (1 + 1e-12)))
        ordered = signal[:, np.argsort(model.bvalues)]
        assert np.all(np.diff(ordered, axis=1) <= 1e-12 * theta[:, :1])


@pytest.mark.parametrize(
    ("bvalues", "message"),
    [
        ([], r"at least one, got \(0,\)"),
        ([[0, 100]], r"shape \(measurements,\)"),
        ([0, "many"], "numbers in s/mm2"),
        ([0, np.nan, 100], "finite, got nan"),
        ([0, np.inf, 100], "finite, got inf"),
        ([0, -50, 100], "not be negative, got -50"),
        ([10, 100, 800], "b = 0, the smallest is 10"),
        ([0, 0.1, 0.8], r"largest is 0\.8.*ms/um2.*1000"),
        ([0, 1e8, 8e8], "largest is 8e.08.*s/m2.*1,000,000"),
    ],
)
def test_bad_bvalues_are_named(bvalues, message):
    with pytest.raises(ValueError, match=message):
        check_bvalues(bvalues)
    with pytest.raises(ValueError, match="bvalues"):
        IVIM(bvalues)


def test_bvalues_are_copied_and_protected():
    mine = np.array([0.0, 100.0, 800.0])
    model = IVIM(mine)
    mine[1] = 500
    assert model.bvalues[1] == 100
    with pytest.raises(ValueError, match="read-only"):
        model.bvalues[1] = 500


class TestParameter:
    def test_reversed_range_is_refused(self):
        with pytest.raises(ValueError, match="bounds of parameter 'T1'.*low <= high"):
            Parameter("T1", "T_1", "s", (1, 2), (3, 0))

    def test_training_outside_the_bounds_is_refused(self):
        with pytest.raises(ValueError, match="training range.*'T1'.*within its bounds"):
            Parameter("T1", "T_1", "s", (1, 5), (0, 4))

    def test_infinite_range_is_refused(self):
        with pytest.raises(ValueError, match="finite"):
            Parameter("T1", "T_1", "s", (1, 5), (0, np.inf))


class TestFunctionModel:
    def test_is_the_library_model_when_it_says_the_same(self, model):
        mine = ivim_as_a_reader_writes_it()
        theta = model.sample(100, np.random.default_rng(9))
        np.testing.assert_allclose(mine.signal(theta), model.signal(theta), rtol=1e-13)
        exact = model.jacobian(theta)
        scale = np.abs(exact).max(axis=1, keepdims=True)
        assert np.all(np.abs(mine.jacobian(theta) - exact) < 1e-8 * scale)

    def test_several_settings_per_measurement(self):
        def saturation_recovery_echo(setting, S0, T1, T2):
            return S0 * (1 - np.exp(-setting[0] / T1)) * np.exp(-setting[1] / T2)

        settings = np.array([[500.0, 10.0], [500.0, 80.0], [4000.0, 10.0], [4000.0, 80.0]])
        model = FunctionModel(
            saturation_recovery_echo,
            settings,
            [
                Parameter("S0", "S_0", "1", (0.5, 2), (0, 100)),
                Parameter("T1", "T_1", "ms", (300, 3000), (1, 10_000)),
                Parameter("T2", "T_2", "ms", (20, 200), (1, 5_000)),
            ],
        )
        expected = (1 - np.exp(-settings[:, 0] / 1000)) * np.exp(-settings[:, 1] / 70)
        np.testing.assert_allclose(model.signal([[1, 1000, 70]])[0], expected, rtol=1e-13)

    def test_names_must_be_the_arguments(self):
        t1 = Parameter("T1", "T_1", "s", (0.5, 2), (0.1, 5))
        with pytest.raises(ValueError, match=r"named as the arguments of decay.*T2.*T1"):

            def decay(t, T2):
                return math.exp(-t / T2)

            FunctionModel(decay, [0.0, 1.0], [t1])

    def test_function_that_cannot_be_compiled_is_refused(self):
        t2 = Parameter("T2", "T_2", "s", (0.5, 2), (0.1, 5))

        def decay(t, T2):
            return {"signal": sorted(str(t))}[T2]

        with pytest.raises(ValueError, match="function 'decay' must be plain scalar arithmetic"):
            FunctionModel(decay, [0.0, 1.0], [t2])

    def test_complex_signal_is_refused(self):
        t2 = Parameter("T2", "T_2", "s", (0.5, 2), (0.1, 5))

        def decay(t, T2):
            return np.exp(-t / T2 + 1j * t)

        with pytest.raises(ValueError, match="one real number"):
            FunctionModel(decay, [0.0, 1.0], [t2])

    @pytest.mark.parametrize("acquisition", [[], 3.0, [[[1.0]]]])
    def test_acquisition_of_another_shape_is_refused(self, acquisition):
        t2 = Parameter("T2", "T_2", "s", (0.5, 2), (0.1, 5))
        with pytest.raises(ValueError, match="acquisition must have shape"):
            FunctionModel(lambda t, T2: t / T2, acquisition, [t2])

    def test_acquisition_must_be_finite(self):
        t2 = Parameter("T2", "T_2", "s", (0.5, 2), (0.1, 5))
        with pytest.raises(ValueError, match="acquisition must be finite"):
            FunctionModel(lambda t, T2: t / T2, [1.0, np.nan], [t2])

    def test_unknown_amplitude_is_refused(self):
        t2 = Parameter("T2", "T_2", "s", (0.5, 2), (0.1, 5))
        with pytest.raises(ValueError, match=r"amplitude must be one of T2, got 'S0'"):
            FunctionModel(lambda t, T2: t / T2, [1.0], [t2], amplitude="S0")


def test_a_numpy_model_gets_everything_from_its_signal_alone():
    class Bump(SignalModel):
        """Not differentiable in closed form by anyone who only sees `signal`."""

        parameters = (
            Parameter("height", "h", "1", (1, 2), (0, 10)),
            Parameter("place", "x", "1", (0.2, 0.8), (0, 1)),
        )
        measurements = 12

        def signal(self, theta):
            theta = self.check_theta(theta)
            x = np.linspace(0, 1, self.measurements)
            return theta[:, :1] * np.exp(-((x - theta[:, 1:]) ** 2) / 0.05)

    model = Bump()
    theta = model.sample(20, np.random.default_rng(10))
    x = np.linspace(0, 1, 12)
    by_place = model.signal(theta) * 2 * (x - theta[:, 1:]) / 0.05
    np.testing.assert_allclose(model.jacobian(theta)[:, :, 1], by_place, rtol=1e-7, atol=1e-8)
