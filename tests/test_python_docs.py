"""The examples of docs/python.md run."""

import doctest
from pathlib import Path

import torch

from gan import augment, models, networks

PAGE = Path(__file__).parents[1] / "docs" / "python.md"


def test_the_examples_run_as_they_stand(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    size = {"img_resolution": 32, "img_channels": 3, "c_dim": 3}
    width = {"channel_base": 256, "channel_max": 16}
    G = networks.Generator(z_dim=64, w_dim=64, **size, synthesis_kwargs=width)
    D = networks.Discriminator(**size, **width)
    pipe = augment.AugmentPipe(xflip=1)
    pipe.p.fill_(0.25)
    names = {"class_names": ["bag", "coat", "shoe"]}
    models.save("network-snapshot-000200.pkl", G=G, D=D, G_ema=G, augment_pipe=pipe, training_set_kwargs=names)
    result = doctest.testfile(str(PAGE), module_relative=False)
    assert result.failed == 0
    assert result.attempted == PAGE.read_text(encoding="utf-8").count("\n>>> ") > 30
