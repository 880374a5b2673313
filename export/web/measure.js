// Measuring in a browser: its backends, whether a file's outputs match there, and how long it takes.
// Nothing here draws; phone.js does. `served` is served.json of export/browser/served.py; a `model` is one of its models.
import { normalize, sidesOf } from "./pixels.js";

const TIMEOUT_S = 180; // limit of one response of a worker; a backend that takes longer is terminated
const OVERHEAD_S = 0.5; // of a round of a case, besides what is timed: opening, warming up
const WARM_UP = 3; // calls of a round that are not timed
const MIN_CALLS = 3; // calls of a round
const MAX_CALLS = 300; // calls of a round in the record
const MAX_ERROR = 1e6; // relative; JSON has no infinity
const MAX_THREADS = 4; // more of them than fast cores slow every call down

// --- files ------------------------------------------------------------------------------------------------------------

const fetched = new Map();

/** Returns a served file as a Blob if its hash is right; each file is fetched once. */
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
  // A browser does not distinguish a wrong hash from a lost connection; whether the file is reachable does.
  const there = response ?? await fetch(url, { method: "HEAD" }).catch(() => null);
  throw new Error(there?.ok ? `${name} is damaged: its SHA-256 is not the expected one`
    : `${name} cannot be fetched (${there?.status ?? "no response"}); is the computer that serves it still running?`);
}

/** The worker's program, kept so that it can start after the computer that served it has stopped. */
const program = fetch("phone_worker.js").then((response) => response.blob());

const bytesOf = async (item, name) => (await fetchFile(item, name)).arrayBuffer();

/** Returns the names of a model's classes; none where they are not known. */
export const labelsOf = async (model) => JSON.parse(await (await fetchFile(model.labels, "labels")).text());

// --- backends ---------------------------------------------------------------------------------------------------------

/**
 * Returns the backends that ONNX Runtime has here, {name, threads, build, options, lacks: precisions}, and why others
 * are missing.
 *
 * @param local Whether a computer of the user's serves the page, and can be told to use HTTPS.
 */
export async function listBackends(local) {
  const backends = [{ name: "wasm", threads: 1, build: "wasm", options: { name: "wasm" }, lacks: [] }];
  const missing = {};
  let gpu = "";
  const cores = navigator.hardwareConcurrency ?? 1;
  const threads = Math.min(MAX_THREADS, Math.max(2, Math.ceil(cores / 2)));
  const secure = needsHttps(local);
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

export const needsHttps = (local) =>
  (local ? "this needs HTTPS or localhost: serve the page with --tls" : "this needs HTTPS: open the https:// address");

/** Returns the device type that WebNN offers, the most specialized first; null where there is none. */
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

  /** Returns a started engine, whose runtime's hashes are right. */
  static async start(backend, runtime) {
    const type = "text/javascript";
    const engine = new Engine(backend, (await program).slice(0, undefined, type));
    try {
      const parts = runtime.builds[backend.build];
      const [module, loader, binary] = await Promise.all(["module", "loader", "binary"].map((role) =>
        fetchFile(parts[role], `ONNX Runtime (${parts[role].url.split("/").pop()})`)));
      await engine.request("start", {
        module: module.slice(0, undefined, type), loader: loader.slice(0, undefined, type), binary,
        threads: backend.threads, options: backend.options,
      });
      return engine;
    } catch (error) {
      engine.end();
      throw error;
    }
  }

  request(task, options = {}) {
    if (!this.worker) return Promise.reject(new Error("it was terminated before"));
    return new Promise((resolve, reject) => {
      this.last += 1;
      let waited = 0; // seconds in which the page was visible: a phone that sleeps responds later
      const timer = setInterval(() => {
        waited += document.hidden ? 0 : 1;
        if (waited > TIMEOUT_S) this.fail(`no response within ${TIMEOUT_S} seconds`);
      }, 1000);
      this.waiting.set(this.last, { resolve, reject, timer });
      this.worker.postMessage({ id: this.last, task, ...options });
    });
  }

  settle({ id, error, ...response }) {
    const { resolve, reject, timer } = this.waiting.get(id) ?? {};
    clearInterval(timer);
    this.waiting.delete(id);
    if (error === undefined) resolve?.(response);
    else reject?.(new Error(error));
  }

  /** Terminates the worker, and rejects all open requests. */
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
    return this.request("open", { file, input: model.input, output: model.spec.outputs[0] });
  }
}

export const nameOf = ({ model, precision }) => `${model} ${precision}`;

// --- images and outputs ------------------------------------------------------------------------------------------

/** Returns a model's input for pixels (H, W, C): the pixels, or normalized ones. */
export function inputOf({ spec }, pixels) {
  const { in_chans: chans, uint8_input: raw } = spec;
  const sides = sidesOf(spec.img_size);
  return raw ? { type: "uint8", data: pixels, dims: [1, ...sides, chans] }
    : { type: "float32", data: normalize(pixels, spec), dims: [1, chans, ...sides] };
}

