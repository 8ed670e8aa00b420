"""From files to files: `qmri estimate` as a user runs it, and its twin for notebooks."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
from matplotlib import image as pictures

import qmri
from qmri import IVIM, Gaussian, Rician, cli, estimate_files, files, fit_mle, load_estimator
from qmri.artefacts import MissingArtefacts
from qmri.networks import NetworkBank
from qmri.volumes import estimate_maps

SIGMA = 10.0
AFFINE = np.diag([-2.0, 2.0, 4.0, 1.0])
BVALUES = np.array([0, 0, 0, 0, 10, 25, 50, 100, 200, 300, 400, 500], dtype=float)
PAPER = np.array([0, 10, 20, 30, 50, 80, 100, 200, 400, 800], dtype=float)
NETWORK = "ivim/snr15/supervised-mle-rician"
SHAPE = (16, 14, 3)


def simulate(bvalues, snr, sigma=SIGMA, seed=3):
    """Magnitudes of two tissues beside each other, in air: images, tissue, and where it is."""
    rng = np.random.default_rng(seed)
    model = IVIM(bvalues)
    tissue = np.zeros(SHAPE, bool)
    tissue[2:-2, 2:-2] = True
    theta = np.zeros((*SHAPE, 4))
    theta[...] = [0, 0.15, 2.0, 40]
    theta[SHAPE[0] // 2 :] = [0, 0.35, 1.0, 40]
    theta[..., 0] = np.where(tissue, snr * sigma, 0)
    noisy = Rician(sigma).sample(model.signal(theta.reshape(-1, 4)), rng)
    return noisy.reshape(*SHAPE, -1), theta, tissue


class Scan:
    """Files of one scan in a folder, and the command that estimates its maps."""

    def __init__(self, folder: Path, bvalues=BVALUES, snr=20.0, sigma=SIGMA):
        self.folder, self.bvalues = folder, bvalues
        self.images, self.theta, self.tissue = simulate(bvalues, snr, sigma)
        self.write(self.images, bvalues)
        self.write_mask(self.tissue)

    def write(self, images, bvalues, affine=AFFINE):
        image = nibabel.Nifti1Image(np.asarray(images, np.float32), affine)
        nibabel.save(image, self.folder / "dwi.nii.gz")
        (self.folder / "dwi.bval").write_text(" ".join(f"{b:g}" for b in bvalues) + "\n")

    def write_mask(self, mask, affine=AFFINE):
        image = nibabel.Nifti1Image(np.asarray(mask, np.uint8), affine)
        nibabel.save(image, self.folder / "mask.nii.gz")

    def estimate(self, *options, mask=True):
        """Exit status of the command."""
        files = [self.folder / "dwi.nii.gz", "--bvals", self.folder / "dwi.bval"]
        if mask:
            files += ["--mask", self.folder / "mask.nii.gz"]
        out = [] if "--out" in options else ["--out", self.out]
        return cli.main([str(word) for word in ["estimate", *files, *out, *options]])

    def in_notebook(self, mask=True, **options):
        paths = [self.folder / name for name in ("dwi.nii.gz", "dwi.bval", "maps", "mask.nii.gz")]
        return estimate_files(*paths[: 4 if mask else 3], **options)

    @property
    def out(self):
        return self.folder / "maps"

    def read(self, name):
        return nibabel.load(self.out / f"{name}.nii.gz").get_fdata()

    @property
    def report(self):
        return json.loads((self.out / "maps.json").read_text(encoding="utf-8"))


@pytest.fixture
def scan(tmp_path):
    return Scan(tmp_path)


@pytest.fixture
def paper_scan(tmp_path):
    """The acquisition that the first paper's networks were trained for."""
    return Scan(tmp_path, PAPER, snr=15.0)


# What comes out.


