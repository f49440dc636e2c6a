"""Pictures to slide through: a widget where a kernel runs, one of the pictures elsewhere."""

import base64
from io import BytesIO

import ipywidgets
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from .palette import BLUE, GREY, panels

VIEW = "application/vnd.jupyter.widget-view+json"
"""Of a widget in a notebook's outputs: of no use without the kernel that made it."""


class Slider:
    """A slider with a picture for each of its places.

    ``frames``, by the place's label, are drawn at once, so that sliding computes nothing, and
    closed.
    """

    def __init__(self, label: str, frames: dict[str, Figure]):
        self.label, self.pictures = label, {}
        for place, figure in frames.items():
            content = BytesIO()
            figure.savefig(content, dpi=100, metadata={"Software": None})
            plt.close(figure)
            self.pictures[place] = content.getvalue()

    def __repr__(self):
        return f"a slider over {len(self.pictures)} pictures"

    def _repr_mimebundle_(self, include=None, exclude=None):
        places = list(self.pictures)
        middle = places[len(places) // 2]
        picture = ipywidgets.Image(value=self.pictures[middle], format="png")
        slider = ipywidgets.SelectionSlider(
            options=places, value=middle, description=self.label,
            style={"description_width": "auto"},
        )  # fmt: skip
        ipywidgets.dlink((slider, "value"), (picture, "value"), self.pictures.get)
        box = ipywidgets.VBox([slider, picture])
        shown = base64.b64encode(self.pictures[middle]).decode()
        view = box._repr_mimebundle_()[VIEW]
        return {"text/plain": repr(self), "image/png": shown, VIEW: view}


def budget(files: dict[str, object], accuracy: dict[str, float], base: float) -> dict[str, Figure]:
    """By label a picture of each file: where it stands among all, and what its layers take.

    The files are of one network, whose accuracy in percent is ``base`` uncompressed.
    """
    sizes = [file.nbytes for file in files.values()]
    frames = {}
    for label, file in files.items():
        figure, (left, right) = panels(2, height=3.2, width=4.4)
        left.plot(sizes, accuracy.values(), "o-", color=GREY, label="all budgets")
        left.plot(file.nbytes, accuracy[label], "D", color=BLUE, ms=10, label="this one")
        left.axhline(base, color="black", lw=0.8, ls=":", label="uncompressed")
        left.set(
            xlabel=f"file (bytes); this one: {file.nbytes:,}",
            ylabel=f"test accuracy (%); this one: {accuracy[label]:.1f}",
        )
        left.set_xlim(left=0)
        left.legend(loc="lower right")
        bits = [layer.bits for layer in file.summary()[:-1]]
        right.bar(range(1, len(bits) + 1), bits, color=BLUE)
        most = max(row.bits for each in files.values() for row in each.summary()[:-1])
        right.set(xlabel="layer, from the input", ylabel="bits per weight", ylim=(0, 1.05 * most))
        frames[label] = figure
    return frames
