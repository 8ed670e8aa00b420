"""The study in the abdomen: its statistics on made-up voxels, all of it in small, and in vivo."""

from __future__ import annotations

import numpy as np
import pytest

from qmri import IVIM, Rician, training
from qmri.artefacts import MissingArtefacts, read_manifest
from qmri.networks import NetworkBank, NetworkEstimator, Networks, mlp_widths
from qmri.noise import sigma_from_repeats
from qmri.sources import AbdominalScan, DataUnavailable, load_abdomen
from qmri.studies import abdomen, scorecard_abdomen
from qmri.studies.abdomen import (
    DESIGNS,
    ESTIMATORS,
    METRICS,
    ORGANS,
    PARAMETERS,
    SCALES,
    TIMES,
    Measured,
    Results,
    Scale,
    acquisitions,
    curve,
    run,
    typical_sigma,
)

B = np.array([0, 10, 25, 50, 100, 200, 300, 400, 500], dtype=float)
TINY = Scale(copies=2, maps=(2, 5), thinning=1, seeds=1, epochs=2)
TISSUE = {
    "liver": (30, 0.25, 1.0, 60),
    "spleen": (90, 0.15, 0.8, 40),
    "kidney": (150, 0.2, 1.8, 20),
}
SIGMA = 5.0


def scan(seed: int, phantom: bool = False) -> AbdominalScan:
    """A slice laid out as the public ones, of tissue that is known, with noise and nothing else."""
    rng = np.random.default_rng(seed)
    bvalues = np.concatenate([np.repeat(B, [24, *[6] * 8])] * 2)
    times = np.repeat(TIMES, 72)
    shape = (16, 20)
    theta = np.full((*shape, 4), [10.0, 0.1, 1.0, 20.0])
    regions = {name: np.zeros(shape, bool) for name in ORGANS}
    for row, (organ, tissue) in enumerate(TISSUE.items()):
        place = np.s_[5 * row : 5 * row + 4, 2:12]
        regions[organ][place] = True
        theta[place] = tissue * rng.uniform(0.7, 1.3, (4, 10, 4))
    regions["pancreas"][15, :3] = True  # too few voxels to be used
    if phantom:
        regions = {"bottle": np.ones(shape, bool)}
        theta[:] = [100 * SIGMA, 0.0, 2.2, 10.0]
    clean = IVIM(bvalues).signal(theta.reshape(-1, 4))
    images = Rician(SIGMA).sample(clean, rng).reshape(*shape, -1)
    return AbdominalScan(images, bvalues, times, np.ones(shape, bool), regions)


def stand_in(name: str, *, sigma: float, bvalues) -> NetworkBank:
    """Networks that have learnt nothing, for each SNR and recipe others."""
    model = IVIM(bvalues)
    members = []
    for snr in (5, 7, 10, 15, 22, 32):
        seed = 100 * abdomen.NETWORKS.index(name.split("/")[1]) + snr
        network = Networks(mlp_widths(model), [1, 0.3, 1.7, 80], [seed])
        members.append(NetworkEstimator(network, model, snr))
    return NetworkBank(members, sigma, name)


def here(volunteer: int) -> AbdominalScan:
    if volunteer not in (2, 3):
        raise DataUnavailable(f"volunteer {volunteer} is neither here nor within reach")
    return scan(volunteer)


