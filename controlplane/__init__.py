"""What a site operator runs: the control daemon of one data centre.

Covers the daemon (:mod:`.daemon` puts it together), the operator's command (:mod:`.cli`), the data plane
(:mod:`.network`) and the workers (:mod:`.workers`). What stands higher may use what stands lower::

    cli
    daemon, check
    api                            findings        HTTP; the judgement of a host
    site                           openapi, metrics
    loop, status                                   acts; tells
    reconcile, workqueue                           decides what to do next
    desired, admission                             decides what should be, and for whom
    state                                          remembers
    network, workers, identity, leases             gateways; units; callers; time limits
    command, clock, talk                           doors: programs, time, the daemon's own socket
    config
    errors

Does not cover what a scientist imports; that is :mod:`meshcompute`, which never imports this package.
"""
