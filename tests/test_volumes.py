"""Images to maps: any estimator, any shape, and NIfTI in and out."""

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import qmri
from qmri import volumes
from qmri.models import IVIM
from qmri.volumes import ParameterMaps, estimate_maps, read_dwi, write_maps

BVALUES = (0, 10, 50, 200, 500)


class MeanAndSpan:
    """An estimator whose right answer a reader knows: mean and range of each signal."""

    names = ("mean", "span")

    def __init__(self):
        self.seen = []

    def estimate(self, signals):
        self.seen.append(signals)
        return np.column_stack([signals.mean(axis=1), np.ptp(signals, axis=1)])


class LogLinear:
    """Exact for a single exponential without noise: a straight line through the logarithms."""

    names = ("S0", "D")
    units = ("1", "um2/ms")

    def __init__(self, bvalues):
        self.bvalues = np.asarray(bvalues, dtype=float)

    def estimate(self, signals):
        slope, intercept = np.polyfit(self.bvalues, np.log(signals).T, 1)
        return np.column_stack([np.exp(intercept), -slope * 1e3])


@pytest.fixture
def rng():
    return np.random.default_rng(20)


# An estimator over a masked stack.


@st.composite
def stacks(draw):
    """Images of 1-D to 4-D spatial shape, with a mask that holds at least one voxel."""
    spatial = draw(hnp.array_shapes(min_dims=1, max_dims=4, max_side=5))
    measurements = draw(st.integers(1, 6))
    values = st.floats(-1e6, 1e6) | st.sampled_from([np.nan, np.inf, -np.inf])
    images = draw(hnp.arrays(np.float64, (*spatial, measurements), elements=values))
    mask = draw(hnp.arrays(bool, spatial))
    mask.flat[draw(st.integers(0, mask.size - 1))] = True
    return images, mask


@settings(deadline=None)
@given(stacks(), st.integers(1, 40))
def test_each_voxel_gets_its_own_estimate_and_the_rest_is_nan(stack, voxels_per_call):
    images, mask = stack
    estimator = MeanAndSpan()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(volumes, "VOXELS_PER_CALL", voxels_per_call)
        maps = estimate_maps(estimator, images, mask)
    finite = np.isfinite(images).all(axis=-1)
    assert maps.names == ("mean", "span")
    np.testing.assert_array_equal(maps.mask, mask)
    np.testing.assert_array_equal(maps.invalid, mask & ~finite)
    kept = images[mask & finite]
    for name, expected in (("mean", kept.mean(axis=-1)), ("span", np.ptp(kept, axis=-1))):
        assert maps[name].shape == mask.shape
        np.testing.assert_array_equal(np.isnan(maps[name]), ~(mask & finite))
        np.testing.assert_allclose(maps[name][mask & finite], expected, rtol=1e-12, atol=1e-9)
    # The estimator saw each valid voxel once, and nothing that is not a number.
    assert sum(len(signals) for signals in estimator.seen) == len(kept)
    assert all(np.isfinite(signals).all() for signals in estimator.seen)


def test_voxels_outside_the_mask_do_not_matter(rng):
    images = rng.normal(size=(6, 7, 4))
    mask = rng.random((6, 7)) < 0.5
    elsewhere = np.where(mask[..., None], images, rng.normal(size=images.shape))
    first, second = (estimate_maps(MeanAndSpan(), x, mask) for x in (images, elsewhere))
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])


def test_a_known_slice_gives_its_own_parameters(rng):
    bvalues = np.array(BVALUES, dtype=float)
    diffusivity = rng.uniform(0.5, 3, (5, 4))  # um2/ms
    amplitude = rng.uniform(50, 200, (5, 4))
    images = amplitude[..., None] * np.exp(-bvalues * 1e-3 * diffusivity[..., None])
    maps = estimate_maps(LogLinear(bvalues), images)
    np.testing.assert_allclose(maps["D"], diffusivity, rtol=1e-9)
    np.testing.assert_allclose(maps["S0"], amplitude, rtol=1e-9)
    assert dict(maps.units) == {"S0": "1", "D": "um2/ms"}
    assert maps.mask.all()
    assert not maps.invalid.any()


