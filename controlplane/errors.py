"""The errors of the control plane.

Our tree::

    SiteError                         kind "internal": the root; its kind is what a client is told
    ├── ConfigError                   site.toml cannot be used
    ├── StoreError                    the state folder cannot be read or written
    ├── ApplyError                    a step (interface, container, ...) failed; kept as a condition and tried again
    ├── RuntimeUnknownError           kind "engine_unknown": the engine does not answer, so nothing is known
    ├── BadRequestError               kind "bad_request": a request that cannot be read
    ├── InvalidSpecError              kind "invalid": a desired state that this site cannot have
    ├── ForbiddenError                kind "forbidden": a caller who may not use this site
    ├── NotFoundError                 kind "not_found": no such cluster (for this caller), worker or path
    ├── ConflictError                 kind "conflict": an old epoch, a deleted cluster, a prefix or id that is taken
    └── QuotaError                    kind "quota": more than the operator allows

Every message says what failed, with which value, and what to do next. The kinds and their HTTP status are in
:data:`meshcompute.protocol.STATUS_BY_ERROR_KIND`; the tree is the one place where a kind is chosen.
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "ApplyError",
    "BadRequestError",
    "ConfigError",
    "ConflictError",
    "ForbiddenError",
    "InvalidSpecError",
    "NotFoundError",
    "QuotaError",
    "RuntimeUnknownError",
    "SiteError",
    "StoreError",
]


class SiteError(Exception):
    """Root of everything that the control plane raises on purpose."""

    kind: ClassVar[str] = "internal"


class ConfigError(SiteError):
    """A ``site.toml`` that cannot be used.

    Parameters
    ----------
    source
        The file.
    key
        The full name of the key, such as ``limits.workers``, or ``""`` for the file as a whole.
    reason
        What is wrong with which value, and what would be right.
    """

    def __init__(self, source: str, key: str, reason: str) -> None:
        super().__init__(source, key, reason)
        self.source = source
        self.key = key
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.source}: {self.key}: {self.reason}" if self.key else f"{self.source}: {self.reason}"


class StoreError(SiteError):
    """The state folder cannot be read or written."""


class ApplyError(SiteError):
    """A step on the machine failed: it is recorded as a condition, and tried again later."""


class RuntimeUnknownError(SiteError):
    """The engine that runs workers does not answer: what runs is unknown, which is not the same as nothing."""

    kind = "engine_unknown"


class BadRequestError(SiteError):
    """A request that cannot be read."""

    kind = "bad_request"


class InvalidSpecError(SiteError):
    """A desired state that this site cannot have, whatever else it runs."""

    kind = "invalid"


class ForbiddenError(SiteError):
    """A caller who may not use this site."""

    kind = "forbidden"


class NotFoundError(SiteError):
    """No such cluster (for this caller), worker or path."""

    kind = "not_found"


class ConflictError(SiteError):
    """An old epoch, a deleted cluster, or a prefix or an id that is taken."""

    kind = "conflict"


class QuotaError(SiteError):
    """More than the operator of the site allows."""

    kind = "quota"
