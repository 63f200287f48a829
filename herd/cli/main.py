"""`herd VERB ...`: finds the verb, parses its options, runs it, and turns errors into two lines and an exit code."""

import importlib
import os
import sys

from herd import __version__
from herd.errors import HerdError, UsageError, nearest

VERBS = {
    "chat": "talk in the terminal, images with @file",
    "generate": "continue a text, to stdout",
    "serve": "OpenAI API on 127.0.0.1:8000",
    "inspect": "layers, parameters, memory at each context, will it fit here",
    "convert": "from any checkpoint to herd, Hugging Face, Meta or GGUF",
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
    except BrokenPipeError:  # the reader of a pipe has left; python would complain once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


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
    options = tyro.cli(
        module.Options,
        args=args[1:],
        prog=f"herd {verb}",
        description=module.__doc__,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    code: int = module.run(options)
    return code


if __name__ == "__main__":
    sys.exit(main())
