"""The explorer in a real browser, without a display and without a network."""

import json
import math
import re
from dataclasses import replace

import pytest

from shvit.export.bench.explorer import write_explorer
from shvit.export.bench.records import BenchResult, Check, Device, LayerTime, Machine, Measurements, Scaling, Sustained
from shvit.img_size import ImgSize
from tests.browser import open_browser

HOSTILE = '<img src=x onerror="document.title=1"></script><script>document.title=2</script>'
TITLE = "SHViT: accuracy against latency"


def result(model: str, top1: float | None, ms: float, runtime="onnxruntime", precision="fp32", batch_size=1, **kwargs):
    """A case with figures that are told apart."""
    known = BenchResult(
        model=model,
        runtime=runtime,
        precision=precision,
        img_size=ImgSize(224, 224),
        batch_size=batch_size,
        threads=1,
        rounds=11,
        calls=31,
        latency_ms_p50=ms,
        latency_ms_p90=1.25 * ms,
        latency_ms_p99=1.5 * ms,
        cpu_ms=1.75 * ms,
        ratio_to_first=ms / 4,
        ratio_low=0.9 * ms / 4,
        ratio_high=1.1 * ms / 4,
        load_ms=321,
        first_ms=43.2,
        peak_memory_mb=234,
        gmacs=0.567,
        percent_of_peak=65.4,
        top1=top1,
    )
    return replace(known, **kwargs)


MEASUREMENTS = Measurements(
    Machine("A & B <cpu>", 2, ("avx2",), "performance", 1, {"fp32": 110.0}, 17.5, {"torch": "2.14.1"}),
    (
        result("shvit_s1", 72.8, 4.0),
        result("shvit_s2", 75.2, 6.0),
        result("shvit_s4", 79.4, 15.0),
        result("shvit_s1", 72.8, 2.0, "openvino", "int8"),
        result("shvit_s4", 79.4, 9.0, "openvino", "int8"),
        result("baseline", 75.2, 5.5, ratio_to_first=None, ratio_low=0.5, ratio_high=1.9),
        result("heavy", 80.1, 40.0, percent_of_peak=None),
        result("mine.onnx", None, 3.0),
        result(HOSTILE, 71.0, 7.0, ratio_to_first=None, ratio_low=1.7, ratio_high=1.75),
        result("shvit_s1", 72.8, 3.0, batch_size=16),
        result("shvit_s2", 75.2, 4.5, batch_size=16, ratio_low=math.nan, ratio_high=math.inf),
    ),
    tuple(LayerTime(HOSTILE, "onnxruntime", 1, kind, ms, 10 * ms) for kind, ms in (("attention", 4.0), ("<i>", 6.0))),
    (
        Scaling(HOSTILE, "torch", "batch_size", (1, 4), (8.0, 6.0), (200.0, 210.0), -0.21, 0.04),
        Scaling("shvit_s1", "torch", "pixels", (12544, 50176), (2.0, 8.0), (200.0, 0.0), 1.0, 0.04),
    ),
)


def on_phone(
    device: str, model: str, top1: float, ms: float, runtime="wasm", precision="fp32", **kwargs
) -> BenchResult:
    """What a browser does not tell is None."""
    untold = {"cpu_ms": None, "peak_memory_mb": None, "percent_of_peak": None, "device": device}
    return result(model, top1, ms, runtime, precision, **untold, **kwargs)


