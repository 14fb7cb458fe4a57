"""An LSTM as language model, whose state goes on from batch to batch."""

from __future__ import annotations

from collections.abc import Iterator, Sized

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Sampler

from treadle.demos.transformer import WikiText2
from treadle.module import LightningModule

__all__ = ["LightningLSTM", "SequenceSampler", "SimpleLSTM"]

State = tuple[Tensor, Tensor]


class SimpleLSTM(nn.Module):
    """An LSTM that predicts words.

    Args:
        vocab_size: The number of words.
        ninp: The number of features of a word.
        nhid: The width of the LSTM.
        nlayers: The number of layers.
        dropout: The probability of a dropped value.
    """

    def __init__(
        self, vocab_size: int = 33278, ninp: int = 512, nhid: int = 512, nlayers: int = 4, dropout: float = 0.2
    ) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.drop = nn.Dropout(dropout)
        self.encoder = nn.Embedding(vocab_size, ninp)
        self.rnn = nn.LSTM(ninp, nhid, nlayers, dropout=dropout, batch_first=True)
        self.decoder = nn.Linear(nhid, vocab_size)
        self.nlayers = nlayers
        self.nhid = nhid
        self.init_weights()

    def init_weights(self) -> None:
        """Draw the weights of encoder and decoder uniformly from -0.1 to 0.1; the decoder's bias is 0."""
        nn.init.uniform_(self.encoder.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)
        nn.init.uniform_(self.decoder.weight, -0.1, 0.1)

    def forward(self, input: Tensor, hidden: State) -> tuple[Tensor, State]:
        """Return log-probabilities of shape (N * T, vocab_size), and the LSTM's next state.

        Args:
            input: Numbers of words, of shape (N, T).
            hidden: The LSTM's state.
        """
        features, hidden = self.rnn(self.drop(self.encoder(input)), hidden)
        words = self.decoder(self.drop(features)).view(-1, self.vocab_size)
        return functional.log_softmax(words, dim=1), hidden

    def init_hidden(self, batch_size: int) -> State:
        """Return a state of zeros: two tensors of shape (nlayers, batch_size, nhid)."""
        weight = next(self.parameters())
        shape = self.nlayers, batch_size, self.nhid
        return weight.new_zeros(shape), weight.new_zeros(shape)


class SequenceSampler(Sampler[list[int]]):
    """Batches for a model that keeps its state: each row of a batch goes on where that row ended in the one before.

    Args:
        dataset: Whose samples follow each other.
        batch_size: The number of rows. What is left of the dataset is not used.
    """

    def __init__(self, dataset: Sized, batch_size: int) -> None:
        super().__init__()
        self.dataset = dataset
        self.batch_size = batch_size
        self.chunk_size = len(dataset) // batch_size

    def __iter__(self) -> Iterator[list[int]]:
        for first in range(self.chunk_size):
            yield list(range(first, self.chunk_size * self.batch_size, self.chunk_size))

    def __len__(self) -> int:
        return self.chunk_size


class LightningLSTM(LightningModule):
    """A :class:`SimpleLSTM` that trains on WikiText-2, with truncated backpropagation.

    Args:
        vocab_size: The number of words.
    """

    def __init__(self, vocab_size: int = 33278) -> None:
        super().__init__()
        self.model = SimpleLSTM(vocab_size=vocab_size)
        self.hidden: State | None = None

    def on_train_epoch_end(self) -> None:
        """Begin the next epoch without a state."""
        self.hidden = None

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the negative log-likelihood of the next words. The state goes on, without its gradients."""
        inputs, target = batch
        if self.hidden is None:
            self.hidden = self.model.init_hidden(inputs.size(0))
        self.hidden = (self.hidden[0].detach(), self.hidden[1].detach())
        output, self.hidden = self.model(inputs, self.hidden)
        loss = functional.nll_loss(output, target.view(-1))
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def prepare_data(self) -> None:
        """Say early that the text is not there, and how to get the text."""
        WikiText2()

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return batches of 20 rows, each of which goes on from batch to batch."""
        dataset = WikiText2()
        return DataLoader(dataset, batch_sampler=SequenceSampler(dataset, batch_size=20))

    def configure_optimizers(self) -> Optimizer:
        """Return SGD with a large learning rate, as language models of this kind are trained."""
        return torch.optim.SGD(self.parameters(), lr=20.0)
