// Measuring in a browser: which backends it has, whether a file gives its answers there, and how long it takes.
// Nothing here draws; phone.js does. A `trial` is trial.json of export/browser/served.py; a `model` is one of trial.models.
import { normalize } from "./pixels.js";

const PATIENCE_S = 180; // for one answer of a worker; a backend that takes longer is given up
const OVERHEAD_S = 0.5; // of a turn, besides what is timed: opening, warming up
const WARM_UP = 3; // calls of a turn that are not timed
const MIN_CALLS = 3; // calls of a turn
const MAX_CALLS = 300; // of a turn that are told
const MAX_ERROR = 1e6; // relative; JSON has no word for infinity
const MAX_THREADS = 4; // more of them than fast cores slow every call down

// --- files ------------------------------------------------------------------------------------------------------------

const fetched = new Map();

/** A file of the trial as a Blob, if it is the one that its hash belongs to; each is fetched once. */
function fetchFile({ url, integrity }, name) {
  if (!fetched.has(url)) {
    const wanted = download(url, integrity, name);
    wanted.catch(() => fetched.delete(url));
    fetched.set(url, wanted);
  }
  return fetched.get(url);
}

async function download(url, integrity, name) {
  const once = (cache) => fetch(url, { integrity, cache, referrerPolicy: "no-referrer" }).catch(() => null);
  const response = await once("default") ?? await once("reload"); // what a cache holds may be damaged
  if (response?.ok) return response.blob();
  // A browser does not tell a wrong hash from a lost connection; whether the file can be had at all tells them apart.
  const there = response ?? await fetch(url, { method: "HEAD" }).catch(() => null);
  throw new Error(there?.ok ? `${name} is damaged: its SHA-256 is not the one that was promised`
    : `${name} cannot be fetched (${there?.status ?? "no answer"}); is the computer that serves it still there?`);
}

/** The worker's program, kept so that it can be started when the computer that served it has gone. */
const program = fetch("phone_worker.js").then((response) => response.blob());

const bytesOf = async (item, name) => (await fetchFile(item, name)).arrayBuffer();

/** The names of a model's classes; none where they are not known. */
export const labelsOf = async (model) => JSON.parse(await (await fetchFile(model.labels, "labels")).text());

// --- backends ---------------------------------------------------------------------------------------------------------

/**
 * What ONNX Runtime can run in here: {name, threads, build, options, lacks: precisions}; and of the others, why not.
 *
 * @param served Whether a computer of the user's serves the page, and can serve it otherwise.
 */
export async function findBackends(served) {
  const backends = [{ name: "wasm", threads: 1, build: "wasm", options: { name: "wasm" }, lacks: [] }];
  const missing = {};
  let gpu = "";
  const cores = navigator.hardwareConcurrency ?? 1;
  const threads = Math.min(MAX_THREADS, Math.max(2, Math.ceil(cores / 2)));
  const secure = needsHttps(served);
  if (!self.crossOriginIsolated)
    missing["threads in wasm"] = self.isSecureContext
      ? "the page came without the headers COOP and COEP, which allow them" : secure;
  else if (typeof SharedArrayBuffer === "undefined") missing["threads in wasm"] = "this browser shares no memory";
  else if (cores < 2) missing["threads in wasm"] = "the browser reports one core";
  else backends.push({ ...backends[0], threads });

  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  if (adapter) {
    const { vendor, architecture, description } = adapter.info ?? {};
    gpu = [vendor, architecture, description].filter(Boolean).join(" ") || "unnamed";
    const lacks = adapter.features.has("shader-f16") ? [] : ["fp16"];
    backends.push({ name: "webgpu", threads: 1, build: "webgpu", options: { name: "webgpu" }, lacks });
    if (lacks.length) missing["fp16 in WebGPU"] = "this GPU does not support float16";
  } else
    missing.WebGPU = !self.isSecureContext ? secure
      : navigator.gpu ? "the browser finds no GPU for it" : "this browser does not support it";

  const deviceType = await webnnDevice();
  if (deviceType)
    backends.push({ name: "webnn", threads: 1, build: "webgpu", options: { name: "webnn", deviceType }, lacks: [] });
  else
    missing.WebNN = !self.isSecureContext ? secure
      : navigator.ml ? "the browser finds no device for it" : "this browser does not support it";
  return { backends, missing, gpu };
}