def test_units_of_the_call_win_and_unknown_units_are_empty(rng):
    images = rng.normal(size=(3, 4))
    assert dict(estimate_maps(MeanAndSpan(), images).units) == {"mean": "", "span": ""}
    maps = estimate_maps(MeanAndSpan(), images, units=("ms", "s"))
    assert dict(maps.units) == {"mean": "ms", "span": "s"}


def test_maps_are_a_mapping_that_describes_itself(rng):
    maps = estimate_maps(MeanAndSpan(), rng.normal(size=(3, 4)), units=("ms", "s"))
    assert list(maps) == ["mean", "span"]
    assert len(maps) == 2
    assert "mean" in maps
    assert "median" not in maps
    with pytest.raises(KeyError):
        maps["median"]
    assert "mean [ms]" in repr(maps)
    assert "3 voxels" in repr(maps)
    assert maps == maps
    assert maps != estimate_maps(MeanAndSpan(), rng.normal(size=(3, 4)))


def test_integer_images_and_lists(rng):
    images = rng.integers(0, 255, size=(4, 5, 3)).astype(np.uint8)
    np.testing.assert_allclose(
        estimate_maps(MeanAndSpan(), images)["mean"], images.astype(float).mean(-1)
    )
    assert estimate_maps(MeanAndSpan(), [[1, 3], [2, 6]])["span"].tolist() == [2, 4]


def test_maps_do_not_follow_later_changes(rng):
    images, mask = rng.normal(size=(4, 3)), np.array([True, True, False, True])
    maps = estimate_maps(MeanAndSpan(), images, mask)
    mask[:] = False
    maps["mean"][:] = 0
    assert maps.mask.tolist() == [True, True, False, True]
    assert np.isfinite(maps["span"][maps.mask]).all()
    assert not np.any(images == 0)


def test_a_stack_without_one_finite_voxel_never_reaches_the_estimator():
    estimator = MeanAndSpan()
    maps = estimate_maps(estimator, np.full((2, 2, 3), np.nan))
    assert estimator.seen == []
    assert maps.invalid.all()
    assert np.isnan(maps["mean"]).all()


def test_nan_of_the_estimator_is_kept(rng):
    class Fails:
        names = ("x",)

        def estimate(self, signals):
            return np.where(signals[:, :1] > 0, signals[:, :1], np.nan)

    images = rng.normal(size=(50, 2))
    maps = estimate_maps(Fails(), images)
    np.testing.assert_array_equal(np.isnan(maps["x"]), images[:, 0] <= 0)
    assert not maps.invalid.any()


def test_progress_bar_counts_voxels(rng, capsys):
    images = rng.normal(size=(30, 2))
    estimate_maps(MeanAndSpan(), images)
    assert capsys.readouterr() == ("", "")
    estimate_maps(MeanAndSpan(), images, progress=True)
    assert "30/30" in capsys.readouterr().err


def test_library_estimator_recovers_noise_free_ivim(rng):
    """Any estimator with the one method will do: here the maximum-likelihood one."""
    model = IVIM([0, 10, 20, 50, 100, 200, 400, 800])
    theta = model.sample(12, rng).reshape(3, 4, 4)
    images = model.signal(theta.reshape(12, 4)).reshape(3, 4, 8)
    maps = estimate_maps(qmri.MaximumLikelihood(model, qmri.Gaussian(0.01)), images)
    for i, name in enumerate(model.names):
        np.testing.assert_allclose(maps[name], theta[..., i], rtol=0.02)
    assert maps.units["Dslow"] == "um2/ms"


