"""``python -m megalm.cli``, which torchrun can start on every rank."""

from __future__ import annotations

from megalm.cli.app import main

if __name__ == "__main__":
    main()
