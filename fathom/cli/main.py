"""The command `fathom`: puts the commands together, and turns what goes wrong into one line and an exit status.

Exit status: 0 done; 2 a wrong command line or anything fathom refuses (`FathomError`); 130 after Ctrl-C. Anything
else that escapes is a fault of ours and keeps its traceback. Only the command that is asked for is imported, so
that `fathom --help` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Annotated, Any

from fathom import __version__
from fathom.errors import FathomError

COMMANDS = {
    "quickstart": "Train the recipe nano on real text, show what it learned, say what to type next.",
    "run": "Train a model from a recipe; the same command again goes on where it stopped.",
    "plan": "Say what a run costs on a cluster: memory, time, money, and which layouts fit.",
    "report": "Write report.html for a run, finished or not.",
    "generate": "Continue a prompt.",
    "chat": "Talk to a model in the terminal.",
    "serve": "Answer over HTTP: OpenAI's interface, metrics, a chat page.",
    "tokenizer": "Learn a tokenizer from text, or show how one cuts a text.",
    "export": "Write a model as a Hugging Face directory, or as GGUF for llama.cpp.",
}
"""Each is a function of the same name in `fathom.cli.NAME`."""

GROUPS = {
    "data": (
        "Make text into tokens, look at what was made.",
        {
            "prepare": "Clean, de-duplicate, tokenise and pack text into a folder to train on.",
            "inspect": "Show a prepared folder: documents, lengths, tokens, samples, rejects.",
        },
    ),
    "eval": (
        "Measure a model.",
        {
            "needle": "Find needles in haystacks of several lengths: how far the context really reaches."
        },
    ),
}
"""Commands of two words: a group's summary and its commands, each the function NAME in `fathom.cli.GROUP_NAME`."""

WRONG, INTERRUPTED = 2, 130


def main(arguments: list[str] | None = None) -> None:
    """Run the command line (by default this process's) and leave with its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        import rich
        import typer

        del rich
    except ModuleNotFoundError as missing:
        _say(f"the command line needs {missing.name}; run: pip install 'fathom[cli]'")
        sys.exit(WRONG)
    words = [word for word in arguments if not word.startswith("-")]
    sys.exit(_guarded(_app(typer, *(words + [""] * 2)[:2]), arguments))


def _app(typer: Any, chosen: str, second: str) -> Any:
    """All commands by name, the chosen one for real; of a group's, the one that the second word chooses."""
    app = typer.Typer(
        help="A DeepSeek-V3 model from nothing to talking: train it, look at the run, talk to it.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    def print_version(wanted: bool) -> None:
        if wanted:
            print(f"fathom {__version__}")
            raise typer.Exit

    version = typer.Option(
        "--version", callback=print_version, is_eager=True, help="Print the version."
    )

    def options(version: bool = False) -> None:
        pass

    options.__annotations__["version"] = Annotated[bool, version]
    app.callback()(options)
    for name, summary in COMMANDS.items():
        _add(app, name, summary, f"fathom.cli.{name}" if name == chosen else None)
    for group, (summary, commands) in GROUPS.items():
        below = typer.Typer(help=summary, no_args_is_help=True)
        for name, line in commands.items():
            wanted = (group, name) == (chosen, second)
            _add(below, name, line, f"fathom.cli.{group}_{name}" if wanted else None)
        app.add_typer(below, name=group)
    return app


def _add(app: Any, name: str, summary: str, module: str | None) -> None:
    """A command from its module, or without one only its name for the list."""
    function: Callable[..., Any] = lambda: None  # noqa: E731
    if module:
        function = getattr(import_module(module), name)
    app.command(name, help=None if module else summary)(function)


def _guarded(app: Any, arguments: list[str]) -> int:
    """Run and translate; without standalone mode click and typer raise where they would print."""
    try:
        status = app(args=arguments, prog_name="fathom", standalone_mode=False)
    except FathomError as error:
        _say(error)
        return WRONG
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        return _click_status(error)
    return status if isinstance(status, int) else 0


def _click_status(error: Exception) -> int:
    """Usage errors and aborts by their form: their classes live in click or, in newer typer, in typer itself."""
    kind = type(error).__name__
    if kind == "Abort":
        return INTERRUPTED
    if kind == "NoArgsIsHelpError":
        return WRONG  # the help has been printed
    if not hasattr(error, "format_message"):
        raise error
    context = getattr(error, "ctx", None)
    path = context.command_path if context else "fathom"
    _say(f"{error.format_message().rstrip('.')}; see: {path} --help")
    return WRONG


def _say(error: object) -> None:
    print(f"error: {error}", file=sys.stderr)