def test_maps_show_the_tissue(scan, capsys):
    assert scan.estimate() == 0
    left = scan.tissue & (np.arange(SHAPE[0]) < SHAPE[0] // 2)[:, np.newaxis, np.newaxis]
    # 180 voxels a side; at SNR 20 one f has an SD below 0.1, one Dslow below 0.3 um2/ms.
    for side, f, dslow in ((left, 0.15, 2.0), (scan.tissue & ~left, 0.35, 1.0)):
        assert np.median(scan.read("f")[side]) == pytest.approx(f, abs=0.03)
        assert np.median(scan.read("Dslow")[side]) == pytest.approx(dslow, abs=0.1)
        assert np.median(scan.read("S0")[side]) == pytest.approx(20 * SIGMA, rel=0.02)
    for name in ("S0", "f", "Dslow", "Dfast"):
        np.testing.assert_array_equal(np.isfinite(scan.read(name)), scan.tissue)
    shown = capsys.readouterr()
    names = ["S0.nii.gz", "f.nii.gz", "Dslow.nii.gz", "Dfast.nii.gz", "quick-look.png", "maps.json"]
    assert shown.out.splitlines() == [str(scan.out / name) for name in names]
    assert sorted(path.name for path in scan.out.iterdir()) == sorted(names)
    assert "sigma: " in shown.err
    assert f"{scan.tissue.sum()}/{scan.tissue.sum()}" in shown.err  # of the progress bar


def test_sidecar_says_how_the_maps_were_made(scan):
    assert scan.estimate() == 0
    report = scan.report
    assert report["qmri_version"] == qmri.__version__
    assert report["model"] == "ivim"
    assert report["estimator"] == "mle"
    assert report["noise"] == "rician"
    assert report["sigma"] == pytest.approx(SIGMA, rel=0.1)
    assert report["sigma_from"] == "4 images at b = 0, median of 360 voxels"
    assert report["median_snr"] == pytest.approx(20, rel=0.1)
    assert report["bvalues"] == BVALUES.tolist()
    assert report["inputs"] == {"image": "dwi.nii.gz", "bvals": "dwi.bval", "mask": "mask.nii.gz"}
    assert report["voxels_in_mask"] == scan.tissue.sum()
    assert report["invalid_voxels"] == 0
    units = {entry["name"]: entry["unit"] for entry in report["parameters"]}
    assert units == {"S0": "a.u.", "f": "1", "Dslow": "um2/ms", "Dfast": "um2/ms"}
    text = (scan.out / "maps.json").read_text(encoding="utf-8")
    assert str(scan.folder) not in text
    assert "[0.0, 0.0, 0.0, 0.0, 10.0, " in text


def test_shares_on_bounds_are_those_of_the_maps(tmp_path):
    scan = Scan(tmp_path, snr=5.0)  # where many end there
    assert scan.estimate() == 0
    for entry in scan.report["parameters"]:
        values, (low, high) = scan.read(entry["name"])[scan.tissue], entry["bounds"]
        assert entry["share_at_lower_bound"] == pytest.approx(np.mean(np.isclose(values, low)))
        assert entry["share_at_upper_bound"] == pytest.approx(np.mean(np.isclose(values, high)))
    assert scan.report["parameters"][1]["share_at_upper_bound"] > 0.02
    signals = scan.images[scan.tissue].astype(np.float32)
    bounds = {"S0": tuple(scan.report["parameters"][0]["bounds"])}
    fit = fit_mle(IVIM(BVALUES), Rician(scan.report["sigma"]), signals, bounds=bounds)
    assert scan.report["share_not_converged"] == pytest.approx(1 - fit.converged.mean())


def test_a_notebook_gets_the_same(scan):
    scan.estimate()
    written = {name: scan.read(name) for name in ("S0", "f", "Dslow", "Dfast")}
    report = scan.report
    found = scan.in_notebook()
    assert found.report == report == scan.report
    assert [path.name for path in found.files] == [*report["files"], "maps.json"]
    assert tuple(found.maps) == tuple(written)
    for name, stored in written.items():
        np.testing.assert_array_equal(found.maps[name].astype(np.float32), stored)


def test_a_notebook_shows_no_bar_unless_asked(scan, capsys):
    scan.in_notebook()
    assert capsys.readouterr() == ("", "")


def test_noise_model_matters_where_the_floor_is(tmp_path):
    """Least squares takes the floor for slow diffusion; the Rician likelihood knows it."""
    scan = Scan(tmp_path, np.r_[0, 0, BVALUES, 700, 900], snr=8.0)
    fast = scan.tissue & (scan.theta[..., 2] == 2.0)
    dslow = {}
    for noise in ("rician", "gaussian"):
        assert scan.estimate("--noise", noise, "--sigma", str(SIGMA)) == 0
        assert scan.report["noise"] == noise
        dslow[noise] = np.median(scan.read("Dslow")[fast])
    assert dslow["gaussian"] < dslow["rician"] - 0.2


@pytest.mark.parametrize("unit", [1e-5, 1e4])
def test_the_unit_of_the_images_does_not_matter(scan, unit):
    """Scanners write any unit: S0 has no bound of its own."""
    plain = scan.in_notebook()
    scan.write(scan.images * unit, BVALUES)
    scaled = scan.in_notebook()
    assert scaled.report["sigma"] == pytest.approx(unit * plain.report["sigma"], rel=1e-4)
    difference = np.abs(scaled.maps["f"] - plain.maps["f"])[scan.tissue]
    assert np.quantile(difference, 0.95) < 1e-3
    ratio = scaled.maps["S0"][scan.tissue] / plain.maps["S0"][scan.tissue]
    assert np.median(ratio) == pytest.approx(unit, rel=1e-4)


def test_picture_shows_the_image_and_each_map(scan):
    found = scan.in_notebook()
    picture = pictures.imread(scan.out / "quick-look.png")
    assert found.files[-2].name == found.report["quick_look"] == "quick-look.png"
    assert picture.shape[1] > 1000
    assert len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 100


@pytest.mark.parametrize("flips", [(1, 1, 1), (-1, 1, 1), (1, -1, -1), (-1, -1, 1)])
@pytest.mark.parametrize("swap", [False, True])
def test_picture_has_the_front_up_and_the_right_at_the_left(flips, swap):
    volume, affine = np.zeros((4, 5, 3)), np.diag([2.0, 3.0, 5.0, 1.0])
    volume[-1, -1, -1] = 1  # right, front, head
    for axis, flip in enumerate(flips):
        if flip < 0:
            volume = np.flip(volume, axis)
            affine[:, axis] *= -1
    if swap:
        volume, affine = volume.swapaxes(0, 1), affine[:, [1, 0, 2, 3]]
    upright, aspect = files._upright(volume, affine)
    assert upright.shape == (5, 4, 3)
    assert upright[0, 0, -1] == 1
    assert aspect == 1.5


# Noise.


def test_sigma_from_repeats_ignores_air_and_pulsation(tmp_path):
    """Air has less spread than sigma, blood more; neither is what the tissue's noise is."""
    scan = Scan(tmp_path)
    pulsating = scan.tissue.copy()
    pulsating[:, 4:] = False  # a fifth of the tissue
    rng = np.random.default_rng(5)
    beat = rng.normal(0, 10 * SIGMA, (*SHAPE, len(BVALUES)))
    scan.write(np.abs(scan.images + beat * pulsating[..., np.newaxis]), BVALUES)
    for mask in (True, False):
        found = scan.in_notebook(mask=mask).report
        # Half of 360 variances with 3 degrees of freedom give it to 4 %; the fifth that
        # pulsates shifts the median by some 15 %. A mean would be 4.6 times too large.
        assert SIGMA * 0.9 < found["sigma"] < SIGMA * 1.35


def test_sigma_from_residuals_if_there_is_one_image_at_b0(tmp_path):
    scan = Scan(tmp_path, BVALUES[3:], snr=30.0)
    found = scan.in_notebook().report
    assert found["sigma_from"].startswith("residuals of a Gaussian fit, median of")
    # 360 variances with 5 degrees of freedom: 4 %, and bounds take up less than a parameter.
    assert found["sigma"] == pytest.approx(SIGMA, rel=0.15)
    signals = scan.images[scan.tissue].astype(np.float32)
    bounds = {"S0": (0.0, 1e5)}
    fitted = fit_mle(IVIM(scan.bvalues), Gaussian(SIGMA), signals, bounds=bounds).theta
    residuals = signals - IVIM(scan.bvalues).signal(fitted)
    spread = np.sum(residuals**2, axis=1) / (len(scan.bvalues) - 4)
    assert found["sigma"] == pytest.approx(np.sqrt(np.median(spread) / 0.8703), rel=1e-2)


def test_sigma_may_be_given(scan):
    assert scan.estimate("--sigma", "7.5") == 0
    assert scan.report["sigma"] == 7.5
    assert scan.report["sigma_from"] == "given"


def test_without_a_mask_voxels_with_signal_are_estimated(scan):
    assert scan.estimate(mask=False) == 0
    np.testing.assert_array_equal(np.isfinite(scan.read("f")), scan.tissue)
    assert scan.report["mask_rule"] == "mean at b = 0 above 3 sigma"
    assert scan.report["inputs"]["mask"] is None


def test_voxels_that_are_no_numbers_are_counted(scan, capsys):
    images = scan.images.copy()
    images[5, 5, 1, 3], images[6, 6, 1, 0] = np.nan, np.inf
    images[0, 0, 0, 7] = np.nan  # outside the mask
    scan.write(images, BVALUES)
    assert scan.estimate() == 0
    assert scan.report["invalid_voxels"] == 2
    assert scan.report["invalid_share"] == pytest.approx(2 / scan.tissue.sum())
    assert np.isnan(scan.read("f")[[5, 6], [5, 6], [1, 1]]).all()
    assert np.isfinite(scan.read("f")).sum() == scan.tissue.sum() - 2
    assert "left out: 2 voxels" in capsys.readouterr().err


# Networks.


def test_network_of_one_snr_gets_signals_of_amplitude_one(paper_scan):
    assert paper_scan.estimate("--estimator", NETWORK) == 0
    signals = paper_scan.images[paper_scan.tissue].astype(np.float32).astype(float)
    expected = load_estimator(NETWORK).estimate(signals / signals[:, :1])
    expected[:, 0] *= signals[:, 0]
    for column, name in enumerate(("S0", "f", "Dslow", "Dfast")):
        found = paper_scan.read(name)[paper_scan.tissue]
        np.testing.assert_allclose(found, expected[:, column], rtol=1e-4)
    report = paper_scan.report
    assert report["estimator"] == NETWORK
    assert report["images_averaged"] == 1
    assert [entry["unit"] for entry in report["parameters"]] == ["a.u.", "1", "um2/ms", "um2/ms"]
    outside = np.mean((expected[:, 1] < 0.1) | (expected[:, 1] > 0.5))
    assert report["parameters"][1]["share_outside_training"] == pytest.approx(outside)


def test_network_of_many_snrs_gets_signals_as_they_are(tmp_path):
    scan, name = Scan(tmp_path, PAPER, snr=20.0), "ivim/supervised-gt"
    assert scan.estimate("--estimator", name, "--sigma", str(SIGMA)) == 0
    alone = [load_estimator(f"ivim/snr{snr}/supervised-gt") for snr in (15, 30)]
    signals = scan.images[scan.tissue].astype(np.float32)
    expected = NetworkBank(alone, SIGMA).estimate(signals)
    np.testing.assert_allclose(scan.read("f")[scan.tissue], expected[:, 1], rtol=1e-5)
    low, high = scan.report["trained_for_snr"]
    outside = np.mean((signals[:, 0] < low * SIGMA) | (signals[:, 0] > high * SIGMA))
    assert scan.report["share_outside_trained_snr"] == pytest.approx(outside)


def test_order_of_the_images_does_not_matter_to_a_network(paper_scan):
    plain = paper_scan.in_notebook(estimator=NETWORK, sigma=SIGMA)
    order = np.random.default_rng(1).permutation(len(PAPER))
    paper_scan.write(paper_scan.images[..., order], PAPER[order])
    mixed = paper_scan.in_notebook(estimator=NETWORK, sigma=SIGMA)
    np.testing.assert_array_equal(mixed.maps["Dslow"], plain.maps["Dslow"])
    assert mixed.report["bvalues"] == PAPER[order].tolist()


def test_as_many_images_of_each_bvalue_are_averaged(tmp_path):
    """Three images of SNR 17.3 make one of SNR 30."""
    scan = Scan(tmp_path, np.tile(PAPER, 3), snr=30 / np.sqrt(3))
    name = "ivim/snr30/supervised-gt"
    found = scan.in_notebook(estimator=name)
    assert found.report["images_averaged"] == 3
    assert found.report["sigma"] == pytest.approx(SIGMA, rel=0.1)  # of one image
    averages = scan.images.astype(np.float32).reshape(*SHAPE, 3, len(PAPER)).mean(axis=-2)
    signals = averages[scan.tissue].astype(float)
    expected = load_estimator(name).estimate(signals / signals[:, :1])[:, 1]
    np.testing.assert_allclose(found.maps["f"][scan.tissue], expected, rtol=1e-3)
    assert 0 < found.report["share_near_noise_floor"] <= 0.5


def test_averages_at_the_noise_floor_are_refused(tmp_path, capsys):
    """Twelve images of SNR 4.3 have the SNR of 15, but not its floor."""
    scan = Scan(tmp_path, np.tile(PAPER, 12), snr=15 / np.sqrt(12))
    assert scan.estimate("--estimator", NETWORK) == 2
    assert "would not lower the noise floor" in capsys.readouterr().err
    assert not scan.out.exists()


def test_uneven_repeats_are_refused(tmp_path, capsys):
    scan = Scan(tmp_path, np.r_[0, 0, PAPER], snr=15.0)
    assert scan.estimate("--estimator", NETWORK) == 2
    shown = capsys.readouterr().err
    assert "3 at b = 0 and 1 at b = 10" in shown
    assert "'mle'" in shown


def test_stored_networks_are_listed(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["estimate", "--list"])
    assert stop.value.code == 0
    names = capsys.readouterr().out.split()
    assert names == list(files.network_names())
    assert {NETWORK, "ivim/supervised-mle-rician"} <= set(names)
    assert not any(name.startswith("mt/") for name in names)


def test_network_that_was_not_trained_yet_names_the_study(scan, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("QMRI_ARTEFACTS", str(tmp_path / "none"))
    assert scan.estimate("--estimator", NETWORK) == 2
    assert "qmri study training-labels" in capsys.readouterr().err
    with pytest.raises(MissingArtefacts):
        scan.in_notebook(estimator=NETWORK)


# What is refused, in one line that names it.


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0 0 0 0 10 25 50 100 200 300 400", "holds 11 b-values, expected 12, one per volume"),
        ("5 5 5 5 10 25 50 100 200 300 400 500", "at least one b = 0, the smallest is 5"),
        ("0 0 0 0 1e7 25e6 5e7 1e8 2e8 3e8 4e8 5e8", "looks like s/m2, divide by 1,000,000"),
        ("0 0 0 0 .01 .025 .05 .1 .2 .3 .4 .5", "looks like ms/um2, multiply by 1000"),
        ("0 0 0 0 -10 25 50 100 200 300 400 500", "must not be negative, got -10"),
        ("0 0 0 0 0 0 0 100 100 100 500 500", "3 different b-values, expected 4 or more"),
    ],
)
def test_bvalues_that_cannot_be_right(scan, capsys, text, message):
    (scan.folder / "dwi.bval").write_text(text)
    refuses(scan, capsys, message, "dwi.bval")


