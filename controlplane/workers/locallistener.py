"""A preload of ``dask scheduler``: listen on 127.0.0.1, too, at the same port.

Covers the scheduler's second listener, for which the command line has no option. It runs inside the scheduler's
process and needs Dask only.
"""

from __future__ import annotations

from typing import Any

__all__ = ["dask_setup"]


async def dask_setup(scheduler: Any) -> None:
    """Open the second listener; Dask calls this when the scheduler listens already.

    Parameters
    ----------
    scheduler
        The :class:`distributed.Scheduler`.
    """
    scheme = scheduler.address.partition("://")[0]
    await scheduler.listen(
        f"{scheme}://127.0.0.1:{scheduler.port}",
        allow_offload=False,  # this and the next as for the scheduler's first listener
        handshake_overrides={"pickle-protocol": 4, "compression": None},
        **scheduler.security.get_listen_args("scheduler"),
    )
