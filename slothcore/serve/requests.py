"""What a client asks for: the body of a request, checked, in the engine's terms."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from slothcore.models.decoder import Decoder
from slothcore.models.requests import LARGEST_SEED, MOST_LOGPROBS
from slothcore.models.sampling import Sampling
from slothcore.serve.errors import ApiError, wrong
from slothcore.serve.fields import Fields

MOST_CHOICES = 128
# What the protocol gives a completion that names no number.
COMPLETION_TOKENS = 16
MOST_STOPS = 32
# What scores in float32 bear; the penalties are the protocol's.
RANGES = {
    "temperature": (0.0, 100.0),
    "frequency_penalty": (-2.0, 2.0),
    "presence_penalty": (-2.0, 2.0),
    "repetition_penalty": (0.01, 100.0),
}
# Clients that want the likeliest token write 1e-6, too.
LEAST_TEMPERATURE = 1e-4
# Where a client is silent, the model's generation_config.json may say how it is sampled best.
OF_THE_MODEL = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
# Names of variables of templates that are not the caller's to give.
RESERVED = frozenset(("messages", "self"))
Prompt = str | list[int]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What both kinds of requests have in common.

    Attributes:
        model: the name that was asked for.
        max_new_tokens: most tokens of an answer; None: as many as fit.
        choices: how many answers to each prompt.
        sampling: how tokens are chosen.
        seed: of the first answer; the next ones have the next seeds.
        stops: strings before the first of which an answer ends.
        ignores_end: whether tokens and strings that the model ends with are passed over.
        logprobs: how many alternatives of each token are reported; None: no log-probabilities at all.
        streams: whether the answer comes in pieces.
        tells_usage: whether a stream ends with the count of tokens.
    """

    model: str
    max_new_tokens: int | None
    choices: int
    sampling: Sampling
    seed: int | None
    stops: tuple[str, ...]
    ignores_end: bool
    logprobs: int | None
    streams: bool
    tells_usage: bool

    @property
    def goes_on(self) -> bool:
        """Whether answers go on with the words of the prompt, and so may begin with a space."""
        return True

    def seed_of(self, index: int) -> int | None:
        """The seed of the answer with this number."""
        return None if self.seed is None else (self.seed + index) % (LARGEST_SEED + 1)


@dataclass(frozen=True, kw_only=True)
class AskedChat(Asked):
    """A conversation that is to be answered.

    Attributes:
        messages: as the template takes them.
        template_values: what else the template reads.
    """

    messages: tuple[Mapping[str, Any], ...]
    template_values: Mapping[str, Any]

    @property
    def goes_on(self) -> bool:
        return bool(self.template_values.get("continue_final_message"))


@dataclass(frozen=True, kw_only=True)
class AskedCompletion(Asked):
    """Texts that are to be continued.

    Attributes:
        prompts: each a text, or its tokens.
        echoes: whether the answer begins with the prompt.
    """

    prompts: tuple[Prompt, ...]
    echoes: bool


def model_defaults(model: Decoder) -> Sampling:
    """How a client's silence is read: as the protocol has it, but where generation_config.json says otherwise.

    Raises: ValueError for a value there that cannot be.
    """
    said = {name: model.generation_config[name] for name in OF_THE_MODEL if model.generation_config.get(name)}
    if model.generation_config.get("do_sample") is False:
        said = {name: value for name, value in said.items() if name == "repetition_penalty"}
    try:
        return _sampling(Fields(said), Sampling(temperature=1.0))
    except ApiError as error:
        raise ValueError(f"generation_config.json: {error}; correct it there, or take the entry out") from error


def read_chat(body: Mapping[str, Any], defaults: Sampling) -> AskedChat:
    """Raises: ApiError, naming the field, for whatever is wrong."""
    fields = Fields(dict(body))
    messages = fields.take("messages")
    if not isinstance(messages, list) or not messages:
        raise wrong("messages must be a list of at least one message", param="messages")
    wanted, most = fields.flag("logprobs"), fields.whole("top_logprobs")
    if most and not wanted:
        raise wrong("top_logprobs has no effect without logprobs; set that to true", param="top_logprobs")
    values = fields.take("chat_template_kwargs") or {}
    if not isinstance(values, dict) or not RESERVED.isdisjoint(values):
        names = ", ".join(sorted(RESERVED))
        raise wrong(f"chat_template_kwargs must be an object, without {names}", param="chat_template_kwargs")
    limits = [fields.whole(name) for name in ("max_completion_tokens", "max_tokens")]
    return AskedChat(
        messages=tuple(_message(message, index) for index, message in enumerate(messages)),
        template_values=values,
        **_common(
            fields,
            defaults,
            logprobs=(most or 0) if wanted else None,
            max_new_tokens=next((limit for limit in limits if limit is not None), None),
        ),
    )


