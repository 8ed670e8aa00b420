"""The second half of the scorecard: the claims about the CRB loss, by the rule of `scorecard`.

Comparisons were chosen before the numbers of full size were seen; quick runs had been looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from qmri.models import Array
from qmri.studies.crb_loss import TARGETS, Results
from qmri.studies.scorecard import Row, count, pm

__all__ = ["ABOUT", "SIMILAR", "SWEPT", "part_b"]

ABOUT = 0.25  # a loss is about 1 if it is no farther from it
SIMILAR = 0.10  # of a loss: a change that hardly matters
MANY = 1000.0  # a network takes thousands of times less time than a fit
OTHER_MINIMUM = 1.0  # in units of the noise variance: more than rounding
SWEPT = (
    "half the rate", "twice the rate", "rate halved in steps", "batches of 128", "batches of 512",
    "128 wide", "384 wide",
)  # fmt: skip
UNIT = {"m0s": (1.0, ""), "T1": (1.0, " s"), "T2f": (1e3, " ms")}


def part_b(results: Results) -> list[Row]:
    """Claims B1 to B7 and B10 to B12 of the second paper, scored from a stored study.

    Parameters
    ----------
    results : Results

    References
    ----------
    Zhang et al. {cite}`zhang2022crb`.
    """
    score = _PartB(results)
    return [
        score.b1(), score.b2(), score.b3(), score.b4(), score.b5(), score.b6(), score.b7(),
        score.b10(), score.b11(), score.b12(),
    ]  # fmt: skip


class _PartB:
    def __init__(self, results: Results):
        self.results = results
        self.test = results.fingerprints()

    # --- access ------------------------------------------------------------------------------

    def pairs(self) -> list[tuple[tuple[str, int], tuple[str, int]]]:
        """Networks of the two losses that are compared: each training, and the paper's own."""
        compact = [(("crb", r), ("mse", r)) for r in self.results.replicates_of("crb")]
        return [*compact, (("paper-crb", 0), ("paper-mse", 0))]

    def measured(self, loss: str, measure: Callable[[str, int], float]) -> tuple[Array, float]:
        """Of every training of the compact network, and of the paper's network."""
        compact = np.array([measure(loss, r) for r in self.results.replicates_of(loss)])
        return compact, measure(f"paper-{loss}", 0)

    def against(self, measure: Callable[[str, int], float], factor: float = 1.0) -> str:
        """ "with the CRB loss against with the squared error", of both networks."""
        (crb, paper_crb), (mse, paper_mse) = (self.measured(n, measure) for n in ("crb", "mse"))
        return (
            f"{pm(factor * crb)} against {pm(factor * mse)} (the paper's "
            f"network: {factor * paper_crb:.3g} against {factor * paper_mse:.3g})"
        )

    def compared(self, measure: Callable[[str, int], float]) -> list[bool]:
        """Whether the measure is smaller with the CRB loss."""
        return [measure(*crb) < measure(*mse) for crb, mse in self.pairs()]

    # --- claims ------------------------------------------------------------------------------

    def b1(self) -> Row:
        def level(name: str, replicate: int) -> float:
            return float(self.results.history(name, replicate)["validation/crb"][-1].mean())

        def fluctuation(name: str, replicate: int) -> float:
            """Typical change from epoch to epoch in the middle third, of its own loss."""
            own = "crb" if "crb" in name else "squared"
            losses = self.results.history(name, replicate)[f"validation/{own}"].mean(axis=1)
            middle = np.log(losses[len(losses) // 3 : 2 * len(losses) // 3 + 1])
            return float(np.abs(np.diff(middle)).mean()) if len(middle) > 1 else 0.0

        held = [[abs(level(*crb) - 1) < ABOUT for crb, _ in self.pairs()]]
        held.append([fluctuation(*crb) < fluctuation(*mse) for crb, mse in self.pairs()])
        compact, paper = self.measured("crb", level)
        floor = self.results.study.results["floor"]
        change = self.against(lambda n, r: 100 * fluctuation(n, r))
        return Row(
            "B1",
            "The CRB loss converges to about 1, steadily; the squared error says little and "
            "fluctuates",
            "1",
            f"validation CRB loss at the end: {pm(compact)} (the paper's network: "
            f"{paper:.3g}), where the smallest possible is {floor['loss']:.2f} ± "
            f"{floor['standard error']:.2f}: below 1, as these networks use what they know of "
            f"the tissue. Change of the own loss per epoch, per cent: {change}",
            *count(held),
        )

    def b2(self) -> Row:
        def bias(name: str, replicate: int) -> float:
            found = self.results.plane("T1-T2f", name, replicate)
            return float(np.abs(found["bias"][..., 2]).mean())

        return Row(
            "B2",
            "The bias of T2f on the plane of T1 and T2f is smaller with the CRB loss",
            "2",
            f"mean absolute bias in ms: {self.against(bias, 1e3)}; the paper has 5.23 against 14.1",
            *count([self.compared(bias)]),
        )

    def b3(self) -> Row:
        def spread(target: int) -> Callable[[str, int], float]:
            def measure(name: str, replicate: int) -> float:
                ratio = self._ratio(name, replicate)[:, target]
                low, high = np.quantile(np.log(ratio[np.isfinite(ratio)]), (0.25, 0.75))
                return float(high - low)

            return measure

        def middle(name: str) -> str:
            ratio = np.concatenate([
                self._ratio(name, r) for r in self.results.replicates_of(name)
            ])  # fmt: skip
            return ", ".join(
                f"{t} {m:.2f}" for t, m in zip(TARGETS, np.nanmedian(ratio, axis=0), strict=True)
            )

        measures = [spread(t) for t in range(len(TARGETS))]
        text = "; ".join(
            f"{t} {self.against(m)}" for t, m in zip(TARGETS, measures, strict=True)
        )  # fmt: skip
        return Row(
            "B3",
            "The standard deviation follows the square root of the bound with the CRB loss, not "
            "with the squared error",
            "2, 4",
            "interquartile range of the logarithm of their ratio (0 if it follows exactly): "
            f"{text}. Median ratio with the CRB loss: {middle('crb')}; with the squared error: "
            f"{middle('mse')}",
            *count([self.compared(m) for m in measures]),
        )

    def _ratio(self, name: str, replicate: int) -> Array:
        found = self.results.test(name, replicate)
        with np.errstate(divide="ignore"):
            return np.where(found["sd"] > 0, found["sd"] / np.sqrt(found["crb"]), np.nan)

    def b4(self) -> Row:
        def width(target: int) -> Callable[[str, int], float]:
            def measure(name: str, replicate: int) -> float:
                bias = self.results.test(name, replicate)["bias"][:, target]
                low, high = np.quantile(bias, (0.1, 0.9))
                return float(high - low)

            return measure

        measures = [width(t) for t in range(len(TARGETS))]
        text = "; ".join(
            f"{t}{UNIT[t][1] and ' (' + UNIT[t][1].strip() + ')'} {self.against(m, UNIT[t][0])}"
            for t, m in zip(TARGETS, measures, strict=True)
        )
        return Row(
            "B4",
            "Histograms of the bias are narrower with the CRB loss",
            "3",
            f"from the 10 % to the 90 % quantile of the bias over the test set: {text}",
            *count([self.compared(m) for m in measures]),
        )

    def b5(self) -> Row:
        held, text = [], []
        inside = [k for k, snr in enumerate(self.results.snrs) if 10 <= snr <= 100]
        for crb, mse in self.pairs():
            for k in inside:
                own, other = self._split(*crb), self._split(*mse)
                held += [own["variance"][k] > own["bias"][k]]
                held += [other["bias"][k] > other["variance"][k]]
        for name in ("crb", "mse", "paper-crb", "paper-mse"):
            shares = []
            for snr in (10.0, 50.0, 100.0):
                k = self.results.snrs.index(snr)
                share = [
                    self._split(name, r)["bias"][k]
                    / (self._split(name, r)["bias"][k] + self._split(name, r)["variance"][k])
                    for r in self.results.replicates_of(name)
                ]
                shares.append(f"{100 * np.mean(share):.0f} % at {snr:g}")
            text.append(f"{name}: {', '.join(shares)}")
        return Row(
            "B5",
            "Bias dominates the loss of the network taught by the squared error, variance that of "
            "the one taught by the CRB loss, for SNRmax 10 to 100",
            "5",
            "share of the squared bias in the CRB loss by SNRmax: " + "; ".join(text),
            *count([held]),
        )

    def _split(self, name: str, replicate: int) -> dict[str, Array]:
        """Parts of the CRB loss at each SNR."""
        found = self.results.sweep(name, replicate)
        return {part: values.mean(axis=(1, 2)) for part, values in found.items()}

    def b6(self) -> Row:
        held, text = [], []
        for t, target in enumerate(TARGETS):
            bias = {
                name: np.mean([
                    np.abs(self.results.test(name, r)["bias"][:, t])
                    for r in self.results.replicates_of(name)
                ], axis=0)
                for name in ("crb", "mse")
            }  # fmt: skip
            deciles = self._deciles(t)
            lower = [bias["crb"][d].mean() < bias["mse"][d].mean() for d in deciles]
            held += lower[:-1]
            factor, unit = UNIT[target]
            whole = (factor * bias[n].mean() for n in ("crb", "mse"))
            text.append(
                f"{target}: lower in deciles {_ranges(lower) or 'none'}; over all "
                "{:.3g} against {:.3g}{}".format(*whole, unit)
            )
        return Row(
            "B6",
            "The bias is lower with the CRB loss, except where the bound is very high",
            "6",
            "mean absolute bias by decile of the bound (1 the smallest; the tenth may differ): "
            + "; ".join(text),
            *count([held]),
        )

    def _deciles(self, target: int) -> list[Array]:
        order = np.argsort(self.test.crb[:, target], kind="stable")
        return np.array_split(order, 10)

    def b7(self) -> Row:
        def bias(target: int) -> Callable[[str, int], float]:
            def measure(name: str, replicate: int) -> float:
                found = self.results.plane("m0s-T1", name, replicate)
                return float(np.abs(found["bias"][..., target]).mean())

            return measure

        held = [self.compared(bias(0)), [not smaller for smaller in self.compared(bias(1))]]
        return Row(
            "B7",
            "On the plane of m0s and T1 the CRB loss has the smaller bias of m0s and the larger "
            "one of T1",
            "S9, S10",
            f"mean absolute bias of m0s: {self.against(bias(0))}, of T1 in s: "
            f"{self.against(bias(1))}; the paper has 0.0053 against 0.0065, and 0.11 against 0.07",
            *count(held),
        )

    def b10(self) -> Row:
        base = self._variant_loss("compact")
        losses = {name: self._variant_loss(name) for name in SWEPT}
        text = ", ".join(f"{n} {100 * (v / base - 1):+.0f} %" for n, v in losses.items())
        return Row(
            "B10",
            "Hyperparameters hardly matter",
            "text",
            f"change of the validation CRB loss, {base:.3g} with "
            f"{self._epochs('compact')} epochs: {text}; a tenth counts",
            *count([[abs(v / base - 1) < SIMILAR for v in losses.values()]]),
        )

    def _variant_loss(self, name: str) -> float:
        return float(self.results.variant(name)["validation/crb"][-1].mean())

    def _epochs(self, name: str) -> int:
        return len(self.results.variant(name)["training"])

    def b11(self) -> Row:
        def final(name: str) -> Array:
            return np.mean(
                [
                    self.results.history(name, r)["validation/crb"][-1]
                    for r in self.results.replicates_of(name)
                ],
                axis=0,
            )

        joint, relative, squared = final("crb"), final("relative"), final("mse")
        single = np.array([final(f"crb-{t.lower()}")[k] for k, t in enumerate(TARGETS)])
        text = "; ".join(
            f"{t}: CRB loss {joint[k]:.3g}, relative {relative[k]:.3g}, squared {squared[k]:.3g}, "
            f"a network of its own {single[k]:.3g}"
            for k, t in enumerate(TARGETS)
        )
        held = [relative > joint, joint < (1 + SIMILAR) * single]
        return Row(
            "B11",
            "Alternatives that the paper names: relative errors, which are worse, and one network "
            "for each parameter, which is not needed",
            "text",
            f"validation CRB loss of {text}",
            *count(held),
        )

    def b12(self) -> Row:
        found = self.results.arrays("conventional")
        seconds = self.results.study.results["seconds per fingerprint"]
        away = np.abs(found["dictionary without noise"] - found["truth"]) / np.sqrt(found["crb"])
        grid = np.median(away, axis=0)
        atoms = self.results.study.settings["training"]
        dictionary = 16 * self.results.study.settings["rank"] * atoms / 1e6
        weights = 4 * float(self.results.history("crb")["weights"]) / 1e6
        lost = {
            start: 100 * np.mean(found[f"excess/{start}"] > OTHER_MINIMUM)
            for start in ("nlls from the centre", "nlls")
        }
        loss = {
            name: np.mean((found[f"estimate/{name}"] - found["truth"]) ** 2 / found["crb"])
            for name in ("network", "dictionary", "nlls")
        }
        ratio = seconds["nlls"] / seconds["network"]
        held = [
            list(grid > 1),
            [dictionary > weights, ratio > MANY, lost["nlls from the centre"] > 1],
        ]
        return Row(
            "B12",
            "Dictionary matching pays in memory and discretisation, least squares in time and "
            "local minima",
            "text",
            f"{atoms} atoms ({dictionary:.0f} MB; the network {weights:.1f} MB) miss noise-free "
            "tissue by "
            + ", ".join(f"{g:.2g}" for g in grid)
            + f" times the square root of the bound ({', '.join(TARGETS)}, median). Least squares "
            f"takes {1e3 * seconds['nlls']:.3g} ms a fingerprint, {ratio:.0f} times the network's; "
            f"from one start {lost['nlls from the centre']:.0f} % end in another minimum, from "
            f"several {lost['nlls']:.0f} %. CRB loss at SNRmax 50: "
            + ", ".join(f"{n} {v:.3g}" for n, v in loss.items()),
            *count(held),
        )


def _ranges(lower: Iterable[bool]) -> str:
    """[True, True, False, True] as "1-2, 4"."""
    numbers = [k for k, value in enumerate(lower, start=1) if value]
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)
