"""The command `confide`: one group for each kind of user, each loaded only when it is called."""

import importlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Sequence

import click
import typer

from confide.common.errors import ConfideError, MissingPackage, UsageError
from confide.common.wording import plain

# Group: where it lives, which extra it needs, what it is for.
_GROUPS = {
    "plan": ("confide.common.plan_cli", "", "Write, check, explain and compare plans."),
    "site": ("confide.client.cli", "site", "Run a site: its keys, data, policy, approvals, ledger and agent."),
    "adapter": ("confide.client.adapter_cli", "site", "Show, evaluate, use, merge and export a trained adapter."),
    "simulate": ("confide.simulations.cli", "simulate", "Run a whole federation on this machine, and measure it."),
}

_EPILOG = "Example: confide simulate demo"
_AFTER_CTRL_C = 130
_INTERRUPTED = "It was interrupted by Ctrl-C."


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 if all went well, 130 after Ctrl-C, else the code of the error's class.

    With --json anywhere among the arguments, what goes wrong is one JSON object on the standard output as well.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in arguments
    try:
        code = _app(arguments)(arguments, prog_name="confide", standalone_mode=False)
    except click.ClickException as error:  # a word that the command line does not know, or help instead of nothing
        if as_json:
            _print_failure("UsageError", error.format_message())
        _show(error)
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        if as_json:
            _print_failure("Interrupted", _INTERRUPTED)
        typer.echo(_INTERRUPTED, err=True)
        sys.exit(_AFTER_CTRL_C)
    except BrokenPipeError:  # whoever reads our lines has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        told = UsageError(
            f"{error.filename or 'A file'}: {error.strerror or error}. Check the path, its rights and the disk."
        )
        _tell(told, as_json=as_json)
        sys.exit(told.exit_code)
    except ConfideError as error:
        _tell(error, as_json=as_json)
        sys.exit(error.exit_code)
    if code == _AFTER_CTRL_C and as_json:
        _print_failure("Interrupted", _INTERRUPTED)
    sys.exit(code if isinstance(code, int) else 0)


def quiet_libraries() -> None:
    """Keep libraries from writing between our lines and from reaching for a hub."""
    warnings.filterwarnings("ignore", module=r"(torch|transformers|peft|opacus|confide)\..*")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")


def _app(arguments: Sequence[str]) -> typer.Typer:
    """Return the root command, with the one group that is called and mere names for the others."""
    app = typer.Typer(
        help="Fine-tune one transformer together, in confidence.",
        epilog=_EPILOG,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    called = next((word for word in arguments if not word.startswith("-")), None)
    for name, (module, extra, purpose) in _GROUPS.items():
        group = _load(module, extra) if name == called else typer.Typer()
        if name != called:
            group.callback()(_nothing)
        app.add_typer(group, name=name, help=purpose, no_args_is_help=True)
    return app


def _root(
    version: bool = typer.Option(
        False,
        "--version",
        help="Show the version and exit.",
        is_eager=True,
        callback=lambda asked: _tell_version() if asked else None,
    ),
) -> None:
    pass


def _nothing() -> None:
    """Stand in for a group that is not called."""


def _tell_version() -> None:
    from importlib.metadata import version

    typer.echo(f"confide {version('confide')}")
    raise typer.Exit


def _load(module: str, extra: str) -> typer.Typer:
    try:
        app: typer.Typer = importlib.import_module(module).app
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("confide"):
            raise
        raise MissingPackage(error.name, extra) from None
    return app


def _tell(error: ConfideError, *, as_json: bool) -> None:
    if as_json:
        _print_failure(type(error).__name__, str(error))
    lines = [plain(line) for line in str(error).splitlines()] or [type(error).__name__]
    typer.secho(f"{type(error).__name__}: ", fg="red", bold=True, nl=False, err=True)
    typer.echo("\n  ".join(lines if len(lines) == 1 else ["", *lines]), err=True)


def _print_failure(name: str, message: str) -> None:
    typer.echo(json.dumps({"status": "failed", "error": name, "message": message}))


def _show(error: click.ClickException) -> None:
    """Print what the command line has to say of its own error, after its usage; help that was asked for is printed already."""
    from typer import rich_utils

    if not isinstance(error, click.exceptions.NoArgsIsHelpError):
        lines = map(plain, error.format_message().splitlines())
        rich_utils.rich_format_error(click.UsageError("\n".join(lines), ctx=getattr(error, "ctx", None)))


if __name__ == "__main__":
    main()
