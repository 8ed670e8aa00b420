"""The study of training labels: all of it in small, and what the book's run has left."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from qmri import IVIM, Rician, load_estimator, training
from qmri.artefacts import Stages, load_arrays, read_manifest
from qmri.evaluation import evaluate
from qmri.studies import training_labels
from qmri.studies.training_labels import KEPT, PROTOCOLS, RECIPES, SCALES, Results, Scale, run

TINY = Scale(
    voxels=2000, restarts=3, replicates=2, epochs=3, patience=2, batch=128, repeats=12, wide=1,
    shape_epochs=2, simulated=400, simulated_epochs=2, timed_fits=2, timed_steps=2,
)  # fmt: skip
FILES = {
    "black-box.npz", "grid-snr15.npz", "grid-snr30.npz", "inside.npz", "networks.npz",
    "training.npz",
}  # fmt: skip
MLE = ("mle-rician", "mle-rician-from-mean", "mle-gaussian", "mle-gaussian-from-mean")


def in_small(patched: pytest.MonkeyPatch) -> None:
    """A scale of seconds, in this process: starting others would take longer."""
    patched.setattr(training_labels, "SCALES", {**SCALES, "tiny": TINY})
    patched.setattr(training, "_cores", lambda: 1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Folder of a run from beginning to end."""
    with pytest.MonkeyPatch.context() as patched:
        in_small(patched)
        return run("tiny", out=tmp_path_factory.mktemp("study") / "uninterrupted")


@pytest.fixture(scope="module")
def results(tiny) -> Results:
    return Results(location=tiny)


class TestInSmall:
    def test_the_manifest_lists_every_file(self, tiny, check_listed):
        check_listed(tiny, FILES)

    def test_the_manifest_says_how_it_was_made(self, tiny):
        manifest = read_manifest(tiny)
        assert (manifest.study, manifest.scale, manifest.seed) == ("training-labels", "tiny", 0)
        assert manifest.command == "qmri study training-labels --scale tiny"
        assert manifest.settings["voxels"] == 2000 and manifest.settings["snrs"] == [15, 30]
        assert {"labels-snr15", "networks", "mle-snr30", "shape-deep"} < set(manifest.stages)
        assert all(seconds >= 0 for seconds in manifest.stages.values())

    def test_shares_in_the_manifest_are_shares(self, tiny):
        found = read_manifest(tiny).results
        for snr in ("snr15", "snr30"):
            for label in found["labels"][snr].values():
                on_bounds = [sum(pair) for pair in label["on lower, upper bound"].values()]
                assert max(on_bounds) <= 1 - label["usable"] <= sum(on_bounds) + 0.01
            assert all(0 <= share < 0.5 for share in found["maximum-likelihood"][snr].values())

    def test_results_reads_everything(self, results):
        assert results.label == "tiny scale" and results.snrs == (15, 30)
        for snr in results.snrs:
            assert set(results.names(snr)) == {*RECIPES, *KEPT, *MLE}
            for name in results.names(snr):
                found = results.all_statistics(snr, name)
                assert len(found) == (1 if name in MLE else TINY.replicates)
                for statistics in found:
                    assert statistics.repeats == TINY.repeats
                    assert np.isfinite(statistics.mean).all()
                    for counts in statistics.histograms.values():
                        assert counts.sum() == 1000 * TINY.repeats
        jobs = 2 * len(RECIPES) * TINY.replicates - TINY.replicates
        assert results.training("networks")["best"].shape == (jobs,)
        assert results.training("restarts")["validation"].shape == (3, 3)
        for shape, layers in (("standard", 3), ("wide", 3), ("deep", 10)):
            width = 150 if shape == "wide" else 10
            weights = 11 * width + (layers - 1) * (width + 1) * width + 4 * (width + 1)
            assert results.training("shapes")[f"{shape}/weights"] == weights
            assert np.isfinite(results.training("shapes")[f"{shape}/test"]).all()

    def test_maximum_likelihood_hardly_depends_on_its_start(self, results):
        for kind in ("mle-rician", "mle-gaussian"):
            from_truth, from_mean = (
                results.statistics(30, name).mean for name in (kind, f"{kind}-from-mean")
            )
            assert np.mean(np.isclose(from_truth, from_mean, rtol=1e-3)) > 0.97

    def test_the_best_restarts_are_the_networks_on_the_truth(self, results, tiny):
        restarts = results.training("restarts")
        order = np.argsort(restarts["best"])[: TINY.replicates]
        np.testing.assert_array_equal(restarts["chosen"], order)
        stored = load_arrays(tiny / "networks.npz")
        chosen = load_arrays(tiny.parent / ".work" / "uninterrupted-tiny" / "restarts.npz")
        for name in ("weights.0", "biases.3"):
            np.testing.assert_array_equal(
                stored[f"snr30/supervised-gt/{name}"], chosen[f"best/{name}"]
            )

    def test_signals_inside_the_bounds_are_a_part_of_all(self, results):
        for snr in results.snrs:
            inside = results.inside(snr)
            on_bound = results.study.results["maximum-likelihood"][f"snr{snr}"]
            assert inside["share"] == pytest.approx(1 - on_bound["mle-rician, on a bound"])
            assert 0 < inside["nodes"] <= 1000
            # Nobody is better than himself; errors in the middle are smaller than all errors.
            assert not inside["mle-rician/wins/rmse"].any()
            everywhere = np.mean(results.statistics(snr, "mle-rician").rmse[:, 3])
            assert inside["mle-rician/rmse"][0, 3] < everywhere

    def test_both_snrs_have_the_same_tissue_and_noise_of_their_own(self):
        study = training_labels._Study(TINY, PROTOCOLS["paper"], seed=0)
        low, high = study._dataset(15), study._dataset(30)
        np.testing.assert_array_equal(low.theta, high.theta)
        noise = [(d.signals - d.model.signal(d.theta))[:, 0] for d in (low, high)]
        assert np.std(noise[0]) / np.std(noise[1]) == pytest.approx(2, rel=4 / np.sqrt(2000))
        assert abs(np.corrcoef(noise)[0, 1]) < 4 / np.sqrt(2000)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Folder of a run for the volunteers' b-values, at two of their SNRs."""
    smaller = replace(PROTOCOLS["abdomen"], snrs=(7, 22))
    with pytest.MonkeyPatch.context() as patched:
        in_small(patched)
        patched.setattr(training_labels, "PROTOCOLS", {**PROTOCOLS, "abdomen": smaller})
        return run("tiny", protocol="abdomen", out=tmp_path_factory.mktemp("study") / "other")


