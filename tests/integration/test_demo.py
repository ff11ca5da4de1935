"""``meshcompute demo`` as a user runs it: in a process of its own, from an empty folder."""

import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

import meshcompute
from meshcompute.cli import mesh

# A demo starts a dozen processes: alone it takes half a minute, on a busy machine several.
pytestmark = pytest.mark.timeout(300)

SITES = [
    "ecmwf-1-0",
    "ecmwf-1-1",
    "ecmwf-1-2",
    "ecmwf-1-3",
    "eumetsat-2-0",
    "eumetsat-2-1",
    "eumetsat-2-2",
    "eumetsat-2-3",
]


@contextmanager
def running(*arguments, cwd, **environment):
    process = subprocess.Popen(
        [sys.executable, "-m", "meshcompute", "demo", *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def run(*arguments, cwd, **environment):
    with running(*arguments, cwd=cwd, **environment) as process:
        output, errors = process.communicate(timeout=280)
    return process.returncode, output, errors


def read_until(process, pattern):
    lines = []
    for line in process.stdout:
        lines.append(line)
        if re.search(pattern, line):
            return "".join(lines)
    raise AssertionError(f"{pattern!r} was not printed:\n{''.join(lines)}\n{process.stderr.read()}")


def measured_bytes(output, source, destination):
    number, unit = re.search(rf"{source} +{destination} .* ([\d.]+) (\S+)$", output, re.MULTILINE).groups()
    return float(number) * {"B": 1, "kiB": 2**10, "MiB": 2**20}[unit]


def is_png(path):
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 10_000


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return (*run("--output", "map.png", cwd=folder), folder)


def test_real_data_give_the_right_answer_and_a_picture(real):
    code, output, errors, folder = real
    assert code == 0, output + errors
    assert "equal: the largest difference" in output
    assert is_png(folder / "map.png")
    assert "Traceback" not in output + errors


def test_the_workers_are_named_as_in_the_reference(real):
    assert f"workers: {', '.join(SITES)}\n" in real[1]


def test_without_pools_a_file_of_the_other_site_is_missed(real):
    # Which of the two is chance.
    assert re.search(r"FileNotFoundError: .*No such file or directory: b?'.*/(A1B|E1)_north_america\.nc'", real[1])


def test_prediction_and_measurement_of_the_traffic_agree(real):
    rows = re.findall(r"^   (\S+) +(\S+) +([\d.]+) (\S+) +([\d.]+) (\S+)$", real[1], re.MULTILINE)
    fields = {(row[0], row[1]): row[2:] for row in rows if row[3] == "kiB"}  # bytes are a shape, a coordinate
    assert len(fields) == 2  # from one site to the other, and the result to this process
    assert any(destination == "client" for _, destination in fields)
    for predicted, _, measured, unit in fields.values():
        assert unit == "kiB"
        assert 0.7 <= float(predicted) / float(measured) <= 1.4


def test_the_reference_calculation_moves_two_fields_and_no_ensemble(tmp_path):
    code, output, errors = run("--reference", "--scale", "0.1", "--workers", "2", cwd=tmp_path)
    assert code == 0, output + errors
    assert "18 x 33 x 96 x 128" in output
    assert "generated 594 of 594 levels" in output
    assert is_png(tmp_path / "meshcompute-demo.png")
    field = 96 * 128 * 4
    assert field <= measured_bytes(output, "eumetsat", "ecmwf") <= 1.2 * field


def test_it_uses_a_cluster_that_is_there_and_leaves_no_file(start_sites, tmp_path):
    mine = start_sites(pools=("north", "south"))
    address = mine.mesh.scheduler_address
    code, output, errors = run(cwd=tmp_path, DASK_SCHEDULER_ADDRESS=address, TMPDIR=str(tmp_path))
    assert code == 0, output + errors
    assert "pools north and south" in output
    folder = Path(re.search(r"north: (\S+)", output).group(1)).parents[1]
    assert folder.parent == tmp_path
    assert not folder.exists()


def test_the_sites_of_a_cluster_may_have_the_files_and_need_not_write_any(start_sites, tmp_path):
    mine = start_sites(pools=("ecmwf", "eumetsat"), workers_per_site=1)
    options = ("--reference", "--scale", "0.02", "--scheduler", mine.mesh.scheduler_address)
    code, _, errors = run(*options, cwd=tmp_path, TMPDIR=str(mine.store("eumetsat")))  # hidden from the other site
    assert code == 1
    assert re.search(r"Site ecmwf cannot write its file in \S+ \(.+\)\. If there is no room", errors)
    assert "Traceback" not in errors

    written = CliRunner().invoke(mesh, ["sample-data", "--scale", "0.02", str(mine.store("ecmwf").parent)])
    assert written.exit_code == 0, written.output
    code, output, errors = run(*options, "--data", str(mine.mesh.root / "data"), cwd=tmp_path)
    assert code == 0, output + errors
    assert f"ecmwf: {mine.path('ecmwf')}/predictions.nc" in output
    assert mine.store("ecmwf", "predictions.nc").exists()  # what was there before, stays


def test_the_cluster_need_not_have_meshcompute(stock_sites, tmp_path):
    code, output, errors = run(
        "--reference", "--scale", "0.05", cwd=tmp_path, DASK_SCHEDULER_ADDRESS=stock_sites.mesh.scheduler_address
    )
    assert code == 0, output + errors


@pytest.mark.usefixtures("can_be_interrupted")
def test_ctrl_c_half_way_ends_everything(tmp_path):
    with running(cwd=tmp_path) as process:
        root = Path(re.search(r"ecmwf: (\S+)/data/ecmwf/", read_until(process, "ecmwf: /")).group(1))
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    # A call that distributed had not quite begun, it cancels with an error of its own, in its log.
    assert errors.splitlines()[-1] == "interrupted; everything that was started has been ended"
    assert str(Path(meshcompute.__file__).parent) not in errors
    assert not root.exists()


@pytest.mark.usefixtures("can_be_interrupted")
def test_keep_leaves_the_sites_running_until_ctrl_c(tmp_path):
    with running("--keep", "--workers", "1", cwd=tmp_path) as process:
        watchdog = threading.Timer(100, process.kill)
        watchdog.start()
        output = read_until(process, "meshcompute.open_dataset.*eumetsat")
        address = re.search(r"client = Client\('(\S+)'\)", output).group(1)
        path = re.search(r"open_dataset\('ecmwf', '(\S+)'\)", output).group(1)
        code = (
            "from distributed import Client; import meshcompute; client = Client(%r)\n"
            "print(float(meshcompute.open_dataset('ecmwf', %r, chunks={}).air_temperature.mean().compute()))"
        )
        used = subprocess.run(
            [sys.executable, "-c", code % (address, path)], capture_output=True, text=True, timeout=60, check=False
        )
        assert used.returncode == 0, used.stderr
        assert 270 < float(used.stdout) < 300
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
        watchdog.cancel()
    assert process.returncode == 0, errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "no/such/folder/map.png"], "folder for the picture does not exist"),
        (["--reference", "--scale", "0"], "scale must lie between"),
        (["--workers", "0"], "0 is not in the range"),
        (["--scheduler", "tcp://127.0.0.1:9"], "127.0.0.1:9"),
    ],
)
def test_what_cannot_work_is_said_before_anything_starts(tmp_path, arguments, message):
    code, output, errors = run(*arguments, cwd=tmp_path, DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT="1s")
    assert code != 0
    assert message in errors
    assert "Traceback" not in errors
    assert "workers:" not in output


def test_a_cluster_without_two_pools_is_refused(start_sites, tmp_path):
    mine = start_sites(pools=("alone",), workers_per_site=1)
    code, _, errors = run("--scheduler", mine.mesh.scheduler_address, cwd=tmp_path)
    assert code == 1
    assert "needs workers of two sites" in errors
    assert "alone" in errors


def test_dask_mesh_is_the_same_command():
    shown = subprocess.run(
        [Path(sys.executable).parent / "dask", "mesh", "demo", "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "--reference" in shown.stdout