@pytest.mark.parametrize(
    ("images", "mask", "message"),
    [
        (np.ones((2, 3)) * 1j, None, "images: got complex numbers.*np.abs"),
        (np.array([["a", "b"]]), None, "images: expected numbers, got dtype <U1"),
        (np.ones(3), None, r"images: expected shape .* got \(3,\)"),
        (np.ones((2, 3)), np.ones(3, bool), r"mask: .* shape \(2,\), got \(3,\)"),
        (np.ones((2, 3)), np.ones((2, 3), bool), r"mask: .* shape \(2,\), got \(2, 3\)"),
        (np.ones((2, 3)), np.zeros(2, bool), "mask: none of its 2 voxels is True"),
        (np.ones((2, 3)), np.array([0.996, 1]), "mask: expected bool, got float64.*mask > 0.5"),
        (np.ones((0, 3)), None, "mask: none of its 0 voxels"),
    ],
)
def test_bad_images_and_masks_are_named(images, mask, message):
    with pytest.raises(ValueError, match=message):
        estimate_maps(MeanAndSpan(), images, mask)


@pytest.mark.parametrize(
    "returned",
    [np.ones((3, 1)), np.ones((2, 2)), np.ones(6), np.ones((3, 2, 1)), np.float64(1.0)],
)
def test_estimator_of_the_wrong_shape_is_named(returned):
    class Wrong:
        names = ("a", "b")

        def estimate(self, signals):
            return returned

    with pytest.raises(ValueError, match=r"estimator: Wrong.*expected .*\(3, 2\)"):
        estimate_maps(Wrong(), np.ones((3, 4)))


def test_estimator_of_complex_numbers_is_named():
    class Wrong:
        names = ("a",)

        def estimate(self, signals):
            return signals[:, :1] + 1j

    with pytest.raises(ValueError, match=r"estimator: Wrong.*complex128"):
        estimate_maps(Wrong(), np.ones((3, 4)))


def test_one_unit_per_parameter():
    with pytest.raises(ValueError, match="units: expected one per parameter"):
        estimate_maps(MeanAndSpan(), np.ones((3, 4)), units=("1",))


# NIfTI and .bval files in.

AFFINE = np.array([[-2.0, 0, 0, 90], [0, 2.0, 0.1, -126], [0, -0.1, 3.0, -72], [0, 0, 0, 1]])


@pytest.fixture
def scan(tmp_path, rng):
    """Files of a small diffusion scan, written as a scanner's converter would."""
    images = rng.integers(0, 2000, (4, 5, 3, len(BVALUES))).astype(np.int16)
    mask = np.zeros((4, 5, 3), np.uint8)
    mask[1:3, 1:4, 1] = 1
    nibabel.save(nibabel.Nifti1Image(images, AFFINE), tmp_path / "dwi.nii.gz")
    nibabel.save(nibabel.Nifti1Image(mask, AFFINE), tmp_path / "mask.nii.gz")
    (tmp_path / "dwi.bval").write_text(" ".join(map(str, BVALUES)) + " \n")
    return tmp_path


def read(folder, mask=True):
    return read_dwi(
        folder / "dwi.nii.gz", folder / "dwi.bval", folder / "mask.nii.gz" if mask else None
    )


def test_dwi_is_read_as_it_was_written(scan, rng):
    dwi = read(scan)
    stored = np.asarray(nibabel.load(scan / "dwi.nii.gz").dataobj)
    np.testing.assert_array_equal(dwi.images, stored)
    assert dwi.images.dtype == np.float64
    np.testing.assert_array_equal(dwi.bvalues, BVALUES)
    np.testing.assert_allclose(dwi.affine, AFFINE, atol=1e-6)
    assert dwi.mask.dtype == bool
    assert dwi.mask.sum() == 6
    assert read(scan, mask=False).mask.all()


def test_scaled_integers_are_read_in_scanner_units(scan):
    stored = np.full((2, 2, 2, 5), 100, np.int16)
    image = nibabel.Nifti1Image(stored, AFFINE)
    image.header.set_slope_inter(0.5, 10)
    nibabel.save(image, scan / "dwi.nii.gz")
    np.testing.assert_array_equal(read(scan, mask=False).images, 0.5 * 100 + 10)


