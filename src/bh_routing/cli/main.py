"""`bh-routing`: run a command and return its exit code.

0 success, 1 some experiments failed, 2 invalid input, 130 or 143 interrupted.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Final

import typer

import bh_routing
from bh_routing.cli import commands
from bh_routing.cli.console import EXIT_INTERRUPTED
from bh_routing.cli.evidence import evidence
from bh_routing.cli.options import Overrides, spell_anew
from bh_routing.cli.serve import serve
from bh_routing.errors import BHRoutingError, ExperimentError, InputError
from bh_routing.experiments.spec_errors import name_commands

EXIT_DONE: Final = 0
EXIT_FAILED: Final = 1
EXIT_BAD_INPUT: Final = 2

app = typer.Typer(
    name="bh-routing",
    help="Benjamini-Hochberg expert selection for mixture-of-experts models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for _command in (
    commands.run,
    commands.calibrate,
    commands.evaluate,
    commands.sweep,
    commands.prune,
    evidence,
    commands.lm_eval,
    commands.report,
    commands.export,
    commands.models,
    commands.doctor,
    commands.bench,
):
    app.command()(_command)
# Options that aren't ours are vLLM's.
_OPEN: Final = {"allow_extra_args": True, "ignore_unknown_options": True}
app.command(context_settings=_OPEN)(serve)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"bh-routing {bh_routing.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Benjamini-Hochberg expert selection for mixture-of-experts models."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise InputError(
            "bh-routing was started by torchrun, which would do everything once a process; start "
            "it alone, with --executor ray for more GPUs or --device-map auto for a larger model"
        )


def main(argv: Sequence[str] | None = None, overrides: Overrides | None = None) -> int:
    """Run one command and return its exit code; never exits the interpreter.

    Args:
        argv: the arguments; None: those of the process, or none in a notebook.
        overrides: replacements of the library's configurations, prompts and functions.
    """
    arguments, old = spell_anew(process_arguments() if argv is None else argv)
    for sentence in old:
        _complain(sentence)
    # Read when torch loads: on a machine with other load, threads that spin while they wait for
    # each other take up to fifty times as long as a single thread.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        code = app(
            args=arguments,
            prog_name="bh-routing",
            standalone_mode=False,
            obj=replace(overrides or Overrides(), command=shlex.join(["bh-routing", *arguments])),
        )
    except BHRoutingError as error:
        _complain(name_commands(str(error)))
        return EXIT_FAILED if isinstance(error, ExperimentError) else EXIT_BAD_INPUT
    except (KeyboardInterrupt, typer.Abort):
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has exited, as `head` does: the interpreter must not try to
        # write again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except Exception as error:  # noqa: BLE001  # bugs of ours are raised again
        # Typer's own errors, whose base class isn't public in every version.
        message = getattr(error, "format_message", None)
        if message is None:
            return _explain(error)
        text = message()
        if text:
            _complain(text)
        return EXIT_BAD_INPUT
    return code if isinstance(code, int) else EXIT_DONE


def process_arguments() -> list[str]:
    """Return the process's arguments; none in a notebook.

    A notebook's kernel has arguments of its own, such as `-f connection.json`.
    """
    program = os.path.basename(sys.argv[0]) if sys.argv else ""
    arguments = sys.argv[1:]
    is_kernel = "kernel_launcher" in program or (
        arguments[:1] == ["-f"] and arguments[-1].endswith(".json")
    )
    return [] if is_kernel else arguments


def _explain(error: Exception) -> int:
    """Report errors of the machine, with the remedy; raise those that are bugs of ours."""
    from bh_routing.experiments.experiment import OUT_OF_MEMORY, is_out_of_memory

    if is_out_of_memory(error):
        _complain(OUT_OF_MEMORY)
        return EXIT_FAILED
    if isinstance(error, OSError):
        what = error.filename or "a file"
        _complain(
            f"{what} can't be read or written ({error.strerror or error}); check the path, its "
            "rights and the room on the disk"
        )
        return EXIT_BAD_INPUT
    raise error


def _complain(text: str) -> None:
    print(f"bh-routing: {text}", file=sys.stderr)
