"""The embedding and the head when they train: their gradients, how many copies of them there are, what is planned."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import slothcore
from benchmarks.shapes import LLAMA_3_1_8B
from slothcore.autograd import cross_entropy as module
from slothcore.autograd.cross_entropy import linear_cross_entropy
from slothcore.lora.config import LoraConfig
from slothcore.models.families import decoder_config
from slothcore.models.vocabulary import round_tables
from slothcore.training.memory import memory_of, plan_memory
from tests.lora.reference import load_pair, write_tiny_llama
from tests.numerics import relative_error
from tests.training.tiny import CONFIG

BOTH = ("embed_tokens", "lm_head")
VOCABULARY, HIDDEN = 1000, 64
TABLE = VOCABULARY * HIDDEN


def model_with_tables(saved: tuple[str, ...] = BOTH, **options: Any) -> slothcore.models.decoder.Decoder:
    torch.manual_seed(0)
    model = slothcore.from_config({**CONFIG, "vocab_size": VOCABULARY}, device="cpu", **options)
    return slothcore.add_lora(model, r=4, modules_to_save=saved).train()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bits", [32, 4])
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_loss_and_gradients_are_pefts(tmp_path: Path, bits: int, tied: bool) -> None:
    """Both tables beside the factors, shared or not: each trains a copy of its own, as in PEFT."""
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    from tests.lora.test_peft_parity import compare

    pair = load_pair(write_tiny_llama(tmp_path, tie_word_embeddings=tied), bits=bits)
    compare(*pair, {"r": 4, "modules_to_save": [*BOTH], "target_modules": "all-linear"})


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize(("hidden", "limit"), [(torch.float32, 2e-6), (torch.bfloat16, 0.01)])
def test_the_gradient_of_a_float32_head_is_autograds(monkeypatch, hidden, limit, softcap) -> None:
    """Summed over nine chunks, of which the last is short, in float32 also where the products are bfloat16's."""
    monkeypatch.setattr(module, "max_chunk_rows", lambda *_: 8)
    monkeypatch.setattr(module, "ROW_MULTIPLE", 8)
    states = torch.randn(67, 32).to(hidden).requires_grad_()
    weight, targets = torch.randn(301, 32, requires_grad=True), torch.randint(0, 301, (67,))
    linear_cross_entropy(states, weight, targets, None, num_items=13, softcap=softcap).backward()
    exact = [states.detach().double().requires_grad_(), weight.detach().to(hidden).double().requires_grad_()]
    logits = exact[0] @ exact[1].t()
    capped = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    (torch.nn.functional.cross_entropy(capped, targets, reduction="sum") / 13).backward()
    assert weight.grad.dtype == torch.float32
    assert relative_error(weight.grad, exact[1].grad) < limit
    assert relative_error(states.grad, exact[0].grad) < limit


