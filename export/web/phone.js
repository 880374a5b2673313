// The page that measures: its form, its chart and its "Try it" section; measure.js does the measuring.
// Everything is built inside #shvit-phone; names are only ever set as text.
import { counted, h, number, scroller, section, sizeText, svg } from "./elements.js";
import {
  Engine, inputOf, labelOf, labelsOf, listBackends, measure, nameOf, needsHttps, plain, quantile, secondsOf, slowdownOf,
} from "./measure.js";
import { cut, readImage, sidesOf } from "./pixels.js";

const STORAGE_KEY = "shvit-phone-record"; // of the last record in the browser's storage
const root = document.getElementById("shvit-phone");

const mega = (bytes) => `${(bytes / 1e6).toFixed(1)}\u00a0MB`;
const lookOf = ({ name, threads }) => (name === "wasm" && threads > 1 ? "threads" : name);
const setText = (element, text, kind = "") => { element.textContent = text; element.className = kind; };

// --- what to measure --------------------------------------------------------------------------------------------------

/** Returns a name to begin with: the phone's model where the browser reports it. */
async function guessName() {
  const { model } = await navigator.userAgentData?.getHighEntropyValues(["model"]).catch(() => null) ?? {};
  const agent = navigator.userAgent;
  return model || ["iPhone", "iPad", "Android", "Macintosh", "Windows", "Linux"].find((word) => agent.includes(word))
    || "device";
}

const choice = (name, value, text, aside, note, checked = true) => {
  const id = `${name}-${value}`;
  return h("div", { class: "choice" },
    h("input", { type: "checkbox", id, name, value, checked }), h("label", { for: id }, text),
    h("span", { class: "aside" }, aside), note ? h("span", { class: "note" }, note) : null);
};

function form(served, { backends, missing }, name) {
  const why = h("ul", { class: "note", id: "missing" },
    ...Object.entries(missing).map(([name, reason]) => h("li", {}, `no ${name}: ${reason}`)));
  const heaviest = served.models.reduce((best, each, i) => (each.gmacs > (served.models[best].gmacs ?? 0) ? i : best), 0);
  return h("form", {},
    h("label", { class: "field" }, "What to call this device",
      h("input", { type: "text", id: "name", maxlength: 80, required: "", value: name, autocomplete: "off" })),
    h("fieldset", {}, h("legend", {}, "Run in"),
      ...backends.map((backend, i) => choice("backend", i, labelOf(backend), "", "")),
      Object.keys(missing).length ? why : null),
    h("fieldset", {}, h("legend", {}, "Models"),
      ...served.models.map((model, i) => choice("model", i, nameOf(model), mega(model.file.bytes),
        [model.top1 ? `${model.top1} % top-1 published` : "", model.gmacs ? `${model.gmacs.toFixed(2)} GMACs` : "",
          model.trained ? "" : "random weights: only useful for benchmarking"].filter(Boolean).join(", ")))),
    h("label", { class: "field" }, "How long", h("select", { id: "length" },
      h("option", { value: "full" },
        `${served.pace.rounds} rounds, then ${served.pace.sustained_s} s sustained in each backend`),
      h("option", { value: "rounds" }, `${served.pace.rounds} rounds`),
      h("option", { value: "quick" }, "1 round"))),
    h("label", { class: "field" }, "Model of the sustained runs", h("select", { id: "sustained" },
      ...served.models.map((model, i) => h("option", { value: i, selected: i === heaviest }, nameOf(model))))),
    h("p", { class: "note", id: "estimate" }),
    h("div", { class: "buttons" },
      h("button", { class: "main", id: "start" }, "Measure"),
      h("button", { type: "button", id: "stop", disabled: "" }, "Stop")));
}

const checked = (name) =>
  [...root.querySelectorAll(`input[name=${name}]:checked`)].map((input) => Number(input.value));

