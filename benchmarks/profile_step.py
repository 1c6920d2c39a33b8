"""Where the time of one training step of slothcore goes: kernels by share, and the host's operations.

python benchmarks/profile_step.py [--cases 4x2048,2x256] [--bits 4] [--lora-r 16] [--recompute mlp] [--layers 32]
"""

import argparse
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.profiler import DeviceType, ProfilerActivity, profile

from benchmarks import checkpoint, harness, shapes, worker
from benchmarks.peers import RECOMPUTE, Settings, peer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="4x2048,2x256", help="ROWSxLENGTH, comma-separated")
    parser.add_argument("--bits", type=int, default=4, choices=(4, 16))
    parser.add_argument("--lora-r", type=int, default=16, metavar="R")
    parser.add_argument("--recompute", default="no", choices=RECOMPUTE)
    parser.add_argument("--layers", type=int, default=shapes.LLAMA_3_1_8B["num_hidden_layers"])
    parser.add_argument("--kernels", type=int, default=25, help="how many kernels to list")
    args = parser.parse_args()
    config = shapes.LLAMA_3_1_8B | {"num_hidden_layers": args.layers}
    folder = checkpoint.write_checkpoint(checkpoint.default_folder(config), config, device="cuda")
    cases = [shapes.StepCase.parse(case) for case in args.cases.split(",")]
    longest = max(case.length for case in cases)
    settings = Settings(str(folder), args.bits, args.recompute, args.lora_r, longest=longest, device="cuda")
    system = peer("slothcore")
    start = time.perf_counter()
    model = system.load(settings)
    factors = worker.lora_factors(model, layers=args.layers)
    worker.set_factors(factors)
    optimizer = worker.make_optimizer(system, list(factors.values()), settings)
    print(f"loaded in {time.perf_counter() - start:.1f} s")
    for case in cases:
        profile_case(system, model, factors, optimizer, settings, case, config["vocab_size"], args.kernels)


def profile_case(system, model, factors, optimizer, settings, case, vocab_size: int, listed: int) -> None:
    """Print the step's wall time, the time of its phases on the host, and its kernels."""

    def step() -> dict[str, float]:
        input_ids = worker.random_batch(case, 0, vocab_size)
        marks = {"start": time.perf_counter()}
        loss = system.loss(model, input_ids, settings)
        marks["forward"] = time.perf_counter()
        loss.backward()
        marks["backward"] = time.perf_counter()
        torch.nn.utils.clip_grad_norm_(factors.values(), worker.MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        marks["optimizer"] = time.perf_counter()
        torch.cuda.synchronize()
        marks["wait"] = time.perf_counter()
        return {name: 1e3 * (now - before) for (_, before), (name, now) in pairwise(marks.items())}

    for _ in range(3):
        step()
    host = step()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        step()
    kernels: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in recorded.events():
        if event.device_type == DeviceType.CUDA:
            kernels[event.name] += event.device_time
            calls[event.name] += 1
    hosts = sorted(
        (e for e in recorded.key_averages() if e.device_type == DeviceType.CPU), key=lambda e: -e.self_cpu_time_total
    )
    phases = ", ".join(f"{name} {value:.1f}" for name, value in host.items())
    total = sum(kernels.values()) / 1e3
    print(f"\n{case.rows}x{case.length}: {sum(host.values()):.1f} ms (host: {phases}); kernels {total:.1f} ms")
    rows = [
        [f"{microseconds / 1e3:.2f}", f"{microseconds / 10 / total:.1f}%", str(calls[name]), name[:90]]
        for name, microseconds in kernels.most_common(listed)
    ]
    print(harness.format_table(["ms", "share", "calls", "kernel"], rows))
    rows = [[f"{e.self_cpu_time_total / 1e3:.2f}", str(e.count), e.key[:90]] for e in hosts[:listed]]
    print(harness.format_table(["host ms (profiled)", "calls", "operation"], rows))


if __name__ == "__main__":
    main()
