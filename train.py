"""Train a GAN on a packed dataset, or continue a run. `python train.py --help` says how."""

from gan.cli import door

if __name__ == "__main__":
    door("train")
