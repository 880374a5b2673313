// The page that measures: its form, its chart and its "try it". What it measures with is measure.js.
// Everything is built inside #shvit-phone; names are only ever set as text.
import { Engine, feedOf, findBackends, labelOf, labelsOf, measure, nameOf, quantile } from "./measure.js";
import { cut, readImage } from "./pixels.js";

const KEPT = "shvit-phone-record"; // where the browser keeps the last record
const root = document.getElementById("shvit-phone");

// --- elements -------------------------------------------------------------------------------------------------------

const fill = (element, attributes, children) => {
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(key, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
};
const h = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
const number = (value) => (value >= 99.95 ? Math.round(value).toLocaleString("en-GB") : value.toPrecision(3));
const mega = (bytes) => `${(bytes / 1e6).toFixed(1)}\u00a0MB`;
const lookOf = ({ name, threads }) => (name === "wasm" && threads > 1 ? "threads" : name);
const section = (title, ...children) => h("section", {}, h("h2", {}, title), ...children);
const say = (element, text, kind = "") => { element.textContent = text; element.className = kind; };

// --- what to measure --------------------------------------------------------------------------------------------------

/** A name that the user may keep; browsers tell little more. */
function guessName() {
  const agent = navigator.userAgent;
  const android = /Android [\d.]+; ([^;)]+)/.exec(agent)?.[1];
  if (android && android !== "K") return android;
  return ["iPhone", "iPad", "Android", "Macintosh", "Windows", "Linux"].find((word) => agent.includes(word)) ?? "device";
}

const choice = (name, value, text, aside, note, checked = true) => {
  const id = `${name}-${value}`;
  return h("div", { class: "choice" },
    h("input", { type: "checkbox", id, name, value, checked }), h("label", { for: id }, text),
    h("span", { class: "aside" }, aside), note ? h("span", { class: "note" }, note) : null);
};

function form(trial, { backends, missing }) {
  const why = h("ul", { class: "note", id: "missing" },
    ...Object.entries(missing).map(([name, reason]) => h("li", {}, `no ${name}: ${reason}`)));
  const heaviest = trial.models.reduce((best, each, i) => (each.gmacs > (trial.models[best].gmacs ?? 0) ? i : best), 0);
  return h("form", { id: "form" },
    h("label", { class: "field" }, "What to call this device",
      h("input", { type: "text", id: "name", maxlength: 80, required: "", value: guessName(), autocomplete: "off" })),
    h("fieldset", {}, h("legend", {}, "Run in"),
      ...backends.map((backend, i) => choice("backend", i, labelOf(backend), "", "")),
      Object.keys(missing).length ? why : null),
    h("fieldset", {}, h("legend", {}, "Models"),
      ...trial.models.map((model, i) => choice("model", i, nameOf(model), mega(model.file.bytes),
        [model.top1 ? `${model.top1} % top-1 published` : "", model.gmacs ? `${model.gmacs.toFixed(2)} GMACs` : "",
          model.certified ? "" : "random weights: for its speed alone"].filter(Boolean).join(", ")))),
    h("label", { class: "field" }, "How long", h("select", { id: "length" },
      h("option", { value: "full" },
        `${trial.pace.rounds} rounds, then ${trial.pace.sustained_s} s without a pause in each backend`),
      h("option", { value: "rounds" }, `${trial.pace.rounds} rounds`),
      h("option", { value: "quick" }, "1 round"))),
    h("label", { class: "field" }, "Without a pause", h("select", { id: "sustained" },
      ...trial.models.map((model, i) => h("option", { value: i, selected: i === heaviest }, nameOf(model))))),
    h("div", { class: "buttons" },
      h("button", { class: "main", id: "start" }, "Measure"),
      h("button", { type: "button", id: "stop", disabled: "" }, "Stop")));
}

const checked = (name) =>
  [...root.querySelectorAll(`input[name=${name}]:checked`)].map((input) => Number(input.value));

/** What the form says, for `measure`; each model in all backends beside each other. */
function planOf(trial, { backends }) {
  const chosen = checked("backend").map((i) => backends[i]);
  const models = checked("model").map((i) => trial.models[i]);
  const cases = models.flatMap((model) => chosen.map((backend) => ({ model, backend })))
    .filter(({ model, backend }) => !backend.lacks.includes(model.precision));
  const length = root.querySelector("#length").value;
  const long = trial.models[root.querySelector("#sustained").value];
  const without = cases.map(({ model }, i) => (model === long ? i : -1)).filter((i) => i >= 0);
  return {
    trial, cases, rounds: length === "quick" ? 1 : trial.pace.rounds, sustained: length === "full" ? without : [],
  };
}

