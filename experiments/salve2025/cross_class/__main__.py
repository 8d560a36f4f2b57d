"""``python -m experiments.salve2025.cross_class``."""

import sys

from experiments.experiment import main
from experiments.salve2025.cross_class import EXPERIMENT

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
