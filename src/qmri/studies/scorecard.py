"""The scorecard: what the papers claim, what was measured here, and a verdict by rule.

Each claim is broken into comparisons that either hold or do not. They were chosen before the
numbers were seen, but for the slopes of A4, which came later and change no verdict.
All of them hold: reproduced. More than half: partly. Fewer: not reproduced.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from qmri.evaluation import (
    GridStatistics,
    difference_map,
    marginal,
    mutual_information,
    slope,
    summary,
)
from qmri.models import Array
from qmri.studies.training_labels import Results

__all__ = ["Row", "as_markdown", "count", "part_a", "pm"]

PARAMETERS = ("f", "Dslow", "Dfast")
METRICS = ("bias", "sd", "rmse")
LIKELIHOOD_LIKE = ("mle-rician", "self-supervised", "supervised-mle-rician")


@dataclass(frozen=True)
class Row:
    """One claim and what became of it.

    Attributes
    ----------
    id : str
        As in the list of claims, e.g. ``"A1"``.
    claim : str
        In our words.
    figure : str
        Of the paper.
    measured : str
        What was found, with numbers.
    held, compared : int
        Comparisons that hold, of how many.
    """

    id: str
    claim: str
    figure: str
    measured: str
    held: int
    compared: int

    @property
    def verdict(self) -> str:
        """ "reproduced", "partly" or "not reproduced", by the rule of this module."""
        if self.held == self.compared:
            return "reproduced"
        return "partly" if 2 * self.held > self.compared else "not reproduced"


def as_markdown(rows: Sequence[Row]) -> str:
    """A table with one line for each row, and below it what was measured for each."""
    lines = ["| | Verdict | Claim | Figure | Comparisons that hold |", "|:---|:---|:---|:---|:---|"]
    lines += [
        f"| {r.id} | **{r.verdict}** | {r.claim} | {r.figure} | {r.held} of {r.compared} |"
        for r in rows
    ]
    return "\n".join([*lines, "", *(f"- **{r.id}**: {r.measured}." for r in rows)])


def part_a(results: Results) -> list[Row]:
    """Claims A1 to A11 and A14 of the first paper, scored from a stored study.

    Parameters
    ----------
    results : Results
        Of the paper's protocol.

    References
    ----------
    Epstein et al. {cite}`epstein2024labels`.
    """
    score = _PartA(results)
    return [
        score.a1(), score.a2(), score.a3(), score.a4(), score.a5(), score.a6(), score.a7(),
        score.a8(), score.a9(), score.a10(), score.a11(), score.a14(),
    ]  # fmt: skip


class _PartA:
    def __init__(self, results: Results):
        self.results = results
        self.snrs, self.grid = results.snrs, results.grid
        self.replicates = range(results.replicates)
        self._summary = cache(self._summarised)

    # --- access ------------------------------------------------------------------------------

    def statistics(self, snr: int, name: str, replicate: int = 0) -> GridStatistics:
        return self.results.statistics(snr, name, 0 if name.startswith("mle-") else replicate)

    def _summarised(self, snr: int, name: str, replicate: int) -> dict:
        return summary(self.statistics(snr, name, replicate))

    def number(self, snr: int, name: str, parameter: str, metric: str) -> Array:
        """Of each replicate, (replicates,)."""
        return np.array([self._summary(snr, name, r)[parameter][metric] for r in self.replicates])

    def cases(self) -> list[tuple[int, str]]:
        return [(snr, parameter) for snr in self.snrs for parameter in PARAMETERS]

    def columns(self) -> list[int]:
        return [self.results.model.names.index(p) for p in PARAMETERS]

    # --- claims ------------------------------------------------------------------------------

    def a1(self) -> Row:
        held = {metric: [] for metric in METRICS}
        for snr, parameter in self.cases():
            for rival in LIKELIHOOD_LIKE:
                for metric in METRICS:
                    gt = self.number(snr, "supervised-gt", parameter, metric).mean()
                    other = self.number(snr, rival, parameter, metric).mean()
                    held[metric].append(gt > other if metric == "bias" else gt < other)
        low = min(self.snrs)
        example = "; ".join(
            f"{_LABEL[m]} {pm(self.number(low, 'supervised-gt', 'Dfast', m))} against "
            f"{self.number(low, 'mle-rician', 'Dfast', m)[0]:.3g} of MLE and "
            f"{pm(self.number(low, 'supervised-mle-rician', 'Dfast', m))} of SupervisedMLE"
            for m in METRICS
        )
        counts = ", ".join(f"{_LABEL[m]} {sum(h)} of {len(h)}" for m, h in held.items())
        return Row(
            "A1",
            "SupervisedGT has more bias, less SD and less RMSE than the methods that follow the "
            "likelihood",
            "2, 3",
            f"as claimed: {counts}. Dfast at SNR {low} (µm²/ms): {example}",
            *count(held.values()),
        )

    def a2(self) -> Row:
        followers = ("self-supervised", "supervised-mle-rician", "supervised-mle-gaussian")
        held, ratios = [], {name: [] for name in followers}
        for snr, parameter in self.cases():
            for metric in METRICS:
                far = self._distance(snr, "supervised-gt", parameter, metric)
                for name in followers:
                    near = self._distance(snr, name, parameter, metric)
                    held.append(near < far)
                    ratios[name].append(near / far)
        text = "; ".join(f"{_NAME[n]} {np.median(r):.2f}" for n, r in ratios.items())
        return Row(
            "A2",
            "Self-supervised and SupervisedMLE behave like conventional MLE",
            "2, 3",
            "distance of the marginal curves to MLE's, as a share of SupervisedGT's distance "
            f"(median): {text}",
            *count([held]),
        )

    def _distance(self, snr: int, name: str, parameter: str, metric: str) -> float:
        """Root mean square over the levels, mean over the replicates."""

        def curve(estimator: str, replicate: int) -> Array:
            found = self.statistics(snr, estimator, replicate)
            return marginal(self.grid, getattr(found, metric), parameter).mean

        reference = curve("mle-rician", 0)
        return float(
            np.mean([np.sqrt(np.mean((curve(name, r) - reference) ** 2)) for r in self.replicates])
        )

    def a3(self) -> Row:
        held, text = [], []
        for snr, parameter in self.cases():
            gt = self.number(snr, "supervised-gt", parameter, "slope")
            held.append(gt.mean() < 1)
            for rival in LIKELIHOOD_LIKE:
                held.append(gt.mean() < self.number(snr, rival, parameter, "slope").mean())
            mle = self.number(snr, "mle-rician", parameter, "slope")[0]
            text.append(f"{parameter} {pm(gt)} (MLE {mle:.2f})")
        halves = len(PARAMETERS)
        shown = "; ".join(
            f"SNR {snr}: " + ", ".join(text[k * halves : (k + 1) * halves])
            for k, snr in enumerate(self.snrs)
        )
        return Row(
            "A3",
            "SupervisedGT compresses the parameter space: estimates crowd to the centre",
            "2, 4",
            f"slope of the mean estimate against the truth, {shown}",
            *count([held]),
        )

    def a4(self) -> Row:
        held = {"slope": [], "information": []}
        text = []
        levels = self.grid.axes["Dfast"]
        constant = float(np.mean(np.abs(levels - levels.mean())))  # mean over nodes, as below
        for snr in self.snrs:

            def of_dfast(name: str, metric: str, snr: int = snr) -> Array:
                return self.number(snr, name, "Dfast", metric)

            for rival in LIKELIHOOD_LIKE:
                lower = of_dfast("supervised-gt", "rmse").mean() < of_dfast(rival, "rmse").mean()
                for measure, comparisons in held.items():
                    own = of_dfast("supervised-gt", measure).mean()
                    comparisons.append(lower and own < of_dfast(rival, measure).mean())
            text.append(
                f"SNR {snr}: SupervisedGT RMSE {pm(of_dfast('supervised-gt', 'rmse'))}, slope "
                f"{pm(of_dfast('supervised-gt', 'slope'))}, "
                f"{pm(of_dfast('supervised-gt', 'information'))} bits; MLE "
                f"{of_dfast('mle-rician', 'rmse')[0]:.3g}, "
                f"{of_dfast('mle-rician', 'slope')[0]:.2f}, "
                f"{of_dfast('mle-rician', 'information')[0]:.2f} bits"
            )
        counts = ", ".join(f"{k} {sum(h)} of {len(h)}" for k, h in held.items())
        return Row(
            "A4",
            "A low RMSE can hide an estimator with hardly any information (Dfast)",
            "2, 4",
            f"lower RMSE and lower …: {counts}. "
            + ". ".join(text)
            + f". Always answering the mean: RMSE {constant:.3g}, slope 0, 0 bits of at most "
            f"{np.log2(len(levels)):.2f}",
            *count(held.values()),
        )

    def a5(self) -> Row:
        held, text = [], []
        for snr in self.snrs:
            for parameter in PARAMETERS:
                special = f"supervised-mle-rician-{parameter.lower()}"
                for metric in ("bias", "sd", "rmse") if parameter == "Dfast" else ("rmse",):
                    plain = self.number(snr, "supervised-mle-rician", parameter, metric)
                    emphasised = self.number(snr, special, parameter, metric)
                    held.append(emphasised.mean() < plain.mean())
                    change = 100 * (emphasised.mean() / plain.mean() - 1)
                    text.append(f"{parameter} {_LABEL[metric]} {change:+.0f} % (SNR {snr})")
        return Row(
            "A5",
            "Overweighting one parameter by 1e6 improves it; Dfast in accuracy and precision",
            "8",
            "change against equal weights: "
            + ", ".join(text)
            + "; Dfast RMSE among signals whose MLE is inside the bounds: "
            + ", ".join(self._inside_change(snr) for snr in self.snrs),
            *count([held]),
        )

    def _inside_change(self, snr: int) -> str:
        found, column = self.results.inside(snr), self.results.model.names.index("Dfast")
        plain, special = (
            found[f"supervised-mle-rician{suffix}/rmse"][:, column].mean()
            for suffix in ("", "-dfast")
        )
        return f"{100 * (special / plain - 1):+.0f} % (SNR {snr})"

    def a6(self) -> Row:
        snr, held = min(self.snrs), []
        low, high = self.grid.axes["Dslow"][[0, -1]]
        top = (low + (high - low) * 2 / 3, high)
        tilt, bits = {}, {}
        for kind in ("rician", "gaussian"):
            name = f"supervised-mle-{kind}"
            found = [self.statistics(snr, name, r) for r in self.replicates]
            tilt[kind] = np.array([slope(s, "Dslow", within=top) - 1 for s in found])
            bits[kind] = np.array([mutual_information(s, "Dslow") for s in found])
        held += list(np.abs(tilt["rician"]) < np.abs(tilt["gaussian"]))
        held += list(bits["rician"] > bits["gaussian"])
        return Row(
            "A6",
            "Rician labels beat Gaussian labels at low SNR and high Dslow: flatter bias, more "
            "information",
            "2, 9",
            f"SNR {snr}, slope of the Dslow bias in the top third of its range: "
            f"{pm(tilt['rician'])} against {pm(tilt['gaussian'])}; information on Dslow: "
            f"{pm(bits['rician'])} against {pm(bits['gaussian'])} bits",
            *count([held]),
        )

    def a7(self) -> Row:
        held, text = [], []
        for snr in self.snrs:
            for metric in METRICS:
                teacher = np.abs(getattr(self.statistics(snr, "mle-rician"), metric))
                wins = []  # (replicates, parameters)
                for r in self.replicates:
                    pupil = getattr(self.statistics(snr, "supervised-mle-rician", r), metric)
                    wins.append(np.mean(np.abs(pupil) < teacher, axis=0)[self.columns()])
                held += list(np.mean(wins, axis=0) > 0.5)
                share = 100 * np.mean(wins, axis=1)
                text.append(f"{_LABEL[metric]} {pm(share)} % (SNR {snr})")
        return Row(
            "A7",
            "SupervisedMLE often has lower bias, SD and RMSE than the MLE that labelled it",
            "2, 3",
            "nodes of the grid at which the network wins, over f, Dslow and Dfast: "
            + ", ".join(text)
            + "; RMSE among signals whose MLE is inside the bounds: "
            + ", ".join(self._inside_wins(snr) for snr in self.snrs),
            *count([held]),
        )

    def _inside_wins(self, snr: int) -> str:
        found = self.results.inside(snr)["supervised-mle-rician/wins/rmse"]
        return f"{pm(100 * found[:, self.columns()].mean(axis=1))} % (SNR {snr})"

    def a8(self) -> Row:
        held, text = [], []
        for snr in self.snrs:
            for metric in ("bias", "sd"):
                shares = []
                for parameter in PARAMETERS:
                    middle, a, b = (
                        self.number(snr, name, parameter, metric).mean()
                        for name in ("hybrid-0.5", "supervised-gt", "supervised-mle-rician")
                    )
                    held.append(min(a, b) < middle < max(a, b))
                for r in self.replicates:
                    values = [
                        getattr(self.statistics(snr, name, r), metric)[:, self.columns()]
                        for name in ("hybrid-0.5", "supervised-gt", "supervised-mle-rician")
                    ]
                    if metric == "bias":
                        values = [v + self.grid.theta[:, self.columns()] for v in values]
                    middle, a, b = values
                    between = (np.minimum(a, b) <= middle) & (middle <= np.maximum(a, b))
                    shares.append(100 * between.mean())
                text.append(
                    f"{'mean estimate' if metric == 'bias' else 'SD'} {pm(np.array(shares))} % "
                    f"(SNR {snr})"
                )
        return Row(
            "A8",
            "The hybrid of alpha = 0.5 lies between its two parents",
            "10",
            "nodes at which it lies between them: " + ", ".join(text),
            *count([held]),
        )

    def a9(self) -> Row:
        found, held, text = self.results.training("shapes"), [], []
        for name in np.unique(found["standard/recipe"]):
            loss = {
                shape: found[f"{shape}/test"][found[f"{shape}/recipe"] == name]
                for shape in ("standard", "wide", "deep")
            }
            spread = loss["standard"].std()
            held += [loss[s].mean() > loss["standard"].mean() - spread for s in ("wide", "deep")]
            text.append(
                f"{_NAME[str(name)]}: "
                + ", ".join(
                    f"{shape} ({int(found[f'{shape}/weights'])} weights) {pm(values)}"
                    for shape, values in loss.items()
                )
            )
        return Row(
            "A9",
            "Wider (150 units) and deeper (10 layers) networks do no better",
            "text",
            f"weighted squared error on the test grid at SNR {max(self.snrs)}: " + "; ".join(text),
            *count([held]),
        )

    def a10(self) -> Row:
        held, text = [], []
        levels = self.grid.axes["Dslow"]
        for snr in self.snrs:
            for at in levels[[1, -2]]:
                share = np.mean([self._reversed(snr, float(at), p) for p in PARAMETERS])
                held.append(share > 0.1)
                text.append(f"{100 * share:.0f} % at Dslow {at:.2f} (SNR {snr})")
        return Row(
            "A10",
            "Marginal plots can mislead: the ranking differs by region of (f, Dfast)",
            "11, 12",
            "nodes at which SupervisedGT and SupervisedMLE rank by RMSE against their marginal "
            "ranking, in every replicate: " + ", ".join(text) + "; more than a tenth counts",
            *count([held]),
        )

    def _reversed(self, snr: int, dslow: float, parameter: str) -> float:
        maps = np.array(
            [
                difference_map(
                    self.statistics(snr, "supervised-gt", r),
                    self.statistics(snr, "supervised-mle-rician", r),
                    "rmse",
                    parameter,
                    {"Dslow": dslow},
                )
                for r in self.replicates
            ]
        )
        overall = np.sign(maps.mean())
        return float(np.mean(np.all(np.sign(maps) == -overall, axis=0)))

    def a11(self) -> Row:
        found = self.results.arrays("black-box")
        v = found["parameters"].tolist().index("v")

        def of_v(quantity: str, name: str) -> Array:
            return found[f"{quantity}/{name}"][:, v]

        constant = of_v("rmse", "always the mean").mean()
        held = [
            *(of_v("rmse", "supervised-mle") < constant),
            *(of_v("slope", "supervised-mle") > 0.5),
        ]
        others = {
            "MLE": "mle",
            "SupervisedMLE": "supervised-mle",
            "Self-supervised through its derivative, which is 0": "self-supervised",
            "Self-supervised with differences in its place": "self-supervised-differences",
        }
        text = "; ".join(
            f"{label} {pm(of_v('rmse', name))} (slope {pm(of_v('slope', name))})"
            for label, name in others.items()
        )
        return Row(
            "A11",
            "A signal model that is not differentiable can still be learnt from MLE labels",
            "text",
            f"RMSE of the blood's speed v (mm/s), against {constant:.3g} of always answering the "
            f"mean: {text}",
            *count([held]),
        )

    def a14(self) -> Row:
        held, text = [], []
        for name in ("supervised-gt", "supervised-mle-rician"):
            for snr in self.snrs:
                change = []
                for parameter in PARAMETERS:
                    plain = self.number(snr, name, parameter, "rmse")
                    absolute = self.number(snr, f"{name}-mae", parameter, "rmse")
                    held.append(absolute.mean() < plain.mean())
                    change.append(
                        f"{parameter} {100 * (absolute.mean() / plain.mean() - 1):+.0f} %"
                    )
                text.append(f"{_NAME[name]} (SNR {snr}): {', '.join(change)}")
        return Row(
            "A14",
            "Left open by the paper: is a mean absolute error better than a squared one?",
            "text",
            "change of RMSE with the absolute error: " + "; ".join(text),
            *count([held]),
        )


_LABEL = {"bias": "mean bias", "sd": "SD", "rmse": "RMSE"}
_NAME = {
    "self-supervised": "Self-supervised",
    "supervised-gt": "SupervisedGT",
    "supervised-mle-rician": "SupervisedMLE Rician",
    "supervised-mle-gaussian": "SupervisedMLE Gaussian",
}


def count(parts: Iterable[Sequence[bool]]) -> tuple[int, int]:
    every = [bool(value) for part in parts for value in part]
    return sum(every), len(every)


def pm(values: Array) -> str:
    """Mean, and SD over replicates where there are several, to three digits and one."""
    if len(values) < 2:
        return f"{values.mean():.3g}"
    spread = values.std(ddof=1)
    return f"{values.mean():.3g} ± {spread:.{0 if spread >= 1 else 1}{'f' if spread >= 1 else 'g'}}"