@pytest.mark.parametrize(
    "text", ["0\n10\n50\n200\n500\n", "0\t10  50\r\n200 5e2", "\ufeff0 10 50 200 500"]
)
def test_bval_layouts(scan, text):
    (scan / "dwi.bval").write_text(text, encoding="utf-8")
    np.testing.assert_array_equal(read(scan).bvalues, BVALUES)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0 10 50 200", "holds 4 b-values, expected 5, one per volume"),
        ("0 10 50 200 500 800", "holds 6 b-values, expected 5, one per volume"),
        ("5 10 50 200 500", "at least one b = 0, the smallest is 5"),
        ("0 10 -50 200 500", "must not be negative, got -50"),
        ("0 ten 50 200 500", "holds 'ten', expected a number"),
        ("0,10,50,200,500", "holds '0,10,50,200,500', expected a number"),
        ("0 nan 50 200 500", "must be finite"),
        ("0 0.01 0.05 0.2 0.5", r"looks like ms/um2, multiply by 1000"),
        ("0 10e6 50e6 200e6 500e6", r"looks like s/m2, divide by 1,000,000"),
        ("", "at least one"),
    ],
)
def test_bad_bvalues_are_named(scan, text, message):
    (scan / "dwi.bval").write_text(text)
    with pytest.raises(ValueError, match=message) as refused:
        read(scan)
    assert str(scan / "dwi.bval") in str(refused.value)


def test_bval_that_is_no_text(scan):
    (scan / "dwi.bval").write_bytes((scan / "dwi.nii.gz").read_bytes())
    with pytest.raises(ValueError, match=r"bvals: .*dwi\.bval is not a text file"):
        read(scan)


@pytest.mark.parametrize(
    ("file", "argument"), [("dwi.nii.gz", "image"), ("dwi.bval", "bvals"), ("mask.nii.gz", "mask")]
)
def test_missing_file_is_named(scan, file, argument):
    (scan / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"{argument}: there is no file .*{file}"):
        read(scan)


@pytest.mark.parametrize(("file", "argument"), [("dwi.nii.gz", "image"), ("mask.nii.gz", "mask")])
@pytest.mark.parametrize("kept", [0.9, 0.5, 0.1, 0.0])
def test_truncated_nifti_is_named(scan, rng, file, argument, kept):
    path = scan / file
    shape = (4, 5, 3, len(BVALUES)) if argument == "image" else (4, 5, 3)
    nibabel.save(nibabel.Nifti1Image(rng.random(shape).astype(np.float32), AFFINE), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match=rf"{argument}: .*{file} .*cut short"):
        read(scan)


def test_truncated_uncompressed_nifti_is_named(scan):
    path = scan / "dwi.nii"
    nibabel.save(nibabel.load(scan / "dwi.nii.gz"), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"image: .*dwi\.nii is cut short"):
        read_dwi(path, scan / "dwi.bval")


def test_file_that_is_no_image(scan):
    (scan / "dwi.nii.gz").write_text("not an image")
    with pytest.raises(ValueError, match=r"image: .*dwi\.nii\.gz is not a NIfTI file"):
        read(scan)


def test_damaged_header(scan):
    path = scan / "dwi.nii"
    nibabel.save(nibabel.load(scan / "dwi.nii.gz"), path)
    content = bytearray(path.read_bytes())
    content[70:72] = b"\xff\x0f"  # the code of the data type
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"image: .*dwi\.nii is not a NIfTI file"):
        read_dwi(path, scan / "dwi.bval")


def test_image_that_is_not_4d(scan):
    nibabel.save(nibabel.Nifti1Image(np.ones((4, 5, 3)), AFFINE), scan / "dwi.nii.gz")
    with pytest.raises(ValueError, match=r"image: .* has shape \(4, 5, 3\), expected 4-D"):
        read(scan)


def test_complex_image(scan):
    nibabel.save(
        nibabel.Nifti1Image(np.ones((4, 5, 3, 5), np.complex64), AFFINE), scan / "dwi.nii.gz"
    )
    with pytest.raises(ValueError, match=r"image: .* holds complex64, expected real numbers"):
        read(scan)


def test_mask_of_another_shape(scan):
    nibabel.save(nibabel.Nifti1Image(np.ones((5, 4, 3), np.uint8), AFFINE), scan / "mask.nii.gz")
    with pytest.raises(ValueError, match=r"mask: .* has shape \(5, 4, 3\), expected \(4, 5, 3\)"):
        read(scan)


