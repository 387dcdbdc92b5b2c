"""Makes the helpers beside the tests importable, whatever the folder is called elsewhere."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