PHONE, OTHER = "Pixel 8", "<b>my phone</b>, the old one"
PHONES = Measurements(
    MEASUREMENTS.machine,
    (
        result("shvit_s1", 72.8, 4.0),
        result("shvit_s4", 79.4, 15.0),
        result("shvit_s1", 72.8, 3.0, batch_size=16),
        on_phone(PHONE, "shvit_s1", 72.8, 8.0),
        on_phone(PHONE, "shvit_s4", 79.4, 30.0, ratio_to_first=3.75),
        on_phone(PHONE, "shvit_s1", 72.8, 5.0, "webgpu", "fp16"),
        on_phone(PHONE, HOSTILE, 71.0, 3.5, "webgpu", "fp16"),
        on_phone(OTHER, "shvit_s1", 72.8, 19.0, "wasm-4-threads", threads=4),
        on_phone(OTHER, "shvit_s4", 79.4, 60.0, "wasm-4-threads", threads=4, ratio_to_first=None),
    ),
    devices=(
        Device(PHONE, "Mozilla/5.0 (Android 15)", 9, 8.0, "arm valhall", {"webnn": "no navigator.ml"}, "ort 1.22"),
        Device(OTHER, HOSTILE, 4, None, "", {"webgpu": "no adapter"}, "onnxruntime-web 1.22"),
    ),
    checks=(
        Check(PHONE, "shvit_s1", "wasm", "fp32", 16, 1.25e-6, 118.25, 100.0, "", ""),
        Check(PHONE, "shvit_s4", "webgpu", "fp16", 16, 0.75, 9.5, 12.5, f"SNR 9.5 dB is below 40 dB {HOSTILE}", ""),
        Check(OTHER, "shvit_s1", "webnn", "fp16", 0, None, None, None, "no navigator.ml", ""),
        Check(OTHER, "shvit_s1", "wasm-4-threads", "fp32", 16, 0.0, math.inf, 100.0, "", ""),
    ),
    sustained=(
        Sustained(PHONE, "shvit_s1", "wasm", "fp32", (8.0, 8.1, 9.0, 10.5, 10.72), 1.34),
        Sustained(OTHER, HOSTILE, "wasm-4-threads", "fp32", (19.0, 19.1, 19.0, 19.2, 19.19), 1.01),
    ),
)  # fmt: skip


def most_accurate(budget: float, batch_size: int = 1) -> BenchResult | None:
    """What the page must name: highest accuracy within the budget, the faster of two that are equal."""
    fitting = [
        each
        for each in MEASUREMENTS.results
        if each.top1 is not None and each.batch_size == batch_size and each.latency_ms_p50 <= budget
    ]
    return max(fitting, key=lambda each: (each.top1, -each.latency_ms_p50), default=None)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with open_browser(tmp_path_factory.mktemp("profile"), browser="ALL", performance="ALL") as opened:
        yield opened


@pytest.fixture
def page(browser, tmp_path, request):
    """The page of `MEASUREMENTS`, or of others; at the end nothing was complained of and nothing was asked of a
    network."""
    write_explorer(tmp_path / "report.html", getattr(request, "param", MEASUREMENTS))
    show(browser, 1280, 900)
    network(browser, "requestWillBeSent")  # what went before is forgotten
    yield open_page(browser, tmp_path / "report.html")
    assert browser.get_log("browser") == []
    asked = {said["request"]["url"].partition(":")[0] for said in network(browser, "requestWillBeSent")}
    assert asked <= {"file", "data"}
    assert browser.title == TITLE  # no name became a script


def network(browser, event: str) -> list[dict]:
    """What the browser reported of one kind since it was last asked."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [message["params"] for message in messages if message["method"] == f"Network.{event}"]


def open_page(browser, path):
    browser.get(path.as_uri())
    return browser


def show(browser, width: int, height: int, **media: str) -> None:
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": name.replace("_", "-"), "value": value} for name, value in media.items()]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def all_of(browser, selector: str) -> list:
    return browser.find_elements("css selector", selector)


def text(browser, selector: str) -> str:
    return browser.find_element("css selector", selector).text.replace("\xa0", " ")


def names(browser, selector: str = ".point") -> list[str]:
    """Of points, fastest first."""
    return [each.get_attribute("textContent") for each in all_of(browser, f"{selector} .name")]


def choose(browser, name: str, value: str) -> None:
    browser.find_element("css selector", f"#{name} option[value='{value}']").click()


def set_value(browser, name: str, value: object) -> None:
    """As a user's hand would, at once."""
    script = (
        "const e = document.getElementById(arguments[0]); e.value = arguments[1]; e.dispatchEvent(new Event('input'))"
    )
    browser.execute_script(script, name, str(value))


