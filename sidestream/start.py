"""What the installed ``sidestream`` command runs: Ctrl-C first, the rest takes half a second to import."""

from sidestream.host.signals import heed_interrupts


def main() -> int:
    """Run the command line; return its exit code."""
    heed_interrupts()
    from sidestream.cli import main as run

    return run()
