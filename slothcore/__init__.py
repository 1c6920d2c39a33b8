"""Exact, fast LoRA and QLoRA fine-tuning of open-weight language models on your own GPU.

model, tokenizer = slothcore.load("meta-llama/Llama-3.1-8B", bits=4)
model = slothcore.add_lora(model, r=16)
slothcore.SFTTrainer(model, tokenizer, records, config=slothcore.TrainConfig(max_steps=100)).train()
"""

from slothcore.data.files import load_dataset
from slothcore.data.tokenizer import Tokenizer
from slothcore.export.merged import save_merged
from slothcore.inference.generate import generate
from slothcore.loading import load
from slothcore.lora.adapter_io import load_adapter, save_adapter
from slothcore.lora.attach import add_lora
from slothcore.models.load import from_config
from slothcore.training.config import TrainConfig
from slothcore.training.trainer import SFTTrainer, TrainResult
from slothcore.version import __version__

__all__ = [
    "SFTTrainer",
    "Tokenizer",
    "TrainConfig",
    "TrainResult",
    "__version__",
    "add_lora",
    "from_config",
    "generate",
    "load",
    "load_adapter",
    "load_dataset",
    "save_adapter",
    "save_merged",
]
