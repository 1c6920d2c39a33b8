"""Parameters and gradients end to end: views that optimizers, files and copies take for ordinary parameters."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import slothcore
from slothcore.models.checkpoint import save_tensors
from slothcore.models.decoder import Decoder
from slothcore.models.flat_factors import GRANULE, FlatFactors
from slothcore.training.config import TrainConfig
from slothcore.training.optimizer import optimizer_state
from slothcore.training.parameter_groups import parameter_groups
from tests.models import graph_models
from tests.models.tiny import SIZES, token_ids

SHAPES = [(3, 5), (256,), (7,), (16, 32), (300, 2)]


def parameters(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def test_values_stay_and_lie_end_to_end() -> None:
    ours, before = parameters(), [p.detach().clone() for p in parameters()]
    objects = list(map(id, ours))
    flat = FlatFactors(ours)
    assert list(map(id, ours)) == objects
    for parameter, value in zip(ours, before, strict=True):
        assert torch.equal(parameter, value)
        assert parameter.is_leaf
        assert parameter.requires_grad
        assert parameter.untyped_storage().data_ptr() == flat.groups[0].parameters_vector.untyped_storage().data_ptr()
        assert parameter.storage_offset() % GRANULE == 0
    # Matrices come before vectors, so that each kind is one run.
    assert [p.dim() for p in flat.parameters] == [2, 2, 2, 1, 1]
    end = 0
    for parameter in flat.parameters:
        assert parameter.storage_offset() == end
        end += -(-parameter.numel() // GRANULE) * GRANULE
    assert (
        end
        == len(flat.groups[0].parameters_vector)
        == len(flat.groups[0].gradients_vector)
        == flat.groups[0].starts[-1]
    )
    assert flat.groups[0].parameters_vector.abs().sum() == pytest.approx(sum(float(v.abs().sum()) for v in before))
    assert flat.is_intact()


def loss_of(ours: list[nn.Parameter], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return sum((p * torch.randn(p.shape, generator=generator)).sin().sum() for p in ours)


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("clears", ["vectors", "to none", "to zero"])
def test_an_optimizer_steps_as_over_separate_parameters(optimizer_class: type, clears: str) -> None:
    ours, theirs = parameters(), parameters()
    flat = FlatFactors(ours)
    optimizers = [optimizer_class(p, lr=0.1, weight_decay=0.1) for p in (ours, theirs)]
    for step in range(4):
        loss_of(theirs, step).backward()
        flat.attach()
        gradients = dict(zip(ours, torch.autograd.grad(loss_of(ours, step), ours), strict=True))
        flat.add([gradients[parameter] for parameter in flat.parameters])
        for mine, other in zip(ours, theirs, strict=True):
            assert torch.equal(mine.grad, other.grad)
        for optimizer in optimizers:
            optimizer.step()
        if clears == "vectors":
            flat.zero_grad()
        else:
            optimizers[0].zero_grad(set_to_none=clears == "to none")
        optimizers[1].zero_grad()
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)
    # What lies between parameters is still zero.
    in_parameters = sum(int((p.detach() != 0).sum()) for p in ours)
    assert int((flat.groups[0].parameters_vector != 0).sum()) == in_parameters


def test_attach_clears_keeps_or_moves_a_gradient() -> None:
    flat = FlatFactors(parameters())
    none, attached, foreign, *rest = flat.parameters
    flat.groups[0].gradients_vector.fill_(3.0)
    attached.grad = flat.groups[0].gradients[1]
    foreign.grad = torch.full_like(foreign, 5.0)
    assert not flat.is_attached()
    flat.attach()
    assert flat.is_attached()
    assert (none.grad == 0).all()
    assert (attached.grad == 3).all()
    assert (foreign.grad == 5).all()
    assert all((p.grad == 0).all() for p in rest)
    # None at all: even what lies between is cleared.
    for parameter in flat.parameters:
        parameter.grad = None
    flat.groups[0].gradients_vector.fill_(3.0)
    flat.attach()
    assert (flat.groups[0].gradients_vector == 0).all()


def test_an_ordinary_backward_pass_adds_into_the_vector() -> None:
    ours = parameters()
    flat = FlatFactors(ours)
    flat.zero_grad()
    loss_of(ours, 1).backward()
    loss_of(ours, 1).backward()
    assert flat.is_attached()
    expected = torch.autograd.grad(loss_of(ours, 1), ours)
    assert flat.groups[0].gradients_vector.abs().sum() > 0
    for parameter, gradient in zip(ours, expected, strict=True):
        assert torch.equal(parameter.grad, 2 * gradient)


def test_strided_and_missing_gradients_are_added() -> None:
    flat = FlatFactors(parameters())
    flat.attach()
    gradients: list[Tensor | None] = [
        torch.randn(p.shape[::-1]).permute(*reversed(range(p.dim()))) for p in flat.parameters
    ]
    assert not gradients[0].is_contiguous()
    gradients[1] = None
    flat.add(gradients)
    flat.add(gradients)
    for parameter, gradient in zip(flat.parameters, gradients, strict=True):
        assert torch.equal(parameter.grad, torch.zeros_like(parameter) if gradient is None else 2 * gradient)


def test_graphs_lay_factors_b_after_all_others() -> None:
    """So that those that may have a rate of their own are one launch of an optimizer, in the order of its groups."""
    model = graph_models.tiny(bias="all", variant=next(v for v in graph_models.VARIANTS if str(v) == "llama-biases"))
    flat = graph_models.enable(model).flat
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    kinds = [names[id(parameter)].rpartition(".")[2] for parameter in flat.parameters]
    edges = [i for i in range(1, len(kinds)) if kinds[i] != kinds[i - 1]]
    assert [kinds[0], *(kinds[i] for i in edges)] == ["lora_A", "lora_B", "bias"]
    groups = parameter_groups(model, TrainConfig(loraplus_lr_ratio=4.0, weight_decay=0.1))
    assert [id(p) for group in groups for p in group["params"]] == [id(p) for p in flat.parameters]


def test_each_dtype_has_a_vector() -> None:
    ours = [*parameters(), nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))]
    flat = FlatFactors(ours)
    assert [group.parameters_vector.dtype for group in flat.groups] == [torch.float32, torch.bfloat16]
    flat.attach()
    flat.add([torch.ones_like(p) for p in flat.parameters])
    assert all((p.grad == 1).all() for p in ours)


def test_refuses_nothing_and_twice_the_same() -> None:
    with pytest.raises(ValueError, match="no parameter"):
        FlatFactors([])
    one = parameters()[0]
    with pytest.raises(ValueError, match="given twice"):
        FlatFactors([one, one])


def test_notices_that_parameters_left() -> None:
    module = nn.Linear(5, 3)
    flat = FlatFactors(module.parameters())
    assert flat.is_intact()
    module.double()
    assert not flat.is_intact()


def adapted(seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    model = slothcore.from_config({**SIZES, "model_type": "llama"}, device="cpu")
    slothcore.add_lora(model, r=3)  # factors of sizes that are no multiple of anything
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.1)
    return model


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def test_an_adapter_is_saved_byte_for_byte_and_loads(tmp_path: Path) -> None:
    plain, flat = adapted(), adapted()
    FlatFactors(trained(flat))
    slothcore.save_adapter(plain, tmp_path / "plain")
    slothcore.save_adapter(flat, tmp_path / "flat")
    names = sorted(file.name for file in (tmp_path / "plain").iterdir())
    assert "adapter_model.safetensors" in names
    for name in names:
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "flat" / name).read_bytes(), name
    again = slothcore.from_config({**SIZES, "model_type": "llama"}, device="cpu")
    slothcore.load_adapter(again, tmp_path / "flat")
    for mine, other in zip(trained(again), trained(plain), strict=True):
        assert torch.equal(mine, other)


def test_a_state_dict_is_saved_and_loaded_in_place(tmp_path: Path) -> None:
    model, other = adapted(), adapted(seed=1)
    flat = FlatFactors(trained(model))
    save_tensors({name: t.contiguous() for name, t in model.state_dict().items()}, tmp_path / "model.safetensors")
    stored = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in model.state_dict().items())
    model.load_state_dict(other.state_dict())
    assert flat.is_intact()
    for mine, theirs in zip(trained(model), trained(other), strict=True):
        assert torch.equal(mine, theirs)


def test_copies_have_storage_of_their_own(tmp_path: Path) -> None:
    model = adapted()
    flat = FlatFactors(trained(model))
    optimizer = torch.optim.AdamW(flat.parameters, lr=0.1)
    model(token_ids(12), labels=token_ids(12)).loss.backward()
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    moments = [entry["exp_avg"] for entry in state["state"].values()]
    assert all(moment.untyped_storage().nbytes() == moment.nbytes for moment in moments), "a moment holds a vector"
    tensors, _ = optimizer_state(optimizer, dict(model.named_parameters()))
    save_tensors(tensors, tmp_path / "optimizer.safetensors")
    assert load_file(tmp_path / "optimizer.safetensors").keys() == tensors.keys()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        flat.groups[0].parameters_vector.zero_()
    assert all(float(p.detach().abs().sum()) == 0 for p in trained(model))
    assert all(p.untyped_storage().nbytes() == p.nbytes and float(p.detach().abs().sum()) > 0 for p in trained(twin))
