// One backend of ONNX Runtime in a thread of its own, which opens, runs and times one model at a time on request.
// Requests come from measure.js: {id, task, …}; responses are {id, …} or {id, error}.

// A model of one Relu: its first opening makes ONNX Runtime compile its WebAssembly and start its threads.
const TINY = "CAo6MwoMCgF4EgF5IgRSZWx1EgFnWg8KAXgSCgoICAESBAoCCAFiDwoBeRIKCggIARIECgIIAUIECgAQFA==";
const MAX_CALLS = 20000; // calls of a round

let ort = null;
let provider = null;
let model = null; // {session, input, output}

const tensorOf = ({ data, dims, type }) => new ort.Tensor(type, data, dims);

async function run(feed) {
  const { [model.output]: output } = await model.session.run({ [model.input]: feed });
  return output.data;
}

/** Returns a session, the milliseconds of its opening, and whether some operators fall back to the CPU. */
async function sessionOf(bytes) {
  const open = async (extra, cpuFallback) => {
    const start = performance.now();
    const session = await ort.InferenceSession.create(bytes, { executionProviders: [provider], ...extra });
    return { session, cpuFallback, ms: performance.now() - start };
  };
  if (provider.name === "wasm") return open({}, false);
  return open({ extra: { session: { disable_cpu_ep_fallback: "1" } } }, false).catch(() => open({}, true));
}

const TASKS = {
  /** Loads ONNX Runtime with a number of threads, once and for all. */
  async start({ module, loader, binary, threads, options }) {
    ort = await import(URL.createObjectURL(module));
    ort.env.logLevel = "error";
    Object.assign(ort.env.wasm, {
      numThreads: threads, wasmBinary: await binary.arrayBuffer(), wasmPaths: { mjs: URL.createObjectURL(loader) },
    });
    provider = options;
    const { session } = await sessionOf(Uint8Array.from(atob(TINY), (char) => char.charCodeAt(0)));
    await session.release();
    if (ort.env.wasm.numThreads !== threads)
      throw new Error(`ONNX Runtime takes ${ort.env.wasm.numThreads} of ${threads} threads here`);
    return {};
  },

  /** Opens a file. */
  async open({ file, input, output }) {
    await TASKS.close();
    const bytes = new Uint8Array(await file.arrayBuffer());
    const { session, cpuFallback, ms } = await sessionOf(bytes);
    model = { session, input, output };
    return { ms, cpuFallback };
  },

  /** Returns the outputs for some inputs, one after the other, and the milliseconds of each. */
  async run({ inputs }) {
    const outputs = [];
    const calls = [];
    for (const input of inputs) {
      const start = performance.now();
      outputs.push(Float32Array.from(await run(tensorOf(input))));
      calls.push(performance.now() - start);
    }
    return { outputs, calls };
  },

  /** Returns the milliseconds of each call during some seconds, after warm-up calls. */
  async time({ input, seconds, warmUp, minCalls }) {
    const feed = tensorOf(input);
    for (let i = 0; i < warmUp; i += 1) await run(feed);
    const calls = [];
    const end = performance.now() + 1000 * seconds;
    while (calls.length < minCalls || (performance.now() < end && calls.length < MAX_CALLS)) {
      const start = performance.now();
      await run(feed);
      calls.push(performance.now() - start);
    }
    return { calls };
  },

  async close() {
    const { session } = model ?? {};
    model = null;
    await session?.release();
    return {};
  },
};

self.onmessage = async ({ data: { id, task, ...options } }) => {
  try {
    self.postMessage({ id, ...(await TASKS[task](options)) });
  } catch (error) {
    self.postMessage({ id, error: String(error?.message ?? error) });
  }
};
