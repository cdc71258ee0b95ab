"""The tables of docs/performance.md, reliability.md and scaling.md: `python benchmarks/report.py`.

They are made of benchmarks/results/; what is not there is left out.
"""

from __future__ import annotations

import json
from typing import Any

import harness


def results(name: str) -> Any:
    return json.loads((harness.RESULTS / f"{name}.json").read_text())["results"]


def row(*cells: object) -> None:
    print("| " + " | ".join(str(cell) for cell in cells) + " |")


def header(*columns: str) -> None:
    row(*columns)
    print("|" + " --- |" * len(columns))


def spread(step: dict[str, float]) -> str:
    return f"{step['median']:.0f} ({step['min']:.0f} to {step['max']:.0f})"


def train_step() -> None:
    found = results("train_step")
    header("case", "ours ms", "plain ms", "ratio", "share of the ceiling", "sec/kimg")
    for name, result in found.items():
        if "error" in result:
            row(name, result["error"])
            continue
        plain, ratio = "", ""
        if result["plain"]:
            plain, ratio = spread(result["plain"]["step_ms"]), f"**{result['ratio']:.2f}**"
        share = f"{result['ceiling']['share']:.0%}"
        row(name, spread(result["step_ms"]), plain, ratio, share, f"{result['sec_per_kimg']:.1f}")
    print()
    header("ms a call", "Gmain", "Greg", "Dmain", "Dreg")
    for name, result in found.items():
        if result["plain"]:
            for side, phases in (("ours", result["phases"]), ("plain", result["plain"]["phases"])):
                row(f"{name}, {side}", *(f"{phase['ms']:.0f}" for phase in phases.values()))


def train_step_cuda() -> None:
    header("case", "ms a step", "sec/kimg", "share of the ceiling", "peak GB", "plain / ours", "computed by")
    for name, result in results("train_step_cuda").items():
        if "error" in result:
            row(name, result["error"])
            continue
        step, share = result["step_ms"], f"{result['ceiling']['share']:.0%}"
        spread = f"{step['median']:.1f} ({step['min']:.1f} to {step['max']:.1f})"
        ratio = f"**{result['ratio']:.2f}**" if result["ratio"] else ""
        peak = f"{result['memory']['peak_gb']:.2f}"
        row(name, spread, f"{result['sec_per_kimg']:.2f}", share, peak, ratio, result["computing"])


def ops_cuda() -> None:
    found = results("ops_cuda")
    launch = found["call_microseconds"]
    print(f"A device copy moves {found['copy_gb_per_second']:.0f} GB/s. {found['prepared']}.")
    print(f"A call costs the host {launch['ours']:.1f} us, PyTorch's operations {launch['native']:.1f} us.\n")
    header(
        "operation", *(f"{each}: ms, GB/s, of copy, to native, to ref" for each in ("forward", "backward", "second"))
    )
    for name, result in found["cases"].items():
        if "error" in result:
            row(name, result["error"])
            continue
        cells = []
        for each, ours in result["ours"].items():
            ratios = (f"{result[way][each]['ms'] / ours['ms']:.1f}" for way in ("native", "ref"))
            share = f"{ours['share_of_copy']:.0%}"
            cells.append(", ".join([f"{ours['ms']:.3f}", f"{ours['gb_per_second']:.0f}", share, *ratios]))
        row(name, *cells)


def scaling() -> None:
    found = results("scaling")
    header("64 px, cbase 4096, cmax 128, batch 16, p .2, but", "ms a step", "sec/kimg", "peak GB")
    for name, result in found["steps"].items():
        row(name, spread(result["step_ms"]), f"{result['sec_per_kimg']:.1f}", f"{result['memory']['peak_gb']:.2f}")
    print()
    header("thousand images (32 px)", "open, first", "open, cached", "batch, first epoch", "batch, cached")
    for images in found["images"]:
        opened = (f"{images[f'{run}_open_seconds']:.3f} s" for run in ("first", "cached"))
        batches = (f"{images[f'{run}_batch_ms']:.3f} ms" for run in ("first", "cached"))
        row(f"{images['thousand_images']:.0f}", *opened, *batches)


def profile() -> None:
    found = results("profile")
    header("share of a step", *found)
    for kind in next(iter(found.values())):
        row(kind, *(f"{shares.get(kind, 0):.1%}" for shares in found.values()))


def quality() -> None:
    header("curve", "third", "float32", "bfloat16", "difference", "spread of seeds")
    for line in results("quality")["rows"]:
        means = (f"{line['means'][precision]:.3f}" for precision in ("fp32", "bf16"))
        difference = f"{line['difference']:.3f}{'' if line['within'] else ' (beyond)'}"
        row(line["curve"].removeprefix("Loss/"), line["third"], *means, difference, f"{line['spread']:.3f}")


