"""Fine-tune a model: the same as `slothcore train`, from a checkout and without installing it.

python scripts/train.py --config examples/ledger/train.yaml
python scripts/train.py --model NAME --data FILE --bits 4 --max-steps 100 --output-dir runs/first
python scripts/train.py --help
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from slothcore.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
