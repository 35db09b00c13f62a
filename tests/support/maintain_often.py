"""Script that runs `lakesight maintain` without and with `--remove` again and again, until the file STOP exists.

LAKESIGHT_HOME=HOME python maintain_often.py STOP

After each command, the script prints the command's report as one line of JSON.
"""

from __future__ import annotations

import sys
from pathlib import Path

from home_commands import OPTIONS

from jobs.cli import app

COMMANDS = (["maintain", "--json"], ["maintain", "--json", "--keep", "1", "--remove"])

if __name__ == "__main__":
    while not Path(sys.argv[1]).exists():
        for command in COMMANDS:
            app([*command, *OPTIONS], standalone_mode=False)
