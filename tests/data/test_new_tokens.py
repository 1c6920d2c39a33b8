"""New tokens of a tokenizer: their ids, what they do to text, and the files that transformers reads them from."""

import json
import warnings
from pathlib import Path

import pytest

from slothcore.data.new_tokens import is_control_token
from slothcore.data.tokenizer import Tokenizer
from tests.data.tiny_tokenizers import write_byte_tokenizer, write_sentencepiece_tokenizer

CHAT = [{"role": "user", "content": "Hello there"}, {"role": "assistant", "content": "Hi."}]
TEXTS = (
    "<|turn|>user says <think>so</think> and an axolotl<|turn|>",
    " axolotl axolotls  the axolotl.",
    "nothing new in the then",
)
NEW = ("<|turn|>", "<think>", "</think>", "axolotl")
SHARED = ("llama-3", "mistral-7b-instruct-v0.3", "phi-3-mini-128k-instruct", "qwen2.5-0.5b-instruct")


def written(tmp_path: Path, kind: str) -> Path:
    write = write_byte_tokenizer if kind == "bytes" else write_sentencepiece_tokenizer
    return write(tmp_path / "base")


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_each_becomes_one_token_behind_the_last(tmp_path: Path, kind: str) -> None:
    tokenizer = Tokenizer.from_folder(written(tmp_path, kind))
    size, before = tokenizer.vocab_size, [tokenizer.encode(text) for text in TEXTS]
    fingerprint = tokenizer.fingerprint()
    added = tokenizer.add_tokens(NEW)
    assert added == {token: size + index for index, token in enumerate(NEW)}
    assert tokenizer.vocab_size == size + 4
    assert tokenizer.fingerprint() != fingerprint, "rows kept for the old tokenizer are not for this one"
    ids = tokenizer.encode(TEXTS[0])
    assert [i for i in ids if i >= size] == [added[t] for t in (NEW[0], NEW[1], NEW[2], NEW[3], NEW[0])]
    assert len(ids) < len(before[0])
    assert tokenizer.encode(TEXTS[2]) == before[2]
    # A word in a longer one is a token, too, as in transformers: ordinary tokens know no edges of words.
    assert tokenizer.encode(TEXTS[1]).count(added["axolotl"]) == 3


