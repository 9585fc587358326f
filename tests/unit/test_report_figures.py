import xml.etree.ElementTree as ElementTree

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.image import imread

from hpc_hess.linalg.density import symlog
from hpc_hess.report.style import STYLE, decade_ticks, linear_threshold, new_figure, save_figure
from hpc_hess.studies.run_figures import write_figures
from tests.support.report_case import llm_like, make_events, make_result

pytestmark = pytest.mark.filterwarnings("error")  # a figure that warns is drawn badly

CASES = {
    "many steps, two probes": (llm_like(), 70, 2),
    "tiny values, three steps": (llm_like(1e-11), 3, 1),
    "huge values, more probes than colours": (llm_like(1e9), 6, 9),
    "positive only": (np.append(np.linspace(0.5, 1, 300), 40.0), 10, 3),
    "multiple of the identity, one step": (np.full(50, 2.0), 5, 1),
    "zero": (np.zeros(50), 3, 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_figure_is_a_readable_png_and_svg(name, tmp_path):
    result = make_result(*CASES[name])
    plots = write_figures(result, make_events(result), tmp_path / "figures")
    assert [p.name for p in plots] == ["density_symlog", "density", "cumulative", "convergence", "recurrence", "timing"]
    for plot in plots:
        pixels = imread(plot.png)
        assert pixels.shape[0] > 400
        assert pixels.shape[1] > 1000
        assert pixels[..., :3].std() > 0.02  # not a blank page
        root = ElementTree.parse(plot.svg).getroot()
        assert root.tag.endswith("svg")
        assert len(list(root.iter("{http://www.w3.org/2000/svg}path"))) > 10
        assert plot.svg.stat().st_size < 600_000
    several = len(result["probes"]) > 1
    assert plots[0].caption.startswith("Mean of" if several else "One probe")
    assert "with 95 % probability at each place" in plots[0].caption


def test_the_same_run_gives_the_same_files_and_what_is_missing_is_not_drawn(tmp_path):
    result = make_result(llm_like(), 5)
    whole = write_figures(result, make_events(result), tmp_path / "whole")
    for probe in result["probes"]:  # T alone is enough
        for key in ("ritz_values", "ritz_weights", "ritz_residuals"):
            del probe[key]
    part = write_figures(result, [], tmp_path / "part")
    assert [p.name for p in whole] == [*(p.name for p in part), "timing"]
    for a, b in zip(whole, part, strict=False):
        assert a.svg.read_bytes() == b.svg.read_bytes()
    assert write_figures({}, [], tmp_path) == []


def test_axes_have_plain_numbers_and_keep_their_power_of_ten(tmp_path):
    with mpl.rc_context(STYLE):
        figure = new_figure(4, 3)
        axes = figure.subplots()
        axes.plot([-1e9, 3e9])
        save_figure(figure, tmp_path / "a.png", tmp_path / "a.svg")
        labels = [label.get_text() for label in axes.get_yticklabels()]
    assert "3.0" in labels
    assert "\u22121.0" in labels  # a true minus sign
    assert "10^{9}" in axes.yaxis.get_offset_text().get_text()
    assert axes.get_position().x0 > 0.08  # it was laid out: the axis label's room


@pytest.mark.parametrize(
    ("low", "high", "linear"), [(-1396, 893, 1e-3), (-1e12, 1e12, 1e5), (0.5, 60, 0.05), (1.8, 2.2, 0.2), (-3e-8, 0, 1e-13)]
)
def test_symlog_ticks_are_ordered_apart_and_inside(low, high, linear):
    ticks = decade_ticks(low, high, linear)
    places = symlog(ticks.values, linear)
    assert 2 <= len(ticks.values) == len(ticks.labels) <= 14
    assert all(low <= v <= high for v in (*ticks.values, *ticks.minor))
    assert np.diff(places).min() > 0.03 * np.ptp(symlog([low, high], linear))
    assert ("0" in ticks.labels) == (low <= 0 <= high)


def test_symlog_axis_turns_linear_inside_the_bulk():
    values = np.array([-1400.0, -0.5, 0.1, 0.2, 900.0])
    weights = np.array([1e-9, 0.3, 0.4, 0.3, 1e-9])
    assert linear_threshold(values, weights) == pytest.approx(0.02)
    assert linear_threshold(np.zeros(3), np.ones(3)) == 1.0
    assert linear_threshold(np.array([0.0, 5.0]), np.array([1.0, 1e-9])) == pytest.approx(5e-6)
