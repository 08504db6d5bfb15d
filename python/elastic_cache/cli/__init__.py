"""The command `elastic-cache`: one file a command, one sentence for whatever goes wrong.

Commands import torch and the operators when they run, so that `--help` is instant and `doctor`
can say why an import fails.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from elastic_cache.errors import ElasticCacheError

EXIT_ERROR, EXIT_INTERRUPTED = 2, 130
USER_ERRORS = (ValueError, ElasticCacheError, OSError, ImportError, MemoryError)


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line as every other mistake is reported, without the usage text."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code (2: wrong input, 130: interrupted)."""
    try:
        options = _parser().parse_args(argv)
        code: int = options.run(options)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output went away; Python must not try to flush into it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_ERROR
    except USER_ERRORS as error:
        print(f"error: {sentence(error)}", file=sys.stderr)
        return EXIT_ERROR


def _parser() -> argparse.ArgumentParser:
    # Imported here so that an interrupt at any moment is caught by `main`.
    from elastic_cache.cli import bench, chat, doctor, generate, info, serve

    parser = _Parser(
        prog="elastic-cache",
        description="Fast inference for masked-diffusion language models.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for module in (generate, chat, serve, info, doctor, bench):
        module.add_command(commands)
    return parser


def sentence(error: BaseException) -> str:
    """The error on one line."""
    return " ".join(str(error).split()) or type(error).__name__