def test_slider_names_the_most_accurate_model_within_the_budget(page):
    seen = set()
    for position in range(0, 1001, 100):
        set_value(page, "budget", position)
        budget = float(page.find_element("id", "budget-ms").get_property("value"))
        expected = most_accurate(budget)
        if expected is None:
            assert "No model fits" in text(page, ".verdict")
            continue
        assert text(page, ".winner") == expected.model
        assert f"{expected.top1:.2f} % top-1 in {expected.latency_ms_p50:#.3g} ms" in text(page, ".verdict")
        assert names(page, ".point.best") == [expected.model]
        assert f"{expected.runtime} {expected.precision}" in text(page, ".card")
        assert len(all_of(page, ".point.dim")) == sum(ms > budget for ms in (2.0, 5.5, 6.0, 7.0, 9.0, 40.0))
        seen.add(expected.model)
    assert seen == {"shvit_s1", "baseline", "shvit_s4", "heavy"}  # of two equals the faster


def test_exact_budget_and_none_that_fits(page):
    set_value(page, "budget-ms", 6)
    assert text(page, ".winner") == "baseline"
    assert "Against others: too noisy to decide." in text(page, ".verdict")
    set_value(page, "budget-ms", 0.5)
    assert text(page, ".verdict") == "No model fits 0.5 ms per image: the fastest, shvit_s1, takes 2.00 ms."
    assert len(all_of(page, ".point.dim")) == 6


def test_point_tells_its_numbers_on_focus_and_on_hover(page):
    from selenium.webdriver import ActionChains, Keys

    page.find_element("id", "budget-ms").click()
    for _ in range(3):  # from the budget to the third point, by keyboard alone
        ActionChains(page).send_keys(Keys.TAB).perform()
    focused = page.switch_to.active_element
    assert focused.get_attribute("aria-label").replace("\xa0", " ") == (
        "shvit_s2, onnxruntime fp32: 75.20 % top-1, 6.00 ms per image"
    )
    assert focused.get_attribute("aria-pressed") == "true"
    card = text(page, ".card")
    for said in (
        "6.00 ms",
        "7.50 ms",
        "9.00 ms",
        "10.5 ms",
        "321 ms",
        "43.2 ms",
        "234 MB",
        "0.567 G",
        "65.4 %",
        "75.20 %",
    ):
        assert said in card, said
    assert "1.50× (1.35–1.65) the time of shvit_s1, onnxruntime fp32" in card
    baseline = next(each for each in all_of(page, ".point") if each.get_attribute("textContent") == "baseline")
    ActionChains(page).move_to_element(baseline.find_element("css selector", ".mark")).perform()
    assert text(page, ".card h3") == "baseline"
    assert "too noisy to decide (0.500–1.90)" in text(page, ".card")
    hostile = next(each for each in all_of(page, ".point") if each.get_attribute("textContent") == HOSTILE)
    ActionChains(page).move_to_element(hostile.find_element("css selector", ".mark")).perform()
    assert "too few rounds to decide (1.70–1.75)" in text(page, ".card")  # few rounds leave a narrow interval
    ActionChains(page).send_keys(Keys.ESCAPE).perform()
    assert text(page, ".card h3") == text(page, ".winner")


def test_selects_change_the_points_and_the_front(page):
    assert names(page) == ["shvit_s1", "baseline", "shvit_s2", HOSTILE, "shvit_s4", "heavy"]
    choose(page, "form", "openvino int8")
    assert names(page) == ["shvit_s1", "shvit_s4"]
    choose(page, "batch", "16")
    assert names(page) == []
    assert "choose another batch size" in text(page, ".verdict")
    choose(page, "form", "best")
    assert names(page) == ["shvit_s1", "shvit_s2"]
    front = page.find_element("css selector", ".plot .front").get_attribute("d")
    places = [re.findall(r"[\d.]+", each.get_attribute("transform")) for each in all_of(page, ".point")]
    assert front == "M{},{}H{}V{}".format(*places[0], *places[1])


