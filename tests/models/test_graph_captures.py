"""How often buckets are captured, and what it changes that somebody knows the longest pass to come: nothing else."""

import random
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from slothcore.layers import bucket as ladder
from slothcore.layers.bucket import bucket_for
from slothcore.models import graph_runs
from slothcore.models import graphs as graphs_module
from slothcore.models.decoder import Decoder
from slothcore.models.graph_runs import CudaRecorder
from slothcore.models.graphs import StepGraphs
from tests.models.graph_models import LENGTHS, as_function, batch, enable, error, loss_of, step, tiny, trained


def expecting(model: Decoder, tokens: int, **options: Any) -> StepGraphs:
    graphs = enable(model, **options)
    graphs.expected_tokens = tokens
    return graphs


@pytest.mark.parametrize(("seed", "unaware"), [(0, 38), (1, 52)])
def test_buckets_in_random_order_are_captured_once_each(
    monkeypatch: pytest.MonkeyPatch, seed: int, unaware: int
) -> None:
    """150 passes over 29 buckets. Where nobody knows the longest, larger ones that come late displace the others."""
    monkeypatch.setattr(ladder, "FINEST_STEP", 1)
    rungs = [tokens for tokens in range(2, 385) if bucket_for(tokens, documents=1).tokens == tokens]
    assert len(rungs) == 29
    order = random.Random(seed).choices(rungs, k=150)
    captures = {}
    for expected in (0, max(rungs)):
        model = tiny()
        graphs = expecting(model, expected)
        for tokens in order:
            loss_of(model, batch([tokens])).backward()
        captures[expected] = graphs.captures
        assert graphs.replays + graphs.padded == 150
    again = {tokens for tokens, times in Counter(order).items() if times > 1}
    assert captures == {0: unaware, max(rungs): len(again | {max(rungs)})}


def test_the_longest_pass_is_captured_before_any_other() -> None:
    plain, model = tiny(), tiny()
    graphs = expecting(model, 190)
    small, large = batch([60]), batch([150, 40])
    for data, counts in (
        (small, (1, 0, 0)),
        (small, (1, 1, 2)),  # both buckets
        (large, (1, 2, 2)),  # the rehearsal was its first pass
        (small, (1, 3, 2)),
    ):
        assert error(step(model, data), step(plain, data)) <= 1e-12
        assert (graphs.padded, graphs.replays, graphs.captures) == counts


def test_a_rehearsal_leaves_no_trace(nan_filled_empty: None) -> None:
    """Bit for bit, with gradients that are there already, and whether or not layers are computed again."""
    for checkpointing in (False, True):
        unaware, aware = tiny(), tiny()
        enable(unaware)
        graphs = expecting(aware, 500)
        for model in (unaware, aware):
            model.gradient_checkpointing = checkpointing
            for seed in range(4):
                loss_of(model, batch(LENGTHS[1], seed)).backward()
        assert (graphs.captures, unaware.graphs.captures) == (2, 1)
        gradients = [[parameter.grad for parameter in trained(model)] for model in (unaware, aware)]
        assert all(map(torch.equal, *gradients))
        parameters = {id(parameter) for parameter in trained(aware)}
        assert parameters == {id(parameter) for parameter in graphs.flat.parameters}


def test_what_was_expected_may_be_wrong() -> None:
    """A longer pass than that begins a new pool; and no pass beyond `max_tokens` is ever prepared for."""
    plain, model = tiny(), tiny()
    graphs = expecting(model, 60, max_tokens=256)
    small, large = batch([100]), batch([250])
    for data in (small, small, large, large, small):
        assert error(step(model, data), step(plain, data)) <= 1e-12
    assert (graphs.padded, graphs.replays, graphs.captures) == (2, 3, 3)
    model = tiny()
    graphs = expecting(model, 5000, max_tokens=256)
    seen: list[int] = []
    original = graphs._record
    graphs._record = lambda bucket: seen.append(bucket.tokens) or original(bucket)
    step(model, small)
    step(model, small)
    assert seen == [256, 128]


