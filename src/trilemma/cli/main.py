"""`trilemma`: finds the verb, runs it, and turns a user's mistake into one message.

The top level is plain Python, so that `trilemma --help` answers at once: it imports neither torch nor pydantic, numpy,
typer or rich. A verb is a module of this package with a function `command` (or, with verbs of its own, a `typer.Typer`
named `app`); it is imported when it is used.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from trilemma import __version__
from trilemma.errors import ConfigError, TrilemmaError, nearest

EXIT_MISTAKE = 2
EXIT_INTERRUPTED = 130


@dataclass(frozen=True)
class Verb:
    """Where a verb lives, and what it is for in one line."""

    module: str
    help: str


VERBS: dict[str, Verb] = {
    "compare": Verb("trilemma.cli.compare", "candidates x seeds under one budget, and a report of the three corners"),
    "plan": Verb("trilemma.cli.plan", "what a recipe will cost: parameters, FLOPs, memory, time, money"),
    "train": Verb("trilemma.cli.train", "one model from a YAML config, resumable at any step"),
    "average": Verb("trilemma.cli.average", "saved checkpoints averaged into a run of their own"),
    "quantize": Verb("trilemma.cli.quantize", "a run with weights in 8 or 4 bits, and the quality that costs"),
    "evaluate": Verb("trilemma.cli.evaluate", "signed scores of a run: BLEU, chrF, accuracy, perplexity"),
    "generate": Verb("trilemma.cli.generate", "stdin to stdout, one line in, one line out"),
    "score": Verb("trilemma.cli.score", "log-probabilities of given texts, whole and token by token"),
    "classify": Verb("trilemma.cli.classify", "labels and probabilities for lines of text"),
    "answer": Verb("trilemma.cli.answer", "answers to questions, as parts of a passage"),
    "embed": Verb("trilemma.cli.embed", "a vector for each line of text, as JSON lines"),
    "verify": Verb("trilemma.cli.verify", "the laws, on our mixers or on yours (--plugin)"),
    "bench": Verb("trilemma.cli.bench", "cost curves: prefill, time per token, state bytes against context"),
    "show": Verb("trilemma.cli.show", "what its layers look at: attention maps, alignments, mixing matrices"),
    "import": Verb("trilemma.cli.import_", "a model in the Hugging Face layout becomes a run"),
    "export": Verb("trilemma.cli.export", "a run for other programs: hf, ctranslate2, onnx, torch-export"),
    "data": Verb("trilemma.cli.data", "data check: encoding, alignment, duplicates, overlap, lengths"),
    "doctor": Verb("trilemma.cli.doctor", "what this machine offers, what will be used, and why"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code.

    A `TrilemmaError` is printed to stderr without a traceback (2); Ctrl-C gives 130; a reader that went away (a closed
    pipe) is no error. Anything else is a bug of ours and shows its traceback.
    """
    try:
        code = _run(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
    except TrilemmaError as error:
        print(f"trilemma: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The interpreter flushes stdout once more at exit; with nobody reading, that must go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


def _run(arguments: list[str]) -> int:
    plugins, arguments = _take_plugins(arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0 if arguments else EXIT_MISTAKE
    name, rest = arguments[0], arguments[1:]
    if name == "--version":
        print(f"trilemma {__version__}")
        return 0
    if name.startswith("-"):
        raise ConfigError(f'unknown option "{name}"{nearest(name, ["--help", "--version", "--plugin"])}')
    if name not in VERBS:
        raise ConfigError(f'unknown verb "{name}"{nearest(name, VERBS)}')
    if plugins:
        from trilemma.registry import load_plugin

        for plugin in plugins:
            load_plugin(plugin)
    return _call(name, rest)


def _call(name: str, arguments: list[str]) -> int:
    import typer

    module = importlib.import_module(VERBS[name].module)
    app = getattr(module, "app", None)
    if app is None:
        app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
        app.command(name=name)(module.command)
    try:
        # typer reports a wrong option itself, with exit code 2, and lets our errors through
        typer.main.get_command(app).main(args=arguments, prog_name=f"trilemma {name}", standalone_mode=True)
    except SystemExit as stop:
        if isinstance(stop.__context__, BrokenPipeError):  # typer makes it an exit code of 1
            raise stop.__context__ from None
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


def _take_plugins(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Splits off `--plugin FILE[:CLASS]` and `--plugin=FILE[:CLASS]`, which may stand anywhere before `--`."""
    plugins: list[str] = []
    rest: list[str] = []
    queue = list(arguments)
    while queue:
        argument = queue.pop(0)
        if argument == "--":
            return plugins, [*rest, argument, *queue]
        if argument == "--plugin":
            if not queue:
                raise ConfigError("--plugin needs a file: --plugin my_mixer.py")
            plugins.append(queue.pop(0))
        elif argument.startswith("--plugin="):
            plugins.append(argument.partition("=")[2])
        else:
            rest.append(argument)
    return plugins, rest


def _help() -> str:
    width = max(len(name) for name in VERBS)
    verbs = "\n".join(f"  {name:<{width}}  {verb.help}" for name, verb in VERBS.items())
    return f"""Usage: trilemma [--plugin FILE[:CLASS]]... VERB [ARGUMENTS]...

Which sequence architecture, and at what price? Quality, training cost and
inference cost, measured on your own data under one budget.

Verbs (trilemma VERB --help says more):
{verbs}

Options:
  --plugin FILE[:CLASS]  a Python file with a mixer of yours; may be repeated
  --version              print the version
  -h, --help             print this page

A verb takes section.key=value overrides where it reads a config, and --json
for one machine-readable last line."""
