# SPDX-License-Identifier: Apache-2.0
"""One rank of the doctor's process group: says how far it came, in lines of JSON, and its result.

It ends when its input does: whoever started it is gone then.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import Any, TextIO


def main() -> int:
    """Form the group, try it, say what came out; 0, or 1 with one line of why not."""
    threading.Thread(target=_end_with_input, daemon=True).start()
    # What libraries print goes with the errors: it could be taken for one of these words.
    words = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _say(words, stage="started")
    settings = json.loads(sys.argv[1])
    try:
        from flora_dist.cluster.doctor.trial import run

        _say(words, stage="torch loaded")
        result = run(settings, lambda stage: _say(words, stage=stage))
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        sys.stderr.write(f"\n{type(error).__name__}: {lines[0]}\n")
        sys.stderr.flush()
        # A group that has lost a process may wait for it in its destructor.
        os._exit(1)
    _say(words, stage="done", result=result)
    return 0


def _end_with_input() -> None:
    # Not sys.stdin: a thread that reads it holds up the interpreter's end.
    while os.read(0, 1):
        pass
    os._exit(1)


def _say(words: TextIO, **facts: Any) -> None:
    words.write(f"{json.dumps(facts)}\n")
    words.flush()


if __name__ == "__main__":
    sys.exit(main())
