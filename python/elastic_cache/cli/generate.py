"""`elastic-cache generate`: answers one prompt, live on a terminal, plainly in a pipe."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING, Any

from elastic_cache.cli import options as shared

if TYPE_CHECKING:
    from elastic_cache.types import Generation


def add_command(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "generate", help="answer one prompt", description="Answers one prompt."
    )
    parser.add_argument(
        "--prompt", required=True, metavar="TEXT", help="the question; - reads standard input"
    )
    shared.add_model(parser)
    shared.add_policy(parser)
    shared.add_settings(parser)
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print one JSON object")
    output.add_argument("--quiet", action="store_true", help="print the answer alone")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    settings = shared.read_request(options)
    prompt = read_prompt(options.prompt)
    from elastic_cache.engine import load

    engine = load(options.model, device=options.device, dtype=options.dtype)
    if options.json:
        # On one line: a list of ids is not read by people.
        print(shared.write_json(describe(engine.generate(prompt, **settings)), indent=None))
    elif options.quiet or not sys.stdout.isatty():
        print(_answer(engine.generate(prompt, **settings)))
    else:
        from elastic_cache.display import show

        show(engine.stream(prompt, **settings), engine.model)
    return 0


def read_prompt(given: str) -> str:
    """The prompt's text; bytes that are not UTF-8 are refused wherever they came from."""
    source = "standard input" if given == "-" else "--prompt"
    raw = sys.stdin.buffer.read() if given == "-" else os.fsencode(given)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"the prompt from {source} must be valid UTF-8, got byte 0x{raw[error.start]:02x} "
            f"at offset {error.start}"
        ) from None
    return text.rstrip("\r\n") if given == "-" else text


def describe(result: Generation) -> dict[str, Any]:
    """What --json prints."""
    return {
        "text": result.text,
        "ids": result.ids.tolist(),
        "num_tokens": result.num_tokens,
        "nfe": result.nfe,
        "tokens_per_forward": result.tokens_per_forward,
        "update_frequency": result.update_frequency,
        "seconds": result.seconds,
        "finish_reason": result.finish_reason,
        "settings": result.settings,
    }


def _answer(result: Generation) -> str:
    """The text; a text prompt is refused without a tokenizer, so there always is one."""
    return result.text or ""
