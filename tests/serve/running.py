"""A server of a tiny model in this process, with a base and two adapters, on a port of its own."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import torch

from slothcore.data.tokenizer import Tokenizer
from slothcore.lora.adapter_io import load_adapter, save_adapter
from slothcore.lora.attach import add_lora
from slothcore.lora.several import SeveralAdapters
from slothcore.models.decoder import Decoder
from slothcore.models.load import from_config
from slothcore.serve.models import ServedModel
from slothcore.serve.port import Port
from slothcore.serve.server import Server
from tests.data.tiny_tokenizers import CHATML, write_byte_tokenizer
from tests.lora.reference import randomise_zero_factors

CAPACITY = 300
CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.4,
    "max_position_embeddings": CAPACITY,
    "eos_token_id": 2,
}
BASE, ADAPTERS = "tiny", {"law": {"r": 4, "lora_alpha": 24}, "poems": {"r": 6, "target_modules": ["q_proj", "up_proj"]}}
SECONDS = 60


def tiny_model(tokenizer: Tokenizer) -> Decoder:
    torch.manual_seed(5)
    return from_config({**CONFIG, "vocab_size": tokenizer.vocab_size}, device="cpu").eval()


@dataclass
class Served:
    """What is served, and the same once more, to compare with.

    Attributes:
        models: name -> the model with that adapter alone.
    """

    server: Server
    tokenizer: Tokenizer
    models: dict[str, Decoder]
    url: str

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(**self._options(options))

    def async_client(self, **options: Any) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(**self._options(options))

    def _options(self, options: dict[str, Any]) -> dict[str, Any]:
        return {"base_url": self.url, "api_key": "any", "max_retries": 0, "timeout": SECONDS, **options}

    @property
    def is_busy(self) -> bool:
        """Whether the engine is at work."""
        return self.server._engine.has_work


@contextmanager
def served(
    folder: Path,
    *,
    adapters: Sequence[str] = (),
    chat_template: str | None = CHATML,
    tokenizer: Tokenizer | None = None,
    warm: bool = False,
    port: Port | None = None,
    **options: Any,
) -> Iterator[Served]:
    """Serve, until the block ends."""
    if tokenizer is None:
        config = {} if chat_template is None else {"chat_template": chat_template}
        tokenizer = Tokenizer.from_folder(write_byte_tokenizer(folder / "tokenizer", config=config))
    models = {BASE: tiny_model(tokenizer)}
    for seed, name in enumerate(adapters):
        adapted = tiny_model(tokenizer)
        torch.manual_seed(seed)
        add_lora(adapted, **ADAPTERS[name])
        randomise_zero_factors(adapted)
        save_adapter(adapted, folder / name)
        models[name] = load_adapter(tiny_model(tokenizer), folder / name).eval()
    model = tiny_model(tokenizer)
    several = SeveralAdapters(model, {name: folder / name for name in adapters}) if adapters else None
    names = [ServedModel.of(model, BASE, tokenizer)]
    names += [ServedModel.of(model, name, tokenizer, adapter=name, parent=BASE) for name in adapters]
    port = port or Port()
    server = Server(model, names, port, adapters=several, **options)
    if warm:
        server.warm_up()
    ready = threading.Event()
    failures: list[BaseException] = []

    def run() -> None:
        try:
            server.run(ready=ready.set)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert ready.wait(SECONDS), failures
        yield Served(server, tokenizer, models, port.url)
    finally:
        server.stop()
        thread.join(SECONDS)
        assert not thread.is_alive()
