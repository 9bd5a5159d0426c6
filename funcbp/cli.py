"""The command `funcbp`: thin; each command's work stands in a module of its own.

Exit codes: 0 right, 1 a wrong gradient was found, 2 it could not run.
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from funcbp.core import InputError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

Json = Annotated[Path | None, typer.Option("--json", help="Write the result here as JSON.")]


@app.callback()
def _about() -> None:
    """Backpropagation you can read, check and trust, for JAX."""


@app.command()
def demo(
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything that is random.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 800,
    json_file: Json = None,
    html_file: Annotated[Path, typer.Option("--html", help="Where the page goes.")] = Path(
        "funcbp-demo.html"
    ),
) -> None:
    """Train a model on handwritten digits, then check every rule it used against jax.grad."""
    from funcbp import demo as demonstration
    from funcbp import page

    for path in (json_file, html_file):
        page.require_writable(path)
    console = Console()
    result = demonstration.run(seed=seed, steps=steps, console=console)
    console.print(f"accuracy on 360 held-out digits: {result.accuracy:.2%}")
    console.print(result.table())
    html_file.write_text(result.to_html())
    if json_file is not None:
        json_file.write_text(json.dumps(result.to_json(), indent=2) + "\n")
    console.print(f"report: {html_file.resolve()}", soft_wrap=True)
    console.print(f"{result.seconds:.1f} s, seed {result.seed}")
    if not result.ok:
        raise typer.Exit(1)


@app.command()
def audit(
    function: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:FUNCTION",
            help="What to audit. MODULE is dotted, or a path to a .py file.",
        ),
    ],
    args: Annotated[
        str,
        typer.Option(
            "--args",
            metavar="MODULE:NAME",
            help="Its arguments: a tuple, a dict of arguments by name, or a function without "
            "arguments that returns one.",
        ),
    ],
    expect: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RULE=VERDICT",
            help="What is deliberate, as in spike=surrogate. May be given several times.",
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Judge the values seen and nothing else.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything that is random.")] = 0,
    json_file: Json = None,
    html_file: Annotated[
        Path | None, typer.Option("--html", help="Write the report here as a page.")
    ] = None,
    test_file: Annotated[
        Path | None,
        typer.Option("--write-test", help="Write a pytest file here that fails for what is wrong."),
    ] = None,
) -> None:
    """Find every custom gradient that a function calls, and say which are wrong, where and why.

    Exits with 0 if none is wrong, with 1 if one is, with 2 if the audit could not run.
    """
    from funcbp import page
    from funcbp.check import command

    arrays = test_file.with_suffix(".npz") if test_file is not None else None
    for path in (json_file, html_file, test_file, arrays):
        page.require_writable(path)
    report = command.run(function, args, expect=expect or (), thorough=not quick, seed=seed)
    console = Console()
    # A pipe gets lines of text that end where they end, without padding.
    console.print(report) if console.is_terminal else print(report)
    if json_file is not None:
        report.to_json(json_file)
    if html_file is not None:
        report.to_html(html_file)
    if test_file is not None:
        tests = report.write_test(test_file)
        count = "1 test fails" if len(tests) == 1 else f"{len(tests)} tests fail"
        said = f"{count} today: {test_file}" if tests else "nothing is wrong: no test is written"
        console.print(said, soft_wrap=True, highlight=False)
    if not report.ok:
        raise typer.Exit(1)


@app.command()
def explain(
    function: Annotated[
        str | None,
        typer.Argument(
            metavar="MODULE:FUNCTION",
            help="What to explain: a function, or a model of funcbp.layers.",
        ),
    ] = None,
    args: Annotated[
        str | None,
        typer.Option(
            "--args",
            metavar="MODULE:NAME",
            help="Its arguments, as for audit; those of a model are (params, state, *inputs).",
        ),
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FUNCTION", help="Of the output, to a scalar; unless that is one."
        ),
    ] = None,
    demo: Annotated[
        bool, typer.Option("--demo", help="Explain a model of handwritten digits, untrained.")
    ] = False,
    json_file: Json = None,
    html_file: Annotated[
        Path | None, typer.Option("--html", help="Write all of it here as a page.")
    ] = None,
) -> None:
    """Show what a forward pass keeps, and what flows back through each layer.

    Exits with 0, whatever is seen, and with 2 if the function could not run.
    """
    from funcbp import page

    if demo == bool(function or args or loss) or bool(function) != bool(args):
        raise InputError("explain takes either MODULE:FUNCTION and --args MODULE:NAME, or --demo")
    for path in (json_file, html_file):
        page.require_writable(path)
    result = _explained_demo() if demo else _explained(function, args, loss)
    console = Console()
    console.print(result) if console.is_terminal else print(result)
    if json_file is not None:
        result.to_json(json_file)
    if html_file is not None:
        result.to_html(html_file)


def _explained(function: Any, args: Any, loss: str | None) -> Any:
    from funcbp.check.command import call_of
    from funcbp.check.named import named
    from funcbp.trace.explain import explain

    called, positional, by_name, _ = call_of(function, args)
    of_output = None if loss is None else named(loss)
    if loss is not None and not callable(of_output):
        raise InputError(f"--loss must name a function, got {type(of_output).__name__} {loss}")
    return explain(called, positional, by_name, loss=of_output)


def _explained_demo() -> Any:
    import jax
    import jax.numpy as jnp

    from funcbp import data, ops
    from funcbp import demo as demonstration
    from funcbp.trace import chain_rule
    from funcbp.trace.explain import explain

    digits, model = data.digits(), demonstration.model()
    images, labels = (
        jnp.asarray(a[: demonstration.BATCH]) for a in (digits.train_images, digits.train_labels)
    )
    params, state = model.init(jax.random.key(0), images)

    def loss(logits):
        return jnp.mean(ops.softmax_cross_entropy_with_integer_labels(logits, labels))

    result = explain(model, (params, state, images), loss=loss)
    return result._replace(chain=chain_rule(model, images, params=params, loss=loss))


@app.command()
def bench(
    names: Annotated[list[str] | None, typer.Argument(help="Ops; all by default.")] = None,
    against: Annotated[
        str,
        typer.Option(
            metavar="NAME,NAME", help="Of autodiff, jax, flax, torch: what to measure against."
        ),
    ] = "autodiff,jax",
    device: Annotated[
        str | None, typer.Option(metavar="cpu|gpu", help="Where to run; JAX's default otherwise.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="float32, times and memory alone, under a minute.")
    ] = False,
    overhead: Annotated[
        bool,
        typer.Option(
            "--overhead", help="What a call costs outside jit, beside a bare jax.custom_vjp."
        ),
    ] = False,
    json_file: Json = None,
    html_file: Annotated[
        Path | None, typer.Option("--html", help="Write the result here as a page.")
    ] = None,
    renew: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Put these rows into FILE, which --json wrote on this machine."
        ),
    ] = None,
) -> None:
    """Measure each rule beside autodiff and public counterparts: time, memory and digits.

    Every figure but the milliseconds is a ratio, the rule's over the other's: below 1 is better.
    """
    from funcbp import bench as benchmark
    from funcbp import page
    from funcbp.catalogue import declared

    ops = declared()
    unknown = sorted(set(names or ()) - set(ops))
    if unknown:
        raise InputError(f"no op {', '.join(unknown)}; the ops are {', '.join(ops)}")
    chosen = {name: ops[name] for name in names or ops}
    if overhead:
        return _overhead(chosen)
    for path in (json_file, html_file, renew):
        page.require_writable(path)
    older = None if renew is None else benchmark.Results.read(renew)
    contenders = [name for name in against.split(",") if name]
    result = benchmark.run(chosen, contenders, device=device, quick=quick)
    console = Console()
    console.print(result.table())
    if result.left_out:
        console.print(f"not reached in the time of a quick run: {', '.join(result.left_out)}")
    result.write(json_file, html_file)
    if older is not None:
        older.renewed(result).write(renew, None)


def _overhead(ops: dict[str, Any]) -> None:
    from rich.table import Table

    from funcbp import bench as benchmark

    table = Table("op", "op, us", "custom_vjp, us", "ratio", "quartiles")
    for op in ops.values():
        row = benchmark.overhead(op)
        spread = f"{row.low:.2f} to {row.high:.2f}"
        table.add_row(row.op, f"{row.ours:.0f}", f"{row.bare:.0f}", f"{row.ratio:.2f}", spread)
    Console().print(table)


def main() -> None:
    """Runs the command line; bad input gives one line on standard error and exit code 2."""
    try:
        code = app(standalone_mode=False)
    except (InputError, OSError) as error:
        sys.exit(_refuse(error))
    except Exception as error:
        # A usage error of the option parser, which names the option and what it takes.
        if not hasattr(error, "format_message"):
            raise
        sys.exit(_refuse(f"{error.format_message()} (see funcbp --help)"))  # type: ignore
    sys.exit(code or 0)


def _refuse(reason: object) -> int:
    print(f"funcbp: {' '.join(str(reason).split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