def refuses(scan, capsys, *messages, options=()):
    assert scan.estimate(*options) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines()[-1].startswith("qmri: error: ")
    for message in messages:
        assert message in shown.err.splitlines()[-1]
    assert not scan.out.exists()


def test_single_volume(scan, capsys):
    scan.write(scan.images[..., 0], BVALUES)
    refuses(scan, capsys, "image: ", "expected 4-D")


def test_mask_of_another_shape(scan, capsys):
    scan.write_mask(scan.tissue[1:])
    refuses(scan, capsys, "mask: ", "has shape (15, 14, 3), expected (16, 14, 3)")


def test_mask_elsewhere(scan, capsys):
    scan.write_mask(scan.tissue, np.diag([2.0, 2.0, 4.0, 1.0]))
    refuses(scan, capsys, "mask: ", "lies elsewhere in space")


def test_empty_mask(scan, capsys):
    scan.write_mask(np.zeros(SHAPE))
    refuses(scan, capsys, "mask: ", "has no voxel above 0.5")


def test_no_finite_voxel(scan, capsys):
    scan.write(np.full_like(scan.images, np.nan), BVALUES)
    refuses(scan, capsys, "image: none of 360 voxels holds finite numbers")
    refuses(scan, capsys, "image: none of the 360 voxels", options=["--sigma", "10"])


