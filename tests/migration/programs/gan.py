"""Digits out of noise: generator and discriminator take turns."""

import json
import os
from argparse import ArgumentParser
from collections import OrderedDict

import lightning as L
import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader


class Generator(nn.Module):
    def __init__(self, latent_dim):
        super().__init__()
        self.model = nn.Sequential(
            nn.Linear(latent_dim, 32),
            nn.BatchNorm1d(32),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Linear(32, 64),
            nn.Sigmoid(),
        )

    def forward(self, z):
        return self.model(z).view(-1, 1, 8, 8)


class Discriminator(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 32), nn.LeakyReLU(0.2), nn.Dropout(0.1), nn.Linear(32, 1)
        )

    def forward(self, image):
        return self.model(image)


class GAN(L.LightningModule):
    def __init__(self, latent_dim=10, lr=2e-3, b1=0.5, b2=0.999, **kwargs):
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.generator = Generator(latent_dim)
        self.discriminator = Discriminator()
        self.validation_z = torch.randn(4, latent_dim)
        self.pictures = []
        self.log_of = []

    def forward(self, z):
        return self.generator(z)

    def adversarial_loss(self, y_hat, y):
        return F.binary_cross_entropy_with_logits(y_hat, y)

    def training_step(self, imgs):
        optimizer_g, optimizer_d = self.optimizers()
        z = torch.randn(imgs.shape[0], self.hparams.latent_dim).type_as(imgs)

        self.toggle_optimizer(optimizer_g)
        assert not any(p.requires_grad for p in self.discriminator.parameters())
        valid = torch.ones(imgs.size(0), 1).type_as(imgs)
        g_loss = self.adversarial_loss(self.discriminator(self(z)), valid)
        self.log("g_loss", g_loss, prog_bar=True)
        self.manual_backward(g_loss)
        optimizer_g.step()
        optimizer_g.zero_grad()
        self.untoggle_optimizer(optimizer_g)

        with optimizer_d.toggle_model(sync_grad=True):
            real_loss = self.adversarial_loss(self.discriminator(imgs), valid)
            fake_loss = self.adversarial_loss(self.discriminator(self(z).detach()), torch.zeros_like(valid))
            d_loss = (real_loss + fake_loss) / 2
            self.log("d_loss", d_loss, prog_bar=True)
            self.manual_backward(d_loss)
            optimizer_d.step()
            optimizer_d.zero_grad()
        self.log_of.append([g_loss.item().hex(), d_loss.item().hex()])
        return OrderedDict({"g": g_loss.detach(), "d": d_loss.detach()})

    def on_train_batch_end(self, outputs, batch, batch_idx):
        assert outputs["g"].item().hex() == self.log_of[-1][0]

    def configure_optimizers(self):
        lr, betas = self.hparams.lr, (self.hparams.b1, self.hparams.b2)
        opt_g = torch.optim.Adam(self.generator.parameters(), lr=lr, betas=betas)
        opt_d = torch.optim.Adam(self.discriminator.parameters(), lr=lr, betas=betas)
        return [opt_g, opt_d], []

    def on_validation_epoch_end(self):
        z = self.validation_z.type_as(self.generator.model[0].weight)
        self.pictures.append(self(z).double().sum().item().hex())

    def validation_step(self, batch, batch_idx):
        self.log("val_real", torch.sigmoid(self.discriminator(batch)).mean())


def main(args):
    L.seed_everything(args.seed, workers=True)
    images = torch.tensor(load_digits().images, dtype=torch.float32)[:960, None] / 16
    model = GAN(**vars(args))
    trainer = L.Trainer(
        accelerator="auto", devices=1, max_epochs=2, deterministic=True, check_val_every_n_epoch=1, log_every_n_steps=10
    )
    trainer.fit(model, DataLoader(images, args.batch_size, shuffle=True), DataLoader(images[:200], args.batch_size))
    with open(os.environ["LOSSES"], "w") as file:
        result = {
            "losses": model.log_of,
            "pictures": model.pictures,
            "metrics": {k: v.item().hex() for k, v in sorted(trainer.logged_metrics.items())},
            "global step": trainer.global_step,
        }
        json.dump(result, file)


if __name__ == "__main__":
    parser = ArgumentParser()
    parser.add_argument("--batch_size", type=int, default=48)
    parser.add_argument("--latent_dim", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    main(parser.parse_args())
