"""Throughput of `slothcore serve` under load, beside the same prompts given to its engine at once.

    python benchmarks/serve.py
    python benchmarks/serve.py --clients 64 --prompt 128 --new-tokens 256 --adapters 2
    python benchmarks/serve.py --tiny --device cpu --bits 32

A model of Llama-3.1-8B's shape with random weights in NF4 and adapters of random factors, not merged, is loaded once.
Its engine continues the prompts as one batch; then a server over the same model is asked for them by as many clients at
once, each of which streams its answer. Clients are a process of their own, so that what they cost is not the server's.
Both have two rounds that do not count, in which kernels are compiled and steps of every size captured as graphs.

The server makes tokens, turns them to text and sends each as it comes. Its rate over the engine's is what that costs.
Every client has to get all of its tokens; in 32 bits the texts must be those of the batch, in fewer bits near ties are
decided by the order of sums, which changes with the number of rows, and the share of equal texts is printed.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from safetensors.torch import save_file

from benchmarks import checkpoint, harness, random_model
from slothcore.data.tokenizer import Tokenizer
from slothcore.inference.engine import Engine, Request
from slothcore.lora.config import LoraConfig
from slothcore.lora.plan import AdapterPlan
from slothcore.lora.several import SeveralAdapters
from slothcore.lora.stored_adapter import PREFIX, WEIGHTS_FILE
from slothcore.models.decoder import Decoder
from slothcore.models.load import load_model
from slothcore.serve.models import ServedModel
from slothcore.serve.port import Port
from slothcore.serve.server import Server

FACTOR_STD = 0.02
WARM_ROUNDS = 2
SECONDS_TO_START = 600
Row = dict[str, Any]


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=64, metavar="N", help="that ask at once; default: 64")
    parser.add_argument("--prompt", type=int, default=128, metavar="N", help="tokens of a prompt; default: 128")
    parser.add_argument("--new-tokens", type=int, default=256, metavar="N", help="of each answer; default: 256")
    parser.add_argument("--adapters", type=int, default=1, metavar="N", help="that clients ask for in turn; default: 1")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds; the median counts")
    random_model.add_options(parser)
    args = parser.parse_args(argv)
    if min(args.clients, args.prompt, args.new_tokens, args.adapters, args.rounds) < 1:
        parser.error("--clients, --prompt, --new-tokens, --adapters and --rounds must be at least 1")
    random_model.complete(args)
    return args


def main(argv: list[str] | None = None) -> int:
    """Run, print, record. Returns: the exit status."""
    args = parse_arguments(argv)
    checkpoint.write_checkpoint(args.checkpoint, args.config, device=args.device)
    model = load_model(args.checkpoint, bits=args.bits, device=args.device).eval()
    tokenizer = Tokenizer.from_folder(args.checkpoint)
    names = [f"adapter-{index}" for index in range(args.adapters)]
    with tempfile.TemporaryDirectory() as folder:
        places = {name: write_adapter(model, Path(folder) / name, args.lora_r, seed) for seed, name in enumerate(names)}
        several = SeveralAdapters(model, places)
        requests = requests_of(args, names)
        rows = [time_engine(model, several, requests, args), time_server(model, tokenizer, several, requests, args)]
    problem = compare(rows, requests, tokenizer, exactly=args.bits == 32)
    about = harness.environment()
    print(
        f"{'tiny Llama' if args.tiny else 'Llama-3.1-8B shape'}, {args.config['num_hidden_layers']} layers, "
        f"bits={args.bits}, {args.adapters} adapters of r={args.lora_r} not merged, {args.clients} x ({args.prompt} + "
        f"{args.new_tokens}) tokens, {about['gpu']}, torch {about['torch']}, triton {about['triton']}, "
        f"commit {about['commit']}\n"
    )
    print(table(rows), flush=True)
    if problem is not None:
        print(f"refused: {problem}", file=sys.stderr)
        return 1
    if args.out is not None:
        print(f"\nappended 2 rows to {harness.append_csv(args.out, [csv_row(row, args) for row in rows])}")
    return 0


def write_adapter(model: Decoder, folder: Path, rank: int, seed: int) -> Path:
    """An adapter of random factors in PEFT's format, on all linear layers. Returns: `folder`."""
    plan = AdapterPlan.of(model, LoraConfig(r=rank, lora_alpha=rank))
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"{PREFIX}{name}.lora_{kind}.weight": FACTOR_STD * torch.randn(shape[-2:], generator=generator)
        for target in plan.targets.values()
        for kind, shape in (("A", target.shape_A), ("B", target.shape_B))
        for name in target.names
    }
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(plan.config.to_json(), encoding="utf-8")
    return folder


