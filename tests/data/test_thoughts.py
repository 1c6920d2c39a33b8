"""Thoughts in a field of their own, which few chat templates read."""

from pathlib import Path

import pytest

from slothcore.data.tokenizer import Tokenizer
from slothcore.training.config import TrainConfig
from slothcore.training.preparation import prepare_rows
from tests.data.tiny_tokenizers import CHATML, write_byte_tokenizer

WRITES = CHATML.replace("{{ message.content }}", "{{ message.reasoning_content }}{{ message.content }}")
# It speaks of them, and reads another field.
ASKS = "{% if enable_thinking %}thinking and reasoning{% endif %}{{ messages[1].thoughts }}" + CHATML
# As Qwen3 writes those of the last answer.
LAST = CHATML.replace("{{ message.content }}", "{{ message.reasoning_content if loop.last }}{{ message.content }}")
NOTE = "the chat template leaves out the thoughts of 2 rows, which are not learned;"


@pytest.mark.parametrize(("template", "lost"), [(CHATML, True), (ASKS, True), (WRITES, False), (LAST, False)])
@pytest.mark.parametrize("spelling", ["reasoning_content", "thinking", "reasoning"])
def test_thoughts_that_the_template_leaves_out_are_said(
    spelling: str, template: str, lost: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = Tokenizer.from_folder(write_byte_tokenizer(tmp_path, config={"chat_template": template}))
    thoughts: list[str | None] = ["Hm.", "Well.", "", None]
    records = [
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", spelling: thought}]}
        for thought in thoughts
    ]
    rows = prepare_rows(records, tokenizer, TrainConfig(max_seq_length=100), what="training")
    assert (NOTE in capsys.readouterr().out) == lost
    assert ("Hm.b" in tokenizer.decode(rows.micro_batch([0]).input_ids.tolist())) == (not lost)
