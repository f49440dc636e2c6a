"""Figures and tables show the numbers of their tables; methods are told from each other."""

import base64
from itertools import combinations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb

from study import answers, figures, names, palette, sketches, sliders
from study.tables import Table

METHODS = ("BLUE", "SKY", "GREEN", "INDIGO", "RED", "ORANGE", "PURPLE", "WINE")
# Machado, Oliveira and Fernandes 2009, table 1, severity 1.0; on linear RGB
READERS = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                   [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                     [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
                   [0.004733, 0.691367, 0.303900]],
    "none": np.eye(3),
}  # fmt: skip


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


def test_a_method_has_one_look_in_all_panels_and_each_has_an_entry_in_the_legend():
    more = runs()[runs()["recipe"] == "random"].assign(model="other")
    table = pd.concat([more, runs(), runs().replace("ours", "third").assign(model="last")])
    figure = figures.curves(table, "file_bytes", "test_accuracy")
    looks = {
        (line.get_label(), line.get_color(), line.get_marker(), line.get_linestyle())
        for axis in figure.axes
        for line in axis.get_lines()
    }
    assert len(looks) == 3
    said = [text.get_text() for text in figure.legends[0].get_texts()]
    assert said == ["random", "ours", "third", "range over seeds"]
    figure = figures.curves(table, "file_bytes", "test_accuracy", spread="draws")
    assert figure.legends[0].get_texts()[-1].get_text() == "range over draws"


def test_a_line_beside_the_others_does_not_squeeze_them():
    far = runs()[runs()["recipe"] == "ours"].assign(recipe="far", base_test_accuracy=95.0)
    far["file_bytes"] *= 1000
    figure = figures.curves(
        pd.concat([runs(), far]), "file_bytes", "test_accuracy", beside=["far"], log=True
    )
    (axis,) = figure.axes
    low, high = axis.get_xlim()
    assert 900 < low < 1100 and 2210 < high < 2500
    said = [text.get_text() for text in figure.legends[0].get_texts()]
    assert said[:3] == ["ours", "random", "far\n(leaves the panel)"]


def test_no_line_leaves_a_panel_that_is_made_for_all():
    # the mean of three 0.1 is not 0.1
    rows = [("one", seed, 1, 0.1, 90.0 + seed) for seed in range(3)]
    table = pd.DataFrame(rows, columns=["recipe", "seed", "knob", "density", "test_accuracy"])
    assert table["density"].mean() > table["density"].max()
    figure = figures.curves(table.assign(dataset="d", model="m"), "density", "test_accuracy")
    assert figure.legends[0].get_texts()[0].get_text() == "one"


def test_a_zero_has_no_sign():
    (axis,) = figures.matrix(pd.DataFrame([[-0.001]]), "title").axes
    assert [text.get_text() for text in axis.texts] == ["0.00"]
    assert "<td>0.00</td>" in Table(pd.DataFrame({"a": [-0.001, 0.5]}))._repr_html_()
    assert sketches._signed(-0.001) == sketches._signed(0.0) == "0"
    assert sketches._signed(0.25) == "+0.25"


@pytest.mark.parametrize(
    "low, high, expected",
    [(3, 700, [5, 10, 20, 50, 100, 200, 500]), (280, 450, [300, 400]), (41, 49, [41, 49])],
)
def test_ticks_are_round_where_any_round_one_lies_within(low, high, expected):
    assert palette.ticks(pd.Series([low, high])) == expected


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
    assert [label.get_text() for label in axis.get_yticklabels()] == ["ours", "random"]
    drawn = [list(line.get_xdata()) for line in axis.get_lines()]
    assert drawn == [[4, 8], [6], [5, 9], [7], [0, 0], [1, 1]]


def test_a_ladder_shows_points_lost_and_keeps_parts_together():
    rows = [("a", "one", 90.0), ("b", "two", 95.0), ("c", "one", 99.0)]
    table = pd.DataFrame(rows, columns=["recipe", "part", "test_accuracy"])
    table = table.assign(dataset="digits", model="lenet5", base_test_accuracy=99.0)
    (axis,) = figures.ladder(table).axes
    dots = {line.get_ydata()[0]: line.get_xdata()[0] for line in axis.lines
            if line.get_marker() == "o"}  # fmt: skip
    labels = [label.get_text() for label in axis.get_yticklabels()]
    ticks = dict(zip(axis.get_yticks(), labels, strict=True))
    assert {ticks[place]: lost for place, lost in dots.items()} == {"a": 9, "c": 0, "b": 4}
    assert list(ticks.values()) == ["a", "c", "b"]
    assert {text.get_text(): text.get_position()[1] for text in axis.texts} == {"one": 0, "two": 3}


