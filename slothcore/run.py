"""A whole run from its configuration: data, model, adapter, loop. Everything is checked before anything is written."""

import shlex
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slothcore.data.columns import ColumnTemplates
from slothcore.data.dataset import Dataset, open_dataset
from slothcore.data.formats import INSTRUCTIONS, plain_record
from slothcore.data.preferences import CONVERSATIONS
from slothcore.data.templates import template_source
from slothcore.data.tokenizer import Tokenizer
from slothcore.loading import load
from slothcore.lora.attach import lora_config_of
from slothcore.models.checkpoint import stored_tensors
from slothcore.models.decoder import Decoder
from slothcore.models.load import resolve_device
from slothcore.models.prequantized import quantized_weights
from slothcore.notices import notices
from slothcore.training.adapter_choice import put_adapter
from slothcore.training.config import TrainConfig
from slothcore.training.new_tokens import add_tokens
from slothcore.training.optimizer_kinds import check_optimizer
from slothcore.training.preparation import check_evaluation, shows_progress
from slothcore.training.progress import say
from slothcore.training.run_folder import check_output_dir, find_source
from slothcore.training.run_state import find_checkpoint
from slothcore.training.sample_prompts import check_prompt_files
from slothcore.training.trackers import check_trackers
from slothcore.training.trainer import SFTTrainer, TrainResult

# Of the record shown in the command that talks to the result; a longer one would bury the command.
LONGEST_EXAMPLE = 200
# safetensors' names of them; None: bfloat16, where the GPU has it.
DTYPES_OF_16_BITS = {"BF16": None, "F16": "float16"}


