"""Tokenizer folders: ids and text as transformers gives them, special tokens, and clear errors."""

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer as TokenizerCore

from slothcore.data.tokenizer import Tokenizer
from tests.data.tiny_tokenizers import CHATML, write_byte_tokenizer, write_sentencepiece_tokenizer

MIXED_TEXTS = [
    "Hello, world!  Two  spaces\n\n\tand 12345 café — naïve 日本語 🙂 e\u0301",
    " leading and trailing ",
    "",
    "\n\n\n",
    "<s>[INST] inside</s> <|im_start|>user\nhi<|im_end|>\n<|end|> y <|eot_id|> z<|endoftext|>",
    "it 's a do n't . , ! we 've I'LL",
    "def f(x):\n    return x ** 2  # comment\n",
]
# The models' own config.json must lie beside: transformers chooses the tokenizer class by it.
PUBLISHED = {
    "tokenizers/llama-3": "Llama-3-8B",
    "tokenizers/qwen2.5-0.5b-instruct": "Qwen2.5-0.5B",
    "tokenizers/mistral-7b-instruct-v0.3": None,
    "tokenizers/phi-3-mini-128k-instruct": "Phi-3-mini-4k-instruct",
    "models/babyllama-105": None,
}


@pytest.fixture(params=PUBLISHED, ids=lambda name: name.split("/")[1])
def published(request: pytest.FixtureRequest, shared_data: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "tokenizer"
    shutil.copytree(shared_data / request.param, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = PUBLISHED[request.param]
    if config is not None:
        shutil.copyfile(shared_data / "configs" / f"{config}.json", folder / "config.json")
    return folder


def test_ids_and_text_equal_transformers(published: Path) -> None:
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoTokenizer.from_pretrained(published)
    ours = Tokenizer.from_folder(published)
    assert ours.vocab_size == len(reference)
    assert ours.bos_token_id == reference.bos_token_id
    assert ours.eos_token_id == reference.eos_token_id
    for text in MIXED_TEXTS:
        for special in (True, False):
            expected = reference(text, add_special_tokens=special).input_ids
            assert ours.encode(text, add_special_tokens=special) == expected
            for skip in (True, False):
                assert ours.decode(expected, skip_special_tokens=skip) == reference.decode(
                    expected, skip_special_tokens=skip
                )
    assert ours.encode_batch(MIXED_TEXTS) == [ours.encode(text) for text in MIXED_TEXTS]


def test_chats_equal_transformers(published: Path) -> None:
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoTokenizer.from_pretrained(published)
    ours = Tokenizer.from_folder(published)
    if reference.chat_template is None:
        assert ours.chat_template is None
        return
    messages = [
        {"role": "user", "content": "Is 1 < 2 & <b>?"},
        {"role": "assistant", "content": " Yes. "},
        {"role": "user", "content": "日本語"},
    ]
    tools = [
        {"type": "function", "function": {"name": "add", "description": "a < b", "parameters": {"type": "object"}}}
    ]
    for given in (None, tools):
        for prompt in (True, False):
            expected = reference.apply_chat_template(
                messages, tools=given, add_generation_prompt=prompt, tokenize=False
            )
            assert ours.apply_chat_template(messages, prompt, tools=given) == expected


def test_a_megabyte_of_text_equals_transformers(published: Path, shared_data: Path) -> None:
    transformers = pytest.importorskip("transformers")
    text = (shared_data / "datasets" / "wiki_demo.txt").read_text(encoding="utf-8")
    assert len(text) > 900_000
    lines = [line for line in text.split("\n") if line]
    reference, ours = transformers.AutoTokenizer.from_pretrained(published), Tokenizer.from_folder(published)
    assert ours.encode_batch(lines) == reference(lines).input_ids
    whole = text[:200_000]
    assert ours.encode(whole) == reference(whole).input_ids


HARD_TEXTS = [
    "",
    " ",
    "\n \n\t\t  \r\n",
    "a" + " " * 300 + "b" + "\t" * 40,
    "\u6f22\u5b57\u304b\u306a\ud55c\uae00 \u2014 \u0627\u0644\u0639\u0631\u0628\u064a\u0629",  # CJK, and right to left
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \U0001f926\U0001f3fd\u200d\u2642\ufe0f",
    "zero\u200bwidth \ufeffmark \x00nul \x7f combining e\u0301\u0327",
    "12345678901234567890 3.14159 1,000,000 0x1F",
]


def test_hard_texts_equal_transformers(published: Path) -> None:
    """Empty, white, CJK, emoji of several code points, and each special token alone, glued and between spaces."""
    transformers = pytest.importorskip("transformers")
    reference, ours = transformers.AutoTokenizer.from_pretrained(published), Tokenizer.from_folder(published)
    specials = sorted(reference.get_added_vocab())[:40]
    texts = HARD_TEXTS + [form.format(token) for token in specials for form in ("{}", "a{}b", " {} ", "x {0}\n{0}y")]
    for special in (True, False):
        expected = reference(texts, add_special_tokens=special).input_ids
        assert ours.encode_batch(texts, add_special_tokens=special) == expected
        assert [ours.encode(text, add_special_tokens=special) for text in texts] == expected
    for ids in reference(texts).input_ids:
        assert ours.decode(ids, skip_special_tokens=False) == reference.decode(ids)


CONVERSATIONS = {
    "one turn": [{"role": "user", "content": " Hello\n there "}],
    "many turns": [
        {"role": "user", "content": "Is 1 < 2?"},
        {"role": "assistant", "content": " Yes. "},
        {"role": "user", "content": "\u65e5\u672c\u8a9e"},
        {"role": "assistant", "content": "\U0001f642"},
        {"role": "user", "content": ""},
    ],
    "system": [{"role": "system", "content": "Be brief & kind."}, {"role": "user", "content": "Hi"}],
    "an answer": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello <b>you</b>"}],
    "a tool call": [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {
                    "id": "abcdefghi",
                    "type": "function",
                    "function": {"name": "weather", "arguments": {"city": "K\u00f6ln"}},
                }
            ],
        },
        {"role": "tool", "name": "weather", "tool_call_id": "abcdefghi", "content": "rain"},
    ],
    "wrong order": [{"role": "assistant", "content": "I begin"}, {"role": "assistant", "content": "and go on"}],
}
WEATHER_TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city, in <b>words</b>",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_every_kind_of_chat_equals_transformers(published: Path, conversation: str) -> None:
    """The same text, or a refusal where transformers refuses: with and without tools, begun and continued."""
    transformers = pytest.importorskip("transformers")
    reference, ours = transformers.AutoTokenizer.from_pretrained(published), Tokenizer.from_folder(published)
    if reference.chat_template is None:
        pytest.skip("this tokenizer has no chat template")
    messages = CONVERSATIONS[conversation]
    for options in (
        {},
        {"add_generation_prompt": True},
        {"tools": [WEATHER_TOOL], "add_generation_prompt": True},
        {"continue_final_message": True},
    ):
        try:
            expected = reference.apply_chat_template(messages, tokenize=False, **options)
        except Exception:
            with pytest.raises(ValueError, match=r"chat template|continue_final_message"):
                ours.apply_chat_template(messages, **options)
        else:
            assert ours.apply_chat_template(messages, **options) == expected