def test_every_case_is_in_the_table_and_it_sorts(page):
    def column(index: int) -> list[str]:
        return [row.text for row in all_of(page, f"#results tbody tr > :nth-child({index})")]

    assert sorted(column(1)) == sorted(each.model for each in MEASUREMENTS.results)
    heads = all_of(page, "#results thead button")
    index = 1 + [head.text.split(" ms")[0].strip() for head in heads].index("p50")
    for direction, sign in (("ascending", 1), ("descending", -1)):
        heads[index - 1].click()
        assert (
            page.find_element("css selector", f"#results th:nth-child({index})").get_attribute("aria-sort") == direction
        )
        milliseconds = [float(figure) for figure in column(index)]
        assert milliseconds == sorted(milliseconds, key=lambda ms: sign * ms)
    index = 1 + next(i for i, head in enumerate(heads) if "peak" in head.text)
    heads[index - 1].click()
    assert column(index)[-1] == "–"  # unknown goes last
    set_value(page, "filter", "openvino s4")
    assert column(1) == ["shvit_s4"]


SIZES = replace(MEASUREMENTS, results=tuple(
    result("shvit_s1", top1, ms, img_size=ImgSize.of(size))
    for top1, ms, size in ((72.8, 4.0, 224), (70.0, 3.0, "64x640"), (71.0, 2.0, "640x64"), (60.0, 1.0, "64"))
))  # fmt: skip


@pytest.mark.parametrize("page", [SIZES], indirect=True)
def test_size_is_one_number_or_height_and_width(page):
    assert names(page) == [f"shvit_s1 @{size}" for size in ("64", "640x64", "64x640", "224")]
    head = next(each for each in all_of(page, "#results thead button") if each.text == "px")
    index = 1 + all_of(page, "#results thead button").index(head)
    head.click()
    shown = [row.text for row in all_of(page, f"#results tbody tr > :nth-child({index})")]
    assert shown == ["64", "64x640", "640x64", "224"]  # by their pixels
    assert " px, batch 1" in text(page, ".card")


def test_growth_layers_and_machine_are_shown(page):
    said = text(page, "main")
    for part in (
        "Growth with the batch",
        "Growth with resolution",
        "Where the time goes",
        "A & B <cpu>, 2 cores",
        "17.5 GB/s",
    ):
        assert part in said, part
    assert len(all_of(page, ".series circle")) == 4 + 3  # a memory of 0 cannot be drawn on a logarithmic axis
    powers = [each.get_attribute("textContent") for each in all_of(page, ".power sup")]
    assert powers == ["−0.21", "0.04", "1.00", "0.04"]
    pieces = all_of(page, ".stack span")
    assert [piece.text for piece in pieces] == ["60 %", "40 %"]  # the larger kind first
    assert pieces[0].size["width"] == pytest.approx(1.5 * pieces[1].size["width"], rel=0.01)
    assert [each.text for each in all_of(page, ".swatch + *, li:has(.swatch)")] == ["<i>", "attention"]


phones = pytest.mark.parametrize("page", [PHONES], indirect=True, ids=["phones"])


def forms(browser) -> list[str]:
    """What the card lists, with the devices as heads."""
    return [each.text.replace("\n", " ") for each in all_of(browser, ".forms h5, .forms > div")]


