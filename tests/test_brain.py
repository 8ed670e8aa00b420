"""The study of a brain slice: all of it on a stand-in, and what the book's run has left."""

from __future__ import annotations

import functools
import shutil

import numpy as np
import pytest

from qmri import pretrained
from qmri.artefacts import Stages, read_manifest
from qmri.mt import MTModel, PulseTrain, nlls
from qmri.mt.basis import fingerprint, svd_basis
from qmri.networks import FingerprintEstimator, compact_fingerprint_network
from qmri.sources import DataUnavailable, MTSlice, load_mt_basis, load_mt_slice
from qmri.studies import brain
from qmri.studies.brain import (
    BOUNDS,
    DEEP,
    NETWORKS,
    NOISES,
    SCALES,
    TARGETS,
    TUBES,
    Results,
    Scale,
    best_neighbour,
    fit_image,
    inside,
    local_noise,
    neighbours,
    phantom,
    run,
    suspicious,
    white_matter,
)

TINY = Scale(step=1, erosion=0, block=64, noises=3, refitted=8, tube=2)
FILES = {"networks.npz", "phantom.npz", "refits.npz", "residual.npz", "slice.npz"}
SHAPE = (9, 10)
VOXELS = 7 * 8
SIGMA = 1e-7  # of coefficients whose |M0| is 1e-3: what a short train needs
WHITE = np.array([0.17, 1.5, 0.07, 30.0, 12e-6, 50.0, 1.05])
GREY = np.array([0.09, 1.9, 0.085, 30.0, 12e-6, 50.0, 1.05])
PALLIDUM = np.array([0.13, 1.5, 0.055, 30.0, 12e-6, 50.0, 1.05])
PLACES = {
    "lentiform nucleus upper": ((0.5, 6.5), (0.5, 8.5), (2.5, 8.5), (2.5, 6.5)),
    "lentiform nucleus lower": ((5.5, 6.5), (5.5, 8.5), (7.5, 8.5), (7.5, 6.5)),
    "caudate nucleus upper": ((4.5, 4.5), (4.5, 5.5), (5.5, 5.5), (5.5, 4.5)),
    "caudate nucleus lower": ((3.5, 4.5), (3.5, 5.5), (4.5, 5.5), (4.5, 4.5)),
    "thalamus upper": ((2.5, 6.5), (2.5, 8.5), (3.5, 8.5), (3.5, 6.5)),
    "thalamus lower": ((4.5, 6.5), (4.5, 8.5), (5.5, 8.5), (5.5, 6.5)),
}


@functools.cache
def stand_in() -> tuple[PulseTrain, np.ndarray]:
    train = PulseTrain.default(400)
    signals = MTModel(train).signal(MTModel(train).sample(1000, np.random.default_rng(0)))
    return train, svd_basis(np.concatenate([signals, signals.conj()]), 13)[0]


