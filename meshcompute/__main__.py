"""``python -m meshcompute`` is the command ``meshcompute``."""

from meshcompute.cli import main

if __name__ == "__main__":
    main()
