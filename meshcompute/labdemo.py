"""``meshcompute demo --lab``: the demo in data centres that are simulated on this machine.

Covers what the demo needs of a lab: each site's file at the site, a cluster that is booted from the client's host as a
person would, and the picture brought out. Does not cover the demo's steps (:mod:`meshcompute.demo`) nor the lab
(:mod:`meshcompute.lab`).
"""

from __future__ import annotations

import os
import shutil
import sys

from meshcompute.demo import Demo
from meshcompute.lab.cli import run_in_lab
from meshcompute.lab.starting import check_machine, find_accounts
from meshcompute.lab.topology import ACCOUNTS, Lab, default_hosts
from meshcompute.scratch import ScratchFolder

__all__ = ["run_demo_in_lab"]

PERSON = ACCOUNTS[0]


def run_demo_in_lab(demo: Demo, *, rate: float | None, delay: float, image: str | None) -> int:
    """Start a lab with the demo's data at its sites, boot a cluster there, run the demo on it, and end everything.

    Parameters
    ----------
    demo
        What to show.
    rate
        What each link of the lab carries, in Mbit/s; None is no limit.
    delay
        Of each link one way, in milliseconds.
    image
        Archive with the image of the workers; None builds it where it is missing.

    Returns
    -------
    int
        The demo's exit code.

    Raises
    ------
    LabMissingError
        This machine cannot have a lab; root, for example, is missing.
    """
    demo.check_output()
    check_machine(Lab(name="demo", accounts=find_accounts(), engine=True))
    with ScratchFolder("meshcompute-lab-") as private:
        sites = [host for host in default_hosts() if host.is_site]
        stores = {host.name: private.path / host.name for host in sites}
        shared = private.path / "shared"
        for folder in (*stores.values(), shared):
            folder.mkdir()
        shared.chmod(0o777)  # the person of the lab is none of this machine
        demo.say("the data of each site")
        demo.write_files(stores)
        picture = shared / demo.output.name
        here = [sys.executable, "-m", "meshcompute"]
        boot = [*here, "up", *(f"{PERSON}@{host.address}" for host in sites), "--processes", str(demo.workers_per_site)]
        show = [*here, "demo", "--data", "/data", "--output", str(picture)]
        show += ["--reference", "--scale", repr(demo.scale)] if demo.reference else []
        show += ["--keep"] if demo.keep else []
        code = run_in_lab(
            [*boot, "--", *show],
            user=PERSON,
            name=f"demo-{os.getpid()}",
            rate=rate,
            delay=delay,
            data=[f"{site}={store}" for site, store in stores.items()],
            engine=True,
            image=image,
            share=str(shared),
        )
        if picture.exists():
            shutil.copyfile(picture, demo.output)
            demo.say(f"the picture is out of the lab: {demo.output}")
    return code