/** Returns the served images as inputs of a model, preprocessed as in its certificate. */
export async function imagesOf(served, model) {
  const all = new Uint8Array(await bytesOf(model.pixels, "the images"));
  const size = all.length / served.images;
  return Array.from({ length: served.images }, (_, i) => inputOf(model, all.slice(i * size, (i + 1) * size)));
}

/** Compares an open model's outputs with the expected ones; also returns the time and the input of the first. */
async function check(engine, served, model) {
  const inputs = await imagesOf(served, model);
  const expected = new Float32Array(await bytesOf(model.expected, "the expected outputs"));
  const { outputs, calls } = await engine.request("run", { inputs });
  const probabilities = model.spec.outputs[0] === "probabilities";
  return { result: compare(expected, outputs, model.tolerance, probabilities), first: calls[0], input: inputs[0] };
}

/**
 * Returns the figures of n outputs compared with the expected ones, (n, classes) in one array; see verdict.py.
 *
 * Errors are relative to the expected outputs' spread over all images; where these hardly differ, to their size.
 */
export function compare(expected, outputs, tolerance, probabilities = false) {
  const images = outputs.length;
  const classes = expected.length / images;
  const wanted = outputs.map((_, i) => expected.subarray(i * classes, (i + 1) * classes));
  outputs.forEach((output) => {
    if (output.length !== classes) throw new Error(`it returns ${output.length} numbers, and ${classes} are expected`);
    if (!output.every(Number.isFinite)) throw new Error("it returns NaN or infinite outputs");
  });
  const mean = Float64Array.from({ length: classes }, (_, j) => wanted.reduce((sum, each) => sum + each[j] / images, 0));
  const distances = wanted.map((each) => distance(each, mean));
  const errors = wanted.map((each, i) => distance(each, outputs[i]));
  const [size, spread, noise] = [wanted.map((each) => distance(each, null)), distances, errors].map(rootMeanSquare);
  const competing = probabilities ? 2 : classes;
  const movable = (tolerance.sigmas * Math.SQRT2 * 10 ** (-tolerance.snr_db / 20) * spread) / Math.sqrt(competing);
  const changed = wanted.map((each, i) => highest(each) !== highest(outputs[i]));
  const decisions = changed.filter((each, i) => each && margin(wanted[i]) > movable).length;
  const largest = Math.max(...errors);
  const far = errors.filter((error) => error > tolerance.max_rel_error * spread).length;
  const higher = tolerance.confidence_sigmas * deviation(distances, errors); // how much higher the SNR may be
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

/** Returns the standard error of the ratio of two mean powers over the same images, in dB; see verdict.py. */
function deviation(signal, noise) {
  const [signalScale, noiseScale] = [rootMeanSquare(signal), rootMeanSquare(noise)];
  if (signal.length < 2 || !signalScale || !noiseScale) return 0;
  const differences = signal.map((value, i) => (value / signalScale) ** 2 - (noise[i] / noiseScale) ** 2); // 0 on average
  const variance = differences.reduce((sum, each) => sum + each ** 2, 0) / (signal.length - 1);
  return (10 / Math.LN10) * Math.sqrt(variance / signal.length);
}

/** Returns the Euclidean distance to another vector, or to the origin. */
const distance = (values, other) =>
  Math.sqrt(values.reduce((sum, value, j) => sum + (value - (other ? other[j] : 0)) ** 2, 0));

/** Returns the difference of the highest value and the second. */
function margin(values) {
  const top = highest(values);
  return values[top] - values.reduce((best, value, j) => (j === top ? best : Math.max(best, value)), -Infinity);
}

const highest = (values) => values.indexOf(values.reduce((a, b) => Math.max(a, b)));

/** Returns one line for a check that failed. */
const failureOf = (result, { tolerance }) =>
  `wrong outputs: an error of ${result.max_rel_error.toExponential(1)} of their spread (allowed ${tolerance.max_rel_error}), `
  + `${result.snr_db.toFixed(1)} dB (at least ${tolerance.snr_db}), same top-1 ${result.top1_agreement.toFixed(0)} %`;

// --- time -------------------------------------------------------------------------------------------------------------

export function quantile(values, q) {
  const sorted = Float64Array.from(values).sort();
  const place = (sorted.length - 1) * q;
  const below = Math.floor(place);
  return sorted[below] + (place - below) * ((sorted[below + 1] ?? sorted[below]) - sorted[below]);
}

/** Returns the latency of the last fifth of the seconds over that of the first fifth. */
export const slowdownOf = (seconds) => {
  const end = Math.max(1, Math.floor(seconds.length / 5));
  return quantile(seconds.slice(-end), 0.5) / Math.max(quantile(seconds.slice(0, end), 0.5), 1e-3);
};

/** Waits until the page is visible: browsers slow down pages in the background. */
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

/** Repeats work until the page stays visible during all of it. */
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
/** Returns a limited number of a round's calls, spread evenly. */
const thinned = (calls) => {
  const step = Math.ceil(calls.length / MAX_CALLS);
  return calls.filter((_, i) => i % step === 0).map(rounded);
};
/** Returns text that is safe to print on a terminal. */
export const plain = (text, limit = 300) => [...String(text).replace(/[\p{C}\p{Zl}\p{Zp}]/gu, " ")].slice(0, limit).join("");

/** Returns about how many seconds `measure` takes. */
export const secondsOf = ({ served, cases, rounds, sustained }) =>
  cases.length * (1 + rounds) * (served.pace.round_s + OVERHEAD_S) + sustained.length * served.pace.sustained_s;

/**
 * Checks every case, then times those that pass, interleaved and in reversed order every other round, then runs some
 * of them without a pause.
 *
 * @param plan {served, cases: [{model, backend}], rounds, sustained: indices of cases}
 * @param callbacks {log(text, done 0–1), changed(cases), second(index, seconds, case)}, and signal, an AbortSignal
 * @returns The record that export/browser/phone_record.py reads, without the device.
 * @throws The signal's reason, if it is aborted.
 */
export async function measure(plan, { log, changed, second, signal }) {
  const { served, rounds, sustained } = plan;
  const { round_s: roundLength, sustained_s: length } = served.pace;
  const cases = plan.cases.map(({ model, backend }) => ({
    model, backend, check: null, error: "", load: null, first: null, rounds: [], input: null, cpuFallback: false,
  }));
  const engines = new Map();
  const total = secondsOf(plan);
  let spent = 0;
  const progress = (text, seconds) => { log(text, spent / total); spent += seconds; };
  const titleOf = ({ model, backend }) => `${nameOf(model)} in ${labelOf(backend)}`;
  const end = () => { for (const engine of engines.values()) engine.end(); };
  signal.addEventListener("abort", end);

  /** Works on a case; an error is recorded, and the case is skipped from then on. */
  async function attempt(item, work) {
    signal.throwIfAborted();
    const key = labelOf(item.backend);
    try {
      if (!engines.has(key)) engines.set(key, await Engine.start(item.backend, served.runtime));
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
      progress(`checking ${titleOf(item)}`, roundLength + OVERHEAD_S);
      await attempt(item, async (engine) => {
        const { ms, cpuFallback } = await engine.open(item.model);
        Object.assign(item, { load: rounded(ms), cpuFallback });
        const { result, first, input } = await check(engine, served, item.model);
        Object.assign(item, { check: result, first: rounded(first), input });
        if (!result.passed) throw new Error(failureOf(result, item.model));
        await engine.request("close");
      });
    }
    for (let round = 0; round < rounds; round += 1) {
      for (const item of round % 2 ? [...cases].reverse() : cases) {
        progress(`round ${round + 1} of ${rounds}: ${titleOf(item)}`, roundLength + OVERHEAD_S);
        if (item.error) continue;
        await attempt(item, async (engine) => {
          await engine.open(item.model);
          const { calls } = await undisturbed(() =>
            engine.request("time", { input: item.input, seconds: roundLength, warmUp: WARM_UP, minCalls: MIN_CALLS }));
          await engine.request("close");
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
        await engine.request("close");
        if (seconds.length > 1) runs.push({ case: index, seconds });
      });
    }
    return { cases: cases.map(toRecord), sustained: runs };
  } finally {
    signal.removeEventListener("abort", end);
    end();
  }

  /** Runs one case without a pause; returns the median of each second, or the time of a call that takes longer. */
  async function run(engine, item, index) {
    const seconds = [];
    const start = performance.now();
    const elapsed = () => (performance.now() - start) / 1000;
    const before = spent;
    while (elapsed() < length) {
      log(`sustained run, second ${Math.ceil(elapsed()) || 1} of ${length}: ${titleOf(item)}`, spent / total);
      const { calls } = await engine.request("time", { input: item.input, seconds: 1, warmUp: 0, minCalls: 1 });
      seconds.push(rounded(quantile(calls, 0.5)));
      spent = before + Math.min(elapsed(), length);
      second(index, seconds, item);
    }
    return seconds;
  }
}

const toRecord = ({ model, backend, check: result, error, load, first, rounds, cpuFallback }) => ({
  model: model.model, precision: model.precision, sha256: model.file.sha256, img_size: model.spec.img_size,
  gmacs: model.gmacs, backend: backend.name, threads: backend.threads, cpu_fallback: cpuFallback, check: result, error,
  load_ms: load, first_ms: first, rounds,
});