export const needsHttps = (served) =>
  (served ? "this needs HTTPS or localhost: serve the page with --tls" : "this needs HTTPS: open the https:// address");

/** The kind of processor that WebNN gives, the most special one first; null where there is none. */
async function webnnDevice() {
  for (const deviceType of navigator.ml ? ["npu", "gpu", "cpu"] : [])
    if (await navigator.ml.createContext({ deviceType }).catch(() => null)) return deviceType;
  return null;
}

export const labelOf = ({ name, threads, options }) =>
  name === "wasm" ? `wasm, ${threads} thread${threads > 1 ? "s" : ""}`
    : name === "webnn" ? `WebNN, ${options.deviceType}` : "WebGPU";

/** A backend in a worker of its own. */
export class Engine {
  constructor(backend, script) {
    this.waiting = new Map();
    this.last = 0;
    this.worker = new Worker(URL.createObjectURL(script), { type: "module", name: labelOf(backend) });
    this.worker.onmessage = ({ data }) => this.settle(data);
    this.worker.onerror = (event) => this.fail(`its worker ended: ${event.message ?? "no reason given"}`);
  }

  /** Started, with its runtime checked. */
  static async start(backend, runtime) {
    const type = "text/javascript";
    const engine = new Engine(backend, (await program).slice(0, undefined, type));
    try {
      const parts = runtime.builds[backend.build];
      const [module, loader, binary] = await Promise.all(["module", "loader", "binary"].map((role) =>
        fetchFile(parts[role], `ONNX Runtime (${parts[role].url.split("/").pop()})`)));
      await engine.ask("start", {
        module: module.slice(0, undefined, type), loader: loader.slice(0, undefined, type), binary,
        threads: backend.threads, options: backend.options,
      });
      return engine;
    } catch (error) {
      engine.end();
      throw error;
    }
  }

  ask(task, told = {}) {
    if (!this.worker) return Promise.reject(new Error("it was given up before"));
    return new Promise((resolve, reject) => {
      this.last += 1;
      let waited = 0; // seconds in which the page was to be seen: a phone that sleeps answers later
      const timer = setInterval(() => {
        waited += document.hidden ? 0 : 1;
        if (waited > PATIENCE_S) this.fail(`no answer within ${PATIENCE_S} seconds`);
      }, 1000);
      this.waiting.set(this.last, { resolve, reject, timer });
      this.worker.postMessage({ id: this.last, task, ...told });
    });
  }

  settle({ id, error, ...answer }) {
    const { resolve, reject, timer } = this.waiting.get(id) ?? {};
    clearInterval(timer);
    this.waiting.delete(id);
    if (error === undefined) resolve?.(answer);
    else reject?.(new Error(error));
  }

  /** Gives the worker up, and everything that it was asked. */
  fail(reason) {
    this.worker?.terminate();
    this.worker = null;
    for (const { reject, timer } of this.waiting.values()) {
      clearInterval(timer);
      reject(new Error(reason));
    }
    this.waiting.clear();
  }

  end() {
    this.fail("it was stopped");
  }

  async open(model) {
    const file = await fetchFile(model.file, nameOf(model));
    return this.ask("open", { file, input: model.input, output: model.spec.outputs[0] });
  }
}

export const nameOf = ({ model, precision }) => `${model} ${precision}`;

// --- images and answers ------------------------------------------------------------------------------------------

