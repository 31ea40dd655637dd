"""python -m cuda_rehearsal FOLDER: compile the stand-ins into it."""

import sys
from pathlib import Path

import cuda_rehearsal

cuda_rehearsal.build(Path(sys.argv[1]))
