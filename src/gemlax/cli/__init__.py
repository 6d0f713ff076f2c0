"""The command line. Only this room prints.

`parser` says what the options are, `commands` runs them (`bench`, `chat` and `tune` their own),
`loading` makes a model of them, `output` writes.
"""

from gemlax.cli.commands import main

__all__ = ["main"]