@phones
def test_device_select_changes_the_points_and_what_they_run_in(page):
    def chosen() -> list[tuple[str, ...]]:
        return [
            tuple(each.get_attribute("aria-label").split(": ")[0].split(", ", 1)) for each in all_of(page, ".point")
        ]

    def offered(name: str) -> list[str]:
        return [each.text for each in all_of(page, f"#{name} option")]

    assert offered("device") == ["A & B <cpu>", PHONE, OTHER, "all devices side by side"]
    assert page.find_element("css selector", "#device option:checked").text == PHONE  # a phone, if there is one
    assert chosen() == [(HOSTILE, "webgpu fp16"), ("shvit_s1", "webgpu fp16"), ("shvit_s4", "wasm fp32")]
    assert offered("form") == ["best form of each model", "wasm fp32", "webgpu fp16"]
    assert offered("batch") == ["1"]
    choose(page, "form", "wasm fp32")
    assert chosen() == [("shvit_s1", "wasm fp32"), ("shvit_s4", "wasm fp32")]
    choose(page, "device", "0")
    assert chosen() == [("shvit_s1", "onnxruntime fp32"), ("shvit_s4", "onnxruntime fp32")]
    assert offered("batch") == ["1", "16"]
    choose(page, "batch", "16")
    assert names(page) == ["shvit_s1"]
    choose(page, "device", "2")
    assert names(page) == ["shvit_s1", "shvit_s4"]
    assert len(all_of(page, ".plot .front")) == 1
    set_value(page, "budget-ms", 20)
    assert text(page, ".verdict").startswith(
        "Within 20 ms per image, the most accurate is shvit_s1: 72.80 % top-1 in 19.0"
    )
    assert "hollow" in text(page, ".key")


@phones
def test_all_devices_side_by_side(page):
    choose(page, "device", "all")
    said = [each.get_attribute("aria-label").split(":")[0] for each in all_of(page, ".point")]
    assert said == [
        f"{HOSTILE}, webgpu fp16 on {PHONE}",
        "shvit_s1, onnxruntime fp32 on A & B <cpu>",
        f"shvit_s1, webgpu fp16 on {PHONE}",
        "shvit_s4, onnxruntime fp32 on A & B <cpu>",
        f"shvit_s1, wasm-4-threads fp32 on {OTHER}",
        f"shvit_s4, wasm fp32 on {PHONE}",
        f"shvit_s4, wasm-4-threads fp32 on {OTHER}",
    ]
    assert len(all_of(page, ".plot .front")) == 3
    fill = "return getComputedStyle(arguments[0]).fill"
    colors = {page.execute_script(fill, each) for each in all_of(page, "circle + .mark")}
    assert len(colors - {"rgb(252, 252, 251)"}) >= 2  # a color for each device; a hollow mark is of paper
    set_value(page, "budget-ms", 15)
    lines = [each.text.replace("\xa0", " ") for each in all_of(page, ".verdict .line")]
    assert lines == [
        "on A & B <cpu>: shvit_s4, 79.40 % top-1 in 15.0 ms, onnxruntime fp32.",
        f"on {PHONE}: shvit_s1, 72.80 % top-1 in 5.00 ms, webgpu fp16.",
        f"on {OTHER}: none: the fastest, shvit_s1, takes 19.0 ms.",
    ]
    assert sorted(names(page, ".point.best")) == ["shvit_s1", "shvit_s4"]


DISTURBED = replace(
    MEASUREMENTS,
    results=tuple(
        replace(each, ratio_basis="processor time", preempted_percent=47.5) for each in MEASUREMENTS.results[:3]
    ),
)


@pytest.mark.parametrize("page", [DISTURBED], indirect=True, ids=["busy machine"])
def test_ratios_of_processor_times_are_called_that(page):
    set_value(page, "budget-ms", 30)
    assert "3.75× (3.38–4.13) the processor time of shvit_s1, onnxruntime fp32." in text(page, ".card")
    cost = dict(zip(*([each.text for each in all_of(page, f".card {tag}")] for tag in ("dt", "dd")), strict=True))
    assert cost["core taken by other programs"].replace("\xa0", " ") == "47.5 % of the time"
    heads = [each.text.strip(" ↕") for each in all_of(page, "#results thead button")]
    cells = [each.text for each in all_of(page, "#results tbody td")][: len(heads) - 1]
    assert cells[heads.index("ratio") - 1].endswith(" CPU")
    assert "CPU: a ratio of processor times, as other programs had the core meanwhile" in text(page, "main")