class TestOtherProtocol:
    """Fewer networks, no further questions, at more SNRs."""

    def test_it_holds_networks_and_their_test_and_nothing_else(self, other):
        manifest = read_manifest(other)
        assert set(manifest.files) == {
            "grid-snr7.npz", "grid-snr22.npz", "networks.npz", "training.npz",
        }  # fmt: skip
        assert manifest.study == "training-labels-abdomen"
        assert manifest.command.endswith("--scale tiny --protocol abdomen")
        assert manifest.settings["replicates"] == 1
        assert not {"wide", "simulated", "timed_fits"} & set(manifest.settings)

    def test_results_read_it(self, other):
        found = Results("abdomen", location=other)
        assert found.snrs == (7, 22)
        for snr in found.snrs:
            assert set(found.names(snr)) == {*PROTOCOLS["abdomen"].recipes, *MLE}

    def test_its_snrs_leave_no_gap(self):
        """Where S0 of training ends for one SNR, it has begun for the next."""
        snrs = PROTOCOLS["abdomen"].snrs
        low, high = IVIM(PROTOCOLS["abdomen"].bvalues).training[0]
        for one, following in itertools.pairwise(snrs):
            assert high * one >= low * following


class TestInterrupted:
    def test_the_results_are_the_same(self, tiny, tmp_path, monkeypatch):
        """Once while networks train, once between stages, then to the end."""
        in_small(monkeypatch)
        monkeypatch.setattr(training, "_CHECKPOINT_SECONDS", -1.0)
        begun, one_epoch = [], training._Run.one_epoch

        def train_many_once(training_run, *arguments):
            if len(training_run.best_epoch) > 10 and training_run.epoch == 2:
                raise KeyboardInterrupt
            one_epoch(training_run, *arguments)

        def evaluate_none(*_):
            raise KeyboardInterrupt

        folder = tmp_path / "interrupted"
        for owner, name, stop in (
            (training._Run, "one_epoch", train_many_once),
            (training_labels._Study, "_test", evaluate_none),
        ):
            with monkeypatch.context() as patched:
                patched.setattr(owner, name, stop)
                with pytest.raises(KeyboardInterrupt):
                    run("tiny", out=folder)
            assert not folder.exists()
            work = tmp_path / ".work" / "interrupted-tiny"
            begun.append({path.stem for path in work.glob("*.npz")})
        assert begun[0] == {"labels-snr15", "labels-snr30", "restarts"}
        assert begun[1] == {*begun[0], "networks", "mle-snr15", "mle-snr30"}

        run("tiny", out=folder)
        for file in FILES:
            expected, found = load_arrays(tiny / file), load_arrays(folder / file)
            assert list(found) == list(expected)
            for name, values in expected.items():
                if not name.startswith("seconds/"):
                    np.testing.assert_array_equal(found[name], values, err_msg=f"{file} {name}")

    def test_another_seed_does_not_go_on_with_it(self, tiny, monkeypatch):
        in_small(monkeypatch)
        with pytest.raises(ValueError, match="seed is 0 there and 1 now.*--fresh"):
            run("tiny", seed=1, out=tiny)


