"""Train a GAN on a packed dataset, or continue a run. `python train.py --help` says how."""

from gan.cli.train import train

if __name__ == "__main__":
    train()
