"""What `slothcore doctor` found, a line each."""

from dataclasses import dataclass
from typing import Literal

GIB = 2**30
Status = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """One line of the examination.

    Attributes:
        remedy: what to do, most often a command; empty if nothing has to be done.
    """

    name: str
    status: Status
    text: str
    remedy: str = ""
