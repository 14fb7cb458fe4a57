"""Small models and data of bug reports, examples and tests, as Lightning has them.

Start with ``boring_classes.py``: the smallest module that runs every stage. ``transformer.py`` and ``lstm.py`` are
language models, ``mnist_datamodule.py`` is a data module of handwritten digits. Nothing here downloads a file. Nothing
of Treadle imports this folder.
"""

from treadle.demos.boring_classes import BoringDataModule, BoringModel, DemoModel
from treadle.demos.lstm import LightningLSTM, SequenceSampler, SimpleLSTM
from treadle.demos.transformer import LightningTransformer, Transformer, WikiText2

__all__ = [
    "BoringDataModule",
    "BoringModel",
    "DemoModel",
    "LightningLSTM",
    "LightningTransformer",
    "SequenceSampler",
    "SimpleLSTM",
    "Transformer",
    "WikiText2",
]
