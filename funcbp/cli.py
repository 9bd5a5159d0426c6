"""The command `funcbp`: thin; each command's work stands in a module of its own.

Exit codes: 0 right, 1 a wrong gradient was found, 2 it could not run.
"""

import json
import sys
from pathlib import Path
from typing import Annotated

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
def bench(
    names: Annotated[list[str] | None, typer.Argument(help="Ops; all by default.")] = None,
) -> None:
    """Measure what a call of each op costs outside jit, beside a bare jax.custom_vjp."""
    from rich.table import Table

    from funcbp import bench as benchmark
    from funcbp.catalogue import declared

    ops = declared()
    unknown = sorted(set(names or ()) - set(ops))
    if unknown:
        raise InputError(f"no op {', '.join(unknown)}; the ops are {', '.join(ops)}")
    table = Table("op", "op, us", "custom_vjp, us", "ratio", "quartiles")
    for name in names or ops:
        row = benchmark.overhead(ops[name])
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
    print(f"funcbp: {reason}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
