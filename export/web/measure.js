// Measuring in a browser: which backends it has, whether a file gives its answers there, and how long it takes.
// Nothing here draws; phone.js does. A `trial` is trial.json of export/trial.py; a `model` is one of trial.models.
import { normalize } from "./pixels.js";

const PATIENCE_S = 180; // for one answer of a worker; a backend that takes longer is given up
const MOST_ERROR = 1e6; // relative; JSON has no word for infinity
const MOST_THREADS = 4; // more of them than fast cores slow every call down

// --- files ------------------------------------------------------------------------------------------------------------

const fetched = new Map();

/** A file of the trial as a Blob, if it is the one that its hash belongs to; each is fetched once. */
export function fetchFile({ url, integrity }, name) {
  if (!fetched.has(url)) {
    const wanted = download(url, integrity, name);
    wanted.catch(() => fetched.delete(url));
    fetched.set(url, wanted);
  }
  return fetched.get(url);
}

async function download(url, integrity, name) {
  let response = await fetch(url, { integrity, referrerPolicy: "no-referrer" }).catch(() => null);
  if (response === null) {
    // A browser does not tell a wrong hash from a lost connection; whether the file can be had at all tells them apart.
    response = await fetch(url, { method: "HEAD" }).catch(() => null);
    throw new Error(response?.ok ? `${name} is damaged: its SHA-256 is not the one that was promised`
      : `${name} cannot be fetched; is the computer that serves it still there?`);
  }
  if (!response.ok) throw new Error(`${name} cannot be fetched: ${response.status}`);
  return response.blob();
}

const bytesOf = async (item, name) => (await fetchFile(item, name)).arrayBuffer();

/** The names of a model's classes; none where they are not known. */
export const labelsOf = async (model) => JSON.parse(await (await fetchFile(model.labels, "labels")).text());

// --- backends ---------------------------------------------------------------------------------------------------------