def test_truncated_file(scan, capsys):
    path = scan.folder / "dwi.nii.gz"
    path.write_bytes(path.read_bytes()[:5000])
    refuses(scan, capsys, "image: ", "cut short")


def test_negative_magnitudes(scan, capsys):
    """No magnitude is negative; least squares alone can take one."""
    scan.write(scan.images - 1000, BVALUES)
    refuses(scan, capsys, "sigma must be given")
    refuses(scan, capsys, "the median signal", "expected magnitudes", options=["--sigma", "10"])
    scan.images[..., -1] = -1
    scan.write(scan.images, BVALUES)
    refuses(scan, capsys, "none of 360 voxels", "negative numbers are impossible")
    scan.images[:7, ..., -1] = 1
    scan.write(scan.images, BVALUES)
    assert scan.estimate() == 0
    assert scan.report["share_not_estimated"] == pytest.approx(7 / 12)
    assert scan.estimate("--noise", "gaussian") == 0
    assert scan.report["share_not_estimated"] == 0


def test_images_without_noise(scan, capsys):
    scan.write(IVIM(BVALUES).signal(scan.theta.reshape(-1, 4)).reshape(scan.images.shape), BVALUES)
    refuses(scan, capsys, "sigma must be given", "no noise at all")


def test_images_of_air(scan, capsys):
    bvalues = np.r_[np.zeros(20), BVALUES]
    air = np.zeros((*SHAPE, len(bvalues)))
    scan.write(Rician(SIGMA).sample(air, np.random.default_rng(1)), bvalues)
    refuses(scan, capsys, "sigma must be given", "above 3 times")