def test_empty_mask(scan):
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 5, 3), np.uint8), AFFINE), scan / "mask.nii.gz")
    with pytest.raises(ValueError, match=r"mask: .* has no voxel above 0\.5"):
        read(scan)


@pytest.mark.parametrize(
    "moved",
    [
        AFFINE @ np.diag([-1, 1, 1, 1]),  # left and right exchanged
        AFFINE + np.outer([0, 0, 1, 0], [0, 0, 0, 3]),  # one slice higher
        np.eye(4),
    ],
)
def test_mask_elsewhere_in_space(scan, moved):
    mask = nibabel.load(scan / "mask.nii.gz")
    nibabel.save(nibabel.Nifti1Image(np.asarray(mask.dataobj), moved), scan / "mask.nii.gz")
    with pytest.raises(ValueError, match=r"mask: .* lies elsewhere in space: .* mm away"):
        read(scan)


def test_mask_affine_may_differ_by_rounding(scan):
    mask = nibabel.load(scan / "mask.nii.gz")
    nibabel.save(nibabel.Nifti1Image(np.asarray(mask.dataobj), AFFINE + 1e-3), scan / "mask.nii.gz")
    assert read(scan).mask.sum() == 6


def test_soft_mask_counts_above_one_half(scan):
    soft = np.zeros((4, 5, 3), np.float32)
    soft[0, 0, :] = (0.4, 0.6, np.nan)
    nibabel.save(nibabel.Nifti1Image(soft, AFFINE), scan / "mask.nii.gz")
    assert np.argwhere(read(scan).mask).tolist() == [[0, 0, 1]]


def test_voxels_that_are_no_numbers_are_counted_not_fitted(scan):
    images = np.full((4, 5, 3, 5), 100.0, np.float32)
    images[1, 1, 1, 2] = np.nan
    images[2, 2, 1, 0] = np.inf
    images[0, 0, 0, 0] = np.nan  # outside the mask
    nibabel.save(nibabel.Nifti1Image(images, AFFINE), scan / "dwi.nii.gz")
    dwi = read(scan)
    maps = estimate_maps(MeanAndSpan(), dwi.images, dwi.mask)
    assert maps.invalid.sum() == 2
    assert np.isfinite(maps["mean"]).sum() == 4


# NIfTI maps out.


@pytest.fixture
def maps(rng):
    images = rng.uniform(1, 100, (4, 5, 3, 6))
    images[1, 2, 1, 0] = np.nan
    mask = np.zeros((4, 5, 3), bool)
    mask[1:3, 1:4, 1] = True
    return estimate_maps(MeanAndSpan(), images, mask, units=("um2/ms", "1"))


def test_maps_survive_writing_and_reading(maps, tmp_path):
    paths = write_maps(maps, tmp_path / "new" / "maps", AFFINE)
    assert [path.name for path in paths] == ["mean.nii.gz", "span.nii.gz", "maps.json"]
    for name in maps:
        image = nibabel.load(tmp_path / "new" / "maps" / f"{name}.nii.gz")
        assert image.get_data_dtype() == np.float32
        np.testing.assert_array_equal(image.get_fdata(), maps[name].astype(np.float32))
        np.testing.assert_allclose(image.affine, AFFINE, atol=1e-6)
        assert image.header["descrip"].item().decode() == f"{name} [{maps.units[name]}]"
        assert image.header.get_xyzt_units()[0] == "mm"
    described = json.loads(paths[-1].read_text(encoding="utf-8"))
    assert described == {
        "qmri_version": qmri.__version__,
        "parameters": [
            {"name": "mean", "unit": "um2/ms", "file": "mean.nii.gz"},
            {"name": "span", "unit": "1", "file": "span.nii.gz"},
        ],
        "voxels_in_mask": 6,
        "invalid_voxels": 1,
        "invalid_share": pytest.approx(1 / 6),
        "files": ["mean.nii.gz", "span.nii.gz"],
    }