/** Returns the form's choices for `measure`; each model is timed in all backends one after the other. */
function planOf(served, { backends }) {
  const chosen = checked("backend").map((i) => backends[i]);
  const models = checked("model").map((i) => served.models[i]);
  const cases = models.flatMap((model) => chosen.map((backend) => ({ model, backend })))
    .filter(({ model, backend }) => !backend.lacks.includes(model.precision));
  const length = root.querySelector("#length").value;
  const wanted = served.models[root.querySelector("#sustained").value];
  const long = models.includes(wanted) ? wanted : models.at(-1);
  const longCases = cases.map(({ model }, i) => (model === long ? i : -1)).filter((i) => i >= 0);
  return {
    served, cases, rounds: length === "quick" ? 1 : served.pace.rounds, sustained: length === "full" ? longCases : [],
  };
}

/** Returns how long it takes, and how much is downloaded. */
function estimateOf({ served, cases, ...plan }) {
  const builds = new Set(cases.map(({ backend }) => backend.build));
  const files = [...[...builds].flatMap((name) => Object.values(served.runtime.builds[name])),
    ...[...new Set(cases.map(({ model }) => model))].map(({ file }) => file)];
  const minutes = Math.ceil(secondsOf({ served, cases, ...plan }) / 60);
  return `${counted(cases.length, "case")}, about ${counted(minutes, "minute")}; `
    + `${mega(files.reduce((sum, { bytes }) => sum + bytes, 0))} to download`;
}

// --- charts -----------------------------------------------------------------------------------------------------------

/** Returns bars of the median by model and backend; a failed case shows its error. */
function chart(cases) {
  const medians = cases.map((item) => (item.rounds.length ? quantile(item.rounds.flat(), 0.5) : 0));
  const longest = Math.max(...medians, 1e-9);
  const groups = new Map();
  cases.forEach((item, i) => groups.set(item.model, [...(groups.get(item.model) ?? []), i]));
  return [...groups].map(([model, indices]) => h("div", {},
    h("h3", {}, nameOf(model), h("span", { class: "note" }, ` ${sizeText(model.spec.img_size)} px`)),
    ...indices.map((i) => {
      const { backend, check, error, rounds } = cases[i];
      const bar = h("i", {});
      bar.style.width = `${(42 * medians[i]) / longest}%`;
      return h("div", { class: `case ${lookOf(backend)}` }, h("span", {}, labelOf(backend)),
        medians[i] ? h("span", { class: "bar" }, bar,
          h("span", {}, number(medians[i], "ms"), h("span", { class: "note" },
            ` p90 ${number(quantile(rounds.flat(), 0.9))}`)))
          : error ? null : h("span", { class: "note" }, check ? `${check.snr_db.toFixed(0)} dB, to be timed` : "…"),
        error ? h("span", { class: "why" }, error) : null);
    })));
}

