"""Stored networks: there by name, good for what they say, and refused for anything else."""

from __future__ import annotations

import re
import shlex

import numpy as np
import pytest

import qmri
from qmri import IVIM, Rician, cli, fit_mle
from qmri.artefacts import MissingArtefacts, Study
from qmri.losses import recipe
from qmri.studies import crb_loss

BVALUES = (0, 10, 20, 30, 50, 80, 100, 200, 400, 800)
MODEL = IVIM(BVALUES)
NAMES = [name for name in qmri.estimators() if name.startswith("ivim/")]
GOOD = "ivim/snr15/supervised-mle-rician"


def tissue_and_signals(snr: float, voxels: int = 2000):
    rng = np.random.default_rng(1)
    theta = MODEL.sample(voxels, rng)
    return theta, Rician(1 / snr).sample(MODEL.signal(theta), rng)


def test_networks_of_the_first_paper_are_there():
    for snr in (15, 30):
        for name in (
            "supervised-gt",
            "self-supervised",
            "supervised-mle-rician",
            "supervised-mle-gaussian",
            "hybrid-0.5",
            "supervised-mle-rician-f",
            "supervised-mle-rician-dslow",
            "supervised-mle-rician-dfast",
        ):
            assert f"ivim/snr{snr}/{name}" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_each_has_learnt_what_it_was_taught(name):
    """Its estimates follow the truth; of one that was taught a single parameter, that one."""
    found = qmri.load_estimator(name)
    assert found.name == name and found.names == MODEL.names
    assert f"snr{found.snr:g}" == name.split("/")[1]
    theta, signals = tissue_and_signals(found.snr)
    estimates = found.estimate(signals)
    assert np.all(estimates >= 0)
    for parameter in recipe(name.split("/")[2]).emphasis or MODEL.names:
        p = MODEL.names.index(parameter)
        # Unrelated pairs would have a correlation of 0 +- 0.02.
        assert np.corrcoef(theta[:, p], estimates[:, p])[0, 1] > 0.2


def test_replicates_are_networks_of_their_own():
    _, signals = tissue_and_signals(15, 100)
    count = Study("training-labels").settings["replicates"]
    found = [qmri.load_estimator(GOOD, replicate=k).estimate(signals) for k in range(count)]
    np.testing.assert_array_equal(found[0], qmri.load_estimator(GOOD).estimate(signals))
    for k in range(1, count):
        # Alike, for they learnt the same; not the same, for they began elsewhere.
        assert not np.any(found[k] == found[0])
        assert np.corrcoef(found[k][:, 2], found[0][:, 2])[0, 1] > 0.8


def test_the_right_acquisition_and_noise_pass():
    assert qmri.load_estimator(GOOD, bvalues=BVALUES, snr=15).snr == 15


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "ivim/snr20/supervised-gt"}, "SNR 20, but networks were trained for 15 and 30"),
        ({"name": "ivim/snr15/supervised"}, "'supervised', expected one of supervised-gt, self-"),
        ({"name": "supervised-gt"}, "name must be like 'ivim/snr15/.*got 'supervised-gt'"),
        ({"name": "epg/snr15/supervised-gt"}, "name must be like .*got 'epg/snr15/supervised-gt'"),
        ({"name": GOOD.upper()}, "name must be like"),
        ({"name": None}, "name must be like .*got None"),
        ({"bvalues": BVALUES[:-1]}, f"bvalues are .*{GOOD} was trained for .*800.0. s/mm2"),
        ({"bvalues": [0, *BVALUES[:-1]]}, f"bvalues are .*{GOOD} was trained for"),
        ({"snr": 30}, f"snr is 30, but {GOOD} was trained for SNR 15"),
        ({"replicate": 99}, "replicate must be from 0 to [0-9]+, got 99"),
        ({"replicate": -1}, "replicate must be from 0 to [0-9]+, got -1"),
        ({"replicate": 0.5}, "replicate must be from 0 to [0-9]+, got 0.5"),
    ],
)
def test_a_network_that_there_is_not(arguments, message):
    with pytest.raises(ValueError, match=message):
        qmri.load_estimator(**{"name": GOOD, **arguments})