/** What a model is fed for pixels (H, W, C): these, or they normalized. */
export function feedOf({ spec }, pixels) {
  const { img_size: px, in_chans: chans, uint8_input: raw } = spec;
  return raw ? { type: "uint8", data: pixels, dims: [1, px, px, chans] }
    : { type: "float32", data: normalize(pixels, spec), dims: [1, chans, px, px] };
}

/** The trial's images for a model, cut as its certificate's were. */
export async function imagesOf(trial, model) {
  const all = new Uint8Array(await bytesOf(model.pixels, "the images"));
  const size = all.length / trial.images;
  return Array.from({ length: trial.images }, (_, i) => feedOf(model, all.slice(i * size, (i + 1) * size)));
}

/** Answers of an open model to the images, compared with the expected ones; the time and the input of the first. */
async function check(engine, trial, model) {
  const inputs = await imagesOf(trial, model);
  const expected = new Float32Array(await bytesOf(model.expected, "the expected answers"));
  const { answers, calls } = await engine.ask("answer", { inputs });
  const probabilities = model.spec.outputs[0] === "probabilities";
  return { found: compare(expected, answers, model.tolerance, probabilities), first: calls[0], input: inputs[0] };
}

/**
 * Figures of answers (n of them) against the expected ones, (n, classes) one after the other; see verdict.py.
 *
 * Errors are shares of the expected answers' spread over all images; where these hardly differ, of their size.
 */
export function compare(expected, answers, tolerance, probabilities = false) {
  const images = answers.length;
  const classes = expected.length / images;
  const wanted = answers.map((_, i) => expected.subarray(i * classes, (i + 1) * classes));
  answers.forEach((answer) => {
    if (answer.length !== classes) throw new Error(`it gives ${answer.length} numbers, and ${classes} are expected`);
    if (!answer.every(Number.isFinite)) throw new Error("it gives NaN or infinite answers");
  });
  const mean = Float64Array.from({ length: classes }, (_, j) => wanted.reduce((sum, each) => sum + each[j] / images, 0));
  const distances = wanted.map((each) => distance(each, mean));
  const errors = wanted.map((each, i) => distance(each, answers[i]));
  const [size, spread, noise] = [wanted.map((each) => distance(each, null)), distances, errors].map(rootMeanSquare);
  const competing = probabilities ? 2 : classes;
  const movable = (tolerance.sigmas * Math.SQRT2 * 10 ** (-tolerance.snr_db / 20) * spread) / Math.sqrt(competing);
  const changed = wanted.map((each, i) => highest(each) !== highest(answers[i]));
  const decisions = changed.filter((each, i) => each && margin(wanted[i]) > movable).length;
  const largest = Math.max(...errors);
  const far = errors.filter((error) => error > tolerance.max_rel_error * spread).length;
  const higher = tolerance.confidence_sigmas * deviation(distances, errors); // what the SNR may be above this one
  const beside = (scale) => ({
    snr_db: decibels(scale, noise), max_rel_error: largest && Math.min(largest / scale, MAX_ERROR),
  });
  const holds = ({ snr_db, max_rel_error: share }) =>
    snr_db + higher >= tolerance.snr_db && decisions <= tolerance.max_changed
    && share <= tolerance.far * tolerance.max_rel_error && (share <= tolerance.max_rel_error || far <= tolerance.max_far);
  return {
    images, ...beside(spread >= tolerance.min_evidence * size ? spread : size),
    top1_agreement: 100 - (100 * changed.filter(Boolean).length) / images,
    passed: holds(beside(spread)) || (spread < tolerance.full_evidence * size && holds(beside(size))),
  };
}

const rootMeanSquare = (values) => Math.sqrt(values.reduce((sum, value) => sum + value ** 2, 0) / values.length);

const decibels = (signal, noise) =>
  (noise ? Math.min(200, 20 * Math.log10(Math.max(signal, Number.MIN_VALUE) / noise)) : 200);

