"""Placement: which pool does what, decided over integers. Start with :mod:`~meshcompute.placement.placing`."""