def test_the_gradient_of_an_embedding_is_summed_in_float32() -> None:
    """A token that stands a thousand times: bfloat16 would lose what is added late."""
    model = model_with_tables(("embed_tokens",), dtype=torch.bfloat16)
    embedding = model.model.embed_tokens
    rows = embedding(torch.full((1000,), 7)).to(model.dtype)
    rows.backward(torch.ones_like(rows))
    assert embedding.weight.grad.dtype == torch.float32
    assert (embedding.weight.grad[7] == 1000).all()
    assert (embedding.weight.grad[[*range(7), *range(8, VOCABULARY)]] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_computed_is_what_a_merged_model_computes(dtype) -> None:
    """A float32 table is rounded before it is used, so that a model with rounded tables gives the same bits."""
    model = model_with_tables(dtype=dtype)
    with torch.no_grad():
        for weight in (model.model.embed_tokens.weight, model.lm_head.weight):
            assert weight.dtype == torch.float32
            weight.add_(1e-4 * torch.randn_like(weight))
    ids = torch.randint(0, VOCABULARY, (1, 30))
    logits, loss = model(ids).logits, model(ids, labels=ids).loss
    assert logits.dtype == dtype
    round_tables(model)
    assert model.model.embed_tokens.weight.dtype == model.lm_head.weight.dtype == dtype
    assert torch.equal(model(ids).logits, logits)
    assert torch.equal(model(ids, labels=ids).loss, loss)


class Tables(TorchDispatchMode):
    """The most bytes of tensors [V, H] that there are at once, the weights themselves left out."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.seen = {p.untyped_storage().data_ptr(): None for p in model.parameters()}
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.shape == (VOCABULARY, HIDDEN):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.seen:
                    self.alive[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {key: (ref, size) for key, (ref, size) in self.alive.items() if not ref.expired()}
        self.most = max(self.most, sum(size for _, size in self.alive.values()))
        return result


@pytest.mark.parametrize("passes", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("saved", [BOTH, ("embed_tokens",), ("lm_head",)], ids=str)
def test_no_table_is_there_more_often_than_planned(saved, dtype, passes) -> None:
    """Of each table one gradient; while a further pass adds to it, that of the pass, and the rounded head."""
    model = model_with_tables(saved, dtype=dtype)
    plan = memory_of(model, optim="adamw")
    ids = torch.randint(0, VOCABULARY, (1, 40))
    with Tables(model) as tables:
        for _ in range(passes):
            model(ids, labels=ids).loss.backward()
    gradients = 4 * TABLE * len(saved)
    there = gradients if passes > 1 else 0
    at_loss = there + plan.loss.forward.fixed
    at_embedding = plan.embedding.fixed + (gradients if there else gradients - plan.embedding.fixed)
    assert tables.most == max(at_loss, at_embedding, gradients)
    rounded = 2 * TABLE if "lm_head" in saved and dtype == torch.bfloat16 else 0
    own = 4 * TABLE if "lm_head" in saved else 0
    assert plan.loss.forward.fixed == own + rounded
    assert plan.loss.backward.fixed == own
    assert plan.embedding.fixed == (4 * TABLE if "embed_tokens" in saved else 0)


@pytest.mark.parametrize("passes", [1, 2])
def test_a_table_that_is_embedding_and_head_has_three_gradients_for_a_while(passes) -> None:
    """With all weights trained: the head's waits for the embedding's, and autograd makes a third of them."""
    model = slothcore.from_config({**CONFIG, "vocab_size": VOCABULARY, "tie_word_embeddings": True}, device="cpu")
    plan = memory_of(model.train(), optim="adamw")
    ids = torch.randint(0, VOCABULARY, (1, 40))
    with Tables(model) as tables:
        for _ in range(passes):
            model(ids, labels=ids).loss.backward()
    assert tables.most == (2 + passes) * 4 * TABLE
    assert plan.peak(1, passes=passes) >= plan.static + plan.gradients + (1 + passes) * 4 * TABLE


@pytest.mark.parametrize(("optim", "state"), [("adamw", 8), ("adamw_8bit", 2 + 8 / 256)])
def test_the_plan_of_an_8b_model_counts_both_tables(optim, state) -> None:
    """Weights, gradients and moments of 128,256 x 4096 twice, in float32 beside a 16-bit model."""
    config = decoder_config(dict(LLAMA_3_1_8B), "8B")
    options: dict[str, Any] = {"bits": 4, "optim": optim}
    without = plan_memory(config, lora=LoraConfig(r=16), **options)
    both = plan_memory(config, lora=LoraConfig(r=16, modules_to_save=BOTH), **options)
    table = 128256 * 4096
    assert without.weights - both.weights == 2 * table * 2
    assert both.trained - without.trained == both.gradients - without.gradients == 2 * table * 4
    assert both.optimizer - without.optimizer == pytest.approx(2 * table * state, abs=16)
    # A table is a batch of 8-bit AdamW by itself, and is updated where it lies.
    assert both.update == without.update < 2**28
    # In 16 bits they are no more than that: the price of exact updates.
    auto = plan_memory(config, lora=LoraConfig(r=16, modules_to_save=BOTH), lora_dtype=torch.bfloat16, **options)
    assert auto.trained < both.trained / 1.9
    # A further pass has gradients of its own for a while.
    assert both.peak(512, passes=2) >= both.static + both.gradients + table * 4


def gpu_step(saved: tuple[str, ...], passes: int, tokens: int) -> tuple[float, float]:
    """Bytes that a step takes at its peak beside what is there, and what was predicted of it."""
    config = LLAMA_3_1_8B | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 4, "head_dim": 64}
    model = slothcore.from_config(config, bits=4, dtype=torch.bfloat16, device="cuda")
    slothcore.add_lora(model, r=16, modules_to_save=saved).train()
    plan = memory_of(model, optim="adamw")
    for _ in range(2):  # the first compiles
        model.zero_grad()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for _ in range(passes):
            ids = torch.randint(3, 128000, (tokens,))
            model(ids, labels=ids).loss.backward()
    measured = torch.cuda.max_memory_allocated() - before
    held = plan.weights + plan.trained + plan.optimizer + plan.workspaces
    return measured, plan.peak(tokens, passes=passes) - held


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [256, 4096])
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("saved", [BOTH, ("embed_tokens",), ("lm_head",)], ids=str)
def test_a_step_on_a_gpu_takes_what_was_predicted(saved, passes, tokens) -> None:
    measured, predicted = gpu_step(saved, passes, tokens)
    assert predicted == pytest.approx(measured, rel=0.08)


def test_the_guide_quotes_the_plan() -> None:
    """The table of docs/continued-pretraining.md, in GiB of the two tables of an 8B model."""
    guide = (Path(__file__).resolve().parents[2] / "docs" / "continued-pretraining.md").read_text(encoding="utf-8")
    config = decoder_config(dict(LLAMA_3_1_8B), "8B")

    def figures(*, optim: Any, lora_dtype: torch.dtype) -> tuple[str, str, str]:
        options: dict[str, Any] = {"bits": 4, "optim": optim, "lora_dtype": lora_dtype}
        without = plan_memory(config, lora=LoraConfig(r=16), **options)
        both = plan_memory(config, lora=LoraConfig(r=16, modules_to_save=BOTH), **options)
        parts = (
            (getattr(both, part) - getattr(without, part)) / 2**30 for part in ("trained", "gradients", "optimizer")
        )
        weights, gradients, moments = (f"{part:.1f}" for part in parts)
        return weights, gradients, moments

    rows = {}
    for optim in ("adamw", "adamw_8bit"):
        float32, auto = (figures(optim=optim, lora_dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
        rows["the tables"] = ("2.0", float32[0], auto[0])
        rows["their gradients"] = ("-", float32[1], auto[1])
        rows[f"moments, `optim {optim}`"] = ("-", float32[2], auto[2])
    for name, cells in rows.items():
        assert f"| {name} | {' | '.join(cells)} |" in guide