def test_too_few_images_to_tell_the_noise(scan, capsys):
    scan.write(scan.images[..., [3, 6, 8, 11]], BVALUES[[3, 6, 8, 11]])
    refuses(scan, capsys, "sigma must be given: one image at b = 0 and 4 images")
    assert scan.estimate("--sigma", "10") == 0


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        (["--estimator", "nlls"], ["must be 'mle' or the name of a network trained for ivim"]),
        (["--estimator", "mt/crb"], ["must be 'mle' or the name of a network trained for ivim"]),
        (["--estimator", "ivim/snr15/supervised"], ["'supervised'", "supervised-gt"]),
        (["--estimator", "ivim/snr20/supervised-gt"], ["SNR 20", "15 and 30"]),
        (["--estimator", NETWORK, "--noise", "gaussian"], ["has learnt Rician noise"]),
    ],
)
def test_estimators_that_are_not_there(scan, capsys, options, messages):
    refuses(scan, capsys, "'" if "--noise" in options else options[1], *messages, options=options)


def test_network_for_another_protocol(tmp_path, capsys):
    scan = Scan(tmp_path, BVALUES[3:], snr=15.0)
    for name in (NETWORK, "ivim/supervised-gt"):
        refuses(
            scan, capsys, "bvalues are [0.0, 10.0, 25.0", "was trained for [0.0, 10.0, 20.0, 30.0",
            options=["--estimator", name],
        )  # fmt: skip


