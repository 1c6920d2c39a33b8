"""The memory plan on a GPU: what a run takes in every mode, and what graphs keep for themselves, against what was
predicted."""

import pytest
import torch

import slothcore
from benchmarks.shapes import LLAMA_3_1_8B
from slothcore.models.graph_runs import CudaRecorder
from slothcore.training.decoded import keep_decoded_layers
from slothcore.training.memory import memory_of
from tests.models.llama_on_gpu import held_by_graphs
from tests.training.tiny import random_rows, train

pytestmark = pytest.mark.gpu


def gpu_model(bits: int, **options):
    """Six layers of a 1B model, and the bytes on the GPU that are not its: the workspaces of cuBLAS among them, which
    are there for good once any test has run."""
    matrix = torch.zeros(16, 16, device="cuda", requires_grad=True)
    torch.autograd.grad((matrix @ matrix).sum(), matrix)
    CudaRecorder(matrix.device)  # and those of the stream of captures
    torch.cuda.empty_cache()
    config = LLAMA_3_1_8B | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 6, "head_dim": 64}
    model = slothcore.from_config(config, bits=bits, dtype=torch.bfloat16, device="cuda")
    slothcore.add_lora(model, r=16, **options)
    own = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    return model, torch.cuda.memory_allocated() - own


@pytest.mark.parametrize("mode", [False, "mlp", "offload", True], ids=str)
@pytest.mark.parametrize("bits", [4, 16])
def test_a_run_on_a_gpu_takes_what_was_predicted(tmp_path, capsys, bits, mode) -> None:
    model, elsewhere = gpu_model(bits)
    rows = random_rows(8, longest=2048)
    options = {"max_steps": 2, "memory_budget": "auto", "cuda_graphs": False, "max_seq_length": 2048}
    trainer, result, _ = train(tmp_path, rows, model, gradient_checkpointing=mode, **options)
    assert result.steps == 2
    tokens = sum(len(row.input_ids) for row in rows)
    measured = torch.cuda.max_memory_allocated() - elsewhere
    assert trainer.memory.peak(tokens) - trainer.memory.workspaces == pytest.approx(measured, rel=0.08)
    said = capsys.readouterr().out
    assert "a step takes 1 pass of at most" in said
    assert "at the peak" in said
    assert ("wait in host memory" in said) == (mode == "offload")


@pytest.mark.parametrize("mode", [False, "mlp", "offload", True], ids=str)
@pytest.mark.parametrize("bits", [4, 16])
def test_a_step_of_dora_on_a_gpu_takes_what_was_predicted(bits, mode) -> None:
    model, elsewhere = gpu_model(bits, use_dora=True)
    model.train().gradient_checkpointing = mode
    plan = memory_of(model, optim="adamw")
    for step in range(2):
        if step == 1:
            torch.cuda.reset_peak_memory_stats()
        ids = torch.randint(3, 128000, (4096,))
        model(ids, labels=ids).loss.backward()
        model.zero_grad()
    predicted = plan.peak(4096, passes=1) - plan.optimizer - plan.workspaces
    assert torch.cuda.max_memory_allocated() - elsewhere == pytest.approx(predicted, rel=0.08)


@pytest.mark.parametrize("graph_tokens", [0, 1024])
@pytest.mark.parametrize("decoded", [0, 3, 6])
@pytest.mark.parametrize("mode", [False, "mlp", "offload", True], ids=str)
def test_a_step_on_a_gpu_takes_what_was_predicted(mode, decoded, graph_tokens) -> None:
    """Every mode with decoded weights, and with graphs of a size below and of one above that of the pass."""
    model, elsewhere = gpu_model(bits=4)
    model.train().gradient_checkpointing = mode
    keep_decoded_layers(model, decoded)
    if graph_tokens:
        model.enable_graphs(graph_tokens)
    plan = memory_of(model, optim="adamw").keeping_decoded(decoded)
    assert plan.graph_tokens == (0 if mode == "offload" else graph_tokens)
    for tokens in (700, 4096):
        for step in range(4):  # the first compiles, the second is captured
            if step == 2:
                torch.cuda.reset_peak_memory_stats()
            ids = torch.randint(3, 128000, (tokens,))
            model(ids, labels=ids).loss.backward()
            model.zero_grad()
        replayed = 0 < tokens <= plan.graph_tokens
        # A replay's memory is the graphs' own, of which the allocator counts nothing.
        predicted = plan.peak(tokens, passes=1) - plan.optimizer
        if replayed:
            predicted = plan.static - plan.optimizer + plan.gradients + plan.loss.at(tokens)
        predicted -= plan.workspaces
        assert torch.cuda.max_memory_allocated() - elsewhere == pytest.approx(predicted, rel=0.08)
    model.disable_graphs()


@pytest.mark.parametrize(("mode", "decoded"), [(False, 0), (False, 6), ("mlp", 6), (True, 0), (True, 6)], ids=str)
def test_the_pool_of_graphs_is_as_large_as_predicted(mode, decoded) -> None:
    model, _ = gpu_model(bits=4)
    model.train().gradient_checkpointing = mode
    keep_decoded_layers(model, decoded)
    ids = torch.randint(3, 128000, (2048,))
    before = held_by_graphs()
    model.enable_graphs(2048)
    for _ in range(2):
        model(ids, labels=ids).loss.backward()
        model.zero_grad()
    assert model.graphs.captures == 1
    plan = memory_of(model, optim="adamw").keeping_decoded(decoded)
    assert plan.graph_tokens == 2048
    assert held_by_graphs() - before == pytest.approx(plan.graph_pool(2048), rel=0.15)
    model.disable_graphs()
