"""Statistics summed where the tensors are, and read back once a tick."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from torch_utils.world import ALONE, World


class Stats:
    """Moments (number, sum, sum of squares) of named observations, kept on the device.

    Reporting never waits for the device; `flush` does, once for all names.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # Sums over a tick need more than float32; MPS has nothing better.
        self._dtype = torch.float32 if device.type == "mps" else torch.float64
        self._moments: dict[str, torch.Tensor] = {}

    def report(self, name: str, values: torch.Tensor) -> None:
        """Add the elements of `values`, any shape, on this object's device."""
        self.report_all({name: values})

    def report_all(self, observations: Mapping[str, torch.Tensor]) -> None:
        """`report` for each name; what has the same size is summed together, as short launches are what it costs."""
        alike: dict[tuple[int, torch.dtype], dict[str, torch.Tensor]] = {}
        for name, values in observations.items():
            if values.numel() > 0:
                alike.setdefault((values.numel(), values.dtype), {})[name] = values.detach().reshape(-1)
        moments: dict[str, torch.Tensor] = {}
        for group in alike.values():
            x = torch.stack(list(group.values())).to(self._dtype)
            sums = torch.stack([torch.ones_like(x), x, x * x], dim=1).sum(dim=2)  # [names, 3]
            moments.update(zip(group, sums, strict=True))
        for name in observations:
            if name in self._moments and name in moments:
                self._moments[name] += moments[name]
            elif name in moments:
                self._moments[name] = moments[name]

    def flush(self, world: World = ALONE) -> dict[str, dict[str, float]]:
        """{name: {num, mean, std}} of everything reported since the last flush, in the order of first report.

        Of all ranks together, and the same on each.
        """
        moments = self.total(world)
        for sums in self._moments.values():
            sums.zero_()  # not cleared: recorded steps (CUDA graphs) go on adding to this memory
        rows = {name: sums.tolist() for name, sums in moments.items()}
        return {name: summary(*row) for name, row in rows.items() if row[0] > 0}

    def total(self, world: World) -> dict[str, torch.Tensor]:
        """The `state_dict` that one process in place of all ranks would give; they may have reported different names.

        All ranks call it. Sums are taken in the order of the ranks.
        """
        world.meet("the statistics")  # before the device is read, which may wait for a rank that hangs
        names, own = list(self._moments), list(self._moments.values())
        rows = torch.stack(own).tolist() if own else []  # one read
        totals: dict[str, torch.Tensor] = {}
        for moments in world.gather(dict(zip(names, rows, strict=True)), "the statistics"):
            for name, row in moments.items():
                sums = torch.tensor(row, dtype=self._dtype)
                totals[name] = totals[name] + sums if name in totals else sums
        return totals

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What has been reported since the last flush; continuing with it loses nothing."""
        return {name: moments.cpu().clone() for name, moments in self._moments.items()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Take over what `state_dict` gave."""
        self._moments = {name: moments.to(self.device, self._dtype, copy=True) for name, moments in state.items()}


def summary(num: float, total: float, square: float) -> dict[str, float]:
    """Number, mean and (population) standard deviation out of the first three moments."""
    mean = total / num
    return {"num": int(num), "mean": mean, "std": max(square / num - mean**2, 0.0) ** 0.5}