/** Standard error of the ratio of two mean powers over the same images, in dB; see verdict.py. */
function deviation(signal, noise) {
  const [signalScale, noiseScale] = [rootMeanSquare(signal), rootMeanSquare(noise)];
  if (signal.length < 2 || !signalScale || !noiseScale) return 0;
  const differences = signal.map((value, i) => (value / signalScale) ** 2 - (noise[i] / noiseScale) ** 2); // 0 on average
  const variance = differences.reduce((sum, each) => sum + each ** 2, 0) / (signal.length - 1);
  return (10 / Math.LN10) * Math.sqrt(variance / signal.length);
}

/** Euclidean, to the origin where there is no other. */
const distance = (values, other) =>
  Math.sqrt(values.reduce((sum, value, j) => sum + (value - (other ? other[j] : 0)) ** 2, 0));

/** How far the highest value is above the second. */
function margin(values) {
  const top = highest(values);
  return values[top] - values.reduce((best, value, j) => (j === top ? best : Math.max(best, value)), -Infinity);
}

const highest = (values) => values.indexOf(values.reduce((a, b) => Math.max(a, b)));

/** One line for a check that did not hold. */
const driftOf = (found, { tolerance }) =>
  `wrong answers: an error of ${found.max_rel_error.toExponential(1)} of their spread (allowed ${tolerance.max_rel_error}), `
  + `${found.snr_db.toFixed(1)} dB (at least ${tolerance.snr_db}), same top-1 ${found.top1_agreement.toFixed(0)} %`;

// --- time -------------------------------------------------------------------------------------------------------------

export function quantile(values, q) {
  const sorted = Float64Array.from(values).sort();
  const place = (sorted.length - 1) * q;
  const below = Math.floor(place);
  return sorted[below] + (place - below) * ((sorted[below + 1] ?? sorted[below]) - sorted[below]);
}

/** How much slower the last fifth of the seconds is than the first. */
export const slowdownOf = (seconds) => {
  const end = Math.max(1, Math.floor(seconds.length / 5));
  return quantile(seconds.slice(-end), 0.5) / Math.max(quantile(seconds.slice(0, end), 0.5), 1e-3);
};

/** Waits until the page can be seen: what is in the background is slowed down. */
function visible() {
  if (!document.hidden) return Promise.resolve();
  return new Promise((resolve) => {
    document.addEventListener("visibilitychange", function seen() {
      if (document.hidden) return;
      document.removeEventListener("visibilitychange", seen);
      resolve();
    });
  });
}

/** Does something again if the page could not be seen all the while. */
async function undisturbed(work) {
  for (;;) {
    await visible();
    let seen = true;
    const notice = () => { seen = false; };
    document.addEventListener("visibilitychange", notice);
    try {
      const result = await work();
      if (seen) return result;
    } finally {
      document.removeEventListener("visibilitychange", notice);
    }
  }
}

const rounded = (ms) => Math.round(1000 * ms) / 1000;
/** Some of a turn's calls, spread evenly. */
const thinned = (calls) => {
  const step = Math.ceil(calls.length / MAX_CALLS);
  return calls.filter((_, i) => i % step === 0).map(rounded);
};
/** Words that a terminal can print as they are. */
export const plain = (text, most = 300) => [...String(text).replace(/[\p{C}\p{Zl}\p{Zp}]/gu, " ")].slice(0, most).join("");

/** Seconds that `measure` will take, about. */
export const secondsOf = ({ trial, cases, rounds, sustained }) =>
  cases.length * (1 + rounds) * (trial.pace.turn_s + OVERHEAD_S) + sustained.length * trial.pace.sustained_s;

/**
 * Checks every case, then lets those that hold take turns, in reversed order every other round, then runs some of them
 * without a pause.
 *
 * @param plan {trial, cases: [{model, backend}], rounds, sustained: indices of cases}
 * @param told {say(text, done 0–1), changed(cases), second(index, seconds, case)}; and signal, an AbortSignal
 * @returns What export/browser/phone_record.py reads, but for the device.
 * @throws The signal's reason, if it is aborted.
 */
