"""The metrics that there are: what each is made of, and which of its numbers says how good a network is. No torch.

Names and definitions are those of the field: FID arXiv 1706.08500, KID 1801.01401, precision and recall 1904.06991,
inception score 1606.03498, perceptual path length 1812.04948, sliced Wasserstein distance 1710.10196.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Collection, Mapping

INCEPTION = "inception-2015-12-05.pt"
VGG = "vgg16.pt"
AUTO, NONE = "auto", "none"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metric:
    """What a metric is made of."""

    name: str
    kind: str
    """how it is computed: fid, kid, pr, is, ppl, swd or diversity"""
    text: str
    detector: str | None = None
    """file of the network that sees for it; None: it needs none"""
    num_fakes: int
    """generated images, or pairs of them for ppl"""
    max_reals: int | None = 0
    """real images at most; None: all of the dataset, 0: it needs none"""
    results: tuple[str, ...]
    """names of its numbers; the first says which snapshot is best"""
    higher_is_better: bool = False
    decides: bool = True
    """whether a snapshot is better than another one by its first number"""
    space: str = "w"
    """of ppl: where its paths run, z or w"""
    whole_path: bool = False
    """of ppl: anywhere on a path, not only at its beginning"""
    crop: bool = False
    """of ppl: the middle of the pictures only"""

    def num_reals(self, images: int) -> int | None:
        """How many of a dataset of so many images it takes; None: it takes none."""
        return None if self.max_reals == 0 else min(self.max_reals or images, images)

    def num_fakes_against(self, images: int) -> int:
        """How many generated images it takes then: of some as many as real ones."""
        as_many = self.num_reals(images) if self.kind in ("swd", "diversity") else None
        return self.num_fakes if as_many is None else min(self.num_fakes, as_many)


def _fid(name: str, num_fakes: int, max_reals: int | None) -> Metric:
    reals = "all" if max_reals is None else f"{max_reals // 1000}k"
    text = f"Frechet inception distance, {num_fakes // 1000}k fakes against {reals} reals"
    return Metric(
        name=name,
        kind="fid",
        text=text,
        detector=INCEPTION,
        num_fakes=num_fakes,
        max_reals=max_reals,
        results=(name,),
    )


def _kid(name: str, num_fakes: int, max_reals: int) -> Metric:
    reals = "all" if max_reals > 50_000 else "50k"
    return Metric(
        name=name,
        kind="kid",
        text=f"Kernel inception distance, {num_fakes // 1000}k fakes against {reals} reals",
        detector=INCEPTION,
        num_fakes=num_fakes,
        max_reals=max_reals,
        results=(name,),
    )


def _pr(name: str, max_reals: int) -> Metric:
    reals = "all" if max_reals > 50_000 else "50k"
    return Metric(
        name=name,
        kind="pr",
        text=f"Precision and recall by 3 nearest neighbours, 50k fakes against {reals} reals",
        detector=VGG,
        num_fakes=50_000,
        max_reals=max_reals,
        results=(f"{name}_precision", f"{name}_recall"),
        higher_is_better=True,
    )


def _ppl(name: str, space: str, whole_path: bool, crop: bool = True) -> Metric:
    where = "along whole paths" if whole_path else "at the ends of paths"
    cropped = ", pictures cropped" if crop else ""
    return Metric(
        name=name,
        kind="ppl",
        text=f"Perceptual path length in {space}, {where}{cropped}, 50k pairs",
        detector=VGG,
        num_fakes=50_000,
        results=(name,),
        space=space,
        whole_path=whole_path,
        crop=crop,
    )


_ALL = (
    _fid("fid50k_full", 50_000, None),
    _kid("kid50k_full", 50_000, 1_000_000),
    _pr("pr50k3_full", 200_000),
    _ppl("ppl2_wend", "w", whole_path=False, crop=False),
    Metric(
        name="is50k",
        kind="is",
        text="Inception score of 50k fakes, in 10 parts",
        detector=INCEPTION,
        num_fakes=50_000,
        results=("is50k_mean", "is50k_std"),
        higher_is_better=True,
    ),
    _fid("fid5k_full", 5_000, None),
    _kid("kid5k_full", 5_000, 1_000_000),
    _fid("fid50k", 50_000, 50_000),
    _kid("kid50k", 50_000, 50_000),
    _pr("pr50k3", 50_000),
    _ppl("ppl_zfull", "z", whole_path=True),
    _ppl("ppl_wfull", "w", whole_path=True),
    _ppl("ppl_zend", "z", whole_path=False),
    _ppl("ppl_wend", "w", whole_path=False),
    Metric(
        name="swd",
        kind="swd",
        text="Sliced Wasserstein distance of 7x7 patches on each level of a Laplacian pyramid, times 1000",
        num_fakes=2048,
        max_reals=2048,
        results=("swd",),
    ),
    Metric(
        name="diversity",
        kind="diversity",
        text="Mean distance between two fakes, as a share of that between two reals",
        num_fakes=2048,
        max_reals=2048,
        results=("diversity",),
        decides=False,  # the noise of new networks is further apart than any images
    ),
)
METRICS: dict[str, Metric] = {metric.name: metric for metric in _ALL}
_WITH_DETECTOR = ("fid50k_full", "kid50k_full")
_WITHOUT_DETECTOR = ("swd", "diversity")


def names_in(text: str) -> list[str]:
    """The names of a list such as `fid50k_full,swd`; of `auto` and `none` none."""
    return [] if text in (AUTO, NONE) else [name.strip() for name in text.split(",")]


def problems_with(text: str, option: str = "--metrics") -> list[str]:
    """What is wrong with a list of metrics that a user typed."""
    problems, names = [], names_in(text)
    for name in dict.fromkeys(names):
        if name in METRICS:
            continue
        close = difflib.get_close_matches(name, METRICS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(METRICS)}"
        alone = f"{name} goes alone" if name in (AUTO, NONE) else hint
        problems.append(f"{option} {name or repr(name)}: no such metric; {alone}")
    return problems


def chosen(text: str, is_there: Callable[[str], bool]) -> list[str]:
    """The metrics that a list or word means; `auto` takes what the detectors that are there allow.

    Args:
        is_there: whether there is a detector of this name.
    """
    if text == NONE:
        return []
    if text == AUTO:
        return list(_WITH_DETECTOR if is_there(INCEPTION) else _WITHOUT_DETECTOR)
    return list(dict.fromkeys(names_in(text)))


def detectors_of(names: Collection[str]) -> list[str]:
    """The detectors that these metrics need."""
    needed = (METRICS[name].detector for name in names)
    return list(dict.fromkeys(detector for detector in needed if detector is not None))


def in_words(name: str, results: Mapping[str, float], note: str = "") -> str:
    """`is50k_mean 5.31, is50k_std 0.12`: the main numbers of a metric; `note` stands behind the first."""
    shown = [f"{result} {results[result]:.4g}" for result in METRICS[name].results if result in results]
    return ", ".join([f"{shown[0]}{note}", *shown[1:]]) if shown else ""