@pytest.fixture(autouse=True, scope="module")
def small_dictionary():
    """Fewer tissues to begin from: these are easy to find."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(nlls, "_ATOMS", 1024)
        yield


@pytest.fixture(scope="module")
def model() -> MTModel:
    return MTModel(*stand_in())


def tissue() -> tuple[np.ndarray, np.ndarray]:
    """Tissue of a small slice, white matter on the left, and its mask: the rim is outside."""
    image = np.tile(GREY, (*SHAPE, 1))
    image[:, :5] = WHITE
    rows, columns = np.mgrid[: SHAPE[0], : SHAPE[1]]
    places = np.stack([rows.ravel(), columns.ravel()], axis=1)
    for name, corners in PLACES.items():
        if name.startswith("lentiform nucleus"):
            image[inside(corners, places).reshape(SHAPE)] = PALLIDUM
    image[..., 6] += 0.01 * columns  # B1 varies smoothly
    mask = np.zeros(SHAPE, dtype=bool)
    mask[1:-1, 1:-1] = True
    return image, mask


def measured(model: MTModel, sigma: float = SIGMA) -> MTSlice:
    image, mask = tissue()
    rng = np.random.default_rng(3)
    coefficients = np.zeros((*SHAPE, 13), dtype=complex)
    clean = 1e-3 * np.exp(0.5j) * model.signal(image[mask])
    noise = rng.standard_normal((2, *clean.shape))
    coefficients[mask] = clean + sigma * (noise[0] + 1j * noise[1])
    return MTSlice(coefficients, mask)


def in_small(patched: pytest.MonkeyPatch) -> None:
    """A short train, a small slice, and networks that have learnt nothing."""
    train, basis = stand_in()
    scan = measured(MTModel(train, basis))

    def untrained(name: str, basis: np.ndarray) -> FingerprintEstimator:
        seed = NETWORKS.index(name.removeprefix("mt/"))
        network = compact_fingerprint_network(13, width=32, seed=seed)
        return FingerprintEstimator(network, fingerprint(basis), name)

    patched.setattr(brain, "SCALES", {**SCALES, "tiny": TINY})
    patched.setattr(brain, "OUTLINES", PLACES)
    patched.setattr(PulseTrain, "published", lambda: train)
    patched.setattr(brain, "load_mt_basis", lambda rank: (basis, np.ones(13)))
    patched.setattr(brain, "load_mt_slice", lambda: scan)
    patched.setattr(pretrained, "load_estimator", untrained)


@pytest.fixture(scope="module")
def tiny(small_dictionary, tmp_path_factory):
    """Folder of a run from beginning to end."""
    with pytest.MonkeyPatch.context() as patched:
        in_small(patched)
        return run("tiny", out=tmp_path_factory.mktemp("study") / "uninterrupted")


@pytest.fixture(scope="module")
def results(tiny) -> Results:
    return Results(tiny)


class TestGeometry:
    def test_a_voxel_has_eight_neighbours_and_each_is_its_neighbours_neighbour(self):
        mask = np.random.default_rng(0).random((7, 9)) < 0.7
        around = neighbours(mask)
        places = np.argwhere(mask)
        for voxel, row in enumerate(around):
            found = row[row >= 0]
            away = np.abs(places[found] - places[voxel]).max(axis=1, initial=0)
            assert np.all(away <= 1) and voxel not in found
            near = np.abs(places - places[voxel]).max(axis=1) == 1
            assert set(found) == set(np.flatnonzero(near))
            assert all(voxel in around[other] for other in found)

    def test_a_polygon_holds_what_lies_within(self):
        corners = ((0.0, 0.0), (0.0, 4.0), (4.0, 0.0))
        places = [(1, 1), (3, 3), (0.5, 3), (-1, 1)]
        assert inside(corners, places).tolist() == [True, False, True, False]

    def test_white_matter_loses_its_rim_and_lone_voxels(self):
        theta = np.tile(GREY, (9 * 9, 1)).reshape(9, 9, 7)
        theta[1:7, 1:7] = WHITE
        theta[8, 8] = WHITE
        mask = np.ones((9, 9), dtype=bool)
        found = white_matter(theta.reshape(-1, 7), mask, 1).reshape(9, 9)
        assert found[2:6, 2:6].all() or found[3:5, 3:5].all()
        assert not found[8, 8] and not found[1].any() and not found[:, 7:].any()

    def test_noise_is_told_from_what_changes_slowly(self):
        """White noise on a ramp ten times as strong; 13 channels, of which 9 are left free."""
        rng = np.random.default_rng(1)
        mask = np.ones((40, 40), dtype=bool)
        mask[:3] = False
        rows, columns = np.argwhere(mask).T
        project = np.linalg.qr(rng.standard_normal((13, 13)))[0][:, :9]
        noise = rng.standard_normal((mask.sum(), 9)) + 1j * rng.standard_normal((mask.sum(), 9))
        ramp = 0.5 * (rows + 1j * columns)[:, np.newaxis] * np.ones(9)
        found = local_noise(3 * (noise + ramp) @ project.T, np.full(mask.sum(), 18), mask)
        assert np.abs(np.log(found / 3)).max() < 0.2
        assert np.mean(found) == pytest.approx(3, rel=0.01)

    def test_a_lone_voxel_has_the_noise_of_the_others(self):
        rng = np.random.default_rng(2)
        mask = np.zeros((20, 40), dtype=bool)
        mask[2:12, 2:12] = mask[16, 36] = True
        noise = rng.standard_normal((101, 13)) + 1j * rng.standard_normal((101, 13))
        found = local_noise(noise, np.full(101, 26), mask)
        assert found[-1] == np.median(found[:-1])

    def test_the_phantoms_tubes_lie_in_the_cylinder_and_apart(self, model):
        places, theta, tube = phantom(model, 50, np.random.default_rng(0))
        radius = np.hypot(*places.T)
        assert np.all(radius < brain.PHANTOM["radius"])
        centres = np.array([places[tube == k].mean(axis=0) for k in range(6)])
        distance = np.linalg.norm(places[:, np.newaxis] - centres, axis=2)
        assert np.array_equal(np.argmin(distance, axis=1), tube)
        low, high = model.training.T
        assert np.all((theta >= low) & (theta <= high))
        for name in ("B0", "B1"):
            column = theta[:, model.names.index(name)]
            within = np.mean([column[tube == k].std() for k in range(6)])
            assert 0 < within < column.std(), "smooth: less within a tube than between tubes"
        for k, values in enumerate(TUBES.values()):
            found = theta[tube == k][:, :3]
            np.testing.assert_allclose(found, np.tile([values[t] for t in TARGETS], (50, 1)))


class TestFits:
    def test_the_neighbour_with_the_same_tissue_explains_a_voxel_best(self, model):
        theta = np.array([WHITE, GREY, WHITE, PALLIDUM])
        signal = model.signal(theta)
        around = np.full((4, 8), -1)
        around[0, :3] = 1, 2, 3
        around[1, :2] = 0, 3
        best = best_neighbour(2e-3j * signal, signal, around)
        assert best[0] == 2
        assert best[2] == best[3] == -1, "these have no neighbours"

    def test_a_voxel_that_fits_worse_than_its_neighbours_is_suspicious(self, model):
        scan = measured(model)
        around = neighbours(scan.mask)
        voxels = scan.mask.sum()
        cost = np.ones(voxels)
        cost[40] = 4.0
        fit = brain.ImageFit(
            np.tile(GREY, (voxels, 1)), np.ones(voxels, dtype=complex), cost,
            np.ones(voxels, dtype=bool), np.zeros((voxels, 7), dtype=bool),
            np.ones(voxels, dtype=int), cost[np.newaxis],
        )  # fmt: skip
        assert np.flatnonzero(suspicious(fit, around)).tolist() == [40]
        fit.converged[7] = False
        fit.at_bound[9, 0] = True
        assert np.flatnonzero(suspicious(fit, around)).tolist() == [7, 9, 40]

    def test_the_tissue_comes_back_within_its_bound(self, model, tmp_path):
        image, mask = tissue()
        scan = measured(model)
        fit = fit_image(model, scan.coefficients[mask], mask, Stages(tmp_path / "w", {}), 64)
        assert fit.converged.all() and np.all(fit.agreeing >= 2)
        # 26 channels, less 6 of tissue and 2 of M0
        assert np.mean(fit.variance) == pytest.approx(SIGMA**2, rel=5 / np.sqrt(9 * VOXELS))
        study = object.__new__(brain._Study)
        study.model = model
        found = study._precision(image[mask], np.full(VOXELS, SIGMA / 1e-3))
        away = (fit.theta - image[mask])[:, :3] / found["sd"][:, :3]
        assert np.all(np.abs(np.mean(away**2, axis=0) - 1) < 5 * np.sqrt(2 / VOXELS))

    def test_what_a_neighbour_has_found_spreads(self, model, tmp_path, monkeypatch):
        """Some voxels end in a wrong place from the dictionary, and are put right from beside."""
        image, mask = tissue()
        scan = measured(model, 0.02 * SIGMA)
        honest = brain.fit_nlls

        def misled(model, coefficients, *, start=None, **options):
            fit = honest(model, coefficients, start=start, **options)
            if start is None and len(fit.cost) > 3:
                fit.theta[3:6] = PALLIDUM
                fit.cost[3:6] *= 50
            return fit

        monkeypatch.setattr(brain, "fit_nlls", misled)
        monkeypatch.setattr(brain, "suspicious", lambda fit, around: np.zeros(VOXELS, dtype=bool))
        fit = fit_image(model, scan.coefficients[mask], mask, Stages(tmp_path / "w", {}), 128)
        np.testing.assert_allclose(fit.theta[3:6, :3], image[mask][3:6, :3], rtol=0.05)
        assert np.all(fit.ends[0, 3:6] > 10 * fit.cost[3:6])
        assert np.all(fit.agreeing[3:6] < fit.passes[3:6])

    def test_another_t2s_moves_the_estimates_as_predicted(self, model):
        """Fingerprints of 12.3 us, fitted with 12 us."""
        truth = np.array([WHITE, GREY])
        truth[:, 4] = 12.3e-6
        fit = brain.fit_nlls(model, model.signal(truth), start=[WHITE, GREY], bounds=BOUNDS)
        study = object.__new__(brain._Study)
        study.model = model
        shift = study._precision(truth, np.ones(2))["shift"]
        np.testing.assert_allclose(
            fit.theta[:, :3] - truth[:, :3], -0.3 * shift, rtol=0.2, atol=2e-5
        )


class TestInSmall:
    def test_the_manifest_lists_every_file(self, tiny, check_listed):
        check_listed(tiny, FILES)

    def test_the_manifest_says_how_it_was_made(self, tiny):
        manifest = read_manifest(tiny)
        assert manifest.command == "qmri study brain --scale tiny"
        assert manifest.results["voxels"] == VOXELS
        assert manifest.results["seconds of NLLS"] > 0
        assert manifest.settings["bounds"]["T2s"] == [12e-6, 12e-6]

    def test_no_measured_signal_is_kept(self, results):
        """Maps and tables only: nothing that has a column for each coefficient and a row for
        each voxel."""
        for name in FILES:
            for key, values in results.study.arrays(name).items():
                assert 13 not in values.shape[1:] and 26 not in values.shape[1:], (name, key)

    def test_maps_lie_where_the_voxels_are(self, results):
        _, mask = tissue()
        image = results.image(results.estimate("nlls")[:, 0])
        assert image.shape == SHAPE
        assert np.array_equal(np.isfinite(image), mask)
        assert np.nanmedian(image[:, :5]) > np.nanmedian(image[:, 5:6])

    def test_regions_are_where_they_were_drawn(self, results):
        regions = results.regions
        assert set(regions) == {
            "tissue", "white matter", *DEEP, *(f"around {name}" for name in DEEP)
        }  # fmt: skip
        assert regions["lentiform nucleus"].sum() == 8
        columns = results.nlls["places"][:, 1]
        assert np.all(columns[regions["white matter"]] < 6)
        for name in DEEP:
            assert not np.any(regions[name] & regions["white matter"])
            assert not np.any(regions[f"around {name}"] & regions[name])

    def test_the_contrast_is_that_of_the_tissue(self, results):
        expected = (PALLIDUM - WHITE)[:3]
        error = results.contrast_error("lentiform nucleus")
        assert np.all(np.abs(results.contrast("nlls", "lentiform nucleus") - expected) < 5 * error)

    @pytest.mark.parametrize("noise", NOISES)
    @pytest.mark.parametrize("name", NETWORKS)
    def test_a_difference_is_the_sum_of_its_parts(self, results, name, noise):
        found = results.difference(name, noise)
        total = found["network"] + found["noise"] + found["residual"]
        np.testing.assert_allclose(total, found["whole"], rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(
            found["whole"], results.estimate(name) - results.estimate("nlls")
        )
        assert np.all(found["noise sd"] > 0)

    def test_agreement_is_that_of_textbooks(self, results):
        tissue = results.regions["tissue"]
        x, y = (results.estimate(n)[tissue][:, 1].astype(float) for n in ("nlls", "crb"))
        found = results.agreement("crb")
        assert found["correlation"][1] == pytest.approx(np.corrcoef(x, y)[0, 1], rel=1e-4)
        assert found["mean"][1] == pytest.approx(y.mean() - x.mean(), rel=1e-4)
        half = (found["high"] - found["low"])[1] / 2
        assert half == pytest.approx(1.96 * np.std(y - x, ddof=1), rel=1e-4)

    def test_white_residuals_have_nothing_in_common(self, results):
        residual = results.arrays("residual")
        assert abs(residual["common/white matter"]) < 0.2
        assert np.nanmax(np.abs(residual["correlation"][:, :4])) < 0.3
        ratio = np.median(results.nlls["noise"] / results.nlls["sigma"])
        assert ratio == pytest.approx(1, abs=0.15), "all of it is noise here"

    def test_voxels_are_outside_for_the_right_reason(self, results):
        outside = results.outside()
        assert not outside["m0s"].any() and not outside["SNR low"].any()
        assert outside["SNR high"].all(), "10,000, where training ends at 100"
        assert set(outside) == {"m0s", "T1", "T2f", "Rx", "B0", "B1", "SNR low", "SNR high"}

    def test_refits_scatter_as_the_bound_says(self, results):
        refits = results.arrays("refits")
        voxels = refits["voxels"]
        fit = results.nlls
        for level, sigma in (("residual", fit["sigma"]), ("local", fit["noise"])):
            away = refits[f"theta/{level}"] - fit["theta"][voxels]
            sd = fit["sd"][voxels] * (sigma / fit["sigma"])[voxels, np.newaxis]
            z = away[:, :3] / sd[:, :3]
            assert 0.3 < np.sqrt(np.mean(z**2)) < 2.5  # 24 numbers

    def test_a_free_t2s_does_not_fit_worse(self, results):
        refits = results.arrays("refits")
        assert np.all(refits["free/cost"] <= 1 + 1e-6)
        assert np.all(refits["free/theta"][:, 4] != 12e-6)

    def test_tubes_hold_their_tissue(self, results):
        for truth, fit, tube in zip(
            results.tubes("truth"), results.tubes("nlls"), TUBES.values(), strict=True
        ):
            assert truth.shape == fit.shape == (2, 3)
            np.testing.assert_allclose(truth[0], [tube[t] for t in TARGETS], rtol=1e-6)

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda r: r.estimate("mle"), "name must be one of nlls, crb, mse, got 'mle'"),
            (
                lambda r: r.difference("crb", "white"),
                "noise must be one of residual, local, got 'white'",
            ),
            (lambda r: r.tubes("mle"), "name must be one of truth, nlls, crb, mse"),
            (lambda r: r.image(np.zeros(3)), r"values must have shape \(56,\), got \(3,\)"),
        ],
    )
    def test_what_is_not_there_is_refused(self, results, call, message):
        with pytest.raises(ValueError, match=message):
            call(results)


class TestInterrupted:
    def test_the_results_are_the_same(self, tiny, tmp_path, monkeypatch):
        in_small(monkeypatch)

        def stop(*_):
            raise KeyboardInterrupt

        folder = tmp_path / "interrupted"
        with monkeypatch.context() as patched:
            patched.setattr(brain._Study, "_phantom", stop)
            with pytest.raises(KeyboardInterrupt):
                run("tiny", out=folder)
        assert not (folder / "manifest.json").exists()
        run("tiny", out=folder)
        assert read_manifest(tiny).files == read_manifest(folder).files

    def test_networks_trained_anew_do_not_cost_new_fits(self, tiny, tmp_path, monkeypatch):
        in_small(monkeypatch)
        before = Results(tiny)
        folder = tmp_path / tiny.name
        shutil.copytree(tiny.parent, tmp_path, dirs_exist_ok=True)

        def retrained(name: str, basis: np.ndarray) -> FingerprintEstimator:
            network = compact_fingerprint_network(13, width=32, seed=7)
            return FingerprintEstimator(network, fingerprint(basis), name)

        def forbidden(*_, **__):
            raise AssertionError("fitted again")

        monkeypatch.setattr(pretrained, "load_estimator", retrained)
        monkeypatch.setattr(brain, "fit_nlls", forbidden)
        run("tiny", out=folder)
        after = Results(folder)
        np.testing.assert_array_equal(before.estimate("nlls"), after.estimate("nlls"))
        assert np.all(before.estimate("crb") != after.estimate("crb"))


def test_an_unknown_scale_is_refused():
    with pytest.raises(ValueError, match="scale must be one of quick, paper, got 'huge'"):
        run("huge")


@pytest.fixture(scope="module")
def stored() -> Results:
    return Results()


class TestTheBooksRun:
    """What `data/` holds, of the code's own settings."""

    def test_files_are_those_of_the_code(self, stored):
        assert set(stored.study.manifest.files) == FILES

    def test_settings_are_those_of_the_code(self, stored):
        manifest = stored.study.manifest
        for name, value in vars(SCALES[manifest.scale]).items():
            assert manifest.settings[name] == value, name
        assert manifest.settings["bounds"] == {k: list(v) for k, v in BOUNDS.items()}

    def test_the_fits_have_ended(self, stored):
        assert stored.nlls["converged"].mean() > 0.95
        white = stored.regions["white matter"]
        assert stored.nlls["converged"][white].all()
        assert np.mean(stored.nlls["agreeing"][white] >= 2) > 0.9

    @pytest.mark.slow
    def test_the_slice_gives_the_stored_tissue(self, stored):
        """With the public data at hand: the stored tissue explains what was measured as well as
        the stored residual says, and no step away from it does better."""
        try:
            scan, train, basis = load_mt_slice(), PulseTrain.published(), load_mt_basis(13)[0]
        except DataUnavailable as error:
            pytest.skip(str(error))
        assert stored.study.settings["train"] == train.fingerprint
        fit = stored.nlls
        chosen = np.flatnonzero(stored.regions["white matter"])[::50][:32]
        coefficients = scan.coefficients[tuple(fit["places"][chosen].T.astype(int))]
        model = MTModel(train, basis)
        again = brain.fit_nlls(
            model, coefficients, start=np.clip(fit["theta"][chosen].astype(float),
            *np.array([BOUNDS.get(p.name, p.bounds) for p in model.parameters]).T), bounds=BOUNDS,
        )  # fmt: skip
        sigma = np.sqrt(again.cost / 18)
        np.testing.assert_allclose(fit["sigma"][chosen], sigma, rtol=1e-3)
        np.testing.assert_allclose(fit["theta"][chosen, :3], again.theta[:, :3], rtol=0.01)
