"""A package of a research group: characters of Python's own help texts, predicted by an LSTM."""

from .data import TextDataModule
from .model import CharLM

__all__ = ["CharLM", "TextDataModule"]
