"""Exact, fast LoRA and QLoRA fine-tuning of open-weight language models on your own GPU.

model, tokenizer = slothcore.load("meta-llama/Llama-3.1-8B", bits=4)
model = slothcore.add_lora(model, r=16)
slothcore.SFTTrainer(model, tokenizer, records, config=slothcore.TrainConfig(max_steps=100)).train()
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from slothcore.version import __version__

if TYPE_CHECKING:
    from slothcore.data.files import load_dataset
    from slothcore.data.standardize import standardize
    from slothcore.data.tokenizer import Tokenizer
    from slothcore.export.export import export_model
    from slothcore.export.gguf import export_gguf
    from slothcore.export.hub_upload import push_to_hub
    from slothcore.export.merged import save_merged
    from slothcore.export.ollama import export_ollama
    from slothcore.inference.chat import Chat
    from slothcore.inference.engine import Engine, Event, Request, Sampling
    from slothcore.inference.generate import generate, stream
    from slothcore.loading import load
    from slothcore.lora.adapter_io import load_adapter, save_adapter
    from slothcore.lora.attach import add_lora
    from slothcore.models.load import from_config
    from slothcore.training.config import TrainConfig
    from slothcore.training.new_tokens import add_tokens
    from slothcore.training.trainer import SFTTrainer, TrainResult

__all__ = [
    "Chat",
    "Engine",
    "Event",
    "Request",
    "SFTTrainer",
    "Sampling",
    "Tokenizer",
    "TrainConfig",
    "TrainResult",
    "__version__",
    "add_lora",
    "add_tokens",
    "export_gguf",
    "export_model",
    "export_ollama",
    "from_config",
    "generate",
    "load",
    "load_adapter",
    "load_dataset",
    "push_to_hub",
    "save_adapter",
    "save_merged",
    "standardize",
    "stream",
]

# Where each name comes from. It is imported when it is first asked for: torch takes a second, and the command line's
# help needs none of it.
_HOMES = {
    "Chat": "slothcore.inference.chat",
    "Engine": "slothcore.inference.engine",
    "Event": "slothcore.inference.engine",
    "Request": "slothcore.inference.engine",
    "SFTTrainer": "slothcore.training.trainer",
    "Sampling": "slothcore.inference.engine",
    "Tokenizer": "slothcore.data.tokenizer",
    "TrainConfig": "slothcore.training.config",
    "TrainResult": "slothcore.training.trainer",
    "add_lora": "slothcore.lora.attach",
    "add_tokens": "slothcore.training.new_tokens",
    "export_gguf": "slothcore.export.gguf",
    "export_model": "slothcore.export.export",
    "export_ollama": "slothcore.export.ollama",
    "from_config": "slothcore.models.load",
    "generate": "slothcore.inference.generate",
    "load": "slothcore.loading",
    "load_adapter": "slothcore.lora.adapter_io",
    "load_dataset": "slothcore.data.files",
    "push_to_hub": "slothcore.export.hub_upload",
    "save_adapter": "slothcore.lora.adapter_io",
    "save_merged": "slothcore.export.merged",
    "standardize": "slothcore.data.standardize",
    "stream": "slothcore.inference.generate",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