// --- charts -----------------------------------------------------------------------------------------------------------

const allOf = (item) => item.rounds.flat();
const stateOf = ({ check, error }) => (error ? null : check ? `${check.snr_db.toFixed(0)} dB, to be timed` : "…");

/** Bars of the median by model and backend; what failed says why. */
function chart(cases) {
  const medians = cases.map((item) => (item.rounds.length ? quantile(allOf(item), 0.5) : 0));
  const longest = Math.max(...medians, 1e-9);
  const groups = new Map();
  cases.forEach((item, i) => groups.set(item.model, [...(groups.get(item.model) ?? []), i]));
  return [...groups].map(([model, indices]) => h("div", {},
    h("h3", {}, nameOf(model), h("span", { class: "note" }, ` ${model.spec.img_size} px`)),
    ...indices.map((i) => {
      const { backend, error } = cases[i];
      const bar = h("i", {});
      bar.style.width = `${(52 * medians[i]) / longest}%`;
      return h("div", { class: `case ${lookOf(backend)}` }, h("span", {}, labelOf(backend)),
        error ? h("span", { class: "why" }, error)
          : medians[i] ? h("span", { class: "bar" }, bar,
            h("span", {}, `${number(medians[i])}\u00a0ms`, h("span", { class: "note" },
              ` p90 ${number(quantile(allOf(cases[i]), 0.9))}`)))
            : h("span", { class: "note" }, stateOf(cases[i])));
    })));
}

/** Milliseconds of each second. */
function spark(seconds, item) {
  const [width, height] = [340, 96];
  const most = 1.15 * Math.max(...seconds);
  const x = (i) => 8 + ((width - 16) * i) / Math.max(seconds.length - 1, 1);
  const y = (ms) => height - 8 - ((height - 30) * ms) / most;
  const end = Math.max(1, Math.floor(seconds.length / 5));
  const slowdown = quantile(seconds.slice(-end), 0.5) / quantile(seconds.slice(0, end), 0.5);
  const title = `${nameOf(item.model)}, ${labelOf(item.backend)}: ${number(quantile(seconds, 0.5))} ms, `
    + `${slowdown.toFixed(2)} times the first seconds' time at the end`;
  return h("figure", { class: lookOf(item.backend) }, h("figcaption", { class: "note" }, title),
    svg("svg", { class: "spark", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": title },
      svg("path", { d: seconds.map((ms, i) => `${i ? "L" : "M"}${x(i)},${y(ms)}`).join("") }),
      svg("text", { x: 8, y: 14 }, `${number(Math.max(...seconds))} ms at most`)));
}

const HEADS = ["file", "in", "p50 ms", "p90 ms", "p99 ms", "load ms", "first ms", "dB", "same top-1"];

/** A record as a table: also of one that the browser kept. */
function table({ cases }) {
  const cell = (value, digits = 3) => (value === null || value === undefined ? "–" : digits ? number(value) : value);
  return h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "All results" },
    h("table", { id: "results" }, h("thead", {}, h("tr", {}, ...HEADS.map((head) => h("th", { scope: "col" }, head)))),
      h("tbody", {}, ...cases.map((item) => {
        const calls = item.rounds.flat();
        const times = [0.5, 0.9, 0.99].map((q) => (calls.length ? quantile(calls, q) : null));
        const where = `${item.backend}${item.threads > 1 ? ` ×${item.threads}` : ""}`;
        return h("tr", {}, h("th", { scope: "row" }, `${item.model} ${item.precision}`), h("td", {}, where),
          ...(item.error && !calls.length
            ? [h("td", { colspan: 5, class: "bad" }, item.error)]
            : [...times, item.load_ms, item.first_ms].map((value) => h("td", {}, cell(value)))),
          h("td", {}, cell(item.check?.snr_db)),
          h("td", {}, item.check ? `${item.check.top1_agreement.toFixed(0)} %` : "–"));
      }))));
}

// --- results ----------------------------------------------------------------------------------------------------------

const describe = (trial, found, measured) => ({
  format: "shvit-phone-1",
  device: {
    name: root.querySelector("#name").value.trim() || "device", browser: navigator.userAgent.slice(0, 300),
    cores: navigator.hardwareConcurrency ?? 0, memory_gb: navigator.deviceMemory ?? null,
    gpu: found.gpu.slice(0, 300), missing: found.missing,
  },
  runtime: `onnxruntime-web ${trial.runtime.version}`,
  ...measured,
});

/** Posts the record; false if nobody takes it. */
async function submit(trial, record) {
  const answer = await fetch(trial.submit, {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(record),
  }).catch(() => null);
  return answer?.status === 201 ? "" : (await answer?.json().catch(() => null))?.error ?? "the computer does not answer";
}

