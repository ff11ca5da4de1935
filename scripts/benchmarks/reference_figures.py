"""Figures of ``reference.py``: what a row is, the table, the floor, what is checked, and the pictures (pure but these).

Covers everything that is said about measurements. Does not cover measuring.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MIB = 2**20
OUTER_HEADERS_NBYTES = 28  # IPv4 20 + UDP 8: what `wg show` leaves out
BAR_TIMES_FASTER = 100.0
BAR_WIRE_NBYTES = 8 * MIB
BAR_PAYLOAD_TIMES_FLOOR = 1.1
BAR_SECONDS_TIMES_FLOOR = 2.0
BAR_RECONCILED = 1e-3
BAR_PREDICTED = 0.1
# Of a small run: far from what is measured, so that a busy machine does not decide.
QUICK_TIMES_FASTER = 1.5
QUICK_TIMES_FEWER_NBYTES = 5.0
OURS = "7"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What one way took.

    Attributes
    ----------
    number, title
        Which way.
    seconds
        From opening the files to the painted picture, or to the error.
    error
        What it failed with.
    is_right
        Whether the field is that of plain numpy; None if there is none.
    reads, reads_away
        Times that a worker read a variable of a file, and how many of them were of a file that lies at another site.
    client_peak_nbytes, workers_peak_nbytes
        Peaks of resident memory: of the user's program, and of all workers together.
    sent
        By ``source>target``: nbytes, and of it udp_nbytes in udp_packets, by the lab's counters; wireguard_nbytes by
        WireGuard's.
    settled
        The same for each pair, at moments when nothing passed while all were read; unsure_nbytes passed all the same.
    payload, encoded
        By ``source>target``: bytes of values as ``measure_traffic()`` counts them, in memory and as sent.
    predicted, plan
        Bytes that ``explain()`` predicts, by ``source>target``, and all that it says.
    tasks
        The task stream.
    warnings
        Of the traffic's measurement.
    copied_seconds
        How much of the time is copying.
    note
        Anything else.
    """

    number: str
    title: str
    seconds: float
    error: str = ""
    is_right: bool | None = None
    reads: int = 0
    reads_away: int = 0
    client_peak_nbytes: int = 0
    workers_peak_nbytes: int = 0
    sent: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    settled: Sequence[Mapping[str, int]] = ()
    unsure_nbytes: int = 0
    payload: Mapping[str, int] | None = None
    encoded: Mapping[str, int] | None = None
    predicted: Mapping[str, int] | None = None
    plan: str = ""
    tasks: Sequence[Mapping[str, Any]] = ()
    warnings: Sequence[str] = ()
    copied_seconds: float | None = None
    note: str = ""

    def total(self, what: str = "nbytes") -> int:
        """Sum over all pairs of hosts."""
        return sum(counted[what] for counted in self.sent.values())

    @property
    def reconciled(self) -> float | None:
        """How far the lab's count of the data plane is from WireGuard's plus headers, as a share; None without one."""
        udp, packets, wireguard = self.data_plane
        said = wireguard + OUTER_HEADERS_NBYTES * packets
        return max(0, abs(udp - said) - self.unsure_nbytes) / said if wireguard else None

    @property
    def data_plane(self) -> tuple[int, int, int]:
        """Bytes and packets of the data plane by the lab's counters, and bytes by WireGuard's."""
        udp, packets, wireguard = (
            sum(counted[what] for counted in self.settled) for what in ("udp_nbytes", "udp_packets", "wireguard_nbytes")
        )
        return udp, packets, wireguard

    @property
    def result(self) -> str:
        """Whether it is right, in a word."""
        return "error" if self.error else {True: "right", False: "WRONG", None: "-"}[self.is_right]

    def __str__(self) -> str:
        told = f"({self.number}) {self.title}: {self.seconds:.1f} s, {self.total() / MIB:.2f} MiB, {self.result}"
        return f"{told}: {self.error}" if self.error else told


