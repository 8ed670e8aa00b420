"""Dictionary matching on a model small enough to know the answers."""

from __future__ import annotations

import numpy as np
import pytest

from qmri import Parameter
from qmri.models import SignalModel
from qmri.mt import dictionary as module
from qmri.mt.dictionary import Dictionary, grid, memory
from qmri.noise import ComplexGaussian


class Decay(SignalModel):
    """exp((-rate + 1j frequency) t) at 16 times."""

    measurements = 16
    parameters = (
        Parameter("rate", "R_2", "1/s", (0.5, 3.5), (0.0, 100.0)),
        Parameter("frequency", r"\omega", "rad/s", (-5.0, 5.0), (-50.0, 50.0)),
    )
    times = np.linspace(0, 2, 16)

    def signal(self, theta):
        theta = self.check_theta(theta)
        return np.exp((-theta[:, :1] + 1j * theta[:, 1:]) * self.times)

    def __repr__(self):
        return "Decay()"


MODEL = Decay()
ENTRIES = MODEL.sample(500, np.random.default_rng(0))
DICTIONARY = Dictionary(MODEL, ENTRIES)


class TestMatching:
    def test_finds_its_own_entries_whatever_their_amplitude(self):
        rng = np.random.default_rng(1)
        amplitude = rng.uniform(0.1, 3, 500) * np.exp(2j * np.pi * rng.uniform(size=500))
        match = DICTIONARY.match(amplitude[:, np.newaxis] * MODEL.signal(ENTRIES))
        np.testing.assert_array_equal(match.index, np.arange(500))
        np.testing.assert_array_equal(match.theta, ENTRIES)
        np.testing.assert_allclose(match.amplitude, amplitude, rtol=1e-10)
        np.testing.assert_allclose(match.correlation, 1, atol=1e-12)

    def test_is_the_least_squares_entry_among_all(self):
        rng = np.random.default_rng(2)
        signals = ComplexGaussian(0.3).sample(MODEL.signal(MODEL.sample(40, rng)), rng)
        atoms = MODEL.signal(ENTRIES)
        best, amplitude = [], []
        for signal in signals:
            factors = [np.linalg.lstsq(a[:, np.newaxis], signal, rcond=None)[0][0] for a in atoms]
            left = [np.linalg.norm(signal - f * a) for f, a in zip(factors, atoms, strict=True)]
            best.append(int(np.argmin(left)))
            amplitude.append(factors[best[-1]])
        match = DICTIONARY.match(signals)
        np.testing.assert_array_equal(match.index, best)
        np.testing.assert_allclose(match.amplitude, amplitude, rtol=1e-9)
        np.testing.assert_array_equal(DICTIONARY.estimate(signals), ENTRIES[best])
        assert np.all((match.correlation > 0) & (match.correlation < 1))

    def test_blocks_do_not_show(self, monkeypatch):
        entries = MODEL.sample(9000, np.random.default_rng(3))  # more than one block of entries
        known = Dictionary(MODEL, entries)
        rng = np.random.default_rng(4)
        signals = ComplexGaussian(0.1).sample(MODEL.signal(MODEL.sample(50, rng)), rng)
        whole = known.match(signals)
        monkeypatch.setattr(module, "_BLOCK", 4096 * 7)  # seven voxels at once
        pieces = known.match(signals)
        np.testing.assert_array_equal(whole.index, pieces.index)
        np.testing.assert_allclose(whole.correlation, pieces.correlation, rtol=1e-12)
        assert whole.index.max() > 4096

    def test_voxels_without_signal(self):
        signals = MODEL.signal(ENTRIES[:4])
        signals[1] = 0
        signals[2, 5] = np.nan
        match = DICTIONARY.match(signals)
        assert match.index.tolist() == [0, -1, -1, 3]
        for values in (match.theta, match.amplitude, match.correlation):
            assert np.isnan(values[1:3]).all() and np.isfinite(values[[0, 3]]).all()
        assert DICTIONARY.match(signals[:0]).theta.shape == (0, 2)

    def test_is_an_estimator(self):
        assert DICTIONARY.names == ("rate", "frequency")
        assert DICTIONARY.units == ("1/s", "rad/s")
        assert len(DICTIONARY) == 500
        assert repr(DICTIONARY) == "Dictionary(500 entries of Decay())"


class TestDiscretisation:
    def test_falls_with_the_spacing(self):
        """Uniform truth in a cell of width w errs by w / sqrt(12), where matches are nearest."""
        theta = MODEL.sample(4000, np.random.default_rng(5))
        coarse, fine = (
            Dictionary(MODEL, grid(MODEL, levels)).discretisation_error(theta)
            for levels in (10, 40)
        )
        np.testing.assert_allclose(coarse / fine, 4, rtol=0.15)
        assert fine[1] == pytest.approx(10 / 40 / np.sqrt(12), rel=0.1)

    def test_memory_grows_as_a_power_of_the_parameters(self):
        assert Dictionary(MODEL, grid(MODEL, 10)).nbytes == memory([10, 10], 16)
        assert memory([10] * 7, 13) == 10**5 * memory([10] * 2, 13)


class TestGrid:
    def test_levels_are_centres_of_equal_cells(self):
        entries = grid(MODEL, {"rate": 3, "frequency": 2})
        np.testing.assert_allclose(entries, [[r, f] for r in (1.0, 2.0, 3.0) for f in (-2.5, 2.5)])

    def test_parameters_not_named_stay_in_the_middle(self):
        entries = grid(MODEL, {"rate": 2})
        np.testing.assert_allclose(entries, [[1.25, 0.0], [2.75, 0.0]])

    def test_bad_levels(self):
        with pytest.raises(ValueError, match=r"levels must name parameters .* got \['T1'\]"):
            grid(MODEL, {"T1": 3})
        for bad in (0, -1, 2.5, "3", True):
            with pytest.raises(ValueError, match="levels of rate must be a whole number, 1 or"):
                grid(MODEL, {"rate": bad})


class TestBadInput:
    def test_entries(self):
        with pytest.raises(ValueError, match="at least one entry"):
            Dictionary(MODEL, np.empty((0, 2)))
        with pytest.raises(ValueError, match=r"theta must have shape \(voxels, 2\)"):
            Dictionary(MODEL, np.ones((3, 3)))
        with pytest.raises(ValueError, match=r"1 of 2 entries do not \(the first is entry 1"):
            Dictionary(MODEL, [[1.0, 0.0], [np.nan, 0.0]])

    def test_signals(self):
        with pytest.raises(ValueError, match=r"signals must have shape \(voxels, 16\).*\(3, 13\)"):
            DICTIONARY.estimate(np.ones((3, 13)))
        with pytest.raises(ValueError, match=r"got \(16,\)"):
            DICTIONARY.match(np.ones(16))
