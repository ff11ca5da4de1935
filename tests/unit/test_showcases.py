"""The demo's calculations: right on plain arrays, indifferent to Dask, and painted."""

import dask.array
import matplotlib.image
import numpy as np
import pytest
import xarray as xr

from meshcompute import sampledata
from meshcompute.showcases import Ensemble, Scenarios


@pytest.fixture(scope="module")
def scenarios():
    return [xr.load_dataset(sampledata.scenario_file(name)) for name in ("A1B", "E1")]


@pytest.fixture(scope="module")
def fields(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fields")
    sampledata.write_predictions(str(folder / "p.nc"), 0.05)
    sampledata.write_observations(str(folder / "o.nc"), 0.05)
    return [xr.load_dataset(folder / name) for name in ("p.nc", "o.nc")]


def assert_is_a_picture(path):
    pixels = matplotlib.image.imread(path)
    assert pixels.shape[0] > 400
    assert pixels.shape[1] > 600
    assert len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 100  # colours


def test_the_difference_per_decade_is_that_of_numpy(scenarios):
    result = Scenarios().define(*scenarios)
    a1b, e1 = (
        dataset.air_temperature.values.astype("f8").reshape(24, 10, 37, 49).mean(axis=1) for dataset in scenarios
    )
    np.testing.assert_allclose(result.values, a1b - e1, atol=2e-4)  # float32 of about 300 K
    assert result.decade.values.tolist() == list(range(1860, 2100, 10))
    assert not result[:14].any()  # one run until 1999
    assert (result[-1] > 0).all()


def test_the_difference_per_decade_is_the_same_in_chunks(scenarios):
    lazy = Scenarios().define(*(dataset.chunk(Scenarios.chunks) for dataset in scenarios))
    assert isinstance(lazy.data, dask.array.Array)
    xr.testing.assert_allclose(lazy.compute(scheduler="sync"), Scenarios().define(*scenarios))


def test_the_ensemble_is_averaged_and_compared_at_one_height(fields):
    result = Ensemble(0.05).define(*fields)
    expected = fields[0].air_pressure.values[:, 10].astype("f8").mean(axis=0) - fields[1].air_pressure.values
    np.testing.assert_allclose(result.air_pressure.values, expected, atol=0.1)  # float32 of about 100 000 Pa
    assert result.to_array()[0, ..., 0].dims == ("latitude", "longitude")


@pytest.mark.parametrize("scale", [0.1, 1])
def test_the_ensemble_has_about_as_many_chunks_at_every_scale(scale):
    showcase = Ensemble(scale)
    with dask.config.set(showcase.config):
        chunked = dask.array.empty(sampledata.reference_shape(scale), dtype="f4", chunks=showcase.chunks)
    assert 16 <= chunked.npartitions <= 64


def test_the_scenarios_are_painted(scenarios, tmp_path):
    Scenarios().paint(Scenarios().define(*scenarios), tmp_path / "map.png")
    assert_is_a_picture(tmp_path / "map.png")


def test_the_ensemble_is_painted(fields, tmp_path):
    Ensemble(0.05).paint(Ensemble(0.05).define(*fields), tmp_path / "map.png")
    assert_is_a_picture(tmp_path / "map.png")