@phones
def test_card_has_the_forms_of_every_device_and_a_ratio_within_one(page):
    set_value(page, "budget-ms", 30)
    assert text(page, ".card h3") == "shvit_s4"
    assert f"wasm fp32 on {PHONE}, 224 px" in text(page, ".card")
    assert "3.75× (6.75–8.25) the time of shvit_s1, wasm fp32." in text(page, ".card")
    cost = dict(zip(*([each.text for each in all_of(page, f".card {tag}")] for tag in ("dt", "dd")), strict=True))
    assert (cost["processor time"], cost["peak memory"]) == ("–", "–")
    listed = [
        "A & B <cpu>",
        "onnxruntime fp32 15.0",
        PHONE,
        "wasm fp32 30.0",
        OTHER,
        "wasm-4-threads fp32 60.0",
    ]
    assert forms(page) == listed
    assert len(all_of(page, ".ghosts path")) == 1  # the chart has this device alone
    choose(page, "device", "all")
    set_value(page, "budget-ms", 30)
    assert forms(page) == listed
    assert len(all_of(page, ".ghosts path")) == 3


@phones
def test_table_tells_devices_and_finds_them(page):
    heads = [each.text.strip(" ↕") for each in all_of(page, "#results thead button")]
    assert heads[2] == "device"
    assert len(all_of(page, "#results tbody tr")) == len(PHONES.results)
    set_value(page, "filter", "the old s4")
    (row,) = all_of(page, "#results tbody tr")
    cells = [each.text for each in row.find_elements("css selector", "th, td")]
    assert cells[:4] == ["shvit_s4", "wasm-4-threads fp32", OTHER, "60.0"]
    assert (cells[heads.index("CPU ms")], cells[heads.index("memory MB")]) == ("–", "–")


@phones
def test_checks_sustained_runs_and_devices_are_told(page):
    rows = [[each.text for each in row.find_elements("css selector", "th, td")] for row in all_of(page, "#checks tr")]
    assert rows[1] == ["shvit_s1", "passed", "wasm fp32", PHONE, "16", "1.3e-6", "118.3", "100.0", "–"]
    assert rows[2][:3] == ["shvit_s4", "failed", "webgpu fp16"]
    assert rows[2][4:] == ["16", "7.5e-1", "9.5", "12.5", f"SNR 9.5 dB is below 40 dB {HOSTILE}"]
    assert rows[3][4:] == ["0", "–", "–", "–", "no navigator.ml"]
    assert rows[4][5:7] == ["0", "∞"]
    said = text(page, "main")
    assert "2 of 4 files failed and were not timed." in said
    color = "return getComputedStyle(document.querySelector(arguments[0])).color"
    passed, failed = (page.execute_script(color, f"{row} .outcome") for row in ("tr:not(.failed)", "tr.failed"))
    assert passed != failed
    assert [each.text for each in all_of(page, ".runs .words")] == [
        "throttles: 1.34× slower at the end",
        "sustains its speed: 1.01×",
    ]
    assert [each.get_attribute("textContent") for each in all_of(page, ".runs .caption")] == [
        f"shvit_s1 wasm fp32 on {PHONE}",
        f"{HOSTILE} wasm-4-threads fp32 on {OTHER}",
    ]
    assert [each.get_attribute("d").count("L") for each in all_of(page, ".runs .series path")] == [4, 4]
    memory = "memory\nthe browser does not report it"
    for part in ("arm valhall", "no webnn\nno navigator.ml", memory, "GPU\nno WebGPU"):
        assert part in said, part
    assert f"Measured on A & B <cpu>, {PHONE} and {OTHER}: 3 models, 9 results." in said


@pytest.mark.parametrize(
    "page",
    [replace(PHONES, machine=None, results=PHONES.results[3:7], checks=PHONES.checks[:1], sustained=())],
    indirect=True,
    ids=["one-phone"],
)
def test_page_of_one_phone_and_no_machine(page):
    said = text(page, "main")
    assert f"Measured on {PHONE}: 3 models, 4 results." in said
    assert all_of(page, "#device") == []
    assert [each.text for each in all_of(page, "h2")] == ["Numerics on the device", "All results", "Devices"]
    assert "The file's outputs match." in said
    assert "device" not in text(page, "#results thead")
    assert names(page) == [HOSTILE, "shvit_s1", "shvit_s4"]


