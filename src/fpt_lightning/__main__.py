"""``python -m fpt_lightning``."""

from fpt_lightning.cli import main

if __name__ == "__main__":
    main()
