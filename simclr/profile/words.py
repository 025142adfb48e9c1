"""Numbers of a profile for people."""


def percent(fraction: float | None) -> str:
    """A fraction as `38 %`; nothing for None."""
    return "" if fraction is None else f"{100 * fraction:.0f} %"


def ms(seconds: float) -> str:
    """Seconds as milliseconds."""
    return f"{1e3 * seconds:,.1f}" if seconds >= 0.01 else f"{1e3 * seconds:.2f}"


def gigabytes(count: int) -> str:
    """Bytes as `1.2 GB` or `66 MB`."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.0f} MB"


def rate(operations: float) -> str:
    """Operations a second as `99 GFLOP/s`."""
    return f"{operations / 1e12:.1f} TFLOP/s" if operations >= 1e12 else f"{operations / 1e9:.0f} GFLOP/s"
