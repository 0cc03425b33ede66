"""The server program: `python gserve/vllm_server.py --serve --model …` (see `--help`)."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Run by its path, this file would have its own folder searched for modules, where `schema` and `cli` lie.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

    from gserve_core.host.environment import ignore_notices

    ignore_notices()  # first: imports take a while

    from gserve_core.process.main import main

    main()
