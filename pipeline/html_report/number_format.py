"""Numbers as a person reads them: few digits, thin spaces between thousands, units in words."""

from __future__ import annotations

import math
import time

_THIN_SPACE = "\u202f"


def number(value: float | None, digits: int = 3, *, is_exact: bool = False) -> str:
    """Significant digits without exponents where that is short: 0.716, 131, 18 400, 5.5e-9.

    Args:
        value: None gives a dash.
        digits: how many.
        is_exact: leave out zeros at the end, as for a tick of an axis.
    """
    if value is None:
        return "\u2013"
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size == 0 or (float(value).is_integer() and size < 1e15):
        return grouped(value)
    if size < 1e-3 or size >= 1e15:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        if "." in mantissa:
            mantissa = mantissa.rstrip("0").rstrip(".")
        return f"{mantissa}e{int(exponent)}".replace("-", "\u2212")
    decimals = max(0, digits - 1 - math.floor(math.log10(size)))
    text = grouped(value, decimals)
    return text.rstrip("0").rstrip(".") if is_exact and "." in text else text


def grouped(value: float, decimals: int = 0) -> str:
    """With thin spaces between thousands."""
    text = f"{value:,.{decimals}f}"
    if len(text.split(".")[0].lstrip("-")) <= 5:  # 1 234 reads worse than 1234
        text = text.replace(",", "")
    return text.replace(",", _THIN_SPACE).replace("-", "\u2212")


def counted(count: int, noun: str) -> str:
    """A number of things: 1 step, 2 steps, 3 crashes."""
    plural = noun if count == 1 else f"{noun}es" if noun.endswith("sh") else f"{noun}s"
    return f"{grouped(count)} {plural}"


def percent(share: float | None) -> str:
    """A share in [0, 1] as per cent."""
    if share is None or not math.isfinite(share):
        return number(share)
    value = 100 * share
    return f"{value:.0f} %" if value >= 10 or value == 0 else f"{number(value, 2)} %"


def duration(seconds: float | None) -> str:
    """The two largest units: 81 s, 12 min 5 s, 3 h 20 min, 2 d 4 h."""
    if seconds is None or not math.isfinite(seconds):
        return "\u2013"
    if seconds < 99.5:
        return f"{number(seconds, 2)} s" if seconds < 9.95 else f"{seconds:.0f} s"
    whole = round(seconds)
    for size, unit, small, small_unit in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if whole >= size:
            rest = whole % size // small
            return f"{whole // size} {unit}" + (f" {rest} {small_unit}" if rest else "")
    return f"{whole} s"


def moment(seconds: float | None, *, with_seconds: bool = True) -> str:
    """A time since 1970 as UTC."""
    if seconds is None:
        return "\u2013"
    try:
        return time.strftime(
            f"%Y-%m-%d %H:%M{':%S' if with_seconds else ''} UTC", time.gmtime(seconds)
        )
    except (OverflowError, ValueError, OSError):
        return "\u2013"


def file_size(num_bytes: float) -> str:
    """MiB and the like."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024 or unit == "GiB":
            return f"{number(num_bytes, 3)} {unit}"
        num_bytes /= 1024
    raise AssertionError("the last unit takes everything")