/** Returns a chart of the milliseconds of each second. */
function spark(seconds, item) {
  const [width, height] = [340, 96];
  const highest = 1.15 * Math.max(...seconds);
  const x = (i) => 8 + ((width - 16) * i) / Math.max(seconds.length - 1, 1);
  const y = (ms) => height - 8 - ((height - 30) * ms) / highest;
  const title = `${nameOf(item.model)}, ${labelOf(item.backend)}: ${number(quantile(seconds, 0.5))} ms, `
    + `${slowdownOf(seconds).toFixed(2)}× the initial latency at the end`;
  return h("figure", { class: lookOf(item.backend) }, h("figcaption", { class: "note" }, title),
    svg("svg", { class: "spark", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": title },
      svg("path", { d: seconds.map((ms, i) => `${i ? "L" : "M"}${x(i)},${y(ms)}`).join("") }),
      svg("text", { x: 8, y: 14 }, `${number(Math.max(...seconds))} ms at most`)));
}

const HEADS = ["file", "in", "p50 ms", "p90 ms", "p99 ms", "load ms", "first ms", "dB", "same top-1"];

/** Returns a record as a table. */
function table({ cases }) {
  return scroller("All results",
    h("table", { id: "results" }, h("thead", {}, h("tr", {}, ...HEADS.map((head) => h("th", { scope: "col" }, head)))),
      h("tbody", {}, ...cases.map(({ backend, threads, cpu_fallback: cpuFallback, rounds, error, check, ...item }) => {
        const calls = rounds.flat();
        const times = [0.5, 0.9, 0.99].map((q) => (calls.length ? quantile(calls, q) : null));
        const where = `${backend}${threads > 1 ? ` ×${threads}` : ""}${cpuFallback ? " and CPU" : ""}`;
        return h("tr", {}, h("th", { scope: "row" }, `${item.model} ${item.precision}`), h("td", {}, where),
          ...(error && !calls.length ? [h("td", { colspan: 5, class: "bad" }, error)]
            : [...times, item.load_ms, item.first_ms].map((value) => h("td", {}, number(value)))),
          h("td", {}, number(check?.snr_db)), h("td", {}, check ? `${check.top1_agreement.toFixed(0)} %` : "–"));
      }))));
}

// --- results ----------------------------------------------------------------------------------------------------------

const describe = (served, available, measured) => ({
  format: "shvit-phone-1",
  device: {
    name: plain(root.querySelector("#name").value.trim(), 80).trim() || "device",
    browser: plain(navigator.userAgent), cores: navigator.hardwareConcurrency ?? 0,
    memory_gb: navigator.deviceMemory ?? null, gpu: plain(available.gpu), missing: available.missing,
  },
  runtime: `onnxruntime-web ${served.runtime.version}`,
  ...measured,
});

/** Posts the record; returns {awaited}, the number of further records, or {error} if it was refused. */
async function submit(served, record) {
  const response = await fetch(served.submit, {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(record),
  }).catch(() => null);
  const result = await response?.json().catch(() => null);
  return response?.status === 201 ? result : { error: result?.error ?? "the computer does not respond" };
}

/** Returns the status at the end, and its class. */
async function conclude(served, record) {
  const timed = record.cases.some(({ rounds }) => rounds.length);
  const nothing = timed ? "" : `; nothing could be timed: ${record.cases[0].error}`;
  const kind = timed ? "good" : "bad";
  if (!served.submit) return [`done; the results are kept in this page${nothing}`, kind];
  const { awaited, error } = await submit(served, record);
  if (error) return [`done, but not sent: ${error}; save the results as JSON instead${nothing}`, "bad"];
  return [`done and sent${awaited > 0 ? "" : "; the computer has stopped serving"}${nothing}`, kind];
}

function save(record) {
  const url = URL.createObjectURL(new Blob([JSON.stringify(record, null, 1)], { type: "application/json" }));
  h("a", { href: url, download: "shvit-phone.json" }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60000);
}

/** The last record in the browser's storage; nothing where that is closed, or holds something else. */
const store = {
  save(record) {
    try {
      localStorage.setItem(STORAGE_KEY, JSON.stringify(record));
    } catch { /* private windows keep nothing */ }
  },
  show(holder) {
    try {
      const record = JSON.parse(localStorage.getItem(STORAGE_KEY));
      if (record) showRecord(holder, record);
    } catch {
      holder.replaceChildren();
    }
  },
};

function showRecord(holder, record) {
  holder.replaceChildren(h("h2", {}, `Results of ${record.device.name}`), table(record),
    h("div", { class: "buttons" }, h("button", { type: "button", id: "save", onclick: () => save(record) },
      "Save as JSON")),
    h("p", { class: "note" }, "`shvit bench import shvit-phone.json --output report` makes a report of the saved file."));
}

// --- Try it -----------------------------------------------------------------------------------------------------------

const softmax = (logits) => {
  const highest = logits.reduce((a, b) => Math.max(a, b));
  const powers = logits.map((value) => Math.exp(value - highest));
  const sum = powers.reduce((a, b) => a + b);
  return powers.map((value) => value / sum);
};

/** Returns a section, and a function that stops what runs in it. */
function tryIt(served, { backends }) {
  const usable = served.models.filter((model) => model.trained);
  if (!usable.length)
    return { stop() {}, element: section("Try it", h("p", { class: "note" }, "The weights here are random, and so "
      + "would be the predictions. Serve a file with trained weights: shvit bench phone --models mine.onnx")) };
  const model = h("select", { id: "try-model", "aria-label": "Model" },
    ...usable.map((each, i) => h("option", { value: i }, nameOf(each))));
  const backend = h("select", { id: "try-backend", "aria-label": "Runs in" },
    ...backends.map((each, i) => h("option", { value: i }, labelOf(each))));
  const file = h("input", { type: "file", id: "image", accept: "image/*", class: "hidden" });
  const camera = h("button", { type: "button", id: "camera" }, "Use the camera");
  const canvas = h("canvas", { width: 1, height: 1, role: "img", "aria-label": "What the model sees" });
  const predictions = h("div", { class: "predictions", id: "predictions", "aria-live": "polite" });
  const status = h("p", { class: "note", id: "try-status" });
  const seen = h("div", { class: "seen hidden" }, canvas, predictions);
  let open = null; // {key, engine, model, labels}
  let stream = null;
  let image = null; // the last one that was chosen
  let queue = Promise.resolve(); // one image after the other

  async function opened() {
    const key = `${model.value} ${backend.value}`;
    if (open?.key === key && open.engine.worker) return open;
    close();
    const chosen = usable[model.value];
    setText(status, `loading ${nameOf(chosen)}`, "note");
    const engine = await Engine.start(backends[backend.value], served.runtime);
    open = { key, engine, model: chosen, labels: await labelsOf(chosen) };
    await engine.open(chosen);
    return open;
  }
  function close() {
    open?.engine.end();
    open = null;
  }

  async function classify(source) {
    const { engine, model: chosen, labels } = await opened();
    const pixels = cut(await readImage(source), chosen.spec);
    const { outputs: [output], calls: [ms] } = await engine.request("run", { inputs: [inputOf(chosen, pixels)] });
    const chances = chosen.spec.outputs[0] === "logits" ? softmax(output) : output;
    draw(canvas, pixels, chosen.spec);
    seen.classList.remove("hidden");
    const best = [...chances.keys()].sort((a, b) => chances[b] - chances[a]).slice(0, 5);
    predictions.replaceChildren(...best.map((index) => {
      const bar = h("i", {});
      bar.style.width = `${100 * chances[index]}%`;
      return h("div", {}, bar, h("span", {}, h("b", {}, labels[index] ?? `class ${index}`),
        `${(100 * chances[index]).toFixed(1)} %`));
    }));
    setText(status, `${nameOf(chosen)}, ${labelOf(backends[backend.value])}: ${number(ms, "ms")}`, "note");
  }

  const guarded = (work) => () => {
    queue = queue.then(work).catch((error) => {
      stopCamera();
      setText(status, error.message, "bad");
    });
  };
  function stopCamera() {
    for (const track of stream?.getTracks() ?? []) track.stop();
    stream = null;
    camera.textContent = "Use the camera";
  }
  async function watch() {
    if (!navigator.mediaDevices) throw new Error(needsHttps(served.submit));
    const mine = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } })
      .catch((error) => { throw new Error(`no camera: ${error.message}`); });
    stream = mine;
    camera.textContent = "Stop the camera";
    const video = h("video", { playsinline: "" });
    video.muted = true;
    video.srcObject = mine;
    await video.play();
    while (stream === mine) {
      await classify(video);
      await new Promise(requestAnimationFrame);
    }
  }
  const again = guarded(async () => image && !stream && classify(image));
  model.addEventListener("change", again);
  backend.addEventListener("change", again);
  file.addEventListener("change", () => {
    stopCamera();
    [image = null] = file.files;
    again();
    file.value = "";
  });
  const begin = guarded(watch);
  camera.addEventListener("click", () => (stream ? stopCamera() : begin()));
  return {
    stop() { stopCamera(); close(); },
    element: section("Try it",
      h("p", { class: "note" }, "Images stay in this page. They are resized and cropped as in the model's certificate."),
      h("div", { class: "panel" }, model, backend, h("div", { class: "buttons" }, camera,
        h("button", { type: "button", onclick: () => file.click() }, "Choose an image"), file)),
      status, seen),
  };
}

