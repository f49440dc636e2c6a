"""Figures show the numbers of their tables: what is drawn is read back from the axes."""

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from study import figures


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def runs():
    """Two recipes, two settings, two seeds; no two numbers are alike."""
    rows = [
        (recipe, seed, knob, 1000 * place + 100 * knob + 10 * seed, 90 - place - knob + 3 * seed)
        for place, recipe in enumerate(("ours", "random"), 1)
        for seed in (0, 1)
        for knob in (1, 2)
    ]
    table = pd.DataFrame(rows, columns=["recipe", "seed", "knob", "file_bytes", "test_accuracy"])
    return table.assign(
        dataset="d", model="m", base_test_accuracy=95.0, val_accuracy=table["test_accuracy"] + 0.5
    )


def lines(axis):
    return {line.get_label(): line.get_xydata().tolist() for line in axis.get_lines()}


def test_curves_show_the_means_and_the_range_over_seeds():
    (axis,) = figures.curves(runs(), "file_bytes", "test_accuracy").axes
    assert axis.get_title() == "m on d"
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("file_bytes", "test_accuracy")
    assert lines(axis) == {
        "ours": [[1105, 89.5], [1205, 88.5]],
        "random": [[2105, 88.5], [2205, 87.5]],
    }
    bands = [band.get_paths()[0].get_extents() for band in axis.collections]
    assert [(band.y0, band.y1) for band in bands] == [(87, 91), (86, 90)]


def test_curves_against_the_base_show_points_lost():
    figure = figures.curves(runs(), "file_bytes", "test_accuracy", base="base_test_accuracy")
    (axis,) = figure.axes
    assert axis.get_ylabel().splitlines()[0] == "points of test accuracy lost"
    assert lines(axis)["ours"] == [[1105, 5.5], [1205, 6.5]]
    assert lines(axis)["one point lost"][0][1] == 1 and lines(axis)["uncompressed"][0][1] == 0
    (low, high) = axis.get_ylim()
    assert low > high  # least lost at the top


def test_a_ladder_shows_mean_and_range_of_each_recipe():
    (axis,) = figures.ladder(runs()).axes
    names = [label.get_text() for label in axis.get_yticklabels()]
    drawn = [list(line.get_xdata()) for line in axis.get_lines()]
    assert names == ["ours", "random"]
    assert drawn[:4] == [[87, 91], [89], [86, 90], [88]] and drawn[4] == [95, 95]


def test_bars_have_the_heights_of_the_column():
    table = pd.DataFrame(
        [("d", "m", name, layer, 1.0 + i + 2 * j) for i, name in enumerate("ab")
         for j, layer in enumerate(("one", "two", "three"))],
        columns=["dataset", "model", "recipe", "layer", "bits"],
    )  # fmt: skip
    (axis,) = figures.bars(table, "layer", "bits", "recipe").axes
    heights = [[bar.get_height() for bar in group] for group in axis.containers]
    assert heights == [[1, 3, 5], [2, 4, 6]]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["one", "two", "three"]


def test_a_matrix_has_its_numbers_in_their_cells():
    values = pd.DataFrame([[1.0, 0.25], [-0.5, 0.0]], index=["a", "b"], columns=["x", "y"])
    (axis,) = figures.matrix(values, "title").axes
    told = {text.get_position(): text.get_text() for text in axis.texts}
    assert told == {(0, 0): "1.00", (1, 0): "0.25", (0, 1): "-0.50", (1, 1): "0.00"}
