"""Formats numbers with their units for display. Recorded files keep plain numbers."""

from collections.abc import Sequence


def show_bytes(count: float) -> str:
    """Formats a number of bytes in binary units: 1 KiB is 1024 B.

    >>> show_bytes(1536), show_bytes(3 * 2**30)
    ('1.50 KiB', '3.00 GiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"


def show_count(count: float, unit: str = "") -> str:
    """Formats a number with a decimal prefix.

    >>> show_count(804096), show_count(9.1e10, "FLOP/s")
    ('804.1k', '91.0 GFLOP/s')
    """
    space = " " if unit else ""
    for prefix in ("", "k", "M", "G", "T", "P", "E"):
        if abs(count) < 1000:
            number = f"{count:.0f}" if prefix == "" and float(count).is_integer() else f"{count:.1f}"
            return f"{number}{space}{prefix}{unit}"
        count /= 1000
    return f"{count:.1f}{space}Z{unit}"


def show_seconds(seconds: float) -> str:
    """Formats a duration in milliseconds, seconds, minutes or hours.

    >>> show_seconds(0.0123), show_seconds(75), show_seconds(7265)
    ('12.3 ms', '1m 15s', '2h 01m')
    """
    if seconds < 1:
        return f"{seconds * 1e3:.1f} ms"
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m {rest:02d}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02d}m"


def show_quantity(name: str, value: float) -> str:
    """Formats a value in the unit that its name ends with: `_bytes`, `_s`, `_j` or `_flops`.

    If the name has no such ending, formats a plain number.

    >>> show_quantity("peak_bytes", 2**20), show_quantity("executed_flops", 2e9), show_quantity("parameters", 804096)
    ('1.00 MiB', '2.0 GFLOP', '804,096')
    """
    if name.endswith("_bytes"):
        return show_bytes(value)
    if name.endswith("_s"):
        return show_seconds(value)
    if name.endswith("_j"):
        return show_count(value, "J")
    if name.endswith("_flops"):
        return show_count(value, "FLOP")
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.4g}"


def show_names(names: Sequence[str], most: int = 8) -> str:
    """Joins the first `most` names, followed by the number of names that are left out.

    >>> show_names(["a", "b", "c"], most=2)
    'a, b and 1 more'
    """
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
