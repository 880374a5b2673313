"""The page that measures, in a real browser that reaches nothing but its server."""

import json
import os
import threading
import time
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from rich.console import Console

from shvit import cli
from shvit.errors import CheckFailed, InputError
from shvit.export.backends.registry import load_artifact
from shvit.export.bench.cases import Settings
from shvit.export.bench.records import read_measurements
from shvit.export.browser import main as browser_main
from shvit.export.browser import served as served_module
from shvit.export.browser.main import BenchPhone
from shvit.export.browser.ort_web import runtime_files
from shvit.export.browser.served import Pace, create_contents, policy, prepare_models, select_images, tolerance
from shvit.export.browser.site import write_site
from shvit.export.browser.tls import self_signed
from shvit.export.images import read_pixels
from shvit.export.verdict import TOLERANCES, compare, judge
from shvit.export.web import Content
from shvit.train.data.images import open_image
from tests.browser import OTHER_NAME, open_browser
from tests.browser import serve as serve_folder
from tests.conftest import LABELS
from tests.export.browser.serving import TOKEN, Serving

PACE = Pace(rounds=2, round_s=0.05, sustained_s=2)
PRECISIONS = ("fp32", "fp16", "int8")
SHORT = ["--rounds", "2", "--sustained", "2"]


pytestmark = pytest.mark.usefixtures("runtime")


@pytest.fixture(scope="module")
def runtime():
    """ONNX Runtime for browsers, from the cache or npm."""
    try:
        return runtime_files(None)
    except InputError as error:
        return pytest.fail(str(error)) if os.environ.get("CI") else pytest.skip(str(error))