@phones
@pytest.mark.parametrize(("width", "scheme"), [(360, "light"), (390, "dark")])
def test_page_of_phones_fits_a_phone(page, width, scheme):
    show(page, width, 740, prefers_color_scheme=scheme)
    page.refresh()
    choose(page, "device", "all")
    assert page.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]") == [width, width]
    assert all(0.7 * width < each.size["width"] <= width for each in all_of(page, ".plot svg"))


def test_hostile_names_stay_text(page):
    assert all_of(page, "main img") == []
    assert len(all_of(page, "script")) == 2
    assert HOSTILE in names(page)
    set_value(page, "budget-ms", 1)
    hostile = next(each for each in all_of(page, ".point") if each.get_attribute("textContent") == HOSTILE)
    page.execute_script("arguments[0].focus()", hostile)
    assert text(page, ".card h3") == HOSTILE


@pytest.mark.parametrize(("width", "scheme"), [(360, "light"), (390, "dark")])
def test_page_fits_a_phone(page, width, scheme):
    show(page, width, 740, prefers_color_scheme=scheme)
    page.refresh()
    assert page.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]") == [width, width]
    background = page.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 200) == (scheme == "dark")
    chart = page.find_element("css selector", ".plot svg").size
    assert 0.8 * width < chart["width"] <= width
    show(page, 1280, 900)  # turned, it is drawn anew
    page.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
    assert page.find_element("css selector", ".plot svg").size["width"] > chart["width"]


def test_nothing_published_and_nothing_at_all(page, tmp_path):
    unrated = replace(MEASUREMENTS, results=(result("mine.onnx", None, 3.0),), layers=(), scaling=())
    write_explorer(tmp_path / "unrated.html", unrated)
    open_page(page, tmp_path / "unrated.html")
    assert "No model here has a published accuracy" in text(page, "main")
    assert text(page, "#results tbody th") == "mine.onnx"
    write_explorer(tmp_path / "empty.html", replace(unrated, results=()))
    open_page(page, tmp_path / "empty.html")
    assert "Nothing was measured." in text(page, "main")


def test_policy_lets_no_other_script_run_and_nothing_load(browser, tmp_path):
    """What a hostile name would do if it ever became markup."""
    write_explorer(tmp_path / "report.html", MEASUREMENTS)
    open_page(browser, tmp_path / "report.html")
    network(browser, "loadingFailed")
    markup = '<img src="http://example.org/a" onerror="document.title = 1">'
    browser.execute_script("document.body.insertAdjacentHTML('beforeend', arguments[0])", markup)
    script = "const done = arguments[0]; fetch('http://example.org/').then(() => done('sent'), () => done('refused'));"
    assert browser.execute_async_script(script) == "refused"
    assert browser.title == TITLE
    complaints = [entry["message"] for entry in browser.get_log("browser")]
    assert len(complaints) >= 2
    assert all("Content Security Policy" in said for said in complaints)
    assert {said["blockedReason"] for said in network(browser, "loadingFailed")} == {"csp"}


def test_page_is_one_file_that_asks_for_nothing(tmp_path):
    write_explorer(tmp_path / "report.html", MEASUREMENTS)
    written = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in written
    assert not re.search(r"""(src|href)=["'](?!data:)""", written.replace(json.dumps(HOSTILE)[1:-1], ""))
    assert "innerHTML" not in written
    assert written.count("</script>") == 2
    (block,) = re.findall(r'<script type="application/json" id="shvit-measurements">(.*?)</script>', written)
    assert json.loads(block)["results"][8]["model"] == HOSTILE
    assert json.loads(block)["results"][10]["ratio_low"] is None
