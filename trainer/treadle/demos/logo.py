"""What examples print when they begin."""

__all__ = ["cli_lightning_logo"]


def cli_lightning_logo() -> None:
    """Print the name of the library."""
    print("Treadle")
