"""``python -m controlplane`` is ``meshcompute-site``."""

from controlplane.cli import main

main()