function save(record) {
  const url = URL.createObjectURL(new Blob([JSON.stringify(record, null, 1)], { type: "application/json" }));
  h("a", { href: url, download: "shvit-phone.json" }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

function keep(record) {
  try {
    localStorage.setItem(KEPT, JSON.stringify(record));
  } catch { /* private windows keep nothing */ }
}

function kept() {
  try {
    return JSON.parse(localStorage.getItem(KEPT));
  } catch {
    return null;
  }
}

function showRecord(holder, record) {
  if (!record?.cases) return;
  holder.replaceChildren(h("h2", {}, `Results of ${record.device.name}`), table(record),
    h("div", { class: "buttons" }, h("button", { type: "button", id: "save", onclick: () => save(record) },
      "Save as JSON")),
    h("p", { class: "note" }, "`shvit bench import shvit-phone.json --output report` makes a report of the saved file."));
}

// --- try it -----------------------------------------------------------------------------------------------------------

const softmax = (logits) => {
  const most = logits.reduce((a, b) => Math.max(a, b));
  const powers = logits.map((value) => Math.exp(value - most));
  const sum = powers.reduce((a, b) => a + b);
  return powers.map((value) => value / sum);
};

function tryIt(trial, { backends }) {
  const usable = trial.models.filter((model) => model.trained);
  if (!usable.length)
    return section("Try it", h("p", { class: "note" }, "The weights here are random: they have nothing to say of a "
      + "picture. Serve a file of trained ones: shvit bench phone --models mine.onnx"));
  const model = h("select", { id: "try-model", "aria-label": "Model" },
    ...usable.map((each, i) => h("option", { value: i }, nameOf(each))));
  const backend = h("select", { id: "try-backend", "aria-label": "Runs in" },
    ...backends.map((each, i) => h("option", { value: i }, labelOf(each))));
  const file = h("input", { type: "file", id: "photo", accept: "image/*", class: "hidden" });
  const camera = h("button", { type: "button", id: "camera" }, "Use the camera");
  const canvas = h("canvas", { width: 1, height: 1, role: "img", "aria-label": "What the model sees" });
  const answers = h("div", { class: "answer", id: "answer", "aria-live": "polite" });
  const status = h("p", { class: "note", id: "try-status" });
  const seen = h("div", { class: "seen hidden" }, canvas, answers);
  let open = null; // {key, engine, model, labels}
  let stream = null;

  async function opened() {
    const key = `${model.value} ${backend.value}`;
    if (open?.key === key) return open;
    open?.engine.end();
    open = null;
    const chosen = usable[model.value];
    say(status, `loading ${nameOf(chosen)}`, "note");
    const engine = await Engine.start(backends[backend.value], trial.runtime);
    await engine.open(chosen);
    open = { key, engine, model: chosen, labels: await labelsOf(chosen) };
    return open;
  }

  async function classify(source) {
    const { engine, model: chosen, labels } = await opened();
    const pixels = cut(await readImage(source), chosen.spec);
    const { answers: [given], calls: [ms] } = await engine.ask("answer", { inputs: [feedOf(chosen, pixels)] });
    const chances = chosen.spec.outputs[0] === "logits" ? softmax(given) : given;
    draw(canvas, pixels, chosen.spec);
    seen.classList.remove("hidden");
    const best = [...chances.keys()].sort((a, b) => chances[b] - chances[a]).slice(0, 5);
    answers.replaceChildren(...best.map((index) => {
      const bar = h("i", {});
      bar.style.width = `${100 * chances[index]}%`;
      return h("div", { "data-class": index }, bar, h("span", {}, h("b", {}, labels[index] ?? `class ${index}`),
        `${(100 * chances[index]).toFixed(1)} %`));
    }));
    say(status, `${nameOf(chosen)}, ${labelOf(backends[backend.value])}: ${number(ms)} ms`, "note");
  }

  const guarded = (work) => async (...given) => {
    try {
      await work(...given);
    } catch (error) {
      stop();
      say(status, error.message, "bad");
    }
  };
  function stop() {
    for (const track of stream?.getTracks() ?? []) track.stop();
    stream = null;
    camera.textContent = "Use the camera";
  }
  file.addEventListener("change", guarded(async () => {
    stop();
    if (file.files[0]) await classify(file.files[0]);
    file.value = "";
  }));
  camera.addEventListener("click", guarded(async () => {
    if (stream) return stop();
    if (!navigator.mediaDevices) throw new Error("the camera needs HTTPS, or localhost: serve the page with --tls");
    stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } })
      .catch((error) => { throw new Error(`no camera: ${error.message}`); });
    camera.textContent = "Stop the camera";
    const video = h("video", { playsinline: "", muted: "" });
    video.muted = true;
    video.srcObject = stream;
    await video.play();
    while (stream) {
      await classify(video);
      await new Promise(requestAnimationFrame);
    }
    return undefined;
  }));
  return section("Try it",
    h("p", { class: "note" }, "Pictures stay in this page. They are cut and resized as the model's certificate says."),
    h("div", { class: "panel" }, model, backend, h("div", { class: "buttons" }, camera,
      h("button", { type: "button", onclick: () => file.click() }, "Choose a photograph"), file)),
    status, seen);
}

