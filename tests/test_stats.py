"""Moments summed on the device, read once a tick."""

import io

import numpy as np
import pytest
import torch

from torch_utils.distributed import Place
from torch_utils.stats import Stats, summary
from torch_utils.world import ALONE, World

CPU = torch.device("cpu")


def observations(n, seed=0):
    return np.random.default_rng(seed).normal(loc=3, scale=0.5, size=n)


def test_number_mean_and_deviation_are_those_of_numpy():
    values, stats = observations(1000), Stats(CPU)
    for part in np.split(values, [1, 4, 300]):
        stats.report("Loss/G/loss", torch.from_numpy(part))
    row = stats.flush()["Loss/G/loss"]
    assert row == {"num": 1000, "mean": pytest.approx(values.mean()), "std": pytest.approx(values.std())}
    assert isinstance(row["num"], int)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64, torch.bool]
)
@pytest.mark.parametrize("shape", [(), (1,), (6,), (2, 3), (3, 1, 2)], ids=str)
def test_any_shape_and_dtype_is_a_number_of_observations(shape, dtype):
    values = torch.arange(int(np.prod(shape))).reshape(shape).to(dtype)
    stats = Stats(CPU)
    stats.report("x", values)
    exact = values.double()
    assert stats.flush() == {
        "x": {
            "num": values.numel(),
            "mean": pytest.approx(exact.mean().item()),
            "std": pytest.approx(exact.std(correction=0).item()),
        }
    }


def test_reporting_together_is_reporting_one_by_one():
    together, alone = Stats(CPU), Stats(CPU)
    for seed in range(3):
        values = {name: torch.from_numpy(observations(7, seed + i)).float() for i, name in enumerate("cab")}
        values |= {"empty": torch.ones(0), "late" if seed else "early": torch.ones([]), "column": values["a"][:, None]}
        values |= {"half": values["b"].bfloat16(), "other size": values["a"][:5]}
        together.report_all(values)
        for name, observed in values.items():
            alone.report(name, observed)
    actual, expected = together.flush(), alone.flush()
    assert actual == expected
    assert list(actual) == ["c", "a", "b", "early", "column", "half", "other size", "late"]
    assert actual["a"]["num"] == 21
    together.report_all({"b": torch.ones(2)})
    assert together.flush() == {"b": {"num": 2, "mean": 1, "std": 0}}


def test_a_long_tick_of_low_precision_values_loses_nothing():
    stats = Stats(CPU)
    for _ in range(300):
        stats.report("x", torch.full([1000], 0.1, dtype=torch.bfloat16))
    exact = torch.tensor(0.1, dtype=torch.bfloat16).item()
    row = stats.flush()["x"]
    assert row["mean"] == pytest.approx(exact, rel=1e-12)
    assert row["std"] == pytest.approx(0, abs=1e-7)


def test_names_keep_the_order_of_their_first_report():
    stats = Stats(CPU)
    for name in ("b", "a", "c", "a", "b"):
        stats.report(name, torch.ones(1))
    flushed = stats.flush()
    assert list(flushed) == ["b", "a", "c"]
    assert [row["num"] for row in flushed.values()] == [2, 2, 1]


def test_flushing_starts_anew():
    stats = Stats(CPU)
    assert stats.flush() == {}
    stats.report("x", torch.ones(3))
    stats.flush()
    assert stats.flush() == {}
    stats.report("x", torch.zeros(2))
    assert stats.flush() == {"x": {"num": 2, "mean": 0, "std": 0}}


def test_reports_are_detached():
    stats, x = Stats(CPU), torch.ones(3, requires_grad=True)
    stats.report("x", x * 2)
    assert not any(moments.requires_grad for moments in stats.state_dict().values())


@pytest.mark.parametrize("stop", range(6))
def test_continuing_from_a_saved_state_equals_not_stopping(stop):
    reports = [("a", observations(5, seed=0)), ("b", observations(1, seed=1)), ("a", observations(3, seed=2)),
               ("c", observations(2, seed=3)), ("b", observations(7, seed=4))]  # fmt: skip
    never_stopped, stats = Stats(CPU), Stats(CPU)
    for i, (name, values) in enumerate(reports):
        if i == stop:
            stats = reopened(stats)
        never_stopped.report(name, torch.from_numpy(values))
        stats.report(name, torch.from_numpy(values))
    stats = reopened(stats) if stop == 5 else stats
    expected = never_stopped.flush()
    assert stats.flush() == expected
    assert list(expected) == ["a", "b", "c"]


def reopened(stats):
    """Through a file, as a training state is."""
    buffer = io.BytesIO()
    torch.save(stats.state_dict(), buffer)
    buffer.seek(0)
    opened = Stats(CPU)
    opened.report("old", torch.ones(1))  # what was there is replaced
    opened.load_state_dict(torch.load(buffer, weights_only=True))
    return opened


def test_a_saved_state_does_not_change_with_later_reports():
    stats = Stats(CPU)
    stats.report("x", torch.ones(1))
    state = stats.state_dict()
    other = Stats(CPU)
    other.load_state_dict(state)
    stats.report("x", torch.ones(1))
    assert state["x"].tolist() == [1, 1, 1]
    assert other.flush()["x"]["num"] == 1


def test_rounding_never_makes_a_deviation_of_a_negative_variance():
    assert summary(3, 0.3, 0.03 - 1e-18) == {"num": 3, "mean": pytest.approx(0.1), "std": pytest.approx(0, abs=1e-7)}
    assert summary(1, 0.1, 0.1**2 * (1 - 1e-15))["std"] == 0


class Three(World):
    """Stands in for three processes, of which this one is rank 1."""

    def __init__(self, others):
        super().__init__(Place(rank=1, size=3))
        self.others = others

    def meet(self, what):
        self.met = True

    def gather(self, value, what):
        assert self.met  # or a rank that hangs would be waited for without end
        first, last = ({name: rows.tolist() for name, rows in other.state_dict().items()} for other in self.others)
        return [first, value, last]


def test_sums_of_all_ranks_are_those_of_one_that_saw_everything():
    everything, ranks = Stats(CPU), [Stats(CPU) for _ in range(3)]
    for rank, names in enumerate(["a", "bac", ""]):  # the last one has seen nothing yet
        for name in names:
            values = torch.from_numpy(observations(5 + rank, seed=rank))
            ranks[rank].report(name, values)
            everything.report(name, values)
    world = Three([ranks[0], ranks[2]])
    expected = everything.total(ALONE)
    assert list(expected) == list(everything.state_dict())
    total = ranks[1].total(world)
    assert list(total) == ["a", "b", "c"]  # in the order of the ranks
    for name, sums in total.items():
        torch.testing.assert_close(sums, expected[name], rtol=1e-14, atol=0)
    flushed = ranks[1].flush(world)
    assert flushed == {name: pytest.approx(row, rel=1e-12) for name, row in everything.flush().items()}
    assert list(flushed) == list(total)
    assert ranks[1].flush() == {}
    assert ranks[0].flush()["a"]["num"] == 5  # each empties its own


def test_a_total_is_saved_as_a_state_is():
    stats, other = Stats(CPU), Stats(CPU)
    stats.report("a", torch.ones(2))
    other.load_state_dict(stats.total(ALONE))
    other.report("a", torch.zeros(2))
    assert other.flush() == {"a": {"num": 4, "mean": 0.5, "std": 0.5}}
    assert stats.flush() == {"a": {"num": 2, "mean": 1, "std": 0}}
