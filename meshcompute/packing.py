"""Packing the bytes of values that cross between sites: which codec, and whether it pays.

Covers the decision and the codec, over bytes and numbers alone. Does not cover who sends what to whom
(:mod:`meshcompute.packedtransfers` on workers, :mod:`meshcompute.scheduler.packing` on the scheduler).

What is packed are the frames into which Dask has serialised a value, not the value: so arrays, masked arrays, tables
and whatever else comes out bit by bit as it would without packing. Each frame knows the width of its elements, and
Blosc sorts their bytes or bits by significance before it packs them, which is what makes smooth fields small.

The module travels to schedulers and workers by value: it imports the standard library, dask and distributed only, and
numcodecs, which zarr brings, where it is first needed.

Notes
-----
Three ways were weighed. *Tasks that pack and unpack*, put around crossings by the plan, are explicit in the graph, but
cost two tasks per crossing, and miss results, unplanned crossings and copies. *A codec in Dask's own registry*,
switched on per connection, covers every message, but Dask samples without regard to elements, knows no link, and gives
up above 0.7 of the size. So: *what a worker sends on request is packed by us*, in the frames' own format, where the
asking side has said, as it connected, that it is at another site and can unpack.

One level of the reference's predictions, 4.69 MiB of float32 rounded to one decimal, on one core
(scripts/benchmarks/packing.py): 2.2 MiB by zstd at 600 MB/s, 2.6 MiB by lz4 at 2000 MB/s. Bytes sorted beat bits sorted
there; for the mean of the members, and for differences, it is the other way round: a sample of the value decides.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from math import inf, log2
from time import perf_counter
from typing import Any, NamedTuple

from distributed.protocol.utils import host_array
from distributed.utils import ensure_memoryview

__all__ = [
    "AUTO",
    "CODECS",
    "MIN_NBYTES",
    "MODES",
    "OFF",
    "WIRE_NAME",
    "Chooser",
    "Given",
    "Links",
    "Transfer",
    "Trial",
    "choose",
    "codecs_here",
    "is_worth_a_sample",
    "mode_of",
    "pack",
    "sample_of",
    "try_codecs",
    "unpack",
]

AUTO, OFF = "auto", "off"
#: A link's rate as the setting ``meshcompute.links`` has it: from, to (names of pools, or ``"*"``), bytes per second.
Given = tuple[str, str, float]
ANY = "*"
#: Those of Blosc that are worth a trial: one that packs well, one that is fast.
CODECS = ("zstd", "lz4")
#: What the setting ``meshcompute.compression`` may be; a codec's name: that one, however fast the link.
MODES = (AUTO, OFF, *CODECS)
#: Under this name frames say how they were packed. Blosc's own header has the rest.
WIRE_NAME = "meshcompute-blosc"
MIN_NBYTES = 32 * 1024  # two round trips of a fresh TCP connection: packing cannot save one of them
MIN_SAVED = 0.1  # of the bytes, and of the time: less is within the error of a sample
_SAME = 0.1  # of the time: codecs that differ by less are as quick, and the one that sends less leaves room for others
_OWN_TRIAL_NBYTES = 1024 * 1024  # below, a trial costs as much as packing
_LEVEL = 1  # higher ones halve the speed for a few percent
_SHUFFLES = (1, 2)  # by bytes, by bits
_SAMPLES, _SAMPLE_NBYTES = 4, 16 * 1024
_ROUNDS = 2  # the first pays for memory and tables that a codec sets up, zstd's most: on 64 kB that may be all one sees
_FORMATS = {2: "H", 4: "I", 8: "Q"}  # by bytes of an element; only the width counts
_BLOSC_NBYTES = slice(4, 8)  # of a packed frame: its size unpacked, little-endian (Blosc 1, README_HEADER)

# A link that nobody has measured is taken for as fast as a fresh TCP connection can be, however fast the link is: 10
# segments at first, then twice as many each round trip (RFC 6928, RFC 5681). 5 MB at 20 ms: 8.4 round trips, 30 MB/s.
_FIRST_WINDOW_NBYTES = 14_600
_UNMEASURED_BYTES_PER_SECOND = 100e6  # and never faster than what distributed takes any connection to have
_FAR_SECONDS = 0.001  # round trip: a shorter one is a machine or a room, and fast until measured
_MEASURED_FROM_NBYTES = 256 * 1024  # less tells of round trips, not of bandwidth
_MEASUREMENTS = 8  # the fastest of so many decides
_FRESH_SECONDS = 60.0  # what is older says nothing: links and machines change
_WORTH_A_SAMPLE_SECONDS = 0.005  # a sample costs 1-2 ms


class Trial(NamedTuple):
    """How one codec did on a sample.

    Attributes
    ----------
    codec
        Name, one of :data:`CODECS`.
    shuffle
        Blosc's number: 0 none, 1 bytes, 2 bits.
    itemsize
        Bytes per element that were sorted.
    ratio
        Packed size over plain size.
    seconds_per_byte
        CPU seconds to pack and unpack one plain byte.
    """

    codec: str
    shuffle: int
    itemsize: int
    ratio: float
    seconds_per_byte: float


class Transfer(NamedTuple):
    """One answer of a worker.

    Attributes
    ----------
    plain_nbytes
        Size of the values.
    written_nbytes
        Bytes written.
    packing_seconds
        Spent on packing; 0 for a plain one.
    sending_seconds
        From writing the first byte to the receiver's word that it has the last, less one round trip.
    """

    plain_nbytes: int
    written_nbytes: int
    packing_seconds: float
    sending_seconds: float


def mode_of(value: Any) -> str:
    """Read the setting ``meshcompute.compression``.

    Parameters
    ----------
    value
        Its value; YAML reads off as False.

    Returns
    -------
    str
        One of :data:`MODES`.

    Raises
    ------
    ValueError
        It is something else.
    """
    name = {True: AUTO, False: OFF, None: OFF}.get(value, value) if isinstance(value, bool | None) else value
    if name not in MODES:
        raise ValueError(f"The setting meshcompute.compression is {value!r}: set it to one of {', '.join(MODES)}.")
    return str(name)


class Links:
    """How fast the links from one worker have been in the last minute.

    Parameters
    ----------
    pools
        Where the worker is.
    given
        What was said of links, for those that have not been measured: see :data:`Given`.
    """

    def __init__(self, pools: Iterable[str] = (), given: Iterable[Given] = ()) -> None:
        here = {ANY, *pools}
        # What was said last counts first.
        self._given = [(to, rate) for source, to, rate in reversed(tuple(given)) if source in here]
        # Of recent transfers: when, bytes written and plain bytes per second; of those that were packed, and not.
        self._transfers: dict[tuple[str, bool], deque[tuple[float, float, float]]] = {}

    def note(self, link: str, transfer: Transfer, now_seconds: float) -> None:
        """Learn from a transfer.

        Parameters
        ----------
        link
            Where it went.
        transfer
            What it was; small ones tell of round trips, and are left out.
        now_seconds
            The time, by any clock that does not jump.
        """
        if transfer.plain_nbytes < _MEASURED_FROM_NBYTES or transfer.sending_seconds <= 0:
            return
        # What a trial has left plain was sent plain.
        is_packed = transfer.packing_seconds > 0 and transfer.written_nbytes <= (1 - MIN_SAVED) * transfer.plain_nbytes
        known = self._transfers.setdefault((link, is_packed), deque(maxlen=_MEASUREMENTS))
        written = transfer.written_nbytes / transfer.sending_seconds
        plain = transfer.plain_nbytes / (transfer.packing_seconds + transfer.sending_seconds)
        known.append((now_seconds, written, plain))

    def _recent(self, link: str, is_packed: bool, now_seconds: float) -> list[tuple[float, float, float]]:
        known = self._transfers.get((link, is_packed), ())
        return [entry for entry in known if entry[0] >= now_seconds - _FRESH_SECONDS]

    def bytes_per_second(
        self, link: str, round_trip_seconds: float | None, now_seconds: float, nbytes: float = _MEASURED_FROM_NBYTES
    ) -> float:
        """Say how fast a link may be.

        Parameters
        ----------
        link
            Where a value is to go.
        round_trip_seconds
            The connection's shortest; None if unknown.
        now_seconds
            The time, by the clock of :meth:`note`.
        nbytes
            Size of the values.

        Returns
        -------
        float
            The fastest recent transfer. Without any, what was given, or else what a fresh connection can do, or no
            limit where both ends seem to be in one place: there the first value goes plain, and is measured. No limit,
            too, where values that went plain were there sooner than packed ones: on a machine that is short of CPU no
            forecast holds.
        """
        plain, packed = (self._recent(link, is_packed, now_seconds) for is_packed in (False, True))
        if plain and packed and max(entry[2] for entry in plain) > max(entry[2] for entry in packed):
            return inf
        if plain or packed:
            return max(entry[1] for entry in (*plain, *packed))
        there = {ANY, *link.split("+")}
        given = next((rate for to, rate in self._given if to in there), None)
        if round_trip_seconds is None or round_trip_seconds < _FAR_SECONDS:
            return given or inf
        fresh = nbytes / (round_trip_seconds * log2(1 + nbytes / _FIRST_WINDOW_NBYTES))
        return min(fresh, given or _UNMEASURED_BYTES_PER_SECOND)


def is_worth_a_sample(nbytes: int, bytes_per_second: float) -> bool:
    """Tell whether values take so long to send that a trial can pay.

    Parameters
    ----------
    nbytes
        Size of all values of a message.
    bytes_per_second
        Speed of the link.
    """
    return nbytes >= MIN_NBYTES and nbytes >= bytes_per_second * _WORTH_A_SAMPLE_SECONDS


def choose(trials: Iterable[Trial], bytes_per_second: float) -> Trial | None:
    """Choose what gets a value across soonest.

    Parameters
    ----------
    trials
        What is possible.
    bytes_per_second
        Speed of the link.

    Returns
    -------
    Trial or None
        None: plain, because packing would not save a tenth of the time, or of the bytes. Of codecs that are as quick,
        the one that sends less.
    """

    def share(trial: Trial) -> float:  # of the time that the plain bytes take
        return trial.ratio + trial.seconds_per_byte * bytes_per_second

    paying = [trial for trial in trials if trial.ratio <= 1 - MIN_SAVED and share(trial) <= 1 - MIN_SAVED]
    least = min(map(share, paying), default=0.0)
    as_quick = [trial for trial in paying if share(trial) <= (1 + _SAME) * least]
    return min(as_quick, key=lambda trial: (trial.ratio, share(trial)), default=None)


def codecs_here() -> tuple[str, ...]:
    """Say which codecs this process has; imports numcodecs, which takes a fraction of a second.

    Returns
    -------
    tuple of str
        Some of :data:`CODECS`; none without numcodecs.
    """
    try:
        from numcodecs import blosc
    except ImportError:
        return ()
    present = blosc.list_compressors()
    return tuple(name for name in CODECS if name in present)


def sample_of(frame: memoryview) -> bytes:
    """Take a sample of a frame: a few pieces from all over it, whole elements.

    Parameters
    ----------
    frame
        Bytes.
    """
    if frame.nbytes <= _SAMPLES * _SAMPLE_NBYTES:
        return bytes(frame)
    step = (frame.nbytes - _SAMPLE_NBYTES) // (_SAMPLES - 1) // 64 * 64  # no element is wider than 8
    return b"".join(frame[i * step : i * step + _SAMPLE_NBYTES] for i in range(_SAMPLES))


def try_codecs(frame: Any, codecs: Sequence[str]) -> list[Trial]:
    """Try codecs on a sample of a frame.

    Parameters
    ----------
    frame
        What Dask made of a value: bytes, or a memoryview that knows its elements.
    codecs
        Names, of :data:`CODECS`.

    Returns
    -------
    list of Trial
        With the time as it passed here, so that a busy machine packs less.
    """
    sample = sample_of(ensure_memoryview(frame))
    trials = []
    for itemsize in _itemsizes(frame):
        for shuffle in _SHUFFLES if itemsize > 1 else (0,):
            for codec in codecs:
                seconds = inf
                for _ in range(_ROUNDS):
                    began = perf_counter()
                    packed = pack(sample, Trial(codec, shuffle, itemsize, 1.0, 0.0))
                    unpack(packed)
                    seconds = min(seconds, perf_counter() - began)
                    if len(packed) > (1 - MIN_SAVED) * len(sample):
                        break  # it will not be used, however fast
                trials.append(Trial(codec, shuffle, itemsize, len(packed) / len(sample), seconds / len(sample)))
    return trials


def _itemsizes(frame: Any) -> tuple[int, ...]:
    view = memoryview(frame)
    if view.itemsize > 1:
        return (min(view.itemsize, 8),)
    return (1, 8) if view.nbytes % 8 == 0 else (1,)  # tables hand out bytes that are columns of numbers


class Chooser:
    """Choose for the frames of one message; small frames are done as the last one like them.

    Parameters
    ----------
    codecs
        What both sides have.
    bytes_per_second
        Speed of the link; 0 for "as small as possible".
    """

    def __init__(self, codecs: Sequence[str], bytes_per_second: float) -> None:
        self._codecs = codecs
        self._bytes_per_second = bytes_per_second
        self._last: dict[int, Trial | None] = {}

    def choose(self, frame: Any) -> Trial | None:
        """Choose for a frame; None is plain.

        Parameters
        ----------
        frame
            What Dask made of a value.
        """
        view = memoryview(frame)
        if view.nbytes < MIN_NBYTES:
            return None
        if view.nbytes >= _OWN_TRIAL_NBYTES or view.itemsize not in self._last:
            self._last[view.itemsize] = choose(try_codecs(frame, self._codecs), self._bytes_per_second)
        return self._last[view.itemsize]


def pack(frame: Any, how: Trial) -> bytes:
    """Pack a frame.

    Parameters
    ----------
    frame
        What Dask made of a value.
    how
        Codec, shuffle and width.

    Returns
    -------
    bytes
        For :func:`unpack`.
    """
    from numcodecs import blosc

    plain = ensure_memoryview(frame)
    if how.itemsize in _FORMATS and plain.nbytes % how.itemsize == 0:
        plain = plain.cast(_FORMATS[how.itemsize])
    packed: bytes = blosc.compress(plain, how.codec.encode(), _LEVEL, how.shuffle)
    return packed


def unpack(frame: Any) -> memoryview:
    """Undo :func:`pack`.

    Parameters
    ----------
    frame
        What it made.

    Returns
    -------
    memoryview
        The bytes, in memory of their own that can be written, as Dask expects.
    """
    from numcodecs import blosc

    packed = ensure_memoryview(frame)
    plain: memoryview = host_array(int.from_bytes(packed[_BLOSC_NBYTES], "little"))
    blosc.decompress(packed, plain)
    return plain
