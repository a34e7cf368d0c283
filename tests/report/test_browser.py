"""The report in a real browser: no console error, no request to anywhere, readable on a phone and in the dark."""

import json
import shutil

import pytest
from adaptive_cases import go, settings
from reports import HOSTILE, change, train
from subsets import select

from trl_learnalign.report import compare, write_comparison, write_report

webdriver = pytest.importorskip("selenium.webdriver")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None,
    reason="no browser: apt-get install chromium chromium-driver",
)
pytestmark = [pytest.mark.slow, needs_browser]

QUIET = (
    "headless",
    "no-sandbox",
    "disable-gpu",
    "disable-quic",
    "no-first-run",
    "disable-background-networking",
)
QUIET += ("disable-component-update", "disable-sync")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(folder)

    def poison(data):
        for example in data["examples"]:
            for rollout in example["rollouts"]:
                rollout["text"] = HOSTILE + " and a very long word: " + "x" * 400

    change(folder / "_learnalign" / "stage_1_examples.json", poison)
    return write_report(folder)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (*QUIET, f"user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def show(browser, page, width=1200, dark=False):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
    for kind in ("browser", "performance"):
        browser.get_log(kind)  # forget what was before
    browser.get(page.as_uri())


def requests(browser):
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [
        m["params"]["request"]["url"]
        for m in messages
        if m["method"] == "Network.requestWillBeSent"
    ]
    return [url for url in sent if not url.startswith("data:")]


def find(browser, selector):
    return browser.find_elements("css selector", selector)


def test_clicking_through_the_report(browser, report):
    show(browser, report)
    for link in find(browser, "nav a"):
        link.click()
        target = link.get_attribute("href").rsplit("#", 1)[1]
        (section,) = find(browser, f"#{target}")
        top = browser.execute_script("return arguments[0].getBoundingClientRect().top", section)
        bottom = browser.execute_script(
            "return document.documentElement.scrollHeight - innerHeight - scrollY"
        )
        assert abs(top) < 5 or bottom < 5, target
    details = find(browser, "details")
    assert len(details) > 10
    for element in details:
        element.find_element("css selector", "summary").click()
        assert element.get_attribute("open")
        assert element.find_element("css selector", "pre, dl").is_displayed()
    shown = [element.text for element in find(browser, "#stage_1 pre")]
    assert any("<script>alert(1)</script> [bold red]not markup[/]" in text for text in shown)
    assert find(browser, "pre script, pre img") == []
    assert [
        entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")
    ] == []
    assert {url.split("#")[0] for url in requests(browser)} == {report.as_uri()}


def test_no_script_could_run(browser, report):
    show(browser, report)
    browser.execute_script(
        "const s = document.createElement('script'); s.text = 'window.ran = 1'; document.body.append(s)"
    )
    assert browser.execute_script("return window.ran") is None


def fits(browser):
    """Nothing is wider than the page, and no table than its box, which would scroll."""
    script = """
    const wide = table => table.scrollWidth > table.parentElement.clientWidth;
    return [document.documentElement.scrollWidth <= innerWidth,
            Array.from(document.querySelectorAll('table')).filter(wide).map(table => table.innerText)]
    """
    is_inside, tables = browser.execute_script(script)
    assert tables == []
    return is_inside


@pytest.mark.parametrize("width", [360, 768, 1400])
def test_nothing_is_wider_than_the_page(browser, report, width):
    show(browser, report, width)
    for summary in find(browser, "summary"):
        summary.click()
    assert fits(browser)
    for figure in find(browser, "figure"):
        assert 250 <= figure.size["width"] <= width
        assert figure.find_element("css selector", "svg").size["height"] > 150


def test_accuracy_is_on_the_screen_of_a_phone(browser, report):
    show(browser, report, 390)
    right = "return arguments[0].getBoundingClientRect().right"
    cells = [cell for cell in find(browser, "#training td[data-label='accuracy']") if cell.text]
    assert len(cells) > 1
    assert all(browser.execute_script(right, cell) <= 390 for cell in cells)
    (picture,) = find(browser, "#training svg")
    assert browser.execute_script(right, picture) <= 390
    heights = [text.size["height"] for text in picture.find_elements("css selector", "text")]
    assert min(heights) >= 8  # not shrunk until nobody can read it


def colours(browser):
    """Luminance from 0 to 1 of page, text, and the text in a figure."""
    script = """
    const light = colour => { const [r, g, b] = colour.match(/\\d+/g).map(Number);
                              return (0.2126 * r + 0.7152 * g + 0.0722 * b) / 255 };
    return [light(getComputedStyle(document.body).backgroundColor), light(getComputedStyle(document.body).color),
            light(getComputedStyle(document.querySelector('figure svg text')).fill)]
    """
    return browser.execute_script(script)


def test_dark_mode_reaches_the_figures(browser, report):
    show(browser, report, dark=False)
    page, text, label = colours(browser)
    assert page > 0.9
    assert max(text, label) < 0.5
    show(browser, report, dark=True)
    page, text, label = colours(browser)
    assert page < 0.15
    assert min(text, label) > 0.5


def test_the_comparison_too(browser, report, tmp_path):
    page = write_comparison(compare([report.parent, report.parent]), tmp_path / "compare.html")
    show(browser, page, 360)
    assert fits(browser)
    assert len(find(browser, "figure svg")) == 2
    assert [
        entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")
    ] == []
    assert requests(browser) == [page.as_uri()]


def test_the_agreement_of_selectors_in_the_dark_and_on_a_phone(browser, tmp_path):
    select(tmp_path, selector=["learnability", "token_length", "random"])
    page = write_report(tmp_path)
    show(browser, page, 360, dark=True)
    assert fits(browser)
    assert [link.text for link in find(browser, "nav a")] == [
        "Training",
        "Selectors",
        "Cost",
        "Settings",
    ]
    assert len(find(browser, "#selectors tbody tr")) == 3
    for name in ("correlations", "overlaps"):
        (picture,) = find(browser, f"#selectors svg[aria-label={name}]")
        # Names lie on the page and turn light with it; numbers lie on cells, which do not change.
        texts = picture.find_elements("css selector", "text")
        fills = {text.text: text.value_of_css_property("fill") for text in texts}
        assert fills["token_length"] != fills["1"] == "rgb(255, 255, 255)"
    assert {url.split("#")[0] for url in requests(browser)} == {page.as_uri()}


@pytest.mark.parametrize(("width", "dark"), [(390, True), (1400, False)])
def test_the_order_of_an_adaptive_run(browser, tmp_path, width, dark):
    go(tmp_path, settings(stage_steps=12, oversample=1.5), save_strategy="no")
    page = write_report(tmp_path)
    show(browser, page, width, dark)
    assert fits(browser)
    assert "Order" in [link.text for link in find(browser, "nav a")]
    for name in ("order", "reliability", "repeats"):
        (picture,) = find(browser, f"#order svg[aria-label={name}]")
        assert picture.size["height"] > 150
    heads = [head.text for head in find(browser, "#order th")]
    cells = [cell.text for cell in find(browser, "#order tbody td")]
    assert len(heads) == len(cells)
    assert all(cells)
    for summary in find(browser, "#order summary"):
        summary.click()
    assert fits(browser)
    assert find(browser, "#order pre")[0].is_displayed()
    assert {url.split("#")[0] for url in requests(browser)} == {page.as_uri()}