def test_whole_way_from_files_to_files(scan, rng):
    diffusivity = rng.uniform(0.5, 2.5, (4, 5, 3))
    images = 500 * np.exp(-np.array(BVALUES) * 1e-3 * diffusivity[..., None])
    nibabel.save(nibabel.Nifti1Image(images, AFFINE), scan / "dwi.nii.gz")
    dwi = read(scan)
    maps = estimate_maps(LogLinear(dwi.bvalues), dwi.images, dwi.mask)
    write_maps(maps, scan / "maps", dwi.affine)
    back = nibabel.load(scan / "maps" / "D.nii.gz")
    np.testing.assert_allclose(back.get_fdata()[dwi.mask], diffusivity[dwi.mask], rtol=1e-6)
    assert np.isnan(back.get_fdata()[~dwi.mask]).all()
    # The written map lies on the image's grid, so it may serve as a mask there.
    nibabel.save(
        nibabel.Nifti1Image(np.nan_to_num(back.get_fdata()), back.affine), scan / "mask.nii.gz"
    )
    assert read(scan).mask.sum() == 6


def test_writing_again_replaces_whole_files(maps, tmp_path):
    write_maps(maps, tmp_path, AFFINE)
    doubled = ParameterMaps({n: 2 * maps[n] for n in maps}, maps.units, maps.mask, maps.invalid)
    write_maps(doubled, tmp_path, AFFINE)
    stored = nibabel.load(tmp_path / "mean.nii.gz").get_fdata()
    np.testing.assert_array_equal(stored, (2 * maps["mean"]).astype(np.float32))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["maps.json", "mean.nii.gz", "span.nii.gz"]


def test_a_report_and_further_files_join_the_maps(maps, tmp_path):
    report = {"sigma": 2.5, "bvalues": [0.0, 500.0], "parameters": {"span": {"bounds": [0, 1]}}}
    paths = write_maps(maps, tmp_path, AFFINE, report=report, attachments={"a.png": b"picture"})
    assert [path.name for path in paths] == ["mean.nii.gz", "span.nii.gz", "a.png", "maps.json"]
    assert paths[2].read_bytes() == b"picture"
    text = paths[-1].read_text(encoding="utf-8")
    assert '"bvalues": [0.0, 500.0]' in text
    described = json.loads(text)
    assert described["sigma"] == 2.5
    assert described["files"] == ["mean.nii.gz", "span.nii.gz", "a.png"]
    assert described["parameters"] == [
        {"name": "mean", "unit": "um2/ms", "file": "mean.nii.gz"},
        {"name": "span", "unit": "1", "file": "span.nii.gz", "bounds": [0, 1]},
    ]


def test_maps_of_an_earlier_run_go_and_other_files_stay(maps, tmp_path):
    write_maps(maps, tmp_path, AFFINE, attachments={"a.png": b"picture"})
    (tmp_path / "T1.nii.gz").write_bytes(b"mine")
    only = ParameterMaps({"span": maps["span"]}, maps.units, maps.mask, maps.invalid)
    write_maps(only, tmp_path, AFFINE)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["T1.nii.gz", "maps.json", "span.nii.gz"]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"files": 3}', '{"files": ["../mine.txt", "/mine.txt", 3, null]}', "\xff"],
)
def test_a_description_that_is_not_ours_removes_nothing(maps, tmp_path, text):
    (tmp_path / "mine.txt").write_text("mine")
    folder = tmp_path / "maps"
    folder.mkdir()
    (folder / "maps.json").write_bytes(text.encode("latin-1"))
    write_maps(maps, folder, AFFINE)
    assert (tmp_path / "mine.txt").read_text() == "mine"
    assert json.loads((folder / "maps.json").read_text())["files"] == ["mean.nii.gz", "span.nii.gz"]


