"""What is read and what is drawn stands out from what lies behind it, in the light and in the dark (WCAG 2.2)."""

import itertools
import re
from importlib.resources import files

import pytest
from matplotlib.colors import to_rgb

from trl_learnalign.report.drawing import COLOURS, SERIES
from trl_learnalign.report.figures import POINT_ALPHA

STYLE = (files("trl_learnalign.report") / "templates" / "style.css").read_text()

TEXTS, TEXT_CONTRAST = ("ink", "muted", "selected", "right", "wrong"), 4.5  # 1.4.3
MARKS, MARK_CONTRAST = ("rest", "muted", *SERIES), 3.0  # 1.4.11
GROUNDS = ("page", "card", "band")


def palettes():
    """Variables of the style sheet by colour scheme."""
    light, dark = re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)
    found = {}
    for scheme, block in (("light", light), ("dark", dark)):
        found[scheme] = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block))
    return found


PALETTES = palettes()


def luminance(colour):
    """Relative luminance of an sRGB colour, by WCAG's definition."""
    linear = []
    for value in colour:
        linear.append(value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4)
    red, green, blue = linear
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_measured_as_wcag_does():
    assert contrast(to_rgb("#000000"), to_rgb("#ffffff")) == pytest.approx(21)
    assert contrast(to_rgb("#767676"), to_rgb("#ffffff")) == pytest.approx(4.54, abs=0.005)


@pytest.mark.parametrize("scheme", PALETTES)
@pytest.mark.parametrize("ground", GROUNDS)
@pytest.mark.parametrize("name", TEXTS)
def test_text_can_be_read(scheme, ground, name):
    palette = PALETTES[scheme]
    assert contrast(to_rgb(palette[name]), to_rgb(palette[ground])) >= TEXT_CONTRAST


@pytest.mark.parametrize("scheme", PALETTES)
@pytest.mark.parametrize("ground", GROUNDS)
@pytest.mark.parametrize("name", MARKS)
def test_marks_can_be_seen(scheme, ground, name):
    palette = PALETTES[scheme]
    assert contrast(to_rgb(palette[name]), to_rgb(palette[ground])) >= MARK_CONTRAST


@pytest.mark.parametrize("scheme", PALETTES)
@pytest.mark.parametrize("name", ["rest", "selected"])
def test_points_that_let_others_through_can_be_seen(scheme, name):
    palette = PALETTES[scheme]
    point, page = to_rgb(palette[name]), to_rgb(palette["page"])
    mixed = [POINT_ALPHA * a + (1 - POINT_ALPHA) * b for a, b in zip(point, page, strict=True)]
    assert contrast(mixed, page) >= MARK_CONTRAST


def test_pictures_have_the_colours_of_the_page():
    for name, value in COLOURS.items():
        assert PALETTES["light"][name] == value
        assert name in PALETTES["dark"]  # or the picture would not turn with the page


@pytest.mark.parametrize("scheme", PALETTES)
def test_no_two_lines_of_a_comparison_have_one_colour(scheme):
    values = [PALETTES[scheme][name] for name in SERIES]
    for one, other in itertools.combinations(values, 2):
        apart = sum((a - b) ** 2 for a, b in zip(to_rgb(one), to_rgb(other), strict=True))
        assert apart > 0.03, (one, other)


def test_no_colour_is_named_outside_the_palette():
    body = STYLE[STYLE.index("* {") :]
    assert re.findall(r"#[0-9a-fA-F]{3,8}\b", body) == []