/** The very pixels that the model is fed. */
function draw(canvas, pixels, { img_size: px, in_chans: chans }) {
  const image = new ImageData(px, px);
  for (let i = 0; i < px * px; i += 1) {
    for (let c = 0; c < 3; c += 1) image.data[4 * i + c] = pixels[chans * i + Math.min(c, chans - 1)];
    image.data[4 * i + 3] = 255;
  }
  canvas.width = px;
  canvas.height = px;
  canvas.getContext("2d").putImageData(image, 0, 0);
}

// --- the page ---------------------------------------------------------------------------------------------------------

/** Where no server of ours sends the headers that allow threads, a service worker adds them: true if it must reload. */
async function isolate(trial) {
  if (trial.submit || self.crossOriginIsolated || !self.isSecureContext || !navigator.serviceWorker) return false;
  const asked = sessionStorage.getItem("isolated"); // once: some browsers have no use for it
  sessionStorage.setItem("isolated", "yes");
  await navigator.serviceWorker.register("isolation.js").catch(() => null);
  if (asked || !(await navigator.serviceWorker.ready)) return false;
  location.reload();
  return true;
}

async function start() {
  const trial = await (await fetch("trial.json")).json();
  if (await isolate(trial)) return;
  const found = await findBackends();
  const status = h("p", { id: "status", "aria-live": "polite" });
  const bar = h("progress", { max: 1, value: 0, "aria-label": "How much is done" });
  const bars = h("div", { class: "chart", id: "chart" });
  const sparks = h("div", { id: "sustained-chart" });
  const result = h("section", { id: "record" });
  const asked = form(trial, found);
  const [startButton, stopButton] = [asked.querySelector("#start"), asked.querySelector("#stop")];
  let stop = null;

  asked.addEventListener("submit", async (event) => {
    event.preventDefault();
    const plan = planOf(trial, found);
    if (!plan.cases.length) return say(status, "choose at least one model and one backend", "bad");
    stop = new AbortController();
    [startButton.disabled, stopButton.disabled] = [true, false];
    sparks.replaceChildren();
    const lock = await navigator.wakeLock?.request("screen").catch(() => null);
    const drawn = new Map();
    try {
      const measured = await measure(plan, {
        say: (text, done) => { say(status, text); bar.value = done; },
        changed: (cases) => bars.replaceChildren(...chart(cases)),
        second: (index, seconds, item) => {
          drawn.set(index, spark(seconds, item));
          sparks.replaceChildren(h("h3", {}, "Without a pause"), ...drawn.values());
        },
        signal: stop.signal,
      });
      const record = describe(trial, found, measured);
      keep(record);
      showRecord(result, record);
      bar.value = 1;
      const refused = trial.submit ? await submit(trial, record) : null;
      if (refused === null) say(status, "done; the results are kept in this page", "good");
      else if (refused) say(status, `done, but not sent: ${refused}; save the results as JSON instead`, "bad");
      else say(status, "done and sent", "good");
    } catch (error) {
      say(status, stop.signal.aborted ? "stopped" : error.message, "bad");
    } finally {
      await lock?.release();
      [startButton.disabled, stopButton.disabled] = [false, true];
    }
    return undefined;
  });
  stopButton.addEventListener("click", () => { stop?.abort(); say(status, "stopping"); });

  root.replaceChildren(
    h("p", { class: "note" }, "Each file is first asked about photographs whose answers are known; only one that gives "
      + "them is timed. Keep the page in front, and the phone off its charger if it shall be as in your hand."),
    asked, section("Results", status, bar, bars, sparks), result, tryIt(trial, found),
    h("p", { class: "note" }, `${mega(trial.models.reduce((sum, each) => sum + each.file.bytes, 0))} of models; `
      + `ONNX Runtime ${trial.runtime.version}.`));
  showRecord(result, kept());
  root.dataset.ready = "yes";
}

start().catch((error) => root.replaceChildren(h("p", { class: "bad" }, error.message)));
