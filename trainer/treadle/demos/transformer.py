"""A transformer as language model, and the words of WikiText-2."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from treadle.module import LightningModule
from treadle_fabric import MisconfigurationException

__all__ = ["Dictionary", "LightningTransformer", "PositionalEncoding", "Transformer", "WikiText2", "tokenize"]

_FILE = "wikitext-2.txt"
_URL = "https://raw.githubusercontent.com/pytorch/examples/main/word_language_model/data/wikitext-2/train.txt"


class Transformer(nn.Module):
    """A transformer of encoder and decoder that predicts words.

    Args:
        vocab_size: The number of words.
        ninp: The number of features of a word.
        nhead: The number of attention heads.
        nhid: The width of the feed-forward layers.
        nlayers: The number of layers of the encoder, and of the decoder.
        dropout: The probability of a dropped value.
    """

    def __init__(
        self,
        vocab_size: int = 33278,
        ninp: int = 200,
        nhead: int = 2,
        nhid: int = 200,
        nlayers: int = 2,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        self.pos_encoder = PositionalEncoding(ninp, dropout)
        self.embedding = nn.Embedding(vocab_size, ninp)
        self.transformer = nn.Transformer(
            d_model=ninp,
            nhead=nhead,
            num_encoder_layers=nlayers,
            num_decoder_layers=nlayers,
            dim_feedforward=nhid,
            dropout=dropout,
            batch_first=True,
        )
        self.decoder = nn.Linear(ninp, vocab_size)
        self.ninp = ninp
        self.vocab_size = vocab_size
        self.src_mask: Tensor | None = None

    def generate_square_subsequent_mask(self, size: int) -> Tensor:
        """Return a mask of shape (size, size): minus infinity where a word would see a later one, else 0."""
        return torch.triu(torch.full((size, size), float("-inf")), diagonal=1)

    def forward(self, inputs: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return log-probabilities of shape (N * T, vocab_size).

        Args:
            inputs: Numbers of words, of shape (N, T).
            target: Those that the decoder is shown, of shape (N, T).
            mask: What the decoder does not see. Default: all later words.
        """
        length = inputs.shape[1]
        if mask is None:
            if self.src_mask is None or self.src_mask.size(0) != length or self.src_mask.device != inputs.device:
                self.src_mask = self.generate_square_subsequent_mask(length).to(inputs.device)
            mask = self.src_mask
        scale = math.sqrt(self.ninp)
        source = self.pos_encoder(self.embedding(inputs) * scale)
        shown = self.pos_encoder(self.embedding(target) * scale)
        words = self.decoder(self.transformer(source, shown, tgt_mask=mask))
        return functional.log_softmax(words, dim=-1).view(-1, self.vocab_size)


class PositionalEncoding(nn.Module):
    """Adds sines and cosines of a position to the features of words.

    All words of a sequence get the encoding of the position that follows the sequence, as in Lightning's demo, so that
    losses are the same.

    Args:
        dim: The number of features.
        dropout: The probability of a dropped value.
        max_len: One more than the length of the longest sequence.
    """

    def __init__(self, dim: int, dropout: float = 0.1, max_len: int = 5000) -> None:
        super().__init__()
        self.dropout = nn.Dropout(p=dropout)
        self.dim = dim
        self.max_len = max_len
        self.pe: Tensor | None = None  # made on the device of the first batch; no part of the state dict

    def forward(self, x: Tensor) -> Tensor:
        """Return the features of words, of shape (N, T, dim), with those of the position."""
        if self.pe is None or self.pe.device != x.device:
            self.pe = self._encodings(x.device)
        encoded: Tensor = self.dropout(x + self.pe[:, x.size(1)])
        return encoded

    def _encodings(self, device: torch.device) -> Tensor:
        encodings = torch.zeros(self.max_len, self.dim, device=device)
        position = torch.arange(self.max_len, dtype=torch.float, device=device).unsqueeze(1)
        rates = torch.exp(torch.arange(0, self.dim, 2, device=device).float() * (-math.log(10000.0) / self.dim))
        encodings[:, 0::2] = torch.sin(position * rates)
        encodings[:, 1::2] = torch.cos(position * rates)
        return encodings.unsqueeze(0)


class WikiText2(Dataset[tuple[Tensor, Tensor]]):
    """Sequences of the words of WikiText-2: each sample has a sequence, and the same one a word later.

    Args:
        data_dir: The folder with the text, as ``wikitext-2.txt``.
        block_size: The number of words of a sequence.
        download: Has no effect, since Treadle downloads nothing.

    Raises:
        MisconfigurationException: The file is not there; the message says how to get the file.
    """

    def __init__(self, data_dir: Path = Path("data"), block_size: int = 35, download: bool = True) -> None:
        self.path = Path(data_dir) / _FILE
        if not self.path.is_file():
            raise MisconfigurationException(
                f"WikiText2: {self.path} is not there, and Treadle downloads nothing. Get the file with"
                f" `curl -L --create-dirs -o {self.path} {_URL}`."
            )
        self.data, self.dictionary = tokenize(self.path)
        self.block_size = block_size

    @property
    def vocab_size(self) -> int:
        """The number of different words."""
        return len(self.dictionary)

    def __len__(self) -> int:
        return len(self.data) // self.block_size - 1

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        start = index * self.block_size
        end = start + self.block_size
        return self.data[start:end], self.data[start + 1 : end + 1]


class Dictionary:
    """Words and their numbers."""

    def __init__(self) -> None:
        self.word2idx: dict[str, int] = {}
        self.idx2word: list[str] = []

    def add_word(self, word: str) -> int:
        """Return the number of a word; a new word gets the next number."""
        if word not in self.word2idx:
            self.word2idx[word] = len(self.idx2word)
            self.idx2word.append(word)
        return self.word2idx[word]

    def __len__(self) -> int:
        return len(self.idx2word)


def tokenize(path: Path) -> tuple[Tensor, Dictionary]:
    """Return the numbers of the words of a text, with "<eos>" at the end of each line, and the dictionary."""
    dictionary = Dictionary()
    with open(path, encoding="utf-8") as file:
        numbers = [dictionary.add_word(word) for line in file for word in (*line.split(), "<eos>")]
    return torch.tensor(numbers, dtype=torch.int64), dictionary


class LightningTransformer(LightningModule):
    """A :class:`Transformer` that trains on :class:`WikiText2`.

    Args:
        vocab_size: The number of words.
    """

    def __init__(self, vocab_size: int = 33278) -> None:
        super().__init__()
        self.model = Transformer(vocab_size=vocab_size)

    def forward(self, inputs: Tensor, target: Tensor) -> Tensor:
        """Return log-probabilities of shape (N * T, vocab_size)."""
        words: Tensor = self.model(inputs, target)
        return words

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the negative log-likelihood of the next words."""
        inputs, target = batch
        return functional.nll_loss(self(inputs, target), target.view(-1))

    def configure_optimizers(self) -> Optimizer:
        """Return SGD."""
        return torch.optim.SGD(self.model.parameters(), lr=0.1)

    def prepare_data(self) -> None:
        """Say early that the text is not there, and how to get the text."""
        WikiText2()

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return batches of one sequence."""
        return DataLoader(WikiText2())
