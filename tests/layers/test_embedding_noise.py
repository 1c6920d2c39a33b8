"""NEFTune's noise: transformers' formula, each document by its own length, in training passes alone."""

import math

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.neftune import neftune_post_forward_hook

from slothcore.layers.embedding_noise import add_embedding_noise
from slothcore.layers.packed import Documents
from slothcore.models.decoder import Decoder
from slothcore.models.load import from_config
from tests.training.tiny import CONFIG, tiny_model

ALPHA, HIDDEN = 5.0, 48


def documents_of(lengths: list[int], device: str = "cpu") -> Documents:
    edges = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)
    return Documents(edges, max(lengths))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_of_one_length_get_what_transformers_gives(dtype: torch.dtype) -> None:
    """From one state of the generator, up to rounding: theirs is drawn in the dtype of the embeddings."""
    rows, length, vocabulary = 3, 20, 50
    embedding = nn.Embedding(vocabulary, HIDDEN)
    embedding.neftune_noise_alpha = ALPHA
    embedding.register_forward_hook(neftune_post_forward_hook)
    ids = torch.arange(rows * length).remainder(vocabulary).view(rows, length)
    torch.manual_seed(3)
    theirs = embedding(ids).flatten(0, 1).detach()
    plain = embedding.weight[ids.flatten()].detach()
    torch.manual_seed(3)
    ours = add_embedding_noise(plain.to(dtype), documents_of([length] * rows), alpha=ALPHA)
    assert ours.dtype == dtype
    assert float((theirs - plain).abs().max()) > 0.9 * ALPHA / math.sqrt(length * HIDDEN)
    step = torch.finfo(dtype).eps * float(theirs.abs().max())
    assert float((ours.float() - theirs).abs().max()) <= 2 * step


def test_a_document_has_the_noise_of_its_own_length(kernel_device: str) -> None:
    """Not of its row's: L is the length of the document, whatever is packed beside it."""
    lengths = [3, 400, 1, 50]
    embedded = torch.zeros(sum(lengths), HIDDEN, device=kernel_device)
    noise = add_embedding_noise(embedded, documents_of(lengths, kernel_device), alpha=ALPHA)
    for part, length in zip(noise.split(lengths), lengths, strict=True):
        most = ALPHA / math.sqrt(length * HIDDEN)
        assert float(part.abs().max()) <= most * (1 + 1e-6)
        count = length * HIDDEN
        # A uniform variable: mean 0, mean square most^2 / 3, whose own deviation is 2 / sqrt(5) of that.
        assert float(part.mean()) == pytest.approx(0.0, abs=4 * most / math.sqrt(3 * count))
        assert float(part.square().mean()) == pytest.approx(most**2 / 3, rel=4 * 2 / math.sqrt(5 * count))
    assert not embedded.any(), "a new tensor"


def loss_of(model: Decoder, seed: int = 1) -> Tensor:
    ids = torch.arange(40)
    torch.manual_seed(seed)
    return model(ids, labels=ids, cu_seqlens=torch.tensor([0, 12, 40], dtype=torch.int32)).loss


def test_only_training_passes_have_noise() -> None:
    model = tiny_model()
    plain = loss_of(model.train())
    model.neftune_noise_alpha = ALPHA
    assert not torch.equal(loss_of(model), plain)
    assert torch.equal(loss_of(model), loss_of(model)), "the seed decides"
    assert not torch.equal(loss_of(model), loss_of(model, seed=2))
    with torch.no_grad():
        assert torch.equal(loss_of(model), plain)
    assert torch.equal(loss_of(model.eval()), plain)
    ids = torch.arange(8)[None]
    before = model.generate(ids, max_new_tokens=5)
    model.neftune_noise_alpha = None
    assert torch.equal(model.generate(ids, max_new_tokens=5), before)
    assert torch.equal(loss_of(model.train()), plain)


@pytest.mark.parametrize("mode", [True, "mlp", "offload"])
def test_recomputed_passes_see_the_same_noise(mode) -> None:
    gradients = []
    for checkpointing in (False, mode):
        model = tiny_model().train()
        model.neftune_noise_alpha, model.gradient_checkpointing = ALPHA, checkpointing
        loss_of(model).backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(map(torch.equal, *gradients))


def test_noise_comes_after_the_scale_of_the_embedding(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in transformers, whose embedding layer scales what its hook gets."""
    gemma = {**CONFIG, "model_type": "gemma", "hidden_act": "gelu_pytorch_tanh", "head_dim": 16}
    gemma["architectures"] = ["GemmaForCausalLM"]
    gemma["tie_word_embeddings"] = True
    model = from_config(gemma, device="cpu").train()
    model.neftune_noise_alpha = ALPHA
    seen = []

    def record(embedded: Tensor, documents: Documents, *, alpha: float) -> Tensor:
        seen.append((embedded, alpha))
        return embedded

    monkeypatch.setattr("slothcore.models.decoder_body.add_embedding_noise", record)
    loss_of(model)
    scaled = model.model.embed_tokens.weight[:40] * 8.0  # the square root of hidden_size
    assert torch.equal(seen[0][0], scaled)
    assert seen[0][1] == ALPHA
