"""Make the base model that the demo fine-tunes: tokenizer, random Llama, every weight trained by slothcore.

    python examples/ledger/train_base.py [--steps N] [--output FOLDER]

Deterministic on the CPU given the seed, where the default run takes hours; a GPU does it in minutes. The checkpoint
beside this script is the result of one such run.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from corpus import copies, stories, tasks
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import slothcore
from slothcore.data.formats import alpaca_prompt
from slothcore.export.merged import save_merged

HERE = Path(__file__).resolve().parent
SEED = 2026
SPECIAL_TOKENS = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "pad_token": "<|pad|>"}
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


def train_tokenizer(path: Path, texts: list[str]) -> None:
    """Write a byte-level BPE tokenizer; every byte has a token, so no text is out of its reach."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MODEL["vocab_size"],
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    begin = SPECIAL_TOKENS["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A $B", special_tokens=[(begin, MODEL["bos_token_id"])]
    )
    tokenizer.save(str(path / "tokenizer.json"))
    settings = SPECIAL_TOKENS | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": MODEL["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def corpus_texts(count: int) -> list[str]:
    """Stories, tasks and copies; instructions stand in the Alpaca layout that the demo's records use too."""
    instructions = (*tasks(count * 2 // 5, SEED + 1), *copies(count // 5, SEED + 2))
    return [
        *(story["text"] for story in stories(count * 2 // 5, SEED)),
        *(alpaca_prompt(one["instruction"], one["input"]) + one["output"] for one in instructions),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000, help="optimizer steps (default: 3000)")
    parser.add_argument("--documents", type=int, default=120_000, help="documents in the corpus (default: 120000)")
    parser.add_argument("--output", type=Path, default=HERE / "base", help="folder of the model (default: base)")
    arguments = parser.parse_args()

    run = Path("runs/ledger/base")
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir(parents=True)
    texts = corpus_texts(arguments.documents)
    train_tokenizer(run, texts[: len(texts) * 4 // 5 : 20])
    tokenizer = slothcore.Tokenizer.from_folder(run)
    torch.manual_seed(SEED)
    model = slothcore.from_config(MODEL, dtype=torch.float32, device="cuda" if torch.cuda.is_available() else "cpu")
    config = slothcore.TrainConfig(
        output_dir=str(run / "run"),
        bits=32,
        full_finetuning=True,
        packing=True,
        max_seq_length=MODEL["max_position_embeddings"],
        max_steps=arguments.steps,
        per_device_train_batch_size=64,
        gradient_accumulation_steps=1,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=200,
        weight_decay=0.05,
        adam_beta2=0.98,
        eval_fraction=0.0,
        logging_steps=50,
        save_steps=0,
        seed=SEED,
    )
    records = [{"text": text} for text in texts]
    evaluation, train = records[::100], [record for i, record in enumerate(records) if i % 100]
    slothcore.SFTTrainer(model, tokenizer, train, evaluation, config=config).train()
    shutil.rmtree(arguments.output, ignore_errors=True)
    save_merged(model, tokenizer, arguments.output, dtype=torch.bfloat16)


if __name__ == "__main__":
    main()
