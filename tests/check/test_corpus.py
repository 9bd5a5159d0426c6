"""The auditor on rules that it was not written for: no false alarm, and the faults found and named.

A part of the corpus is one test, so that they run side by side, and each part has to reach the
shares. `python -m check.corpus.score MODULE` shows every entry.
"""

import pytest
from check.corpus import right, surrogates, wrong_generic, wrong_regimes
from check.corpus.score import scores

PARTS = 12
WRONG = wrong_generic.ENTRIES + wrong_regimes.ENTRIES
FINE = right.ENTRIES + surrogates.ENTRIES


def test_the_corpus_is_large_enough():
    from funcbp.check import CAUSES

    assert len(WRONG) >= 100 and len(right.ENTRIES) >= 50 and len(surrogates.ENTRIES) >= 15
    assert {cause for entry in WRONG for cause in entry.causes} == set(CAUSES)


@pytest.mark.parametrize("part", range(PARTS))
def test_right_rules_and_surrogates_are_never_called_wrong(part):
    done = list(scores(FINE[part::PARTS], brief=True))
    alarms = [f"{s.name}: {s.finding}" for s in done if s.finding.verdict == "wrong"]
    assert not alarms, "\n".join(alarms)
    assert sum(s.verdict for s in done) >= 0.95 * len(done)


@pytest.mark.parametrize("part", range(PARTS))
def test_wrong_rules_are_found_and_explained(part):
    done = list(scores(WRONG[part::PARTS], brief=True))
    shown = [s for s in done if s.call == "shown"]
    innocent = [s for s in done if s.call == "innocent"]
    missed = [f"{s.name}: {s.finding}" for s in shown if not s.verdict]
    assert not missed, "\n".join(missed)
    assert sum(s.verdict for s in innocent) >= 0.8 * len(innocent)
    assert sum(s.cause for s in shown) >= 0.85 * len(shown)
    assert sum(s.argument for s in shown) >= 0.95 * len(shown)
