"""What a model said as it was trained: samples.jsonl, read once and then only where it grew."""

from dataclasses import dataclass, field
from pathlib import Path

from slothcore.report.growing_file import GrowingFile
from slothcore.report.run_log import read_record


@dataclass
class SampleLog:
    """The answers of samples.jsonl.

    Attributes:
        outputs: step -> prompt -> what was said.
        expected: prompt -> the answer that stood beside it.
    """

    path: Path
    outputs: dict[int, dict[str, str]] = field(default_factory=dict)
    expected: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._file = GrowingFile(self.path)

    def update(self) -> None:
        """Read what was written since the last call; a line that is no sample is left out."""
        is_whole, lines = self._file.read()
        if is_whole:
            self.outputs, self.expected = {}, {}
        for record in filter(None, map(read_record, lines)):
            prompt, output, expected = record.get("prompt"), record.get("output"), record.get("expected")
            if isinstance(prompt, str) and isinstance(output, str):
                self.outputs.setdefault(record["step"], {})[prompt] = output
                if isinstance(expected, str):
                    self.expected[prompt] = expected

    @property
    def prompts(self) -> list[str]:
        """Each prompt once, in the order in which they were asked."""
        return list(dict.fromkeys(prompt for said in self.outputs.values() for prompt in said))