def test_a_matrix_has_its_numbers_in_their_cells():
    values = pd.DataFrame([[1.0, 0.25], [-0.5, 0.0]], index=["a", "b"], columns=["x", "y"])
    (axis,) = figures.matrix(values, "title").axes
    told = {text.get_position(): text.get_text() for text in axis.texts}
    assert told == {(0, 0): "1.00", (1, 0): "0.25", (0, 1): "-0.50", (1, 1): "0.00"}


def lab(colour, reader="none"):
    """CIE L*a*b* (D65) of a colour as a reader sees it."""
    rgb = np.array(to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750],
              [0.0193339, 0.1191920, 0.9503041]]  # fmt: skip
    seen = np.clip(np.array(READERS[reader]) @ linear, 0, 1)
    xyz = to_xyz @ seen / np.array([0.95047, 1, 1.08883])
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("reader", READERS)
def test_colours_of_methods_are_told_apart_by_all_readers(reader):
    seen = {name: lab(getattr(palette, name), reader) for name in METHODS}
    apart = {pair: np.linalg.norm(seen[pair[0]] - seen[pair[1]]) for pair in combinations(seen, 2)}
    assert min(apart.values()) > 15, min(apart, key=apart.get)  # 2.3 can just be noticed


def test_verdicts_are_told_apart_in_grey_print_and_their_numbers_can_be_read():
    lightness = sorted(lab(colour)[0] for colour in figures.VERDICTS.values())
    assert np.diff(lightness).min() > 20
    text = {"white": 100, "black": 0}
    for colour in figures.VERDICTS.values():
        assert abs(text[palette.contrasting(colour)] - lab(colour)[0]) > 45


def test_lines_of_a_figure_share_no_marker_and_methods_no_colour():
    looks = palette.styles(figures.HEADLINE)
    assert len({look["marker"] for look in looks}) == len(looks)
    methods = [look["color"] for look in looks if look["ls"] == "-"]
    assert len(methods) == 6 == len(set(methods))
    assert all(look["ls"] != "-" for look in palette.styles(["random", "reversed", "shuffled:x"]))
    twice = palette.styles(["shuffled:x", "shuffled:y"])
    assert twice[0]["color"] != twice[1]["color"]


def test_a_recipe_keeps_its_colour_whatever_stands_beside_it():
    compared = ["uniform bits", "alike", "lrp root", *palette._FIXED]
    for count in (3, 5, 8):
        for start in range(len(compared) - count):
            shown = compared[start : start + count]
            looks = {n: look["color"] for n, look in zip(shown, palette.styles(shown), strict=True)}
            fixed = [palette._FIXED[name] for name in shown if name in palette._FIXED]
            for name in looks.keys() & palette._FIXED.keys():
                if fixed.count(palette._FIXED[name]) == 1:
                    assert looks[name] == palette._FIXED[name], (name, shown)
            assert len(set(looks.values())) == count, shown


def test_a_cell_of_the_matrix_counts_the_readings_of_one_claim_about_one_network():
    said = [("C1", "digits-lenet5", "holds")] * 3 + [("C1", "digits-lenet5", "fails"),
            ("C1", "mnist-lenet5-s0", "open"), ("Q1", "mnist-lenet5", "holds")]  # fmt: skip
    claims = pd.DataFrame(said, columns=["id", "where", "verdict"])
    figure = figures.verdicts(claims.assign(seeds=[[0, 1, 2]] * 4 + [[0]] * 2))
    (axis,) = figure.axes
    bars = [bar for group in axis.containers for bar in group]
    bars, texts = (
        sorted(bars, key=lambda b: b.get_x()),
        sorted(axis.texts, key=lambda t: t.get_position()),
    )
    assert [text.get_text() for text in texts] == ["3", "1", "1"]
    assert [bar.get_width() for bar in bars] == pytest.approx([0.94 * 3 / 4, 0.94 / 4, 0.94])
    expected = [to_rgb(figures.VERDICTS[verdict]) for verdict in ("holds", "fails", "open")]
    assert [bar.get_facecolor()[:3] for bar in bars] == expected
    labels = [label.get_text() for label in axis.get_xticklabels()]
    assert labels == ["LeNet-5\non digits", "LeNet-5\non MNIST\n(one seed)"]


