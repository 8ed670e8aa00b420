"""The scorecard: its rule, and that the page says what the stored study says."""

import json
from pathlib import Path

import pytest

from qmri.artefacts import MissingArtefacts
from qmri.studies import (
    abdomen,
    brain,
    crb_loss,
    scorecard,
    scorecard_abdomen,
    scorecard_brain,
    scorecard_crb,
)
from qmri.studies.training_labels import Results

PAGE = Path(__file__).parents[1] / "book" / "scorecard.ipynb"


@pytest.fixture(scope="module")
def results() -> Results:
    try:
        return Results()
    except MissingArtefacts as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def rows(results) -> list[scorecard.Row]:
    return scorecard.part_a(results)


@pytest.fixture(scope="module")
def fingerprints() -> crb_loss.Results:
    try:
        return crb_loss.Results()
    except MissingArtefacts as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def rows_b(fingerprints) -> list[scorecard.Row]:
    return scorecard_crb.part_b(fingerprints)


@pytest.fixture(scope="module")
def rows_in_vivo() -> list[scorecard.Row]:
    try:
        volunteers, one_slice = abdomen.Results(), brain.Results()
    except MissingArtefacts as error:
        pytest.skip(str(error))
    return [
        *scorecard_abdomen.part_a_in_vivo(volunteers),
        *scorecard_brain.part_b_in_vivo(one_slice),
    ]


def row(held: int, compared: int) -> scorecard.Row:
    return scorecard.Row("A0", "claim", "1", "number", held, compared)


@pytest.mark.parametrize(
    ("held", "compared", "verdict"),
    [
        (4, 4, "reproduced"),
        (3, 4, "partly"),
        (2, 4, "not reproduced"),
        (0, 4, "not reproduced"),
    ],
)
def test_a_verdict_is_a_count(held, compared, verdict):
    assert row(held, compared).verdict == verdict


def test_every_claim_has_a_row(rows, rows_b, rows_in_vivo):
    assert [r.id for r in rows_in_vivo] == ["A12", "A13", "B8", "B9"]
    assert [r.id for r in rows] == [f"A{k}" for k in (*range(1, 12), 14)]
    assert [r.id for r in rows_b] == [f"B{k}" for k in (*range(1, 8), *range(10, 13))]
    for r in [*rows, *rows_b, *rows_in_vivo]:
        assert 0 <= r.held <= r.compared and r.compared >= 2
        assert "nan" not in r.measured


def test_the_table_has_a_line_for_each_row(rows):
    table, numbers = scorecard.as_markdown(rows).split("\n\n")
    assert len(table.splitlines()) == len(rows) + 2
    assert all(line.count("|") == 6 for line in table.splitlines()), "a bar would split a cell"
    assert len(numbers.splitlines()) == len(rows)


def test_claims_can_fail(results):
    """Networks under each other's names: what held before must not hold any more."""

    truth, likelihood = "supervised-gt", "supervised-mle-rician"
    other = {truth: likelihood, likelihood: truth}

    class Swapped(scorecard._PartA):
        def statistics(self, snr, name, replicate=0):
            return super().statistics(snr, other.get(name, name), replicate)

    honest, swapped = scorecard._PartA(results), Swapped(results)
    for claim in ("a1", "a2", "a3"):
        assert getattr(swapped, claim)().held < getattr(honest, claim)().held


def test_claims_about_the_crb_loss_can_fail(fingerprints):
    """The two losses under each other's names."""
    other = {"crb": "mse", "mse": "crb", "paper-crb": "paper-mse", "paper-mse": "paper-crb"}

    class Swapped(crb_loss.Results):
        def _of(self, file, name, replicate):
            return super()._of(file, other.get(name, name), replicate)

    swapped = Swapped(location=fingerprints.study.folder)
    honest, dishonest = (scorecard_crb._PartB(r) for r in (fingerprints, swapped))
    for claim in ("b2", "b4", "b7"):
        held, compared = getattr(honest, claim)().held, getattr(honest, claim)().compared
        assert getattr(dishonest, claim)().held == compared - held


def test_the_page_shows_the_verdicts_of_the_stored_studies(rows, rows_b, rows_in_vivo):
    """Read, not executed: a study that was run again without its page is noticed at once."""
    notebook = json.loads(PAGE.read_text(encoding="utf-8"))
    shown = [
        "".join(output["data"]["text/markdown"])
        for cell in notebook["cells"]
        if cell["cell_type"] == "code"
        for output in cell["outputs"]
        if "text/markdown" in output.get("data", {})
    ]
    assert scorecard.as_markdown(rows) in shown
    assert scorecard.as_markdown(rows_b) in shown
    assert scorecard.as_markdown(rows_in_vivo[:2]) in shown
    assert scorecard.as_markdown(rows_in_vivo[2:]) in shown
