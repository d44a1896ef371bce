"""`python -m hasten` is the command line, and so is the installed program. Ctrl-C ends it quietly from here on, while
the rest is still being imported too."""

import sys


def main() -> None:
    """See hasten.cli.main."""
    try:
        from hasten.cli import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
