"""A whole run from its configuration: data, model, adapter, loop. Everything is checked before anything is written."""

import shlex
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from slothcore.data.files import load_dataset
from slothcore.data.formats import check_format_name, detect_format
from slothcore.data.tokenizer import Tokenizer
from slothcore.loading import load
from slothcore.lora.attach import add_lora, lora_config_of
from slothcore.models.decoder import Decoder
from slothcore.models.load import resolve_device
from slothcore.training.config import TrainConfig
from slothcore.training.optimizer import check_8bit
from slothcore.training.preparation import check_continued, check_evaluation
from slothcore.training.report import say
from slothcore.training.run_folder import check_output_dir, find_source
from slothcore.training.run_state import find_checkpoint
from slothcore.training.trainer import SFTTrainer, TrainResult

Records = list[dict[str, Any]]

# Of the record shown in the command that talks to the result; a longer one would bury the command.
LONGEST_EXAMPLE = 200


def train_from_config(config: TrainConfig) -> TrainResult:
    """Fine-tune `config.model` on `config.data`.

    The cheap checks come first: a typing error is not worth the loading of a model.

    Raises: ValueError or FileNotFoundError in one sentence for anything in the configuration, the data or the model
        that cannot be trained with; then nothing was written.
    """
    if config.model is None:
        raise ValueError("model is not set; give --model NAME_OR_FOLDER, or model: in the configuration file")
    if config.data is None:
        raise ValueError("data is not set; give --data FILE, or data: in the configuration file")
    check_output_dir(config)
    check_evaluation(config, has_data=bool(config.eval_data or config.eval_fraction))
    if config.resume_from_checkpoint is not None:
        find_checkpoint(str(config.resume_from_checkpoint), Path(config.output_dir))
    device = resolve_device(config.device)
    if config.optim == "adamw_8bit":
        check_8bit(device)
    train_records, eval_records = read_records(config)
    with notices(say):
        model, tokenizer = load_both(
            config.model,
            bits=config.bits,
            dtype=config.dtype,
            device=config.device,
            max_seq_length=config.max_seq_length,
            rope_scaling=config.rope_scaling,
            revision=config.revision,
            token=config.token,
            local_files_only=config.local_files_only,
            progress=not config.disable_tqdm,
        )
    if lora_config_of(model) is not None:
        check_continued(model, config)
    elif not config.full_finetuning:
        torch.manual_seed(config.seed)
        add_lora(
            model,
            r=config.r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=config.target_modules,
            bias=config.bias,
            use_rslora=config.use_rslora,
            lora_dtype=config.lora_dtype,
            modules_to_save=config.modules_to_save,
        )
    result = SFTTrainer(model, tokenizer, train_records, eval_records, config).train()
    if not result.interrupted:
        say(f"talk to it: {how_to_talk(config, train_records[0])}")
    return result


@contextmanager
def notices(tell: Callable[[str], None]) -> Iterator[None]:
    """Warnings as lines for the user, without their place in the code, each once; `tell` takes them."""
    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = lambda message, *place, **_: tell(f"note: {' '.join(str(message).split())}")
        yield


def load_both(name: str, **options: Any) -> tuple[Decoder, Tokenizer]:
    """`slothcore.load` for callers that need the tokenizer too. Raises ValueError if there is none."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*has no tokenizer.json")
        model, tokenizer = load(name, **options)
    if tokenizer is None:
        raise ValueError(
            f"{name} has no tokenizer.json; put the tokenizer's files into that folder, or make one with "
            "transformers: AutoTokenizer.from_pretrained(..).save_pretrained(..)"
        )
    return model, tokenizer


def read_records(config: TrainConfig) -> tuple[Records, Records | None]:
    """The records to train and to evaluate on.

    Raises: ValueError or FileNotFoundError for files that cannot be read, or too few records to hold some out.
    """
    assert config.data is not None
    records = load_dataset(config.data, config.format, text_field=config.text_field)
    if config.eval_data:
        return records, load_dataset(config.eval_data, config.format, text_field=config.text_field)
    if not config.eval_fraction:
        return records, None
    held_out = round(config.eval_fraction * len(records))
    if not 0 < held_out < len(records):
        raise ValueError(
            f"eval_fraction {config.eval_fraction} of {len(records)} records holds out {held_out}; "
            "change it, or give eval_data"
        )
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(config.seed)).tolist()
    # Sorted: what is left keeps the order of the file.
    return [records[i] for i in sorted(order[held_out:])], [records[i] for i in sorted(order[:held_out])]


def how_to_talk(config: TrainConfig, record: dict[str, Any]) -> str:
    """The command that asks the result in the layout that it was trained on, of which `record` is one."""
    name = check_format_name(config.format)
    if name == "auto":
        name = detect_format(record, text_field=config.text_field)
    flags = {"--prompt": "Hello"}
    if name in ("alpaca", "dolly"):
        flags = {"--instruction": record["instruction"], "--input": record.get("input") or record.get("context") or ""}
        if sum(map(len, flags.values())) > LONGEST_EXAMPLE:
            flags = {"--instruction": "Hello"}
    chat = "--chat " if name in ("messages", "conversations") else ""
    asked = " ".join(f"{flag} {shlex.quote(text)}" for flag, text in flags.items() if text)
    return f"slothcore generate --model {shlex.quote(config.output_dir)} {chat}{asked}"


def open_result(
    name_or_run: str,
    *,
    bits: int | None = None,
    device: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
) -> tuple[Decoder, Tokenizer]:
    """The model of a run, an adapter on its base, or a plain model, ready to generate.

    Args:
        bits: of the base weights; None: as the run was trained, or 4.
        device, revision, token, local_files_only: as `load` has them.
    Raises: ValueError or FileNotFoundError if there is nothing to open.
    """
    trained = find_source(name_or_run).config
    return load_both(
        name_or_run,
        bits=bits or (trained.bits if trained else 4),
        dtype=trained.dtype if trained and bits in (None, trained.bits) else None,
        device=device,
        revision=revision,
        token=token,
        local_files_only=local_files_only,
    )
