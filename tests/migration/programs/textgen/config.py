from dataclasses import dataclass


@dataclass
class Config:
    seed: int = 1234
    context: int = 24
    batch_size: int = 32
    embedding: int = 16
    hidden: int = 32
    lr: float = 5e-3
    epochs: int = 3
    train_batches: int = 20
    val_batches: int = 5
