"""What the Hub of these tests holds, and how its files look to someone who has them on disk."""

from pathlib import Path
from typing import Any

from slothcore.loading import load
from slothcore.lora.adapter_io import save_adapter
from slothcore.lora.attach import add_lora
from tests.hub.client import describe
from tests.hub.server import Repository
from tests.models.tiny import saved, tiny_llama
from tests.training.tiny import write_model, write_tokenizer

MEMBER, STRANGER = "hf_member", "hf_stranger"
DECOYS = (
    "README.md",
    "consolidated.safetensors",
    "flax_model.msgpack",
    "model.fp16.safetensors",
    "onnx/model.onnx",
    "optimizer.bin",
    "original/consolidated.00.pth",
    "original/params.json",
    "pytorch_model.bin",
    "tokenizer/tokenizer.json",
    "training_args.bin",
)
TOKENIZER = ["tokenizer.json", "tokenizer_config.json"]


def write_folders(folder: Path) -> None:
    """A model, another one, one in shards, and an adapter of the first."""
    write_model(folder / "model")
    write_model(folder / "wide", seed=1, hidden_size=32, head_dim=16)
    # The library keeps what it received in steps of 10 MiB, so a shard has to be larger than that.
    write_tokenizer(saved(tiny_llama(vocab_size=96_000), folder / "sharded", max_shard_size="13MB"))
    model, _ = load(folder / "model", bits=32, device="cpu")
    model.name_or_path = "org/model"
    add_lora(model, r=4, init_lora_weights=False)
    save_adapter(model, folder / "adapter")


def repositories(folders: Path) -> dict[str, Repository]:
    """The same as repositories, with what people put beside; and some that are of no use, or not for everyone."""
    model, adapter = files_of(folders / "model"), files_of(folders / "adapter")
    decoys = dict.fromkeys(DECOYS, b"not needed")
    pickled = {name: content for name, content in model.items() if not name.endswith(".safetensors")}
    return {
        "org/model": Repository.of({**model, **decoys}),
        "org/wide": Repository.of(files_of(folders / "wide")),
        "org/sharded": Repository.of({**files_of(folders / "sharded"), **decoys}),
        "org/gated": Repository.of(model, readers=frozenset({MEMBER})),
        "org/pickled": Repository.of({**pickled, "pytorch_model.bin": b"\x80", "training_args.bin": b"\x80"}),
        "org/quantized": Repository.of({**pickled, "model-q4_k_m.gguf": b"GGUF"}),
        "org/empty": Repository.of(pickled),
        "me/adapter": Repository.of({**adapter, **decoys}),
    }


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def local(path: Path) -> dict[str, Any]:
    return describe(*load(path, bits=32, device="cpu"))