/** What ONNX Runtime can run in here: {name, threads, build, options, lacks: precisions}; and of the others, why not. */
export async function findBackends() {
  const backends = [{ name: "wasm", threads: 1, build: "wasm", options: { name: "wasm" }, lacks: [] }];
  const missing = {};
  let gpu = "";
  const cores = navigator.hardwareConcurrency ?? 1;
  const threads = Math.min(MOST_THREADS, Math.max(2, Math.ceil(cores / 2)));
  const secure = "it needs HTTPS, or localhost: serve the page with --tls";
  if (!self.crossOriginIsolated)
    missing["wasm threads"] = self.isSecureContext
      ? "the page came without the headers COOP and COEP, which allow them" : secure;
  else if (cores < 2) missing["wasm threads"] = "the browser admits to one core";
  else backends.push({ ...backends[0], threads });

  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  if (adapter) {
    const { vendor, architecture, description } = adapter.info ?? {};
    gpu = [vendor, architecture, description].filter(Boolean).join(" ") || "unnamed";
    const lacks = adapter.features.has("shader-f16") ? [] : ["fp16"];
    backends.push({ name: "webgpu", threads: 1, build: "webgpu", options: { name: "webgpu" }, lacks });
    if (lacks.length) missing["webgpu fp16"] = "this GPU computes no float16";
  } else
    missing.webgpu = !self.isSecureContext ? secure
      : navigator.gpu ? "the browser has WebGPU and no GPU for it" : "this browser has none";

  const deviceType = await webnnDevice();
  if (deviceType)
    backends.push({ name: "webnn", threads: 1, build: "webgpu", options: { name: "webnn", deviceType }, lacks: [] });
  else
    missing.webnn = !self.isSecureContext ? secure
      : navigator.ml ? "the browser has WebNN and no device for it" : "this browser has none";
  return { backends, missing, gpu };
}

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
  constructor(backend) {
    this.backend = backend;
    this.waiting = new Map();
    this.last = 0;
    this.worker = new Worker("phone_worker.js", { type: "module", name: labelOf(backend) });
    this.worker.onmessage = ({ data }) => this.settle(data);
    this.worker.onerror = (event) => this.fail(`its worker ended: ${event.message ?? "no reason given"}`);
  }

  /** Started, with its runtime checked. */
  static async start(backend, runtime) {
    const engine = new Engine(backend);
    try {
      const parts = runtime.builds[backend.build];
      const script = { type: "text/javascript" };
      const [module, loader, binary] = await Promise.all(["module", "loader", "binary"].map((role) =>
        fetchFile(parts[role], `ONNX Runtime (${parts[role].url.split("/").pop()})`)));
      await engine.ask("start", {
        module: module.slice(0, module.size, script.type), loader: loader.slice(0, loader.size, script.type), binary,
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
      const timer = setTimeout(() => this.fail(`no answer within ${PATIENCE_S} seconds`), 1000 * PATIENCE_S);
      this.waiting.set(this.last, { resolve, reject, timer });
      this.worker.postMessage({ id: this.last, task, ...told });
    });
  }

  settle({ id, error, ...answer }) {
    const { resolve, reject, timer } = this.waiting.get(id) ?? {};
    clearTimeout(timer);
    this.waiting.delete(id);
    if (error === undefined) resolve?.(answer);
    else reject?.(new Error(error));
  }

  /** Gives the worker up, and everything that it was asked. */
  fail(reason) {
    this.worker?.terminate();
    this.worker = null;
    for (const { reject, timer } of this.waiting.values()) {
      clearTimeout(timer);
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

// --- photographs and answers ------------------------------------------------------------------------------------------

/** What a model is fed for pixels (H, W, C): these, or they normalised. */
export function feedOf({ spec }, pixels) {
  const { img_size: px, in_chans: chans, takes_pixels: raw } = spec;
  return raw ? { type: "uint8", data: pixels, dims: [1, px, px, chans] }
    : { type: "float32", data: normalize(pixels, spec), dims: [1, chans, px, px] };
}

/** The trial's photographs for a model, cut as its certificate's were. */
export async function photographsOf(trial, model) {
  const all = new Uint8Array(await bytesOf(model.pixels, "the photographs"));
  const size = all.length / trial.photographs;
  return Array.from({ length: trial.photographs }, (_, i) => feedOf(model, all.slice(i * size, (i + 1) * size)));
}

/** Answers of an open model to the photographs, compared with the expected ones; and the time of the first call. */
async function check(engine, trial, model) {
  const inputs = await photographsOf(trial, model);
  const expected = new Float32Array(await bytesOf(model.expected, "the expected answers"));
  const { answers, calls } = await engine.ask("answer", { inputs });
  return { found: compare(expected, answers, model.tolerance), first: calls[0] };
}

/** Figures of answers (n of them) against the expected ones, (n, classes) one after the other. */
export function compare(expected, answers, tolerance) {
  const classes = expected.length / answers.length;
  let [signal, noise, largest, differ] = [0, 0, 0, 0];
  answers.forEach((answer, i) => {
    if (answer.length !== classes) throw new Error(`it gives ${answer.length} numbers, and ${classes} are expected`);
    if (!answer.every(Number.isFinite)) throw new Error("it gives NaN or infinite answers");
    const wanted = expected.subarray(i * classes, (i + 1) * classes);
    let error = 0;
    wanted.forEach((value, j) => {
      signal += value ** 2;
      noise += (value - answer[j]) ** 2;
      error = Math.max(error, Math.abs(value - answer[j]));
    });
    const spread = wanted.reduce((a, b) => Math.max(a, b)) - wanted.reduce((a, b) => Math.min(a, b));
    largest = Math.max(largest, Math.min(error / spread, MOST_ERROR)); // answers that are all the same have no spread
    differ += highest(wanted) !== highest(answer);
  });
  const snr = noise ? Math.min(200, 10 * Math.log10(Math.max(signal, Number.MIN_VALUE) / noise)) : 200;
  const agreement = 100 - (100 * differ) / answers.length;
  return {
    images: answers.length, max_rel_error: largest, snr_db: snr, top1_agreement: agreement,
    passed: largest <= tolerance.rel_error && snr >= tolerance.snr_db
      && (agreement >= tolerance.top1_agreement || differ <= tolerance.spare),
  };
}

const highest = (values) => values.indexOf(values.reduce((a, b) => Math.max(a, b)));

/** One line for a check that did not hold. */
export const driftOf = (found, { tolerance }) =>
  `wrong answers: relative error ${found.max_rel_error.toExponential(1)} (allowed ${tolerance.rel_error}), `
  + `${found.snr_db.toFixed(1)} dB (at least ${tolerance.snr_db}), same top-1 ${found.top1_agreement.toFixed(0)} %`;

// --- time -------------------------------------------------------------------------------------------------------------

export function quantile(values, q) {
  const sorted = Float64Array.from(values).sort();
  const place = (sorted.length - 1) * q;
  const below = Math.floor(place);
  return sorted[below] + (place - below) * ((sorted[below + 1] ?? sorted[below]) - sorted[below]);
}

/** Waits until the page can be seen: what is in the background is slowed down. */
export function visible() {
  if (!document.hidden) return Promise.resolve();
  return new Promise((resolve) => {
    document.addEventListener("visibilitychange", function seen() {
      if (document.hidden) return;
      document.removeEventListener("visibilitychange", seen);
      resolve();
    });
  });
}

const rounded = (ms) => Math.round(1000 * ms) / 1000;
const plain = (text) => String(text).replace(/[\p{C}\p{Zl}\p{Zp}]/gu, " ").slice(0, 300);

/**
 * Checks every case, then lets those that hold take turns, in reversed order every other round, then runs some of them
 * without a pause.
 *
 * @param plan {trial, cases: [{model, backend}], rounds, sustained: indices of cases}
 * @param told {say(text, done 0–1), changed(cases), second(index, seconds)}; and signal, an AbortSignal
 * @returns What export/phone_record.py reads, but for the device.
 */
export async function measure({ trial, cases: wanted, rounds, sustained }, { say, changed, second, signal }) {
  const { turn_s: turn, sustained_s: length } = trial.pace;
  const cases = wanted.map(({ model, backend }) => ({
    model, backend, check: null, error: "", load: null, first: null, rounds: [], input: null,
  }));
  const engines = new Map();
  const total = cases.length * (1 + rounds) * (turn + 0.5) + sustained.length * length;
  let spent = 0;
  const progress = (text, seconds) => { say(text, spent / total); spent += seconds; };
  const titleOf = ({ model, backend }) => `${nameOf(model)} in ${labelOf(backend)}`;

  /** Does one thing with a case; what goes wrong is the case's error, and it is left out from then on. */
  async function attempt(item, work) {
    await visible();
    signal.throwIfAborted();
    try {
      const key = labelOf(item.backend);
      if (!engines.has(key)) engines.set(key, await Engine.start(item.backend, trial.runtime));
      await work(engines.get(key));
    } catch (error) {
      item.error = plain(error.message) || "it failed";
      const engine = engines.get(labelOf(item.backend));
      if (engine && !engine.worker) engines.delete(labelOf(item.backend)); // the next case gets a new one
    }
    changed(cases);
  }

  try {
    for (const item of cases) {
      progress(`checking ${titleOf(item)}`, turn + 0.5);
      await attempt(item, async (engine) => {
        item.load = rounded((await engine.open(item.model)).ms);
        const { found, first } = await check(engine, trial, item.model);
        item.check = found;
        item.first = rounded(first);
        if (!item.check.passed) throw new Error(driftOf(item.check, item.model));
        [item.input] = await photographsOf(trial, item.model);
        await engine.ask("close");
      });
    }
    for (let round = 0; round < rounds; round += 1) {
      for (const item of round % 2 ? [...cases].reverse() : cases) {
        if (item.error) { spent += turn + 0.5; continue; }
        progress(`round ${round + 1} of ${rounds}: ${titleOf(item)}`, turn + 0.5);
        await attempt(item, async (engine) => {
          await engine.open(item.model);
          const { calls } = await engine.ask("time", { input: item.input, seconds: turn });
          await engine.ask("close");
          item.rounds.push(calls.map(rounded));
        });
      }
    }
    const runs = [];
    for (const index of sustained) {
      const item = cases[index];
      const seconds = [];
      if (item.error) { spent += length; continue; }
      await attempt(item, async (engine) => {
        await engine.open(item.model);
        for (let i = 0; i < length; i += 1) {
          await visible();
          signal.throwIfAborted();
          progress(`without a pause, second ${i + 1} of ${length}: ${titleOf(item)}`, 1);
          const { calls } = await engine.ask("time", { input: item.input, seconds: 1 });
          seconds.push(rounded(quantile(calls, 0.5)));
          second(index, seconds, item);
        }
        await engine.ask("close");
      });
      signal.throwIfAborted();
      if (seconds.length > 1) runs.push({ case: index, seconds });
    }
    return { cases: cases.map(toRecord), sustained: runs };
  } finally {
    for (const engine of engines.values()) engine.end();
  }
}

const toRecord = ({ model, backend, check: found, error, load, first, rounds }) => ({
  model: model.model, precision: model.precision, sha256: model.sha256, img_size: model.spec.img_size,
  gmacs: model.gmacs, backend: backend.name, threads: backend.threads, check: found, error,
  load_ms: load, first_ms: first, rounds,
});
