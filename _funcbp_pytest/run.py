"""The hooks of a run with `--audit-gradients`."""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from _funcbp_pytest.record import Recorder
from _funcbp_pytest.summary import merged, write

__all__ = ["Audit"]

# What pytest says of a test's run; not said of the second run.
REPORTING = (
    "pytest_runtest_logstart",
    "pytest_runtest_logreport",
    "pytest_runtest_logfinish",
    "pytest_exception_interact",
    "pytest_warning_recorded",
)


class Audit:
    """The hooks of a run with `--audit-gradients`."""

    def __init__(self, config: pytest.Config):
        self.config = config
        options = config.known_args_namespace
        self.recorder = Recorder(options.audit_package)
        self.once, self.seconds = options.audit_once, options.audit_seconds
        self.json = options.audit_json
        self.durations: dict[str, float] = {}
        self.failed: set[str] = set()
        self.again: list[str] = []
        self.unwatched: list[str] = []
        self.results: list[dict[str, Any]] = []
        self.problems: list[str] = []
        self.rerunning = False

    def pytest_report_header(self) -> str:
        packages = ", ".join(self.recorder.packages) or "all packages"
        return f"funcbp: audits the custom gradients of {packages}"

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.recorder.test = item.nodeid
        try:
            return (yield)
        finally:
            self.recorder.test = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.outcome != "passed":
            self.failed.add(report.nodeid)
        if not self.rerunning:
            before = self.durations.get(report.nodeid, 0.0)
            self.durations[report.nodeid] = before + report.duration

    @pytest.hookimpl(wrapper=True)
    def pytest_runtestloop(self, session: pytest.Session) -> Iterator[None]:
        try:
            done = yield
        except BaseException:
            self.problems.append("the run was stopped before its end: nothing was audited")
            raise
        if self.recorder.rules and not self.config.option.collectonly:
            try:
                if not self.once:
                    self._run_again(session)
                self.recorder.close()
                self.results.append(self._judged())
            except Exception as error:
                self.problems.append(f"the audit raised {type(error).__name__}: {error}")
        return done

    def _run_again(self, session: pytest.Session) -> None:
        """Runs tests once more for the values inside jit and scan; their outcome is not used."""
        items = {item.nodeid: item for item in session.items}
        chosen: dict[str, list[int]] = {}
        for signature in self.recorder.valueless():
            able = [
                t
                for t in signature.tests
                if t in items and t not in self.failed and self.durations[t] <= self.seconds
            ]
            if able:
                test = min(able, key=lambda t: (t not in chosen, self.durations[t]))
                chosen.setdefault(test, []).append(id(signature))
        if not chosen:
            return
        self.again = list(chosen)
        context = sys.modules["jax"].make_user_context(default_value=0)
        stop = session.shouldfail, session.shouldstop
        self.rerunning = True
        try:
            with _silenced(self, self.config):
                for number, test in enumerate(self.again, 1):
                    self._say(f"runs again {number}/{len(self.again)}: {test}")
                    self.recorder.asked = frozenset(chosen[test])
                    following = items[self.again[number]] if number < len(self.again) else None
                    # Part of the key of JAX's caches: what was traced before is traced again.
                    with context(number):
                        item = items[test]
                        item.ihook.pytest_runtest_protocol(item=item, nextitem=following)
                    with contextlib.suppress(Exception):
                        sys.modules["jax"].effects_barrier()
        finally:
            self.rerunning = False
            self.recorder.asked = frozenset()
            session.shouldfail, session.shouldstop = stop
        self.unwatched = [t for t in self.again if t in self.failed]

    def _judged(self) -> dict:
        """The findings, as plain values."""
        # Imported here, since it imports JAX.
        from funcbp.check.plugin import judged

        report = judged(list(self.recorder.rules.values()), self.seconds, self._say)
        self._say("")
        leaks = sorted(t for t in self.recorder.leak_checked if t)
        return report | {"again": self.again, "unwatched": self.unwatched, "leak_checked": leaks}

    def _say(self, text: str) -> None:
        """One line that the next overwrites, on a terminal."""
        terminal: Any = self.config.pluginmanager.get_plugin("terminalreporter")
        if terminal is not None and terminal.isatty:
            terminal.rewrite(text and f"audit: {text}"[:100], erase=True)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """A worker of pytest-xdist has ended."""
        sent = getattr(node, "workeroutput", {}).get("funcbp_audit")
        if sent is None:
            self.problems.append(f"worker {node.gateway.id} sent nothing")
            return
        results, problems = json.loads(sent)
        self.results += results
        self.problems += [f"worker {node.gateway.id}: {problem}" for problem in problems]

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        self.recorder.close()
        output = getattr(self.config, "workeroutput", None)
        if output is not None:
            output["funcbp_audit"] = json.dumps([self.results, self.problems])
            return
        self.result = merged(self.results) | {"problems": self.problems}
        if self.json:
            with open(os.path.join(str(self.config.invocation_params.dir), self.json), "w") as f:
                json.dump(self.result, f, indent=2)
        bad = not self.result["ok"] or self.problems
        if bad and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self.config.option.collectonly:
            return
        write(terminalreporter, self.result, self.config.option.verbose)


@contextlib.contextmanager
def _silenced(plugin: Any, config: pytest.Config) -> Iterator[None]:
    """Leaves the hooks that report tests to this plugin alone."""
    callers = [getattr(config.hook, name) for name in REPORTING]
    # In place: the callers that pytest makes for parts of the tree read the same lists.
    lists = [caller._hookimpls for caller in callers]
    kept = [list(impls) for impls in lists]
    try:
        for impls in lists:
            impls[:] = [impl for impl in impls if impl.plugin is plugin]
        yield
    finally:
        for impls, before in zip(lists, kept, strict=True):
            impls[:] = before
