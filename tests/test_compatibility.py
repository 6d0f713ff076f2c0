"""Each row of docs/compatibility.md is what gemlax does, and the page is what the rows say."""

from pathlib import Path

import numpy as np
import pytest
from compatibility import PAGE, Case, Outcome, Read, page, run
from compatibility_cases import CASES

from gemlax.errors import CheckpointError

OUTCOMES: dict[str, Outcome] = {}  # of the cases that ran in this process


def outcome(case: Case, folder: Path) -> Outcome:
    if case.name not in OUTCOMES:
        folder.mkdir(exist_ok=True)
        OUTCOMES[case.name] = run(case, folder)
    return OUTCOMES[case.name]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_people_have_is_read_or_refused_as_the_page_says(case, tmp_path):
    found = outcome(case, tmp_path)
    assert found.verdict == case.verdict
    assert str(tmp_path) not in found.remark


def test_the_page_is_what_the_cases_write(tmp_path):
    """If not: scripts/compatibility."""
    found = [outcome(case, tmp_path / str(i)) for i, case in enumerate(CASES)]
    assert page(CASES, found) == PAGE.read_text("utf-8")


def test_no_two_rows_have_one_name():
    assert len({case.name for case in CASES}) == len(CASES)


# That a wrong row fails.


def refuse(folder: Path) -> None:
    raise CheckpointError(f"{folder}/m is wrong | in <two>\nlines")


def arrays(folder: Path) -> Read:
    return Read({"a": np.float32([1, 2])}, {"a": np.float32([1, 2])})


def altered(folder: Path) -> Read:
    return Read({"a": np.float32([1, 2])}, {"a": np.float32([1, 3])})


GOOD = Case("group", "kind", arrays, "exact", "numpy")
REFUSED = Case("group", "kind", refuse, "refused", error="is wrong")
WRONG = {
    "an error where it should load": REFUSED._replace(verdict="loads"),
    "no error where it should be refused": GOOD._replace(verdict="refused", error="is wrong"),
    "another error": REFUSED._replace(error="is right"),
    "an error of which nothing is said": REFUSED._replace(error=""),
    "another array": GOOD._replace(check=altered),
    "another array, though it only loads": GOOD._replace(check=altered, verdict="loads"),
    "another value": GOOD._replace(check=lambda folder: Read([1], [2])),
    "exact, compared with nothing": GOOD._replace(check=lambda folder: None),
    "exact, with an empty comparison": GOOD._replace(check=lambda folder: Read({}, {})),
    "exact, without an oracle": GOOD._replace(oracle=""),
    "a log that says nothing": GOOD._replace(log="left aside"),
    "no verdict": GOOD._replace(verdict="fine"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_row_fails(name, tmp_path):
    with pytest.raises(AssertionError):
        run(WRONG[name], tmp_path)


def test_a_row_shows_what_was_said_without_the_temporary_folder(tmp_path):
    assert run(GOOD, tmp_path) == Outcome("exact", "numpy")
    said = run(REFUSED, tmp_path)
    assert said == Outcome("refused", r"m is wrong \| in &lt;two> / lines")
    assert page([REFUSED], [said]).endswith(f"|---|---|---|\n| kind | refused | {said.remark} |\n")


def test_values_that_differ_in_bits_alone_are_not_exact(tmp_path):
    zero = GOOD._replace(
        check=lambda folder: Read({"a": np.float32([-0.0])}, {"a": np.float32([0])})
    )
    with pytest.raises(AssertionError):
        run(zero, tmp_path)