def pack() -> None:
    header("size", "way", "images/s", "to plain", "to one worker", "per core, to plain")
    for size, ways in results("pack").items():
        for way, rate in ways.items():
            if way != "images":
                spread = f"{rate['wall_median']:.0f} ({rate['wall_min']:.0f} to {rate['wall_max']:.0f})"
                ratios = (f"{rate[key]:.2f}" for key in ("wall_to_plain", "wall_to_one", "per_core_to_plain"))
                row(size, way, spread, *ratios)


def model_files() -> None:
    header("way", "seconds", "to plain", "of processor", "memory on top", "longest stall beside it", "file")
    for way, found in results("model_files").items():
        if way != "tensor_bytes":
            seconds = f"{found['wall']['median']:.2f} ({found['wall']['min']:.2f} to {found['wall']['max']:.2f})"
            medians = {key: value["median"] for key, value in found.items() if isinstance(value, dict)}
            memory, stall = f"{medians['peak_mb']:.0f} MB", f"{medians['stall_ms']:.0f} ms"
            size = f"{medians['bytes'] / 1e6:.1f} MB"
            row(way, seconds, f"{found['wall_to_plain']:.2f}", f"{medians['cpu']:.2f} s", memory, stall, size)


def metrics() -> None:
    header("measurement", "way", "seconds", "to ours", "longest portion", "memory")
    for name, ways in results("metrics").items():
        for way, of in ways.items():
            seconds = (f"{of[key] / 1000:.2f}" for key in ("median_ms", "min_ms", "max_ms"))
            portion = f"{of['longest_portion_ms']:.0f} ms" if of["longest_portion_ms"] else ""
            spread = "{} ({} to {})".format(*seconds)
            row(name, way, spread, f"{of['to_ours']:.2f}", portion, f"{of['peak_mb']:.0f} MB")


def faults() -> None:
    header("fault", "times", "runs", "lost, torn or different", "besides")
    for name, fault in results("faults").items():
        besides = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in fault["notes"].items())
        row(name, fault["injected"], fault["runs"], len(fault["problems"]), besides)


def processes() -> None:
    for part, table in (("collectives", collectives), ("steps", steps), ("model", model)):
        found = results("processes").get(part)
        if found is not None:
            table({name: of for name, of in found.items() if name != "load_before"})
            print()


def collectives(found: dict[str, Any]) -> None:
    header("averaging, by gloo on the loopback", *(f"{name}, ms" for name in found))
    for size in next(iter(found.values()))["average_us"]:
        row(f"{int(size):,} bytes", *(f"{of['average_us'][size] / 1000:.2f}" for of in found.values()))
    row("agreeing on a step", *(f"{of['agree_us'] / 1000:.2f}" for of in found.values()))


def steps(found: dict[str, Any]) -> None:
    header("ms a step", "one", "one beside another", "two processes", "reductions", "efficiency", "beside another")
    for name, case in found.items():
        runs = (spread(case[way]["step_ms"]) for way in ("alone", "stranger", "pair"))
        shares = (case[what] for what in ("efficiency", "efficiency_against_strangers"))
        reductions = f"{case['pair']['reduce_ms']:.0f} ({case['share_of_reductions']:.0%})"
        if "modelled_reduce_ms" in case["pair"]:
            reductions += f", by the model {case['pair']['modelled_reduce_ms']:.0f}"
        row(name, *runs, reductions, *(f"{share:.0%}" for share in shares))


def model(found: dict[str, Any]) -> None:
    header("model", "images a GPU", "computing, ms", "reductions, ms", "efficiency", "if hidden", "sec/kimg")
    for preset, fabrics in found["cases"].items():
        for fabric, of in fabrics.items():
            efficiency = (f"{of[name]:.0%}" for name in ("efficiency", "efficiency_if_hidden"))
            times = (f"{of[name]:.1f}" for name in ("alone_ms", "reductions_ms"))
            row(f"{preset}, {fabric}", of["images_per_gpu"], *times, *efficiency, f"{of['sec_per_kimg']:.2f}")


def main() -> None:
    tables = (train_step, train_step_cuda, ops_cuda, scaling, profile, quality, pack, model_files, metrics)
    tables += (faults, processes)
    for table in tables:
        if (harness.RESULTS / f"{table.__name__}.json").exists():
            print(f"\n## {table.__name__}\n")
            table()


if __name__ == "__main__":
    main()
