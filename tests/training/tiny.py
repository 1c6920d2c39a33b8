"""A Llama of a few thousand weights and a tokenizer of single bytes, made here, for tests of training on a CPU."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from slothcore.data.masking import TokenizedRow
from slothcore.lora.attach import add_lora
from slothcore.models.checkpoint import save_pretrained
from slothcore.models.load import from_config
from slothcore.training.config import TrainConfig
from slothcore.training.report import read_log
from slothcore.training.trainer import SFTTrainer

BOS, EOS = "<s>", "</s>"
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": len(ALPHABET) + 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "initializer_range": 0.08,
    "tie_word_embeddings": False,
    "bos_token_id": len(ALPHABET),
    "eos_token_id": len(ALPHABET) + 1,
}

QUIET = {"disable_tqdm": True, "plot": False, "save_steps": 0, "logging_steps": 1}


def write_tokenizer(folder: Path) -> Path:
    """A byte-level tokenizer without merges: one token a byte, and two special ones."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab = {token: index for index, token in enumerate([*ALPHABET, BOS, EOS])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([BOS, EOS])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": BOS, "eos_token": EOS}))
    return folder


def write_model(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """A Hugging Face folder with random float32 weights and the tokenizer."""
    torch.manual_seed(seed)
    config = {**CONFIG, **changes}
    model = from_config(config, device="cpu")
    save_pretrained(model.state_dict().items(), folder, hf_config=config)
    return write_tokenizer(folder)


def write_records(path: Path, count: int = 24) -> Path:
    """Prompts and completions of varying length, deterministic."""
    records = [
        {"prompt": f"Add {i} and {i * 7 % 13}." + " Say it." * (i % 3), "completion": str(i + i * 7 % 13) * (1 + i % 4)}
        for i in range(count)
    ]
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n", encoding="utf-8")
    return path


def random_rows(count: int, *, seed: int = 0, longest: int = 40) -> list[TokenizedRow]:
    """Tokenised documents of random lengths, with random shares of them learned."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    rows = []
    for _ in range(count):
        length = draw(4, longest + 1)
        ids = torch.randint(0, len(ALPHABET), (length,), generator=generator).tolist()
        ignored = draw(0, length - 1)
        rows.append(TokenizedRow(ids, [-100] * ignored + ids[ignored:]))
    return rows


def tiny_model(*, bits: int = 32, dropout: float = 0.0, **config):
    """A model with an adapter of which every factor has a gradient."""
    torch.manual_seed(0)
    model = from_config({**CONFIG, **config}, bits=bits, dtype=torch.float32, device="cpu")
    model = add_lora(model, r=4, lora_alpha=8, lora_dropout=dropout)
    with torch.no_grad():
        # lora_B starts at zero, and with it every gradient of lora_A.
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(0.0, 0.02)
    return model


def train(output_dir, rows, model=None, eval_rows=None, model_name=None, **options):
    """Train on tokenised rows. Gives the trainer, its result and the log."""
    model = model or tiny_model()
    options["model"] = model_name
    config = TrainConfig(output_dir=str(output_dir), **{**QUIET, **options})
    trainer = SFTTrainer(model, None, rows, eval_rows, config)
    result = trainer.train()
    return trainer, result, read_log(output_dir / "log.jsonl")