export async function measure(plan, { say, changed, second, signal }) {
  const { trial, rounds, sustained } = plan;
  const { turn_s: turn, sustained_s: length } = trial.pace;
  const cases = plan.cases.map(({ model, backend }) => ({
    model, backend, check: null, error: "", load: null, first: null, rounds: [], input: null, shared: false,
  }));
  const engines = new Map();
  const total = secondsOf(plan);
  let spent = 0;
  const progress = (text, seconds) => { say(text, spent / total); spent += seconds; };
  const titleOf = ({ model, backend }) => `${nameOf(model)} in ${labelOf(backend)}`;
  const end = () => { for (const engine of engines.values()) engine.end(); };
  signal.addEventListener("abort", end);

  /** Does one thing with a case; what goes wrong is the case's error, and it is left out from then on. */
  async function attempt(item, work) {
    signal.throwIfAborted();
    const key = labelOf(item.backend);
    try {
      if (!engines.has(key)) engines.set(key, await Engine.start(item.backend, trial.runtime));
      await work(engines.get(key));
    } catch (error) {
      signal.throwIfAborted();
      item.error = plain(error.message) || "it failed";
      if (engines.has(key) && !engines.get(key).worker) engines.delete(key); // the next case gets a new one
    }
    changed(cases);
  }

  try {
    for (const item of cases) {
      progress(`checking ${titleOf(item)}`, turn + OVERHEAD_S);
      await attempt(item, async (engine) => {
        const { ms, shared } = await engine.open(item.model);
        Object.assign(item, { load: rounded(ms), shared });
        const { found, first, input } = await check(engine, trial, item.model);
        Object.assign(item, { check: found, first: rounded(first), input });
        if (!found.passed) throw new Error(driftOf(found, item.model));
        await engine.ask("close");
      });
    }
    for (let round = 0; round < rounds; round += 1) {
      for (const item of round % 2 ? [...cases].reverse() : cases) {
        progress(`round ${round + 1} of ${rounds}: ${titleOf(item)}`, turn + OVERHEAD_S);
        if (item.error) continue;
        await attempt(item, async (engine) => {
          await engine.open(item.model);
          const { calls } = await undisturbed(() =>
            engine.ask("time", { input: item.input, seconds: turn, warmUp: WARM_UP, minCalls: MIN_CALLS }));
          await engine.ask("close");
          item.rounds.push(thinned(calls));
        });
      }
    }
    const runs = [];
    for (const index of sustained) {
      const item = cases[index];
      if (item.error) { spent += length; continue; }
      await attempt(item, async (engine) => {
        await engine.open(item.model);
        const seconds = await undisturbed(() => run(engine, item, index));
        await engine.ask("close");
        if (seconds.length > 1) runs.push({ case: index, seconds });
      });
    }
    return { cases: cases.map(toRecord), sustained: runs };
  } finally {
    signal.removeEventListener("abort", end);
    end();
  }

  /** One case without a pause: the median of each second; of a call that takes longer, its time. */
  async function run(engine, item, index) {
    const seconds = [];
    const start = performance.now();
    const elapsed = () => (performance.now() - start) / 1000;
    const before = spent;
    while (elapsed() < length) {
      say(`sustained run, second ${Math.ceil(elapsed()) || 1} of ${length}: ${titleOf(item)}`, spent / total);
      const { calls } = await engine.ask("time", { input: item.input, seconds: 1, warmUp: 0, minCalls: 1 });
      seconds.push(rounded(quantile(calls, 0.5)));
      spent = before + Math.min(elapsed(), length);
      second(index, seconds, item);
    }
    return seconds;
  }
}

const toRecord = ({ model, backend, check: found, error, load, first, rounds, shared }) => ({
  model: model.model, precision: model.precision, sha256: model.file.sha256, img_size: model.spec.img_size,
  gmacs: model.gmacs, backend: backend.name, threads: backend.threads, shared, check: found, error,
  load_ms: load, first_ms: first, rounds,
});
