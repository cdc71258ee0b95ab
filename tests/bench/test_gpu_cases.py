"""What benchmarks/train_step.py measures on a GPU, which no machine of CI has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gan.config import DataInfo
from gan.resolve import resolve
from gan.train_options import TrainOptions

ROOT = Path(__file__).parents[2]


@pytest.fixture
def train_step(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import train_step

    return train_step


def test_every_case_is_a_run_that_could_be_and_takes_its_batch_at_once(train_step: Any) -> None:
    cases = train_step.cuda_cases()
    assert len(cases) > 70
    for name, case in cases.items():
        options = {key: value for key, value in case.items() if key not in ("res", "plain", "p")}
        config = resolve(TrainOptions(data="x", **options), DataInfo("x", "x", 300, case["res"], case["res"], 3))
        assert config.batch_gpu == config.batch_size, name
        assert config.augment.multipliers is not None, name


def test_a_case_that_fails_costs_a_line_and_is_tried_again(train_step: Any, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys; sys.exit('no such GPU') if '\"bad\"' in sys.argv[2] else print('heard\\n{\"n\": 1}')"
    )
    kept: list[dict[str, Any]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_step, "line_of", lambda name, result: name)
        cases = {"a": {"is": "bad"}, "b": {"is": "good"}, "c": {"is": "good"}}
        done = {"a": {"error": "earlier"}, "b": {"n": 0}}
        results = train_step.measured(cases, 1, 1, str(script), done=done, keep=lambda found: kept.append(dict(found)))
    assert results == {"a": {"error": "no such GPU"}, "b": {"n": 0}, "c": {"n": 1, "said": ["heard"]}}
    assert kept[-1] == results
    assert train_step.measured(cases, 1, 1, str(script), minutes=0.1) == {}
