"""`elastic-cache serve`, with the embedded model at LLaDA-8B's size: for bench_serving.py --url.

    python benchmarks/inflated_server.py --device cuda --dtype bfloat16 --port 8123
    python benchmarks/bench_serving.py --url http://127.0.0.1:8123 --policies rolling:num_rows=32

The answers are the embedded model's; --soak compares them with those given one at a time, if it is
told --inflate, --device and --dtype as well, and both were told --batch-invariant.
"""

from __future__ import annotations

import argparse
import sys

from elastic_cache.cli import options as shared
from elastic_cache.cli.bench import load_engine
from elastic_cache.models.inflate import SHAPES
from elastic_cache.server import ServerOptions, create_app
from elastic_cache.server.log import log_to_stderr
from elastic_cache.server.run import bind, serve
from elastic_cache.service import Service


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shared.add_model(parser)
    shared.add_batch_invariant(parser)
    parser.add_argument("--inflate", default="llada-8b", choices=list(SHAPES))
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--concurrency", type=int, default=8, help="requests answered together")
    parser.add_argument("--max-queue", type=int, default=64)
    parser.add_argument("--max-length", type=int, default=1024, help="of prompt and answer")
    options = parser.parse_args()
    bound = bind("127.0.0.1", options.port)
    engine = load_engine(options, options.batch_invariant)
    service = Service(engine, options.concurrency, options.max_queue, options.max_length)
    app = create_app(service, engine.model, ServerOptions())
    log_to_stderr()
    serve(app, service, bound, 30.0, lambda: print("ready", flush=True))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"error: {error}")
