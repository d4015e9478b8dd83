"""What our pictures have in common: colours, type, axes in bytes, and how they are written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxllm.report.units import one_line
from jaxllm.spec.errors import SpecError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, LIMIT = "#222222", "#b3261e"
ON_WHITE = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # numbers are not crossed by grid lines


@contextmanager
def picture(width: float, height: float) -> Iterator[Figure]:
    """A figure of so many inches in our style."""
    # Figure instead of pyplot: no window system is asked for, and no state is left behind
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style = {
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "axes.edgecolor": "#888888",
        "axes.linewidth": 0.8,
        "text.color": INK,
        "text.parse_math": False,  # a name with two dollars in it is no formula
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "svg.fonttype": "none",
        "svg.hashsalt": "jaxllm",
    }
    with rc_context(style):
        figure = Figure(figsize=(width, height), dpi=160, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12, wspace=0.06)
        yield figure


def save(figure: Figure, path: Path) -> None:
    """Raises SpecError when the file cannot be written after all."""
    # The same data give the same file: vector formats would store the time of day.
    metadata: dict[str, Any] | None = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix.lower())
    try:
        figure.savefig(path, metadata=metadata)
    except OSError as error:
        raise SpecError(f"--plot {path} cannot be written: {error.strerror or error}; name another file.") from None


def in_bytes(axis: Any) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axis.set_major_formatter(EngFormatter(unit="B"))
    axis.set_major_locator(MaxNLocator(6))


def tidy(axes: Axes, grid: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#e6e6e6", lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)


def drawn(text: object) -> str:
    """A text on one line, with characters that the font lacks written out, where it would draw empty boxes."""
    from matplotlib.font_manager import findfont
    from matplotlib.ft2font import FT2Font

    known = FT2Font(findfont("DejaVu Sans"))
    return "".join(c if known.get_char_index(ord(c)) else f"\\u{ord(c):04x}" for c in one_line(text))
