"""Own columns through one-line templates."""

import pytest

from slothcore.data.columns import ColumnTemplates


def test_columns_are_filled_in() -> None:
    templates = ColumnTemplates("{reply text}", r"Q: {ask}\n{{x}}\t\\n A:")
    record = {"ask": "{0} \\n", "reply text": 4, "other": None}
    assert templates.fill(record, "row 1") == ("Q: {0} \\n\n{x}\t\\n A:", "4")


def test_a_null_is_nothing() -> None:
    assert ColumnTemplates("{a}{b}").fill({"a": None, "b": "x"}, "row 1") == ("", "x")


def test_a_completion_of_blank_columns_is_none() -> None:
    """A full stop that the template brings along is no answer; a prompt may be as it is."""
    templates = ColumnTemplates(" {a}{b}.", "{ask}?")
    assert templates.fill({"ask": "", "a": None, "b": " "}, "row 1") == ("?", "")
    assert templates.fill({"ask": "", "a": "", "b": "x"}, "row 1") == ("?", " x.")


def test_an_unknown_column_is_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"row 3 has no column 'asks', which prompt_template names; it has 'ask', 'a'"):
        ColumnTemplates("{a}", "{asks}").fill({"ask": "x", "a": "y"}, "row 3")


@pytest.mark.parametrize(
    ("completion", "prompt", "message"),
    [
        ("{a", "", "completion_template '{a' is not valid: expected '}' before end of string"),
        ("{}", "", "is not valid: {} is no name of a column"),
        ("a", "", "completion_template 'a' names no column"),
        ("{a}", "a}", "prompt_template 'a}' is not valid"),
        ("{a!r}", "", "is not valid"),
    ],
)
def test_templates_that_are_none(completion: str, prompt: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ColumnTemplates(completion, prompt)
