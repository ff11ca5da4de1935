"""Rules of the whole tree that no other tool holds: what is public, what loads what, where the tests run.

The layers themselves are contracts in pyproject.toml, which scripts/check holds.
"""

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import meshcompute

PACKAGE = Path(meshcompute.__file__).parent
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if not path.stem.startswith("__")
)

# The names that users import. They change with a line in CHANGELOG.md, and not by accident.
PUBLIC = [
    "Crossing",
    "MeshCluster",
    "Plan",
    "errors",
    "explain",
    "filesystem",
    "get_pool",
    "may_leave",
    "measure_traffic",
    "open_dataframe",
    "open_dataset",
    "open_mfdataset",
    "open_zarr",
    "plot_traffic",
    "pool",
    "propagate_pools",
    "propagate_pools_in_collection",
    "to_zarr",
    "visualize_pools",
]
# Travel to schedulers that may have Dask and nothing else.
TRAVELLING = [
    "errors",
    "settings",
    "imports",
    "collecting",
    "pools",
    "placement.objective",
    "placement.localsearch",
    "placement.hypergraph",
    "placement.heuristics",
    "placement.balancing",
    "placement.placing",
    "graphs.tablesizes",
    "graphs.sizes",
    "graphs.learning",
    "links",
    "graphs.sovereignty",
    "scheduler.adapting",
    "graphs.pinnedtasks",
    "graphs.taskgraph",
    "graphs.numbering",
    "graphs.associative",
    "graphs.associativegroups",
    "graphs.associativetables",
    "graphs.reductionsteps",
    "graphs.reductiontrees",
    "graphs.regrouping",
    "scheduler.guard",
    "scheduler.internals",
    "scheduler.links",
    "scheduler.borders",
    "scheduler.replacing",
    "scheduler.state",
    "packing",
    "packedtransfers",
    "scheduler.packing",
    "planning",
]
WHAT_DASK_BRINGS = ["cloudpickle", "dask", "distributed", "tlz", "toolz", "tornado"]


def imports_at_module_level(path):
    """Names of the packages and modules that a file imports when it is imported itself."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            yield node.module


def modules_loaded_by(statement):
    """Top-level packages that are loaded after a statement ran in a fresh interpreter."""
    code = f"import sys\n{statement}\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return set(run.stdout.split())


def test_the_public_names_are_these():
    assert sorted(meshcompute.__all__) == PUBLIC
    assert set(PUBLIC) <= set(dir(meshcompute))


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_exists_and_says_what_it_is(name):
    assert getattr(meshcompute, name).__doc__


def test_a_daemon_with_processes_on_the_loopback_address_needs_no_package_of_the_extra_site():
    parts = ["daemon", "workers.process", "network.loopback"]
    statement = "\n".join(f"import controlplane.{part}" for part in parts)
    assert not modules_loaded_by(statement) & {"docker", "pyroute2"}


def test_a_name_that_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'pols'"):
        _ = meshcompute.pols


@pytest.mark.parametrize("name", MODULES)
def test_every_module_says_what_it_covers_and_what_it_exports(name):
    module = importlib.import_module(f"meshcompute.{name}")
    assert module.__doc__, "a module docstring"
    for exported in module.__all__:
        item = getattr(module, exported)
        if callable(item) and getattr(item, "__module__", None) == module.__name__:
            assert item.__doc__, f"{exported} has no docstring"


@pytest.mark.parametrize("name", TRAVELLING)
def test_what_travels_to_the_scheduler_imports_only_what_every_scheduler_has(name):
    allowed = {*sys.stdlib_module_names, *WHAT_DASK_BRINGS, "meshcompute"}
    for imported in imports_at_module_level(PACKAGE / f"{name.replace('.', '/')}.py"):
        assert imported.partition(".")[0] in allowed, imported
        assert not imported.startswith(("dask.array", "dask.dataframe", "dask.bag")), (
            f"{imported} needs numpy or pandas"
        )


def test_importing_meshcompute_loads_nothing_else():
    assert not modules_loaded_by("import meshcompute") & {"dask", "distributed", "numpy", "xarray", "matplotlib"}


@pytest.mark.parametrize("name", ["scheduler.guard", "planning"])
def test_a_scheduler_does_not_load_xarray_or_matplotlib(name):
    assert not modules_loaded_by(f"import meshcompute.{name}") & {"xarray", "matplotlib", "netCDF4", "zarr"}


def test_the_command_line_plug_in_costs_every_dask_command_next_to_nothing():
    assert not modules_loaded_by("import meshcompute.cli") & {"dask", "distributed", "numpy", "xarray", "matplotlib"}


def test_no_file_is_longer_than_500_lines():
    too_long = {path.name: n for path in PACKAGE.rglob("*.py") if (n := len(path.read_text().splitlines())) > 500}
    assert not too_long


@pytest.mark.skipif(os.environ.get("CI") != "true", reason="a developer may run the tests on an editable install")
def test_the_tests_run_on_the_installed_wheel():
    assert PACKAGE.parent.name == "site-packages"
    assert (PACKAGE.parent / f"meshcompute-{meshcompute.__version__}.dist-info").is_dir()
    assert (PACKAGE / "py.typed").exists()
    assert not PACKAGE.is_relative_to(Path(__file__).parents[1] / "meshcompute")
