"""The options of run.py."""

import argparse
import time

from benchmarks import random_model, shapes
from benchmarks.peers import MODULES, installed
from benchmarks.plan import OWN, parse_spec, parse_ways

# All that targets.py has a target for.
CASES = "4x2048:no+mlp+offload+yes,2x256:no+decoded,alpaca:no+decoded,2x4096@16:no"
# Seconds of the timed steps of a case; those of --growth are many.
BUDGET, GROWTH_BUDGET = 6.0, 1.5


def parse_arguments(argv: list[str] | None, description: str | None = None) -> argparse.Namespace:
    """The options, and what follows from them: `specs` of the cases, the model's `config`, its `checkpoint`.

    Exits: with status 2 and a sentence for options that make no sense.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", help=f"of {', '.join(MODULES)}, comma-separated; default: all installed")
    parser.add_argument(
        "--cases",
        default=CASES,
        help="comma-separated: ROWSxLENGTH, or alpaca, 8 sequences of Alpaca's lengths; with /N, N sequences of the "
        "step at a time; with @BITS, other weights than --bits; with :WAY+WAY, other ways than --recompute. "
        "Default: %(default)s",
    )
    parser.add_argument(
        "--recompute",
        nargs="?",
        const="yes",
        default="no",
        metavar="WAYS",
        help="what the backward pass computes again, comma-separated: no, mlp (gate and up), offload (those, and the "
        "rest waits in the host's memory), yes (all of a layer); also decoded or decodedN, which keeps the decoded "
        "weights of N layers, or all. The peers run mlp, offload and yes as their own recomputation, once",
    )
    parser.add_argument("--no-graphs", action="store_true", help="slothcore launches every kernel itself")
    parser.add_argument(
        "--within", default="", metavar="GIB", help="memory limits, comma-separated: the fastest row within each"
    )
    parser.add_argument(
        "--growth", action="store_true", help="instead of --cases: 1k to 64k tokens, 1 to 16 documents; slothcore alone"
    )
    parser.add_argument(
        "--compare", action="store_true", help="print the change of each figure since it last landed on this GPU"
    )
    parser.add_argument("--warmup", type=int, default=4, help="steps before the timed ones (transformers: at most 2)")
    parser.add_argument("--steps", type=int, default=8, help="timed steps")
    parser.add_argument(
        "--budget", type=float, metavar="SECONDS", help="of the timed steps of a case: slow ones take fewer; default 6"
    )
    parser.add_argument("--rounds", type=int, default=1, help="how often each system runs; the best round counts")
    parser.add_argument("--time-limit", type=float, default=240, metavar="SECONDS", help="of one system's process")
    parser.add_argument("--deadline", type=float, metavar="SECONDS", help="begin nothing that would outlast it")
    random_model.add_options(parser, out="folder of the CSV and the chart")
    args = parser.parse_args(argv)
    args.begun = time.monotonic()
    args.series = shapes.growth_cases(16 if args.tiny else 1024) if args.growth else ()
    if args.growth:
        args.cases = ",".join(dict.fromkeys(case for cases in args.series for case in cases))
    args.budget = (GROWTH_BUDGET if args.growth else BUDGET) if args.budget is None else args.budget
    default_systems = [OWN] if args.growth else installed()
    args.systems = args.systems.split(",") if args.systems else default_systems
    ways = args.recompute.replace(",", "+")
    try:
        args.within = [float(limit) for limit in args.within.split(",") if limit]
        parse_ways(ways)
        args.specs = [parse_spec(case, bits=args.bits, ways=ways) for case in args.cases.split(",")]
        args.longest = max(shapes.parse_case(case)[0].longest for case, _, _ in args.specs)
    except ValueError as error:
        parser.error(str(error))
    if unknown := set(args.systems) - MODULES.keys():
        parser.error(f"unknown system {', '.join(sorted(unknown))}; there are {', '.join(MODULES)}")
    if args.steps < 1 or args.rounds < 1 or args.warmup < 0:
        parser.error("--steps and --rounds must be at least 1 and --warmup at least 0")
    random_model.complete(args)
    return args
