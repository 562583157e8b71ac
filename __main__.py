"""The program, from its first moment: what it imports takes a tenth of a second, in which Ctrl-C may come, too."""

from __future__ import annotations

import signal


def main() -> None:
    """Entry point of the console script, and of `python -m adapterctl`."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:
        # die of it without a word; an exception would come out of the middle of a module that is being read
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from .cli.main import main as run  # deferred: see above

    signal.signal(signal.SIGINT, handler)
    run()


if __name__ == "__main__":
    main()
