"""Synthetic fields: their shape and smoothness; real ones: that they are found."""

import tracemalloc

import numpy as np
import pytest
import xarray as xr

from meshcompute import sampledata
from meshcompute.errors import MissingDependencyError

SCALE = 0.05


@pytest.fixture(scope="module")
def predictions(tmp_path_factory):
    path = tmp_path_factory.mktemp("fields") / "made" / "predictions.nc"
    sampledata.write_predictions(str(path), SCALE)
    with xr.open_dataset(path) as dataset:
        yield dataset


def test_the_full_scale_is_the_reference():
    assert sampledata.reference_shape(1) == (18, 33, 960, 1280)


@pytest.mark.parametrize("scale", [0, -1, 0.001, 5, float("nan")])
def test_a_scale_that_makes_no_grid_is_refused(scale):
    with pytest.raises(ValueError, match="scale must lie between"):
        sampledata.reference_shape(scale)


def test_predictions_have_the_variables_and_dimensions_of_the_reference(predictions):
    assert dict(predictions.sizes) == {"realization": 18, "height": 33, "latitude": 48, "longitude": 64, "bnds": 2}
    assert list(predictions.data_vars) == ["air_pressure", "latitude_longitude", "latitude_bnds", "longitude_bnds"]
    assert predictions.air_pressure.dtype == np.float32
    assert predictions.air_pressure.encoding["contiguous"]
    assert predictions.realization.values.tolist() == [0, *range(18, 35)]
    assert (float(predictions.height[0]), float(predictions.height[-1])) == (5, 6000)
    assert (np.diff(predictions.height) > 0).all()
    assert abs(float(predictions.latitude.mean())) < 1e-5
    assert float(predictions.longitude_bnds[0, 0]) == -180


def test_values_are_rounded_to_one_decimal(predictions):
    values = predictions.air_pressure.values.astype("f8")
    assert np.abs(values * 10 - np.round(values * 10)).max() < 0.05  # as well as float32 can


def test_fields_are_smooth_and_members_differ(predictions):
    field = predictions.air_pressure[3, 10].values.astype("f8")
    between_neighbours = np.abs(np.diff(field, axis=1)).mean()
    assert 0 < between_neighbours < 0.5 * field.std()  # of noise it would be 1.1
    assert float(np.abs(predictions.air_pressure[3, 10] - predictions.air_pressure[4, 10]).mean()) > 100


def test_pressure_falls_with_height_to_about_half_at_6_km(predictions):
    mean = predictions.air_pressure.mean(("realization", "latitude", "longitude")).values
    assert (np.diff(mean) < 0).all()
    assert 95_000 < mean[0] < 105_000
    assert 45_000 < mean[-1] < 52_000


def test_the_same_scale_makes_the_same_file(predictions, tmp_path):
    sampledata.write_predictions(str(tmp_path / "again.nc"), SCALE)
    with xr.open_dataset(tmp_path / "again.nc") as again:
        xr.testing.assert_identical(again, predictions)


def test_observations_lie_on_the_grid_of_the_predictions(predictions, tmp_path):
    nbytes = sampledata.write_observations(str(tmp_path / "ad-hoc" / "observations.nc"), SCALE)
    assert nbytes == (tmp_path / "ad-hoc" / "observations.nc").stat().st_size
    with xr.open_dataset(tmp_path / "ad-hoc" / "observations.nc") as observations:
        assert observations.air_pressure.dims == ("latitude", "longitude")
        xr.testing.assert_equal(observations.latitude, predictions.latitude)


def test_progress_is_reported_in_levels(tmp_path):
    reports = []
    sampledata.write_predictions(str(tmp_path / "p.nc"), SCALE, lambda *report: reports.append(report))
    assert reports == [(33 * member, 594) for member in range(1, 19)]


def test_memory_does_not_grow_with_the_file(tmp_path):
    tracemalloc.start()
    try:
        nbytes = sampledata.write_predictions(str(tmp_path / "p.nc"), 0.1)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < nbytes / 20


@pytest.mark.parametrize("scenario", ["A1B", "E1"])
def test_the_climate_scenarios_are_found_without_importing_their_package(scenario):
    with xr.open_dataset(sampledata.scenario_file(scenario)) as dataset:
        assert dataset.air_temperature.shape == (240, 37, 49)
        assert dataset.air_temperature.attrs["Model scenario"] == scenario


def test_without_the_package_of_the_scenarios_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(MissingDependencyError, match="pip install iris-sample-data"):
        sampledata.scenario_file("A1B")


def test_compressed_predictions_are_the_same_fields_in_chunks(tmp_path, predictions):
    path = tmp_path / "packed.nc"
    sampledata.write_predictions(str(path), SCALE, is_compressed=True)
    with xr.open_dataset(path) as dataset:
        assert dataset.air_pressure.encoding["zlib"]
        assert dataset.air_pressure.encoding["chunksizes"] == (1, 1, 10, 8)
        xr.testing.assert_identical(dataset.air_pressure, predictions.air_pressure)
