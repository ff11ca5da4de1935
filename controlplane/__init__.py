"""What a site operator runs: the control daemon of one data centre.

Covers nothing yet: the daemon comes with the mesh (WireGuard data plane, worker containers).
Does not cover what a scientist imports; that is :mod:`meshcompute`, which never imports this package.
"""