@dataclass(frozen=True, slots=True, kw_only=True)
class Floor:
    """What nobody can avoid.

    Attributes
    ----------
    payload_nbytes, packed_nbytes
        Fewest bytes of values that any placement of this graph sends, as they are in memory and packed.
    forward_factor, backward_factor
        Bytes on the wire per byte of payload, in its direction and against it (headers, acknowledgements), as measured
        with one large transfer between workers of the two sites.
    transfer_bits_per_second
        Payload per second in that transfer.
    read_seconds
        Reading and averaging at the site, with nothing sent, as measured on the same cluster.
    rate_bits_per_second, delay_seconds
        Of the WAN; the delay is one way.
    """

    payload_nbytes: int
    packed_nbytes: int
    forward_factor: float
    backward_factor: float
    transfer_bits_per_second: float
    read_seconds: float
    rate_bits_per_second: float
    delay_seconds: float

    @property
    def wire_nbytes(self) -> float:
        """The packed payload with headers and acknowledgements."""
        return self.packed_nbytes * (self.forward_factor + self.backward_factor)

    @property
    def seconds(self) -> float:
        """Read and average; one crossing; one crossing of the result."""
        crossing = self.packed_nbytes * self.forward_factor * 8 / self.rate_bits_per_second + 2 * self.delay_seconds
        return self.read_seconds + crossing


