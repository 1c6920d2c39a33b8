"""Every test of this folder with a `variant` of the zoo is noted for the table of families that ends a test run."""

import pytest

from tests.family_table import note


@pytest.fixture(autouse=True)
def noted_for_the_table(request: pytest.FixtureRequest) -> None:
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    family = getattr(parameters.get("variant"), "family", None)
    if family is not None:
        note(request.node, family)
