"""What runs in a worker process: questions in, answers out, memory and time limited.

It imports nothing of gemlax except the module that answers.
"""

import importlib
import json
import resource
import signal
import sys

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
    """Answer until standard input ends. Arguments: bytes of memory, seconds, the module."""
    memory, seconds = int(sys.argv[1]), float(sys.argv[2])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    answer = importlib.import_module(sys.argv[3]).answer
    write({})
    for line in sys.stdin:
        limit_time(seconds)
        try:
            write(answer(json.loads(line)))
        except MemoryError:
            write({"error": "it needs too much memory"})


if __name__ == "__main__":
    main()