def test_network_for_another_snr(tmp_path, capsys):
    scan = Scan(tmp_path, PAPER, snr=60.0)
    refuses(scan, capsys, "trained for SNR 15", options=["--estimator", NETWORK])
    refuses(scan, capsys, "trained for 12 to 36", options=["--estimator", "ivim/supervised-gt"])


def test_out_that_is_a_file(scan, capsys):
    scan.out.write_text("precious")
    assert scan.estimate() == 2
    assert f"out: {scan.out} is a file, expected a folder" in capsys.readouterr().err
    assert scan.out.read_text() == "precious"


def test_maps_never_replace_what_they_are_made_of(scan, capsys):
    taken = scan.folder / "f.nii.gz"
    (scan.folder / "mask.nii.gz").rename(taken)
    before = taken.read_bytes()
    words = ["estimate", scan.folder / "dwi.nii.gz", "--bvals", scan.folder / "dwi.bval"]
    words += ["--mask", taken, "--out", scan.folder]
    assert cli.main([str(word) for word in words]) == 2
    assert "would replace the input" in capsys.readouterr().err
    assert taken.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "dti"], "invalid choice: 'dti'"),
        (["--noise", "poisson"], "invalid choice: 'poisson'"),
        (["--sigma", "-1"], "expected a positive number"),
        (["--sigma", "nan"], "expected a positive number"),
        (["--sigma", "much"], "'much' is no noise level"),
    ],
)
def test_wrong_usage(scan, capsys, options, message):
    with pytest.raises(SystemExit) as stop:
        scan.estimate(*options)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "dti"}, "model must be one of ivim, got 'dti'"),
        ({"noise": "poisson"}, "noise must be one of rician, gaussian, got 'poisson'"),
        ({"sigma": 0.0}, "sigma must be a positive number, got 0.0"),
        ({"sigma": [1.0, 2.0]}, "sigma must be a positive number"),
    ],
)
def test_wrong_usage_in_a_notebook(scan, options, message):
    with pytest.raises(ValueError, match=message):
        scan.in_notebook(**options)