class TestAllSNRsTogether:
    """A name without its SNR."""

    BANK = "ivim/supervised-mle-rician"

    def test_it_is_the_networks_of_each_snr(self):
        _, signals = tissue_and_signals(15, 200)
        bank = qmri.load_estimator(self.BANK, sigma=1 / 15, bvalues=BVALUES)
        assert bank.snrs == tuple(Study("training-labels").settings["snrs"])
        one = qmri.load_estimator(GOOD).estimate(signals)
        np.testing.assert_allclose(bank.estimate(signals, s0=np.ones(200)), one, rtol=1e-3)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({}, "sigma must be given for 'ivim/supervised-mle-rician'"),
            ({"sigma": 1.0, "snr": 15}, "snr is 15, but .* takes sigma"),
            ({"sigma": 1.0, "bvalues": BVALUES[:-1]}, "bvalues are .* was trained for"),
            ({"sigma": -1.0}, "sigma must be one positive, finite number, got -1.0"),
            ({"name": GOOD, "sigma": 1.0}, "sigma is 1.0, but .* takes snr"),
            ({"name": "mt/crb", "sigma": 1.0}, "sigma does not belong to fingerprints"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            qmri.load_estimator(**{"name": self.BANK, **arguments})


class TestForTheVolunteers:
    """Networks for the b-values of the abdominal data, over voxels of many SNRs."""

    SIGMA = 6.0  # scanner units

    @pytest.fixture
    def measured(self):
        try:
            settings = Study("training-labels-abdomen").settings
        except MissingArtefacts as error:
            pytest.skip(str(error))
        model, rng = IVIM(settings["bvalues"]), np.random.default_rng(0)
        theta = model.sample(20_000, rng)
        theta[:, 0] = self.SIGMA * np.exp(rng.uniform(np.log(4.0), np.log(38.0), len(theta)))
        return model, theta, Rician(self.SIGMA).sample(model.signal(theta), rng)

    def test_taught_the_truth_no_one_network_does_as_well_as_all(self, measured):
        """Each is best for the noise that it was trained with."""
        model, theta, signals = measured

        def loss(found) -> float:
            relative = (found - theta)[:, 1:] / model.training[1:].mean(axis=1)
            return float(np.mean(relative**2))

        bank = qmri.load_estimator("ivim-abdomen/supervised-gt", sigma=self.SIGMA)
        together = loss(bank.estimate(signals, s0=theta[:, 0]))
        for snr in bank.snrs:
            one = qmri.load_estimator(f"ivim-abdomen/snr{snr:g}/supervised-gt")
            assert together < loss(one.estimate(signals / theta[:, :1]))

    def test_taught_fits_they_are_nearer_to_them_than_fits_to_the_truth(self, measured):
        model, theta, signals = measured
        bank = qmri.load_estimator("ivim-abdomen/supervised-mle-rician", sigma=self.SIGMA)
        found = bank.estimate(signals)
        fits = fit_mle(model, Rician(self.SIGMA), signals).theta
        for p in (1, 2):
            away = np.median(np.abs(found[:, p] - fits[:, p]))
            assert away < np.median(np.abs(fits[:, p] - theta[:, p]))


class TestWithoutArtefacts:
    @pytest.fixture(autouse=True)
    def nothing(self, tmp_path, monkeypatch):
        monkeypatch.setenv("QMRI_ARTEFACTS", str(tmp_path))

    def test_no_network_is_listed(self):
        assert qmri.estimators() == ()

    @pytest.mark.parametrize(
        ("name", "protocol"), [(GOOD, "paper"), (GOOD.replace("ivim", "ivim-abdomen"), "abdomen")]
    )
    def test_the_message_is_a_command_that_makes_them(self, name, protocol):
        with pytest.raises(MissingArtefacts) as caught:
            qmri.load_estimator(name)
        command = re.search(r"`qmri ([^`]+)`", str(caught.value))[1]
        options = cli._parser().parse_args(shlex.split(command))
        assert (options.study, options.protocol) == ("training-labels", protocol)


@pytest.fixture(scope="module")
def part():
    return crb_loss.Results().fingerprints()


class TestFingerprints:
    NAMES = ("mt/crb", "mt/mse")

    @pytest.mark.parametrize("name", NAMES)
    def test_is_there_and_follows_the_truth(self, name, part):
        assert name in qmri.estimators()
        found = qmri.load_estimator(name)
        assert found.name == name and found.names == ("m0s", "T1", "T2f")
        rng = np.random.default_rng(0)
        noise = 0.005 * rng.standard_normal((*part.coefficients.shape, 2)).view(complex)[..., 0]
        estimates = found.estimate(part.coefficients * np.exp(0.7j) + noise)
        for p in range(3):
            assert np.corrcoef(part.targets[:, p], estimates[:, p])[0, 1] > 0.4

    def test_the_statistics_are_those_of_the_stored_network(self, part):
        """Its mean over new noise agrees with the study's."""
        study = crb_loss.Results()
        tested, found = study.test("crb"), qmri.load_estimator("mt/crb")
        rng = np.random.default_rng(1)
        some = part.coefficients[:20]
        phases = np.exp(2j * np.pi * rng.random((100, 1, 1)))
        noise = 0.01 * rng.standard_normal((100, *some.shape, 2)).view(complex)[..., 0]
        signals = 0.5 * phases * some + noise
        mean = found.estimate(signals.reshape(-1, 13)).reshape(100, 20, 3).mean(axis=0)
        repeats = study.study.settings["repeats"]
        error = tested["sd"][:20] * np.sqrt(1 / 100 + 1 / repeats)
        assert np.median(np.abs(mean - tested["mean"][:20]) / error) < 2

    def test_another_basis_is_refused(self):
        with pytest.raises(ValueError, match="was trained for 13 coefficients"):
            qmri.load_estimator("mt/crb", basis=np.eye(1142, 13))

    @pytest.mark.parametrize(
        ("name", "options", "message"),
        [
            ("mt/mae", {}, "name must be one of mt/crb, mt/mse, got 'mt/mae'"),
            ("mt/crb", {"snr": 15}, "snr does not belong to fingerprints"),
            ("mt/crb", {"bvalues": BVALUES}, "bvalues does not belong to fingerprints"),
            ("mt/crb", {"replicate": 1}, "replicate must be 0"),
            (GOOD, {"basis": np.eye(3)}, "basis belongs to fingerprints"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, name, options, message):
        with pytest.raises(ValueError, match=message):
            qmri.load_estimator(name, **options)
