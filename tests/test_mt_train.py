"""Pulse trains: what they hold, and every way in which one can be wrong."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest

from qmri.mt.train import PulseTrain
from qmri.sources import is_available

PUBLISHED = "mt-brain/control_MT_v3p2_TR3p5ms_discretized.mat"


def train(flip_angles=(np.pi, 0.3, 0.5), durations=(5e-4, 3e-4, 2e-4), repetition_time=3.5e-3):
    return PulseTrain(flip_angles, durations, repetition_time)


@pytest.fixture
def published():
    if not is_available(PUBLISHED):
        pytest.skip(
            f"{PUBLISHED} is not on this computer: set QMRI_DATA_DIR to a folder that holds it, "
            f"or run qmri.fetch({PUBLISHED!r}) once"
        )
    return PulseTrain.published()


class TestHolding:
    def test_arrays_are_read_only_copies(self):
        angles = np.array([np.pi, 0.3, 0.5])
        made = train(flip_angles=angles)
        angles[1] = 1.0
        assert made.flip_angles[1] == 0.3
        assert made.pulses == 3
        for values in (made.flip_angles, made.durations):
            assert values.dtype == np.float64
            with pytest.raises(ValueError, match="read-only"):
                values[0] = 0.0
        with pytest.raises(dataclasses.FrozenInstanceError):
            made.repetition_time = 1.0

    def test_equal_trains_are_interchangeable(self):
        assert train() == train()
        assert hash(train()) == hash(train())
        assert pickle.loads(pickle.dumps(train())) == train()
        assert train(flip_angles=(np.pi, 0.0, 0.5)) == train(flip_angles=(np.pi, -0.0, 0.5))
        assert train() != "train"

    @pytest.mark.parametrize(
        "change",
        [
            {"flip_angles": (np.pi, 0.3, np.nextafter(0.5, 1))},
            {"durations": (5e-4, 2e-4, 3e-4)},
            {"repetition_time": 3.6e-3},
        ],
    )
    def test_any_other_number_is_another_train(self, change):
        assert train(**change) != train()
        assert train(**change).fingerprint != train().fingerprint

    def test_fingerprint_is_a_sha256(self):
        digits = train().fingerprint
        assert len(digits) == 64
        int(digits, 16)

    def test_repr_fits_on_a_line(self):
        shown = repr(PulseTrain.default())
        assert "1142 pulses" in shown and "3.5 ms" in shown and "\n" not in shown
        assert len(shown) < 160


class TestDefault:
    made = PulseTrain.default()

    def test_begins_with_an_inversion(self):
        assert self.made.flip_angles[0] == pytest.approx(np.pi, abs=1e-6)
        assert np.all(self.made.flip_angles[1:] < 0.75 * np.pi)

    def test_is_what_a_scanner_can_play(self):
        assert self.made.pulses == 1142
        assert self.made.repetition_time == 3.5e-3
        assert self.made.durations.min() >= 1e-4 and self.made.durations.max() <= 5e-4
        excitation = (self.made.flip_angles / self.made.durations)[1:]
        # 20 uT, above what a body coil reaches at 3 T, in rad/s
        assert excitation.max() < 2.675e8 * 20e-6

    def test_flip_angle_and_duration_vary_smoothly(self):
        """The hybrid state follows a slow change: no step exceeds a tenth of the range."""
        for values in (self.made.flip_angles[1:], self.made.durations[1:]):
            assert np.abs(np.diff(values)).max() < 0.1 * np.ptp(values)

    def test_has_several_lobes(self):
        angles = self.made.flip_angles[1:]
        inner = angles[1:-1]
        peaks = np.sum((inner > angles[:-2]) & (inner >= angles[2:]))
        assert 4 <= peaks <= 5

    def test_strength_is_not_a_function_of_the_flip_angle(self):
        """Otherwise the saturation of the semi-solid pool could not be told from B1."""
        angles, durations = self.made.flip_angles[1:], self.made.durations[1:]
        similar = np.abs(angles - 0.6) < 0.05
        assert durations[similar].max() > 1.3 * durations[similar].min()

    def test_shorter_trains_sample_the_same_lobes(self):
        short = PulseTrain.default(571)
        np.testing.assert_allclose(
            short.flip_angles[1:], self.made.flip_angles[2::2], rtol=0, atol=2e-6
        )

    @pytest.mark.parametrize("pulses", [0, 49, -3, 100.0, "100", True, None])
    def test_refuses_what_is_no_number_of_pulses(self, pulses):
        with pytest.raises(ValueError, match=r"pulses must be a whole number, 50 or more"):
            PulseTrain.default(pulses)


def test_published_train_takes_four_seconds(published):
    assert published.pulses == 1142
    assert published.pulses * published.repetition_time == pytest.approx(4.0, abs=0.01)
    assert published.flip_angles[0] == pytest.approx(np.pi)
    assert published.durations.min() > 2e-4 and published.durations.max() <= 5e-4
    assert published == PulseTrain.published() != PulseTrain.default()


class TestBadInput:
    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_not_finite(self, bad):
        with pytest.raises(ValueError, match=r"flip_angles must be finite, got .* \(pulse 1\)"):
            train(flip_angles=(np.pi, bad, 0.5))
        with pytest.raises(ValueError, match=r"durations must be finite, got .* \(pulse 2\)"):
            train(durations=(5e-4, 3e-4, bad))
        with pytest.raises(ValueError, match="repetition_time must be positive and finite"):
            train(repetition_time=bad)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"flip_angles": []}, r"flip_angles must have shape \(pulses,\).*got \(0,\)"),
            ({"flip_angles": 1.0}, r"flip_angles must have shape \(pulses,\).*got \(\)"),
            ({"durations": [[5e-4, 3e-4, 2e-4]]}, r"durations must have shape.*got \(1, 3\)"),
            ({"durations": [5e-4, 3e-4]}, "durations must hold one value .* 3 flip angles, got 2"),
            ({"flip_angles": ["a", 0, 0]}, "flip_angles must be real numbers in rad"),
            ({"flip_angles": [1j, 0, 0]}, "flip_angles must be real numbers in rad"),
            ({"durations": {}}, "durations must be real numbers in s"),
            ({"repetition_time": "TR"}, "repetition_time must be one number in s"),
            ({"repetition_time": 0.0}, "repetition_time must be positive"),
            ({"repetition_time": -3.5e-3}, "repetition_time must be positive"),
        ],
    )
    def test_not_a_train(self, change, message):
        with pytest.raises(ValueError, match=message):
            train(**change)

    def test_durations_of_nothing(self):
        with pytest.raises(ValueError, match=r"durations must be positive, in s, got 0 \(pulse 1"):
            train(durations=(5e-4, 0.0, 2e-4))
        with pytest.raises(ValueError, match=r"durations must be positive, in s, got -0.0003"):
            train(durations=(5e-4, 2e-4, -3e-4))

    def test_pulse_as_long_as_the_repetition_time(self):
        with pytest.raises(
            ValueError, match=r"shorter than the repetition time of 0.0035 s, the longest is 0.0035"
        ) as refused:
            train(durations=(5e-4, 3.5e-3, 2e-4))
        assert "looks like" not in str(refused.value)

    def test_negative_flip_angle(self):
        with pytest.raises(ValueError, match=r"from 0 to 2 pi, got -0.3 \(1 of 3") as refused:
            train(flip_angles=(np.pi, -0.3, 0.5))
        assert "degrees" not in str(refused.value)

    def test_units(self):
        with pytest.raises(ValueError, match=r"got 180 .*looks like degrees"):
            train(flip_angles=(180.0, 17.0, 29.0))
        with pytest.raises(ValueError, match=r"longest is 0.5: this looks like ms"):
            train(durations=(0.5, 0.3, 0.2))
        with pytest.raises(ValueError, match=r"longest is 500: this looks like us"):
            train(durations=(500.0, 300.0, 200.0))
        with pytest.raises(ValueError, match=r"repetition_time .* got 3.5: this looks like ms"):
            train(durations=(0.5, 0.3, 0.2), repetition_time=3.5)
        with pytest.raises(ValueError, match=r"repetition_time .* got 3500: this looks like us"):
            train(durations=(500, 300, 200), repetition_time=3500)
