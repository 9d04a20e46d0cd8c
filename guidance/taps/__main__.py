"""List the taps of a model: ``python -m guidance.taps MODEL``."""

from guidance.taps.table import main

if __name__ == "__main__":
    main()
