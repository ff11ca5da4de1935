"""Data centres simulated on one Linux machine, to try the real thing and to test it.

Covers hosts, the WAN between them, the images that their engines know, and the command group ``meshcompute lab``. Does
not cover Dask, WireGuard or the control daemon: the lab only gives them a place to run.

::

    the machine                                            needs: root, overlayfs, TUN; meets: no packet of the lab
    └─ guardian (sh)                                       sweeps the cgroups that engines leave, whoever was killed
       └─ unshare ── namespaces of the lab: pid, mount, net
          └─ tini ── supervisor                            one process: WAN and control socket (abstract: no file)
             │          │ TUN      │ TUN       │ TUN
             │       ┌──┴───┐   ┌──┴───┐   ┌───┴────┐
             │       │uplink│   │uplink│   │ uplink │      10.8.0.0/24; rate, delay, loss, partition per ordered
             │       │  .3  │   │  .4  │   │   .2   │      pair of hosts; NAT per site; exact counters
             │       └──┬───┘   └──┬───┘   └───┬────┘
             ├─ unshare ┴ client   │           │           each host: pid, mount, net, uts, ipc namespaces; an
             ├─ unshare ────────── ┴ ecmwf     │           overlay of the machine's root (writes are lost with the
             └─ unshare ────────────────────── ┴ eumetsat  host), own /run, /data, /dev/shm, /var/lib/docker
                                                           tini ── sshd, dockerd, site daemon

    what ends what: process 1 of a pid namespace takes everything in it along, by the kernel's own hand. The guardian's
    death kills unshare (death signal), unshare's kills process 1 (--kill-child), and the supervisor's ends tini.

What a lab writes lies on a tmpfs that only the supervisor's mount namespace knows, so that nothing has to be deleted:
it is gone when the last process is. The image cache (:mod:`meshcompute.lab.images`) is the one thing that stays.
"""
