"""What two ranks run, started by torchrun: the commands given as JSON, one after the other, in this one process.

Each rank writes what its commands said, and their exit statuses, to said-RANK.json in the folder.
"""

import json
import os
import sys
from pathlib import Path

from support.commands import run

if __name__ == "__main__":
    folder, commands = Path(sys.argv[1]), json.loads(sys.argv[2])
    said = []
    for module, arguments in commands:
        result = run(module, *arguments)
        said.append({"status": result.exit_code, "stdout": result.stdout, "stderr": result.stderr})
    (folder / f"said-{os.environ['RANK']}.json").write_text(json.dumps(said))