def test_control_tokens_are_left_out_of_what_people_read(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(write_byte_tokenizer(tmp_path / "base"))
    assert len(tokenizer.special_token_ids) == 5
    added = tokenizer.add_tokens(NEW)
    ids = tokenizer.encode(TEXTS[0], add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=False) == TEXTS[0]
    assert tokenizer.decode(ids) == TEXTS[0].replace("<|turn|>", "")
    assert tokenizer.special_token_ids == {0, 1, 2, 3, 4, added["<|turn|>"]}


@pytest.mark.parametrize("special", [True, False])
def test_the_caller_may_say_which_are_special(tmp_path: Path, special: bool) -> None:
    tokenizer = Tokenizer.from_folder(write_byte_tokenizer(tmp_path / "base"))
    tokenizer.add_tokens(["<|a|>", "b b"], special=special)
    text = "<|a|>x b b"
    assert tokenizer.decode(tokenizer.encode(text)) == ("x " if special else text)


@pytest.mark.parametrize(
    ("token", "control"),
    [
        *[(token, True) for token in ("<|im_start|>", "<start_of_turn>", "[INST]", "[/INST]", "</s>", "<pad>")],
        *[(token, False) for token in ("<think>", "</think>", "word", "<|", "[inst]", "a <|b|>", "<|a|> <|b|>")],
    ],
)
def test_what_looks_like_a_control_token(token: str, control: bool) -> None:
    assert is_control_token(token) == control


def test_what_exists_stays_as_it_is(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(write_byte_tokenizer(tmp_path / "base"))
    size = tokenizer.vocab_size
    assert tokenizer.add_tokens(["<|im_end|>", "the", "<new>"]) == {"<new>": size}
    assert tokenizer.add_tokens(["<new>"]) == {}
    assert tokenizer.add_tokens([]) == {}
    tokenizer.save(tmp_path / "saved")
    assert Tokenizer.from_folder(tmp_path / "saved").vocab_size == size + 1


def test_what_can_be_no_token_is_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(write_byte_tokenizer(tmp_path / "base"))
    before = tokenizer.vocab_size
    for wrong in ("", "  \n"):
        with pytest.raises(ValueError, match="at least one visible character, got"):
            tokenizer.add_tokens(["good", wrong])
    with pytest.raises(ValueError, match="names 'good' twice"):
        tokenizer.add_tokens(["good", "good"])
    assert tokenizer.vocab_size == before


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
@pytest.mark.parametrize("template", [None, "zephyr"])
def test_the_files_hold_them(tmp_path: Path, kind: str, template: str | None) -> None:
    """Read again by slothcore and by transformers; what was there before is left as it was."""
    folder = written(tmp_path, kind)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    tokenizer = Tokenizer.from_folder(folder)
    tokenizer.add_tokens(NEW)
    if template is not None:
        tokenizer.use_chat_template(template)
    tokenizer.save(tmp_path / "saved")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    again = Tokenizer.from_folder(tmp_path / "saved")
    assert again.special_token_ids == tokenizer.special_token_ids
    assert again.chat_template == tokenizer.chat_template
    theirs = transformers_tokenizer(tmp_path / "saved")
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert again.encode(text) == ids == theirs(text).input_ids
        assert again.decode(ids) == tokenizer.decode(ids)
    # What was saved once can be enlarged and saved again.
    again.add_tokens(["<later>"])
    again.save(tmp_path / "twice")
    assert Tokenizer.from_folder(tmp_path / "twice").token_id("<later>") == tokenizer.vocab_size


@pytest.mark.parametrize("name", SHARED)
def test_published_tokenizers(shared_data: Path, tmp_path: Path, name: str) -> None:
    """Some list their tokens in `tokenizer_config.json` as well, and transformers reads Mistral's from there."""
    folder = shared_data / "tokenizers" / name
    tokenizer = Tokenizer.from_folder(folder)
    size = tokenizer.vocab_size
    assert tokenizer.add_tokens(NEW) == {token: size + index for index, token in enumerate(NEW)}
    tokenizer.save(tmp_path)
    again, theirs = Tokenizer.from_folder(tmp_path), transformers_tokenizer(tmp_path)
    assert len(theirs) == again.vocab_size == size + 4
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    original = json.loads((folder / "tokenizer_config.json").read_text())
    listed = config.pop("added_tokens_decoder", None)
    known = original.pop("added_tokens_decoder", None)
    assert config == original
    if known is not None:
        assert {key: listed[key] for key in known} == known
        assert [token["content"] for key, token in listed.items() if key not in known] == list(NEW)
    for text in TEXTS:
        assert again.encode(text) == tokenizer.encode(text)
    assert [theirs.convert_tokens_to_ids(token) for token in NEW] == [size + index for index in range(4)]
    assert theirs.decode(tokenizer.encode(TEXTS[0])[-1:], skip_special_tokens=True) == ""


def test_older_lists_of_added_tokens_are_kept_up(tmp_path: Path) -> None:
    folder = write_byte_tokenizer(tmp_path / "base")
    size = Tokenizer.from_folder(folder).vocab_size
    (folder / "added_tokens.json").write_text(json.dumps({"<old>": size}))
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.add_tokens(["<new>"]) == {"<new>": size + 1}
    tokenizer.save(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "added_tokens.json").read_text()) == {"<old>": size, "<new>": size + 1}
    assert Tokenizer.from_folder(tmp_path / "saved").encode("<old><new>")[1:] == [size, size + 1]


def test_a_template_is_made_whole(tmp_path: Path) -> None:
    """ChatML on a tokenizer like Llama 2's: pieces, and a sentence that says so; then one token each."""
    folder = write_sentencepiece_tokenizer(tmp_path / "base")
    tokenizer = Tokenizer.from_folder(folder)
    with pytest.warns(UserWarning, match=r"several tokens.*; new_tokens makes each of them one"):
        tokenizer.use_chat_template("chatml")
    in_pieces = tokenizer.encode(tokenizer.apply_chat_template(CHAT), add_special_tokens=False)
    whole = Tokenizer.from_folder(folder)
    added = whole.add_tokens(["<|im_start|>", "<|im_end|>"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole.use_chat_template("chatml")
    ids = whole.encode(whole.apply_chat_template(CHAT), add_special_tokens=False)
    assert [i for i in ids if i in added.values()] == [*added.values()] * 2
    assert len(ids) < len(in_pieces)


def transformers_tokenizer(folder: Path):
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)
