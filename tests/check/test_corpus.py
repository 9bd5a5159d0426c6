"""The auditor on rules that it was not written for: no false alarm, and the faults found and named.

`python -m check.corpus.score MODULE`, in this folder's parent, shows every entry.
"""

import pytest
from check.corpus import holdout, right, surrogates, wrong_generic, wrong_regimes
from check.corpus.entry import Wrong
from check.corpus.score import innocent, shown

from funcbp.check import CAUSES

WRONG = wrong_generic.ENTRIES + wrong_regimes.ENTRIES
FINE = right.ENTRIES + surrogates.ENTRIES
# Written by other hands, without sight of the auditor or of the rest.
WRONG = [*WRONG, *(e for e in holdout.ENTRIES if isinstance(e, Wrong))]
FINE = [*FINE, *(e for e in holdout.ENTRIES if not isinstance(e, Wrong))]
# What the tests take of them, so that the suite stays short; the command takes all.
TAKEN_FINE, TAKEN_WRONG, PARTS = FINE[::8], WRONG[::6], 4


def share(scores, what):
    return sum(getattr(s, what) for s in scores) / len(scores)


def test_the_corpus_is_large_enough():
    verdicts = [e.verdict for e in FINE]
    assert len(WRONG) >= 100
    assert verdicts.count("right") >= 50 and verdicts.count("surrogate") >= 15
    assert {cause for entry in WRONG for cause in entry.causes} == set(CAUSES)


@pytest.mark.parametrize("part", range(PARTS))
def test_right_rules_and_surrogates_are_never_called_wrong(part):
    done = list(shown(TAKEN_FINE[part::PARTS]))
    alarms = [f"{s.name}: {s.finding}" for s in done if s.finding.verdict == "wrong"]
    assert not alarms, "\n".join(alarms)
    assert share(done, "verdict") >= 0.95


def test_faults_are_found_where_they_show():
    done = list(shown(TAKEN_WRONG))
    missed = [s.name for s in done if not s.verdict]
    assert share(done, "verdict") >= 0.99, missed
    assert share(done, "cause") >= 0.85
    assert share(done, "argument") >= 0.95


def test_faults_are_found_from_an_innocent_call():
    done = list(innocent(TAKEN_WRONG))
    assert share(done, "verdict") >= 0.8, [s.name for s in done if not s.verdict]
