"""With this folder in PYTHONPATH and the stand-ins' in FASTATTN_REHEARSAL, every Python process has the GPUs of the rehearsal."""

import os
import traceback

if folder := os.environ.get("FASTATTN_REHEARSAL"):
    try:
        import cuda_rehearsal

        cuda_rehearsal.begin(folder)
    except BaseException:  # Python would go on without, and every test would be skipped
        traceback.print_exc()
        os._exit(1)
