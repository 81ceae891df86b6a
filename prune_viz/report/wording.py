"""How figures and names from a model are written for people: units, rounding, nothing unprintable."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from datetime import datetime

from prune_viz.runs.damage import RAISED, Damage, Unit

NARROW = "\u202f"  # narrow no-break space, between a figure and its unit
_DASH = "\u2013"
_MINUS = "\u2212"
_TIMES = " \u00d7 "
_LONGEST = 160  # characters of a name where it is not the matter itself


def printable(text: str) -> str:
    """Return `text` with control, bidi and other invisible characters as backslash escapes.

    Escaping for HTML is left to the template; this keeps a name from reordering, hiding, breaking or
    marking the text around it.
    """
    if unicodedata.category(text[:1] or " ")[0] == "M":  # it would combine with what stands before
        return _escape(text[0]) + printable(text[1:])
    if text.isprintable():
        return text
    return "".join(_escape(char) if _invisible(char) else char for char in text)


def label(name: str, longest: int = _LONGEST) -> str:
    """Return a name as `printable` does, without the middle where it has more than `longest` characters."""
    shown, end = printable(name), longest // 4
    return shown if len(shown) <= longest else f"{shown[: longest - end]}\u2026{shown[-end:]}"


def _invisible(char: str) -> bool:
    return unicodedata.category(char)[0] == "C" or char in "\u2028\u2029"


def _escape(char: str) -> str:
    code = ord(char)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def count(number: int) -> str:
    """Write a whole number with its thousands apart: ``21,008``."""
    return f"{number:,}"


def quantity(number: float) -> str:
    """Write a large number to three figures: ``4.65 M``; below ten thousand, in full."""
    if number < 10_000:
        return count(round(number))
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size * 0.9995:
            return f"{_figures(number / size)}{NARROW}{unit}"
    return count(round(number))


def _figures(value: float) -> str:
    """Three significant figures, without an exponent, for values from 0.001 to below 10,000."""
    if value >= 99.95:
        return f"{value:,.0f}"
    if value >= 9.995:
        return f"{value:.1f}"
    return f"{value:.2f}" if value >= 0.9995 else f"{value:.3f}"


def percent(share: float) -> str:
    """Write a share of 0 to 1 as a percentage with one decimal: ``5.4 %``."""
    if 0 < share < 0.0005:
        return f"<0.1{NARROW}%"
    return f"{100 * share:.1f}{NARROW}%"


def nearness(share: float) -> str:
    """Write a share of 0 to 1 as a percentage, and how near to 1 it is from 99.5 % on: ``1 − 10⁻⁴``."""
    if share < 0.995:
        return f"{100 * share:.0f}{NARROW}%"
    if 1 - share < 1e-9:  # responses are not known more precisely
        return "the same"
    return f"1 {_MINUS} 10" + str(round(math.log10(1 - share))).translate(RAISED)


def saving(before: float, after: float) -> str:
    """Write the change from `before` to `after` as a percentage: ``−12.0 %``."""
    if before <= 0 or before == after:
        return f"0{NARROW}%"
    sign = _MINUS if after < before else "+"
    share = abs(before - after) / before
    return sign + (Damage(share, Unit.OUTPUT).figure(NARROW) if share < 0.001 else percent(share))


def plural(number: int, noun: str) -> str:
    """Write a number with its noun: ``1 filter``, ``2 filters``."""
    return f"{count(number)} {noun}" + ("" if number == 1 else "s")


def enumeration(parts: Sequence[str]) -> str:
    """List things in a sentence: ``masks``, ``verdicts and masks``, ``pictures, verdicts and masks``."""
    *others, last = parts or [""]
    return f"{', '.join(others)} and {last}" if others else last


def r_squared(score: float) -> str:
    """Write an R² with four decimals, never rounding up to a perfect one."""
    if not math.isfinite(score):
        return _DASH
    if 0.99995 <= score < 1:
        return ">0.9999"
    return f"{score:.4f}"


def damage(value: float, unit: Unit) -> str:
    """Write a damage as `Damage.text` does, its figure and unit kept together."""
    return Damage(value, unit).text(NARROW)


def magnitude(power_of_ten: float, unit: Unit) -> str:
    """Write a power of ten of damage, for an axis."""
    return Damage(power_of_ten, unit).tick(NARROW)


def activation(norm: float) -> str:
    """Write an activation, a norm, to three figures."""
    if not math.isfinite(norm):
        return _DASH
    if norm == 0:
        return "0"
    if norm < 0.001:
        return "<0.001"
    return _figures(norm)


def coefficient(value: float) -> str:
    """Write a regression coefficient with its sign: ``+0.98``, ``−1.02``."""
    if not math.isfinite(value):
        return _DASH
    return (_MINUS if value < 0 else "+") + _figures(abs(value))


def duration(seconds: float) -> str:
    """Write a time in the units a person would use: ``0.4 s``, ``3 min 20 s``, ``1 h 02 min``."""
    if seconds < 10:
        return f"{seconds:.1f}{NARROW}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}{NARROW}s"
    if whole < 3600:
        return f"{whole // 60}{NARROW}min {whole % 60:02d}{NARROW}s"
    return f"{whole // 3600}{NARROW}h {whole % 3600 // 60:02d}{NARROW}min"


def memory(mebibytes: float) -> str:
    """Write an amount of memory in MiB or GiB."""
    if mebibytes < 1024:
        return f"{mebibytes:,.0f}{NARROW}MiB"
    return f"{mebibytes / 1024:.1f}{NARROW}GiB"


def size(axes: Sequence[int] | None) -> str:
    """Write a spatial size: ``11 × 11``, or a dash if it is not known."""
    return _DASH if not axes else _TIMES.join(count(axis) for axis in axes)


def moment(stamp: object) -> str:
    """Write an ISO time stamp to the minute; what is not one is shown as it is."""
    try:
        time = datetime.fromisoformat(str(stamp))
    except ValueError:
        return str(stamp)
    return time.strftime("%Y-%m-%d %H:%M") + (f" {time.tzname()}" if time.tzinfo else "")
