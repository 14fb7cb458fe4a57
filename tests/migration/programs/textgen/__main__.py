import argparse
import json
import os
from dataclasses import asdict, fields

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger

from textgen import CharLM, TextDataModule
from textgen.config import Config


class Rates(Callback):
    def __init__(self) -> None:
        self.rates = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def main() -> None:
    parser = argparse.ArgumentParser()
    for field in fields(Config):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    config = Config(**vars(parser.parse_args()))

    pl.seed_everything(config.seed, workers=True)
    data = TextDataModule(config.context, config.batch_size)
    model = CharLM(data.vocabulary_size, **asdict(config))
    rates = Rates()
    checkpoints = ModelCheckpoint(
        monitor="loss/val", filename="{epoch}-{loss/val:.3f}", auto_insert_metric_name=False, save_top_k=2
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=config.epochs,
        limit_train_batches=config.train_batches,
        limit_val_batches=config.val_batches,
        gradient_clip_val=1.0,
        callbacks=[rates, checkpoints],
        logger=CSVLogger("logs", name="textgen"),
        log_every_n_steps=1,
        enable_progress_bar=False,
    )
    trainer.fit(model, datamodule=data)
    with open(os.environ["LOSSES"], "w") as file:
        json.dump(
            {
                "history": model.history,
                "rates": [rate.hex() for rate in rates.rates],
                "best": checkpoints.best_model_score.item().hex(),
                "files": sorted(os.listdir(os.path.join(trainer.logger.log_dir, "checkpoints"))),
                "metrics": {name: value.item().hex() for name, value in sorted(trainer.logged_metrics.items())},
            },
            file,
        )


if __name__ == "__main__":
    main()