/** Draws the pixels that are the model's input. */
function draw(canvas, pixels, { img_size: size, in_chans: chans }) {
  const [height, width] = sidesOf(size);
  const image = new ImageData(width, height);
  for (let i = 0; i < width * height; i += 1) {
    for (let c = 0; c < 3; c += 1) image.data[4 * i + c] = pixels[chans * i + Math.min(c, chans - 1)];
    image.data[4 * i + 3] = 255;
  }
  canvas.width = width;
  canvas.height = height;
  canvas.getContext("2d").putImageData(image, 0, 0);
}

// --- the page ---------------------------------------------------------------------------------------------------------

/** Adds the headers that allow threads by a service worker, where no server of ours sends them; true if it reloads. */
async function isolate(served) {
  if (served.submit || self.crossOriginIsolated || !self.isSecureContext || !navigator.serviceWorker) return false;
  try {
    if (sessionStorage.getItem("isolated")) return false; // once: in some browsers it has no effect
    sessionStorage.setItem("isolated", "yes");
    await navigator.serviceWorker.register("isolation.js");
    await navigator.serviceWorker.ready;
    location.reload();
    return true;
  } catch {
    return false; // then without threads
  }
}

/** Keeps the screen on, also after the page was hidden; returns a function that releases it. */
async function stayAwake() {
  let lock = null;
  const acquire = async () => {
    if (!document.hidden) lock = await navigator.wakeLock?.request("screen").catch(() => null);
  };
  document.addEventListener("visibilitychange", acquire);
  await acquire();
  return async () => {
    document.removeEventListener("visibilitychange", acquire);
    await lock?.release();
  };
}

