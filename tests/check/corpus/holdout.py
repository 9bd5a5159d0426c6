"""Rules by other hands: written without sight of the auditor or of the rest of the corpus."""

from . import holdout_fine, holdout_layers, holdout_numerics

ENTRIES = [*holdout_layers.ENTRIES, *holdout_numerics.ENTRIES, *holdout_fine.ENTRIES]