def in_small(patched: pytest.MonkeyPatch) -> None:
    patched.setattr(abdomen, "SCALES", {**SCALES, "tiny": TINY})
    patched.setattr(abdomen, "load_abdomen", here)
    patched.setattr(abdomen, "load_phantom", lambda state: scan(9, phantom=True))
    patched.setattr(abdomen, "_networks", lambda: {"scale": "none", "sha256": "0"})
    patched.setattr(abdomen.pretrained, "load_estimator", stand_in)
    patched.setattr(training, "_cores", lambda: 1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patched:
        in_small(patched)
        return run("tiny", out=tmp_path_factory.mktemp("study") / "abdomen")


@pytest.fixture(scope="module")
def results(tiny) -> Results:
    return Results(location=tiny)


def made_up(people: int = 4, voxels: int = 4000, seed: int = 0, **changes) -> Measured:
    """References and estimates of known spread: truth N(0.3, 0.05), each reference + N(0, 0.05).

    One estimator is right but for independent noise of 0.02 in each of twelve acquisitions.
    """
    rng = np.random.default_rng(seed)
    count = people * voxels
    truth = np.tile([10.0, 0.3, 1.5, 70.0], (count, 1))
    truth[:, 1] += 0.05 * rng.standard_normal(count)
    reference = {}
    for name, noise in (("70", 0.05), ("100", 0.05)):
        reference[name] = truth.copy()
        reference[name][:, 1] += noise * rng.standard_normal(count)
    reference["all"] = (reference["70"] + reference["100"]) / 2
    single = truth[:, None, None, 1:] + 0.02 * rng.standard_normal((count, 2, 6, 3))
    fields = {
        "volunteer": np.repeat(np.arange(1, people + 1), voxels),
        "organ": np.zeros(count, np.uint8),
        "row": None,
        "column": None,
        "sigma": None,
        "snr": None,
        "truth": truth,
        "reference": reference,
        "usable": dict.fromkeys(reference, np.ones(count, bool)),
        "mean": {"mle-rician": single.mean(axis=2)},
        "sd": {"mle-rician": single.std(axis=2)},
        "outside": np.zeros((count, 12), bool),
    }
    return Measured(**{**fields, **changes})


def tilt(found) -> float:
    """Least-squares slope of a bias curve, bins counted by their voxels."""
    bins = found.count > 100
    return np.polyfit(found.centres[bins], found.bias[bins], 1, w=np.sqrt(found.count[bins]))[0]


class TestCurves:
    @pytest.mark.parametrize(
        ("design", "noise"), [("together", 0.05 / np.sqrt(2)), ("apart", 0.05)]
    )
    def test_a_right_estimator_seems_to_regress_to_the_mean(self, design, noise):
        """Of a noisy reference, the share noise^2 / (noise^2 + spread^2) is noise."""
        measured = made_up()
        expected = -(noise**2) / (noise**2 + 0.05**2)
        assert tilt(curve(measured, "mle-rician", "f", design)) == pytest.approx(expected, abs=0.04)
        assert tilt(curve(measured, "truth", "f")) == pytest.approx(-1 / 3, abs=0.04)
        assert tilt(curve(measured, "mle-rician", "f", against="truth")) == pytest.approx(
            0, abs=0.02
        )

    def test_half_against_half_shows_that_slope_without_any_truth(self):
        measured = made_up(truth=None)
        assert tilt(curve(measured, "split-half", "f")) == pytest.approx(-1 / 2, abs=0.04)

    def test_spread_is_that_of_single_acquisitions(self):
        found = curve(made_up(), "mle-rician", "f", against="truth")
        bins = found.count > 100
        np.testing.assert_allclose(found.sd[bins], 0.02 * np.sqrt(11 / 12), rtol=0.05)
        np.testing.assert_allclose(found.rmse[bins], 0.02, rtol=0.05)

    def test_squares_add_up_in_every_voxel(self):
        measured = made_up(voxels=50)
        for design in DESIGNS:
            errors = measured.errors("mle-rician", design)
            np.testing.assert_allclose(errors.rmse**2, errors.bias**2 + errors.sd**2)

    def test_apart_no_reference_meets_its_own_half(self):
        reference = {k: np.full((6, 4), v) for k, v in (("70", 0.2), ("100", 0.4), ("all", 0.3))}
        mean = np.stack([np.full((6, 3), 0.2), np.full((6, 3), 0.4)], axis=1)
        measured = made_up(
            people=1, voxels=6, reference=reference, mean={"mle-rician": mean},
            sd={"mle-rician": np.zeros_like(mean)},
        )  # fmt: skip
        apart = measured.errors("mle-rician", "apart")
        np.testing.assert_allclose(np.abs(apart.bias), 0.2)
        together = measured.errors("mle-rician", "together")
        np.testing.assert_allclose(together.bias, 0, atol=1e-12)
        np.testing.assert_allclose(together.sd, 0.1)

    def test_every_voxel_is_counted_once(self):
        measured = made_up(voxels=100)
        for design in DESIGNS:
            found = curve(measured, "mle-rician", "f", design)
            outside = np.mean([(r[:, 1] < 0) | (r[:, 1] > 0.5) for r in _judges(measured, design)])
            assert found.count.sum() == pytest.approx(400 * (1 - outside))
            assert found.volunteers.max() == 4

    def test_voxels_whose_reference_is_on_a_bound_are_left_out(self):
        usable = np.arange(400) % 2 == 0
        measured = made_up(voxels=100, usable=dict.fromkeys(("all", "70", "100"), usable))
        assert curve(measured, "mle-rician", "Dslow").count.sum() == 200
        assert curve(measured, "mle-rician", "Dslow", against="truth").count.sum() == 400

    def test_organs_make_up_the_whole(self):
        organ = np.arange(400) % len(ORGANS)
        measured = made_up(voxels=100, organ=organ)
        parts = [curve(measured, "mle-rician", "f", organ=name) for name in ORGANS]
        whole = curve(measured, "mle-rician", "f")
        np.testing.assert_allclose(np.sum([p.count for p in parts], axis=0), whole.count)

    def test_alike_volunteers_leave_no_doubt_and_different_ones_do(self):
        measured = made_up(people=1, voxels=400)
        arrays = {"volunteer": np.arange(400) % 4}
        alike = made_up(
            people=4, voxels=100, truth=measured.truth,
            reference={k: np.tile(v[:100], (4, 1)) for k, v in measured.reference.items()},
            mean={k: np.tile(v[:100], (4, 1, 1)) for k, v in measured.mean.items()},
            sd={k: np.tile(v[:100], (4, 1, 1)) for k, v in measured.sd.items()},
        )  # fmt: skip
        found = curve(alike, "mle-rician", "f")
        some = found.count > 0
        np.testing.assert_allclose(found.spread["bias"][0, some], found.bias[some])
        np.testing.assert_allclose(found.spread["bias"][1, some], found.bias[some])
        other = curve(made_up(voxels=100, **arrays), "mle-rician", "f")
        some = other.count > 20
        low, high = other.spread["bias"][:, some]
        assert np.all((low <= other.bias[some]) & (other.bias[some] <= high) & (low < high))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("mle", "f"), "estimator must be one of mle-rician, .*split-half, truth, got 'mle'"),
            (("mle-rician", "S0"), "parameter must be one of f, Dslow, Dfast, got 'S0'"),
            (("mle-rician", "f", "alone"), "design must be one of together, apart, got 'alone'"),
            (("truth", "f"), "truth is known of simulated tissue alone"),
        ],
    )
    def test_what_there_is_not(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            curve(made_up(voxels=10, truth=None), *arguments)
        with pytest.raises(ValueError, match="organ must be one of liver"):
            curve(made_up(voxels=10), "mle-rician", "f", organ="lung")


def _judges(measured: Measured, design: str) -> list[np.ndarray]:
    names = ("all",) if design == "together" else ("70", "100")
    return [measured.reference[name] for name in names]


class TestExplained:
    def test_all_nothing_and_worse_than_nothing(self):
        in_vivo, again, without_noise = (
            curve(made_up(seed=seed), "mle-rician", "f", against=against)
            for seed, against in ((0, "reference"), (1, "reference"), (1, "truth"))
        )
        explained = scorecard_abdomen.explained
        assert explained(in_vivo, without_noise, in_vivo) == 1
        assert explained(in_vivo, without_noise, without_noise) == 0
        assert explained(in_vivo, without_noise, again) > 0.9
        assert explained(in_vivo, again, without_noise) < -9


class TestScans:
    def test_each_image_serves_one_acquisition(self):
        found = scan(1)
        places = acquisitions(found)
        assert places.shape == (2, 6, 9) and len(np.unique(places)) == places.size
        for t, time in enumerate(TIMES):
            np.testing.assert_array_equal(found.bvalues[places[t]], np.tile(B, (6, 1)))
            assert np.all(found.diffusion_times[places[t]] == time)

    def test_sigma_of_pure_noise(self):
        """Of 40 voxels with 46 degrees of freedom each; a median has some 1.25 times the error."""
        found = scan(1)
        for organ in ("spleen", "kidney"):
            region = found.regions[organ]
            error = 1.25 / np.sqrt(2 * 46 * region.sum())
            assert typical_sigma(found, region) == pytest.approx(SIGMA, rel=4 * error)

    def test_a_moving_part_does_not_reach_the_typical_sigma(self):
        found = scan(1)
        region = found.regions["kidney"]
        still = typical_sigma(found, region)
        rng = np.random.default_rng(0)
        found.images[10:11, 2:12] *= 1 + 0.2 * rng.standard_normal((1, 1, 144))  # a quarter of it
        assert typical_sigma(found, region) == pytest.approx(still, rel=0.1)
        assert sigma_from_repeats(found.repeats(0)[region]) > 1.5 * still


class TestInSmall:
    def test_the_manifest_says_who_was_there(self, tiny):
        manifest = read_manifest(tiny)
        assert manifest.command == "qmri study abdomen --scale tiny"
        assert manifest.settings["volunteers"] == [2, 3]
        assert manifest.results["not available"] == [1, 4, 5, 6]
        assert manifest.settings["maps"] == [2]
        assert set(manifest.files) == {
            "in-vivo.npz", "consistency.npz", "matched.npz", "uniform.npz", "phantom.npz",
            "mistake.npz", "maps-2.npz",
        }  # fmt: skip

    def test_no_image_is_stored(self, results):
        """Nothing has an axis as long as a scan, or as an acquisition."""
        for file in results.study.manifest.files:
            if file != "consistency.npz":  # averages over organs, by b-value
                for name, values in results.arrays(file.removesuffix(".npz")).items():
                    assert not {9, 72, 144} & set(values.shape[1:]), name

    def test_voxels_are_those_of_regions_large_enough(self, results):
        found = results.measured("in-vivo")
        assert len(found.volunteer) == 2 * 3 * 40
        assert {ORGANS[k] for k in np.unique(found.organ)} == set(TISSUE)
        for name in ESTIMATORS:
            assert found.mean[name].shape == found.sd[name].shape == (240, 2, 3)
        np.testing.assert_allclose(found.sigma, SIGMA, rtol=0.1)

    def test_references_are_near_the_truth(self, results):
        """D of the kidney, whose SNR is 30, in units of 1 % of 1.8."""
        found = results.measured("in-vivo")
        kidney = found.in_organ("kidney") & found.usable["all"]
        assert np.median(found.reference["all"][kidney, 2]) == pytest.approx(1.8, rel=0.1)

    def test_where_only_noise_changes_all_ratios_are_one(self, results):
        found = results.arrays("consistency")
        there = found["voxels"] > 0
        assert there.sum() == 6
        # 40 voxels of 10 degrees of freedom or of 1.
        np.testing.assert_allclose(found["within"][there], 1, atol=4 * np.sqrt(2 / 400) + 0.05)
        np.testing.assert_allclose(found["between"][there], 1, atol=4 * np.sqrt(2 / 40))
        assert 0.3 < np.median(found["estimates"][there][:, :2]) < 2

    def test_matched_simulation_is_drawn_from_the_references(self, results):
        found, matched = results.measured("in-vivo"), results.measured("matched")
        drawn = np.tile(found.reference["all"][found.usable["all"]], (TINY.copies, 1))
        np.testing.assert_array_equal(matched.truth, drawn)
        uniform = results.measured("uniform")
        np.testing.assert_array_equal(uniform.truth[:, 0], drawn[:, 0])
        low, high = IVIM(B).training.T
        assert np.all((uniform.truth[:, 1:] >= low[1:]) & (uniform.truth[:, 1:] <= high[1:]))

    def test_matched_simulation_shows_what_the_stand_in_shows(self, results):
        """The stand-in is such a simulation itself: same spread of maximum likelihood."""
        pair = [
            curve(results.measured(name), "mle-rician", "Dslow") for name in ("in-vivo", "matched")
        ]
        bins = np.all([c.count > 25 for c in pair], axis=0)
        assert bins.any()
        np.testing.assert_allclose(pair[0].sd[bins], pair[1].sd[bins], rtol=0.2)

    def test_the_phantom_has_no_fast_part(self, results):
        found = results.arrays("phantom")
        # 144 images at SNR 100: the error of D is below 1 %.
        np.testing.assert_allclose(found["D"], 2.2, rtol=0.03)
        np.testing.assert_allclose(found["snr"], 100, rtol=0.1)
        measured, noisy = results.phantom("measured"), results.phantom("noise added")
        assert measured.outside.all() and not noisy.outside.any()
        # An estimate of f is never negative: the noisier, the larger its mean.
        f = {s: results.phantom(s).mean["mle-rician"][..., 0] for s in ("measured", "noise added")}
        assert f["noise added"].mean() > 1.5 * f["measured"].mean()

    def test_maps_lie_inside_the_body(self, results):
        maps = results.maps(2)
        for name in ("reference", *ESTIMATORS):
            assert maps[name].shape == (16, 20, 3) and np.isfinite(maps[name]).all()
        with pytest.raises(ValueError, match=r"volunteer must be one of 2, got 3"):
            results.maps(3)

    def test_networks_trained_on_volunteers_were_judged_on_both_times(self, results):
        found = results.mistake()
        assert found["rmse"].shape == (3, 2, 2, 1, 2, 3)
        assert np.isfinite(found["rmse"]).all() and np.all(found["rmse"] > 0)

    def test_every_claim_has_a_row(self, results):
        rows = scorecard_abdomen.part_a_in_vivo(results)
        assert [row.id for row in rows] == ["A12", "A13"]
        assert [row.compared for row in rows] == [2 * 3 * (3 + 2 * 3), 3 * 7 * 3]

    def test_finished_stages_are_read(self, tiny, monkeypatch):
        in_small(monkeypatch)
        before = read_manifest(tiny)
        monkeypatch.setattr(abdomen._Study, "_measure", None)
        assert read_manifest(run("tiny", out=tiny)).files == before.files

    def test_another_volunteer_does_not_join_what_is_finished(self, tiny, monkeypatch):
        in_small(monkeypatch)
        monkeypatch.setattr(abdomen, "load_abdomen", scan)
        with pytest.raises(ValueError, match=r"volunteers is \[2, 3\] there .*--fresh"):
            run("tiny", out=tiny)


class TestRefused:
    def test_a_scale_that_there_is_not(self, tmp_path):
        with pytest.raises(ValueError, match="scale must be one of quick, paper, got 'huge'"):
            run("huge", out=tmp_path / "out")

    def test_nobody_there(self, tmp_path, monkeypatch):
        in_small(monkeypatch)
        monkeypatch.setattr(abdomen, "load_abdomen", lambda volunteer: here(1))
        with pytest.raises(DataUnavailable, match="neither here nor within reach"):
            run("tiny", out=tmp_path / "out")
        assert list(tmp_path.iterdir()) == []

    def test_no_networks(self, tmp_path, monkeypatch):
        monkeypatch.setenv("QMRI_ARTEFACTS", str(tmp_path))
        monkeypatch.setattr(abdomen, "load_abdomen", here)
        with pytest.raises(
            MissingArtefacts, match="qmri study training-labels --scale quick --pro"
        ):
            run("quick", out=tmp_path / "out")

    def test_results_that_there_are_not(self, results):
        with pytest.raises(ValueError, match="name must be one of in-vivo, matched, uniform"):
            results.measured("in-vitro")
        with pytest.raises(ValueError, match="state must be one of measured, noise added"):
            results.phantom("flow")


class TestInVivo:
    """On the public data, where they can be had."""

    @pytest.mark.parametrize("volunteer", [1, 2, 3, 4])
    def test_a_scan_holds_twelve_acquisitions(self, volunteer):
        try:
            found = load_abdomen(volunteer)
        except DataUnavailable as error:
            pytest.skip(str(error))
        places = acquisitions(found)
        assert len(np.unique(places)) == 108
        for t, time in enumerate(TIMES):
            for repeat in range(6):
                expected = found.clinical(repeat, time).images
                np.testing.assert_array_equal(found.images[..., places[t, repeat]], expected)

    def test_noise_of_the_typical_voxel_is_at_most_that_of_all(self):
        try:
            found = load_abdomen(1)
        except DataUnavailable as error:
            pytest.skip(str(error))
        liver = found.regions["liver"]  # part of it moves
        assert typical_sigma(found, liver) < 0.8 * sigma_from_repeats(
            found.at(70).repeats(0)[liver]
        )


@pytest.fixture(scope="module")
def stored() -> Results:
    try:
        return Results()
    except MissingArtefacts as error:
        pytest.skip(str(error))


class TestOfTheBook:
    """What is committed in ``data/abdomen``."""

    def test_it_was_made_with_the_stored_networks(self, stored):
        assert stored.study.settings["networks"] == abdomen._networks()

    def test_claims_can_fail(self, stored):
        """Two estimators under each other's names."""
        other = {"supervised-gt": "mle-rician", "mle-rician": "supervised-gt"}

        class Swapped(scorecard_abdomen._InVivo):
            def _curve(self, name, estimator, *rest):
                return super()._curve(name, other.get(estimator, estimator), *rest)

        honest, swapped = scorecard_abdomen._InVivo(stored), Swapped(stored)
        assert swapped.a12().held < honest.a12().held

    def test_curves_are_there_for_every_estimator(self, stored):
        found = stored.measured("in-vivo")
        for parameter in PARAMETERS:
            for name in ESTIMATORS:
                values = curve(found, name, parameter)
                assert values.plentiful.sum() >= 5
                for metric in METRICS:
                    assert np.isfinite(getattr(values, metric)[values.plentiful]).all()