@pytest.fixture(scope="module")
def tried(tmp_path_factory, mine):
    """tiny_vit in each precision, and the file."""
    settings = Settings(threads=1, img_size=64)
    return prepare_models(["tiny_vit", str(mine)], PRECISIONS, settings, None, tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def served(tried, runtime):
    return create_contents(tried, select_images(None), runtime, PACE, "records")


@pytest.fixture(scope="module")
def serving(served):
    with Serving(served, policy(hosted=True), time_limit_s=600) as opened:
        yield opened


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    arguments = (
        "--ignore-certificate-errors",
        "--use-fake-device-for-media-stream",
        "--use-fake-ui-for-media-stream",
    )
    with open_browser(tmp_path_factory.mktemp("profile"), *arguments, browser="ALL", performance="ALL") as opened:
        opened.set_script_timeout(120)
        size = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
        opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        yield opened


def wait(browser, expression, seconds=120):
    """Until a JavaScript expression is true; its value."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := browser.execute_script(f"return {expression}"):
            return value
        time.sleep(0.1)
    raise AssertionError(f"{expression}: not within {seconds} s; {text(browser, 'body')}")


def text(browser, selector):
    return browser.find_element("css selector", selector).text


def show(browser, address):
    browser.get(address)
    wait(browser, "document.getElementById('shvit-phone')?.dataset.ready")
    return browser


def at(serving, host="127.0.0.1", scheme="http"):
    return f"{scheme}://{host}:{serving.port}/{TOKEN}/"


def check_first(browser, **limits):
    """Check only so many boxes of a name: `models` or `backends`."""
    script = (
        "document.querySelectorAll(`[name=${arguments[0]}]`).forEach((box, i) => { box.checked = i < arguments[1]; })"
    )
    for name, limit in limits.items():
        browser.execute_script(script, name.removesuffix("s"), limit)
    return browser


def measure(browser, length="quick"):
    """Press the button and return the status at the end."""
    browser.execute_script("document.querySelector('#length').value = arguments[0]", length)
    browser.execute_script("document.querySelector('#status').textContent = ''")
    browser.find_element("css selector", "#start").click()
    wait(browser, "!document.querySelector('#start').disabled && document.querySelector('#status').textContent")
    return text(browser, "#status")


def call(browser, code, *arguments):
    """The value of asynchronous code in the page, to which measure.js is known as `m` and served.json as `served`."""
    script = f"""const done = arguments[arguments.length - 1]; const a = arguments;
        (async () => {{ const m = await import('./measure.js');
        const served = await (await fetch('served.json')).json(); {code} }})()
        .then((value) => done([value, null]), (error) => done([null, String(error.stack)]))"""
    value, error = browser.execute_async_script(script, *arguments)
    assert error is None, error
    return value


# --- measuring --------------------------------------------------------------------------------------------------------


def test_a_browser_checks_times_and_sends(browser, serving, tried):
    browser.get_log("browser")
    browser.get_log("performance")
    page = show(browser, at(serving))
    assert page.execute_script("return self.crossOriginIsolated")
    assert measure(page, "full") == "done and sent"
    record = serving.records[-1]
    backends = list(dict.fromkeys((case.backend, case.threads) for case in record.cases))
    assert backends[0] == ("wasm", 1)
    assert len(record.cases) == len(tried) * len(backends)
    assert {case.model for case in record.cases} == {"tiny_vit", "mine.onnx"}
    for case in record.cases:
        assert case.error == "", [(c.backend, c.threads, c.model, c.precision, c.error) for c in record.cases]
        assert (case.check.passed, case.check.images) == (True, len(select_images(None)))
        assert [len(calls) >= 3 for calls in case.rounds] == [True, True]
        assert case.load_ms > 0
        if case.precision == "fp32" and case.backend == "wasm":
            assert case.check.max_rel_error < 1e-4
    assert [len(run.seconds) for run in record.sustained] == [2] * len(backends)
    assert len({record.cases[run.case].model for run in record.sustained}) == 1
    asked = {request for request in requests(page) if not request.startswith("blob:")}
    assert asked
    assert all(request.startswith((at(serving), "data:")) for request in asked)
    severe = [entry["message"] for entry in page.get_log("browser") if entry["level"] == "SEVERE"]
    assert severe == []


def requests(browser):
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_gpu_has_the_outputs_too(tried, runtime, tmp_path, precision):
    """WebGPU for real, on a GPU in software, which is slow and computes no float16."""
    models = [each for each in tried[:3] if each.spec.precision in (precision, "fp16")]
    served = create_contents(models, select_images(None)[:2], runtime, PACE, "records")
    arguments = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader")
    with Serving(served, policy(hosted=True)) as serving, open_browser(tmp_path, *arguments) as browser:
        page = show(browser, at(serving))
        boxes = page.find_elements("css selector", "[name=backend]")
        for box in boxes[:-1]:
            box.click()
        assert measure(page) == "done and sent"
        [record] = serving.records
    assert record.device.gpu
    assert record.device.missing["fp16 in WebGPU"] == "this GPU does not support float16"
    [case] = record.cases
    assert (case.backend, case.precision, case.error, case.check.passed) == ("webgpu", precision, "", True)
    assert case.check.max_rel_error < {"fp32": 1e-4, "int8": 0.4}[precision]
    assert case.cpu_fallback == (precision == "int8")  # the CPU has what WebGPU lacks of 8 bits


@pytest.mark.parametrize("threads", [1, 2])
def test_outputs_are_those_of_onnx_runtime_on_this_machine(browser, serving, tried, threads):
    show(browser, at(serving))
    code = """const [backend] = (await m.listBackends()).backends.filter(({ name }) => name === "wasm");
        const engine = await m.Engine.start({ ...backend, threads: a[0] }, served.runtime);
        const all = [];
        for (const model of served.models) {
          await engine.open(model);
          const { outputs } = await engine.request("run", { inputs: await m.imagesOf(served, model) });
          all.push(outputs.map((output) => [...output]));
        }
        engine.end();
        return all;"""
    for each, outputs in zip(tried, call(browser, code, threads), strict=True):
        expected = load_artifact(each.path)(read_pixels(select_images(None), each.spec))
        allowed = TOLERANCES[each.spec.precision]
        found = compare(expected, torch.tensor(outputs), allowed)
        assert found["max_rel_error"] < allowed.max_rel_error
        assert found["size_snr_db"] > allowed.snr_db
        assert found["top1_agreement"] == 100


def test_figures_and_verdicts_are_the_certificates(browser, serving):
    """measure.js against verdict.py, on outputs that differ a little and a lot, with near-ties and without evidence."""
    show(browser, at(serving))
    generator, seen = np.random.default_rng(0), set()
    code = "return m.compare(Float32Array.from(a[0]), a[1].map((x) => Float32Array.from(x)), a[2], a[3])"
    for classes, offset, noise in product((1, 2, 10), (0.0, 6.0, 300.0), (0.0, 1e-3, 0.02, 0.05, 0.2, 0.5)):
        expected = (offset + generator.normal(size=(8, classes))).astype(np.float32)
        outputs = (expected + noise * generator.normal(size=expected.shape)).astype(np.float32)
        for precision, probabilities in (("fp32", False), ("int8", False), ("int8", True)):
            served = tolerance(precision, 8)
            found = call(browser, code, expected.ravel().tolist(), outputs.tolist(), served, probabilities)
            allowed = TOLERANCES[precision]
            wanted = compare(torch.tensor(expected), torch.tensor(outputs), allowed, probabilities)
            scale = "size_snr_db" if offset == 300 else "snr_db"
            assert found["snr_db"] == pytest.approx(wanted[scale], rel=1e-5, abs=1e-6)
            agreement = 100 if classes == 1 else wanted["top1_agreement"]  # of one output the page says so
            assert found["top1_agreement"] == pytest.approx(agreement)
            if offset < 300:
                assert found["max_rel_error"] == pytest.approx(wanted["max_rel_error"], rel=1e-4, abs=1e-6)
                verdict, _ = judge(wanted, allowed, 8)
                assert found["passed"] == (verdict != "refused")
                seen.add((offset, verdict))
    assert seen >= {(0.0, "passed"), (0.0, "refused"), (6.0, "passed"), (6.0, "refused"), (6.0, "undecided")}


def test_what_went_wrong_is_refused_before_it_is_timed(browser, served):
    described = json.loads(served["served.json"].source)
    url = described["models"][0]["file"]["url"]
    content = bytearray(served[url].source.read_bytes())
    content[len(content) // 2] ^= 1
    damaged = {**served, url: Content(bytes(content), served[url].type)}
    gone = described["models"][1]["file"]["url"]
    del damaged[gone]
    with Serving(damaged, policy(hosted=True)) as serving:
        page = check_first(show(browser, at(serving)), backends=1)
        assert measure(page) == "done and sent"
        bad, lost, *good = [case for case in serving.records[-1].cases if case.backend == "wasm" and case.threads == 1]
        assert bad.error == "tiny_vit fp32 is damaged: its SHA-256 is not the expected one"
        assert lost.error.startswith("tiny_vit fp16 cannot be fetched")
        assert (bad.rounds, lost.rounds, bad.check) == ([], [], None)
        assert all(case.rounds and not case.error for case in good)
        assert "tiny_vit fp32 is damaged" in text(page, "#chart")
        assert "is damaged" in text(page, "#results")


def test_wrong_outputs_are_refused_before_they_are_timed(browser, tried, runtime, monkeypatch):
    honest = served_module.expected_outputs
    monkeypatch.setattr(served_module, "expected_outputs", lambda *given: honest(*given) + 0.1 * torch.randn(3))
    wrong = create_contents(tried[:1], select_images(None), runtime, PACE, "records")
    with Serving(wrong, policy(hosted=True)) as serving:
        page = show(browser, at(serving))
        assert measure(page).startswith("done and sent; nothing could be timed: wrong outputs: an error of")
        assert all(case.error.startswith("wrong outputs: an error of") for case in serving.records[-1].cases)
        assert not any(case.rounds or case.check.passed for case in serving.records[-1].cases)
        assert "wrong outputs" in text(page, "#chart")


def test_a_damaged_runtime_does_not_run(browser, served):
    name = "ort/ort-wasm-simd-threaded.mjs"
    damaged = {**served, name: Content(served[name].source.read_bytes() + b"\n", served[name].type)}
    with Serving(damaged, policy(hosted=True)) as serving:
        page = show(browser, at(serving))
        measure(check_first(page, backends=1))
        assert {case.error for case in serving.records[-1].cases} == {
            "ONNX Runtime (ort-wasm-simd-threaded.mjs) is damaged: its SHA-256 is not the expected one"
        }


def test_a_refused_record_is_kept(browser, serving):
    page = check_first(show(browser, at(serving)), models=1, backends=1)
    page.execute_script("document.querySelector('#name').value = 'stranger'")
    said = measure(page)
    assert said == "done, but not sent: a record of files that were not served here; save the results as JSON instead"
    assert text(page, "#record h2") == "Results of stranger"
    assert show(browser, at(serving)).find_elements("css selector", "#results tbody tr")  # after it is opened again


def test_it_can_be_stopped(browser, serving):
    page = show(browser, at(serving))
    before = len(serving.records)
    page.execute_script("document.querySelector('#length').value = 'full'")
    page.find_element("css selector", "#start").click()
    wait(page, "/round/.test(document.querySelector('#status').textContent)")
    page.find_element("css selector", "#stop").click()
    wait(page, "!document.querySelector('#start').disabled")
    assert text(page, "#status") == "stopped"
    assert len(serving.records) == before
    page.execute_script("for (const box of document.querySelectorAll('[name=model]')) box.checked = false")
    assert measure(page) == "choose at least one model and one backend"


def test_it_fits_a_small_phone(browser, serving):
    size = {"width": 320, "height": 568, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    check_first(show(browser, at(serving)), models=2, backends=1)
    measure(browser)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 320
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {**size, "width": 390, "height": 844})


# --- secure contexts --------------------------------------------------------------------------------------------------


def test_without_https_the_page_says_what_is_missing_and_why(browser, serving):
    page = show(browser, at(serving, OTHER_NAME))
    assert not page.execute_script("return self.isSecureContext")
    missing = text(page, "#missing")
    for name in ("threads in wasm", "WebGPU", "WebNN"):
        assert f"no {name}: this needs HTTPS or localhost: serve the page with --tls" in missing
    assert len(page.find_elements("css selector", "[name=backend]")) == 1
    assert measure(check_first(page, models=1)) == "done and sent"
    assert {case.threads for case in serving.records[-1].cases} == {1}
    assert "this needs HTTPS" in serving.records[-1].device.missing["threads in wasm"]
    page.find_element("css selector", "#camera").click()
    wait(page, "document.querySelector('#try-status').textContent")
    assert text(page, "#try-status") == "this needs HTTPS or localhost: serve the page with --tls"


def test_with_tls_the_page_has_threads_under_any_name(browser, served):
    with Serving(served, policy(hosted=True), tls=self_signed([OTHER_NAME]).context) as serving:
        page = show(browser, at(serving, OTHER_NAME, "https"))
        assert page.execute_script("return self.crossOriginIsolated")
        assert measure(check_first(page, models=1)) == "done and sent"
        assert max(case.threads for case in serving.records[-1].cases) > 1


# --- try it -----------------------------------------------------------------------------------------------------------


def test_a_chosen_image_gets_the_prediction_that_it_gets_here(browser, serving, mine, tmp_path):
    page = show(browser, at(serving))
    image = select_images(None)[3].path
    page.find_element("css selector", "#image").send_keys(str(image))
    wait(page, "document.querySelectorAll('#predictions > div').length")
    artifact = load_artifact(mine)
    pixels = artifact.spec.transform(normalize=False)(open_image(image))[None]
    chances = artifact(pixels).softmax(1)[0]
    shown = {}
    for row in page.find_elements("css selector", "#predictions > div"):
        label, percent = row.text.removesuffix(" %").split("\n")
        shown[label] = float(percent)
    assert list(shown) == [LABELS[i] for i in chances.argsort(descending=True)]
    assert shown == {label: pytest.approx(100 * float(p), abs=0.06) for label, p in zip(LABELS, chances, strict=True)}
    (tmp_path / "other.jpg").write_bytes(b"no image")
    page.find_element("css selector", "#image").send_keys(str(tmp_path / "other.jpg"))
    wait(page, "document.querySelector('#try-status').classList.contains('bad')")
    assert "other.jpg: not a readable image" in text(page, "#try-status")


def test_the_camera_is_classified_until_it_is_stopped(browser, serving):
    page = show(browser, at(serving))
    page.find_element("css selector", "#camera").click()
    wait(page, "/mine.onnx fp32, wasm, 1 thread: [\\d.]+\\sms/.test(document.querySelector('#try-status').textContent)")
    assert text(page, "#camera") == "Stop the camera"
    assert len(page.find_elements("css selector", "#predictions > div")) == len(LABELS)
    page.find_element("css selector", "#camera").click()
    assert text(page, "#camera") == "Use the camera"


# --- the commands -----------------------------------------------------------------------------------------------------


class Run(threading.Thread):
    """`shvit bench phone` beside the test, and what it prints."""

    def __init__(self, *words, monkeypatch):
        super().__init__()
        self.words, self.result, self.error = words, None, None
        self.console = Console(record=True, width=200, file=open("/dev/null", "w"), markup=False)  # noqa: SIM115, PTH123
        monkeypatch.setattr(browser_main, "console", self.console)

    def run(self):
        try:
            self.result = cli.run(["bench", "phone", *map(str, self.words)])
        except (InputError, CheckFailed) as error:
            self.error = error

    def address(self):
        end = time.monotonic() + 120
        while time.monotonic() < end and self.is_alive():
            lines = [
                line for line in self.console.export_text(clear=False).splitlines() if line.startswith("open http")
            ]
            if lines:
                return lines[0].removeprefix("open ")
            time.sleep(0.2)
        raise AssertionError(self.error)


def test_the_command_from_a_name_to_a_report(browser, quick_machine, tmp_path, monkeypatch):
    run = Run("--models", "test_resnet", "--img-size", "64", *SHORT, "--output", tmp_path, monkeypatch=monkeypatch)
    run.start()
    page = show(browser, run.address())
    page.execute_script("document.querySelector('#name').value = 'Fairphone 6'")
    assert measure(page, "rounds") == "done and sent; the computer has stopped serving"
    run.join(60)
    assert run.error is None
    rows = [(row["device"], row["runtime"], row["precision"]) for row in run.result["results"]]
    assert rows[0] == ("", "onnxruntime", "fp32")
    assert ("Fairphone 6", "wasm", "fp32") in rows
    measured = read_measurements(tmp_path / "bench.json")
    assert [device.name for device in measured.devices] == ["Fairphone 6"]
    printed = run.console.export_text()
    assert "Fairphone 6" in printed
    assert "this machine alone can open it" in printed
    browser.get((tmp_path / "report.html").as_uri())
    assert "Fairphone 6" in text(browser, "#results")
    assert "onnxruntime" in text(browser, "#results")
    again = cli.run(["bench", "import", str(tmp_path / "record-1.json"), "--output", str(tmp_path / "again")])
    assert again["results"] == run.result["results"][1:]


def test_the_command_says_when_nobody_came(quick_machine, mine, tmp_path, monkeypatch):
    run = Run("--models", mine, *SHORT, "--output", tmp_path, "--minutes", "0.01", monkeypatch=monkeypatch)
    run.start()
    run.join(120)
    assert isinstance(run.error, CheckFailed)
    assert str(run.error).startswith("no phone has sent a record; open the address")
    assert "stopped after 0.01 minutes" in run.console.export_text()
    assert len(read_measurements(tmp_path / "bench.json").results) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--port", "70000"], "--port 70000 is out of range"),
        (["--records", "0"], "--records 0 is out of range; choose 1 to 32"),
        (["--minutes", "0"], "--minutes 0 is out of range"),
        (["--rounds", "51"], "--rounds 51 is out of range; choose 1 to 50"),
        (["--sustained", "1"], "--sustained 1 is out of range; choose 2 to 3600"),
        (["--models"], "nothing to try; give at least one model"),
        (["--models", "shvit_s9"], "shvit_s9"),
        (["--models", "none.onnx"], "none.onnx"),
        (["--ort-web", "/dev/null"], "/dev/null: cannot be"),
    ],
)
def test_unusable_options_are_named(words, message, tmp_path):
    with pytest.raises(InputError, match=message):
        cli.run(["bench", "phone", "--output", str(tmp_path / "out"), *words])


# --- the static site --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory, tried, runtime):
    from tests.export.bench.test_explorer import MEASUREMENTS

    folder = tmp_path_factory.mktemp("host")
    served = create_contents(tried[:1], select_images(None), runtime, PACE, None)
    written = write_site(folder / "shvit", served, tried[:1], MEASUREMENTS, hosted=True)
    assert sorted(path for path in (folder / "shvit").rglob("*") if path.is_file()) == sorted(written)
    with serve_folder(folder) as address:
        yield f"{address}/shvit"


def test_a_plain_web_host_can_carry_the_site(browser, site, tmp_path):
    browser.get(f"{site}/index.html")
    assert text(browser, "#models tbody tr").startswith("tiny_vit fp32 64 –")
    browser.find_element("link text", "Explore accuracy and latency").click()
    assert browser.title == "SHViT: accuracy against latency"
    browser.back()
    browser.find_element("link text", "Measure this device").click()
    wait(browser, "self.crossOriginIsolated && document.getElementById('shvit-phone')?.dataset.ready")
    assert measure(browser, "rounds") == "done; the results are kept in this page"
    assert len(browser.find_elements("css selector", "#results tbody tr")) >= 2
    show(browser, f"{site}/measure.html")
    assert len(browser.find_elements("css selector", "#results tbody tr")) >= 2
    allow = {"behavior": "allow", "downloadPath": str(tmp_path)}
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", allow)
    browser.find_element("css selector", "#save").click()
    saved = tmp_path / "shvit-phone.json"
    end = time.monotonic() + 20
    while not saved.exists() and time.monotonic() < end:
        time.sleep(0.1)
    result = cli.run(["bench", "import", str(saved), "--output", str(tmp_path / "report")])
    assert {row["model"] for row in result["results"]} == {"tiny_vit"}
    assert max(row["threads"] for row in result["results"]) > 1


def test_the_site_command(quick_machine, mine, tmp_path):
    result = cli.run(["site", "--models", str(mine), *SHORT, "--output", str(tmp_path / "site")])
    files = set(result["files"])
    assert {"index.html", "measure.html", "explorer.html", "served.json", "_headers", "isolation.js"} <= files
    described = json.loads((tmp_path / "site" / "served.json").read_text())
    assert described["submit"] is None
    assert all(f"ort/{name}" in files for name in runtime_files(None))
    for model in described["models"]:
        assert (tmp_path / "site" / model["file"]["url"]).stat().st_size == model["file"]["bytes"]


@pytest.mark.parametrize("damaged", [False, True])
def test_a_runtime_from_another_host_runs_if_its_hash_is_right(browser, tried, runtime, tmp_path, monkeypatch, damaged):
    for name, path in runtime.items():
        (tmp_path / name).write_bytes(path.read_bytes() + (b"\n" if damaged and name == "ort.wasm.min.mjs" else b""))
    with serve_folder(tmp_path, shared=True) as cdn:
        monkeypatch.setattr(served_module, "CDN", f"{cdn}/")
        served = create_contents(tried[:1], select_images(None), None, PACE, "records")
        with Serving(served, policy(hosted=False)) as serving:
            page = show(browser, at(serving))
            message = "ONNX Runtime (ort.wasm.min.mjs) is damaged: its SHA-256 is not the expected one"
            assert measure(page) == "done and sent" + (f"; nothing could be timed: {message}" if damaged else "")
            assert {case.error for case in serving.records[-1].cases} == {message if damaged else ""}


def test_help_tells_the_commands(capsys):
    for words in (["phone"], ["import"]):
        with pytest.raises(SystemExit):
            cli.run(["bench", *words, "--help"])
        assert f"usage: shvit bench {words[0]}" in capsys.readouterr().out


def test_defaults_of_the_command_are_the_paces():
    assert replace(PACE, rounds=BenchPhone.rounds, sustained_s=BenchPhone.sustained) == replace(
        Pace(), round_s=PACE.round_s
    )
