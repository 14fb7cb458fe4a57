"""`python main.py fit --config config.yaml`: what is trained, and how, is in the config."""

import json
import os

import torch
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from project import Forecaster, Waves


class ForecastCLI(LightningCLI):
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--note", default="", help="printed before the run")
        parser.link_arguments("data.length", "model.init_args.length")

    def before_fit(self) -> None:
        print(self.config.fit.note)

    def after_fit(self) -> None:
        self.trainer.test(self.model, datamodule=self.datamodule, verbose=False)


def main(args: ArgsType = None) -> None:
    cli = ForecastCLI(
        Forecaster,
        Waves,
        seed_everything_default=99,
        subclass_mode_model=True,
        save_config_callback=SaveConfigCallback,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={"fit": {"default_config_files": []}},
        args=args,
    )
    lines = [line.split(",") for line in open(os.path.join(cli.trainer.logger.log_dir, "metrics.csv")).read().split()]
    columns = {name: [row[i] for row in lines[1:] if row[i]] for i, name in enumerate(lines[0]) if "loss" in name}
    with open(os.environ["LOSSES"], "w") as file:
        json.dump(
            {
                "model": type(cli.model).__name__,
                "metrics": {name: value.item().hex() for name, value in sorted(cli.trainer.callback_metrics.items())},
                "columns": dict(sorted(columns.items())),
                "weights": torch.cat([p.detach().double().flatten() for p in cli.model.parameters()])
                .sum()
                .item()
                .hex(),
                "config": os.path.exists(os.path.join(cli.trainer.log_dir, "config.yaml")),
                "stopped": [callback.stopped_epoch for callback in cli.trainer.early_stopping_callbacks],
                "steps": cli.trainer.global_step,
            },
            file,
        )


if __name__ == "__main__":
    main()