class TestRefused:
    def test_scales_and_protocols_that_do_not_exist(self, tmp_path):
        with pytest.raises(ValueError, match="scale must be one of quick, paper, got 'huge'"):
            run("huge", out=tmp_path / "out")
        with pytest.raises(ValueError, match="protocol must be one of paper, abdomen, got 'brain'"):
            run("quick", protocol="brain", out=tmp_path / "out")
        with pytest.raises(ValueError, match="protocol must be one of paper, abdomen, got 'brain'"):
            Results("brain")
        assert list(tmp_path.iterdir()) == []

    def test_results_that_there_are_not(self, results):
        with pytest.raises(ValueError, match=r"snr must be one of 15, 30, got 20"):
            results.statistics(20, "supervised-gt")
        with pytest.raises(ValueError, match="among those tested, .*self-.* got 'supervised'"):
            results.statistics(15, "supervised")
        with pytest.raises(ValueError, match="0 to 1, got 'supervised-gt' and 2"):
            results.statistics(15, "supervised-gt", replicate=2)
        with pytest.raises(ValueError, match="restarts, networks or shapes, got 'epochs'"):
            results.training("epochs")

    def test_a_folder_that_holds_something_else(self, tmp_path, monkeypatch):
        in_small(monkeypatch)
        work = tmp_path / ".work" / "out-tiny"
        work.mkdir(parents=True)
        (work / "thesis.txt").write_text("mine", encoding="utf-8")
        with pytest.raises(ValueError, match="thesis.txt"):
            run("tiny", out=tmp_path / "out", fresh=True)
        assert (work / "thesis.txt").read_text(encoding="utf-8") == "mine"
        with pytest.raises(ValueError, match="thesis.txt"):
            Stages(work, {})


@pytest.fixture(scope="module")
def stored() -> Results:
    return Results()


class TestOfTheBook:
    """What is committed in ``data/training-labels``."""

    def test_files_are_those_of_the_code(self, stored):
        assert set(stored.study.manifest.files) == FILES

    def test_every_network_was_trained_and_tested(self, stored):
        weights = stored.study.arrays("networks.npz")
        for snr in stored.snrs:
            assert set(stored.names(snr)) == {*RECIPES, *KEPT, *MLE}
            for name in RECIPES:
                for layer in range(4):
                    values = weights[f"snr{snr}/{name}/weights.{layer}"]
                    assert len(values) == stored.replicates >= 3
                    assert np.isfinite(values).all()
                assert len(stored.all_statistics(snr, name)) == stored.replicates

    def test_its_settings_are_those_of_its_scale(self, stored):
        settings, scale = stored.study.settings, SCALES[stored.study.scale]
        for name, value in vars(scale).items():
            if not name.startswith("timed_"):
                assert settings[name] == value, name
        assert tuple(settings["bvalues"]) == PROTOCOLS["paper"].bvalues
        assert tuple(settings["recipes"]) == RECIPES

    @pytest.mark.parametrize("snr", [15, 30])
    @pytest.mark.parametrize("name", RECIPES)
    def test_statistics_are_those_of_the_stored_networks(self, stored, snr, name):
        """Tested again on other noise, all means agree within what noise allows."""
        repeats = 10
        for replicate in range(stored.replicates):
            network = load_estimator(f"ivim/snr{snr}/{name}", replicate=replicate)
            again = evaluate(network, stored.grid, Rician(1 / snr), repeats, seed=99)
            before = stored.statistics(snr, name, replicate)
            sd = before.sd * np.sqrt(1 / repeats + 1 / before.repeats)
            z = (again.mean - before.mean) / np.maximum(sd, 1e-6)
            # 1000 nodes, 4 parameters that are not independent: known to a few hundredths.
            assert np.sqrt(np.mean(z**2)) == pytest.approx(1, abs=0.1)
