"""The floors of the house: what may import what. Read from the source, imports inside of functions included."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*ROOT.glob("gan/**/*.py"), *ROOT.glob("torch_utils/**/*.py")])
# Between them imports go strictly down; within one of them they are free. A new package is given its floor here.
FLOORS = {
    "torch_utils": 0,
    "gan.errors": 0.5,
    "gan.packages": 0.75,
    "gan.presets": 0.75,
    "gan.metric_names": 0.75,
    "gan.image_size": 0.75,
    "gan.snapshot_names": 0.75,
    "gan.files": 1,
    "gan.memory": 1,
    "gan.train_options": 1,
    "gan.config": 1,
    "gan.resolve": 1.25,
    "gan.continuation": 1.5,
    "gan.data": 2,
    "gan.networks": 2,
    "gan.augment": 2,
    "gan.loss": 3,
    "gan.schedule": 3,
    "gan.models": 3,
    "gan.metrics": 3.5,
    "gan.tracking": 4,
    "gan.latent": 4,
    "gan.training": 5,
    "gan.bench": 5.5,
    "gan.doctor": 5.75,
    "gan.cli": 6,
    "gan.__main__": 7,
}


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source, module="", is_package=False):
    """Every module that a source imports, anywhere in it; `from a import b` is both a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = module.split(".")[: len(module.split(".")) - node.level + is_package]
                base = ".".join([*parent, *base.split(".")] if base else parent)
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


def package(name):
    """The key of FLOORS that a module or something in it belongs to; None for what is outside of the house."""
    parts = name.split(".")
    if parts[0] == "torch_utils":
        return "torch_utils"
    return ".".join(parts[:2]) if parts[0] == "gan" and len(parts) > 1 else None


MODULES = {module_name(path): path for path in SOURCES}
IMPORTS = {
    name: imports(path.read_text(encoding="utf-8"), name, path.name == "__init__.py") for name, path in MODULES.items()
}


def within(names, *packages):
    """Those of the names that are one of the packages or inside of one."""
    return sorted(n for n in names if any(n == p or n.startswith(f"{p}.") for p in packages))


WITH_TORCH = {"gan.data.loader", "gan.data.labels", "gan.data.device_store"}  # of gan.data
WITHOUT_TORCH = {
    *("gan.errors", "gan.files", "gan.memory", "gan.packages", "gan.presets", "gan.image_size", "gan.metric_names"),
    "gan.snapshot_names",
    *("gan.train_options", "gan.config", "gan.resolve", "gan.continuation"),
    *(set(within(MODULES, "gan.data")) - WITH_TORCH),
    *("gan.doctor.examine", "gan.doctor.facts", "gan.doctor.nvidia", "gan.doctor.surroundings"),
    *(
        "torch_utils.distributed",
        "torch_utils.pickle_machine",
        "torch_utils.stand_ins",
        "torch_utils.stored_array",
        "torch_utils.user_cache",
    ),
}


def test_the_sources_are_found():
    assert {"gan", "gan.config", "gan.data.packing", "gan.cli.train", "torch_utils.ops.bias_act"} <= MODULES.keys()


def test_imports_are_found_wherever_they_are():
    source = """
import a.b
from c import d
from . import e
from .f import g
from ..h import i
def function():
    from j import k
    if TYPE_CHECKING:
        import l as m
"""
    expected = {"a.b", "c", "c.d", "x.y", "x.y.e", "x.y.f", "x.y.f.g", "x.h", "x.h.i", "j", "j.k", "l"}
    assert imports(source, "x.y.z") == expected
    assert "x.y.z.e" in imports(source, "x.y.z", is_package=True)


@pytest.mark.parametrize("module", [name for name in MODULES if name != "gan"])
def test_imports_go_down(module):
    own = package(module)
    assert own in FLOORS, f"{own} has no floor: give it one in FLOORS"
    for imported in IMPORTS[module]:
        other = package(imported)
        if other is not None and other != own:
            assert other in FLOORS, f"{module} imports {imported}, which has no floor"
            assert FLOORS[other] < FLOORS[own], f"{module} on floor {FLOORS[own]} imports {imported} on {FLOORS[other]}"