def test_a_table_sets_texts_left_and_bytes_whole_and_lets_no_markup_in():
    frame = pd.DataFrame({"claim <b>": ["x <= 1", None], "file bytes": [115792.0, 3.5],
                          "±": [float("nan"), 1.234], "runs": [20000, 1]})  # fmt: skip
    said = Table(frame)._repr_html_()
    assert '<div style="text-align: left">x &lt;= 1</div>' in said and "claim &lt;b&gt;" in said
    assert all(f"<td>{number}</td>" in said for number in ("115,792", "–", "1.23", "20,000"))
    assert "None" not in said and "NaN" not in said and "<details>" not in said
    wide = pd.DataFrame({("kept (%)", "a"): [1.0]}, index=["at once & <all>"])
    row = '<th><div style="text-align: left">at once &amp; &lt;all&gt;</div></th>'
    assert row in Table(wide)._repr_html_()
    folded = Table(frame, fold="all rows")._repr_html_()
    assert folded == f"<details><summary>all rows</summary>{said}</details>"


def test_names_need_no_code_to_be_read():
    assert names.readable("units by shuffled:root:lrp-epsilon/contrastive") == (
        "units: √ contrastive relevance, dealt out at random"
    )
    assert names.readable("lrp root, pruned, sequential") == (
        "√ relevance, pruned, layer after layer"
    )
    told = "-1 % against root:fisher; units by shuffled:lrp-epsilon (3 kB), lrp root, sequential"
    assert names.spelled_out(told) == (
        "-1 % against √ squared gradients (Fisher); units: relevance, dealt out at random (3 kB), "
        "√ relevance, layer after layer"
    )
    plain = "removing positive scores at random, or all alike by magnitude, does more harm"
    assert names.spelled_out(plain.replace("all ", "")) == plain
    assert names.place("cifar10-jpeg-vgg16-s0") == "VGG-16 on CIFAR-10 (JPEG)"
    assert names.readable("zplus rms contrastive") == "z⁺, root mean square, contrastive"
    assert names.readable("1 images a class, pruned") == "1 image a class, pruned"
    assert names.readable("15 images a class") == "15 images a class"
    assert (
        names.readable("all, adam-slow: 50") == "reading that works, Adam, a tenth of the rate: 50"
    )
    assert names.told(pd.DataFrame({"model": ["lenet5"], "x": ["lenet5"]})).values.tolist() == [
        ["LeNet-5", "lenet5"]
    ]
    assert names.place("resnet18") == "resnet18"
    assert names.classes("cifar10-jpeg")[3] == "cat" and names.classes("mnist")[3] == "3"


def test_the_answer_of_the_last_notebook_counts_and_names_what_is_unanimous():
    said = [("C1", "a-lenet5", "holds"), ("C1", "a-lenet5", "holds"), ("C2", "a-lenet5", "fails"),
            ("C3", "a-lenet5", "holds"), ("C3", "a-lenet5", "open"),
            ("Q1", "x", "fails")]  # fmt: skip
    rows = [dict(zip(("id", "where", "verdict"), row, strict=True)) | {"seeds": [0, 1]}
            for row in said]  # fmt: skip
    text = answers.whole(rows).text
    assert "Of 6 readings of claims 3 hold, 1 are open and 2 fail" in text
    assert "hold in every reading: C1 on LeNet-5 on a; " in text
    assert text.endswith("fail in every one: C2 on LeNet-5 on a.</b>")


def test_a_slider_shows_the_picture_of_its_place(monkeypatch):
    seen, box = [], sliders.ipywidgets.VBox
    monkeypatch.setattr(sliders.ipywidgets, "VBox", lambda parts: seen.extend(parts) or box(parts))
    frames = {}
    for place in ("2x", "4x", "8x"):
        frames[place], axes = plt.subplots(figsize=(1, 1))
        axes.set_title(place)
    shown = sliders.Slider("smaller by", frames)
    stored = shown._repr_mimebundle_()["image/png"]
    slider, picture = seen
    assert len(set(shown.pictures.values())) == 3 and slider.value == "4x"
    assert base64.b64decode(stored) == picture.value == shown.pictures["4x"]
    for place in ("8x", "2x", "4x"):
        slider.value = place
        assert picture.value == shown.pictures[place]