def test_padding_side(tmp_path: Path) -> None:
    rows = [[5, 6, 7], [8]]
    tokenizer = Tokenizer.from_folder(write_byte_tokenizer(tmp_path / "right"))
    pad = tokenizer.pad_token_id
    assert [t.tolist() for t in tokenizer.pad(rows)] == [[[5, 6, 7], [8, pad, pad]], [[1, 1, 1], [1, 0, 0]]]
    left = Tokenizer.from_folder(write_byte_tokenizer(tmp_path / "left", config={"padding_side": "left"}))
    assert left.padding_side == "left"
    assert [t.tolist() for t in left.pad(rows)] == [[[5, 6, 7], [pad, pad, 8]], [[1, 1, 1], [0, 0, 1]]]
    assert left.pad(rows, padding_side="right")[1].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert left.pad(rows, length=5)[1].tolist() == [[0, 0, 1, 1, 1], [0, 0, 0, 0, 1]]
    with pytest.raises(ValueError, match="a row has 3 tokens and does not fit into length=2"):
        left.pad(rows, length=2)
    with pytest.raises(ValueError, match="padding_side must be 'left' or 'right', got 'top'"):
        left.pad(rows, padding_side="top")
    with pytest.raises(ValueError, match="padding_side must be 'left' or 'right', got 'top'"):
        Tokenizer.from_folder(write_byte_tokenizer(tmp_path / "top", config={"padding_side": "top"}))


