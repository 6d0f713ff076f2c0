"""The process that renders a checkpoint's template, which template.py starts and may kill.

One JSON object comes per line on standard input, one goes out per line. A template is code of a
stranger: the sandbox (render.py) keeps it from Python's inside, and the operating system limits
memory and processor time.
"""

import json
import resource
import signal
import sys

from gemlax.chat.render import answer

__all__ = ["main"]


def limit_time(seconds: float) -> None:
    """End this process when it computes for longer, even if the parent is gone."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    until = int(used.ru_utime + used.ru_stime + seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (until, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def write(reply: dict[str, object]) -> None:
    """Write one line."""
    sys.stdout.write(json.dumps(reply) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Answer requests until standard input ends. Arguments: bytes of memory, seconds."""
    memory, seconds = int(sys.argv[1]), float(sys.argv[2])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    write({})
    for line in sys.stdin:
        limit_time(seconds)
        try:
            write(answer(json.loads(line)))
        except MemoryError:
            write({"error": "it needs too much memory"})


if __name__ == "__main__":
    main()
