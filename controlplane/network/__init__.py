"""The data plane of a cluster at one site: a throw-away WireGuard IPv6 network.

Covers addresses and peers (:mod:`~controlplane.network.topology`, pure), the gateway that joins a site's workers to the
other sites (:mod:`~controlplane.network.gateway`), and the doors to ``wg`` and netlink. Does not cover Dask, workers or
leases: who wants a gateway says how long it may live.
"""
