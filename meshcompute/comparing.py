"""Predicted against measured: a plan beside the traffic of the run that it was made for.

Covers the table of both, per ordered pair of pools. Does not cover how either comes about
(:mod:`meshcompute.explaining`, :mod:`meshcompute.traffic`).
"""

from __future__ import annotations

import html
from collections.abc import Mapping

from dask.utils import format_bytes

__all__ = ["Comparison"]


class Comparison:
    """Bytes between pools as they were predicted and as they were measured.

    Parameters
    ----------
    predicted, measured
        Bytes by (source, destination).

    Attributes
    ----------
    rows : tuple of (str, str, int, int)
        Source, destination, predicted and measured bytes, sorted by the pair. Pairs of one side only have 0 at the
        other.
    """

    def __init__(self, predicted: Mapping[tuple[str, str], int], measured: Mapping[tuple[str, str], int]) -> None:
        self.rows = tuple(
            (source, destination, predicted.get((source, destination), 0), measured.get((source, destination), 0))
            for source, destination in sorted({*predicted, *measured})
        )

    @property
    def ratio(self) -> float:
        """Measured over predicted bytes, all pairs together; infinite if nothing was predicted, 1 if nothing at all."""
        predicted, measured = sum(row[2] for row in self.rows), sum(row[3] for row in self.rows)
        if not predicted:
            return float("inf") if measured else 1.0
        return measured / predicted

    def _cells(self) -> list[tuple[str, str, str, str]]:
        cells = [
            (f"{a} -> {b}", format_bytes(predicted), format_bytes(measured), _ratio_text(predicted, measured))
            for a, b, predicted, measured in self.rows
        ]
        if len(cells) > 1:
            predicted, measured = sum(row[2] for row in self.rows), sum(row[3] for row in self.rows)
            total = format_bytes(predicted), format_bytes(measured), _ratio_text(predicted, measured)
            cells.append(("total", *total))
        return cells

    def __str__(self) -> str:
        if not self.rows:
            return "Nothing was predicted to cross between pools, and nothing did."
        lines = [f"{'from -> to':<34}{'predicted':>14}{'measured':>14}{'ratio':>8}"]
        lines += [
            f"{pair:<34}{predicted:>14}{measured:>14}{ratio:>8}" for pair, predicted, measured, ratio in self._cells()
        ]
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        if not self.rows:
            return f"<p>{self}</p>"
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in self._cells()
        )
        head = "<tr><th>from &rarr; to</th><th>predicted</th><th>measured</th><th>ratio</th></tr>"
        return f"<table><thead>{head}</thead><tbody>{body}</tbody></table>"


def _ratio_text(predicted: float, measured: float) -> str:
    return f"{measured / predicted:.2f}" if predicted else "-"
