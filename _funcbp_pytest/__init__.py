"""The pytest plugin: `pytest --audit-gradients` audits every custom gradient that a suite calls.

Pytest loads this package in every run, so it stands outside funcbp and imports neither it nor JAX:
without the option it costs nothing, and with it the suite still decides when JAX is imported, and
in which environment.

The tests run as they are. While they do, `custom_vjp.__call__` and `custom_jvp.__call__` take a
note of the rule and of its arguments, and change nothing that JAX traces. What was called only on
traced values, inside jit or scan, has no values yet: when all tests are done and reported, one test
for each such signature is run once more with callbacks beside the calls, and its outcome is not
used. Then the rules are judged.
"""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("funcbp", "custom gradients of JAX")
    group.addoption(
        "--audit-gradients",
        action="store_true",
        help="audit every custom_vjp and custom_jvp rule that the tests call; fail if one is wrong",
    )
    group.addoption(
        "--audit-package",
        action="append",
        default=[],
        metavar="NAME",
        help="only rules with a function in this package or module; may be repeated",
    )
    group.addoption("--audit-json", metavar="FILE", help="also write the findings to FILE")
    group.addoption(
        "--audit-seconds",
        type=float,
        default=30.0,
        metavar="N",
        help="time for one rule; a test that took longer is not run again (default: 30)",
    )
    group.addoption(
        "--audit-once",
        action="store_true",
        help="run no test again: rules called only inside jit are judged at random values",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Before any conftest, because it may import JAX and call rules."""
    if early_config.known_args_namespace.audit_gradients:
        from _funcbp_pytest.run import Audit

        plugin = Audit(early_config)
        early_config.pluginmanager.register(plugin, "funcbp-audit")
        early_config.add_cleanup(plugin.recorder.close)
        plugin.recorder.open()
