"""Continuous batching. The engine stands among the models, because `Decoder.generate` is made of it."""

from slothcore.models.engine import Engine
from slothcore.models.requests import Adapters, Event, Finished, Request
from slothcore.models.sampling import Sampling

__all__ = ["Adapters", "Engine", "Event", "Finished", "Request", "Sampling"]
