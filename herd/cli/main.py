"""`herd VERB ...`: finds the verb, parses its options, runs it, and turns errors into two lines and an exit code."""

import importlib
import os
import sys
from contextlib import suppress
from dataclasses import replace

from herd import __version__
from herd.errors import HerdError, UsageError, nearest

VERBS = {
    "chat": "talk in the terminal, images with @file",
    "generate": "continue a text, to stdout",
    "serve": "OpenAI API on 127.0.0.1:8000",
    "keys": "make, list and revoke API keys of the server",
    "bench": "tokens per second, and the share of what the machine can do",
    "inspect": "layers, parameters, memory at each context, will it fit here",
    "convert": "from any checkpoint to herd, Hugging Face, Meta or GGUF",
    "quantize": "into int4, a quarter of the size, or fp8, half",
    "pull": "fetch the default model",
}

HELP = "usage: herd VERB [options]\n\n" + "\n".join(f"  herd {verb:<10} {text}" for verb, text in VERBS.items())
HELP += "\n\nMODEL is a path to a checkpoint or a name (cria, tiny, scout, maverick, guard, behemoth); the default is cria.\n"
HELP += "herd VERB --help lists the options of a verb."


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 1 failed, 2 misused, 130 interrupted."""
    args = sys.argv[1:] if argv is None else argv
    try:
        return _run(args)
    except HerdError as error:
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe has left
        _drop_stdout()
        return 0
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        print(f"error: text that is not {error.encoding}: {error.reason}", file=sys.stderr)
        print("hint: herd reads and writes text; PYTHONIOENCODING=utf-8 sets how", file=sys.stderr)
        return 2
    except OSError as error:  # of files and disks; what herd expects of them it says better, as a HerdError
        print(f"error: {error.strerror or error}{f': {error.filename}' if error.filename else ''}", file=sys.stderr)
        print("hint: look at the path, its permissions and the room on its disk", file=sys.stderr)
        _drop_stdout()
        return 1


def _drop_stdout() -> None:
    """Let nothing more be written: python would complain once more at exit."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        print(HELP)
        return 0
    if args[0] in ("-V", "--version"):
        print(f"herd {__version__}")
        return 0
    verb = args[0]
    if verb not in VERBS:
        raise UsageError(f"there is no verb {verb!r}", nearest(verb, VERBS) or "herd --help lists them")
    import tyro

    from herd.log import show_logs

    show_logs()
    module = importlib.import_module(f"herd.cli.{verb}")
    args, words = (args[: args.index("--")], args[args.index("--") + 1 :]) if "--" in args else (args, [])
    options = tyro.cli(
        module.Options,
        args=args[1:],
        prog=f"herd {verb}",
        description=module.__doc__,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.UseAppendAction),
    )
    if words:  # what follows -- is taken as it is, dashes and all
        if not hasattr(options, "words"):
            raise UsageError(f"herd {verb} takes nothing after --, and got {' '.join(words)!r}")
        options = replace(options, words=(*options.words, *words))
    code: int = module.run(options)
    return code


if __name__ == "__main__":
    sys.exit(main())
