"""Takes over the signals before anything slow is imported, so that Ctrl-C is an orderly end from the first moment on."""

import os
import signal
import sys
import tempfile

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, a signal to end, or a terminal that was closed."""

    def __init__(self, number: int) -> None:
        self.status = 128 + number


def _interrupt(number: int, _: object) -> None:
    raise Interrupted(number)


def main() -> int:
    # SIGINT too: whoever starts us in the background of a script has it ignored, and then Ctrl-C would leave things running.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    for number in SIGNALS:
        signal.signal(number, _interrupt)
    tempfile.gettempdir()  # It tries the folder with a file, which an interrupt in between would leave there.
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        import demo

        return demo.main(sys.argv[1:])
    except Interrupted as interrupted:
        print("==> interrupted; everything was stopped", flush=True)
        return interrupted.status
    except BrokenPipeError:
        # Nobody reads any more (`make demo | head`); everything was stopped.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())