def test_torch_utils_knows_nothing_of_gans():
    for module in within(MODULES, "torch_utils"):
        assert within(IMPORTS[module], "gan") == []


def test_the_package_itself_imports_nothing():
    assert IMPORTS["torch_utils"] == set()
    own = set(within(IMPORTS["gan"], "gan", "torch", "torch_utils"))
    assert own == set(within(own, "gan.models"))  # gan.load, when it is used
    result = python("import sys, gan; print(*{'torch', 'numpy', 'gan.models'} & set(sys.modules))")
    assert (result.returncode, result.stdout.strip(), result.stderr) == (0, "", "")


@pytest.mark.parametrize("module", sorted(WITHOUT_TORCH))
def test_options_and_packing_do_without_torch(module):
    others = IMPORTS[module] - {"torch_utils", *within(IMPORTS[module], *WITHOUT_TORCH)}
    assert within(others, "torch", "torch_utils") == []


def test_what_is_embedded_in_snapshots_imports_only_what_their_readers_have():
    imported = IMPORTS["gan.models.embedded_networks"]
    others = {name for name in imported if name.split(".")[0] not in sys.stdlib_module_names}
    assert others == set(within(others, "torch", "numpy"))


def test_only_the_command_line_knows_click():
    users = {module for module in MODULES if within(IMPORTS[module], "click")}
    assert users
    assert users == set(within(users, "gan.cli"))


def test_one_module_reads_the_environment_of_processes():
    names = r"(LOCAL_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)|TORCHELASTIC_\w+|SLURM_(STEP_\w+|(PROC|LOCAL|NODE)ID)"
    readers = {
        module
        for module, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(names, node.value)
    }
    assert readers == {"torch_utils.distributed"}


@pytest.mark.parametrize("script", ["dataset_tool.py", "train.py", "generate.py"])
def test_the_doors_only_call_the_command_line(script):
    found = imports((ROOT / script).read_text(encoding="utf-8"))
    assert within(found, "gan.cli")
    assert found == set(within(found, "gan.cli"))


def python(code):
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    "module",
    [
        "gan.cli",
        "gan.cli.train",
        "gan.cli.dataset_tool",
        "gan.cli.doctor",
        "gan.doctor.examine",
        "gan.config",
        "gan.data.packing",
    ],
)
def test_what_answers_at_once_loads_no_torch(module):
    code = f"import sys, {module}; print(*{{'torch', 'mlflow', 'scipy'}} & set(sys.modules))"
    result = python(code)
    assert (result.returncode, result.stdout.strip(), result.stderr) == (0, "", "")


@pytest.mark.parametrize("module", ["gan.cli.train", "gan.cli.generate"])
def test_help_loads_nothing_that_takes_time(module):
    result = python(f"import sys, {module}; print(*{{'torch', 'numpy', 'PIL'}} & set(sys.modules))")
    assert (result.returncode, result.stdout.strip(), result.stderr) == (0, "", "")


def test_training_knows_nothing_of_packing():
    packing = ("normalise", "demo", "sources", "label_files", "label_matching", "packing", "pack_plan", "unfinished")
    modules = {f"gan.data.{name}" for name in packing}
    assert modules <= MODULES.keys()
    result = python(f"import sys, gan.data.dataset; print(*{modules} & set(sys.modules))")
    assert (result.returncode, result.stdout.strip(), result.stderr) == (0, "", "")


def test_import_is_silent_and_touches_no_device():
    lines = [f"import {module}" for module in MODULES]
    lines += ["import sys, threading, torch", "assert not torch.cuda.is_initialized()"]
    lines += [
        "assert threading.active_count() == 1",
        "assert not {'mlflow', 'pyspng', 'imageio_ffmpeg'} & set(sys.modules)",
    ]
    result = python("\n".join(lines))
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
