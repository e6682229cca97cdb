"""A worker process of :mod:`megalm.data.shards.workers`: ``python -m megalm.data.shards.worker_main``.

Its first line of standard input says what is to be done with every piece, each further line names a piece; it answers
with lines on standard output. It ends when its input does, even in the middle of a piece, so that it never outlives
the process that started it.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any, NoReturn

from megalm.data.cleaning.cleaner import Cleaning
from megalm.data.reading.inputs import InputFile
from megalm.data.reading.units import Unit
from megalm.data.shards.making import make_shard
from megalm.data.shards.shard import Job, Work
from megalm.data.shards.workers import worker_tokenizer
from megalm.errors import MegalmError


def main() -> NoReturn:
    """Serve until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no answer
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(lines,), daemon=True).start()

    def answer(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    setup = json.loads(lines.get())
    try:
        tokenizer = worker_tokenizer(*setup["tokenizer"])
        settings = setup["work"]
        cleaning = Cleaning.model_validate_json(json.dumps(settings.pop("cleaning")))
        work = Work(**settings, cleaning=cleaning)
        while True:
            message = json.loads(lines.get())
            file = message["file"]
            file["path"] = Path(os.fsdecode(bytes.fromhex(file["path"])))
            unit = None if message["unit"] is None else Unit(**message["unit"])
            out = Path(os.fsdecode(bytes.fromhex(message["out"])))
            make_shard(Job(InputFile(**file), unit), work, tokenizer, out, lambda count: answer({"read": count}))
            answer({"done": True})
    except MegalmError as error:
        answer({"error": type(error).__name__, "message": str(error)})
    except OSError as error:
        answer({"error": "OSError", "message": f"{error.filename or ''}: {error.strerror or error}"})
    except Exception as error:  # of a plugin's tokenizer, say
        traceback.print_exc()
        answer({"error": "MegalmError", "message": f"{type(error).__name__} in a worker of prepare: {error}"})
    answers.flush()
    os._exit(1)  # the thread that listens holds standard input


def _listen(lines: queue.SimpleQueue[str]) -> None:
    for line in sys.stdin:
        lines.put(line)
    os._exit(0)


if __name__ == "__main__":
    main()