def requests_of(args: argparse.Namespace, names: Sequence[str]) -> list[Request]:
    """A prompt of random tokens for each client, to be continued greedily to its full length."""
    generator = torch.Generator().manual_seed(0)
    low, high = len(checkpoint.SPECIAL_TOKENS), args.config["vocab_size"]
    prompts = torch.randint(low, high, (args.clients, args.prompt), generator=generator).tolist()
    return [
        Request(prompt_ids=prompt, max_new_tokens=args.new_tokens, adapter=names[index % len(names)])
        for index, prompt in enumerate(prompts)
    ]


def time_engine(model: Decoder, several: SeveralAdapters, requests: Sequence[Request], args: argparse.Namespace) -> Row:
    """The requests as one batch of an engine that has nothing else to do."""
    engine = Engine(model, max_rows=args.clients, capacity=args.prompt + args.new_tokens, adapters=several)
    seconds, firsts, written = [], [], []
    for _ in range(WARM_ROUNDS + args.rounds):
        began = time.perf_counter()
        place_of = {engine.add(request): place for place, request in enumerate(requests)}
        tokens: list[list[int]] = [[] for _ in requests]
        first = [0.0] * len(requests)
        while engine.has_work:
            for event in engine.step():
                place = place_of[event.id]
                first[place] = first[place] or time.perf_counter() - began
                tokens[place].append(event.token)
        seconds.append(time.perf_counter() - began)
        firsts.append(first)
        written.append(tokens)
    engine.close()
    del engine
    gc.collect()
    if args.device == "cuda":
        torch.cuda.empty_cache()  # the server's own engine takes what is free
    counted = slice(WARM_ROUNDS, None)
    return {
        "system": "engine",
        "seconds": seconds[counted],
        "firsts": firsts[counted],
        "written": written[counted],
        "pieces": None,
    }


def time_server(
    model: Decoder,
    tokenizer: Tokenizer,
    several: SeveralAdapters,
    requests: Sequence[Request],
    args: argparse.Namespace,
) -> Row:
    """The requests from clients that stream, all at once."""
    port = Port()
    served = [ServedModel.of(model, "base", tokenizer)]
    served += [ServedModel.of(model, name, tokenizer, adapter=name, parent="base") for name in several.names]
    server = Server(
        model, served, port, adapters=several, max_rows=args.clients, capacity=args.prompt + args.new_tokens
    )
    ready = threading.Event()
    thread = threading.Thread(target=server.run, kwargs={"ready": ready.set})
    thread.start()
    try:
        if not ready.wait(SECONDS_TO_START):
            raise RuntimeError("the server does not begin")
        rounds = run_clients(int(port.url.split(":")[2].partition("/")[0]), requests, WARM_ROUNDS + args.rounds)
        rounds = rounds[WARM_ROUNDS:]
    finally:
        server.stop()
        thread.join()
    clients = [each["clients"] for each in rounds]
    return {
        "system": "server",
        "seconds": [each["seconds"] for each in rounds],
        "firsts": [[client["first_s"] for client in each] for each in clients],
        "written": [[client["text"] for client in each] for each in clients],
        "counts": [[client["tokens"] for client in each] for each in clients],
        "pieces": statistics.mean(client["pieces"] for each in clients for client in each),
    }


