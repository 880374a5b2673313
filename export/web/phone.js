// The page that measures: its form, its chart and its "try it". What it measures with is measure.js.
// Everything is built inside #shvit-phone; names are only ever set as text.
import { counted, h, number, scroller, section, svg } from "./elements.js";
import {
  Engine, feedOf, findBackends, labelOf, labelsOf, measure, nameOf, needsHttps, plain, quantile, secondsOf, slowdownOf,
} from "./measure.js";
import { cut, readImage } from "./pixels.js";

const KEPT = "shvit-phone-record"; // where the browser keeps the last record
const root = document.getElementById("shvit-phone");

const mega = (bytes) => `${(bytes / 1e6).toFixed(1)}\u00a0MB`;
const lookOf = ({ name, threads }) => (name === "wasm" && threads > 1 ? "threads" : name);
const say = (element, text, kind = "") => { element.textContent = text; element.className = kind; };

// --- what to measure --------------------------------------------------------------------------------------------------

/** A name that the user may keep: the phone's model where the browser tells it. */
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

function form(trial, { backends, missing }, name) {
  const why = h("ul", { class: "note", id: "missing" },
    ...Object.entries(missing).map(([name, reason]) => h("li", {}, `no ${name}: ${reason}`)));
  const heaviest = trial.models.reduce((best, each, i) => (each.gmacs > (trial.models[best].gmacs ?? 0) ? i : best), 0);
  return h("form", {},
    h("label", { class: "field" }, "What to call this device",
      h("input", { type: "text", id: "name", maxlength: 80, required: "", value: name, autocomplete: "off" })),
    h("fieldset", {}, h("legend", {}, "Run in"),
      ...backends.map((backend, i) => choice("backend", i, labelOf(backend), "", "")),
      Object.keys(missing).length ? why : null),
    h("fieldset", {}, h("legend", {}, "Models"),
      ...trial.models.map((model, i) => choice("model", i, nameOf(model), mega(model.file.bytes),
        [model.top1 ? `${model.top1} % top-1 published` : "", model.gmacs ? `${model.gmacs.toFixed(2)} GMACs` : "",
          model.trained ? "" : "random weights: for its speed alone"].filter(Boolean).join(", ")))),
    h("label", { class: "field" }, "How long", h("select", { id: "length" },
      h("option", { value: "full" },
        `${trial.pace.rounds} rounds, then ${trial.pace.sustained_s} s sustained in each backend`),
      h("option", { value: "rounds" }, `${trial.pace.rounds} rounds`),
      h("option", { value: "quick" }, "1 round"))),
    h("label", { class: "field" }, "Model of the sustained runs", h("select", { id: "sustained" },
      ...trial.models.map((model, i) => h("option", { value: i, selected: i === heaviest }, nameOf(model))))),
    h("p", { class: "note", id: "estimate" }),
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
  const wanted = trial.models[root.querySelector("#sustained").value];
  const long = models.includes(wanted) ? wanted : models.at(-1);
  const without = cases.map(({ model }, i) => (model === long ? i : -1)).filter((i) => i >= 0);
  return {
    trial, cases, rounds: length === "quick" ? 1 : trial.pace.rounds, sustained: length === "full" ? without : [],
  };
}

/** How long it will take, and how much is fetched. */
function estimateOf({ trial, cases, ...plan }) {
  const builds = new Set(cases.map(({ backend }) => backend.build));
  const files = [...[...builds].flatMap((name) => Object.values(trial.runtime.builds[name])),
    ...[...new Set(cases.map(({ model }) => model))].map(({ file }) => file)];
  const minutes = Math.ceil(secondsOf({ trial, cases, ...plan }) / 60);
  return `${counted(cases.length, "case")}, about ${counted(minutes, "minute")}; `
    + `${mega(files.reduce((sum, { bytes }) => sum + bytes, 0))} to fetch`;
}

// --- charts -----------------------------------------------------------------------------------------------------------

/** Bars of the median by model and backend; what failed says why. */
function chart(cases) {
  const medians = cases.map((item) => (item.rounds.length ? quantile(item.rounds.flat(), 0.5) : 0));
  const longest = Math.max(...medians, 1e-9);
  const groups = new Map();
  cases.forEach((item, i) => groups.set(item.model, [...(groups.get(item.model) ?? []), i]));
  return [...groups].map(([model, indices]) => h("div", {},
    h("h3", {}, nameOf(model), h("span", { class: "note" }, ` ${model.spec.img_size} px`)),
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

/** Milliseconds of each second. */
function spark(seconds, item) {
  const [width, height] = [340, 96];
  const most = 1.15 * Math.max(...seconds);
  const x = (i) => 8 + ((width - 16) * i) / Math.max(seconds.length - 1, 1);
  const y = (ms) => height - 8 - ((height - 30) * ms) / most;
  const title = `${nameOf(item.model)}, ${labelOf(item.backend)}: ${number(quantile(seconds, 0.5))} ms, `
    + `${slowdownOf(seconds).toFixed(2)}× the initial latency at the end`;
  return h("figure", { class: lookOf(item.backend) }, h("figcaption", { class: "note" }, title),
    svg("svg", { class: "spark", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": title },
      svg("path", { d: seconds.map((ms, i) => `${i ? "L" : "M"}${x(i)},${y(ms)}`).join("") }),
      svg("text", { x: 8, y: 14 }, `${number(Math.max(...seconds))} ms at most`)));
}

const HEADS = ["file", "in", "p50 ms", "p90 ms", "p99 ms", "load ms", "first ms", "dB", "same top-1"];

/** A record as a table: also of one that the browser kept. */
function table({ cases }) {
  return scroller("All results",
    h("table", { id: "results" }, h("thead", {}, h("tr", {}, ...HEADS.map((head) => h("th", { scope: "col" }, head)))),
      h("tbody", {}, ...cases.map(({ backend, threads, shared, rounds, error, check, ...item }) => {
        const calls = rounds.flat();
        const times = [0.5, 0.9, 0.99].map((q) => (calls.length ? quantile(calls, q) : null));
        const where = `${backend}${threads > 1 ? ` ×${threads}` : ""}${shared ? " and CPU" : ""}`;
        return h("tr", {}, h("th", { scope: "row" }, `${item.model} ${item.precision}`), h("td", {}, where),
          ...(error && !calls.length ? [h("td", { colspan: 5, class: "bad" }, error)]
            : [...times, item.load_ms, item.first_ms].map((value) => h("td", {}, number(value)))),
          h("td", {}, number(check?.snr_db)), h("td", {}, check ? `${check.top1_agreement.toFixed(0)} %` : "–"));
      }))));
}

// --- results ----------------------------------------------------------------------------------------------------------

const describe = (trial, found, measured) => ({
  format: "shvit-phone-1",
  device: {
    name: plain(root.querySelector("#name").value.trim(), 80).trim() || "device",
    browser: plain(navigator.userAgent), cores: navigator.hardwareConcurrency ?? 0,
    memory_gb: navigator.deviceMemory ?? null, gpu: plain(found.gpu), missing: found.missing,
  },
  runtime: `onnxruntime-web ${trial.runtime.version}`,
  ...measured,
});

/** Posts the record: {awaited} says of how many more the computer waits, or {error} why it was not taken. */
async function submit(trial, record) {
  const answer = await fetch(trial.submit, {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(record),
  }).catch(() => null);
  const said = await answer?.json().catch(() => null);
  return answer?.status === 201 ? said : { error: said?.error ?? "the computer does not answer" };
}

/** What the page says at the end, and how. */
async function conclude(trial, record) {
  const timed = record.cases.some(({ rounds }) => rounds.length);
  const nothing = timed ? "" : `; nothing could be timed: ${record.cases[0].error}`;
  const kind = timed ? "good" : "bad";
  if (!trial.submit) return [`done; the results are kept in this page${nothing}`, kind];
  const { awaited, error } = await submit(trial, record);
  if (error) return [`done, but not sent: ${error}; save the results as JSON instead${nothing}`, "bad"];
  return [`done and sent${awaited > 0 ? "" : "; the computer has stopped serving"}${nothing}`, kind];
}

function save(record) {
  const url = URL.createObjectURL(new Blob([JSON.stringify(record, null, 1)], { type: "application/json" }));
  h("a", { href: url, download: "shvit-phone.json" }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60000);
}

/** The last record, in the browser's own store; where that is closed, or holds something else, nothing. */
const store = {
  keep(record) {
    try {
      localStorage.setItem(KEPT, JSON.stringify(record));
    } catch { /* private windows keep nothing */ }
  },
  show(holder) {
    try {
      const record = JSON.parse(localStorage.getItem(KEPT));
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

// --- try it -----------------------------------------------------------------------------------------------------------

const softmax = (logits) => {
  const most = logits.reduce((a, b) => Math.max(a, b));
  const powers = logits.map((value) => Math.exp(value - most));
  const sum = powers.reduce((a, b) => a + b);
  return powers.map((value) => value / sum);
};

/** A section, and how to stop what goes on in it. */
function tryIt(trial, { backends }) {
  const usable = trial.models.filter((model) => model.trained);
  if (!usable.length)
    return { stop() {}, element: section("Try it", h("p", { class: "note" }, "The weights here are random: they have "
      + "nothing to say of a picture. Serve a file of trained ones: shvit bench phone --models mine.onnx")) };
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
  let image = null; // the last one that was chosen
  let turn = Promise.resolve(); // one picture after the other

  async function opened() {
    const key = `${model.value} ${backend.value}`;
    if (open?.key === key && open.engine.worker) return open;
    close();
    const chosen = usable[model.value];
    say(status, `loading ${nameOf(chosen)}`, "note");
    const engine = await Engine.start(backends[backend.value], trial.runtime);
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
    const { answers: [given], calls: [ms] } = await engine.ask("answer", { inputs: [feedOf(chosen, pixels)] });
    const chances = chosen.spec.outputs[0] === "logits" ? softmax(given) : given;
    draw(canvas, pixels, chosen.spec);
    seen.classList.remove("hidden");
    const best = [...chances.keys()].sort((a, b) => chances[b] - chances[a]).slice(0, 5);
    answers.replaceChildren(...best.map((index) => {
      const bar = h("i", {});
      bar.style.width = `${100 * chances[index]}%`;
      return h("div", {}, bar, h("span", {}, h("b", {}, labels[index] ?? `class ${index}`),
        `${(100 * chances[index]).toFixed(1)} %`));
    }));
    say(status, `${nameOf(chosen)}, ${labelOf(backends[backend.value])}: ${number(ms, "ms")}`, "note");
  }

  const guarded = (work) => () => {
    turn = turn.then(work).catch((error) => {
      stopCamera();
      say(status, error.message, "bad");
    });
  };
  function stopCamera() {
    for (const track of stream?.getTracks() ?? []) track.stop();
    stream = null;
    camera.textContent = "Use the camera";
  }
  async function watch() {
    if (!navigator.mediaDevices) throw new Error(needsHttps(trial.submit));
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
      h("p", { class: "note" }, "Pictures stay in this page. They are cut and resized as the model's certificate says."),
      h("div", { class: "panel" }, model, backend, h("div", { class: "buttons" }, camera,
        h("button", { type: "button", onclick: () => file.click() }, "Choose an image"), file)),
      status, seen),
  };
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
  try {
    if (sessionStorage.getItem("isolated")) return false; // once: some browsers have no use for it
    sessionStorage.setItem("isolated", "yes");
    await navigator.serviceWorker.register("isolation.js");
    await navigator.serviceWorker.ready;
    location.reload();
    return true;
  } catch {
    return false; // then without threads
  }
}

/** Keeps the screen on, also after the page was out of sight, until it is released. */
async function stayAwake() {
  let lock = null;
  const ask = async () => {
    if (!document.hidden) lock = await navigator.wakeLock?.request("screen").catch(() => null);
  };
  document.addEventListener("visibilitychange", ask);
  await ask();
  return async () => {
    document.removeEventListener("visibilitychange", ask);
    await lock?.release();
  };
}

async function start() {
  const trial = await (await fetch("trial.json")).json();
  if (await isolate(trial)) return;
  const found = await findBackends(Boolean(trial.submit));
  const status = h("p", { id: "status" });
  const bar = h("progress", { max: 1, value: 0, "aria-label": "How much is done" });
  const bars = h("div", { class: "chart", id: "chart" });
  const sparks = h("div", {});
  const result = h("section", { id: "record" });
  const tried = tryIt(trial, found);
  const asked = form(trial, found, await guessName());
  const [startButton, stopButton] = [asked.querySelector("#start"), asked.querySelector("#stop")];
  const estimate = () => say(asked.querySelector("#estimate"), estimateOf(planOf(trial, found)), "note");
  let stop = null;

  async function run(plan) {
    stop = new AbortController();
    tried.stop();
    sparks.replaceChildren();
    const drawn = new Map();
    const sleep = await stayAwake();
    try {
      const measured = await measure(plan, {
        say: (text, done) => { say(status, text); bar.value = done; },
        changed: (cases) => bars.replaceChildren(...chart(cases)),
        second: (index, seconds, item) => {
          drawn.set(index, spark(seconds, item));
          sparks.replaceChildren(h("h3", {}, "Sustained"), ...drawn.values());
        },
        signal: stop.signal,
      });
      const record = describe(trial, found, measured);
      store.keep(record);
      showRecord(result, record);
      bar.value = 1;
      say(status, ...await conclude(trial, record));
    } catch (error) {
      say(status, stop.signal.aborted ? "stopped" : error.message, "bad");
    } finally {
      await sleep();
    }
  }

  asked.addEventListener("change", estimate);
  asked.addEventListener("submit", async (event) => {
    event.preventDefault();
    const plan = planOf(trial, found);
    if (!plan.cases.length) return say(status, "choose at least one model and one backend", "bad");
    [startButton.disabled, stopButton.disabled, tried.element.inert] = [true, false, true];
    status.setAttribute("aria-live", "off"); // of each step; the end is announced
    await run(plan);
    status.setAttribute("aria-live", "polite");
    [startButton.disabled, stopButton.disabled, tried.element.inert] = [false, true, false];
    return undefined;
  });
  stopButton.addEventListener("click", () => stop.abort());

  root.replaceChildren(
    h("p", { class: "note" }, "Each model first classifies images whose answers are known; only one that gives "
      + "them is timed. Keep this page in the foreground, and unplug the phone if you want its everyday speed."),
    asked, section("Progress", status, bar, bars, sparks), result, tried.element,
    h("p", { class: "note" }, `onnxruntime-web ${trial.runtime.version}. `,
      trial.submit ? null : h("a", { href: "index.html" }, "All models")));
  estimate();
  store.show(result);
  root.dataset.ready = "yes";
}

start().catch((error) => root.replaceChildren(h("p", { class: "bad" }, error.message)));
