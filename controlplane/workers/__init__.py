"""What runs Dask's processes at a site, in containers or as plain processes, each with a deadline of its own.

Covers starting, observing, renewing and ending them (:mod:`.base` is the protocol, :mod:`.docker` and :mod:`.process`
implement it). Does not cover the network that they are attached to, nor who may have how many of them.
"""
