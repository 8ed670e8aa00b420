"""The study of the CRB loss: all of it in small, and what the book's run has left."""

from __future__ import annotations

import numpy as np
import pytest

from qmri import networks, training
from qmri.artefacts import load_arrays, read_manifest
from qmri.mt import MTModel, PulseTrain
from qmri.mt.basis import check_basis, fingerprint
from qmri.sources import DataUnavailable, load_mt_basis
from qmri.studies import crb_loss
from qmri.studies.crb_loss import NETWORKS, SCALES, STORED, VARIANTS, Results, Scale, run

TINY = Scale(
    training=512, validation=64, test=64, epochs=2, variant_epochs=1, paper_epochs=1, replicates=2,
    repeats=5, swept=16, swept_repeats=4, points=3, floor=4, floor_steps=100, fitted=4,
)  # fmt: skip
FILES = {
    "conventional.npz", "fingerprints.npz", "floor.npz", "networks.npz", "physics.npz",
    "planes.npz", "sweep.npz", "test.npz", "training.npz",
}  # fmt: skip


def in_small(patched: pytest.MonkeyPatch) -> None:
    """A short train, small networks, a scale of seconds, and no other processes."""
    train = PulseTrain.default(60)
    compact = networks.compact_fingerprint_network
    paper = ((26, 32, 64, 32, 26, 10, 6, 3), ((1, 3), (0, 4)))
    patched.setattr(crb_loss, "SCALES", {**SCALES, "tiny": TINY})
    patched.setattr(PulseTrain, "default", lambda: train)
    patched.setattr(training, "_cores", lambda: 1)
    patched.setattr(
        crb_loss, "compact_fingerprint_network",
        lambda rank, width, seed: compact(rank, width=width // 8, seed=seed),
    )  # fmt: skip
    patched.setattr(
        crb_loss, "paper_fingerprint_network",
        lambda rank, seed: networks.FingerprintNetwork(*paper, seed=seed),
    )  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Folder of a run from beginning to end."""
    with pytest.MonkeyPatch.context() as patched:
        in_small(patched)
        folder = tmp_path_factory.mktemp("study") / "uninterrupted"
        return run("tiny", protocol="default", out=folder)


@pytest.fixture(scope="module")
def results(tiny) -> Results:
    return Results("default", location=tiny)


class TestInSmall:
    def test_the_manifest_lists_every_file(self, tiny, check_listed):
        check_listed(tiny, FILES)

    def test_the_manifest_says_how_it_was_made(self, tiny):
        manifest = read_manifest(tiny)
        assert manifest.command == "qmri study crb-loss --scale tiny --protocol default"
        assert (manifest.study, manifest.settings["rank"]) == ("crb-loss-default", 13)
        assert {"networks", "variants", "paper-networks", "floor"} < set(manifest.stages)
        assert set(manifest.results["networks"]) == set(STORED)

    def test_results_reads_everything(self, results):
        assert set(results.names()) == set(NETWORKS)
        for name in results.names():
            assert len(results.replicates_of(name)) == (2 if NETWORKS[name].replicates else 1)
            for replicate in results.replicates_of(name):
                tested = results.test(name, replicate)
                assert tested["mean"].shape == tested["sd"].shape == (64, 3)
                assert np.isfinite(tested["mean"]).all() and np.all(tested["sd"] >= 0)
                assert results.sweep(name, replicate)["bias"].shape == (10, 16, 3)
                assert results.plane("T1-T2f", name, replicate)["bias"].shape == (3, 3, 3)
                history = results.history(name, replicate)
                assert len(history["training"]) == (1 if name.startswith("paper") else 2)
        for name in VARIANTS:
            assert results.variant(name)["validation/crb"].shape == (1, 3)

    def test_stored_fingerprints_are_those_of_the_model(self, results, tiny, monkeypatch):
        in_small(monkeypatch)
        basis = load_arrays(tiny / "networks.npz")["basis"]
        part = results.fingerprints()
        model = MTModel(PulseTrain.default(), check_basis(basis, 60))
        expected = model.signal(part.theta[:8].astype(float))
        np.testing.assert_allclose(part.coefficients[:8], expected, atol=2e-6)

    def test_bounds_of_a_test_are_those_of_its_snr(self, results):
        ratio = results.test("crb")["crb"] / results.fingerprints().crb
        np.testing.assert_allclose(ratio[np.isfinite(ratio)], 4.0, rtol=1e-5)  # |M0| is 0.5

    def test_planes_hold_the_rest_at_the_centre(self, results):
        theta = results.plane("m0s-T1", "mse")["theta"]
        assert np.all(np.diff(theta[:, 0, 0]) > 0) and np.all(np.diff(theta[0, :, 1]) > 0)
        np.testing.assert_allclose(theta[..., 2], 0.1, rtol=1e-6)
        np.testing.assert_allclose(theta[..., 6], 1.0)

    def test_shares_are_shares(self, results):
        physics = results.arrays("physics")
        shares = physics["share wider than prior"]
        assert np.all((shares >= 0) & (shares <= 1))
        assert np.all(np.diff(shares, axis=0) >= 0), "less signal, wider bounds"
        assert np.all(physics["complex over real"] >= 1 - 1e-6)
        assert np.all(np.diff(physics["energy outside by rank"], axis=0) < 1e-9)

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda r: r.test("crb", 2), "replicate must be from 0 to 1, got 2"),
            (lambda r: r.test("mle"), "name must be one of crb, mse"),
            (lambda r: r.plane("T2f", "crb"), "plane must be one of T1-T2f"),
            (lambda r: r.variant("wide"), "name must be one of compact"),
        ],
    )
    def test_what_is_not_there_is_refused(self, results, call, message):
        with pytest.raises(ValueError, match=message):
            call(results)


class TestInterrupted:
    def test_the_results_are_the_same(self, tiny, tmp_path, monkeypatch):
        """Once while networks train, once between stages, then to the end."""
        in_small(monkeypatch)
        monkeypatch.setattr(training, "_CHECKPOINT_SECONDS", -1.0)
        one_epoch, epochs = training._FingerprintRun.one_epoch, []

        def train_three_epochs(training_run):
            if len(epochs) == 3:
                raise KeyboardInterrupt
            epochs.append(1)
            one_epoch(training_run)

        def compute_nothing(*_):
            raise KeyboardInterrupt

        folder = tmp_path / "interrupted"
        for owner, name, stop in (
            (training._FingerprintRun, "one_epoch", train_three_epochs),
            (crb_loss._Study, "_sweep", compute_nothing),
        ):
            with monkeypatch.context() as patched:
                patched.setattr(owner, name, stop)
                with pytest.raises(KeyboardInterrupt):
                    run("tiny", protocol="default", out=folder)
            assert not (folder / "manifest.json").exists()
        run("tiny", protocol="default", out=folder)
        first, second = read_manifest(tiny), read_manifest(folder)
        assert first.files == second.files
        assert first.settings == second.settings

    def test_another_seed_is_another_run(self, tiny, monkeypatch):
        in_small(monkeypatch)
        with pytest.raises(ValueError, match="seed is 0 there and 1 now"):
            run("tiny", protocol="default", seed=1, out=tiny)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": "huge"}, "scale must be one of quick, paper"),
        ({"scale": "quick", "protocol": "paper"}, "protocol must be one of published, default"),
    ],
)
def test_unknown_choices_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        run(**arguments)


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
        assert manifest.settings["recipe"] == crb_loss.RECIPE
        assert manifest.settings["paper_recipe"] == crb_loss.PAPER_RECIPE
        assert set(manifest.settings["networks"]) == set(NETWORKS)
        assert set(manifest.settings["variants"]) == set(VARIANTS)

    def test_training_has_taught_something(self, stored):
        """The CRB network is far below a constant answer, which costs hundreds."""
        for replicate in stored.replicates_of("crb"):
            losses = stored.history("crb", replicate)["validation/crb"].mean(axis=1)
            assert losses[-1] < 2
            assert losses[-1] < losses[0] / 2

    @pytest.mark.slow
    def test_the_published_train_gives_the_stored_fingerprints(self, stored):
        """With the public data at hand: the same numbers from the simulator as committed."""
        try:
            train, basis = PulseTrain.published(), load_mt_basis(13)[0]
        except DataUnavailable as error:
            pytest.skip(str(error))
        assert stored.study.settings["train"] == train.fingerprint
        part = stored.fingerprints()
        model = MTModel(train, basis)
        expected = model.signal(part.theta[:64].astype(float))
        np.testing.assert_allclose(part.coefficients[:64], expected, atol=1e-5)
        assert fingerprint(basis) == stored.study.results["networks"]["crb"]["basis"]