def test_a_changed_model_is_rehearsed_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, model = tiny(), tiny()
    graphs = expecting(model, 200)
    rehearsed: list[int] = []
    original = graphs_module.rehearse

    def rehearse(*arguments: Any) -> None:
        rehearsed.append(arguments[-1].tokens)
        original(*arguments)

    monkeypatch.setattr(graphs_module, "rehearse", rehearse)
    data = batch([60])
    for _ in range(2):
        for each in (plain, model):
            each.model.layers[0].mlp.up_proj.lora_scaling *= 0.7
        for _ in range(3):
            assert error(step(model, data), step(plain, data)) <= 1e-12
    assert rehearsed == [256, 256]
    assert (graphs.padded, graphs.replays, graphs.captures) == (2, 4, 4)


@pytest.mark.parametrize("place", ["rehearse", "recorder"])
def test_a_longest_pass_that_does_not_fit_ends_graphs_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def no_memory(*unused: object) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB\nand more")

    recorder: Callable[..., Any] = no_memory if place == "recorder" else as_function
    plain, model = tiny(), tiny()
    graphs = expecting(model, 300, recorder=recorder)
    if place == "rehearse":
        monkeypatch.setattr(graphs_module, "rehearse", no_memory)
    data = batch([60])
    step(model, data)
    with pytest.warns(UserWarning, match=r"384 tokens cannot be captured as a CUDA graph \(CUDA out of memory\. Tried"):
        step(model, data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert error(step(model, data), step(plain, data)) <= 1e-12
    assert (graphs.padded, graphs.replays, graphs.captures) == (3, 0, 0)


class NoCuda:
    """In place of torch.cuda's part in a capture."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.streams: list[SimpleNamespace] = []
        self.replays = 0
        generator = SimpleNamespace(clone_state=lambda: None, graphsafe_set_state=lambda state: None)
        monkeypatch.setattr(graph_runs, "_stream_with_workspaces", self.new_stream)
        monkeypatch.setattr(CudaRecorder, "_idle", {})
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *pool: None, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda *pool: None, raising=False)
        for name, value in {
            "device": lambda device: nullcontext(),
            "graph": lambda graph, pool, stream, capture_error_mode: nullcontext(),
            "graph_pool_handle": lambda: (0, 1),
            "current_stream": lambda: SimpleNamespace(device_index=0),
            "set_stream": lambda stream: None,
            "default_generators": [generator],
            "CUDAGraph": lambda: SimpleNamespace(replay=self.replay),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def new_stream(self, device: torch.device) -> SimpleNamespace:
        self.streams.append(SimpleNamespace(device=device))
        return self.streams[-1]

    def replay(self) -> None:
        self.replays += 1


def test_a_stream_belongs_to_one_recorder_and_its_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch keeps workspaces for each; graphs that are there at the same time must not share them."""
    cuda, device = NoCuda(monkeypatch), torch.device("cuda", 0)
    recorder = CudaRecorder(device)
    replay = recorder(lambda: None)
    other = CudaRecorder(device)
    assert len(cuda.streams) == 2
    del recorder  # its graph is still there
    CudaRecorder(device)
    assert len(cuda.streams) == 3
    replay()
    assert cuda.replays == 1
    del replay
    first, again, _ = CudaRecorder(device), CudaRecorder(device), CudaRecorder(torch.device("cuda", 1))
    assert len(cuda.streams) == 4
    assert {id(each._stream) for each in (first, again, other)} == {id(stream) for stream in cuda.streams[:3]}


def test_a_stream_of_a_failed_capture_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, device = NoCuda(monkeypatch), torch.device("cuda", 0)
    recorder = CudaRecorder(device)
    with pytest.raises(ZeroDivisionError):
        recorder(lambda: 1 / 0)
    del recorder
    assert CudaRecorder(device)._stream is cuda.streams[1]