def render_table(rows: Sequence[Row]) -> str:
    """Render the rows."""
    ours = next((row.seconds for row in rows if row.number == OURS and not row.error), None)
    head: tuple[str, ...] = ("way", "", "result", "s", "x ours", "reads", "away", "client", "workers")
    head += ("on the wire", "control", "payload", "packed", "predicted")
    unit = ("", "", "", "", "", "", "", "peak MB", "peak MB", "MiB", "MiB", "MiB", "MiB", "MiB")
    lines: list[tuple[str, ...]] = [head, unit]
    for row in rows:
        control = row.total() - row.total("udp_nbytes") if row.reconciled is not None else row.total()
        lines.append(
            (
                row.number,
                row.title + (f" ({row.note})" if row.note else ""),
                row.result,
                f"{row.seconds:.1f}",
                f"{row.seconds / ours:.1f}" if ours else "-",
                str(row.reads),
                str(row.reads_away),
                f"{row.client_peak_nbytes / 1e6:.0f}",
                f"{row.workers_peak_nbytes / 1e6:.0f}",
                f"{row.total() / MIB:.2f}",
                f"{control / MIB:.2f}",
                _mib_of(row.payload),
                _mib_of(row.encoded),
                _mib_of(row.predicted),
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = [
        "  ".join(
            cell.ljust(w) if i < 3 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    text += [f"({row.number}) failed: {row.error}" for row in rows if row.error]
    return "\n".join(line.rstrip() for line in text)


def _mib_of(pairs: Mapping[str, int] | None) -> str:
    return "-" if pairs is None else f"{sum(pairs.values()) / MIB:.2f}"


def render_floor(floor: Floor, rows: Sequence[Row]) -> str:
    """Render the floor, and how far from it we are."""
    factors = f"x {floor.forward_factor:.3f} in its direction, x {floor.backward_factor:.3f} against it"
    lines = [
        f"\nfloor: {floor.payload_nbytes / MIB:.2f} MiB of payload (one operand to the other's site, and the result),",
        f"       {floor.packed_nbytes / MIB:.2f} MiB packed",
        f"       {floor.wire_nbytes / MIB:.2f} MiB on the wire ({factors}, as measured with one large transfer)",
        f"       {floor.read_seconds:.2f} s to read and average at the site",
        f"       {floor.seconds - floor.read_seconds:.2f} s to cross",
        f"       {floor.seconds:.2f} s in all",
    ]
    for row in rows:
        if row.number == OURS and row.payload and row.encoded:
            times = {
                "in payload": sum(row.payload.values()) / floor.payload_nbytes,
                "packed": sum(row.encoded.values()) / floor.packed_nbytes,
                "on the wire": row.total() / floor.wire_nbytes,
                "in time": row.seconds / floor.seconds,
            }
            lines.append(f"({OURS}) is the floor x " + ", ".join(f"{n:.2f} {what}" for what, n in times.items()))
    return "\n".join(lines)


def render_checks(rows: Sequence[Row]) -> str:
    """Render how the counts agree."""
    lines = ["", "data plane: the lab's counters = WireGuard's + 28 bytes per packet"]
    for row in rows:
        if row.reconciled is not None:
            udp, packets, wireguard = row.data_plane
            unsure = f", {row.unsure_nbytes} bytes passed while they were read" if row.unsure_nbytes else ""
            lines.append(f"({row.number}) {udp} = {wireguard} + 28 x {packets} but for {row.reconciled:.4%}{unsure}")
            lines += [f"    {text}" for text in row.warnings]
    for row in rows:
        if row.number == OURS:
            lines += ["", f"({OURS}) sent, bytes on the wire (of it data plane; payload; predicted)"]
            for pair, counted in row.sent.items():
                payload, predicted = ((pairs or {}).get(pair, 0) for pairs in (row.payload, row.predicted))
                lines.append(
                    f"    {pair.replace('>', ' -> '):<22}{counted['nbytes']:>12}"
                    f"  ({counted['udp_nbytes']}; {payload}; {predicted})"
                )
    return "\n".join(lines) if len(lines) > 2 else ""


def missed_bars(
    rows: Sequence[Row],
    floor: Floor | None,
    *,
    is_full: bool,
    held_to: Collection[str] = ("seconds", "bytes"),
) -> list[str]:
    """Say what is not as it must be: orders and bytes, and at full size also the times.

    Parameters
    ----------
    rows, floor
        What was measured.
    is_full
        Whether this is the reference's calculation at full size, for which the bars are.
    held_to
        In what ours must be ahead of ways that move the data: ``seconds``, ``bytes``.
    """
    missed = [f"({row.number}) is not right: {row.error or 'another field'}" for row in rows if not row.is_right]
    for row in rows:
        if row.number in {"4", "5", "6", "7", "8"} and row.reads_away:
            missed.append(f"({row.number}) read {row.reads_away} times away from the data")
        if row.number in {"1", "3"} and not row.reads_away:
            missed.append(f"({row.number}) is said to have read nothing away from the data")
        if row.reconciled is not None and row.reconciled > BAR_RECONCILED:
            missed.append(f"({row.number}) the lab's count and WireGuard's differ by {row.reconciled:.2%}")
        if row.payload and row.predicted:
            measured, predicted = sum(row.payload.values()), sum(row.predicted.values())
            if abs(measured - predicted) > BAR_PREDICTED * measured:
                missed.append(f"({row.number}) {predicted} bytes were predicted, and {measured} crossed")
    by_number = {row.number: row for row in rows}
    ours = by_number.get(OURS)
    if ours is None:
        return missed
    if floor is not None and ours.payload:
        missed += [
            f"{what} is {nbytes / least:.2f} x the floor, and the bar is {BAR_PAYLOAD_TIMES_FLOOR:g}"
            for what, nbytes, least in (
                ("payload", sum(ours.payload.values()), floor.payload_nbytes),
                ("packed payload", sum((ours.encoded or {}).values()), floor.packed_nbytes),
            )
            if nbytes > BAR_PAYLOAD_TIMES_FLOOR * least and (is_full or what == "payload")
        ]
    for number in ("1", "2", "3"):
        if number in by_number:
            missed += _missed_against(ours, by_number[number], held_to)
    if is_full:
        missed += _missed_at_full_size(ours, by_number, floor)
    return missed


def _missed_against(ours: Row, other: Row, held_to: Collection[str]) -> list[str]:
    missed = []
    if "seconds" in held_to and ours.seconds * QUICK_TIMES_FASTER > other.seconds:
        missed.append(f"({ours.number}) took {ours.seconds:.1f} s, and ({other.number}) {other.seconds:.1f} s")
    if "bytes" in held_to and ours.total() * QUICK_TIMES_FEWER_NBYTES > other.total():
        missed.append(f"({ours.number}) sent {ours.total()} bytes, and ({other.number}) {other.total()}")
    return missed


def _missed_at_full_size(ours: Row, by_number: Mapping[str, Row], floor: Floor | None) -> list[str]:
    missed = []
    rivals = [by_number[number].seconds for number in ("1", "2") if number in by_number and not by_number[number].error]
    if rivals and min(rivals) < BAR_TIMES_FASTER * ours.seconds:
        missed.append(f"{min(rivals) / ours.seconds:.0f} times faster, and the bar is {BAR_TIMES_FASTER:g}")
    if ours.total() > BAR_WIRE_NBYTES:
        missed.append(f"{ours.total() / MIB:.2f} MiB on the wire, and the bar is {BAR_WIRE_NBYTES / MIB:g}")
    if floor is not None and ours.seconds > BAR_SECONDS_TIMES_FLOOR * floor.seconds:
        missed.append(f"{ours.seconds / floor.seconds:.2f} x the floor in time, the bar is {BAR_SECONDS_TIMES_FLOOR:g}")
    return missed


# Pictures


def save_pictures(rows: Sequence[Row], floor: Floor | None, stem: Path, *, title: str) -> None:
    """Save bars of all ways, and traffic and task stream of ours, as ``<stem>-….png``."""
    import matplotlib as mpl

    mpl.use("Agg")
    _save_bars(rows, floor, Path(f"{stem}-ways.png"), title)
    for row in rows:
        if row.number == OURS and row.payload:
            _save_traffic(row, Path(f"{stem}-traffic.png"))
        if row.tasks:
            _save_stream(row, Path(f"{stem}-{row.number}-tasks.png"))


def _save_bars(rows: Sequence[Row], floor: Floor | None, path: Path, title: str) -> None:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 0.5 * len(rows) + 1.8), layout="constrained", sharey=True)
    names = [f"({row.number}) {row.title}" + (" [failed]" if row.error else "") for row in rows]
    colours = ["#009E73" if row.number in {"6", OURS, "8"} else "#8A8A8A" for row in rows]
    sides: list[tuple[Any, str, list[float], float | None]] = [
        (axes[0], "seconds to the picture", [row.seconds for row in rows], floor and floor.seconds),
        (
            axes[1],
            "MiB on the WAN, both directions",
            [row.total() / MIB for row in rows],
            floor and floor.wire_nbytes / MIB,
        ),
    ]
    for ax, label, values, least in sides:
        bars = ax.barh(names, values, color=colours)
        ax.bar_label(bars, [_three_digits(value) for value in values], padding=3, fontsize=9)
        ax.set_xscale("log")
        ax.set_xlim(min([*values, least or values[0]]) / 2, max(values) * 4)
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter("")
        ax.set_xlabel(label)
        if least:
            ax.axvline(least, color="#D55E00", linestyle="--", linewidth=1.2, label=f"floor {_three_digits(least)}")
            ax.legend(fontsize=8, loc="lower right")
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
    axes[0].invert_yaxis()
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=130)
    plt.close(figure)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Measured:
    bytes_between_pools: Mapping[tuple[str, str], int]
    pools: tuple[str, ...] = ()


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _save_traffic(row: Row, path: Path) -> None:
    from matplotlib import pyplot as plt

    from meshcompute.plots import plot_traffic

    pairs = {tuple(pair.split(">")): nbytes for pair, nbytes in (row.payload or {}).items()}
    pools = tuple(sorted({name for pair in pairs for name in pair} - {"client"}))
    axes = plot_traffic(_Measured(bytes_between_pools=pairs, pools=pools))
    axes.figure.savefig(path, dpi=130)
    plt.close(axes.figure)


def _save_stream(row: Row, path: Path) -> None:
    """Paint what the dashboard's task stream shows: per worker, when it computed what, and when it fetched (red)."""
    from distributed.diagnostics.progress_stream import color_of
    from distributed.utils import key_split
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    workers = sorted({task["worker"] for task in row.tasks}, reverse=True)
    first = min(step["start"] for task in row.tasks for step in task["startstops"])
    bars: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    legend: dict[str, str] = {}
    for task in row.tasks:
        for step in task["startstops"]:
            if step["action"] not in {"compute", "transfer"}:
                continue
            name = "transfer" if step["action"] == "transfer" else str(key_split(task["key"].strip("('")))
            legend[name] = "#D62728" if name == "transfer" else color_of(name)
            bars[task["worker"], name].append((step["start"] - first, max(step["stop"] - step["start"], 1e-3)))
    figure, ax = plt.subplots(figsize=(11, 0.36 * len(workers) + 1.8), layout="constrained")
    for (worker, name), spans in bars.items():
        y = workers.index(worker)
        ax.broken_barh(spans, (y - 0.42, 0.84), color=legend[name], edgecolor="white", linewidth=0.3)
    ax.set_yticks(range(len(workers)), workers)
    ax.set_xlabel("seconds")
    ax.set_title(f"Task stream of ({row.number}) {row.title}", loc="left", fontsize=11)
    handles = [Patch(color=colour, label=name[:40]) for name, colour in legend.items()]
    ax.legend(handles=handles, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=130)
    plt.close(figure)
