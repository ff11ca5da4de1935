"""The errors of the lab.

Our tree::

    MeshError
    └── LabError (also RuntimeError)   something about the lab cannot be had
        ├── LabMissingError            this machine lacks what a lab needs
        ├── LabStateError              the lab is already up, or is not up
        └── LabStartError              a part of the lab did not start; carries the end of its log
"""

from __future__ import annotations

from meshcompute.errors import MeshError

__all__ = ["LabError", "LabMissingError", "LabStartError", "LabStateError"]


class LabError(MeshError, RuntimeError):
    """Something about the lab cannot be had."""


class LabMissingError(LabError):
    """This machine lacks what a lab needs."""


class LabStateError(LabError):
    """The lab is up and should not be, or the other way round."""


class LabStartError(LabError):
    """A part of the lab did not start.

    Parameters
    ----------
    part
        What did not start, e.g. ``host ecmwf``.
    reason
        What happened.
    log
        The last lines that it wrote.
    """

    def __init__(self, part: str, reason: str, log: str = "") -> None:
        super().__init__(part, reason, log)
        self.part = part
        self.reason = reason
        self.log = log

    def __str__(self) -> str:
        end = f" The end of its log:\n{self.log}" if self.log else ""
        return f"The lab did not start: {self.part} {self.reason}.{end}"
