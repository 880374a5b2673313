// One backend of ONNX Runtime in a thread of its own, which opens, checks and times one model at a time when told to.
// It is told by measure.js: {id, task, …}, and answers {id, …} or {id, error}.

// A model of one Relu: its first opening makes ONNX Runtime compile its WebAssembly and start its threads.
const TINY = "CAo6MwoMCgF4EgF5IgRSZWx1EgFnWg8KAXgSCgoICAESBAoCCAFiDwoBeRIKCggIARIECgIIAUIECgAQFA==";
const MAX_CALLS = 20000; // calls of a turn

let ort = null;
let provider = null;
let model = null; // {session, input, output}

const tensorOf = ({ data, dims, type }) => new ort.Tensor(type, data, dims);

async function run(feed) {
  const { [model.output]: output } = await model.session.run({ [model.input]: feed });
  return output.data;
}

/** A session, how long its opening took, and whether a provider other than the CPU's leaves operators to the CPU. */
async function sessionOf(bytes) {
  const open = async (extra, shared) => {
    const start = performance.now();
    const session = await ort.InferenceSession.create(bytes, { executionProviders: [provider], ...extra });
    return { session, shared, ms: performance.now() - start };
  };
  if (provider.name === "wasm") return open({}, false);
  return open({ extra: { session: { disable_cpu_ep_fallback: "1" } } }, false).catch(() => open({}, true));
}

const TASKS = {
  /** Makes ONNX Runtime ready, with so many threads, for good. */
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

  /** From a file's bytes to ready. */
  async open({ file, input, output }) {
    await TASKS.close();
    const bytes = new Uint8Array(await file.arrayBuffer());
    const { session, shared, ms } = await sessionOf(bytes);
    model = { session, input, output };
    return { ms, shared };
  },

  /** The answers to some inputs, one after the other, and the milliseconds of each. */
  async answer({ inputs }) {
    const answers = [];
    const calls = [];
    for (const input of inputs) {
      const start = performance.now();
      answers.push(Float32Array.from(await run(tensorOf(input))));
      calls.push(performance.now() - start);
    }
    return { answers, calls };
  },

  /** The milliseconds of each call of so many seconds, after some calls that are not timed. */
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

self.onmessage = async ({ data: { id, task, ...told } }) => {
  try {
    self.postMessage({ id, ...(await TASKS[task](told)) });
  } catch (error) {
    self.postMessage({ id, error: String(error?.message ?? error) });
  }
};
