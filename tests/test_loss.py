"""The four phases against golden losses and gradients, latents, and accumulation that equals the big batch."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gan import loss
from gan.loss import Latents
from gan.networks import Discriminator, Generator

GOLDEN = Path(__file__).parent / "golden"


def golden(name):
    with np.load(GOLDEN / f"{name}.npz") as file:
        arrays = dict(file)
    meta = json.loads(str(arrays.pop("meta")))
    return meta, {key: torch.as_tensor(value) for key, value in arrays.items()}


def identity(images):
    return images


def under(prefix, tensors):
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


class TestGolden:
    """One call of each phase, on the architecture of the golden networks uncond32, without noise or style mixing."""

    meta, data = golden("loss")
    phases = ("Gmain", "Greg", "Dmain", "Dreg")

    def run(self, phase):
        """The network that the phase trains, with its gradients, and the output."""
        G = Generator(**golden("generator_uncond32")[0])
        D = Discriminator(**golden("discriminator_uncond32")[0])
        G.load_state_dict(under("G.", self.data))
        D.load_state_dict(under("D.", self.data))
        z, real, noise = self.data["z"], self.data["real"], self.data["pl_noise"]
        latents, no_labels = Latents(z, torch.zeros(len(z), 0)), torch.zeros(len(real), 0)
        if phase == "Gmain":
            network, output = G, loss.generator_main(G, D, identity, latents)
        elif phase == "Greg":
            assert len(noise) == len(z) // self.meta["pl_batch_shrink"]
            few = Latents(z[: len(noise)], latents.c[: len(noise)])
            before = torch.tensor(self.meta["pl_mean_before"])
            weights = self.meta["pl_weight"], self.meta["pl_decay"]
            network, output = G, loss.path_length(G, few, before, *weights, noise=noise)
        elif phase == "Dmain":
            network, output = D, loss.discriminator_main(G, D, identity, latents, real, no_labels)
        else:
            network, output = D, loss.r1(D, identity, real, no_labels, self.meta["r1_gamma"])
        output.loss.backward()
        return network, output

    @pytest.mark.parametrize("phase", phases)
    def test_reported_values(self, phase):
        _, output = self.run(phase)
        losses = {name: values for name, values in output.stats.items() if name.startswith("Loss/")}
        assert losses.keys() == self.meta[phase].keys()
        for name, values in losses.items():
            assert not values.requires_grad
            assert values.mean().item() == pytest.approx(self.meta[phase][name], rel=1e-5)

    @pytest.mark.parametrize("phase", phases)
    def test_gradients(self, phase):
        """All but those of the noise strengths: these depend on the noise drawn, which is not in the file."""
        network, _ = self.run(phase)
        compared = 0
        for name, parameter in network.named_parameters():
            if name.endswith("noise_strength"):
                continue
            expected = self.data[f"{phase}.grad.{name}"]
            actual = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max(), name
            compared += 1
        assert compared == len(under(f"{phase}.grad.", self.data)) - 7 * (phase in ("Gmain", "Greg"))

    def test_the_mean_path_length_moves_on(self):
        _, output = self.run("Greg")
        assert output.pl_mean.item() == pytest.approx(self.meta["pl_mean_after"], rel=1e-5)
        assert not output.pl_mean.requires_grad


def networks(dtype=torch.float32, c_dim=0, mbstd=4):
    """Small ones without noise; in float64 the whole computation is."""
    torch.manual_seed(0)
    small = {"channel_base": 64, "channel_max": 8}
    G = Generator(6, c_dim, 7, 16, 3, mapping_kwargs={"num_layers": 2}, synthesis_kwargs={**small, "use_noise": False})
    D = Discriminator(c_dim, 16, 3, **small, epilogue_kwargs={"mbstd_group_size": mbstd})
    return G.to(dtype), D.to(dtype)


def labelled(n, c_dim, dtype=torch.float64):
    labels = torch.eye(c_dim, dtype=dtype) if c_dim else torch.zeros(1, 0, dtype=dtype)
    return labels[torch.arange(n) % len(labels)]


class TestLatents:
    N, num_ws = 4000, 6

    def draw(self, mixing_prob):
        torch.manual_seed(0)
        return Latents.draw(self.N, 5, self.num_ws, labelled(8, 4), mixing_prob)

    def assert_share(self, hits, expected):
        bound = 4 * math.sqrt(expected * (1 - expected) / self.N)
        assert abs(hits.double().mean().item() - expected) <= bound

    def test_z_is_normal_and_labels_come_from_the_table(self):
        latents = self.draw(0.9)
        assert latents.z.shape == latents.z_mix.shape == (self.N, 5)
        assert abs(latents.z.mean().item()) < 0.03
        assert latents.z.std().item() == pytest.approx(1, rel=0.03)
        for label in range(4):
            self.assert_share((latents.c == torch.eye(4)[label]).all(dim=1), 1 / 4)

    def test_the_second_latents_are_others(self):
        latents = self.draw(0.9)
        correlation = torch.corrcoef(torch.stack([latents.z.flatten(), latents.z_mix.flatten()]))[0, 1]
        assert abs(correlation) < 4 / math.sqrt(self.N * 5)

    @pytest.mark.parametrize("mixing_prob", [0.3, 0.9, 1.0])
    def test_cutoffs_are_uniform_where_styles_are_mixed(self, mixing_prob):
        cutoff = self.draw(mixing_prob).cutoff
        assert cutoff.shape == (self.N,)
        for index in range(1, self.num_ws):
            self.assert_share(cutoff == index, mixing_prob / (self.num_ws - 1))
        self.assert_share(cutoff == self.num_ws, 1 - mixing_prob)
        assert (cutoff >= 1).all()

    def test_without_mixing_there_is_nothing_to_mix(self):
        latents = self.draw(0)
        assert latents.z_mix is None
        assert latents.cutoff is None

    def test_every_deals_the_samples_like_cards(self):
        latents = self.draw(0.9)
        for start in range(3):
            hand = latents.every(start, 3)
            for part in ("z", "c", "z_mix", "cutoff"):
                assert torch.equal(getattr(hand, part), getattr(latents, part)[start::3])
        assert self.draw(0).every(1, 3).z_mix is None


class TestMapped:
    def test_styles_after_the_cutoff_come_from_the_second_latent(self):
        G, _ = networks(c_dim=2)
        z, z_mix, c = torch.randn(3, 6), torch.randn(3, 6), labelled(3, 2, torch.float32)
        ws, w_mean = loss.mapped(G, Latents(z, c, z_mix, torch.tensor([1, 3, G.num_ws])))
        main, other = (G.mapping(x, c, skip_w_avg_update=True) for x in (z, z_mix))
        for i, cutoff in enumerate((1, 3, G.num_ws)):
            assert torch.equal(ws[i, :cutoff], main[i, :cutoff])
            assert torch.equal(ws[i, cutoff:], other[i, cutoff:])
        torch.testing.assert_close(w_mean, main[:, 0].mean(dim=0))

    def test_only_the_mean_of_the_main_latents_is_reported_and_w_avg_stays(self):
        G, D = networks()
        latents, real = Latents(torch.randn(4, 6), torch.zeros(4, 0)), torch.randn(4, 3, 16, 16)
        before = G.mapping.w_avg.clone()
        outputs = (
            loss.generator_main(G, D, identity, latents),
            loss.path_length(G, latents, torch.zeros([]), 2),
            loss.discriminator_main(G, D, identity, latents, real, torch.zeros(4, 0)),
        )
        expected = G.mapping(latents.z, skip_w_avg_update=True)[:, 0].mean(dim=0)
        for output in outputs:
            assert not output.w_mean.requires_grad
            torch.testing.assert_close(output.w_mean, expected.detach())
        assert torch.equal(G.mapping.w_avg, before)


class TestPhases:
    def test_reals_and_fakes_go_through_the_augmentation(self):
        G, D = networks()
        latents, real, none = (
            Latents(torch.randn(4, 6), torch.zeros(4, 0)),
            torch.randn(4, 3, 16, 16),
            torch.zeros(4, 0),
        )
        seen = []

        def augment(images):
            seen.append(len(images))
            return images * 0

        blank = D(torch.zeros(4, 3, 16, 16)).detach()
        logits = [loss.generator_main(G, D, augment, latents).stats["Loss/scores/fake"]]
        stats = loss.discriminator_main(G, D, augment, latents, real, none).stats
        logits += [stats["Loss/scores/fake"], stats["Loss/scores/real"]]
        logits += [loss.r1(D, augment, real, none, 1).stats["Loss/scores/real"]]
        for scores in logits:
            torch.testing.assert_close(scores, blank)
        assert seen == [4, 8, 4]

    def test_reals_and_fakes_are_judged_as_two_batches_each_with_its_labels(self):
        G, D = networks(c_dim=2)
        c, real_c = labelled(4, 2, torch.float32), labelled(5, 2, torch.float32)[1:]
        latents, real = Latents(torch.randn(4, 6), c), torch.randn(4, 3, 16, 16)
        stats = loss.discriminator_main(G, D, identity, latents, real, real_c).stats
        fake_logits, real_logits = D(G.synthesis(loss.mapped(G, latents)[0]), c), D(real, real_c)
        torch.testing.assert_close(stats["Loss/scores/fake"], fake_logits.detach())
        torch.testing.assert_close(stats["Loss/scores/real"], real_logits.detach())
        torch.testing.assert_close(stats["Loss/D/loss"], (F.softplus(fake_logits) + F.softplus(-real_logits)).detach())
        assert torch.equal(stats["Loss/signs/real"], real_logits.detach().sign())
        scores = loss.generator_main(G, D, identity, latents).stats["Loss/scores/fake"]
        torch.testing.assert_close(scores, fake_logits.detach())
        scores = loss.r1(D, identity, real, real_c, 1).stats["Loss/scores/real"]
        torch.testing.assert_close(scores, real_logits.detach())

    def test_training_d_leaves_g_alone_and_its_images_without_gradient(self):
        G, D = networks()
        latents, real, none = (
            Latents(torch.randn(4, 6), torch.zeros(4, 0)),
            torch.randn(4, 3, 16, 16),
            torch.zeros(4, 0),
        )
        loss.discriminator_main(G, D, identity, latents, real, none).loss.backward()
        assert all(p.grad is None for p in G.parameters())
        loss.r1(D, identity, real, none, 1).loss.backward()
        assert real.grad is None
        assert not real.requires_grad

    def test_path_noise_is_drawn_unless_given(self):
        G, _ = networks()
        latents = Latents(torch.randn(2, 6), torch.zeros(2, 0))

        def penalty(noise=None):
            return loss.path_length(G, latents, torch.ones([]), 2, noise=noise).loss.item()

        torch.manual_seed(5)
        drawn = penalty()
        assert penalty() != drawn
        torch.manual_seed(5)
        assert penalty() == drawn
        noise = torch.randn(2, 3, 16, 16)
        assert penalty(noise) == penalty(noise)


class TestDistances:
    """Between neighbours of a batch, of the images before augmentation."""

    def stats(self, real, dtype=torch.float32):
        G, D = networks(dtype)
        n, c = len(real), torch.zeros(len(real), 0, dtype=dtype)
        latents = Latents(torch.randn(n, 6, dtype=dtype), c)
        return loss.discriminator_main(G, D, lambda images: images * 0, latents, real, c).stats

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_root_mean_square_of_the_difference(self, dtype):
        levels = torch.tensor([-1.0, -0.5, 0.0, 1.0], dtype=dtype)
        stats = self.stats(levels.reshape(4, 1, 1, 1).repeat(1, 3, 16, 16), dtype)
        assert sorted(stats["Health/distance/real"].tolist()) == pytest.approx([0.5, 0.5, 1.0, 2.0])
        assert stats["Health/distance/fake"].shape == (4,)
        assert stats["Health/distance/fake"].min() > 0
        assert not stats["Health/distance/fake"].requires_grad

    @pytest.mark.parametrize(("size", "expected"), [(8, 2.0), (16, 2.0), (32, 0.0), (64, 0.0)])
    def test_pictures_are_shrunk_to_16x16(self, size, expected):
        board = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(size // 2, size // 2).expand(3, size, size)
        found = loss._distances("real", torch.stack([board, -board]).to(torch.bfloat16))
        assert found["Health/distance/real"].tolist() == [expected, expected]

    def test_one_image_has_no_neighbour(self):
        assert "Health/distance/fake" not in self.stats(torch.zeros(1, 3, 16, 16))


class TestAccumulation:
    """`every(i, rounds)` and `real[i::rounds]`: the sum over the micro-batches equals the big batch."""

    batch = 16

    def run(self, phase, rounds, c_dim):
        G, D = networks(torch.float64, c_dim)
        generator = torch.Generator().manual_seed(1)
        z, z_mix = torch.randn(2, self.batch, 6, dtype=torch.float64, generator=generator)
        real = torch.randn(self.batch, 3, 16, 16, dtype=torch.float64, generator=generator)
        cutoff = torch.randint(1, G.num_ws + 1, [self.batch], generator=generator)
        c = labelled(self.batch, c_dim)
        latents = Latents(z, c.flip(0), z_mix, cutoff)
        for i in range(rounds):
            some, images, labels = latents.every(i, rounds), real[i::rounds], c[i::rounds]
            if phase == "Gmain":
                output = loss.generator_main(G, D, identity, some)
            elif phase == "Dmain":
                output = loss.discriminator_main(G, D, identity, some, images, labels)
            else:
                output = loss.r1(D, identity, images, labels, 3)
            assert output.loss.dtype == torch.float64
            (output.loss / rounds).backward()
        network = G if phase == "Gmain" else D
        return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}

    @pytest.mark.parametrize("c_dim", [0, 3])
    @pytest.mark.parametrize("rounds", [2, 4])
    @pytest.mark.parametrize("phase", ["Gmain", "Dmain", "Dreg"])
    def test_the_gradients_of_the_rounds_add_up(self, phase, rounds, c_dim):
        whole, parts = self.run(phase, 1, c_dim), self.run(phase, rounds, c_dim)
        assert whole.keys() == parts.keys()
        assert len(whole) > 10
        for name, expected in whole.items():
            assert (parts[name] - expected).abs().max() <= 1e-10 * expected.abs().max() + 1e-15, name

    def test_cutting_the_batch_into_slices_would_not_do(self):
        """It tears the minibatch-stddev groups apart: what the deal is for."""
        _, D = networks(torch.float64)
        real = torch.randn(self.batch, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        whole, slices = D(real).mean(), torch.cat([D(part) for part in real.chunk(2)]).mean()
        dealt = torch.cat([D(real[i::2]) for i in range(2)]).mean()
        torch.testing.assert_close(dealt, whole, rtol=1e-10, atol=0)
        assert (slices - whole).abs() > 1e-6 * whole.abs()