def test_a_description_never_stands_beside_maps_of_another_run(maps, tmp_path, monkeypatch):
    """Whatever interrupts the last moment: without maps.json a folder is not complete."""
    write_maps(maps, tmp_path, AFFINE)
    replace, done = Path.replace, []

    def interrupted(path, target):
        if done:
            raise KeyboardInterrupt
        done.append(target)
        return replace(path, target)

    doubled = ParameterMaps({n: 2 * maps[n] for n in maps}, maps.units, maps.mask, maps.invalid)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_maps(doubled, tmp_path, AFFINE)
    assert [path.name for path in done] == ["mean.nii.gz"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mean.nii.gz", "span.nii.gz"]
    write_maps(doubled, tmp_path, AFFINE)
    np.testing.assert_array_equal(
        nibabel.load(tmp_path / "span.nii.gz").get_fdata(), (2 * maps["span"]).astype(np.float32)
    )


@pytest.mark.parametrize("name", ["../a.png", "", "maps.json", "MEAN.nii.gz"])
def test_attachments_that_cannot_be_files(maps, tmp_path, name):
    with pytest.raises(ValueError, match="cannot be a file name|differ in case only"):
        write_maps(maps, tmp_path, AFFINE, attachments={name: b""})
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_the_old_maps(maps, tmp_path, monkeypatch):
    write_maps(maps, tmp_path, AFFINE)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    save = nibabel.save

    def fails_at_the_second(image, path):
        if path.name.startswith("span"):
            path.write_bytes(b"half")
            raise OSError("No space left on device")
        save(image, path)

    monkeypatch.setattr(volumes.nibabel, "save", fails_at_the_second)
    doubled = ParameterMaps({n: 2 * maps[n] for n in maps}, maps.units, maps.mask, maps.invalid)
    with pytest.raises(OSError, match="No space"):
        write_maps(doubled, tmp_path, AFFINE)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("shape", [(7,), (4, 5), (4, 5, 3), (4, 5, 3, 2)])
def test_lists_and_slices_become_volumes(rng, tmp_path, shape):
    maps = estimate_maps(MeanAndSpan(), rng.random((*shape, 4)))
    write_maps(maps, tmp_path, AFFINE)
    stored = nibabel.load(tmp_path / "mean.nii.gz")
    assert stored.shape == shape + (1,) * (3 - len(shape))
    np.testing.assert_array_equal(
        stored.get_fdata().reshape(shape), maps["mean"].astype(np.float32)
    )


@pytest.mark.parametrize("affine", [np.eye(3), np.full((4, 4), np.nan), np.ones(16)])
def test_bad_affine_is_named(maps, tmp_path, affine):
    with pytest.raises(ValueError, match="affine: expected"):
        write_maps(maps, tmp_path, affine)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("T1/T2",), "'T1/T2' cannot be a file name"),
        (("../x",), "cannot be a file name"),
        (("",), "cannot be a file name"),
        (("T1", "t1"), "differ in case only"),
    ],
)
def test_names_that_cannot_be_files(tmp_path, names, message):
    array, mask = np.ones((2, 2)), np.ones((2, 2), bool)
    maps = ParameterMaps(dict.fromkeys(names, array), dict.fromkeys(names, ""), mask, ~mask)
    with pytest.raises(ValueError, match=message):
        write_maps(maps, tmp_path, AFFINE)
    assert list(tmp_path.iterdir()) == []


class Trained(MeanAndSpan):
    """An estimator that knows what it was made for."""

    def require(self, *, bvalues=None, snr=None):
        if list(bvalues) != [0, 10, 20, 30] or snr != 20:
            raise ValueError(f"trained for another acquisition than {bvalues} at SNR {snr}")


def test_a_trained_estimator_sees_only_what_it_was_trained_for() -> None:
    """A network maps any signals to something: a wrong protocol must not make a map."""
    images, right = np.ones((3, 4)), {"bvalues": [0, 10, 20, 30], "snr": 20}
    assert estimate_maps(Trained(), images, **right)["mean"].tolist() == [1, 1, 1]
    for name in right:
        with pytest.raises(ValueError, match=f"{name} must be given"):
            estimate_maps(Trained(), images, **{**right, name: None})
    for other in ({"bvalues": [0, 10, 20, 40]}, {"snr": 10}):
        with pytest.raises(ValueError, match="trained for another"):
            estimate_maps(Trained(), images, **{**right, **other})
