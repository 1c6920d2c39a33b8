"""What several tests of training share."""

import pytest

from slothcore.models.decoder import Decoder
from slothcore.models.graphs import StepGraphs


@pytest.fixture
def graphs(monkeypatch) -> list[StepGraphs]:
    """Lets a model on a CPU have graphs, each the Python run again, and gives those of every run."""
    made = []

    def enable_graphs(self: Decoder, max_tokens: int = 2048) -> StepGraphs:
        self.graphs = StepGraphs(self.model, self.config, max_tokens=max_tokens, recorder=lambda function: function)
        made.append(self.graphs)
        return self.graphs

    monkeypatch.setattr(Decoder, "enable_graphs", enable_graphs)
    return made
