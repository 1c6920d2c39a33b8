"""Passes over prompts as CUDA graphs: the bits of those that Python runs; and one that cannot be recorded."""

from pathlib import Path

import pytest
import torch

import slothcore
from slothcore.models.engine import Engine
from slothcore.models.graph_runs import CudaRecorder
from slothcore.models.load import load_model
from slothcore.models.requests import Request
from tests.models.engines import tokens_of
from tests.models.graph_models import VARIANTS, as_function
from tests.models.test_decoder_gpu import SIZES
from tests.models.test_prompt_passes import held, passes_of, texts_of
from tests.models.tiny import saved, tiny_llama, token_ids
from tests.models.zoo import Variant, tiny_model
from tests.models.zoo import saved as saved_variant

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("variant", [None, *VARIANTS], ids=str)
def test_graphs_have_the_bits_of_python(variant: Variant | None, tmp_path: Path) -> None:
    """Of the same padded passes over other texts than those that were there when a graph was recorded."""
    saved(tiny_llama(**SIZES), tmp_path) if variant is None else saved_variant(tiny_model(variant), tmp_path)
    model = load_model(tmp_path, bits=4 if variant is None else 16, device="cuda")
    slothcore.add_lora(model, r=4, lora_alpha=8, init_lora_weights=False)
    model.eval()
    windows = [None] * model.config.num_hidden_layers
    options = {"rows": 4, "windows": windows, "capacity": 2304}
    graphs = passes_of(model, CudaRecorder(torch.device("cuda")), **options)
    python = passes_of(model, as_function, **options)
    for lengths in ((90, 3, 20), (9,), (700, 200, 100)):
        rows = [3, 0, 2][: len(lengths)]
        for seed in range(4):
            texts = texts_of(*lengths, seed=10 * seed)
            assert torch.equal(graphs.read(rows, texts), python.read(rows, texts))
            for row in rows:
                assert all(map(torch.equal, held(graphs, row), held(python, row)))
            (more,) = texts_of(13 + seed, seed=7 * seed)
            assert torch.equal(graphs.read_on(3, more), python.read_on(3, more))
            assert all(map(torch.equal, held(graphs, 3), held(python, 3)))
    # A fourth of the passes of a size comes first; those that go on share one from 13 to 16 tokens.
    assert (graphs.replays, graphs.eager) == (3 * 3 + 3 * 4 - 1, 3 + 1)


def test_a_capture_that_fails_leaves_the_rest_as_it_was(tmp_path: Path) -> None:
    """The pass waits for the GPU, which none may while it is captured."""
    saved_variant(tiny_model(VARIANTS[0]), tmp_path)
    model = load_model(tmp_path, bits=32, device="cuda")
    engine, request = Engine(model, capacity=64), Request(prompt_ids=token_ids(9).tolist(), max_new_tokens=5)
    several = [Request(prompt_ids=token_ids(9, seed=seed).tolist(), max_new_tokens=8) for seed in range(3)]
    expected, of_several = tokens_of(engine, [request]), tokens_of(Engine(model, capacity=64), several)

    def wait(module: object, args: tuple[torch.Tensor, ...]) -> None:
        if len(args[0]) > 4:
            args[0].sum().item()

    handle = model.model.register_forward_pre_hook(wait)
    with pytest.warns(UserWarning, match="cannot be captured as a CUDA graph"):
        assert tokens_of(engine, [request]) == expected
    handle.remove()
    for _ in range(2):
        assert tokens_of(engine, [request]) == expected
    assert engine.prompts.replays == 0
    assert (before := engine.steps.replays) > 6
    # Steps of another shape are recorded by the same recorder, in the same memory.
    for _ in range(3):
        assert tokens_of(engine, several) == of_several
        assert tokens_of(engine, [request]) == expected
    assert engine.steps.replays > before + 3 * 7
