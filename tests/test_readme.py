"""The README's code runs as it stands, and its table of ops is that of the declarations."""

import re
from pathlib import Path

from funcbp import catalogue

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_python_blocks_run():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 2
    names: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert names["history"].metrics["loss"][-1] < 0.3


def test_table_of_ops_is_current():
    assert catalogue.renewed(README) == README, "run: python -m funcbp.catalogue"


def test_every_op_says_what_it_saves():
    for name, op in catalogue.declared().items():
        assert catalogue._saves(op), name