def run_clients(port: int, requests: Sequence[Request], rounds: int) -> list[dict[str, Any]]:
    """What the clients of each round met."""
    bodies = [
        {
            "model": request.adapter,
            "prompt": list(request.prompt_ids),
            "max_tokens": request.max_new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        for request in requests
    ]
    with tempfile.TemporaryDirectory() as folder:
        asked, told = Path(folder) / "request.json", Path(folder) / "result.json"
        asked.write_text(json.dumps({"port": port, "bodies": bodies, "rounds": rounds}), encoding="utf-8")
        command = [sys.executable, "-m", "benchmarks.serve_clients", str(asked), str(told)]
        subprocess.run(command, cwd=harness.REPOSITORY, check=True)
        return json.loads(told.read_text(encoding="utf-8"))


def compare(rows: Sequence[Row], requests: Sequence[Request], tokenizer: Tokenizer, *, exactly: bool) -> str | None:
    """Note the share of equal texts and the ratio of the rates. Returns: why the figures are refused; None: they stand.

    Args:
        exactly: whether all texts have to be those of the batch.
    """
    engine, server = rows
    total = sum(request.max_new_tokens for request in requests)
    for row in rows:
        row["rate"] = total / statistics.median(row["seconds"])
    server["of_engine"] = server["rate"] / engine["rate"]
    expected = [tokenizer.decode(tokens) for tokens in engine["written"][0]]
    pairs = [pair for texts in server["written"] for pair in zip(texts, expected, strict=True)]
    server["equal"] = sum(text == wanted for text, wanted in pairs) / len(pairs)
    lengths = [request.max_new_tokens for request in requests]
    if any(list(map(len, tokens)) != lengths for tokens in engine["written"]) or any(
        counts != lengths for counts in server["counts"]
    ):
        return "answers of other lengths than asked for"
    if exactly and server["equal"] < 1:
        return f"{1 - server['equal']:.0%} of the texts differ from the batch's"
    return None


def table(rows: Sequence[Row]) -> str:
    header = ["", "tokens/s", "of engine", "first token ms", "p80", "pieces", "equal texts"]
    cells = []
    for row in rows:
        median, _, p80 = first_token(row)
        cells.append(
            [
                row["system"],
                f"{row['rate']:,.0f}",
                f"{row['of_engine']:.2f}" if "of_engine" in row else "",
                f"{1e3 * median:.0f}",
                f"{1e3 * p80:.0f}",
                f"{row['pieces']:.0f}" if row["pieces"] is not None else "",
                f"{row['equal']:.0%}" if "equal" in row else "",
            ]
        )
    return harness.format_table(header, cells)


def first_token(row: Row) -> tuple[float, float, float]:
    """Median, 20% and 80% quantile of the seconds until the first token."""
    return harness.quantiles([first for each in row["firsts"] for first in each])


def csv_row(row: Row, args: argparse.Namespace) -> dict[str, Any]:
    """A row as the CSV has it; its milliseconds are those of the whole round."""
    layers = args.config["num_hidden_layers"]
    median, p20, p80 = harness.quantiles(row["seconds"])
    return {
        "benchmark": "serve",
        "system": row["system"],
        "case": f"{args.clients}x{args.prompt}+{args.new_tokens}",
        "settings": f"bits={args.bits} r={args.lora_r} adapters={args.adapters} layers={layers}",
        "median_ms": f"{1e3 * median:.1f}",
        "p20_ms": f"{1e3 * p20:.1f}",
        "p80_ms": f"{1e3 * p80:.1f}",
        "tokens_per_second": f"{row['rate']:.0f}",
        "rate": f"first token {1e3 * first_token(row)[0]:.0f} ms",
    }


if __name__ == "__main__":
    sys.exit(main())