def test_published_pad_tokens(shared_data: Path) -> None:
    """Configured, dedicated, and neither: the end token."""
    qwen = Tokenizer.from_folder(shared_data / "tokenizers/qwen2.5-0.5b-instruct")
    assert qwen.pad_token_id == qwen.token_id("<|endoftext|>") != qwen.eos_token_id
    llama = Tokenizer.from_folder(shared_data / "tokenizers/llama-3")
    assert llama.pad_token_id == llama.token_id("<|finetune_right_pad_id|>")
    baby = Tokenizer.from_folder(shared_data / "models/babyllama-105")
    assert baby.pad_token_id == baby.eos_token_id


def test_a_reserved_token_pads_before_the_end_token_does(tmp_path: Path) -> None:
    folder = write_byte_tokenizer(tmp_path)
    assert Tokenizer.from_folder(folder).pad_token_id == 2
    core = TokenizerCore.from_file(str(folder / "tokenizer.json"))
    core.add_special_tokens(["<|reserved_special_token_0|>"])
    core.save(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.pad_token_id == tokenizer.vocab_size - 1


def test_special_tokens_may_be_dicts_and_stand_in_the_map(tmp_path: Path) -> None:
    folder = write_byte_tokenizer(tmp_path)
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": "<s>", "lstrip": False}}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|im_end|>", "bos_token": "</s>"}))
    tokenizer = Tokenizer.from_folder(folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 4)


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("add_eos", [True, False])
def test_what_is_added_around_a_text_is_said_by_the_tokenizer_file(
    tmp_path: Path, add_bos: bool, add_eos: bool
) -> None:
    """As in transformers, where the configuration's flags have no effect beside a tokenizer.json."""
    transformers = pytest.importorskip("transformers")
    for flag in (True, False, None):
        config = {"add_bos_token": flag, "add_eos_token": flag}
        folder = write_byte_tokenizer(tmp_path / str(flag), add_bos=add_bos, add_eos=add_eos, config=config)
        tokenizer = Tokenizer.from_folder(folder)
        plain = tokenizer.encode("the", add_special_tokens=False)
        assert tokenizer.encode("the") == [1] * add_bos + plain + [2] * add_eos
        assert tokenizer.encode("the") == transformers.AutoTokenizer.from_pretrained(folder)("the").input_ids
        assert tokenizer.encode_prompt("the") == [1] * add_bos + plain
        assert tokenizer.encode_prompt("<s>the</s>") == [1, *plain, 2]
        assert tokenizer.encode_prompt("the", add_special_tokens=False) == plain


def test_a_begin_token_that_is_also_the_end_token_stays_in_a_prompt(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(write_byte_tokenizer(tmp_path, config={"eos_token": "<s>"}))
    assert tokenizer.encode_prompt("the") == tokenizer.encode("the")
    assert tokenizer.encode_prompt("") == [1]


def test_spaces_follow_the_rule_of_the_file(tmp_path: Path) -> None:
    """Llama 2's: a space before the text and before what stands behind a special token."""
    transformers = pytest.importorskip("transformers")
    folder = write_sentencepiece_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_folder(folder)
    reference = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    for text in ("the", " the", "  the", "a</s>b", "a</s> b", "<s>the", "\nthe", ""):
        assert tokenizer.encode(text) == reference(text).input_ids
    space, a, b = (tokenizer.token_id(token) for token in ("▁", "a", "b"))
    assert tokenizer.encode("a</s>b") == [1, space, a, 2, space, b]


def test_saved_truncation_and_padding_are_ignored(tmp_path: Path) -> None:
    folder = write_byte_tokenizer(tmp_path)
    core = TokenizerCore.from_file(str(folder / "tokenizer.json"))
    core.enable_truncation(3)
    core.enable_padding(length=50)
    core.save(str(folder / "tokenizer.json"))
    assert len(Tokenizer.from_folder(folder).encode("a longer text")) == 14


def test_tokens_that_only_the_config_lists_are_added(tmp_path: Path) -> None:
    size = Tokenizer.from_folder(write_byte_tokenizer(tmp_path)).vocab_size
    added = {str(size): {"content": "<|extra|>", "special": True}}
    folder = write_byte_tokenizer(tmp_path, config={"added_tokens_decoder": added})
    assert Tokenizer.from_folder(folder).encode("<|extra|>", add_special_tokens=False) == [size]
    folder = write_byte_tokenizer(tmp_path, config={"added_tokens_decoder": {str(size + 7): {"content": "<|extra|>"}}})
    with pytest.raises(ValueError, match="do not belong together"):
        Tokenizer.from_folder(folder)


def test_tokens_of_the_older_file_are_added(tmp_path: Path) -> None:
    folder = write_byte_tokenizer(tmp_path)
    size = Tokenizer.from_folder(folder).vocab_size
    (folder / "added_tokens.json").write_text(json.dumps({"<|more|>": size + 1, "<|extra|>": size}))
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.encode("<|extra|><|more|>", add_special_tokens=False) == [size, size + 1]
    for wrong in ({"<|extra|>": "first"}, {"<|extra|>": None}):
        (folder / "added_tokens.json").write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match="must give tokens ids"):
            Tokenizer.from_folder(folder)


