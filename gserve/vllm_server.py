"""The server program: `python gserve/vllm_server.py --serve --model …` (see `--help`)."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Python puts this file's folder on the search path, where `schema` and `cli` would be found. Use its parent.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

    from gserve_core.host.environment import ignore_notices

    ignore_notices()  # before the other imports, which are slow

    from gserve_core.process.main import main

    main()
