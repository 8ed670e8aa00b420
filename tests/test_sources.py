"""Public data: verified or refused, and what the images must hold."""

import contextlib
import hashlib
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

import nbclient
import nbformat
import numpy as np
import pytest
import requests

from qmri import sources
from qmri.sources import (
    SOURCES,
    CorruptFile,
    DataUnavailable,
    Source,
    fetch,
    is_available,
    load_abdomen,
    load_mt_basis,
    load_mt_pulses,
    load_mt_slice,
    load_phantom,
    load_relaxometry,
)

NAME = "phantom/water.npy"
BODY = bytes(range(256)) * 400


# A server that the test writes, in place of the public ones.


@pytest.fixture
def server():
    """Local server; `bodies` is what it answers, in turn (the last one again and again)."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            state.requests += 1
            answer = state.answers[min(state.requests, len(state.answers)) - 1]
            self.send_response(answer.get("status", 200))
            if "length" in answer:
                self.send_header("Content-Length", str(answer["length"]))
            self.end_headers()
            time.sleep(answer.get("delay", 0))
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.wfile.write(answer.get("body", b""))

        def log_message(self, *args):
            pass

    class QuietServer(ThreadingHTTPServer):
        daemon_threads = False  # closing the server waits for its answers

        def handle_error(self, request, client_address):
            pass

    http = QuietServer(("127.0.0.1", 0), Handler)
    state = SimpleNamespace(
        answers=[{"body": BODY, "length": len(BODY)}],
        requests=0,
        url=f"http://127.0.0.1:{http.server_address[1]}/water.npy",
    )
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield state
    http.shutdown()
    http.server_close()
    thread.join()


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty cache folder, and no folder of the reader's own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("QMRI_CACHE_DIR", str(folder))
    monkeypatch.delenv("QMRI_DATA_DIR", raising=False)
    return folder


@pytest.fixture
def registered(monkeypatch, server, cache):
    """A registry with one file, kept by the local server."""
    source = Source(NAME, server.url, hashlib.sha256(BODY).hexdigest(), "MIT", "none")
    monkeypatch.setattr(sources, "SOURCES", MappingProxyType({NAME: source}))
    return source


def files_in(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_download_is_verified_and_kept(registered, server, cache):
    path = fetch(NAME)
    assert path.read_bytes() == BODY
    assert path == cache / NAME
    assert fetch(NAME) == path
    assert server.requests == 1
    assert files_in(cache) == [NAME]


def test_is_available_asks_no_server(registered, server, cache):
    assert not is_available(NAME)
    assert server.requests == 0
    fetch(NAME)
    assert is_available(NAME)
    (cache / NAME).write_bytes(BODY[:-1])
    assert not is_available(NAME)
    assert server.requests == 1


@pytest.mark.parametrize("damage", [BODY[:-1], BODY + b"0", b"", b"?" + BODY[1:]])
def test_damaged_cache_is_replaced(registered, server, cache, damage):
    (cache / NAME).parent.mkdir(parents=True)
    (cache / NAME).write_bytes(damage)
    assert fetch(NAME).read_bytes() == BODY
    assert server.requests == 1


def test_damaged_cache_is_removed_when_the_server_is_gone(registered, server, cache):
    server.answers = [{"status": 503, "length": 0}]
    (cache / NAME).parent.mkdir(parents=True)
    (cache / NAME).write_bytes(BODY[:-1])
    with pytest.raises(DataUnavailable, match="damaged copy was removed"):
        fetch(NAME)
    assert files_in(cache) == []


def test_altered_download_is_refused_with_both_hashes(registered, server, cache):
    altered = b"?" + BODY[1:]
    server.answers = [{"body": altered, "length": len(altered)}]
    with pytest.raises(CorruptFile) as refused:
        fetch(NAME)
    message = str(refused.value)
    assert NAME in message
    assert server.url in message
    assert registered.sha256 in message
    assert hashlib.sha256(altered).hexdigest() in message
    assert f"{len(altered)} bytes" in message
    assert files_in(cache) == []


def test_truncated_download_without_a_length_is_refused(registered, server, cache):
    server.answers = [{"body": BODY[:1000]}]
    with pytest.raises(CorruptFile, match="1000 bytes"):
        fetch(NAME)
    assert files_in(cache) == []


def test_transfer_that_always_breaks_off(registered, server, cache):
    server.answers = [{"body": BODY[:1000], "length": len(BODY)}]
    with pytest.raises(DataUnavailable, match="broke off"):
        fetch(NAME)
    assert server.requests == 2
    assert files_in(cache) == []


@pytest.mark.parametrize(
    "first", [{"body": BODY[:1000], "length": len(BODY)}, {"body": b"busy", "length": 4}]
)
def test_transfer_that_breaks_off_once_is_repeated(registered, server, cache, first):
    server.answers = [first, {"body": BODY, "length": len(BODY)}]
    assert fetch(NAME).read_bytes() == BODY
    assert files_in(cache) == [NAME]


def test_file_that_the_server_does_not_have(registered, server, cache):
    server.answers = [{"status": 404, "length": 0}]
    with pytest.raises(DataUnavailable, match=r"127\.0\.0\.1:\d+ answered 404") as missing:
        fetch(NAME)
    assert isinstance(missing.value.__cause__, requests.exceptions.HTTPError)
    assert server.requests == 1
    assert files_in(cache) == []


def test_server_that_never_answers(registered, server, monkeypatch):
    monkeypatch.setattr(sources, "TIMEOUT_SECONDS", (0.2, 0.2))
    server.answers = [{"delay": 0.8, "length": len(BODY)}]
    before = time.perf_counter()
    with pytest.raises(DataUnavailable, match="cannot be reached"):
        fetch(NAME)
    assert time.perf_counter() - before < 0.8


@pytest.mark.parametrize("host", ["http://127.0.0.1:9", "http://nowhere.invalid"])
def test_no_network_says_what_to_do_in_one_sentence(monkeypatch, cache, host):
    source = Source(NAME, f"{host}/water.npy", "0" * 64, "MIT", "none")
    monkeypatch.setattr(sources, "SOURCES", MappingProxyType({NAME: source}))
    before = time.perf_counter()
    with pytest.raises(DataUnavailable) as missing:
        fetch(NAME)
    assert time.perf_counter() - before < 10
    assert isinstance(missing.value.__cause__, requests.exceptions.ConnectionError)
    message = str(missing.value)
    assert message.startswith(NAME)
    assert "connect to the internet once" in message
    assert f"set QMRI_DATA_DIR to a folder that holds {NAME}" in message
    assert message.endswith(source.url)
    assert "\n" not in message
    assert ". " not in message


def test_notebook_shows_the_sentence_without_a_traceback(cache):
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [
        nbformat.v4.new_code_cell(
            "from qmri import sources\n"
            f"source = sources.Source({NAME!r}, 'http://127.0.0.1:9/water.npy', '', 'MIT', '')\n"
            f"sources.SOURCES = {{{NAME!r}: source}}\n"
            f"sources.fetch({NAME!r})"
        )
    ]
    with pytest.raises(nbclient.exceptions.CellExecutionError):
        nbclient.NotebookClient(notebook, timeout=60).execute()
    (shown,) = [o for o in notebook.cells[0].outputs if o.output_type == "error"]
    assert shown.ename == "DataUnavailable"
    assert shown.traceback == [f"DataUnavailable: {shown.evalue}"]
    assert shown.evalue.startswith(f"{NAME} is not in the cache")


def test_readers_folder_comes_first(registered, server, cache, monkeypatch, tmp_path):
    own = tmp_path / "own" / NAME
    own.parent.mkdir(parents=True)
    own.write_bytes(BODY)
    fetch(NAME)
    monkeypatch.setenv("QMRI_DATA_DIR", str(tmp_path / "own"))
    assert fetch(NAME) == own
    assert is_available(NAME)


def test_damaged_file_in_readers_folder_is_refused_and_left(
    registered, server, cache, monkeypatch, tmp_path
):
    own = tmp_path / "own" / NAME
    own.parent.mkdir(parents=True)
    own.write_bytes(BODY[:-7])
    fetch(NAME)
    monkeypatch.setenv("QMRI_DATA_DIR", str(tmp_path / "own"))
    with pytest.raises(CorruptFile) as refused:
        fetch(NAME)
    assert str(own) in str(refused.value)
    assert f"{len(BODY) - 7} bytes" in str(refused.value)
    assert own.read_bytes() == BODY[:-7]
    assert not is_available(NAME)
    assert server.requests == 1


def test_readers_folder_without_the_file(registered, server, cache, monkeypatch, tmp_path):
    monkeypatch.setenv("QMRI_DATA_DIR", str(tmp_path))
    assert fetch(NAME) == cache / NAME
    server.answers = [{"status": 404, "length": 0}]
    (cache / NAME).unlink()
    with pytest.raises(DataUnavailable) as missing:
        fetch(NAME)
    assert f"neither in QMRI_DATA_DIR ({tmp_path}) nor in the cache" in str(missing.value)


def test_cache_that_cannot_be_written(registered, server, cache):
    cache.write_text("a file where the folder should be")
    with pytest.raises(DataUnavailable, match="cannot be written"):
        fetch(NAME)


def test_two_downloads_at_once_both_succeed(registered, server, cache):
    server.answers = [{"body": BODY, "length": len(BODY), "delay": 0.1}]
    found = []
    threads = [threading.Thread(target=lambda: found.append(fetch(NAME))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [cache / NAME] * 4
    assert files_in(cache) == [NAME]
    assert (cache / NAME).read_bytes() == BODY


@pytest.mark.parametrize("look_up", [fetch, is_available])
def test_unknown_name_lists_the_nearest(look_up):
    with pytest.raises(ValueError, match=r"volunteer9.*ivim-abdomen/volunteer1\.mat"):
        look_up("ivim-abdomen/volunteer9.mat")
    with pytest.raises(ValueError, match=r"relaxometry-brain/t1dataset\.npy"):
        look_up("t1dataset.npy")


def test_registry_is_complete():
    assert len(SOURCES) == 13
    assert len({source.sha256 for source in SOURCES.values()}) == 13
    for name, source in SOURCES.items():
        assert source.name == name
        assert source.url.endswith(name.rpartition("/")[2])
        commit = source.url.removeprefix("https://raw.githubusercontent.com/").split("/")[2]
        for digits, count in ((commit, 40), (source.sha256, 64)):
            assert len(digits) == count
            int(digits, 16)
        assert source.licence
        assert source.citation


# The real images.


@pytest.fixture
def real_data():
    """Skip, saying why, where the public data is not on this computer."""

    def require(*names):
        for name in names:
            if not is_available(name):
                pytest.skip(
                    f"{name} is not on this computer: set QMRI_DATA_DIR to a folder that holds "
                    f"it, or run qmri.fetch({name!r}) once"
                )

    return require


@pytest.fixture(params=[1, 2, 3, 4])
def volunteer(request, real_data):
    real_data(f"ivim-abdomen/volunteer{request.param}.mat")
    return load_abdomen(request.param)


def test_registered_hashes_are_those_of_the_readers_files():
    folder = Path(os.environ.get("QMRI_DATA_DIR") or "no folder")
    present = [name for name in SOURCES if (folder / name).is_file()]
    if not present:
        pytest.skip("QMRI_DATA_DIR names no folder that holds a public file")
    for name in present:
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == SOURCES[name].sha256
        assert fetch(name) == folder / name


def test_protocol_of_the_ivim_arm(volunteer):
    assert volunteer.images.shape == (*volunteer.mask.shape, 144)
    assert volunteer.images.dtype == np.float64
    for time_ms in (70, 100):
        scan = volunteer.at(time_ms)
        bvalues, counts = np.unique(scan.bvalues, return_counts=True)
        assert bvalues.tolist() == [0, 10, 25, 50, 100, 200, 300, 400, 500]
        assert counts.tolist() == [24] + [6] * 8
        assert set(scan.diffusion_times) == {time_ms}


def test_every_region_is_inside_the_body_and_regions_are_disjoint(volunteer):
    assert set(volunteer.regions) == {"pancreas", "liver", "kidney", "spleen"}
    together = sum(region.astype(int) for region in volunteer.regions.values())
    assert together.max() == 1
    assert not np.any((together > 0) & ~volunteer.mask)
    assert all(region.any() for region in volunteer.regions.values())


def test_signal_falls_with_b_in_every_organ(volunteer):
    for name, region in volunteer.regions.items():
        means = [volunteer.repeats(b)[region].mean() for b in (0, 50, 200, 500)]
        assert np.all(np.diff(means) < 0), (name, means)


def test_snr_at_b0_is_that_of_single_shot_abdominal_images(volunteer):
    """Repeats of one voxel vary by noise and motion; bright kidney stands out, dark liver least."""
    organs = {}
    for name, region in volunteer.regions.items():
        if region.sum() >= 10:  # a median over fewer voxels says little
            repeats = volunteer.repeats(0)[region]
            organs[name] = np.median(repeats.mean(axis=-1) / repeats.std(axis=-1, ddof=1))
    assert 4 < organs["liver"] < 9
    assert 5 < organs["pancreas"] < 10
    if "spleen" in organs:
        assert 10 < organs["spleen"] < 25
    if "kidney" in organs:
        assert 14 < organs["kidney"] < 32


def test_mask_value_below_one_counts_as_body(real_data):
    """Volunteer 1's mask holds 0.996 beside 1: comparing with 1 would tear holes into the body."""
    real_data("ivim-abdomen/volunteer1.mat")
    scan = load_abdomen(1)
    assert scan.images.shape[:2] == (96, 100)
    rows, columns = np.nonzero(scan.mask)
    box = (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
    assert scan.mask.sum() > 0.6 * box


def test_clinical_acquisitions_share_no_image(volunteer):
    scans = [volunteer.clinical(k, 70) for k in range(6)]
    for scan in scans:
        assert scan.bvalues.tolist() == [0, 10, 25, 50, 100, 200, 300, 400, 500]
        assert set(scan.diffusion_times) == {70}
        np.testing.assert_array_equal(scan.mask, volunteer.mask)
    for i in range(9):
        images = {scan.images[..., i].tobytes() for scan in scans}
        assert len(images) == 6
    stack = volunteer.at(70)
    averaged = np.mean([scan.images[..., -1] for scan in scans], axis=0)
    np.testing.assert_allclose(averaged, stack.repeats(500).mean(axis=-1))


@pytest.mark.parametrize("repeat", [6, -1, 0.5, "0"])
def test_clinical_refuses_an_unknown_repeat(real_data, repeat):
    real_data("ivim-abdomen/volunteer2.mat")
    with pytest.raises(ValueError, match=r"repeat: .* from 0 to 5"):
        load_abdomen(2).clinical(repeat, 70)


def test_unknown_diffusion_time_and_bvalue(real_data):
    real_data("ivim-abdomen/volunteer2.mat")
    scan = load_abdomen("volunteer2")
    with pytest.raises(ValueError, match=r"diffusion_time: 40 .*\[70\.0, 100\.0\]"):
        scan.at(40)
    with pytest.raises(ValueError, match="b: 800 "):
        scan.repeats(800)


@pytest.mark.parametrize("subject", [0, 7, "volunteer7", "phantom", "", None, 1.5])
def test_unknown_volunteer(subject):
    with pytest.raises(ValueError, match="subject"):
        load_abdomen(subject)


@pytest.mark.parametrize("state", ["static", "flow"])
def test_water_in_the_bottle_diffuses_as_free_water_does(real_data, state):
    """Without flow the decay is one exponential, with the diffusivity of water at 20 to 25 C."""
    real_data(f"ivim-abdomen/phantom_{state}.mat")
    scan = load_phantom(state)
    assert set(scan.regions) == {"bottle", "pipe"}
    assert scan.mask.all()
    means = [scan.repeats(b)[scan.regions["bottle"]].mean() for b in (0, 100, 500)]
    diffusivity_low = np.log(means[0] / means[1]) / 100 * 1e3
    diffusivity_high = np.log(means[1] / means[2]) / 400 * 1e3
    assert 2.0 < diffusivity_high < 2.3  # um2/ms
    assert diffusivity_low == pytest.approx(diffusivity_high, rel=0.05)


def test_flow_attenuates_the_pipe_and_not_the_bottle(real_data):
    real_data("ivim-abdomen/phantom_static.mat", "ivim-abdomen/phantom_flow.mat")

    def fraction_left(state, region):
        scan = load_phantom(state)
        inside = scan.regions[region]
        return scan.repeats(50)[inside].mean() / scan.repeats(0)[inside].mean()

    assert fraction_left("flow", "pipe") < 0.8 * fraction_left("static", "pipe")
    assert fraction_left("flow", "bottle") == pytest.approx(
        fraction_left("static", "bottle"), rel=0.02
    )


def test_unknown_phantom_state():
    with pytest.raises(ValueError, match="state: 'moving'"):
        load_phantom("moving")


def test_inversion_recovers_from_negative_to_positive(real_data):
    """After inversion brain tissue is dark and negative, and recovers towards +M0."""
    real_data("relaxometry-brain/t1dataset.npy")
    scan = load_relaxometry("t1")
    assert scan.images.shape == (256, 192, 6)
    assert scan.images.dtype == np.float64
    assert scan.times_ms.tolist() == [50, 100, 200, 500, 2000, 4000]
    assert scan.repetition_time_ms == 15_000
    tissue = scan.images[100:160, 50:80].mean(axis=(0, 1))
    assert tissue[0] < 0 < tissue[-1]
    assert np.all(np.diff(tissue) > 0)


def test_spin_echo_decays(real_data):
    real_data("relaxometry-brain/t2dataset.npy")
    scan = load_relaxometry("t2")
    assert scan.images.shape == (256, 192, 6)
    assert scan.times_ms.tolist() == [10, 25, 50, 90, 150, 250]
    assert scan.repetition_time_ms == 5_000
    tissue = scan.images[100:160, 50:80].mean(axis=(0, 1))
    assert np.all(np.diff(tissue) < 0)
    assert tissue[-1] > 0


def test_unknown_relaxometry():
    with pytest.raises(ValueError, match="parameter: 'T1'"):
        load_relaxometry("T1")


def test_brain_slice_is_zero_outside_the_brain(real_data):
    real_data("mt-brain/invivo_test_slice.mat")
    scan = load_mt_slice()
    assert scan.coefficients.shape == (175, 215, 13)
    assert scan.coefficients.dtype == np.complex128
    assert scan.mask.dtype == bool
    assert np.isfinite(scan.coefficients).all()
    assert not scan.coefficients[~scan.mask].any()
    assert 0.3 < scan.mask.mean() < 0.7  # an axial slice of a brain fills half of its box


def test_brain_slice_has_its_energy_in_the_first_coefficients(real_data):
    """The basis is sorted by energy; real and imaginary parts mixed up would not be."""
    real_data("mt-brain/invivo_test_slice.mat")
    scan = load_mt_slice()
    energy = np.mean(np.abs(scan.coefficients[scan.mask]) ** 2, axis=0)
    assert energy[0] > 3 * energy[1:].max()
    assert energy[:3].sum() > 0.9 * energy.sum()


def test_published_basis_is_orthonormal_and_sorted(real_data):
    real_data("mt-brain/basis_for_compress.mat")
    basis, singular_values = load_mt_basis()
    assert basis.shape == (1142, 13)
    assert basis.dtype == np.complex128
    np.testing.assert_allclose(basis.conj().T @ basis, np.eye(13), atol=1e-12)
    assert singular_values.shape == (1142,)
    assert np.all(np.diff(singular_values) <= 0)
    assert np.sum(singular_values[13:] ** 2) < 0.01 * np.sum(singular_values**2)
    np.testing.assert_array_equal(load_mt_basis(5)[0], basis[:, :5])


@pytest.mark.parametrize("rank", [0, 101, -1, 2.5, "13", None, True])
def test_rank_that_is_not_published(rank):
    with pytest.raises(ValueError, match="rank: .* from 1 to 100"):
        load_mt_basis(rank)


def test_published_pulses_begin_with_an_inversion(real_data):
    real_data("mt-brain/control_MT_v3p2_TR3p5ms_discretized.mat")
    flip_angles, durations = load_mt_pulses()
    assert flip_angles.shape == durations.shape == (1142,)
    assert flip_angles[0] == pytest.approx(np.pi)
    assert np.all((flip_angles > 0) & (flip_angles <= np.pi))
    assert np.all((durations >= 1e-4) & (durations <= 5e-4 * (1 + 1e-9)))


@pytest.mark.filterwarnings("error")
def test_loading_is_silent(real_data, capfd):
    real_data(
        "ivim-abdomen/volunteer1.mat",
        "ivim-abdomen/phantom_flow.mat",
        "mt-brain/basis_for_compress.mat",
        "mt-brain/control_MT_v3p2_TR3p5ms_discretized.mat",
        "mt-brain/invivo_test_slice.mat",
        "relaxometry-brain/t1dataset.npy",
        "relaxometry-brain/t2dataset.npy",
    )
    load_abdomen(1)
    load_mt_basis()
    load_mt_pulses()
    load_mt_slice()
    load_phantom("flow")
    load_relaxometry("t1")
    load_relaxometry("t2")
    assert capfd.readouterr() == ("", "")