def read_completion(body: Mapping[str, Any], defaults: Sampling) -> AskedCompletion:
    """Raises: ApiError, naming the field, for whatever is wrong."""
    fields = Fields(dict(body))
    prompts, echoes, logprobs = _prompts(fields.take("prompt")), fields.flag("echo"), fields.whole("logprobs")
    if echoes and logprobs is not None:
        raise wrong("logprobs are given of new tokens only; leave out echo", param="echo")
    limit = fields.whole("max_tokens")
    best_of = fields.whole("best_of")
    asked = AskedCompletion(
        prompts=prompts,
        echoes=echoes,
        **_common(fields, defaults, logprobs=logprobs, max_new_tokens=COMPLETION_TOKENS if limit is None else limit),
    )
    if best_of not in (None, asked.choices):
        raise wrong(f"best_of must be n, which is {asked.choices}, got {best_of}; leave it out", param="best_of")
    if len(prompts) * asked.choices > MOST_CHOICES:
        raise wrong(f"n times the number of prompts must be at most {MOST_CHOICES}; send several requests", param="n")
    return asked


def _common(fields: Fields, defaults: Sampling, *, logprobs: int | None, max_new_tokens: int | None) -> dict[str, Any]:
    """The fields of `Asked`; nothing may be left after them."""
    model = fields.text("model")
    if not model:
        raise wrong("model must be the name of a served model; GET /v1/models lists them", param="model")
    choices, seed = fields.whole("n"), fields.whole("seed")
    choices = 1 if choices is None else choices
    if not 1 <= choices <= MOST_CHOICES:
        raise wrong(f"n must lie in 1..{MOST_CHOICES}, got {choices}", param="n")
    if seed is not None and not 0 <= seed <= LARGEST_SEED:
        raise wrong(f"seed must lie in 0..2**63 - 1, got {seed}", param="seed")
    if max_new_tokens is not None and max_new_tokens < 1:
        raise wrong(f"max_tokens must be at least 1, got {max_new_tokens}", param="max_tokens")
    if logprobs is not None and not 0 <= logprobs <= MOST_LOGPROBS:
        raise wrong(f"at most {MOST_LOGPROBS} alternatives of a token are reported, got {logprobs}", param="logprobs")
    streams, options = fields.flag("stream"), fields.take("stream_options")
    if options is not None and not (streams and isinstance(options, dict)):
        raise wrong("stream_options must be an object, and goes with stream", param="stream_options")
    common = {
        "model": model,
        "max_new_tokens": max_new_tokens,
        "choices": choices,
        "sampling": _sampling(fields, defaults),
        "seed": seed,
        "stops": _stops(fields.take("stop")),
        "ignores_end": fields.flag("ignore_eos"),
        "logprobs": logprobs,
        "streams": streams,
        "tells_usage": bool((options or {}).get("include_usage")),
    }
    fields.finish()
    return common


def _sampling(fields: Fields, defaults: Sampling) -> Sampling:
    given: dict[str, Any] = {
        name: fields.number(name)
        for name in ("temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty")
    }
    given["top_k"] = fields.whole("top_k")
    given = {name: value for name, value in given.items() if value is not None}
    for name, (low, high) in RANGES.items():
        if not low <= given.get(name, low) <= high:
            raise wrong(f"{name} must lie in {low:g}..{high:g}, got {given[name]}", param=name)
    if given.get("temperature", 1.0) < LEAST_TEMPERATURE:
        given["temperature"] = 0.0
    # Values that switch a cut off; each of the others costs work in every step.
    off = {"top_p": (1.0,), "min_p": (0.0,), "top_k": (-1, 0)}
    given = {name: None if value in off.get(name, ()) else value for name, value in given.items()}
    try:
        return replace(defaults, **given)
    except ValueError as error:
        raise wrong(str(error), param=str(error).partition(" ")[0]) from error


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value or []
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise wrong("stop must be a text or a list of texts, none of them empty", param="stop")
    if len(stops) > MOST_STOPS:
        raise wrong(f"stop must hold at most {MOST_STOPS} texts, got {len(stops)}", param="stop")
    return tuple(stops)


def _prompts(value: Any) -> tuple[Prompt, ...]:
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            return tuple(value)
        if _are_ids(value):
            return (value,)
        if all(isinstance(item, list) and _are_ids(item) for item in value):
            return tuple(value)
    raise wrong("prompt must be a text, a list of texts, a list of token ids or a list of such lists", param="prompt")


def _are_ids(values: Sequence[Any]) -> bool:
    return bool(values) and all(isinstance(value, int) and not isinstance(value, bool) for value in values)


def _message(message: Any, index: int) -> Mapping[str, Any]:
    """A message as templates take it: its content one text."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise wrong(f"messages[{index}] must be an object with a role", param="messages")
    content = message.get("content")
    if isinstance(content, list):
        kinds = [part.get("type") if isinstance(part, dict) else None for part in content]
        if any(
            kind != "text" or not isinstance(part.get("text"), str) for kind, part in zip(kinds, content, strict=True)
        ):
            raise wrong(f"messages[{index}].content may hold parts of type text only", param="messages")
        return {**message, "content": "".join(part["text"] for part in content)}
    if content is not None and not isinstance(content, str):
        raise wrong(f"messages[{index}].content must be a text or a list of parts", param="messages")
    return message