async function start() {
  const served = await (await fetch("served.json")).json();
  if (await isolate(served)) return;
  const available = await listBackends(Boolean(served.submit));
  const status = h("p", { id: "status" });
  const bar = h("progress", { max: 1, value: 0, "aria-label": "How much is done" });
  const bars = h("div", { class: "chart", id: "chart" });
  const sparks = h("div", {});
  const result = h("section", { id: "record" });
  const tryOut = tryIt(served, available);
  const fields = form(served, available, await guessName());
  const [startButton, stopButton] = [fields.querySelector("#start"), fields.querySelector("#stop")];
  const estimate = () => setText(fields.querySelector("#estimate"), estimateOf(planOf(served, available)), "note");
  let stop = null;

  async function run(plan) {
    stop = new AbortController();
    tryOut.stop();
    sparks.replaceChildren();
    const drawn = new Map();
    const sleep = await stayAwake();
    try {
      const measured = await measure(plan, {
        log: (text, done) => { setText(status, text); bar.value = done; },
        changed: (cases) => bars.replaceChildren(...chart(cases)),
        second: (index, seconds, item) => {
          drawn.set(index, spark(seconds, item));
          sparks.replaceChildren(h("h3", {}, "Sustained"), ...drawn.values());
        },
        signal: stop.signal,
      });
      const record = describe(served, available, measured);
      store.save(record);
      showRecord(result, record);
      bar.value = 1;
      setText(status, ...await conclude(served, record));
    } catch (error) {
      setText(status, stop.signal.aborted ? "stopped" : error.message, "bad");
    } finally {
      await sleep();
    }
  }

  fields.addEventListener("change", estimate);
  fields.addEventListener("submit", async (event) => {
    event.preventDefault();
    const plan = planOf(served, available);
    if (!plan.cases.length) return setText(status, "choose at least one model and one backend", "bad");
    [startButton.disabled, stopButton.disabled, tryOut.element.inert] = [true, false, true];
    status.setAttribute("aria-live", "off"); // of each step; the end is announced
    await run(plan);
    status.setAttribute("aria-live", "polite");
    [startButton.disabled, stopButton.disabled, tryOut.element.inert] = [false, true, false];
    return undefined;
  });
  stopButton.addEventListener("click", () => stop.abort());

  root.replaceChildren(
    h("p", { class: "note" }, "Each model first classifies images whose outputs are known; it is timed only if "
      + "its outputs match. Keep this page in the foreground, and unplug the phone if you want its everyday speed."),
    fields, section("Progress", status, bar, bars, sparks), result, tryOut.element,
    h("p", { class: "note" }, `onnxruntime-web ${served.runtime.version}. `,
      served.submit ? null : h("a", { href: "index.html" }, "All models")));
  estimate();
  store.show(result);
  root.dataset.ready = "yes";
}

start().catch((error) => root.replaceChildren(h("p", { class: "bad" }, error.message)));