def test_named_templates_and_the_jinja_file(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": CHATML}]
    folder = write_byte_tokenizer(tmp_path, config={"chat_template": named})
    messages = [{"role": "user", "content": "hi"}]
    assert Tokenizer.from_folder(folder).apply_chat_template(messages) == "<|im_start|>user\nhi<|im_end|>\n"
    assert Tokenizer.from_folder(folder).apply_chat_template(messages, tools=[]) == "tools"
    (folder / "chat_template.jinja").write_text("{{ eos_token }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools[0].name }}")
    Tokenizer.from_folder(folder).save(tmp_path / "copy")
    for place in (folder, tmp_path / "copy"):
        tokenizer = Tokenizer.from_folder(place)
        assert tokenizer.apply_chat_template(messages) == "</s>"
        assert tokenizer.apply_chat_template(messages, tools=[{"name": "add"}]) == "add"


def test_save_copies_the_original_files(tmp_path: Path) -> None:
    folder = write_byte_tokenizer(tmp_path / "a", config={"chat_template": CHATML})
    (folder / "model.safetensors").write_bytes(b"weights")
    Tokenizer.from_folder(folder).save(tmp_path / "b")
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    for file in (tmp_path / "b").iterdir():
        assert file.read_bytes() == (folder / file.name).read_bytes()
    Tokenizer.from_folder(folder).save(folder)


def test_text_survives_a_round_trip(tmp_path: Path) -> None:
    byte_level = Tokenizer.from_folder(write_byte_tokenizer(tmp_path / "byte"))
    for text in MIXED_TEXTS:
        plain = text.replace("<s>", "").replace("</s>", "").replace("<|im_start|>", "").replace("<|im_end|>", "")
        assert byte_level.decode(byte_level.encode(plain)) == plain
    pieces = Tokenizer.from_folder(write_sentencepiece_tokenizer(tmp_path / "pieces"))
    assert pieces.decode(pieces.encode("What is 2? Two.")) == "What is 2? Two."


def test_broken_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no tokenizer.json in .*make one with transformers"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"not a valid tokenizer.json"):
        Tokenizer.from_folder(tmp_path)
    folder = write_byte_tokenizer(tmp_path / "tokenizer", config={"eos_token": "<|nowhere|>"})
    with pytest.raises(ValueError, match=r"eos_token is '<\|nowhere\|>', which tokenizer.json does not hold"):
        Tokenizer.from_folder(folder)
    folder = write_byte_tokenizer(tmp_path / "tokenizer", config={"bos_token": {"text": 5}, "pad_token": 5})
    with pytest.raises(ValueError, match="pad_token must be a text, got 5"):
        Tokenizer.from_folder(folder)
    folder = write_byte_tokenizer(tmp_path / "tokenizer", config={"chat_template": {"default": "x"}})
    with pytest.raises(ValueError, match="chat_template must be a text, got dict"):
        Tokenizer.from_folder(folder)
    (folder / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object"):
        Tokenizer.from_folder(folder)
    (folder / "tokenizer_config.json").write_text("{,}")
    with pytest.raises(ValueError, match="not valid JSON"):
        Tokenizer.from_folder(folder)


def test_without_a_chat_template_the_remedy_is_said(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(write_byte_tokenizer(tmp_path))
    assert tokenizer.chat_template is None
    with pytest.raises(ValueError, match=r"has no chat template; set chat_template to a built-in one \(alpaca, "):
        tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