# Interrupted, and again.


def test_interrupted_run_writes_nothing_and_keeps_earlier_maps(scan, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files, "fit_mle", interrupt)
        assert scan.estimate() == 130
        shown = capsys.readouterr().err.splitlines()
        assert shown[-1] == "interrupted: run the same command again to start anew"
        assert not scan.out.exists()
    assert scan.estimate() == 0
    before = {path.name: path.read_bytes() for path in scan.out.iterdir()}
    monkeypatch.setattr(files, "fit_mle", interrupt)
    assert scan.estimate("--noise", "gaussian") == 130
    assert {path.name: path.read_bytes() for path in scan.out.iterdir()} == before


def test_second_run_replaces_the_first_and_nothing_else(scan):
    scan.estimate()
    first = scan.read("Dslow")
    (scan.out / "notes.txt").write_text("mine")
    before = sorted(path.name for path in scan.out.iterdir())
    assert scan.estimate("--noise", "gaussian") == 0
    assert sorted(path.name for path in scan.out.iterdir()) == before
    assert scan.report["noise"] == "gaussian"
    assert not np.array_equal(scan.read("Dslow"), first, equal_nan=True)
    assert (scan.out / "notes.txt").read_text() == "mine"


def test_written_maps_are_those_of_the_estimator(scan):
    """The command adds nothing to what the library's parts do one by one."""
    found = scan.in_notebook()
    fitted = qmri.MaximumLikelihood(IVIM(BVALUES), Rician(found.report["sigma"]))
    expected = estimate_maps(fitted, scan.images.astype(np.float32), scan.tissue)
    difference = np.abs(found.maps["f"] - expected["f"])[scan.tissue]
    assert np.quantile(difference, 0.99) < 1e-4