def train_from_config(config: TrainConfig) -> TrainResult:
    """Fine-tune `config.model` on `config.data`.

    The cheap checks come first: a typing error is not worth the loading of a model.

    Raises: ValueError or FileNotFoundError in one sentence for anything in the configuration, the data or the model
        that cannot be trained with; then nothing was written.
    """
    if config.source is None:
        raise ValueError("model is not set; give --model NAME_OR_FOLDER, or model: in the configuration file")
    if config.data is None:
        raise ValueError("data is not set; give --data FILE, or data: in the configuration file")
    check_output_dir(config)
    check_evaluation(config, has_data=bool(config.eval_data or config.eval_fraction))
    check_trackers(config.report_to)
    check_prompt_files(config)
    if config.resume_from_checkpoint is not None:
        find_checkpoint(str(config.resume_from_checkpoint), Path(config.output_dir))
    if config.chat_template is not None:
        template_source(config.chat_template)
    device = resolve_device(config.device)
    check_optimizer(config.optim, device)
    train_records, eval_records = read_records(config)
    with notices(say):
        model, tokenizer = load_both(
            config.source,
            adapter=config.adapter if config.model else None,
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
    if config.new_tokens:
        add_tokens(model, tokenizer, config.new_tokens)
    put_adapter(model, config)
    result = SFTTrainer(model, tokenizer, train_records, eval_records, config).train()
    if not result.interrupted:
        say(f"talk to it: {how_to_talk(config, train_records[0])}")
    return result


def load_both(name: str, **options: Any) -> tuple[Decoder, Tokenizer]:
    """`slothcore.load` for callers that need the tokenizer too. Raises ValueError if there is none."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*has no tokenizer.json")
        model, tokenizer = load(name, **options)
    return model, require_tokenizer(tokenizer, name)


def require_tokenizer(tokenizer: Tokenizer | None, name: str) -> Tokenizer:
    """The tokenizer of the model `name`. Raises ValueError, saying how to make one, if there is none."""
    if tokenizer is None:
        raise ValueError(
            f"{name} has no tokenizer.json; put the tokenizer's files into that folder, or make one with "
            "transformers: AutoTokenizer.from_pretrained(..).save_pretrained(..)"
        )
    return tokenizer


def read_records(config: TrainConfig) -> tuple[Dataset, Dataset | None]:
    """The records to train and to evaluate on, each of them checked; a wrong one is found before a model is loaded.

    Raises: ValueError or FileNotFoundError for files that cannot be read, or too few records to hold some out.
    """
    assert config.data is not None
    records = _open_records(config, config.data, weights=config.data_weights)
    if config.eval_data:
        return records, _open_records(config, config.eval_data)
    if config.eval_fraction:
        return records.hold_out(config.eval_fraction, seed=config.seed)
    return records, None


def _open_records(
    config: TrainConfig, data: str | tuple[str, ...], *, weights: tuple[float, ...] | None = None
) -> Dataset:
    return open_dataset(
        data,
        config.format,
        text_field=config.text_field,
        prompt_template=config.prompt_template,
        completion_template=config.completion_template,
        weights=weights,
        on_bad_row=config.on_bad_row,
        token=config.token,
        local_files_only=config.local_files_only,
        progress=shows_progress(config),
    )


def how_to_talk(config: TrainConfig, record: Mapping[str, Any]) -> str:
    """The command that asks the result in the layout that it was trained on, of which `record` is one."""
    flags, run = {"--prompt": "Hello"}, shlex.quote(config.output_dir)
    if config.completion_template is not None:
        prompt, _ = ColumnTemplates(config.completion_template, config.prompt_template or "").fill(record, "the record")
        flags = {"--prompt": _example(prompt)}
    else:
        name, plain = plain_record(record, format=config.format, text_field=config.text_field)
        if name in INSTRUCTIONS:
            question, _, context = INSTRUCTIONS[name]
            flags = {"--instruction": str(plain[question]), "--input": str((context and plain.get(context)) or "")}
            if sum(map(len, flags.values())) > LONGEST_EXAMPLE:
                flags = {"--instruction": "Hello"}
        elif name == "prompt" and isinstance(plain["prompt"], str):
            flags = {"--prompt": _example(plain["prompt"])}
        elif name in CONVERSATIONS:
            return f"slothcore chat --model {run}"
    asked = " ".join(f"{flag} {shlex.quote(text)}" for flag, text in flags.items() if text)
    return f"slothcore generate --model {run} {asked}"


def _example(prompt: str) -> str:
    """A prompt of the data if it can stand in a command of one line, and else a word."""
    fits = prompt.strip() and len(prompt.splitlines()) == 1 and len(prompt) <= LONGEST_EXAMPLE
    return prompt if fits and not prompt.startswith("-") else "Hello"


def open_result(
    name_or_run: str,
    *,
    adapter: str | None = None,
    bits: int | None = None,
    device: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
) -> tuple[Decoder, Tokenizer]:
    """The model of a run, an adapter on its base, or a plain model, ready to generate.

    Args:
        adapter: a run, or an adapter, that is put on the model, which is a base then; None: the base is the one that
            the adapter names.
        bits: of the base weights; None: as the run was trained, or 4.
        device, revision, token, local_files_only: as `load` has them.
    Raises: ValueError or FileNotFoundError if there is nothing to open.
    """
    trained = find_source(adapter or name_or_run).config
    return load_both(
        name_or_run,
        adapter=adapter,
        bits=bits or (trained.bits if trained else 4),
        dtype=trained.dtype if trained and bits in (None, trained.bits) else None,
        device=device,
        revision=revision,
        token=token,
        local_files_only=local_files_only,
    )


def open_as_stored(name_or_run: str, *, bits: int | None = None, **options: Any) -> tuple[Decoder, Tokenizer]:
    """`open_result` for what writes whole weights: of a plain model, with the bits that these have in its files.

    Those beside an adapter are as they were trained beside; alone, they would lose in 4 bits what nobody has asked for.

    Raises: ValueError or FileNotFoundError as `open_result`.
    """
    model, tokenizer = open_result(name_or_run, bits=bits, **options)
    if bits is not None or model.bits != 4 or model.folder is None or lora_config_of(model) is not None:
        return model, tokenizer
    stored = stored_tensors(model.folder)
    if quantized_weights(stored):
        return model, tokenizer
    del model
    options.pop("adapter", None)
    dtypes = {tensor.dtype for tensor in stored.values() if len(tensor.shape) > 1}
    if len(dtypes) == 1 and dtypes <= DTYPES_OF_16_BITS.keys():
        return load_both(name_or_run, bits=16, dtype=DTYPES_OF_16_BITS[dtypes.pop()], **options)
    return load_both(name_or_run, bits=32, **options)
