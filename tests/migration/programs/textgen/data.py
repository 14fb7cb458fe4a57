from pydoc_data.topics import topics

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset, random_split


class CharDataset(Dataset):
    def __init__(self, text: str, context: int):
        self.vocabulary = sorted(set(text))
        index = {c: i for i, c in enumerate(self.vocabulary)}
        self.codes = torch.tensor([index[c] for c in text])
        self.context = context

    def __len__(self):
        return (len(self.codes) - 1) // self.context

    def __getitem__(self, i):
        start = i * self.context
        chunk = self.codes[start : start + self.context + 1]
        return {"input": chunk[:-1], "target": chunk[1:]}


class TextDataModule(pl.LightningDataModule):
    def __init__(self, context: int = 24, batch_size: int = 32):
        super().__init__()
        self.context = context
        self.batch_size = batch_size
        self.dataset = CharDataset(topics["for"] + topics["try"] + topics["with"] + topics["class"], context)

    @property
    def vocabulary_size(self) -> int:
        return len(self.dataset.vocabulary)

    def setup(self, stage: str | None = None):
        held_out = len(self.dataset) // 5
        self.train, self.val = random_split(self.dataset, [len(self.dataset) - held_out, held_out])

    def train_dataloader(self):
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val, self.batch_size)
