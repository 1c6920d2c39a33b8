"""A Hugging Face folder of a Llama with random weights, so that no benchmark needs a download."""

import json
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

SPECIAL_TOKENS = ["<s>", "</s>", "<pad>", "<unk>"]
WEIGHT_STD = 0.02
MEMORY_FOLDER = Path("/dev/shm")
# Written last, so that a checkpoint cut short is none.
FINISHED = "finished.json"


def default_folder(config: dict[str, Any]) -> Path:
    """Where the checkpoint of this shape lies between runs.

    In memory if there is ample room: a disk that is still writing 16 GB slows whatever is timed first.
    """
    shape = f"{config['hidden_size']}x{config['num_hidden_layers']}x{config['vocab_size']}"
    size = 2 * sum(math.prod(weight) for shard in shard_shapes(config) for weight in shard.values())
    name = f"slothcore-benchmark-llama-{shape}"
    in_memory = MEMORY_FOLDER.is_dir() and shutil.disk_usage(MEMORY_FOLDER).free > 2 * size
    if in_memory or (MEMORY_FOLDER / name / FINISHED).exists():
        return MEMORY_FOLDER / name
    return Path(tempfile.gettempdir()) / name


def write_checkpoint(folder: Path, config: dict[str, Any], *, device: str, seed: int = 0) -> Path:
    """Write `config` with random bfloat16 weights and a byte-level tokenizer; kept if it is there already.

    One shard a layer is drawn on `device` and written at once: a GPU fills 16 GB in the time that the disk needs.

    Returns: the folder.
    """
    finished = folder / FINISHED
    wanted = {"config": config, "seed": seed, "device": device}
    if finished.exists() and json.loads(finished.read_text(encoding="utf-8")) == wanted:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    finished.unlink(missing_ok=True)
    generator = torch.Generator(device).manual_seed(seed)
    weight_map: dict[str, str] = {}
    for number, shapes in enumerate(shard_shapes(config)):
        shard = f"model-{number + 1:05}-of-{config['num_hidden_layers'] + 1:05}.safetensors"
        weights = {name: random_weight(shape, generator) for name, shape in shapes.items()}
        save_file(weights, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(weights, shard)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    write_json(folder / "config.json", config)
    write_tokenizer(folder, config["vocab_size"])
    write_json(finished, wanted)
    if device == "cuda":
        # The systems run in other processes and find this one's memory taken.
        torch.cuda.empty_cache()
    return folder


def shard_shapes(config: dict[str, Any]) -> list[dict[str, tuple[int, ...]]]:
    """Names and shapes of the weights: one shard a layer, then the rest."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    layer = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    table = (config["vocab_size"], hidden)
    return [
        *(
            {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
            for i in range(config["num_hidden_layers"])
        ),
        {"model.embed_tokens.weight": table, "model.norm.weight": (hidden,), "lm_head.weight": table},
    ]


def random_weight(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Normal for a matrix, ones for a norm; on the CPU."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return (
        torch.empty(shape, dtype=torch.bfloat16, device=generator.device)
        .normal_(0, WEIGHT_STD, generator=generator)
        .cpu()
    )


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """One token a byte, and unused ones up to the size of the vocabulary."""
    tokens = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += [f"<unused{i}>" for i in range(vocab_size - len(tokens))]
    model = models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[], unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    names = dict(zip(("bos_token", "eos_token", "pad_token", "unk_token"), SPECIAL_TOKENS, strict=True))
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **names})


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
